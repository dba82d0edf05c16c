"""Every kind of fusion: the graph that goes in and the kernels that come out, its numbers on both targets, and a graph
like it that is refused, with the rule that refuses it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import minifuse
from tests.judge import check, compiled, outcomes_in_triton, same

ROOT = Path(__file__).parents[2]
Function = Callable[..., Any]


@dataclass(frozen=True)
class Kind:
    """A function of tensors of these shapes (an int is so many indices below 16), and the operators of each kernel of
    its plan, by name. `refused`: a function of the same tensors, two of its nodes, and the rule between them."""

    run: Function
    shapes: tuple[tuple[int, ...] | int, ...]
    kernels: tuple[str, ...]
    refused: tuple[Function, str, str, str]
    tolerance: float = 1e-5

    @property
    def args(self) -> list[Tensor]:
        torch.manual_seed(0)
        return [torch.arange(s) * 7 % 16 if isinstance(s, int) else torch.randn(s) for s in self.shapes]


def _norm_backward(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Row statistics, and the sums of columns that ride along with them."""
    h = g * x
    return g - x * h.mean(1, keepdim=True), h.sum(0)


SQUARE, WIDE, TALL = (64, 64), (64, 512), (4096, 64)
KINDS: dict[str, Kind] = {
    "a producer into its consumer": Kind(
        lambda x, y: (x.sin() * 2).exp(), (SQUARE, SQUARE), ("sin mul exp",),
        (lambda x, y: (x.sin() @ y).exp(), "sin", "exp", "extern"),
    ),
    "a producer and its two readers, one kernel of two results": Kind(
        lambda x, y: (x.sin() + 1, x.sin() * y), (SQUARE, SQUARE), ("sin add mul",),
        (lambda x, y: (x.sin() + 1, x.sin().flip(0)[1:] * y[1:]), "add", "mul", "partial rows"),
    ),
    "a cheap producer computed at each place where it is read": Kind(
        lambda x: (x + 1)[1:].sin() - (x + 1)[:-1], (WIDE,), ("add sin sub",),
        (lambda x: x.exp().erf()[1:].sin() - x.exp().erf()[:-1], "erf", "sub", "different rows"),
    ),
    "siblings that read one tensor": Kind(
        lambda x: (x.sin(), x.cos()), (SQUARE,), ("sin cos",),
        (lambda x: (x.sin(), x[:, 1:].cos()), "sin", "cos", "partial rows"),
    ),
    "independent kernels in one launch": Kind(
        lambda x, y: (x * 2 + 1, y * 2 + 1), ((700,), (33, 7)), ("add add_1 mul mul_1",),
        (lambda x, y: (x * 2 + 1, y * 3 + 1), "add", "add_1", "nothing shared"),
    ),
    "views in loads and stores": Kind(
        lambda x: (x.t().sin().reshape(16, -1)[:, ::2] + 1).permute(1, 0) * 2, (SQUARE,), ("add clone mul sin",),
        (lambda x: (x.sin() + 1, x.t().cumsum(0) + x.cumsum(0)), "cumsum", "cumsum_1", "different trees"),
    ),
    "pieces written in place": Kind(
        lambda x, y: torch.cat([x.softmax(1), y.softmax(1)]), (WIDE, WIDE),
        ("amax amax_1 div div_1 exp exp_1 sub sub_1 sum_1 sum_2",),
        (lambda x, y: torch.cat([x.softmax(1), y.softmax(1)]), "div", "cat", "join"),
    ),
    "a reduction with what comes before and after": Kind(
        lambda x, y: (x * y).sum(1).sqrt(), (WIDE, WIDE), ("mul sum_1 sqrt",),
        (lambda x, y: ((x * y).sum(1).sqrt(), x.cumsum(0)), "sum_1", "cumsum", "two orders"), 1e-4,
    ),
    "reductions of one row, one behind the other": Kind(
        lambda x: (x * 0.5).softmax(1).relu(), (WIDE,), ("mul amax sub exp sum_1 div relu",),
        (lambda x: x.softmax(1).softmax(0), "div", "amax_1", "loses parallelism"),
    ),
    "rows and the columns beside them": Kind(
        _norm_backward, (TALL, TALL), ("mean mul mul_1 sub sum_1",) * 2,
        (lambda x, g: (x.amax(0), x * g - x.var(0)), "amax", "var", "chunks"), 1e-3,
    ),
    "a sum in two stages": Kind(
        lambda x: (x * x).sum(), ((512, 1024),), ("mul sum_1", "mul sum_1"),
        (lambda x: x / (x * x).sum(), "sum_1", "div", "chunks"), 1e-2,
    ),
    "a gather with what it reads and what reads it": Kind(
        lambda i, w: F.embedding(i, w * 2).relu(), (30, (4096, 64)), ("embedding mul relu",),
        (lambda i, w: (F.embedding(i, w.exp().cumsum(1)), w), "cumsum", "embedding", "gathered"),
    ),
    "a scan with what feeds it and reads it": Kind(
        lambda x: x.exp().cumsum(1) * 2, (WIDE,), ("exp cumsum mul",),
        (lambda x: (x.cumsum(1), x.cumsum(0)), "cumsum", "cumsum_1", "two orders"), 1e-4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_the_operators_of_each_kernel(name: str) -> None:
    kind = KINDS[name]
    check(kind.run, *kind.args, tolerance=kind.tolerance)
    launches = minifuse.reports()[-1].plan.launches
    found = [{*launch.kernel.origins} for launch in launches]
    assert found == [{*operators.split()} for operators in kind.kernels]


@pytest.mark.parametrize("name", KINDS)
def test_no_bit_depends_on_it(name: str) -> None:
    kind = KINDS[name]
    same(compiled(kind.run)(*kind.args), compiled(kind.run, {"fusion_fuel": 0})(*kind.args), exact=True)


@pytest.mark.parametrize("name", KINDS)
def test_a_graph_like_it_is_refused_by_a_rule(name: str) -> None:
    fn, first, second, rule = KINDS[name].refused
    check(fn, *KINDS[name].args, tolerance=KINDS[name].tolerance)
    why = minifuse.reports()[-1].why_not(first, second)
    assert (why.rule, why.together) == (rule, False), str(why)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What Triton's interpreter, in a process of its own, has differently from eager, by kind."""
    pytest.importorskip("triton")
    return outcomes_in_triton("tests.passes.test_kinds", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("name", KINDS)
def test_triton_computes_the_same(name: str, interpreted: dict[str, str]) -> None:
    assert interpreted[name] == ""


def triton_cases() -> Iterator[tuple[str, str]]:
    for name, kind in KINDS.items():
        try:
            check(kind.run, *kind.args, options={"target": "triton"}, tolerance=max(kind.tolerance, 1e-4))
            found = [str(d) for d in minifuse.reports()[-1].decisions if d.rule == "interpreted"]
            yield name, "; ".join(found)
        except Exception as why:
            yield name, repr(why)


if __name__ == "__main__":
    print(json.dumps(dict(triton_cases())))
