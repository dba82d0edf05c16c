"""`python -m tests.models`: a training step of every family beside eager, and what of it runs in generated kernels."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed

from .check import COVERED, Found, attempt
from .families import FAMILIES
from .left import LEFT, why


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.models", description=__doc__)
    parser.add_argument("names", nargs="*", help="families (all by default)")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    args = parser.parse_args()
    names = args.names or list(FAMILIES)
    total, bad = Found({}), []
    callers: dict[tuple[str, str], list[str]] = {}
    context = multiprocessing.get_context("spawn")
    # What torch keeps of each compile adds up. (A pool with `max_tasks_per_child` may wait for ever for a worker that
    # it has just retired: CPython 3.11, one process.)
    batches = [names[k : k + 20 * args.jobs] for k in range(0, len(names), 20 * args.jobs)]
    for batch in batches:
        with ProcessPoolExecutor(args.jobs, context) as pool:
            done = {pool.submit(attempt, name): name for name in batch}
            results = [(done[future], *future.result()) for future in as_completed(done)]
        for name, found, seconds in results:
            if isinstance(found, str):
                bad.append(name)
                print(f"{name:24} fails\n{found}", flush=True)
                continue
            if found.wrong or found.unknown or found.coverage < COVERED:
                bad.append(name)
            total.generated += found.generated
            total.operators += found.operators
            total.left.update(found.left)
            for left in found.left:
                callers.setdefault(left, []).append(name)
            print(
                f"{name:24} {'WRONG' if found.wrong else 'right'}  error {found.worst:5.2f} of what is allowed  "
                f"{found.generated:5} of {found.operators:5} operators generated  {seconds:4.0f} s"
                + "".join(f"\n    {tensor}: {ratio:.2f}" for tensor, ratio in found.wrong.items()),
                flush=True,
            )
    print(
        f"\n{total.generated} of {total.operators} pointwise and reduction operators run in generated kernels, ", end=""
    )
    print(f"{total.coverage:.2%}; left to ATen, besides what is meant to be:")
    for (op, reason), calls in total.left.most_common():
        print(f"{calls:5} {op} ({why(op, reason) or 'NOT KNOWN'}) in {', '.join(callers[op, reason])}")
    if not args.names:
        print(
            f"known, and called by no family: {', '.join(sorted(LEFT.keys() - {op for op, _ in total.left})) or 'none'}"
        )
    print(f"{len(names) - len(bad)} of {len(names)} families are right; not: {', '.join(bad) or 'none'}")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
