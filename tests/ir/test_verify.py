"""The verifier names the step, the buffer and the rule that is broken."""

import dataclasses

import pytest
import torch

from minifuse.ir.index import ONE, ZERO, Axis, Sym, as_expr
from minifuse.ir.kernel import Check, Kernel, Loop, Param, Schedule, Store
from minifuse.ir.plan import Buffer, Extern, Free, Launch, Plan, Symbol, TensorRef
from minifuse.ir.shape import contiguous_strides
from minifuse.ir.text import parse
from minifuse.ir.value import Const, Load, Op, Reduce
from minifuse.ir.verify import VerificationError, verify_kernel, verify_plan, verify_schedule

F32 = torch.float32
CPU = torch.device("cpu")


def kernel(lines: str, axes: str = "i < 4, j < 8", schedule: str = "") -> tuple[Kernel, Schedule | None]:
    head = f"kernel k  {axes}\nparam x : f32[4, 8]\nparam out : f32[4, 8]\nparam flat : f32[32]\n"
    parsed = parse(head + lines + (f"\nschedule {schedule}" if schedule else ""))
    return parsed.kernel, parsed.schedule


# -- kernels ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "lines",
    [
        "store out[i, j] = load x[i, j]",
        "store flat[8*i + j] = load x[i, j]",
        "store out[i, j] = add(load out[i, j], 1.0)",
        "v0 : f32[i, j] = load x[i - 1, j] if False else 0.0\nstore out[i, j] = v0",
        "store out[i, 0] = 1.0\nstore out[i, 1] = 2.0",
        "v0 : f32[i, j] = load out[i, j]\nstore out[i, j] = add(v0, 1.0)\nstore flat[8*i + j] = v0",
        "store out[i, j] = 0.0\nstore flat[8*i + j] = load out[i, j]",
    ],
)
def test_right_kernels_pass(lines):
    verify_kernel(kernel(lines)[0])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("store out[i, j] = load out[i, 0]", r"out is loaded at \[i, 0\] and stored at \[i, j\]"),
        ("store out[i, j] = load x[i + 1, j]", r"load x: dimension 0 of size 4 is indexed 1..4 by i \+ 1"),
        ("store out[3 - i, j - 1] = 0.0", r"store out: dimension 1 of size 8 is indexed -1..6 by j - 1"),
        ("store flat[i + j] = 0.0\nstore flat[i + j + 20] = 1.0", "64 points write 32 elements"),
        ("store out[i, j] = 0.0\nstore out[i, j] = 1.0", r"store out: \[i, j\] is written by 2 stores, expected one"),
    ],
)
def test_a_kernel_that_breaks_a_rule_is_refused(lines, message):
    with pytest.raises(VerificationError, match=message):
        verify_kernel(kernel(lines)[0])


def test_elements_that_share_memory_are_not_stored():
    i, j = Axis("i", 4), Axis("j", 8)
    out = Param("out", F32, (i.size, j.size), (ZERO, ONE))
    k = Kernel((i, j), (out,), (Store("out", (i.expr, j.expr), Const.of(0, F32)),))
    with pytest.raises(VerificationError, match=r"elements of strides \[0, 1\] share memory"):
        verify_kernel(k)


def test_axes_of_one_name_are_refused():
    i, j = Axis("i", 4), Axis("i", 8)
    out = Param("out", F32, (i.size, j.size), contiguous_strides((4, 8)))
    k = Kernel((i, j), (out,), (Store("out", (i.expr, j.expr), Const.of(0, F32)),))
    with pytest.raises(VerificationError, match="are named 'i'"):
        verify_kernel(k)


def test_empty_kernels_access_nothing():
    i = Axis("i", 0)
    params = (Param("x", F32, (ZERO,), (ONE,)), Param("out", F32, (ZERO,), (ONE,)))
    verify_kernel(Kernel((i,), params, (Store("out", (i.expr,), Load.of("x", (i.expr + 3,), F32)),)))


# -- schedules ----------------------------------------------------------------------------------------
SOFTMAX = """v0 : f32[i, j] = load x[i, j]
v1 : f32[i] = reduce(max, v0, over j, lanes 16)
store out[i, j] = sub(v0, v1)"""


@pytest.mark.parametrize(
    "loops",
    [
        "i: grid, j: lane; held v0",
        "i: grid, j: lane; past out",
        "i: loop, j: loop",
        "i: grid tile 2, i: loop, j: lane",
        "i: grid, j: loop tile 4, j: lane",
    ],
)
def test_right_schedules_pass(loops):
    verify_schedule(*kernel(SOFTMAX, schedule=loops))


@pytest.mark.parametrize(
    ("loops", "message"),
    [
        ("i: grid", r"schedule i: grid: no loop over \[j\]"),
        ("i: loop", r"no loop over \[j\]"),
        ("scalar", r"no loop over \[i, j\]"),
        ("j: loop, i: grid", "grid loops come first"),
        ("i: grid, j: grid", "the grid runs over j, which is reduced"),
        ("j: lane, i: loop", "lane loops are the last"),
        ("i: grid, i: loop, j: lane", "i has an inner loop, so its outer one has a tile"),
        ("i: grid tile 2, j: lane", "the tile of i has no loop inside"),
    ],
)
def test_a_wrong_schedule_is_refused(loops, message):
    k, schedule = kernel(SOFTMAX, schedule=loops)
    with pytest.raises(VerificationError, match=message):
        verify_schedule(k, schedule)


def test_loops_and_held_values_are_the_kernels_own():
    k, schedule = kernel(SOFTMAX, schedule="i: grid, j: lane")
    other = Loop(Axis("q", 2), "loop")
    with pytest.raises(VerificationError, match="q is not an axis of"):
        verify_schedule(k, Schedule((*schedule.loops[:1], other, *schedule.loops[1:])))
    with pytest.raises(VerificationError, match=r"the held value .* is not one of the kernel's"):
        verify_schedule(k, dataclasses.replace(schedule, held=(Const.of(12.5, F32),)))
    with pytest.raises(VerificationError, match=r"of \[x\] not each is written and not read"):
        verify_schedule(k, dataclasses.replace(schedule, past=("x",)))


def test_an_axis_that_only_a_check_runs_over_needs_a_loop():
    i = Axis("i", 4)
    condition = Op.of("lt", Load.of("x", (i.expr,), F32), Const.of(0, F32))
    k = Kernel((i,), (Param("x", F32, (i.size,), (ONE,)),), (Check(condition, "m"),))
    with pytest.raises(VerificationError, match=r"no loop over \[i\]"):
        verify_schedule(k, Schedule(()))


# -- plans --------------------------------------------------------------------------------------------
def buffer(name, storage="arena", shape=(4, 8), dtype=F32):
    shape = tuple(map(as_expr, shape))
    return Buffer(name, dtype, shape, contiguous_strides(shape), CPU, storage)


def double(shape=(4, 8)):
    """out = 2 * x"""
    axes = tuple(Axis(name, size) for name, size in zip("ij", shape, strict=False))
    at = tuple(a.expr for a in axes)
    sizes = tuple(map(as_expr, shape))
    params = tuple(Param(name, F32, sizes, contiguous_strides(sizes)) for name in ("x", "out"))
    return Kernel(axes, params, (Store("out", at, Op.of("mul", Load.of("x", at, F32), Const.of(2, F32))),))


def ref(name, shape=(4, 8), offset=0):
    shape = tuple(map(as_expr, shape))
    return TensorRef(name, shape, contiguous_strides(shape), as_expr(offset))


def plan(*steps, outputs=(), mutated=(), extra=(), symbols=None, inputs=("x",)):
    buffers = [buffer("x", "input"), buffer("y"), buffer("z"), *extra]
    return Plan("p", inputs, {b.name: b for b in buffers}, steps, outputs, symbols or {}, frozenset(mutated))


K = double()
XY, YZ, XZ = (Launch(K, pair, name="double") for pair in (("x", "y"), ("y", "z"), ("x", "z")))


def neg(source, result, **kw):
    return Extern(torch.neg, (ref(source, **kw),), (), (result,), "an example")


def test_right_plans_pass():
    verify_plan(plan(XY, YZ, Free(("y", "x")), outputs=(ref("z"), ref("z", (2, 2), 4), as_expr(3), None)))
    verify_plan(plan(neg("x", "y"), YZ, outputs=(ref("x"),)))
    verify_plan(plan(Launch(K, ("x", "y")), Launch(K, ("y", "x")), mutated=("x",)))
    verify_plan(plan(Launch(K, ("x", "x")), mutated=("x",)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: plan(YZ), "plan p, step 0 double: buffer y is used before anything wrote it"),
        (lambda: plan(XY, Free(("y",)), YZ), "step 2 double: buffer y is used after it was freed"),
        (lambda: plan(XY, Free(("y",)), XY), "buffer y is written after it was freed"),
        (lambda: plan(XY, Free(("y",)), Free(("y",))), "step 2 free: buffer y is used after it was freed"),
        (lambda: plan(XY, XY), "step 1 double: buffer y was written by step 0 double already"),
        (lambda: plan(XY, neg("x", "y")), "step 1 .*neg.*: buffer y was written by step 0 double already"),
        (lambda: plan(Launch(K, ("x", "x"))), "buffer x is an input that the plan does not declare as mutated"),
        (lambda: plan(Launch(K, ("x", "q"))), "no buffer q"),
        (lambda: plan(Launch(K, ("x",))), "1 buffers bound to 2 parameters"),
        (lambda: plan(neg("q", "y")), "no buffer q"),
        (lambda: plan(neg("x", "q")), "no buffer q"),
        (lambda: plan(neg("y", "z")), "buffer y is used before anything wrote it"),
        (lambda: plan(outputs=(ref("y"),)), "plan p, outputs: buffer y is used before anything wrote it"),
        (lambda: plan(XY, Free(("y",)), outputs=(ref("y"),)), "outputs: buffer y is used after it was freed"),
        (lambda: plan(XY, outputs=(ref("y", (4, 8), 1),)), "a view of buffer y reaches element 32 of 32"),
        (lambda: plan(inputs=()), r"buffer x is not among the inputs \[\]"),
        (lambda: plan(outputs=(Sym("s9", 1).expr,)), "outputs: size s9 is used before an input or an extern"),
    ],
)
def test_a_plan_that_breaks_a_rule_is_refused(build, message):
    with pytest.raises(VerificationError, match=message):
        verify_plan(build())


def over(new, old, **changed):
    """`new` in the memory of `old`."""
    return dataclasses.replace(buffer(new, "pooled"), reuses=old, **changed)


def in_place():
    """z = 2 * z"""
    at = tuple(a.expr for a in K.axes)
    body = (Store("x", at, Op.of("mul", Load.of("x", at, F32), Const.of(2, F32))),)
    return Launch(Kernel(K.axes, K.params[:1], body), ("z",), name="in_place")


def test_a_result_may_take_the_memory_of_a_block_that_is_read_no_more():
    verify_plan(plan(XY, in_place(), Free(("y",)), outputs=(ref("z"),), extra=(buffer("y", "pooled"), over("z", "y"))))


@pytest.mark.parametrize(
    ("steps", "buffers", "message"),
    [
        (
            (XY, in_place(), neg("y", "w")),
            (buffer("y", "pooled"), over("z", "y"), buffer("w")),
            "after z took its memory",
        ),
        ((XY, in_place()), (buffer("y"), over("z", "y")), "buffer z cannot take the memory of y, arena"),
        ((XY, in_place()), (buffer("y", "pooled"), over("z", "x")), "buffer z cannot take the memory of x, input"),
        ((in_place(),), (buffer("y", "pooled"), over("z", "y")), "buffer y is used before anything wrote it"),
        ((XY, neg("y", "z")), (buffer("y", "pooled"), over("z", "y")), "which only a launch that writes it does"),
    ],
)
def test_memory_that_cannot_be_taken_over(steps, buffers, message):
    with pytest.raises(VerificationError, match=message):
        verify_plan(plan(*steps, extra=buffers))


@pytest.mark.parametrize(
    "wrong", [buffer("w", shape=(8, 4)), buffer("w", dtype=torch.float64), buffer("w", shape=(32,))]
)
def test_a_launch_binds_buffers_of_its_parameters_layout(wrong):
    with pytest.raises(
        VerificationError, match=r"parameter out is torch.float32 \[4, 8\] strides \[8, 1\], buffer w is"
    ):
        verify_plan(plan(Launch(K, ("x", "w")), extra=(wrong,)))


def test_a_buffer_bound_twice_is_loaded_where_it_is_stored():
    i, j = Axis("i", 4), Axis("j", 8)
    at = (i.expr, j.expr)
    value = Load.of("x", (i.expr, 7 - j.expr), F32)
    k = Kernel((i, j), K.params, (Store("out", at, value),))
    verify_plan(plan(Launch(k, ("x", "y"))))
    with pytest.raises(VerificationError, match=r"buffer x is loaded at \[i, -j \+ 7\] and stored at \[i, j\]"):
        verify_plan(plan(Launch(k, ("x", "x")), mutated=("x",)))


def test_a_kernel_writes_all_of_a_new_buffer():
    i = Axis("i", 4)
    k = Kernel((i,), (K.params[1],), (Store("out", (i.expr, as_expr(0)), Const.of(0, F32)),))
    with pytest.raises(VerificationError, match="buffer y has 32 elements, the kernel writes 4"):
        verify_plan(plan(Launch(k, ("y",))))
    verify_plan(plan(Launch(k, ("x",)), mutated=("x",)))


def test_sizes_are_known_before_they_are_used():
    s0 = Sym("s0", 1).expr
    a, b = buffer("a", "input", (s0, 8)), buffer("b", "arena", (s0, 8))
    launch = Launch(double((s0, 8)), ("a", "b"))
    symbol = Symbol("s0", 4)
    with pytest.raises(VerificationError, match="size s0 is used before an input or an extern defined it"):
        verify_plan(plan(launch, extra=(a, b), symbols={"s0": symbol}, inputs=("x", "a")))
    verify_plan(plan(launch, extra=(a, b), symbols={"s0": symbol}, inputs=("x", "s0", "a")))
    sourced = {"s0": Symbol("s0", 4, "a.size(0)")}
    verify_plan(plan(launch, extra=(a, b), symbols=sourced, inputs=("x", "a")))
    counted = Extern(len, (ref("x"),), (), (None,), "a size", sizes=((0, "s0"),))
    verify_plan(plan(counted, launch, extra=(a, b), symbols={"s0": symbol}, inputs=("x", "a")))


def test_a_broken_kernel_is_reported_with_its_step():
    k, _ = kernel("store out[i, j] = load x[i + 1, j]")
    flat = buffer("f", "arena", (32,))
    with pytest.raises(VerificationError, match="plan p, step 0 pad: load x: dimension 0"):
        verify_plan(plan(Launch(k, ("x", "y", "f"), name="pad"), extra=(flat,)))


def test_a_broken_schedule_is_reported_with_its_step():
    axis = Axis("q", 3)
    with pytest.raises(VerificationError, match="plan p, step 0 double: schedule q: loop: no loop over"):
        verify_plan(plan(Launch(K, ("x", "y"), Schedule((Loop(axis, "loop"),)), "double")))


def test_an_extern_with_one_result_names_one():
    step = Extern(torch.neg, (ref("x"),), (), ("y", "z"), "")
    with pytest.raises(VerificationError, match=r"one result expected, found \[y, z\]"):
        verify_plan(plan(step))


def test_a_reduction_over_a_missing_loop_is_found_inside_a_value():
    i, j = Axis("i", 4), Axis("j", 8)
    row = Reduce.of("sum", [Load.of("x", (i.expr, j.expr), F32)], j)
    out = Param("out", F32, (i.size,), (ONE,))
    k = Kernel((i, j), (K.params[0], out), (Store("out", (i.expr,), row),))
    with pytest.raises(VerificationError, match=r"no loop over \[j\]"):
        verify_schedule(k, Schedule((Loop(i, "grid"),)))
