"""What a free size costs: kernels compiled for sizes that are known, and for all sizes at once.

    python -m benchmarks.sizes [--quick] [--json FILE] [--check]

`static` is compiled with `dynamic=False`, `first` with the first dimension free (a batch, as after a second one), `all`
with `dynamic=True`, where every size of every input is a symbol; the same function of the same tensors, float32, on all
threads. Medians of interleaved rounds. Where a size pays for being known is what the ratios say; a graph's own report
names its free sizes, and those that a line fixed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FunctionType

import torch
from torch import Tensor
from torch.nn import functional as F

import minifuse

from . import harness
from .harness import Board, Column, ProbeError, Target


def softmax(x: Tensor) -> Tensor:
    return F.softmax(x * 2, -1)


def norm_gelu(x: Tensor, w: Tensor) -> Tensor:
    return F.gelu(F.layer_norm(x, x.shape[-1:], w, w))


def pointwise(x: Tensor, y: Tensor) -> Tensor:
    return (x + y).relu() * x


def broadcast(x: Tensor, w: Tensor) -> Tensor:
    return (x + w).sigmoid() * w


def columns(x: Tensor) -> Tensor:
    return (x * 2).sum(0)


def transposed(x: Tensor, y: Tensor) -> Tensor:
    return x + y.t()


def rotary(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * c + torch.cat([-x[..., half:], x[..., :half]], -1) * s


def group_norm(x: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, 8))


def cross_entropy(x: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x, target)


def attention(q: Tensor) -> Tensor:
    return F.softmax(q @ q.transpose(-1, -2) * 0.1, -1) @ q


CASES: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "softmax 4096 x 1024": (softmax, ((4096, 1024),)),
    "layer norm + gelu 4096 x 1024": (norm_gelu, ((4096, 1024), (1024,))),
    "x, y pointwise 4096 x 1024": (pointwise, ((4096, 1024), (4096, 1024))),
    "row broadcast 4096 x 1024": (broadcast, ((4096, 1024), (1024,))),
    "column sum 4096 x 1024": (columns, ((4096, 1024),)),
    "x + transpose(y) 2048 x 2048": (transposed, ((2048, 2048), (2048, 2048))),
    "rotary 8 x 8 x 256 x 64": (rotary, ((8, 8, 256, 64), (256, 64), (256, 64))),
    "group norm + silu 16 x 64 x 48 x 40": (group_norm, ((16, 64, 48, 40),)),
    "cross entropy 2048 x 8192": (cross_entropy, ((2048, 8192), (2048,))),
    "attention in parts 8 x 8 x 256 x 64": (attention, ((8, 8, 256, 64),)),
}
QUICK = ("softmax 4096 x 1024", "column sum 4096 x 1024")


def board() -> Board:
    ratios = [Column(f"{name} ratio", harness.ratio, Target("<=", 1.05)) for name in ("first", "all")]
    return Board(
        "Milliseconds of kernels for known and for free sizes", [*map(Column, ("static", "first", "all")), *ratios]
    )


def compiled(case: str, how: str) -> Callable[[], Tensor]:
    """A call of a case, compiled for static sizes, a free first dimension, or all of them free."""
    function, shapes = CASES[case]
    torch.manual_seed(0)
    tensors = [torch.randn(shape) for shape in shapes]
    if function is cross_entropy:
        tensors[1] = torch.randint(0, shapes[0][1], shapes[1])
    if how == "first":
        torch._dynamo.mark_dynamic(tensors[0], 0)
        for other, shape in zip(tensors[1:], shapes[1:], strict=True):
            if shape[0] == shapes[0][0] and (len(shape) > 1 or function is cross_entropy):
                torch._dynamo.mark_dynamic(other, int(function is transposed))
    # Dynamo keeps what it compiled by code: each has one of its own
    own = FunctionType(function.__code__.replace(co_name=f"{function.__name__}_{how}"), function.__globals__)
    run = torch.compile(own, backend="minifuse", dynamic={"static": False, "first": None, "all": True}[how])
    before = len(minifuse.reports())
    run(*tensors)
    free = [d for r in minifuse.reports()[before:] for d in r.decisions if d.rule == "size" and d.taken]
    if bool(free) != (how != "static"):
        raise ProbeError(f"{case}: compiled for {how} sizes, its report names {len(free)} free ones")
    return lambda: run(*tensors)


def probe(case: str, rounds: int) -> dict[str, float]:
    """Seconds of a call by how it was compiled. Run it through `fresh`."""
    cases = {how: compiled(case, how) for how in ("static", "first", "all")}
    return {how: sample.median for how, sample in harness.interleaved(cases, rounds).items()}


def main() -> int:
    options = harness.arguments(__doc__).parse_args()
    table = board()
    for case in QUICK if options.quick else CASES:
        try:
            found = harness.fresh(probe, case, 11 if options.quick else 31)
        except ProbeError as error:
            table.fail(case, error)
            continue
        ratios = {f"{how}_ratio": found[how] / found["static"] for how in ("first", "all")}
        table.add(case, **{how: f"{1e3 * s:.3g} ms" for how, s in found.items()}, **ratios)
    return harness.finish(table, options)


if __name__ == "__main__":
    sys.exit(main())
