"""Memory-bound kernels against the machine's own copy: the share of its bandwidth that each reaches.

    python -m benchmarks.memory_roof [--quick] [--device cuda] [--json FILE] [--check]

A kernel's bytes are the least it can move: each input once, each output once. The roof is `copy_` into memory that has
been touched before, timed in the same rounds. A compiled function returns a new tensor a call, as in a program.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import harness, models
from .harness import Board, Column, Target

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A function of float32 tensors, and the shapes of those for a number of elements."""

    name: str
    run: Callable[..., Tensor]
    shapes: Callable[[int], tuple[Shape, ...]]
    quick: bool = False


def _flat(n: int) -> tuple[Shape, ...]:
    return ((n,),)


def _rows(n: int) -> tuple[Shape, ...]:
    return ((n // 1024, 1024),)


CASES = (
    Case("cos(cos(x))", lambda x: x.cos().cos(), _flat, quick=True),
    Case("relu(x * 2 + 1)", lambda x: (x * 2 + 1).relu(), _flat),
    Case("gelu(x + bias)", lambda x, b: F.gelu(x + b), lambda n: (*_rows(n), (1024,)), quick=True),
    Case("silu(x) * y", lambda x, y: F.silu(x) * y, lambda n: (*_flat(n), *_flat(n))),
    Case("sum(x * x)", lambda x: (x * x).sum(), _flat),
    Case("row sum", lambda x: x.sum(1), _rows),
    Case("column sum", lambda x: x.sum(0), _rows, quick=True),
    Case("softmax", lambda x: x.softmax(-1), _rows),
    Case("layer norm", lambda x: F.layer_norm(x, x.shape[-1:]), _rows, quick=True),
    Case("x + transpose(y)", lambda x, y: x + y.t(), lambda n: ((n // 4096, 4096), (4096, n // 4096))),
)


def measure(table: Board, case: Case, elements: int, device: str, backends: list[str], rounds: int) -> None:
    inputs = [torch.randn(shape, device=device) for shape in case.shapes(elements)]
    least = sum(x.nbytes for x in inputs) + case.run(*inputs).nbytes
    source, target = torch.randn(elements, device=device), torch.zeros(elements, device=device)
    cases = {"copy": lambda: target.copy_(source)}
    for name in backends:
        # One Python function has one cache of compiled code: start afresh, so that no case is compiled as dynamic.
        torch._dynamo.reset()
        run = case.run if name == "eager" else torch.compile(case.run, backend=models.resolve(name), dynamic=False)
        cases[name] = lambda run=run: run(*inputs)  # type: ignore[misc]
        cases[name]()
    samples = harness.interleaved({k: _synchronised(f, device) for k, f in cases.items()}, rounds)
    bandwidth = {k: (2 * source.nbytes if k == "copy" else least) / s.median for k, s in samples.items()}
    table.add(case.name, bytes=least, copy=samples["copy"], ours=samples[backends[-1]])
    table.add(case.name, share_of_copy=bandwidth[backends[-1]] / bandwidth["copy"])
    for name in backends[:-1]:
        table.add(case.name, **{name: samples[name]})


def _synchronised(run: Callable[[], Any], device: str) -> Callable[[], Any]:
    if device == "cpu":
        return run

    def timed() -> None:
        run()
        torch.cuda.synchronize()

    return timed


def main() -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--backends", default="eager,inductor,minifuse", type=lambda text: text.split(","))
    options = parser.parse_args()
    # A GPU needs more data: its cache holds 16 million floats, and a launch takes microseconds.
    elements = 2**24 if options.device == "cpu" else 2**28
    table = Board(
        f"Memory-bound kernels, {elements / 2**20:.0f} Mi floats: {options.backends[-1]} on {options.device}",
        [
            Column("bytes", harness.megabytes),
            Column("copy"),
            *(Column(name) for name in options.backends[:-1]),
            Column("ours"),
            Column("share of copy", harness.ratio, Target(">=", 0.9)),
        ],
    )
    for case in CASES:
        if case.quick or not options.quick:
            measure(table, case, elements, options.device, options.backends, rounds=11 if options.quick else 31)
    return harness.finish(table, options)


if __name__ == "__main__":
    sys.exit(main())
