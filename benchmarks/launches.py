"""What starting a kernel costs the host: Triton's own launcher, Inductor's programs and minifuse's.

    python -m benchmarks.launches [--quick] [--json FILE] [--check]

A graph of `MANY` small tensors, each through an operator of its own, is a program of as many kernels; one of `FEW` has
what else a call costs (guards, the wrapper, outputs). The difference over the kernels between is the cost of one, with
the result that is allocated for it. `triton` calls a `@triton.jit` function as users do, into memory that is there.
Microseconds; medians of interleaved rounds; the device is waited for behind each round, not inside of it.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import harness, models
from .harness import Board, Column, Target

OPERATORS: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.sin, torch.cos, torch.exp, torch.tanh, torch.sigmoid, torch.relu, torch.abs, torch.neg, torch.sqrt,
    torch.rsqrt,
    torch.floor, torch.ceil, torch.log1p, torch.expm1, torch.atan, torch.sinh, torch.cosh, torch.erf, torch.sign,
    torch.square, torch.reciprocal, torch.exp2,
)  # fmt: skip
FEW, MANY = 2, 22
ELEMENTS = 256
CALLS, ROUNDS = 50, 21


@triton.jit
def add_one(x, y, n, block: tl.constexpr):
    i = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(y + i, tl.load(x + i, mask=i < n) + 1, mask=i < n)


def each(*tensors: Tensor) -> list[Tensor]:
    """Every tensor through an operator of its own: nothing fuses, and no two are a batch."""
    return [operator(x) for operator, x in zip(OPERATORS, tensors, strict=False)]


def seconds_of_calls(runs: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Median seconds of the host in one call of each, in turn."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            run()
            _wait(device)
            begin = time.perf_counter()
            for _ in range(CALLS):
                run()
            found[name].append((time.perf_counter() - begin) / CALLS)
            _wait(device)
    return {name: statistics.median(times) for name, times in found.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(device: torch.device, backends: tuple[str, ...] = ("inductor", "minifuse")) -> dict[str, float]:
    """Seconds of the host a kernel, by launcher."""
    tensors = [torch.rand(ELEMENTS + k, device=device) for k in range(MANY)]
    runs: dict[str, Callable[[], Any]] = {}
    for backend in backends:
        for count in (FEW, MANY):
            torch._dynamo.reset()
            run = functools.partial(
                torch.compile(each, backend=models.resolve(backend), dynamic=False), *tensors[:count]
            )
            run()
            runs[f"{backend} {count}"] = run
    if device.type == "cuda":
        x, y = tensors[0], torch.empty_like(tensors[0])
        runs["triton"] = lambda: add_one[(1,)](x, y, ELEMENTS, block=512)
    times = seconds_of_calls(runs, device)
    found = {b: (times[f"{b} {MANY}"] - times[f"{b} {FEW}"]) / (MANY - FEW) for b in backends}
    return {**({"triton": times["triton"]} if "triton" in times else {}), **found}


def main() -> int:
    options = harness.arguments(__doc__).parse_args()
    if not torch.cuda.is_available():
        print("skipped: no CUDA or ROCm device")
        return 0
    table = Board("The host's cost of a kernel, in microseconds", [
        Column("triton", "{:.2f}".format), Column("inductor", "{:.2f}".format), Column("minifuse", "{:.2f}".format),
        Column("ratio", harness.ratio, Target("<=", 1.0)),
    ])  # fmt: skip
    found = measure(torch.device("cuda", torch.cuda.current_device()))
    table.add("a kernel", **{name: 1e6 * s for name, s in found.items()}, ratio=found["minifuse"] / found["inductor"])
    return harness.finish(table, options)


if __name__ == "__main__":
    sys.exit(main())
