"""Values and kernels check themselves: a wrong one cannot be built, and the error says why."""

import gc
import pickle

import pytest
import torch

from minifuse.ir import value
from minifuse.ir.index import ONE, Axis, Sym, as_expr
from minifuse.ir.kernel import Check, Kernel, Loop, Param, Schedule, Store, rewrite
from minifuse.ir.plan import Buffer, Extern, Launch, Plan, Symbol, TensorRef, content_hash, launch_traffic
from minifuse.ir.shape import contiguous_strides
from minifuse.ir.value import Cast, Const, IndexOf, Load, Op, Pick, Random, Reduce, topological

F32, F64, I64, BF16, BOOL = torch.float32, torch.float64, torch.int64, torch.bfloat16, torch.bool
I, J = Axis("i", 4), Axis("j", 8)  # noqa: E741
AT = (I.expr, J.expr)
SHAPE = (as_expr(4), as_expr(8))
X = Load.of("x", AT, F32)
N = Load.of("n", AT, I64)
M = Op.of("lt", X, Const.of(0, F32))
HALF = Cast.of(BF16, X)


def param(name, dtype=F32, shape=SHAPE):
    return Param(name, dtype, shape, contiguous_strides(shape))


# -- values -------------------------------------------------------------------------------------------
def test_equal_values_are_one_object():
    assert Op.of("add", X, X) is Op.of("add", Load.of("x", AT, F32), X)
    assert Load.of("x", AT, F64) is not X
    assert Const.of(1, F32) is Const.of(1.0, F32)
    assert Const.of(1, F32) is not Const.of(1, F64)
    assert Const.of(float("nan"), F32) is Const.of(float("nan"), F32)


def test_zeros_of_two_signs_are_two_constants():
    assert Const.of(0.0, F32) is not Const.of(-0.0, F32)


def test_integer_literals_wrap_to_their_dtype():
    assert Const.of(-1, torch.uint8).value == 255
    assert Const.of(300, torch.int8).value == 44
    assert Const.of(2**63, I64).value == -(2**63)


def test_unused_values_are_forgotten():
    before = len(value._values)
    kept = [Op.of("mul", X, Const.of(n + 0.123, F32)) for n in range(100)]
    assert len(value._values) >= before + 100
    del kept
    gc.collect()
    assert len(value._values) <= before


def test_values_know_the_axes_they_vary_over():
    row = Reduce.of("sum", [X], J)
    assert X.axes == {I, J}
    assert row.axes == {I}
    assert Op.of("sub", X, row).axes == {I, J}
    assert Random.of("uniform", Const.of(3, I64), 0, J.expr).axes == {J}
    assert Load.of("t", (N, as_expr(0)), F32, M, Const.of(0, F32)).axes == {I, J}
    assert IndexOf.of(I.expr + 1).axes == {I}


def test_dtypes_follow_from_the_arguments():
    assert M.dtype is BOOL
    assert Op.of("where", M, N, N).dtype is I64
    assert Random.of("bits", Const.of(3, I64), 0, J.expr).dtype is I64
    pair = Reduce.of("argmax", [X, N], J)
    assert (Pick.of(pair, 0).dtype, Pick.of(pair, 1).dtype) == (F32, I64)


def test_casts_that_change_nothing_are_not_built():
    assert Cast.of(F32, X) is X
    assert Cast.of(BF16, Cast.of(F32, HALF)) is HALF
    assert Cast.of(I64, Const.of(2.9, F32)) is Const.of(2, I64)
    assert isinstance(Cast.of(torch.int32, Const.of(1e20, F32)), Cast)
    assert Cast.of(F32, Cast.of(BF16, X)) is not X


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Op.of("plus", X, X), KeyError, "no operator 'plus' in the table; known: .*add"),
        (lambda: Op.of("add", X), TypeError, "add takes 2 arguments, found 1"),
        (lambda: Op.of("add", X, N), TypeError, "one dtype, found torch.float32, torch.int64"),
        (lambda: Op.of("exp", N), TypeError, "exp takes dtypes of kind 'f', found torch.int64"),
        (lambda: Op.of("add", HALF, HALF), TypeError, "must be written in float32 with casts around"),
        (lambda: Op.of("where", X, X, X), TypeError, "where chooses by a bool, found torch.float32"),
        (lambda: Op.of("add", M, M), TypeError, "add takes dtypes of kind 'fi', found torch.bool"),
        (lambda: Load.of("x", AT, F32, M), TypeError, "load x: a mask needs an other value"),
        (lambda: Load.of("x", AT, F32, None, X), TypeError, "load x: a mask needs an other value"),
        (lambda: Load.of("x", AT, F32, X, X), TypeError, "expected a bool mask and a torch.float32 other"),
        (lambda: Load.of("x", AT, F32, M, N), TypeError, "expected a bool mask and a torch.float32 other"),
        (lambda: IndexOf.of(I.expr, F32), TypeError, "an index is int64 or int32, found torch.float32"),
        (lambda: Random.of("gauss", N, 0, I.expr), ValueError, "expected uniform, normal or bits, found 'gauss'"),
        (lambda: Random.of("bits", X, 0, I.expr), TypeError, "a seed is int64, found torch.float32"),
        (lambda: Reduce.of("mean", [X], J), KeyError, "no reduction 'mean'; known: sum"),
        (lambda: Reduce.of("argmax", [X], J), TypeError, "argmax takes 2 values, found 1"),
        (lambda: Reduce.of("sum", [X], J, 8), ValueError, "1 or 16 lanes, found 8"),
        (lambda: Reduce.of("sum", [HALF], J), TypeError, "must accumulate in float32"),
        (lambda: Pick.of(Reduce.of("sum", [X], J), 1), IndexError, "pick 1 of 1 results"),
    ],
)
def test_a_wrong_value_cannot_be_built(build, error, message):
    with pytest.raises(error, match=message):
        build()


# -- kernels ------------------------------------------------------------------------------------------
def kernel(*body, axes=(I, J), params=None):
    return Kernel(axes, params or (param("x"), param("n", I64), param("out"), param("row", F32, SHAPE[:1])), body)


ROW = Reduce.of("sum", [X], J)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: kernel(params=(param("x"), param("x"))), ValueError, r"two parameters of one name in \['x', 'x'\]"),
        (lambda: kernel(Store("y", AT, X)), ValueError, r"store to y: not a parameter of \['n', 'out', 'row', 'x'\]"),
        (lambda: kernel(Store("out", AT[:1], ROW)), ValueError, "store out: 1 indices, rank 2"),
        (lambda: kernel(Store("out", AT, N)), TypeError, "store out: torch.int64 into torch.float32"),
        (lambda: kernel(Store("row", AT[:1], X)), ValueError, "store row: its value varies over more than its index"),
        (lambda: kernel(Check(X, "")), TypeError, "a check needs a bool, found torch.float32"),
        (lambda: kernel(Store("out", AT, X), axes=(I,)), ValueError, r"axes \['j'\] are not the kernel's"),
        (lambda: kernel(Store("row", AT[:1], ROW), axes=(I,)), ValueError, "reduces over j, which is not an axis"),
        (lambda: kernel(Store("out", AT, Load.of("z", AT, F32))), ValueError, "load of z: not a parameter"),
        (lambda: kernel(Store("out", AT, Load.of("row", AT, F32))), ValueError, "load row: rank or dtype differs"),
        (lambda: kernel(Store("out", AT, Load.of("n", AT, F32))), ValueError, "load n: rank or dtype differs"),
    ],
)
def test_a_wrong_kernel_cannot_be_built(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_a_kernel_lists_its_values_arguments_first():
    k = kernel(Store("out", AT, Op.of("sub", X, ROW)), Store("row", AT[:1], ROW))
    values = k.values()
    assert values[:2] == (X, ROW)
    assert all(values.index(a) < n for n, v in enumerate(values) for a in v.args)
    assert k.reads == ("x",)
    assert k.writes == ("out", "row")
    assert list(k.reductions) == [ROW]
    assert k.param("row").offset(AT[:1]) is I.expr
    assert param("x").offset(AT) is 8 * I.expr + J.expr


def test_origins_do_not_distinguish_kernels():
    body = (Store("out", AT, X),)
    params = (param("x"), param("out"))
    assert Kernel((I, J), params, body, ("a.py:1",)) == Kernel((I, J), params, body)


def test_symbols_are_found_in_axes_layouts_and_indices():
    a, b, c, d = (Sym(name, 1) for name in "abcd")
    p = Axis("p", a.expr)
    x = Load.of("x", (p.expr + b.expr,), F32)
    out = Param("out", F32, (a.expr,), (c.expr,))
    value = Op.of("add", x, Cast.of(F32, IndexOf.of(d.expr)))
    k = Kernel((p,), (Param("x", F32, (as_expr(99),), (ONE,)), out), (Store("out", (p.expr,), value),))
    assert k.symbols() == {a, b, c, d}


def test_rewriting_substitutes_axes_and_replaces_values():
    p = Axis("p", 32)
    roots = (Store("out", AT, Op.of("add", X, Const.of(1, F32))), Check(M, "negative"))
    flat = {I: p.expr // 8, J: p.expr % 8}
    new, check = rewrite(roots, flat)
    assert new.index == (p.expr // 8, p.expr % 8)
    assert new.value.axes == check.condition.axes == {p}
    back = rewrite((new,), {p: 8 * I.expr + J.expr})
    assert back == roots[:1]
    (swapped,) = rewrite(roots[:1], replace_value=lambda v: Const.of(7, F32) if v is X else None)
    assert swapped.value is Op.of("add", Const.of(7, F32), Const.of(1, F32))
    assert rewrite(roots) == roots


def test_rewriting_keeps_every_kind_of_value():
    pair = Reduce.of("argmax", [X, IndexOf.of(J.expr)], J)
    drawn = Random.of("uniform", Const.of(1, I64), 3, 8 * I.expr + J.expr)
    gathered = Load.of("x", (Pick.of(pair, 1), J.expr), F32, M, Const.of(0, F32))
    root = Store("out", AT, Op.of("add", Op.of("add", gathered, drawn), Cast.of(F32, HALF)))
    other_i, other_j = Axis("a", 4), Axis("b", 8)
    there = rewrite((root,), {I: other_i.expr, J: other_j.expr})
    assert there[0].value.axes == {other_i, other_j}
    assert rewrite(there, {other_i: I.expr, other_j: J.expr}) == (root,)


def test_a_reduced_axis_must_stay_an_axis():
    with pytest.raises(ValueError, match="a reduced axis must stay an axis"):
        rewrite((Store("row", AT[:1], ROW),), {J: J.expr + 1})


def test_deep_chains_need_no_recursion():
    v = X
    for n in range(20_000):
        v = Op.of("add", v, Const.of(n, F32))
    assert len(topological([v])) == 40_001
    assert rewrite((Store("out", AT, v),), {I: I.expr})[0].value is v


# -- schedules and plans ------------------------------------------------------------------------------
def test_a_schedule_reads_as_its_loops():
    schedule = Schedule((Loop(I, "grid", 64), Loop(I, "loop"), Loop(J, "lane")))
    assert str(schedule) == "i: grid tile 64, i: loop, j: lane"
    assert schedule.grid == schedule.loops[:1]
    assert schedule.lane is J
    assert str(Schedule(())) == "scalar"
    assert Schedule(()).lane is None


def buffer(name, shape, stride=None):
    shape = tuple(map(as_expr, shape))
    stride = contiguous_strides(shape) if stride is None else tuple(map(as_expr, stride))
    return Buffer(name, F32, shape, stride, torch.device("cpu"))


def test_buffers_count_bytes_once_and_extents_whole():
    assert buffer("a", (4, 8)).nbytes.value == 128
    assert buffer("a", (4, 8), (0, 1)).nbytes.value == 32
    assert buffer("a", (4, 8), (16, 1)).extent.value == 56
    assert buffer("a", (4, 8)).is_contiguous
    assert not buffer("a", (4, 8), (1, 4)).is_contiguous


def test_a_launch_moves_each_buffer_once_with_symbols_at_their_hints():
    s = Sym("s0", 2).expr
    p = Axis("p", s)
    x = Load.of("a", (p.expr,), F32)
    shape = (s,)
    k = Kernel((p,), (param("a", F32, shape), param("b", F32, shape)), (Store("b", (p.expr,), Op.of("mul", x, x)),))
    step = Launch(k, ("x", "y"))
    extern = Extern(torch.neg, (TensorRef("y", shape, (ONE,), as_expr(0)),), (), ("z",), "why")
    buffers = {n: buffer(n, shape) for n in "xyz"}
    plan = Plan("p", ("x",), buffers, (step, extern), (), {"s0": Symbol("s0", 100)})
    moved = launch_traffic(plan, step)
    assert (moved.read, moved.written, moved.total) == (400, 400, 800)
    assert launch_traffic(plan, extern).total == 800
    assert (step.reads, step.writes, extern.reads, extern.writes) == (("x",), ("y",), ("y",), ("z",))
    assert plan.launches == (step,)
    assert plan.externs == (extern,)


def test_axes_and_sizes_survive_pickling_as_the_same_objects():
    assert pickle.loads(pickle.dumps((I, AT, SHAPE))) == (I, AT, SHAPE)
    assert pickle.loads(pickle.dumps(I)) is I


def test_content_hashes_are_sixteen_digits():
    assert content_hash("a") == content_hash("a") != content_hash("b")
    assert len(content_hash("a")) == 16
