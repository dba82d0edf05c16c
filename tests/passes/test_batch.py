"""Many tensors, one kernel: which launches become one, which stay apart and why, and that no bit changes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import minifuse
from minifuse.explain.replay import kernel_script, replay
from minifuse.ir.index import Axis, Sym, as_expr
from minifuse.ir.interpret import run_plan
from minifuse.ir.kernel import Kernel, Param, Store
from minifuse.ir.plan import Buffer, Extern, Launch, Plan, Symbol, TensorRef, launch_traffic
from minifuse.ir.text import parse, print_launch, print_plan
from minifuse.ir.value import Const, Load, Op
from minifuse.ir.verify import VerificationError, verify_plan
from minifuse.options import Options
from minifuse.passes import batch as batching
from minifuse.passes import schedule
from minifuse.passes.batch import batch
from minifuse.passes.context import CompileContext
from minifuse.passes.memory import peak, place
from minifuse.records import RECORDS
from tests.judge import compiled, same

F32 = torch.float32
CPU = torch.device("cpu")


# -- plans written by hand --------------------------------------------------------------------------
def buffer(name: str, shape: Iterable[Any], storage: str = "pooled", dtype: torch.dtype = F32) -> Buffer:
    sizes = tuple(map(as_expr, shape))
    param = contiguous(name, sizes, dtype)
    return Buffer(name, dtype, sizes, param.stride, CPU, storage)  # type: ignore[arg-type]


def contiguous(name: str, shape: tuple[Any, ...], dtype: torch.dtype = F32) -> Param:
    stride = []
    for d in range(len(shape)):
        step = as_expr(1)
        for s in shape[d + 1 :]:
            step = step * s
        stride.append(step)
    return Param(name, dtype, shape, tuple(stride))


def scaled(x: Buffer, y: Buffer, by: float, name: str) -> Launch:
    """y = x * by, one axis a dimension."""
    axes = tuple(Axis(f"i{d}", s) for d, s in enumerate(x.shape))
    at = tuple(a.expr for a in axes)
    value = Op.of("mul", Load.of(x.name, at, x.dtype), Const.of(by, x.dtype))
    kernel = Kernel(axes, (x.as_param(), y.as_param()), (Store(y.name, at, value),), (name,))
    return Launch(kernel, (x.name, y.name), None, name)


def plan_of(
    buffers: Iterable[Buffer], steps: Iterable[Any], outputs: Iterable[str], symbols: dict[str, Symbol] | None = None
) -> Plan:
    named = {b.name: b for b in buffers}
    inputs = tuple(n for n, b in named.items() if b.storage == "input")
    refs = tuple(TensorRef(n, named[n].shape, named[n].stride, as_expr(0)) for n in outputs)
    plan = Plan("p", inputs, named, tuple(steps), refs, symbols or {})
    verify_plan(plan)
    return plan


def batched(plan: Plan, fuel: int | None = None) -> tuple[Plan, CompileContext]:
    """The plan scheduled for C, batched and verified."""
    ctx = CompileContext("p", "inference", Options(target="c", fusion_fuel=fuel))
    ctx.stages["lower"] = dataclasses.replace(plan, steps=())
    made = batch(schedule.schedule(plan, ctx), ctx)
    verify_plan(made)
    verify_plan(place(made, ctx))
    return made, ctx


def refused(ctx: CompileContext) -> list[str]:
    return [str(d) for d in ctx.decisions if d.rule == "batch" and not d.taken]


def apart(shapes: Iterable[tuple[Any, ...]], symbols: dict[str, Symbol] | None = None) -> Plan:
    """An independent kernel for each shape."""
    pairs = [(buffer(f"x{k}", s, "input"), buffer(f"y{k}", s)) for k, s in enumerate(shapes)]
    steps = [scaled(x, y, 2.0, f"double{k}") for k, (x, y) in enumerate(pairs)]
    return plan_of([b for pair in pairs for b in pair], steps, [y.name for _, y in pairs], symbols)


def test_kernels_over_tensors_of_any_shape_are_one_launch() -> None:
    plan = apart([(4, 8), (16,), (2, 3, 16), (0, 5), (48,)])
    made, ctx = batched(plan)
    (step,) = made.launches
    assert [int(e.value) for row in step.sizes for _, e in row] == [2, 1, 6, 0, 3]
    assert launch_traffic(made, step) == dataclasses.replace(
        launch_traffic(made, step), read=4 * (32 + 16 + 96 + 48), written=4 * (32 + 16 + 96 + 48)
    )
    (taken,) = [d for d in ctx.decisions if d.rule == "batch"]
    assert taken.subject == tuple(f"double{k}" for k in range(5))
    assert (taken.taken, taken.facts["saved"], taken.facts["moved_bytes"]) == (True, 4, 1536)
    xs = [torch.randn(4, 8), torch.randn(16), torch.randn(2, 3, 16), torch.randn(0, 5), torch.randn(48)]
    same(run_plan(made, xs), [x * 2 for x in xs], exact=True)


def test_sizes_that_vectors_do_not_fill_are_a_launch_of_their_own() -> None:
    made, ctx = batched(apart([(32,), (7,), (1,), (64,), (5, 5)]))
    assert [len(s.sizes) for s in made.launches] == [2, 3]
    assert any("vectors of 16 fill the tensors of one alone" in text for text in refused(ctx))


def test_a_size_may_be_a_symbol() -> None:
    s0 = Sym("n", 1)  # a name that the pass would take
    plan = apart([(s0.expr, 16), (32,), (s0.expr * 16,)], {"n": Symbol("n", 3, "x0.size(0)")})
    made, _ = batched(plan)
    (step,) = made.launches
    assert [str(e) for row in step.sizes for _, e in row] == ["n", "2", "n"]
    assert step.symbols == {s0}
    for n in (1, 5):
        xs = [torch.randn(n, 16), torch.randn(32), torch.randn(16 * n)]
        same(run_plan(made, xs), [x * 2 for x in xs], exact=True)


def test_what_depends_on_another_stays_apart_and_says_so() -> None:
    x, y, z = buffer("x", (32,), "input"), buffer("y", (32,)), buffer("z", (32,))
    plan = plan_of([x, y, z], [scaled(x, y, 2.0, "first"), scaled(y, z, 2.0, "second")], ["z", "y"])
    made, ctx = batched(plan)
    assert len(made.launches) == 2
    (text,) = refused(ctx)
    assert "first + second" in text and "depend on one another" in text


def test_what_waits_for_another_through_an_operator_stays_apart() -> None:
    x, y, r, z = (buffer(n, (32,), s) for n, s in zip("xyrz", ("input", "pooled", "extern", "pooled"), strict=True))
    ref = TensorRef("y", y.shape, y.stride, as_expr(0))
    neg = Extern(torch.ops.aten.neg.default, (ref,), (), ("r",), "a test")
    plan = plan_of([x, y, r, z], [scaled(x, y, 2.0, "first"), neg, scaled(r, z, 2.0, "second")], ["z"])
    made, ctx = batched(plan)
    assert made.launches == tuple(s for s in made.steps if isinstance(s, Launch))
    assert len(made.launches) == 2
    assert refused(ctx)


@pytest.mark.parametrize("kind", ["dtype", "constant"])
def test_unlike_kernels_stay_apart_and_say_so(kind: str) -> None:
    other = torch.float64 if kind == "dtype" else F32
    a, b = buffer("a", (32,), "input"), buffer("b", (32,))
    c, d = buffer("c", (32,), "input", other), buffer("d", (32,), dtype=other)
    steps = [scaled(a, b, 2.0, "one"), scaled(c, d, 2.0 if kind == "dtype" else 3.0, "two")]
    made, ctx = batched(plan_of([a, b, c, d], steps, ["b", "d"]))
    assert len(made.launches) == 2
    (text,) = refused(ctx)
    assert ("f32 in one and f64 in the other" if kind == "dtype" else "constants") in text


@pytest.mark.parametrize("size", [1 << 10, 1 << 20])
def test_what_other_steps_share_is_moved_past_them_if_it_is_small(size: int) -> None:
    """x -> operator -> kernel, twice: the first kernel would wait for the second operator."""
    buffers: list[Buffer] = []
    steps: list[Any] = []
    for k in "ab":
        x, r, y = buffer(f"x{k}", (size,), "input"), buffer(f"r{k}", (size,), "extern"), buffer(f"y{k}", (size,))
        buffers += [x, r, y]
        ref = TensorRef(x.name, x.shape, x.stride, as_expr(0))
        steps.append(Extern(torch.ops.aten.neg.default, (ref,), (), (r.name,), "a test", origin=f"neg{k}"))
        steps.append(scaled(r, y, 2.0, f"double{k}"))
    made, ctx = batched(plan_of(buffers, steps, ["ya", "yb"]))
    if size == 1 << 10:
        assert [isinstance(s, Extern) for s in made.steps] == [True, True, False]
    else:
        assert len(made.launches) == 2
        assert any("moved past 2 steps with 4.19 MB" in text for text in refused(ctx))


def test_what_dies_with_the_call_is_not_held_for_a_batch() -> None:
    """Two kernels with an operator between them, each the last to read a large activation that was saved for it."""
    xs, ys = [[buffer(f"{c}{k}", (1 << 20,), s) for k in range(2)] for c, s in (("x", "input"), ("y", "pooled"))]
    x, r = buffer("x", (32,), "input"), buffer("r", (32,), "extern")
    ref = TensorRef("x", x.shape, x.stride, as_expr(0))
    steps = [scaled(a, b, 2.0, b.name) for a, b in zip(xs, ys, strict=True)]
    steps.insert(1, Extern(torch.ops.aten.neg.default, (ref,), (), ("r",), "a test", origin="neg"))  # type: ignore[arg-type]
    plan = plan_of([*xs, *ys, x, r], steps, ["y0", "y1", "r"])
    assert len(batched(plan)[0].launches) == 1
    assert len(batched(dataclasses.replace(plan, donated=frozenset({"x0", "x1"})))[0].launches) == 2


def test_a_write_waits_for_what_reads_the_old_value() -> None:
    """y = 2 x before x is written: the kernel that writes may not join the one that reads."""
    x, y, z = buffer("x", (32,), "input"), buffer("y", (32,)), buffer("z", (32,), "input")
    steps = [scaled(x, y, 2.0, "reads"), scaled(z, x, 2.0, "writes")]
    named = {b.name: b for b in (x, y, z)}
    plan = Plan("p", ("x", "z"), named, tuple(steps), (TensorRef("y", y.shape, y.stride, as_expr(0)),),
                mutated=frozenset({"x"}))  # fmt: skip
    made, ctx = batched(plan)
    assert len(made.launches) == 2
    assert refused(ctx)


def test_fuel_counts_launches_that_are_saved() -> None:
    plan = apart([(16,)] * 5)
    assert [len(batched(plan, fuel)[0].launches) for fuel in (0, 1, 2, 4, 9)] == [5, 4, 3, 1, 1]


def test_reductions_of_one_shape_are_one_launch() -> None:
    def f(xs: list[Tensor]) -> list[Tensor]:
        return [x.sum(0) for x in xs] + [xs[0].amax(1)]

    xs = [torch.randn(40, 48) for _ in range(4)]
    got = compiled(f)(xs)
    assert sorted(len(s.sizes) for s in last().launches) == [1, 3]
    same(got, compiled(f, {"fusion_fuel": 0})(xs), exact=True)
    same(got, f(xs))


@pytest.mark.slow
def test_a_plan_of_twenty_thousand_launches_is_batched_in_seconds() -> None:
    x = buffer("x", (32,), "input")
    buffers, steps = [x], []
    for k in range(10_000):  # two chains beside one another, each launch behind the last
        y, z = buffer(f"y{k}", (32,)), buffer(f"z{k}", (32,))
        before = [x, x] if not k else buffers[-2:]
        steps += [scaled(before[0], y, 2.0, f"left{k}"), scaled(before[1], z, 3.0 if k % 2 else 2.0, f"right{k}")]
        buffers += [y, z]
    plan = plan_of(buffers, steps, ["y9999", "z9999"])
    ctx = CompileContext("p", "inference", Options(target="c"))
    scheduled = schedule.schedule(plan, ctx)
    begin = time.perf_counter()
    made = batch(scheduled, ctx)
    assert time.perf_counter() - begin < 20
    assert len(made.launches) == 15_000


def test_a_number_that_is_written_is_written_behind_what_reads_it() -> None:
    """Each kernel counts its own step, of size one or none: the tensors read the old count."""

    def f(xs: list[Tensor], counts: list[Tensor]) -> None:
        for x, count in zip(xs, counts, strict=True):
            count += 1
            x.mul_(count)

    for shape in ((), (1,)):
        mine = [torch.randn(n) for n in (16, 48, 7, 1)], [torch.full(shape, float(k)) for k in range(4)]
        theirs = [x.clone() for x in mine[0]], [c.clone() for c in mine[1]]
        compiled(f)(*mine)
        f(*theirs)
        same(mine, theirs, exact=True)


# -- text -------------------------------------------------------------------------------------------
def test_a_batch_prints_its_tensors_and_parses_back() -> None:
    made, _ = batched(apart([(4, 8), (16,)]))
    (step,) = made.launches
    assert print_launch(step) == (
        "kernel double0  i0 < 16*n\n"
        "  # double0\n"
        "  # double1\n"
        "  sizes n >= 0\n"
        "  param p0 : f32[16*n]\n"
        "  param p1 : f32[16*n]\n"
        "  store p1[i0] = mul(load p0[i0], 2.0)\n"
        "  schedule i0: grid tile 4096, i0: lane\n"
        "  over x0, y0; n = 2\n"
        "  over x1, y1; n = 1\n"
    )
    found = parse(print_launch(step))
    assert Launch(found.kernel, found.binding, found.schedule, found.name, found.sizes) == step
    assert "launch double0 over  # reads 192 B, writes 192 B\n    x0, y0; n = 2\n    x1, y1; n = 1\n" in print_plan(
        made
    )


def test_a_batch_of_symbols_parses_back() -> None:
    s0 = Sym("s0", 2)
    made, _ = batched(apart([(s0.expr, 16), (s0.expr, s0.expr, 16)], {"s0": Symbol("s0", 3, "x0.size(0)")}))
    (step,) = made.launches
    found = parse(print_launch(step))
    assert (found.binding, found.sizes) == (step.binding, step.sizes)


@pytest.mark.parametrize(
    ("line", "message"),
    [("over x0; n = 2", "1 buffers for 2 parameters"), ("over x0, y0; m = 2", "no size 'm' above this line")],
)
def test_a_wrong_line_of_a_batch_says_what_is_missing(line: str, message: str) -> None:
    made, _ = batched(apart([(32,), (16,)]))
    with pytest.raises(ValueError, match=message):
        parse(print_launch(made.launches[0]) + f"  {line}\n")


def test_a_batch_is_replayed_from_its_script() -> None:
    made, _ = batched(apart([(4, 8), (16,)]))
    assert "over x1, y1; n = 1" in kernel_script(made, made.launches[0])
    found = replay(print_launch(made.launches[0]), {})
    assert found.right
    assert set(found.errors) == {"y0", "y1"}
    assert found.nbytes == 384


# -- the verifier -----------------------------------------------------------------------------------
def wrong(change: Callable[[Launch], Launch]) -> Plan:
    made, _ = batched(apart([(4, 8), (16,)]))
    return dataclasses.replace(made, steps=(change(made.launches[0]),))


def resized(step: Launch) -> Launch:
    return dataclasses.replace(step, sizes=(step.sizes[1], step.sizes[1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (resized, r"parameter p0 is torch.float32 \[16\] strides \[1\], buffer x0 is"),
        (lambda s: dataclasses.replace(s, binding=s.binding[:3]), "3 buffers bound to 2 parameters"),
        (lambda s: dataclasses.replace(s, sizes=(s.sizes[0], ())), "different sizes of their own"),
        (lambda s: dataclasses.replace(s, binding=(*s.binding[:2], *s.binding[:2]), sizes=(s.sizes[0],) * 2),
         "two tensors of a batch write buffer y0"),
        (lambda s: dataclasses.replace(s, binding=("x0", "y0", "y0", "y1"), sizes=(s.sizes[0],) * 2),
         "parameter p1"),
    ],
)  # fmt: skip
def test_a_wrong_batch_is_refused(change: Callable[[Launch], Launch], message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        verify_plan(wrong(change))


def test_a_batch_that_reads_what_it_writes_elsewhere_is_refused() -> None:
    made, _ = batched(apart([(32,), (32,)]))
    step = dataclasses.replace(made.launches[0], binding=("x0", "y0", "y0", "y1"))
    with pytest.raises(VerificationError, match="reads buffer y0, which another one writes"):
        verify_plan(dataclasses.replace(made, steps=(step,)))


# -- memory -----------------------------------------------------------------------------------------
def test_a_batch_writes_over_what_dies_in_all_its_tensors() -> None:
    n = 1 << 16

    def f(xs: list[Tensor]) -> list[Tensor]:
        return [torch.sort(x).values * 2 + 1 for x in xs]

    for xs in ([torch.randn(n), torch.randn(n)], [torch.randn(n), torch.randn(2 * n), torch.randn(16)]):
        got = compiled(f)(xs)
        same(got, f(xs))
        same(got, compiled(f, {"fusion_fuel": 0})(xs), exact=True)


def test_what_two_tensors_of_a_batch_read_is_not_written_over() -> None:
    n = 1 << 16
    x, r = buffer("x", (n,), "input"), buffer("r", (n,), "extern")
    ref = TensorRef("x", x.shape, x.stride, as_expr(0))
    outs = [buffer(f"y{k}", (n,)) for k in range(2)]
    steps = [Extern(torch.ops.aten.neg.default, (ref,), (), ("r",), "a test", origin="neg")]
    made, ctx = batched(plan_of([x, r, *outs], [*steps, *(scaled(r, y, 2.0, y.name) for y in outs)], ["y0", "y1"]))
    assert len(made.launches) == 1
    placed = place(made, ctx)
    assert not any(b.reuses for b in placed.buffers.values())
    given = torch.randn(n)
    same(run_plan(placed, [given]), [given * -2, given * -2], exact=True)


# -- whole programs ---------------------------------------------------------------------------------
def last() -> Plan:
    return RECORDS[-1].stages["memory"]


def gpt2(d: int, layers: int = 12, vocabulary: int = 160, context: int = 32) -> list[tuple[int, ...]]:
    """The shapes of GPT-2's 148 parameters."""
    block = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(vocabulary, d), (context, d), *(block * layers), (d,), (d,)]


def parameters(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    torch.manual_seed(0)
    made = [nn.Parameter(torch.randn(s)) for s in shapes]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def stepped(
    shapes: list[tuple[int, ...]], options: dict[str, Any] | None, steps: int = 3, **settings: Any
) -> list[Tensor]:
    """Parameters and moments after steps of AdamW, compiled with the options, by eager for None."""
    ps = parameters(shapes)
    opt = torch.optim.AdamW(ps, lr=1e-2, **settings)
    step = opt.step if options is None else compiled(opt.step, options)
    for _ in range(steps):
        step()
    return [t.detach() for p in ps for t in (p, *opt.state[p].values())]


@pytest.mark.parametrize(("foreach", "layers", "tensors"), [(True, 12, 148), (False, 2, 28)])
def test_adamw_over_a_models_tensors_is_at_most_four_launches(foreach: bool, layers: int, tensors: int) -> None:
    shapes = gpt2(16, layers)
    assert len(shapes) == tensors
    got = stepped(shapes, {}, foreach=foreach)
    plan = last()
    assert len(plan.launches) <= 4
    assert not plan.externs
    same(got, stepped(shapes, None, foreach=foreach), tolerance=1e-5)


def test_no_bit_of_an_optimisers_step_depends_on_batches_or_threads() -> None:
    shapes = gpt2(48, layers=2)
    want = stepped(shapes, {"fusion_fuel": 0}, foreach=True)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            same(stepped(shapes, {}, foreach=True), want, exact=True)
            assert len(last().launches) <= 4
    finally:
        torch.set_num_threads(threads)


def adamw(ps: list[Tensor], gs: list[Tensor], ms: list[Tensor], vs: list[Tensor], step: Tensor) -> list[list[Tensor]]:
    """A step as a function of its state."""
    ms = [m + 0.1 * (g - m) for m, g in zip(ms, gs, strict=True)]
    vs = [0.99 * v + 0.01 * g * g for v, g in zip(vs, gs, strict=True)]
    rate, root = 1e-3 / (1 - 0.9**step), (1 - 0.99**step).sqrt()
    return [[p * 0.9999 - rate * m / (v.sqrt() / root + 1e-8) for p, m, v in zip(ps, ms, vs, strict=True)], ms, vs]


@pytest.mark.parametrize("layers", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_a_functional_step_is_few_launches(layers: int) -> None:
    """Fusion joins tensors that share numbers alone: they part again where a batch has a place for each."""
    lists = [[torch.rand(s) for s in gpt2(16, layers)] for _ in range(4)]
    got = compiled(adamw)(*lists, torch.tensor(3.0))
    assert len(last().launches) <= 4
    same(got, adamw(*lists, torch.tensor(3.0)), tolerance=1e-5)
    if layers == 1:
        same(got, compiled(adamw, {"fusion_fuel": 0})(*lists, torch.tensor(3.0)), exact=True)


def test_sizes_may_be_dynamic() -> None:
    f = compiled(lambda xs: [x.sin() * 2 for x in xs], dynamic=True)
    for n in (3, 16, 50):
        xs = [torch.randn(n, 16), torch.randn(n), torch.randn(16 * n), torch.randn(n)]
        same(f(xs), [x.sin() * 2 for x in xs])
    assert len(last().launches) < 4
    assert all(s.name != "n" for s in last().launches[0].symbols)


def test_tensors_without_elements_and_of_one_are_batched() -> None:
    xs = [torch.randn(s) for s in ((0,), (0, 16), (1,), (1, 1), (3,), (32,), (0, 3))]
    got = compiled(lambda xs: [x.exp() + 1 for x in xs])(xs)
    assert len(last().launches) <= 4
    same(got, [x.exp() + 1 for x in xs])


def test_layouts_that_are_no_row_are_left_out_and_right() -> None:
    xs = [torch.randn(32), torch.randn(8, 64)[:, ::2], torch.randn(16, 4).t(), torch.randn(64)[::2], torch.randn(48)]
    got = compiled(lambda xs: [x * 2 - 1 for x in xs])(xs)
    same(got, [x * 2 - 1 for x in xs], exact=True)
    assert max(len(s.sizes) for s in last().launches) == 3


def test_tensors_that_are_written_share_memory_or_come_twice() -> None:
    base = torch.randn(64)

    def f(xs: list[Tensor]) -> Tensor:
        for x in xs:
            x.mul_(3).add_(1)
        return xs[0] + xs[-1]

    def given() -> list[Tensor]:
        mine, whole = base.clone(), base.clone() * 2
        return [mine[:32], mine[32:], whole, mine[:32]]

    mine, theirs = given(), given()
    same(compiled(f)(mine), f(theirs))
    same(mine, theirs)


def test_a_batch_of_interpreted_kernels_is_right() -> None:
    xs = [torch.randn(4, 8), torch.randn(16), torch.randn(3)]
    got = compiled(lambda xs: [x.sin() for x in xs], {"target": "interpret"})(xs)
    assert len(last().launches) == 2
    same(got, [x.sin() for x in xs])


def test_work_of_one_batch_is_shared_by_elements() -> None:
    """Tensors much larger and smaller than a thread's part: every element once, whatever the threads."""
    xs = [torch.randn(n) for n in (1 << 18, 16, 32, 1 << 14, 48, 1 << 16, 16)]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            same(compiled(lambda xs: [x * 2 for x in xs])(xs), [x * 2 for x in xs], exact=True)
    finally:
        torch.set_num_threads(threads)
    assert batching.MOVED_BYTES < batching.HELD_BYTES


def test_a_batch_from_several_places_does_not_hold_what_they_are_computed_from_all_at_once() -> None:
    def routed(router: Tensor, weight: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        hidden = (x @ weight for x in inputs)
        return tuple((h * (h @ router).softmax(-1)[:, :1]).sum(0) for h in hidden)

    inputs = [torch.randn(512, 4), torch.randn(64, 512), *(torch.randn(2048, 64) for _ in range(4))]
    found = minifuse.capture(routed, *inputs, compile_options={"device_model": "cpu"})
    plan = found.plans["inference"]
    hidden = 4 * 2048 * 512
    assert peak(plan)[0] < 2.5 * hidden
    assert any("raise the peak of memory" in d.words for d in found.decisions["inference"] if d.rule == "batch")
