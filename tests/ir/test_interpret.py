"""The interpreter against torch: what it says is what the IR means."""

import math

import pytest
import torch

from minifuse.ir import ops
from minifuse.ir.index import ONE, ZERO, Axis, Sym, as_expr
from minifuse.ir.interpret import philox, run_kernel, run_plan
from minifuse.ir.kernel import Kernel, Param, Store
from minifuse.ir.plan import Buffer, Extern, Free, Launch, Opaque, Plan, Symbol, TensorRef
from minifuse.ir.shape import contiguous_strides
from minifuse.ir.text import parse_kernel
from minifuse.ir.value import Const, Load, Op

F32, I64 = torch.float32, torch.int64
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def run(text: str, sizes: dict[str, int] | None = None, **tensors: torch.Tensor) -> None:
    run_kernel(parse_kernel(text), tensors, sizes or {})


SOFTMAX = """
kernel softmax  i < s0, j < s1
  sizes s0 >= 0, s1 >= 0
  param x : f32[s0, s1]
  param out : f32[s0, s1]
  v0 : f32[i, j] = load x[i, j]
  v1 : f32[i] = reduce(max, v0, over j, lanes 16)
  v2 : f32[i, j] = exp(sub(v0, v1))
  v3 : f32[i] = reduce(sum, v2, over j, lanes 16)
  store out[i, j] = div(v2, v3)
"""


@pytest.mark.parametrize("shape", [(3, 7), (1, 1), (5, 64), (0, 4), (4, 0)])
def test_softmax_of_any_size_is_torchs(shape):
    x, out = torch.randn(shape), torch.empty(shape)
    run(SOFTMAX, {"s0": shape[0], "s1": shape[1]}, x=x, out=out)
    torch.testing.assert_close(out, x.softmax(-1))


def test_a_masked_store_writes_where_the_mask_holds_and_may_point_elsewhere_where_not():
    x, out = torch.randn(7, 5), torch.full((7, 5), 9.0)
    run(
        """
kernel chunks  p < 2, q < 4, j < 5
  param x : f32[7, 5]
  param out : f32[7, 5]
  v0 : f32[p, q, j] = load x[4*p + q, j] if lt(index(4*p + q), 7) else 0.0
  store out[4*p + q, j] = neg(v0) if and(lt(index(4*p + q), 7), ne(index(p + q), 1))
""",
        x=x,
        out=out,
    )
    want = -x
    want[1] = want[4] = 9.0
    assert torch.equal(out, want)


def test_tensors_may_have_any_strides():
    x, out = torch.randn(9, 5).t(), torch.empty(9, 10)[:, ::2].t()
    run(SOFTMAX, {"s0": 5, "s1": 9}, x=x, out=out)
    torch.testing.assert_close(out, x.softmax(-1))


def test_layer_norm_with_dropout_and_residual():
    n, d = 6, 32
    x, y, residual, out = (torch.randn(n, d) for _ in range(4))
    weight, bias, seed = torch.randn(d), torch.randn(d), torch.tensor(1234567890123)
    run(
        f"""
        kernel residual_layer_norm  i < s0, j < {d}
          sizes s0 >= 2
          param x : f32[s0, {d}]
          param y : f32[s0, {d}]
          param weight : f32[{d}]
          param bias : f32[{d}]
          param seed : i64[]
          param residual : f32[s0, {d}]
          param out : f32[s0, {d}]
          v0 : bool[i, j] = lt(random(uniform, seed load seed[], offset 2, index {d}*i + j), 0.75)
          v1 : f32[i, j] = add(load x[i, j], where(v0, div(load y[i, j], 0.75), 0.0))
          store residual[i, j] = v1
          v2 : f32[i] = reduce(sum, v1, over j, lanes 16)
          v3 : f32[i, j] = sub(v1, div(v2, {d}.0))
          v4 : f32[i] = reduce(sum, mul(v3, v3), over j, lanes 16)
          v5 : f32[i] = sqrt(add(div(v4, {d}.0), 1e-05))
          store out[i, j] = add(mul(div(v3, v5), load weight[j]), load bias[j])
        """,
        {"s0": n},
        x=x, y=y, weight=weight, bias=bias, seed=seed, residual=residual, out=out,
    )  # fmt: skip
    keep = philox("uniform", int(seed), 2, torch.arange(n * d).view(n, d)) < 0.75
    assert 0.6 < keep.float().mean() < 0.9
    want = x + torch.where(keep, y / 0.75, 0.0)
    torch.testing.assert_close(residual, want)
    torch.testing.assert_close(out, torch.layer_norm(want, (d,), weight, bias))


def test_argmax_gives_the_first_of_equals_and_nan_wins():
    x = torch.tensor([[1.0, 3.0, 3.0], [float("nan"), 9.0, float("nan")], [-1.0, -1.0, -2.0]])
    values, at = torch.empty(3), torch.empty(3, dtype=I64)
    run(
        """
        kernel argmax  i < 3, j < 3
          param x : f32[3, 3]
          param values : f32[3]
          param at : i64[3]
          v0 : f32[i] = reduce(argmax, load x[i, j], index(j), over j, lanes 16)
          store values[i] = pick(v0, 0)
          store at[i] = pick(v0, 1)
        """,
        x=x, values=values, at=at,
    )  # fmt: skip
    assert at.tolist() == [1, 0, 0]
    torch.testing.assert_close(values, x.max(-1).values, equal_nan=True)


PADDED = """
kernel pad  i < 7, j < 8
  param x : f32[4, 5]
  param out : f32[7, 8]
  v0 : bool[i] = and(ge(index(i), 1), lt(index(i), 5))
  v1 : bool[j] = and(ge(index(j), 2), lt(index(j), 7))
  v2 : f32[i, j] = load x[i - 1, j - 2] if and(v0, v1) else -1.5
  store out[i, j] = v2
"""


def test_a_masked_load_pads():
    x, out = torch.randn(4, 5), torch.empty(7, 8)
    run(PADDED, x=x, out=out)
    torch.testing.assert_close(out, torch.nn.functional.pad(x, (2, 1, 1, 2), value=-1.5))


def test_a_masked_load_from_an_empty_tensor_reads_nothing():
    out = torch.empty(3)
    run(
        """
        kernel pad  i < 3
          param x : f32[0]
          param out : f32[3]
          v0 : f32[i] = load x[i] if False else 2.0
          store out[i] = v0
        """,
        x=torch.empty(0), out=out,
    )  # fmt: skip
    assert out.tolist() == [2.0] * 3


EMBEDDING = """
kernel embedding  i < s0, j < 4
  sizes s0 >= 0
  param ids : i32[s0]
  param table : f32[6, 4]
  param out : f32[s0, 4]
  v0 : i32[i] = load ids[i]
  store out[i, j] = load table[v0, j]
  check and(ge(v0, 0), lt(v0, 6)) "index out of range in self"
"""


def test_a_loaded_index_gathers():
    ids, table, out = torch.tensor([5, 0, 5], dtype=torch.int32), torch.randn(6, 4), torch.empty(3, 4)
    run(EMBEDDING, {"s0": 3}, ids=ids, table=table, out=out)
    assert torch.equal(out, table[ids])


@pytest.mark.parametrize("bad", [6, -1])
def test_a_failed_check_raises_its_message_before_anything_is_stored(bad):
    ids, out = torch.tensor([1, bad], dtype=torch.int32), torch.full((2, 4), 7.0)
    with pytest.raises(IndexError, match=r"^index out of range in self$"):
        run(EMBEDDING, {"s0": 2}, ids=ids, table=torch.randn(6, 4), out=out)
    assert (out == 7).all()


@pytest.mark.parametrize("bad", [6, -1])
def test_an_unchecked_access_outside_is_an_error_too(bad):
    text = EMBEDDING[: EMBEDDING.index("  check")]
    ids = torch.tensor([1, bad], dtype=torch.int32)
    with pytest.raises(IndexError, match=rf"load table: dimension 0 is indexed .*{bad}.*, its size is 6"):
        run(text, {"s0": 2}, ids=ids, table=torch.randn(6, 4), out=torch.empty(2, 4))


DIVISION = """
kernel divide  i < 6
  param a : {d}[6]
  param b : {d}[6]
  param truncdiv : {d}[6]
  param floordiv : {d}[6]
  param mod : {d}[6]
  param rem : {d}[6]
  v0 : {d}[i] = load a[i]
  v1 : {d}[i] = load b[i]
  store truncdiv[i] = truncdiv(v0, v1)
  store floordiv[i] = floordiv(v0, v1)
  store mod[i] = mod(v0, v1)
  store rem[i] = rem(v0, v1)
"""


def test_integer_division_by_zero_is_zero_and_by_minus_one_wraps():
    low = -(2**63)
    a, b = torch.tensor([7, -7, 7, 5, low, -8]), torch.tensor([2, 2, -2, 0, -1, 3])
    out = {name: torch.empty(6, dtype=I64) for name in ("truncdiv", "floordiv", "mod", "rem")}
    run(DIVISION.format(d="i64"), a=a, b=b, **out)
    assert out["truncdiv"].tolist() == [3, -3, -3, 0, low, -2]
    assert out["floordiv"].tolist() == [3, -4, -4, 0, low, -3]
    assert out["mod"].tolist() == [1, 1, -1, 0, 0, 1]
    assert out["rem"].tolist() == [1, -1, 1, 0, 0, -2]


def test_unsigned_division_by_255_is_no_division_by_minus_one():
    a, b = torch.tensor([255, 254, 7, 9, 8, 200]), torch.tensor([255, 255, 2, 0, 1, 3])
    out = {name: torch.empty(6, dtype=torch.uint8) for name in ("truncdiv", "floordiv", "mod", "rem")}
    run(DIVISION.format(d="u8"), a=a.to(torch.uint8), b=b.to(torch.uint8), **out)
    assert out["truncdiv"].tolist() == out["floordiv"].tolist() == [1, 0, 3, 0, 8, 66]
    assert out["mod"].tolist() == out["rem"].tolist() == [0, 254, 1, 0, 0, 2]


def test_a_check_for_division_by_zero_raises_as_torch_does():
    text = """
    kernel divide  i < 2
      param b : i64[2]
      v0 : bool[i] = ne(load b[i], 0)
      check v0 "ZeroDivisionError"
    """
    run(text, b=torch.tensor([1, 2]))
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        run(text, b=torch.tensor([1, 0]))


@pytest.mark.parametrize("kind", [k for k, row in ops.REDUCTIONS.items() if row.results == 1])
@pytest.mark.parametrize("extent", [0, 1, 19])
def test_a_reduction_of_any_extent_is_torchs_or_the_identity(kind, extent):
    dtype = torch.bool if kind in ("any", "all") else F32
    name = "bool" if dtype is torch.bool else "f32"
    x, out = (torch.randn(4, extent) > 0).to(dtype) if dtype is torch.bool else torch.randn(4, extent), None
    out = torch.empty(4, dtype=dtype)
    run(
        f"""
        kernel r  i < 4, j < s0
          sizes s0 >= 0
          param x : {name}[4, s0]
          param out : {name}[4]
          v0 : {name}[i] = reduce({kind}, load x[i, j], over j, lanes 16)
          store out[i] = v0
        """,
        {"s0": extent}, x=x, out=out,
    )  # fmt: skip
    if extent or kind in ("sum", "prod", "any", "all", "logsumexp"):
        torch.testing.assert_close(out, getattr(torch, {"max": "amax", "min": "amin"}.get(kind, kind))(x, dim=1))
    else:
        assert out.tolist() == [-math.inf if kind == "max" else math.inf] * 4


JOINED = {
    "softmax": lambda x: (x.amax(1), (x - x.amax(1, True)).exp().sum(1)),
    "welford": lambda x: (torch.full((3,), 10.0), x.mean(1), (x - x.mean(1, True)).square().sum(1)),
}


@pytest.mark.parametrize("kind", JOINED)
def test_what_joins_several_values_takes_elements_or_partial_results(kind):
    x, want = torch.randn(3, 10), JOINED[kind](torch.randn(3, 10, generator=torch.Generator().manual_seed(1)))
    x.copy_(torch.randn(3, 10, generator=torch.Generator().manual_seed(1)))
    results = ops.REDUCTIONS[kind].results
    halves = torch.empty(results, 3, 2)
    params = "".join(f"param out{k} : f32[3, 2]\n" for k in range(results))
    stores = "".join(f"store out{k}[i, p] = pick(v0, {k})\n" for k in range(results))
    run(
        f"kernel halves  i < 3, p < 2, q < 5\nparam x : f32[3, 10]\n{params}"
        f"v0 : f32[i, p] = reduce({kind}, load x[i, 5*p + q], over q, lanes 16)\n{stores}",
        x=x, **{f"out{k}": halves[k] for k in range(results)},
    )  # fmt: skip
    found = torch.empty(results, 3)
    params = "".join(f"param in{k} : f32[3, 2]\nparam out{k} : f32[3]\n" for k in range(results))
    parts = ", ".join(f"load in{k}[i, p]" for k in range(results))
    stores = "".join(f"store out{k}[i] = pick(v0, {k})\n" for k in range(results))
    run(
        f"kernel join  i < 3, p < 2\n{params}v0 : f32[i] = reduce({kind}, {parts}, over p, lanes 1)\n{stores}",
        **{f"out{k}": found[k] for k in range(results)}, **{f"in{k}": halves[k] for k in range(results)},
    )  # fmt: skip
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got, expected)


def test_a_value_that_does_not_vary_is_reduced_over_the_whole_extent():
    out = torch.empty(3)
    run(
        """
        kernel r  i < 3, j < 5
          param x : f32[3]
          param out : f32[3]
          v0 : f32[i] = reduce(sum, load x[i], over j, lanes 1)
          store out[i] = v0
        """,
        x=torch.tensor([1.0, 2.0, 3.0]), out=out,
    )  # fmt: skip
    assert out.tolist() == [5.0, 10.0, 15.0]


def test_a_kernel_without_axes_computes_scalars():
    x, out = torch.tensor(3.0), torch.tensor(0.0)
    text = "kernel k\n  param x : f32[]\n  param out : f32[]\n  store out[] = mul(load x[], 2.0)\n"
    run(text, x=x, out=out)
    assert out.item() == 6.0
    text = "kernel k\n  param x : f32[3]\n  param out : f32[1]\n  store out[0] = load x[2]\n"
    out = torch.zeros(1)
    run(text, x=torch.tensor([1.0, 2.0, 3.0]), out=out)
    assert out.item() == 3.0


def test_an_in_place_kernel_reads_before_it_writes():
    x, y = torch.arange(4.0), torch.empty(4)
    run(
        """
        kernel k  i < 4
          param x : f32[4]
          param y : f32[4]
          v0 : f32[i] = load x[i]
          store x[i] = add(v0, 1.0)
          store y[i] = mul(v0, 2.0)
        """,
        x=x, y=y,
    )  # fmt: skip
    assert x.tolist() == [1, 2, 3, 4]
    assert y.tolist() == [0, 2, 4, 6]


def test_stores_keep_every_bit():
    bits = torch.tensor([0x7FC00001, -0x3FFFFF, -(2**31), 0x7F800001], dtype=torch.int32)
    out = torch.empty(4)
    run(
        "kernel k  i < 4\n  param x : f32[4]\n  param out : f32[4]\n  store out[i] = load x[i]\n",
        x=bits.view(F32), out=out,
    )  # fmt: skip
    assert torch.equal(out.view(torch.int32), bits)


def test_index_arithmetic_floors_and_flattens():
    x, out = torch.randn(4, 6), torch.empty(24, dtype=F32)
    run(
        """
        kernel k  p < 24
          param x : f32[4, 6]
          param out : f32[24]
          store out[p] = load x[p // 6, p % 6]
        """,
        x=x, out=out,
    )  # fmt: skip
    assert torch.equal(out, x.flatten())
    n = torch.empty(5, dtype=I64)
    text = (
        "kernel k  i < 5\n  sizes s0 >= 1\n  param n : i64[5]\n  store n[i] = index((i - 3)//s0 + 7*((i - 3) % s0))\n"
    )
    run(text, {"s0": 2}, n=n)
    assert n.tolist() == [(i - 3) // 2 + 7 * ((i - 3) % 2) for i in range(5)]


@pytest.mark.parametrize("name", [n for n, row in ops.TABLE.items() if row.rule == "same" and "f" in row.kinds])
def test_an_operator_means_what_its_row_says(name):
    arity = ops.row(name).arity
    params = [Param(f"a{n}", F32, (as_expr(9),), (ONE,)) for n in range(arity)]
    i = Axis("i", 9)
    value = Op.of(name, *(Load.of(p.name, (i.expr,), F32) for p in params))
    kernel = Kernel((i,), (*params, Param("out", F32, (i.size,), (ONE,))), (Store("out", (i.expr,), value),))
    given = [torch.rand(9) for _ in params]
    out = torch.empty(9)
    run_kernel(kernel, {**{p.name: x for p, x in zip(params, given, strict=True)}, "out": out}, {})
    torch.testing.assert_close(out, ops.row(name).meaning(*given), rtol=0, atol=0, equal_nan=True)


def test_tensors_of_another_shape_or_dtype_are_refused():
    with pytest.raises(ValueError, match=r"parameter x: expected torch.float32 of \[4, 5\], found torch.float32"):
        run(PADDED, x=torch.randn(5, 4), out=torch.empty(7, 8))
    with pytest.raises(ValueError, match=r"found torch.float64 of \[4, 5\]"):
        run(PADDED, x=torch.randn(4, 5).double(), out=torch.empty(7, 8))


# -- plans --------------------------------------------------------------------------------------------
def buffer(name, shape, storage="arena", stride=None, dtype=F32):
    shape = tuple(map(as_expr, shape))
    stride = contiguous_strides(shape) if stride is None else tuple(map(as_expr, stride))
    return Buffer(name, dtype, shape, stride, CPU, storage)


def whole(b):
    return TensorRef(b.name, b.shape, b.stride, ZERO)


def scaled(src, dst, by):
    """A kernel of two dimensions that multiplies."""
    axes = tuple(Axis(name, size) for name, size in zip("ij", src.shape, strict=True))
    at = tuple(a.expr for a in axes)
    value = Op.of("mul", Load.of("a", at, F32), Const.of(by, F32))
    return Kernel(axes, (src.as_param("a"), dst.as_param("b")), (Store("b", at, value),))


def test_a_plan_runs_launches_and_externs_over_dynamic_sizes():
    s0, s1 = Sym("s0", 1).expr, Sym("s1", 1).expr
    x, w = buffer("x", (s0, s1), "input"), buffer("w", (s1, 3), "input")
    y, m, z = buffer("y", (s0, s1)), buffer("m", (s0, 3), "extern"), buffer("z", (s0, 3), "pooled", stride=(1, s0))
    steps = (
        Launch(scaled(x, y, 2.0), ("x", "y")),
        Extern(torch.ops.aten.mm.default, (whole(y), whole(w)), (), ("m",), "a matmul"),
        Free(("y",)),
        Launch(scaled(m, z, 3.0), ("m", "z")),
    )
    column = TensorRef("z", (s0,), (ONE,), s0 * 2)
    outputs = (whole(z), column, s0 * s1 + 1, None, 2.5)
    symbols = {"s0": Symbol("s0", 4), "s1": Symbol("s1", 5, "x.size(1)")}
    buffers = {b.name: b for b in (x, w, y, m, z)}
    plan = Plan("forward", ("s0", "x", "w"), buffers, steps, outputs, symbols)
    for rows, columns in ((4, 5), (1, 1), (7, 2)):
        a, b = torch.randn(rows, columns), torch.randn(columns, 3)
        found = run_plan(plan, [rows, a, b])
        torch.testing.assert_close(found[0], (a * 2) @ b * 3)
        assert found[0].stride() == (1, rows)
        assert found[1].data_ptr() == found[0][:, 2].data_ptr()
        assert found[2:] == [rows * columns + 1, None, 2.5]


def test_a_plan_mutates_declared_inputs_even_those_that_require_grad():
    x = buffer("x", (2, 3), "input")
    axes = (Axis("i", 2), Axis("j", 3))
    at = tuple(a.expr for a in axes)
    value = Op.of("add", Load.of("x", at, F32), Const.of(1, F32))
    kernel = Kernel(axes, (x.as_param(),), (Store("x", at, value),))
    plan = Plan("step", ("x",), {"x": x}, (Launch(kernel, ("x",)),), (), mutated=frozenset({"x"}))
    given = torch.zeros(4, 3, requires_grad=True)
    part = given.detach()[1:3]
    assert run_plan(plan, [part]) == []
    assert part.tolist() == [[1, 1, 1], [1, 1, 1]]
    leaf = torch.zeros(2, 3, requires_grad=True)
    run_plan(plan, [leaf])
    assert (leaf == 1).all()


def test_a_view_of_an_input_starts_where_the_input_does():
    x = buffer("x", (2, 3), "input")
    plan = Plan("v", ("x",), {"x": x}, (), (TensorRef("x", (as_expr(3),), (ONE,), as_expr(3)),))
    base = torch.arange(12.0).view(4, 3)
    assert run_plan(plan, [base[2:]])[0].tolist() == [9, 10, 11]


def test_externs_give_several_tensors_sizes_and_opaque_results():
    u0 = Sym("u0", 0).expr
    x, at = buffer("x", (6, 1), "input"), buffer("at", (u0, 2), "extern", dtype=I64)
    values, rng = buffer("values", (6, 1), "extern"), Opaque("generator")

    def count(t, generator):
        return int((t > 0).sum()), generator

    steps = (
        Extern(count, (whole(x), rng), (), (None, None), "opaque", single=False, sizes=((0, "u0"),), origin="count"),
        Extern(torch.ops.aten.nonzero.default, (Opaque("positive"),), (), ("at",), "a size of its own"),
        Extern(torch.ops.aten.sort.default, (whole(x), 0), (), ("values", None), "a sort", single=False, origin="sort"),
    )
    plan = Plan(
        "p",
        ("x", "positive", "generator"),
        {b.name: b for b in (x, at, values)},
        steps,
        (whole(at), whole(values), u0, Opaque("count", 1), Opaque("sort", 1)),
        {"u0": Symbol("u0", 8)},
    )
    given, generator = torch.tensor([[1.0], [-1.0], [2.0], [-3.0], [0.5], [-0.5]]), object()
    found = run_plan(plan, [given, given > 0, generator])
    assert found[0].tolist() == [[0, 0], [2, 0], [4, 0]]
    assert torch.equal(found[1], given.sort(0).values)
    assert found[2] == 3
    assert found[3] is generator
    assert torch.equal(found[4], given.sort(0).indices)


def test_an_extern_result_of_another_layout_is_brought_into_the_planned_one():
    x, t = buffer("x", (2, 3), "input"), buffer("t", (3, 2), "extern")
    step = Extern(torch.ops.aten.t.default, (whole(x),), (), ("t",), "a transpose")
    plan = Plan("p", ("x",), {"x": x, "t": t}, (step,), (whole(t),))
    given = torch.randn(2, 3)
    found = run_plan(plan, [given])[0]
    assert torch.equal(found, given.t())
    assert found.is_contiguous()


def test_a_plan_reads_the_graphs_own_constants():
    c, y = buffer("c", (2, 2), "constant"), buffer("y", (2, 2), "pooled")
    plan = Plan("p", (), {"c": c, "y": y}, (Launch(scaled(c, y, 2.0), ("c", "y")),), (whole(y),))
    assert run_plan(plan, [], {"c": torch.ones(2, 2)})[0].tolist() == [[2, 2], [2, 2]]


def test_errors_of_a_call_say_what_was_expected():
    x = buffer("x", (2, 3), "input")
    plan = Plan("p", ("x",), {"x": x}, (), ())
    with pytest.raises(TypeError, match="plan p takes 1 inputs, found 2"):
        run_plan(plan, [1, 2])
    plan = Plan("p", ("x",), {"x": x}, (), (), {"s0": Symbol("s0", 2, "y.size(0)")})
    with pytest.raises(ValueError, match=r"size s0: expected INPUT, INPUT.size\(D\)"):
        run_plan(plan, [torch.empty(2, 3)])
    step = Extern(torch.ops.aten.neg.default, (whole(x),), (), ("y",), "")
    plan = Plan("p", ("x",), {"x": x, "y": buffer("y", (3, 2))}, (step,), ())
    with pytest.raises(ValueError, match=r"buffer y: expected a tensor of \[3, 2\], found \[2, 3\]"):
        run_plan(plan, [torch.empty(2, 3)])


def test_an_operators_view_of_an_input_is_not_memory_that_a_plan_may_write():
    view = Extern(torch.ops.aten.alias.default, (whole(buffer("x", (3,), "input")),), (), ("y",), "")
    write = Extern(torch.ops.aten.mul_.Tensor, (whole(buffer("y", (3,))), 2), (), ("z",), "")
    buffers = {"x": buffer("x", (3,), "input"), "y": buffer("y", (3,), "extern"), "z": buffer("z", (3,), "extern")}
    x = torch.ones(3)
    (z,) = run_plan(Plan("p", ("x",), buffers, (view, write), (whole(buffers["z"]),)), [x])
    assert z.tolist() == [2, 2, 2] and x.tolist() == [1, 1, 1]
