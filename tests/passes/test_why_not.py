"""Why two nodes are apart: a graph for each rule that refuses it, with the reason in full, and one without the obstacle
in which the same two nodes are one kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import minifuse
from minifuse.explain.report import Report
from minifuse.ir.index import Axis, Expr
from minifuse.options import Options
from minifuse.passes.context import CompileContext
from minifuse.passes.fuse import RULES, forbid, force, fuse
from minifuse.passes.fuse.unify import Refusal, unify
from minifuse.passes.lower.graph import lower
from minifuse.records import Record
from tests.judge import check, compiled

Function = Callable[..., Any]
Shapes = tuple[tuple[int, ...] | int, ...]
V, SQUARE, ROWS, LONG = (64,), (64, 64), (64, 512), (64, 1 << 16)


@dataclass(frozen=True)
class Case:
    """Two nodes and what is said of them where they are `apart`: a function of tensors of `shapes` (an int is so many
    indices below 16). `together` is run on `fewer` shapes where those are given, with the options `lifted`.

    `between`: the neighbours that it is about, where these are not the two nodes. `answer`: what is said in place of
    the rule. `on`: the devices of the tensors, which are fakes then; those of `together` all are on the first.
    `limits`: constants of the package that are smaller, by where they are.
    """

    nodes: tuple[str, str]
    says: str
    apart: Function
    together: Function
    shapes: Shapes
    fewer: Shapes | None = None
    between: tuple[str, str] | None = None
    answer: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    lifted: Mapping[str, Any] | None = None
    on: tuple[str, ...] = ()
    limits: Mapping[str, int] = field(default_factory=dict)


def two_sums(count: int) -> Function:
    """A sum and a product of half of the tensors each."""

    def run(*xs: Tensor) -> tuple[Tensor, Tensor]:
        a, b = xs[0].sin(), xs[0].cos()
        for x in xs[1 : count // 2]:
            a = a + x
        for x in xs[count // 2 : count]:
            b = b * x
        return a, b

    return run


def two_chains(length: int) -> Function:
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        a = b = x
        for _ in range(length):
            a, b = a + 1.5, b * 1.01
        return a, b

    return run


def beside_sorts(count: int) -> Function:
    """What two kernels compute, with so many sorts between them that depend on one and do not lead to the other."""

    def run(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a = c = x.sin()
        for k in range(count):
            c = c.sort(k % 2).values
        return c, a + y.sort(0).values

    return run


def across_sorts(count: int) -> Function:
    """A kernel of what is sorted, and its reader behind a chain of other sorts."""

    def run(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
        a = (x.sort(0).values + y.sort(0).values).sin()
        for k in range(count):
            c = c.sort(k % 2).values
        return a * c

    return run


def freed_before_sorts(count: int) -> Function:
    """A kernel for a product, the last reader of a large result, and one of the same input behind a chain of sorts."""

    def run(x: Tensor, y: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        product = y.sort(0).values.t() @ x.sin()
        for k in range(count):
            c = c.sort(k % 2).values
        return product, x.cos() * c

    return run


def running(pairs: Function) -> Function:
    """Numbers of rows, stored, and the running sum of what they scale."""

    def run(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        r, s, t = x.sin(), x.cos(), x.tan()
        scaled = y * (r * s * t)[:, None]
        return r, s, t, scaled, pairs(scaled)

    return run


def scaled_by_all(*xs: Tensor) -> Tensor:
    total = sum(x.abs().sum(1, keepdim=True) for x in xs)
    return sum(x.abs() * total for x in xs)  # type: ignore[return-value]


CASES: dict[str, Case] = {
    "too many buffers": Case(
        ("sin", "cos"), "31 buffers, at most 28", two_sums(29), two_sums(25), (V,) * 29),
    "too large": Case(
        ("add", "mul"), "636 values, at most 600", two_chains(106), two_chains(60), (V,)),
    "devices": Case(
        ("sin", "cos"), "on cpu, cuda:0", lambda x, y: (x.sin(), y.cos()), lambda x, y: (x.sin(), y.cos()),
        (SQUARE, SQUARE), options={"fusion_rules": [force("sin", "cos")]}, on=("cpu", "cuda")),
    "cycle": Case(
        ("sin", "add"), "aten.mm.default runs by ATen, a matrix multiplication", lambda x, y: x.sin() + x.sin() @ y,
        lambda x, y: x.sin() + x @ y, (SQUARE, SQUARE), between=("sin", "mm"), answer="extern"),
    "too far apart": Case(
        ("sin", "add"), "7 steps between them may depend on one and feed the other", beside_sorts(6),
        beside_sorts(1), (SQUARE, SQUARE), limits={"minifuse.passes.fuse.graph.LOOKED_AT": 2}),
    "scattered": Case(
        ("sin", "cos"), "index_put stores at places that are computed, one behind the other",
        lambda x, y: (x.sin().index_add(0, torch.arange(64) // 2, y), x.cos()), lambda x, y: (x.sin() + y, x.cos()),
        (SQUARE, SQUARE)),
    "little shared": Case(
        ("mul", "add"), "they share 4 B of 32.8 kB", lambda x, y, v: (x * v, y + v), lambda x, y, v: (x * v, y + v),
        (SQUARE, SQUARE, (1,)), fewer=(SQUARE, SQUARE, V)),
    "gathered": Case(
        ("cumsum", "embedding"), "cumsum is read at an index that is computed",
        lambda i, w: F.embedding(i, w.cumsum(1)), lambda i, w: (F.embedding(i, w), w.cumsum(1)), (16, (16, 64))),
    "different rows": Case(
        ("sin", "add"), "one is at i0 < 64 where the other is at i1 < 64", lambda x: (x.sin(), x.sin() + x.sin().t()),
        lambda x: (x.sin(), x.sin() + x.t()), (SQUARE,)),
    "partial rows": Case(
        ("sin", "cos"), "i0 < 64, i1 + 1 (i1 < 63) does not run over the whole of i0 < 64, i1 < 64",
        lambda x: (x.sin(), x[:, 1:].cos()), lambda x: (x.sin(), x.cos()), (SQUARE,)),
    "splits a reduction": Case(
        ("sum_1", "cumsum"), "i0 is reduced and would be cut in two", lambda x: (x.view(SQUARE).sum(1), x.cumsum(0)),
        lambda x: (x.view(SQUARE).sum(1), x.view(SQUARE).cumsum(1)), ((4096,),)),
    "stored twice": Case(
        ("sin", "cumsum"), "sin would be stored more than once", running(lambda x: x.view(-1).cumsum(0)),
        running(lambda x: x.cumsum(1)), ((4096,), (4096, 2))),
    "two orders": Case(
        ("cumsum", "cumsum_1"), "one scans an axis, the other reduces or scans another",
        lambda x: (x.cumsum(0), x.cumsum(1)), lambda x: (x.cumsum(0), x.sin().cumsum(0)), (SQUARE,)),
    "different trees": Case(
        ("sum_1", "sum_2"), "one reduces a row and the other a column along one axis",
        lambda x, v: ((x * v[:, None]).sum(0), v.sum(0)), lambda x, v: ((x * v).sum(1), v.sum(0)), (SQUARE, V)),
    "chunks": Case(
        ("sum_1", "div"), "sum_1 sums columns by chunks of rows, and could not with the other",
        lambda x: x / (x * x).sum(), lambda x: x / (x * x).sum(), ((512, 1024),), fewer=(SQUARE,)),
    "loses parallelism": Case(
        ("mul", "cos"), "1 independent rows of 4096", lambda x, v: (x * v[:, None], v.cos()),
        lambda x, v: (x * v[:, None], v.cos()), ((64, 4096), V), fewer=(SQUARE, V)),
    "unshared loop": Case(
        ("mul", "cos"), "mul runs over i2, which the other does not have",
        lambda x, v: (x * v[:, :, None, None], v.cos()), lambda x, v: (x * v[:, :, None, None], v.cos()),
        ((64, 64, 8, 8), SQUARE), fewer=((8, 8, 8, 8), (8, 8))),
    "recomputes": Case(
        ("tan", "add"), "tan would run 4096 times", lambda x, v: x + v.tan(), lambda x, v: x + v.tan()[:, None],
        ((4096, 64), V), fewer=((4096, 64), (4096,))),
    "walked again": Case(
        ("tan", "div"), "tan would be computed in 2 passes over a row", lambda x: x.tan().softmax(1),
        lambda x: x.tan().softmax(1), (LONG,), fewer=(ROWS,)),
    "spills": Case(
        ("sum_4", "add_6"), "65538 numbers of rows of 16384 would be alive at once, in 65536 registers", scaled_by_all,
        scaled_by_all, ((64, 1 << 14),) * 4, fewer=(LONG[:1] + (1 << 12,),) * 4, options={"device_model": "H100"}),
    "lengthens memory": Case(
        ("sin", "mul"), "262 kB more would wait over 32 steps", across_sorts(30), across_sorts(3),
        ((256, 256),) * 3),
}  # fmt: skip

# What is no rule: the part before the colon is what is said.
OTHERS: dict[str, Case] = {
    "lengthens memory: of what an operator would free": Case(
        ("sin", "mul"), "4.19 MB more would wait over 32 steps", freed_before_sorts(30), freed_before_sorts(3),
        ((4096, 8), (4096, 256), (4096, 8))),
    "extern": Case(
        ("sin", "cos"), "aten.mm.default runs by ATen, a matrix multiplication", lambda x, y: (x.sin() @ y).cos(),
        lambda x, y: (x.sin() * y).cos(), (SQUARE, SQUARE), between=("sin", "mm")),
    "extern: behind two kernels that another one lies between": Case(
        ("sin", "mul"), "aten.mm.default runs by ATen, a matrix multiplication",
        lambda x, y: x.sin() * (x.sin() + x.sin() @ y).cumsum(0).cumsum(1),
        lambda x, y: x.sin() * (x.sin() + x.sin() * y).cumsum(0), (SQUARE, SQUARE), between=("sin", "mm")),
    "two orders: between kernels on the way": Case(
        ("sin", "cos"), "one scans an axis, the other reduces or scans another",
        lambda x: x.sin().cumsum(0).cumsum(1).cos(), lambda x: x.sin().cumsum(1).cumsum(1).cos(), (SQUARE,),
        between=("sin", "cos")),
    "join": Case(
        ("div", "cat"), "the pieces of cat are written in place", lambda x, y: torch.cat([x / 2, y]),
        lambda x, y: torch.cat([x / 2, y]), (ROWS, ROWS), fewer=((8, 8), (8, 8))),
    "nothing shared": Case(
        ("sin", "cos"), "no buffer leads from one to the other", lambda x, y: (x.sin(), y.cos()),
        lambda x, y: (x.sin(), x.cos()), (SQUARE, SQUARE)),
    "nothing shared: no element": Case(
        ("sin", "cos"), "one kernel would move no byte less than two", lambda x: (x.sin(), x.cos()),
        lambda x: (x.sin(), x.cos()), ((0, 64),), fewer=(SQUARE,)),
    "forbidden": Case(
        ("sin", "cos"), "forbidden by the user: cos", lambda x: x.sin().cos(), lambda x: x.sin().cos(), (SQUARE,),
        options={"fusion_rules": [forbid("cos")]}, lifted={}),
    "two orders: forced without a buffer that both read": Case(
        ("cumsum", "cumsum_1"), "one scans an axis, the other reduces or scans another",
        lambda x, y: (x.cumsum(0), y.cumsum(1)), lambda x, y: (x.cumsum(0), y.cumsum(0)), (SQUARE, SQUARE),
        options={"fusion_rules": [force("cumsum", "cumsum_1")]}),
    "two orders: behind a rule of speed that the user lifts": Case(
        ("cumsum", "cumsum_1"), "one scans an axis, the other reduces or scans another",
        lambda x, y, v: ((x * v).cumsum(0), (y + v).cumsum(1)), lambda x, y, v: ((x * v).cumsum(0), (y + v).cumsum(0)),
        (SQUARE, SQUARE, (1,)), options={"fusion_rules": [force(lambda c: True)]}),
    "not reached: fuel": Case(
        ("sin", "add"), "fuel ended after 0 fusions", lambda x: x.sin() + x.sin().cos(),
        lambda x: x.sin() + x.sin().cos(), (SQUARE,), options={"fusion_fuel": 0}, lifted={}),
    "not reached: the search gives up on readers of a small buffer": Case(
        ("cumsum", "cumprod"), "no rule forbids it",
        lambda x: (x.cumsum(0), x.cumsum(1), x.cumsum(2), x.view(-1).sum(0), x.cumprod(0)),
        lambda x: (x.cumsum(0), x.cumsum(1), x.cumprod(0)), ((8, 8, 8),)),
}  # fmt: skip


def report_of(case: Case, apart: bool) -> Report:
    """The report of a case whose numbers are eager's; of its plan alone where its tensors are fakes."""
    run, shapes, options = case.apart, case.shapes, case.options
    if not apart:
        run = case.together
        shapes = case.shapes if case.fewer is None else case.fewer
        options = case.options if case.lifted is None else case.lifted
    options = {"device_model": "cpu", **options}
    if case.on:
        return planned(run, shapes, options, case.on if apart else case.on[:1] * len(shapes))
    torch.manual_seed(0)
    args = [torch.arange(s) * 7 % 16 if isinstance(s, int) else torch.randn(s) for s in shapes]
    check(run, *args, options=options, tolerance=1e-3)
    return minifuse.reports()[-1]


def planned(run: Function, shapes: Shapes, options: Mapping[str, Any], devices: tuple[str, ...]) -> Report:
    """The report of a plan that is fused and not run."""
    ctx = CompileContext("f", "inference", Options.parse(options))
    with FakeTensorMode():
        graph = make_fx(run)(*(torch.empty(s, device=d) for s, d in zip(shapes, devices, strict=True))).graph
    plan = lower(graph, ctx)
    stages = {"lower": plan, "fuse": fuse(plan, ctx)}
    return Report(Record("f", "inference", stages, ctx.decisions, {}, options=ctx.options, device=ctx.device))


@pytest.mark.parametrize("name", [*CASES, *OTHERS])
def test_two_nodes_are_apart_for_the_reason_given_and_one_kernel_without_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = (CASES | OTHERS)[name]
    rule = name.split(":")[0]
    for limit, value in case.limits.items():
        monkeypatch.setattr(limit, value)
    report = report_of(case, apart=True)
    why = report.why_not(*case.nodes)
    assert (why.rule, why.together, why.between) == (case.answer or rule, False, case.between or case.nodes), str(why)
    assert why.words == case.says or why.rule not in CASES and case.says in why.words
    back = report.why_not(*case.nodes[::-1])
    assert back.rule == why.rule or case.between
    assert name in OTHERS or any(d.rule == rule and not d.taken for d in report.decisions)
    why = report_of(case, apart=False).why_not(*case.nodes)
    assert why.together, str(why)


def test_each_rule_has_a_case() -> None:
    assert list(CASES) == [rule.name for rule in RULES]


@pytest.mark.parametrize("name", [rule.name for rule in RULES if not rule.legal])
def test_a_rule_of_speed_or_memory_is_lifted_by_force(name: str) -> None:
    case = CASES[name]
    forced = {**case.options, "fusion_rules": [force(*case.nodes)]}
    why = report_of(replace(case, options=forced), apart=True).why_not(*case.nodes)
    assert why.together, str(why)


def test_what_one_launch_runs_for_several_tensors_is_together() -> None:
    compiled(lambda x, y: (x * 2 + 1, y * 2 + 1))(torch.randn(700), torch.randn(33, 7))
    why = minifuse.reports()[-1].why_not("add", "mul_1")
    assert why.together and "one launch" in str(why)


def test_an_unknown_node_is_an_error_that_names_near_ones() -> None:
    compiled(lambda x: x.sin() + 1)(torch.randn(SQUARE))
    with pytest.raises(ValueError, match=r"computed by no kernel.*near: sin"):
        minifuse.reports()[-1].why_not("sinn", "add")


def test_what_a_log_leaves_out_is_not_reached() -> None:
    run, x = lambda x: (x.sin() + 1).exp(), torch.randn(SQUARE)
    compiled(run)(x)
    log = minifuse.reports()[-1].fusion_log
    compiled(run, {"fusion_log": log[:1]})(x)
    why = minifuse.reports()[-1].why_not("sin", "exp")
    assert why.rule == "not reached" and "the fusion log does not have it" in why.words


Equations = list[tuple[Expr, Expr]]
ROW, COLUMN, DEPTH, FLAT = Axis("i", 8), Axis("j", 8), Axis("k", 8), Axis("w", 64)


@pytest.mark.parametrize(
    ("equations", "first", "second"),
    [
        ([(ROW.expr, COLUMN.expr), (ROW.expr, DEPTH.expr)], [ROW], [COLUMN, DEPTH]),
        ([(ROW.expr, Axis("i", 7).expr)], [ROW], [Axis("i", 7)]),
        ([(ROW.expr, COLUMN.expr + 1)], [ROW], [COLUMN]),
        ([(ROW.expr, COLUMN.expr), (8 * ROW.expr + DEPTH.expr, FLAT.expr)], [ROW, DEPTH], [COLUMN, FLAT]),
    ],
)
def test_loops_that_do_not_unify_give_the_facts_that_their_rule_words(
    equations: Equations, first: list[Axis], second: list[Axis]
) -> None:
    found = unify(equations, [], first, second, frozenset())
    assert isinstance(found, Refusal)
    rule = next(r for r in RULES if r.name == found.rule)
    assert "<" in rule.reason.format_map(found.facts)
