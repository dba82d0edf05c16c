"""Reductions: sums, means, variances, extrema with and without their places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from minifuse.ir import dtypes
from minifuse.ir.index import ONE, ZERO, Axis, Expr
from minifuse.ir.kernel import Check, Store
from minifuse.ir.shape import delinearize, product
from minifuse.ir.value import LANES, Cast, Const, IndexOf, Op, Pick, Reduce, Value

from .pointwise import Unsupported, to_compute, truth
from .registry import STRUCTURAL, dims_of, lowers
from .view import View

if TYPE_CHECKING:
    from .graph import Lowering

aten = torch.ops.aten
prims = torch.ops.prims

SMALL_ROW = 256


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
    view: View,
    dims: Any,
    compute: Callable[[Value, list[tuple[Axis, int]]], list[tuple[Value, torch.Tensor, str]]],
    check: Callable[[Value], Check] | None = None,
) -> tuple[View, ...]:
    """One kernel that reads a tensor once and stores the values that `compute` makes of it."""
    rank = len(view.at)
    over = dims_of(dims, rank)
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
        return emit_reduction(lo, node, lo.view(x), dims, compute)[0]

    return fn


def _nonempty(lo: Lowering, x: fx.Node, dims: Any, kind: str) -> None:
    if kind in ("max", "min", "argmax", "argmin"):
        view = lo.view(x)
        for d in dims_of(dims, len(view.at)):
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
    count = product(view.shape[d] for d in dims_of(dims, len(view.at)))

    def compute(value: Value, axes: list[tuple[Axis, int]]) -> list[tuple[Value, torch.Tensor, str]]:
        total = reduce_values("sum", (to_compute(value, val.dtype),), axes)[0]
        return [(Op.of("div", total, count_value(count, total.dtype)), val, node.name)]

    return emit_reduction(lo, node, lo.view(x), dims, compute)[0]


def count_value(count: Expr, dtype: torch.dtype) -> Value:
    """A number of elements as a float."""
    if count.is_const:
        return Const.of(count.value, dtype)
    return Cast.of(dtype, IndexOf.of(count))


def variance(value: Value, axes: list[tuple[Axis, int]], count: Expr, correction: float) -> tuple[Value, Value]:
    """Variance and mean in two passes: the mean, then the squares about it, both corrected by how far off that mean is,
    which the second pass sees (the corrected two-pass algorithm of Chan, Golub and LeVeque, 1983). Without it a norm of
    equal numbers, whose sums are rounded one way at each step, is not zero."""
    n, zero = count_value(count, value.dtype), Const.of(0, value.dtype)
    first = Op.of("div", reduce_values("sum", (value,), axes)[0], n)
    away = Op.of("sub", value, first)
    off = Op.of("div", reduce_values("sum", (away,), axes)[0], n)
    squares = reduce_values("sum", (Op.of("mul", away, away),), axes)[0]
    squares = Op.of("maximum", Op.of("sub", squares, Op.of("mul", Op.of("mul", off, off), n)), zero)
    left = Op.of("maximum", Op.of("sub", n, Const.of(correction, value.dtype)), zero)
    return Op.of("div", squares, left), Op.of("add", first, off)


@lowers(aten.var.correction, aten.std.correction, prims.var.default)
def _var(
    lo: Lowering, node: fx.Node, x: fx.Node, dims: Any = None, correction: Any = 1, keepdim: bool = False, **kw: Any
) -> View:
    val = node.meta["val"]
    view = lo.view(x)
    count = product(view.shape[d] for d in dims_of(dims, len(view.at)))
    correction = _literal(1 if correction is None else correction)

    def compute(value: Value, axes: list[tuple[Axis, int]]) -> list[tuple[Value, torch.Tensor, str]]:
        var, _ = variance(to_compute(value, val.dtype), axes, count, correction)
        if node.target is aten.std.correction:
            var = Op.of("sqrt", var)
        return [(var, val, node.name)]

    return emit_reduction(lo, node, lo.view(x), dims, compute)[0]


@lowers(aten.var_mean.correction)
def _var_mean(
    lo: Lowering, node: fx.Node, x: fx.Node, dims: Any = None, *, correction: Any = 1, keepdim: bool = False
) -> tuple[View, ...]:
    vals = node.meta["val"]
    view = lo.view(x)
    count = product(view.shape[d] for d in dims_of(dims, len(view.at)))
    correction = _literal(1 if correction is None else correction)

    def compute(value: Value, axes: list[tuple[Axis, int]]) -> list[tuple[Value, torch.Tensor, str]]:
        pair = variance(to_compute(value, vals[0].dtype), axes, count, correction)
        return [(v, val, lo.result_name(i)) for i, (v, val) in enumerate(zip(pair, vals, strict=True))]

    return emit_reduction(lo, node, lo.view(x), dims, compute)


def _literal(x: Any) -> float:
    if isinstance(x, (int, float)):
        return float(x)
    raise Unsupported("a symbolic number where a literal is needed")


def _arg_reduction(kind: str, lo: Lowering, node: fx.Node, x: fx.Node, dim: Any, outputs: str) -> tuple[View, ...]:
    """max and min with indices, argmax, argmin; over all dimensions where dim is None."""
    vals = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else (node.meta["val"],)
    _nonempty(lo, x, dim, kind)
    view = lo.view(x)
    if dim is None:
        view, dim = view.reshape((product(view.shape),)), 0
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

    return emit_reduction(lo, node, view, dim, compute)


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
