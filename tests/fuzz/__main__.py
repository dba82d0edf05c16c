"""Random programs from seed S on; prints the failing ones, shrunk: `python -m tests.fuzz --count N --seed S`.

With `--calls` what callers see of compiled functions; with `--fusible` graphs of what fuses, over a few shapes; else
what kernels compute, of every kind. `--target triton` needs TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from typing import Any

from . import calls, check, generate
from .fusible import fusible


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=3000, help="programs to try")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--show", type=int, default=5, help="failures to shrink and print, one a kind")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--calls", action="store_true", help="through torch.compile, with aliases and writes in place")
    kind.add_argument("--fusible", action="store_true", help="pointwise operators, reductions and views alone")
    parser.add_argument("--target", choices=["c", "triton"], default="c")
    parser.add_argument("--print", action="store_true", help="print the programs and stop")
    args = parser.parse_args()
    if args.calls and args.target != "c":
        parser.error("--calls goes with the target c alone")
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    judge: Any = calls if args.calls else check
    make: Any = calls.generate if args.calls else fusible if args.fusible else generate.generate
    how = {} if args.calls else {"target": args.target}
    seeds = range(args.seed, args.seed + args.count)
    if args.print:
        for s in seeds:
            print(make(s).source() if args.calls else make(s).script())
        return 0
    kinds: dict[str, list[int]] = {}
    begin = time.perf_counter()
    for k in range(0, len(seeds), judge.BATCH):
        batch = seeds[k : k + judge.BATCH]
        for failure in judge.check((make(s) for s in batch), **how):
            seen = kinds.setdefault(failure.kind, [])
            seen.append(failure.seed)
            print(f"seed {failure.seed}: {failure.kind}", flush=True)
            if len(seen) == 1 and len(kinds) <= args.show:
                print(judge.shrink(failure, **how), flush=True)
        failed = sum(map(len, kinds.values()))
        print(
            f"seeds {batch[0]} to {batch[-1]}: {failed} failed so far, {time.perf_counter() - begin:.0f} s", flush=True
        )
    for kind, failing in kinds.items():
        print(f"{len(failing):4} {kind}: seeds {failing[:12]}")
    return 1 if kinds else 0


if __name__ == "__main__":
    sys.exit(main())
