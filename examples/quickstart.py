"""Two cosines in one kernel: `torch.compile` with minifuse, and what it did.

python -m examples.quickstart [--backend inductor] [--elements 16777216]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from .common import compiled, print_reports


def cosines(x: Tensor) -> Tensor:
    return x.cos().cos()


def milliseconds(run: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The median of 9 calls, after two that warm up."""
    times = []
    for _ in range(11):
        start = time.perf_counter()
        run(x)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="minifuse")
    parser.add_argument("--elements", type=int, default=2**24)
    options = parser.parse_args()

    x = torch.randn(options.elements)
    fused = compiled(cosines, options.backend)
    torch.testing.assert_close(fused(x), cosines(x))
    eager_ms, fused_ms = milliseconds(cosines, x), milliseconds(fused, x)
    print(f"eager {eager_ms:.2f} ms   {options.backend} {fused_ms:.2f} ms   {eager_ms / fused_ms:.1f}x")
    print_reports(options.backend)


if __name__ == "__main__":
    main()
