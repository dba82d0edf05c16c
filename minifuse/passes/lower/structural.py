"""Structural lowerers: views, reductions, indexing, concatenation, creation, randomness.

A lowerer takes the `Lowering`, the node and the node's arguments, and returns what the node stands
for. It raises `Unsupported` with a reason to leave the node to ATen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from minifuse.ir import dtypes
from minifuse.ir import prims as _prims  # noqa: F401 - registers the random operators that rows below name
from minifuse.ir.index import ONE, ZERO, Axis, Expr, as_expr, contiguous_strides, delinearize, linearize, product
from minifuse.ir.kernel import Check, Store
from minifuse.ir.value import LANES, Cast, Const, IndexOf, Load, Op, Pick, Random, Reduce, Value, at_values

from .pointwise import Unsupported, to_compute, truth
from .view import View

if TYPE_CHECKING:
    from .graph import Lowering

aten = torch.ops.aten
prims = torch.ops.prims
STRUCTURAL: dict[Any, Callable[..., Any]] = {}
SMALL_ROW = 256


def lowers(*targets: Any) -> Callable[[Callable], Callable]:
    """Register a lowerer for these overloads."""

    def add(fn: Callable) -> Callable:
        for t in targets:
            STRUCTURAL[t] = fn
        return fn

    return add


def _dims(dims: Any, rank: int) -> list[int]:
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(rank))
    return sorted({d % max(rank, 1) for d in (dims if isinstance(dims, (list, tuple)) else [dims])})


# -- views ------------------------------------------------------------------------------------------
@lowers(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten._reshape_copy.default)
def _reshape(lo: Lowering, node: fx.Node, x: fx.Node, shape: Any) -> View:
    return lo.view(x).reshape(lo.shape(node))


@lowers(aten.permute.default)
def _permute(lo: Lowering, node: fx.Node, x: fx.Node, order: Sequence[int]) -> View:
    return lo.view(x).permute(order)


@lowers(aten.transpose.int)
def _transpose(lo: Lowering, node: fx.Node, x: fx.Node, a: int, b: int) -> View:
    view = lo.view(x)
    order = list(range(len(view.at)))
    order[a], order[b] = order[b], order[a]
    return view.permute(order)


@lowers(aten.t.default)
def _t(lo: Lowering, node: fx.Node, x: fx.Node) -> View:
    view = lo.view(x)
    return view.permute(list(reversed(range(len(view.at)))))


@lowers(aten.expand.default)
def _expand(lo: Lowering, node: fx.Node, x: fx.Node, shape: Any, implicit: bool = False) -> View:
    return lo.view(x).expand(lo.shape(node))


@lowers(aten.slice.Tensor)
def _slice(
    lo: Lowering, node: fx.Node, x: fx.Node, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> View:
    view = lo.view(x)
    dim %= len(view.at)
    size = view.shape[dim]
    begin = ZERO if start is None else lo.size(start)
    if begin.is_const and begin.value < 0:
        begin = begin + size
        if begin.is_const and begin.value < 0:
            begin = ZERO
    elif not begin.is_nonneg():
        raise Unsupported("a slice whose start may be negative")
    if begin.is_const and size.is_const:
        begin = as_expr(min(begin.value, size.value))
    elif not begin.is_const and not (size - begin).is_nonneg():
        raise Unsupported("a slice whose start may lie behind the end")
    return view.slice(dim, begin, lo.shape(node)[dim], step)


@lowers(aten.select.int)
def _select(lo: Lowering, node: fx.Node, x: fx.Node, dim: int, index: Any) -> View:
    view = lo.view(x)
    dim %= len(view.at)
    at = lo.size(index)
    if at.is_const and at.value < 0:
        at = at + view.shape[dim]
    elif not at.is_nonneg():
        raise Unsupported("a select whose index may be negative")
    return view.select(dim, at)


@lowers(aten.flip.default)
def _flip(lo: Lowering, node: fx.Node, x: fx.Node, dims: Sequence[int]) -> View:
    view = lo.view(x)
    return view.flip(_dims(dims, len(view.at)) if dims else [])


@lowers(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def _squeeze(lo: Lowering, node: fx.Node, x: fx.Node, dims: Any = None) -> View:
    view = lo.view(x)
    return view.squeeze(_dims(dims, len(view.at))) if dims != [] else view


@lowers(aten.unsqueeze.default)
def _unsqueeze(lo: Lowering, node: fx.Node, x: fx.Node, dim: int) -> View:
    view = lo.view(x)
    return view.unsqueeze(dim % (len(view.at) + 1))


@lowers(aten.alias.default, aten.detach.default, aten.lift_fresh.default)
def _alias(lo: Lowering, node: fx.Node, x: fx.Node) -> View:
    return lo.view(x)


@lowers(prims.broadcast_in_dim.default)
def _broadcast_in_dim(lo: Lowering, node: fx.Node, x: fx.Node, shape: Any, dims: Sequence[int]) -> View:
    view = lo.view(x)
    sizes = lo.shape(node)
    for d in range(len(sizes)):
        if d not in dims:
            view = view.unsqueeze(d)
    return view.expand(sizes)


@lowers(aten.split_with_sizes.default)
def _split_with_sizes(
    lo: Lowering, node: fx.Node, x: fx.Node, sizes: Sequence[Any], dim: int = 0
) -> tuple[View, ...]:
    view = lo.view(x)
    dim %= len(view.at)
    out, begin = [], ZERO
    for part in node.meta["val"]:
        size = lo.size(part.shape[dim])
        out.append(view.slice(dim, begin, size))
        begin = begin + size
    return tuple(out)


@lowers(aten.split.Tensor)
def _split(lo: Lowering, node: fx.Node, x: fx.Node, size: Any, dim: int = 0) -> tuple[View, ...]:
    return _split_with_sizes(lo, node, x, (), dim)


@lowers(aten.unbind.int)
def _unbind(lo: Lowering, node: fx.Node, x: fx.Node, dim: int = 0) -> tuple[View, ...]:
    view = lo.view(x)
    dim %= len(view.at)
    return tuple(view.select(dim, i) for i in range(len(node.meta["val"])))


@lowers(aten.diagonal.default)
def _diagonal(lo: Lowering, node: fx.Node, x: fx.Node, offset: int = 0, dim1: int = 0, dim2: int = 1) -> View:
    view = lo.view(x)
    rank = len(view.at)
    dim1, dim2 = dim1 % rank, dim2 % rank
    shape = lo.shape(node)
    at = tuple(Axis(f"d{d}", s) for d, s in enumerate(shape))
    rest = iter(at[:-1])
    along = at[-1].expr
    back = [
        along + max(-offset, 0) if d == dim1 else along + max(offset, 0) if d == dim2 else next(rest).expr
        for d in range(rank)
    ]
    return view.reindex(shape, back, at)


# -- reductions -------------------------------------------------------------------------------------
def reduction_space(view: View, dims: Sequence[int]) -> tuple[list[Expr], list[tuple[Axis, int]]]:
    """Coordinates to read a view at, and the axes to reduce in order, innermost first, with lanes.

    Neighbouring dimensions are reduced as one while the inner one is short, so that a row is long
    enough for its lanes. The choice depends on the shape and the strides alone.
    """
    where = [ZERO if a.size is ONE else Axis(f"i{d}", a.size).expr for d, a in enumerate(view.at)]
    ref = view.strided()
    axes: list[tuple[Axis, int]] = []
    todo = [d for d in dims if view.at[d].size is not ONE]
    while todo:
        run = [todo.pop()]
        size = view.at[run[0]].size
        while todo and todo[-1] == run[-1] - 1 and size.is_const and size.value < SMALL_ROW:
            run.append(todo.pop())
            size = size * view.at[run[-1]].size
        run.reverse()
        axis = Axis("i" + "_".join(map(str, run)), size)
        if len(run) > 1:
            parts = delinearize(axis.expr, [view.at[d].size for d in run])
            for d, part in zip(run, parts, strict=True):
                where[d] = part
        unit = ref is None or ref.stride[run[-1]] is ONE
        axes.append((axis, LANES if unit and not axes else 1))
    return where, axes


def reduce_values(kind: str, values: tuple[Value, ...], axes: Sequence[tuple[Axis, int]]) -> list[Value]:
    """A nest of reductions, one an axis; an argument reduction carries its index along."""
    for axis, lanes in axes:
        r = Reduce.of(kind, values, axis, lanes)
        values = tuple(Pick.of(r, i) for i in range(len(values))) if len(values) > 1 else (r,)
    return list(values)


def emit_reduction(
    lo: Lowering,
    node: fx.Node,
    x: fx.Node,
    dims: Any,
    compute: Callable[[Value, list[tuple[Axis, int]]], list[tuple[Value, torch.Tensor, str]]],
    check: Callable[[Value], Check] | None = None,
) -> tuple[View, ...]:
    """One kernel that reads x once and stores the values that `compute` makes of it."""
    view = lo.view(x)
    rank = len(view.at)
    over = _dims(dims, rank)
    where, axes = reduction_space(view, over)
    made = compute(view.read(where), axes)
    stores: list[Store] = []
    views = []
    for value, val, name in made:
        buffer = lo.buffer(name, val, "arena", lo.dense_stride(val))
        keep = len(buffer.shape) == rank
        at = [ZERO if d in over else w for d, w in enumerate(where) if keep or d not in over]
        stores.append(Store(name, tuple(at), Cast.of(val.dtype, value)))
        views.append(View.whole(buffer))
    lo.add_kernel(stores, node.name)
    return tuple(views)


def _simple(kind: str, by: str = "result") -> Callable[..., View]:
    """sum, prod, amax, amin, any, all: `by` says which dtype they accumulate in."""

    def fn(lo: Lowering, node: fx.Node, x: fx.Node, dims: Any = None, keepdim: bool = False, **kw: Any) -> View:
        val = node.meta["val"]

        def compute(value: Value, axes: list[tuple[Axis, int]]) -> list[tuple[Value, torch.Tensor, str]]:
            value = truth(value) if by == "truth" else to_compute(value, val.dtype)
            return [(reduce_values(kind, (value,), axes)[0], val, node.name)]

        _nonempty(lo, x, dims, kind)
        return emit_reduction(lo, node, x, dims, compute)[0]

    return fn


def _nonempty(lo: Lowering, x: fx.Node, dims: Any, kind: str) -> None:
    if kind in ("max", "min", "argmax", "argmin"):
        view = lo.view(x)
        for d in _dims(dims, len(view.at)):
            if not (view.shape[d] - 1).is_nonneg():
                raise Unsupported(f"{kind} over a dimension that may be empty")


for _target, _kind, _by in (
    (aten.sum.dim_IntList, "sum", "result"),
    (aten.sum.default, "sum", "result"),
    (aten.prod.default, "prod", "result"),
    (aten.prod.dim_int, "prod", "result"),
    (aten.amax.default, "max", "result"),
    (aten.amin.default, "min", "result"),
    (aten.any.default, "any", "truth"),
    (aten.any.dim, "any", "truth"),
    (aten.any.dims, "any", "truth"),
    (aten.all.default, "all", "truth"),
    (aten.all.dim, "all", "truth"),
    (aten.all.dims, "all", "truth"),
):
    STRUCTURAL[_target] = _simple(_kind, _by)


@lowers(aten.max.default)
def _max_all(lo: Lowering, node: fx.Node, x: fx.Node) -> View:
    return _simple("max")(lo, node, x)


@lowers(aten.min.default)
def _min_all(lo: Lowering, node: fx.Node, x: fx.Node) -> View:
    return _simple("min")(lo, node, x)


@lowers(prims.sum.default)
def _prims_sum(lo: Lowering, node: fx.Node, x: fx.Node, dims: Any, *, output_dtype: Any = None) -> View:
    return _simple("sum")(lo, node, x, dims)


@lowers(prims.amax.default)
def _prims_amax(lo: Lowering, node: fx.Node, x: fx.Node, dims: Any, *, output_dtype: Any = None) -> View:
    return _simple("max")(lo, node, x, dims)


@lowers(aten.mean.dim, aten.mean.default)
def _mean(lo: Lowering, node: fx.Node, x: fx.Node, dims: Any = None, keepdim: bool = False, **kw: Any) -> View:
    val = node.meta["val"]
    view = lo.view(x)
    count = product(view.shape[d] for d in _dims(dims, len(view.at)))

    def compute(value: Value, axes: list[tuple[Axis, int]]) -> list[tuple[Value, torch.Tensor, str]]:
        total = reduce_values("sum", (to_compute(value, val.dtype),), axes)[0]
        return [(Op.of("div", total, count_value(count, total.dtype)), val, node.name)]

    return emit_reduction(lo, node, x, dims, compute)[0]


def count_value(count: Expr, dtype: torch.dtype) -> Value:
    """A number of elements as a float."""
    if count.is_const:
        return Const.of(count.value, dtype)
    return Cast.of(dtype, IndexOf.of(count))


def variance(
    value: Value, axes: list[tuple[Axis, int]], count: Expr, correction: float
) -> tuple[Value, Value]:
    """Variance and mean in two passes: the mean, then the squares about it."""
    n = count_value(count, value.dtype)
    mean = Op.of("div", reduce_values("sum", (value,), axes)[0], n)
    away = Op.of("sub", value, mean)
    squares = reduce_values("sum", (Op.of("mul", away, away),), axes)[0]
    left = Op.of("maximum", Op.of("sub", n, Const.of(correction, value.dtype)), Const.of(0, value.dtype))
    return Op.of("div", squares, left), mean


@lowers(aten.var.correction, aten.std.correction, prims.var.default)
def _var(
    lo: Lowering, node: fx.Node, x: fx.Node, dims: Any = None, correction: Any = 1, keepdim: bool = False, **kw: Any
) -> View:
    val = node.meta["val"]
    view = lo.view(x)
    count = product(view.shape[d] for d in _dims(dims, len(view.at)))
    correction = _literal(1 if correction is None else correction)

    def compute(value: Value, axes: list[tuple[Axis, int]]) -> list[tuple[Value, torch.Tensor, str]]:
        var, _ = variance(to_compute(value, val.dtype), axes, count, correction)
        if node.target is aten.std.correction:
            var = Op.of("sqrt", var)
        return [(var, val, node.name)]

    return emit_reduction(lo, node, x, dims, compute)[0]


@lowers(aten.var_mean.correction)
def _var_mean(
    lo: Lowering, node: fx.Node, x: fx.Node, dims: Any = None, *, correction: Any = 1, keepdim: bool = False
) -> tuple[View, ...]:
    vals = node.meta["val"]
    view = lo.view(x)
    count = product(view.shape[d] for d in _dims(dims, len(view.at)))
    correction = _literal(1 if correction is None else correction)

    def compute(value: Value, axes: list[tuple[Axis, int]]) -> list[tuple[Value, torch.Tensor, str]]:
        pair = variance(to_compute(value, vals[0].dtype), axes, count, correction)
        return [(v, val, lo.result_name(i)) for i, (v, val) in enumerate(zip(pair, vals, strict=True))]

    return emit_reduction(lo, node, x, dims, compute)


def _literal(x: Any) -> float:
    if isinstance(x, (int, float)):
        return float(x)
    raise Unsupported("a symbolic number where a literal is needed")


def _arg_reduction(kind: str, lo: Lowering, node: fx.Node, x: fx.Node, dim: Any, outputs: str) -> tuple[View, ...]:
    """max and min with indices, argmax, argmin; over all dimensions where dim is None."""
    vals = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else (node.meta["val"],)
    _nonempty(lo, x, dim, kind)
    view = lo.view(x)
    if dim is None and len(view.at) > 1:
        view = lo.view(x).reshape((product(view.shape),))
        lo.env[x], kept = view, lo.env[x]
        try:
            return _arg_reduction(kind, lo, node, x, 0, outputs)
        finally:
            lo.env[x] = kept
    if dtypes.row(view.buffer.dtype).dtype is torch.bool:
        raise Unsupported(f"{kind} of bools")

    def compute(value: Value, axes: list[tuple[Axis, int]]) -> list[tuple[Value, torch.Tensor, str]]:
        value = to_compute(value, value.dtype)
        index: Value = IndexOf.of(axes[0][0].expr) if axes else Const.of(0, torch.int64)
        value, index = reduce_values(kind, (value, index), axes)
        made = {"value": value, "index": index}
        single = len(vals) == 1
        return [
            (made[part], val, node.name if single else lo.result_name(i))
            for i, (part, val) in enumerate(zip(outputs.split(), vals, strict=True))
        ]

    return emit_reduction(lo, node, x, [0] if dim is None else dim, compute)


@lowers(aten.max.dim)
def _max_dim(lo: Lowering, node: fx.Node, x: fx.Node, dim: int, keepdim: bool = False) -> tuple[View, ...]:
    return _arg_reduction("argmax", lo, node, x, dim, "value index")


@lowers(aten.min.dim)
def _min_dim(lo: Lowering, node: fx.Node, x: fx.Node, dim: int, keepdim: bool = False) -> tuple[View, ...]:
    return _arg_reduction("argmin", lo, node, x, dim, "value index")


@lowers(aten.argmax.default)
def _argmax(lo: Lowering, node: fx.Node, x: fx.Node, dim: Any = None, keepdim: bool = False) -> View:
    if dim is None and keepdim:
        raise Unsupported("argmax over everything with keepdim")
    return _arg_reduction("argmax", lo, node, x, dim, "index")[0]


@lowers(aten.argmin.default)
def _argmin(lo: Lowering, node: fx.Node, x: fx.Node, dim: Any = None, keepdim: bool = False) -> View:
    if dim is None and keepdim:
        raise Unsupported("argmin over everything with keepdim")
    return _arg_reduction("argmin", lo, node, x, dim, "index")[0]


# -- concatenation and padding ----------------------------------------------------------------------
@lowers(aten.cat.default)
def _cat(lo: Lowering, node: fx.Node, tensors: Sequence[fx.Node], dim: int = 0) -> View:
    val = node.meta["val"]
    views = [v for v in (lo.view(t) for t in tensors) if len(v.at) == val.dim()]
    dim %= val.dim()
    if any(v.buffer.device != val.device for v in views) or not dtypes.supported(val.dtype):
        raise Unsupported("a concatenation across devices or of an unknown dtype")

    def value(where: tuple[Expr, ...]) -> Value:
        begin, out = ZERO, None
        pieces: list[tuple[Expr, Expr, View]] = []
        for v in views:
            if v.shape[dim] is not ZERO:
                pieces.append((begin, begin + v.shape[dim], v))
            begin = begin + v.shape[dim]
        if len(pieces) == 1:
            return Cast.of(val.dtype, pieces[0][2].broadcast_read(where))
        position = IndexOf.of(where[dim])
        for start, end, v in reversed(pieces):
            at = list(where)
            at[dim] = where[dim] - start
            inside = []
            if start is not ZERO:
                inside.append(Op.of("ge", position, IndexOf.of(start)))
            if end is not begin:
                inside.append(Op.of("lt", position, IndexOf.of(end)))
            mask = inside[0] if len(inside) == 1 else Op.of("and", *inside)
            if v.shape[dim] is ONE:
                at[dim] = ZERO
            read = v.read(at, mask, Const.of(0, v.buffer.dtype))
            piece = Cast.of(val.dtype, read)
            out = piece if out is None else Op.of("where", mask, piece, out)
        assert out is not None
        return out

    if not views or all(v.shape[dim] is ZERO for v in views):
        raise Unsupported("a concatenation of nothing")
    return lo.emit(value, val)


@lowers(aten.constant_pad_nd.default)
def _pad(lo: Lowering, node: fx.Node, x: fx.Node, pad: Sequence[Any], value: Any = 0) -> View:
    val = node.meta["val"]
    view = lo.view(x)
    if not isinstance(value, (int, float, bool)):
        raise Unsupported("a symbolic padding value")
    before = {}
    for k in range(len(pad) // 2):
        before[len(view.at) - 1 - k] = (lo.size(pad[2 * k]), lo.size(pad[2 * k + 1]))
    fill = Const.of(value, val.dtype)

    def at(where: tuple[Expr, ...]) -> Value:
        index, tests = list(where), []
        for d, (low, high) in before.items():
            index[d] = where[d] - low
            position = IndexOf.of(where[d])
            if low is not ZERO:
                tests.append(Op.of("ge", position, IndexOf.of(low)))
            if high is not ZERO:
                tests.append(Op.of("lt", position, IndexOf.of(low + view.shape[d])))
        mask: Value | None = None
        for t in tests:
            mask = t if mask is None else Op.of("and", mask, t)
        for d, a in enumerate(view.at):
            if a.size is ONE and d in before:
                index[d] = ZERO
        return view.read(index, mask, None if mask is None else fill)

    return lo.emit(at, val)


@lowers(aten.slice_scatter.default)
def _slice_scatter(
    lo: Lowering, node: fx.Node, x: fx.Node, src: fx.Node, dim: int = 0, start: Any = None, end: Any = None,
    step: int = 1,
) -> View:  # fmt: skip
    val = node.meta["val"]
    base, part = lo.view(x), lo.view(src)
    dim %= len(base.at)
    begin = ZERO if start is None else lo.size(start)
    if begin.is_const and begin.value < 0:
        begin = begin + base.shape[dim]
    if step != 1 or not begin.is_nonneg():
        raise Unsupported("a slice_scatter with a step or a negative start")
    size = part.shape[dim]

    def value(where: tuple[Expr, ...]) -> Value:
        position = IndexOf.of(where[dim])
        mask = Op.of(
            "and", Op.of("ge", position, IndexOf.of(begin)), Op.of("lt", position, IndexOf.of(begin + size))
        )
        at = list(where)
        at[dim] = where[dim] - begin if size is not ONE else ZERO
        inner = Cast.of(val.dtype, part.read(at, mask, Const.of(0, part.buffer.dtype)))
        return Op.of("where", mask, inner, Cast.of(val.dtype, base.broadcast_read(where)))

    return lo.emit(value, val)


@lowers(aten.select_scatter.default)
def _select_scatter(lo: Lowering, node: fx.Node, x: fx.Node, src: fx.Node, dim: int, index: Any) -> View:
    val = node.meta["val"]
    base, part = lo.view(x), lo.view(src)
    dim %= len(base.at)
    at = lo.size(index)
    at = at + base.shape[dim] if at.is_const and at.value < 0 else at

    def value(where: tuple[Expr, ...]) -> Value:
        mask = Op.of("eq", IndexOf.of(where[dim]), IndexOf.of(at))
        rest = [w for d, w in enumerate(where) if d != dim]
        inner = Cast.of(val.dtype, part.read(rest, mask, Const.of(0, part.buffer.dtype)))
        return Op.of("where", mask, inner, Cast.of(val.dtype, base.broadcast_read(where)))

    return lo.emit(value, val)


# -- indexing ---------------------------------------------------------------------------------------
def _wrapped(index: Load, size: Expr, message: str) -> tuple[Value, Check]:
    """A loaded index with negative values wrapped and bad ones led to zero, and its check."""
    position: Value = Cast.of(torch.int64, index)
    n = IndexOf.of(size)
    zero = Const.of(0, torch.int64)
    position = Op.of("where", Op.of("lt", position, zero), Op.of("add", position, n), position)
    good = Op.of("and", Op.of("ge", position, zero), Op.of("lt", position, n))
    return Op.of("where", good, position, zero), Check(good, message)


@lowers(aten.embedding.default)
def _embedding(
    lo: Lowering, node: fx.Node, weight: fx.Node, indices: fx.Node, padding: int = -1, scale: bool = False,
    sparse: bool = False,
) -> View:  # fmt: skip
    table, tokens = lo.view(weight), lo.view(indices)
    val = node.meta["val"]
    where = lo.axes(lo.shape(node))
    raw = Cast.of(torch.int64, tokens.read(where[:-1]))
    n, zero = IndexOf.of(table.shape[0]), Const.of(0, torch.int64)
    good = Op.of("and", Op.of("ge", raw, zero), Op.of("lt", raw, n))
    row = Op.of("where", good, raw, zero)

    def value(at: tuple[Expr, ...]) -> Value:
        return gather_read(table, [row, at[-1]])

    return lo.emit(value, val, checks=[Check(good, "index out of range in self")])


def gather_read(view: View, where: Sequence[Expr | Value]) -> Load:
    """Read a view at coordinates of which some are loaded values.

    Raises Unsupported where the view mixes such a dimension with others.
    """
    env = {a: w for a, w in zip(view.at, where, strict=True) if isinstance(w, Expr)}
    computed = {a: w for a, w in zip(view.at, where, strict=True) if not isinstance(w, Expr)}
    index = []
    for i in view.index:
        at = at_values(i, env, computed)
        if at is None:
            raise Unsupported("an index into a reshaped view")
        index.append(at)
    return Load.of(view.buffer.name, index, view.buffer.dtype)


@lowers(aten.gather.default)
def _gather(lo: Lowering, node: fx.Node, x: fx.Node, dim: int, index: fx.Node, sparse_grad: bool = False) -> View:
    table, at = lo.view(x), lo.view(index)
    if not table.at:
        raise Unsupported("gather from a tensor without dimensions")
    dim %= len(table.at)
    where = lo.axes(lo.shape(node))
    raw = Cast.of(torch.int64, at.read(where))
    n, zero = IndexOf.of(table.shape[dim]), Const.of(0, torch.int64)
    good = Op.of("and", Op.of("ge", raw, zero), Op.of("lt", raw, n))
    position = Op.of("where", good, raw, zero)
    coordinates = [position if d == dim else ZERO if table.shape[d] is ONE else w for d, w in enumerate(where)]
    message = f"index out of bounds for dimension {dim}"
    return lo.emit(lambda _: gather_read(table, coordinates), node.meta["val"], checks=[Check(good, message)])


@lowers(aten.index_select.default)
def _index_select(lo: Lowering, node: fx.Node, x: fx.Node, dim: int, index: fx.Node) -> View:
    table, at = lo.view(x), lo.view(index)
    if not table.at or not at.at:
        raise Unsupported("index_select without dimensions")
    dim %= len(table.at)
    where = lo.axes(lo.shape(node))
    raw = Cast.of(torch.int64, at.read([where[dim]]))
    n, zero = IndexOf.of(table.shape[dim]), Const.of(0, torch.int64)
    good = Op.of("and", Op.of("ge", raw, zero), Op.of("lt", raw, n))
    coordinates: list[Expr | Value] = [
        Op.of("where", good, raw, zero) if d == dim else w for d, w in enumerate(where)
    ]
    return lo.emit(
        lambda _: gather_read(table, coordinates), node.meta["val"], checks=[Check(good, "index out of range in self")]
    )


@lowers(aten.index.Tensor)
def _index(lo: Lowering, node: fx.Node, x: fx.Node, indices: Sequence[fx.Node | None]) -> View:
    table = lo.view(x)
    given = [(d, i) for d, i in enumerate(indices) if i is not None]
    if not given or any(lo.view(i).buffer.dtype in (torch.bool, torch.uint8) for _, i in given):
        raise Unsupported("an index by a mask: its size depends on data")
    views = {d: lo.view(i) for d, i in given}
    if any(v.buffer.device != table.buffer.device for v in views.values()):
        raise Unsupported("an index on another device")
    rank = max(len(v.at) for v in views.values())
    places = sorted(views)
    together = places == list(range(places[0], places[0] + len(places)))
    first = places[0] if together else 0
    where = lo.axes(lo.shape(node))
    index_where = where[first : first + rank]
    rest = iter(where[:first] + where[first + rank :])
    coordinates: list[Expr | Value] = []
    checks = []
    for d in range(len(table.at)):
        if d in views:
            read = views[d].broadcast_read(index_where)
            value, check = _wrapped(read, table.shape[d], f"index out of bounds for dimension {d}")
            coordinates.append(value)
            checks.append(check)
        else:
            coordinates.append(next(rest))
    return lo.emit(lambda _: gather_read(table, coordinates), node.meta["val"], checks=checks)


# -- creation and randomness ------------------------------------------------------------------------
def _fill(lo: Lowering, node: fx.Node, value: Any) -> View:
    val = node.meta["val"]
    number = lo.scalar(value)
    if number is None or not dtypes.supported(val.dtype):
        raise Unsupported("a fill with an unknown value or dtype")
    if isinstance(number, Const):
        return lo.emit(lambda _: Const.of(number.value, val.dtype), val)
    return lo.emit(lambda _: Cast.of(val.dtype, number), val)


@lowers(aten.full.default)
def _full(lo: Lowering, node: fx.Node, shape: Any, value: Any, **kw: Any) -> View:
    return _fill(lo, node, value)


@lowers(aten.full_like.default)
def _full_like(lo: Lowering, node: fx.Node, x: fx.Node, value: Any, **kw: Any) -> View:
    return _fill(lo, node, value)


@lowers(aten.scalar_tensor.default)
def _scalar_tensor(lo: Lowering, node: fx.Node, value: Any, **kw: Any) -> View:
    return _fill(lo, node, value)


@lowers(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
def _zeros(lo: Lowering, node: fx.Node, *args: Any, **kw: Any) -> View:
    return _fill(lo, node, 0)


@lowers(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def _ones(lo: Lowering, node: fx.Node, *args: Any, **kw: Any) -> View:
    return _fill(lo, node, 1)


@lowers(aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default)
def _empty(lo: Lowering, node: fx.Node, *args: Any, **kw: Any) -> View:
    return _fill(lo, node, 0)


def _iota(lo: Lowering, node: fx.Node, start: Any, step: Any) -> View:
    val = node.meta["val"]

    def value(where: tuple[Expr, ...]) -> Value:
        if all(isinstance(s, (int, fx.Node, torch.SymInt)) and not isinstance(s, bool) for s in (start, step)):
            return Cast.of(val.dtype, IndexOf.of(where[0] * lo.size(step) + lo.size(start)))
        k = Cast.of(torch.float64, IndexOf.of(where[0]))
        first, by = (Const.of(s, torch.float64) for s in (start, step))
        return Cast.of(val.dtype, Op.of("add", first, Op.of("mul", k, by)))

    return lo.emit(value, val)


@lowers(aten.arange.start_step)
def _arange(lo: Lowering, node: fx.Node, start: Any, end: Any, step: Any = 1, **kw: Any) -> View:
    return _iota(lo, node, start, step)


@lowers(aten.arange.start)
def _arange_start(lo: Lowering, node: fx.Node, start: Any, end: Any, **kw: Any) -> View:
    return _iota(lo, node, start, 1)


@lowers(aten.arange.default)
def _arange_end(lo: Lowering, node: fx.Node, end: Any, **kw: Any) -> View:
    return _iota(lo, node, 0, 1)


@lowers(prims.iota.default)
def _prims_iota(lo: Lowering, node: fx.Node, length: Any, *, start: Any = 0, step: Any = 1, **kw: Any) -> View:
    return _iota(lo, node, start, step)


@lowers(torch.ops.minifuse.random.default)
def _random(
    lo: Lowering, node: fx.Node, size: Any, seed: fx.Node, offset: int, kind: str, low: Any, high: Any,
    dtype: torch.dtype, device: torch.device,
) -> View:  # fmt: skip
    source = lo.view(seed)
    strides = contiguous_strides(lo.shape(node))

    def value(where: tuple[Expr, ...]) -> Value:
        key = source.read([as_expr(0)] * len(source.at))
        drawn = Random.of("bits" if kind == "integer" else kind, key, offset, linearize(where, strides))  # type: ignore[arg-type]
        if kind != "integer":
            return drawn
        # 63 bits keep the remainder's sign plain
        bits = Op.of("and", drawn, Const.of((1 << 63) - 1, torch.int64))
        first, span = lo.size(low), lo.size(high) - lo.size(low)
        return Op.of("add", Op.of("mod", bits, IndexOf.of(span)), IndexOf.of(first))

    return lo.emit(value, node.meta["val"])


# -- writing into inputs ----------------------------------------------------------------------------
@lowers(aten.copy_.default)
def _copy_into(lo: Lowering, node: fx.Node, into: fx.Node, source: fx.Node, non_blocking: bool = False) -> View:
    """The write-back of a mutated input: a store into the caller's memory."""
    target = lo.view(into)
    if target.buffer.storage != "input" or not isinstance(source, fx.Node):
        raise Unsupported("a copy into something that is not an input")
    view = lo.view(source)
    where = lo.axes(target.shape)
    whole = View.whole(target.buffer)
    if target.index != whole.index or view.buffer.device != target.buffer.device or view.buffer is target.buffer:
        raise Unsupported("a copy into a part of an input")
    if any(d is ZERO and s is not ONE for s, d in zip(target.buffer.shape, target.buffer.stride, strict=True)):
        raise Unsupported("a copy into an input whose elements overlap")
    value = to_compute(view.broadcast_read(where), target.buffer.dtype)
    lo.mutated.add(target.buffer.name)
    lo.add_kernel([Store(target.buffer.name, where, Cast.of(target.buffer.dtype, value))], node.name)
    return target


@lowers(aten.copy.default)
def _copy(lo: Lowering, node: fx.Node, into: fx.Node, source: fx.Node, non_blocking: bool = False) -> View:
    view = lo.view(source)
    val = node.meta["val"]
    if view.buffer.device != val.device:
        raise Unsupported("a copy across devices")
    return lo.emit(lambda where: view.broadcast_read(where), val)
