"""Kernels as text: print, parse, print gives the same text, and the parsed kernel is the printed one."""

import dataclasses
import operator

import pytest
import torch

from minifuse.ir.index import ONE, ZERO, Axis, Sym, as_expr
from minifuse.ir.kernel import Check, Kernel, Loop, Param, Schedule, Store
from minifuse.ir.plan import Buffer, Extern, Free, Launch, Opaque, Plan, Symbol, TensorRef
from minifuse.ir.shape import contiguous_strides
from minifuse.ir.text import kernel_hash, parse, parse_kernel, print_kernel, print_plan
from minifuse.ir.value import Cast, Const, IndexOf, Load, Op, Reduce

F32, I64 = torch.float32, torch.int64

SOFTMAX = """\
kernel softmax  i < s0, j < 64
  sizes s0 >= 2
  param x : f32[s0, 64]
  param out : f32[s0, 64]
  v0 : f32[i, j] = load x[i, j]
  v1 : f32[i] = reduce(max, v0, over j, lanes 16)
  v2 : f32[i, j] = exp(sub(v0, v1))
  v3 : f32[i] = reduce(sum, v2, over j, lanes 16)
  store out[i, j] = div(v2, v3)
  schedule i: grid, j: lane; held v2
"""

RESIDUAL_LAYER_NORM = """\
kernel residual_layer_norm  i < s0, j < 768
  sizes s0 >= 2
  param x : f32[s0, 768]
  param y : f32[s0, 768]
  param weight : f32[768]
  param bias : f32[768]
  param seed : i64[]
  param residual : f32[s0, 768]
  param out : f32[s0, 768]
  v0 : bool[i, j] = lt(random(uniform, seed load seed[], offset 0, index 768*i + j), 0.9)
  v1 : f32[i, j] = add(load x[i, j], where(v0, mul(load y[i, j], 1.1111112), 0.0))
  store residual[i, j] = v1
  v2 : f32[i] = reduce(sum, v1, over j, lanes 16)
  v3 : f32[i, j] = sub(v1, div(v2, 768.0))
  v4 : f32[i] = reduce(sum, mul(v3, v3), over j, lanes 16)
  v5 : f32[i] = sqrt(add(div(v4, 768.0), 1e-05))
  store out[i, j] = add(mul(div(v3, v5), load weight[j]), load bias[j])
  schedule i: grid, j: lane; held v1
"""

ARGMAX_AND_GATHER = """\
kernel argmax  i < 4, j < s0
  sizes 1 <= s0 <= 1024
  param x : bf16[4, s0] strides [1, 4]
  param table : f32[s0, 8]
  param values : f32[4]
  param at : i64[4]
  v0 : f32[i] = reduce(argmax, cast(f32, load x[i, j]), index(j), over j, lanes 16)
  store values[i] = v0
  v1 : i64[i] = pick(v0, 1)
  check and(ge(v1, 0), lt(v1, index(s0))) "index out of range in table"
  store at[i] = add(v1, cast(i64, load table[v1, 3]))
"""

RUNNING_SUM = """\
kernel running  i < s0, j < 64
  sizes s0 >= 2
  param x : f32[s0, 64]
  param columns : f32[s0, 64]
  param rows : f32[s0, 64]
  v0 : f32[i, j] = exp(load x[i, j])
  v1 : f32[i, j] = scan(sum, v0, over i, lanes 1)
  store columns[i, j] = v1
  v2 : f32[i, j] = scan(max, v0, over i, lanes 1)
  store rows[i, j] = v2
  schedule j: grid tile 256, j: lane, i: loop
"""

EVERY_CONSTRUCT = """\
kernel every  i < 6, j < s0*s1
  sizes s0 >= 2, 0 <= s1 <= 8
  param a : f32[6, s0*s1]
  param w : i32[6] strides [2]
  param flags : bool[s0*s1]
  param out : f32[6, s0*s1]
  param halves : bf16[6]
  param drawn : i64[6, s0*s1]
  param scalar : f64[]
  v0 : f32[i, j] = load a[i - 1, ((j) % (s1 + 1)) + ((j) // (s0))] if ge(index(i), 1) else -inf
  v1 : i64[i] = random(bits, seed 7, offset 3, index 2*i + 1)
  v2 : f32 = reduce(min, const(f32, -0.0), over i, lanes 1)
  v3 : f32[i, j] = where(load flags[j], where(True, v0, nan), add(random(normal, seed v1, offset 1, index 2*i + j), v2))
  store out[i, j] = v3
  store halves[i] = cast(bf16, cast(f32, load w[i]))
  v4 : i32[j] = index(i32, j + 2)
  store drawn[i, j] = add(v1, cast(i64, load a[v4, 0]))
  store scalar[] = 0.1 if lt(index(s0), 5)
  check False "a \\"quoted\\", \\u00e9 # message"
"""


@pytest.mark.parametrize("text", [SOFTMAX, RESIDUAL_LAYER_NORM, ARGMAX_AND_GATHER, RUNNING_SUM, EVERY_CONSTRUCT])
def test_text_parses_and_prints_as_it_was(text):
    parsed = parse(text)
    assert print_kernel(parsed.kernel, parsed.schedule, parsed.name) == text
    again = parse_kernel(print_kernel(parsed.kernel))
    assert again == parsed.kernel
    assert kernel_hash(again) == kernel_hash(parsed.kernel)


def softmax_kernel(origins=()):
    s0 = Sym("s0", 2).expr
    i, j = Axis("i", s0), Axis("j", 64)
    at, shape = (i.expr, j.expr), (s0, as_expr(64))
    x = Load.of("x", at, F32)
    e = Op.of("exp", Op.of("sub", x, Reduce.of("max", [x], j)))
    value = Op.of("div", e, Reduce.of("sum", [e], j))
    params = tuple(Param(name, F32, shape, contiguous_strides(shape)) for name in ("x", "out"))
    schedule = Schedule((Loop(i, "grid"), Loop(j, "lane")), (e,))
    return Kernel((i, j), params, (Store("out", at, value),), origins), schedule


def test_what_is_written_past_the_caches_is_printed_and_read():
    text = SOFTMAX.replace("held v2", "held v2; past out")
    found = parse(text)
    assert found.schedule is not None and found.schedule.past == ("out",) and found.schedule.held
    assert print_kernel(found.kernel, found.schedule, "softmax") == text
    without = dataclasses.replace(found.schedule, past=())
    assert kernel_hash(found.kernel, found.schedule) != kernel_hash(found.kernel, without)


def test_a_softmax_built_by_hand_prints_as_the_showpiece():
    kernel, schedule = softmax_kernel()
    assert print_kernel(kernel, schedule, "softmax") == SOFTMAX
    parsed = parse(SOFTMAX)
    assert parsed.kernel == kernel
    assert parsed.schedule == schedule
    assert parsed.kernel.body[0].value is kernel.body[0].value


def test_origins_are_printed_but_are_no_part_of_the_hash():
    plain, _ = softmax_kernel()
    known, _ = softmax_kernel(("model.py:41  x.softmax(\n-1)",))
    text = print_kernel(known)
    assert "# model.py:41 x.softmax( -1)" in text
    assert parse_kernel(text) == plain
    assert kernel_hash(known) == kernel_hash(plain)


def test_the_hash_tells_kernels_and_schedules_apart():
    kernel, schedule = softmax_kernel()
    column = parse_kernel(SOFTMAX.replace("lanes 16", "lanes 1"))
    assert len({kernel_hash(kernel), kernel_hash(kernel, schedule), kernel_hash(column)}) == 3


def pointwise(value, axis, dtype=F32, extra=()):
    shape = (axis.size,)
    params = [Param("a", dtype, shape, (ONE,)), Param("out", value.dtype, shape, (ONE,)), *extra]
    return Kernel((axis,), tuple(params), (Store("out", (axis.expr,), value),))


def test_value_names_do_not_clash_with_parameters_and_axes():
    v0 = Axis("v0", 8)
    x = Load.of("v1", (v0.expr,), F32)
    out = Param("out", F32, (v0.size,), (ONE,))
    param = Param("v1", F32, (v0.size,), (ONE,))
    kernel = Kernel((v0,), (param, out), (Store("out", (v0.expr,), Op.of("mul", x, x)),))
    text = print_kernel(kernel)
    assert "v2 : f32[v0] = load v1[v0]" in text
    assert parse_kernel(text) == kernel


@pytest.mark.parametrize("number", [0.0, -0.0, 1e-45, 3.4e38, float("inf"), float("-inf"), float("nan"), 0.1])
def test_float_literals_keep_their_identity(number):
    i = Axis("i", 4)
    kernel = pointwise(Op.of("add", Load.of("a", (i.expr,), F32), Const.of(number, F32)), i)
    assert parse_kernel(print_kernel(kernel)).body[0].value is kernel.body[0].value


@pytest.mark.parametrize("number", [0, -1, 2**63 - 1, -(2**63)])
def test_integer_literals_keep_their_identity(number):
    i = Axis("i", 4)
    kernel = pointwise(Op.of("add", IndexOf.of(i.expr), Const.of(number, I64)), i)
    assert parse_kernel(print_kernel(kernel)) == kernel


def test_literals_alone_say_their_dtype():
    i = Axis("i", 4)
    sum_of_literals = Op.of("add", Const.of(1, F32), Const.of(2, F32))
    nested = Op.of("where", Op.of("lt", Const.of(1, I64), Const.of(2, I64)), sum_of_literals, Const.of(3, F32))
    text = print_kernel(pointwise(nested, i))
    assert "where(lt(const(i64, 1), const(i64, 2)), add(const(f32, 1.0), const(f32, 2.0)), 3.0)" in text
    assert parse_kernel(text).body[0].value is nested


def test_a_literal_or_an_expression_as_a_loaded_index_keeps_a_line_of_its_own():
    i = Axis("i", 4)
    for at in (Const.of(2, I64), IndexOf.of(i.expr + 0)):
        kernel = pointwise(Load.of("a", (at,), F32), i)
        text = print_kernel(kernel)
        assert "load a[v0]" in text
        assert parse_kernel(text) == kernel


def test_a_body_of_five_thousand_values_prints_and_parses():
    i = Axis("i", 16)
    v = Load.of("a", (i.expr,), F32)
    for n in range(2500):
        v = Op.of("add", Op.of("sin", v), Const.of(n, F32))
    kernel = pointwise(v, i)
    assert parse_kernel(print_kernel(kernel)) == kernel


def test_comparisons_choices_and_casts_of_every_dtype_go_through_text():
    i = Axis("i", 4)
    x = Load.of("a", (i.expr,), F32)
    y = Load.of("b", (i.expr,), torch.float16)
    for dtype in (torch.float64, torch.bfloat16, torch.int16, torch.int8, torch.uint8, torch.bool):
        value = Op.of("where", Op.of("eq", y, Const.of(1, torch.float16)), Cast.of(dtype, x), Const.of(1, dtype))
        kernel = pointwise(value, i, extra=(Param("b", torch.float16, (i.size,), (ONE,)),))
        assert parse_kernel(print_kernel(kernel)) == kernel


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("exp(sub(v0, v1))", "expo(sub(v0, v1))", "line 7: no operator 'expo'"),
        ("load x[i, j]", "load z[i, j]", "no parameter 'z'; known: x, out"),
        ("load x[i, j]", "load x[i, q]", "unknown name 'q'"),
        ("v2 : f32[i, j]", "v2 : f32[i]", r"v2 is declared f32\['i'\], its value is f32\['i', 'j'\]"),
        ("sub(v0, v1)", "sub(v0, v9)", "no value 'v9' above this line"),
        ("over j", "over k", "no axis 'k'; known: i, j"),
        ("div(v2, v3)", "div(1.0, 2.0)", "nothing here says the dtype of 1.0"),
        ("div(v2, v3)", "div(v2, v3", "expected"),
        ("param x : f32", "param x : f33", "no dtype 'f33'"),
        ("i: grid", "i: parallel", "a loop is grid, loop or lane, found 'parallel'"),
        ("store out[i, j] = div(v2, v3)", "stare", "expected a line that starts with one of kernel"),
        ("load x[i, j]", "load x[i, +]", "expected an integer expression"),
    ],
)
def test_a_wrong_text_says_what_was_expected(old, new, message):
    assert old in SOFTMAX
    with pytest.raises(ValueError, match=message):
        parse(SOFTMAX.replace(old, new))


def test_names_that_cannot_be_told_apart_are_refused():
    i = Axis("a", 4)
    with pytest.raises(ValueError, match="are named 'a'"):
        print_kernel(pointwise(Load.of("a", (i.expr,), F32), i))
    i = Axis("lambda", 4)
    with pytest.raises(ValueError, match="expected an identifier"):
        print_kernel(pointwise(Load.of("a", (i.expr,), F32), i))


def test_a_plan_prints_its_steps_and_each_kernel_once():
    s0 = Sym("s0", 2).expr
    kernel, schedule = softmax_kernel()
    shape = (s0, as_expr(64))
    stride = contiguous_strides(shape)
    cpu = torch.device("cpu")
    buffers = {
        name: Buffer(name, F32, shape, stride, cpu, storage)
        for name, storage in (("x", "input"), ("y", "arena"), ("z", "arena"), ("m", "extern"))
    }
    ref = TensorRef("z", shape, stride, ZERO)
    row = TensorRef("m", (as_expr(64),), (ONE,), as_expr(64))
    plan = Plan(
        "forward",
        ("x",),
        buffers,
        (
            Launch(kernel, ("x", "y"), schedule, "softmax"),
            Launch(kernel, ("y", "z"), schedule, "softmax"),
            Free(("y",)),
            Extern(operator.add, (ref, (s0, 1)), (("how", "fast"),), ("m",), "an example"),
        ),
        (row, s0, None, Opaque("sort", 1)),
        {"s0": Symbol("s0", 4, "x.size(0)")},
        frozenset({"x"}),
    )
    assert print_plan(plan) == (
        """\
plan forward
  inputs x
  size s0 = 4 from x.size(0)
  buffer x : f32[s0, 64] input on cpu
  buffer y : f32[s0, 64] arena on cpu
  buffer z : f32[s0, 64] arena on cpu
  buffer m : f32[s0, 64] extern on cpu
  launch softmax(x, y) -> y  # reads 1024 B, writes 1024 B
  launch softmax(y, z) -> z  # reads 1024 B, writes 1024 B
  free y
  extern <built-in function add>(z, [s0, 1], how='fast') -> m  # reads 1024 B, writes 1024 B; an example
  outputs m[64] offset 64, s0, None, opaque sort[1]
  mutated x

"""
        + SOFTMAX
    )


def test_checks_keep_their_order_and_messages():
    i = Axis("i", 4)
    value = Load.of("a", (i.expr,), F32)
    check = Check(Op.of("ge", value, Const.of(0, F32)), 'tab\t, "quote" and \\')
    kernel = pointwise(value, i)
    kernel = Kernel(kernel.axes, kernel.params, (check, *kernel.body, check))
    assert parse_kernel(print_kernel(kernel)) == kernel
