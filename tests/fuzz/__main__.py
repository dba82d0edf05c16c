"""`python -m tests.fuzz --count N --seed S`: random programs from seed S on; prints the failing ones, shrunk."""

from __future__ import annotations

import argparse
import sys
import time

from .check import BATCH, check, shrink
from .generate import generate


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=3000, help="programs to try")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--show", type=int, default=5, help="failures to shrink and print, one a kind")
    parser.add_argument("--print", action="store_true", help="print the programs and stop")
    args = parser.parse_args()
    seeds = range(args.seed, args.seed + args.count)
    if args.print:
        for s in seeds:
            print(generate(s).script())
        return 0
    kinds: dict[str, list[int]] = {}
    shown = 0
    begin = time.perf_counter()
    for k in range(0, len(seeds), BATCH):
        batch = seeds[k : k + BATCH]
        for failure in check(generate(s) for s in batch):
            seen = kinds.setdefault(failure.kind, [])
            seen.append(failure.recipe.seed)
            if len(seen) == 1 and shown < args.show:
                shown += 1
                print(shrink(failure), flush=True)
        failed = sum(map(len, kinds.values()))
        print(
            f"seeds {batch[0]} to {batch[-1]}: {failed} failed so far, {time.perf_counter() - begin:.0f} s", flush=True
        )
    for kind, failing in kinds.items():
        print(f"{len(failing):4} {kind}: seeds {failing[:12]}")
    return 1 if kinds else 0


if __name__ == "__main__":
    sys.exit(main())
