"""Memory-bound kernels against the machine's own copy: the share of its bandwidth that each reaches.

    python -m benchmarks.memory_roof [--quick] [--device cuda] [--json FILE] [--check]

A kernel's bytes are the least it can move: each input once, each output once. The roof is `copy_` into memory that has
been touched before, timed in the same rounds. A compiled function returns a new tensor a call, as in a program.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import harness, models
from .harness import Board, Column, Target

Shape = tuple[int, ...]
ROW, VOCABULARY = 1024, 32_768


@dataclass(frozen=True)
class Case:
    """A function of tensors, and what makes these for a number of elements. `moved` gives the least bytes that it moves
    where that is not each input and each output once."""

    name: str
    run: Callable[..., Any]
    inputs: Callable[[int], tuple[Tensor, ...]]
    quick: bool = False
    moved: Callable[[int], int] | None = None

    def least(self, inputs: Sequence[Tensor], elements: int) -> int:
        if self.moved is not None:
            return self.moved(elements)
        outputs = self.run(*inputs)
        both = [*inputs, *(outputs if isinstance(outputs, tuple) else (outputs,))]
        return sum(x.nbytes for x in both)


def _random(*shapes: Callable[[int], Shape]) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda n: tuple(torch.randn(shape(n)) for shape in shapes)


def _flat(n: int) -> Shape:
    return (n,)


def _rows(n: int) -> Shape:
    return (n // ROW, ROW)


def _row(n: int) -> Shape:
    return (ROW,)


def _column(n: int) -> Shape:
    return (n // ROW, 1)


def _tokens(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n // VOCABULARY, VOCABULARY), torch.randint(0, VOCABULARY, (n // VOCABULARY,))


def _transposed(n: int) -> tuple[Tensor, Tensor]:
    side = 4096
    return torch.randn(n // side, side), torch.randn(side, n // side)


def _images(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n // 2**18, 64, 64, 64), torch.randn(64), torch.randn(64)


def layer_norm_backward(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.aten.native_layer_norm_backward(dy, x, x.shape[-1:], mean, rstd, weight, weight, [True] * 3)


def rms_norm_backward(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    scaled, normal = dy * weight, x * rstd
    return (scaled - normal * (scaled * normal).mean(-1, keepdim=True)) * rstd, (dy * normal).sum(0)


def softmax_backward(dy: Tensor, y: Tensor) -> Tensor:
    return torch.ops.aten._softmax_backward_data(dy, y, -1, dy.dtype)


def dropped(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Dropout, residual and layer norm: the sum is what the next block adds to."""
    total = x + F.dropout(y, 0.1)
    return total, F.layer_norm(total, x.shape[-1:], weight, bias)


def adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> None:
    """A step in place; the bias corrections are those of a late step."""
    p.mul_(1 - 1e-3 * 0.01)
    m.lerp_(g, 0.1)
    v.mul_(0.999).addcmul_(g, g, value=0.001)
    p.addcdiv_(m, v.abs().sqrt().add(1e-8), value=-1e-3)


CASES = (
    Case("cos(cos(x))", lambda x: x.cos().cos(), _random(_flat), quick=True),
    Case("relu(x * 2 + 1)", lambda x: (x * 2 + 1).relu(), _random(_flat)),
    Case("gelu(x + bias)", lambda x, b: F.gelu(x + b), _random(_rows, _row), quick=True),
    Case("silu(x) * y", lambda x, y: F.silu(x) * y, _random(_flat, _flat)),
    Case("sum(x * x)", lambda x: (x * x).sum(), _random(_flat)),
    Case("row sum", lambda x: x.sum(1), _random(_rows)),
    Case("column sum", lambda x: x.sum(0), _random(_rows), quick=True),
    Case("softmax", lambda x: x.softmax(-1), _random(_rows)),
    Case("softmax backward", softmax_backward, _random(_rows, _rows)),
    Case("cross entropy", F.cross_entropy, _tokens),
    Case("layer norm", lambda x: F.layer_norm(x, x.shape[-1:]), _random(_rows), quick=True),
    Case("layer norm backward", layer_norm_backward, _random(_rows, _rows, _column, _column, _row)),
    Case("RMS norm", lambda x, w: F.rms_norm(x, x.shape[-1:], w), _random(_rows, _row)),
    Case("RMS norm backward", rms_norm_backward, _random(_rows, _rows, _column, _row)),
    Case("dropout + residual + norm", dropped, _random(_rows, _rows, _row, _row)),
    Case("group norm + silu", lambda x, w, b: F.silu(F.group_norm(x, 8, w, b)), _images),
    Case("x + transpose(y)", lambda x, y: x + y.t(), _transposed),
    # parameter, gradient and two moments are read, all but the gradient written
    Case("AdamW", adamw, lambda n: tuple(torch.rand(n // 4) for _ in range(4)), moved=lambda n: 7 * n),
)


def measure(table: Board, case: Case, elements: int, device: str, backends: list[str], rounds: int) -> None:
    inputs = [x.to(device) for x in case.inputs(elements)]
    least = case.least(inputs, elements)
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
