"""Reductions: sums, means, variances, extrema with and without their places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from minifuse.ir import dtypes
from minifuse.ir import prims as ours
from minifuse.ir.index import ONE, ZERO, Axis, Expr
from minifuse.ir.kernel import Store
from minifuse.ir.shape import delinearize, product
from minifuse.ir.value import LANES, LONG_ROW, Cast, Const, IndexOf, Op, Pick, Reduce, Value

from .pointwise import Unsupported, to_compute, truth
from .registry import dims_of, lowers
from .view import View

if TYPE_CHECKING:
    from .graph import Lowering

aten = torch.ops.aten
prims = torch.ops.prims

SMALL_ROW = 256
LEAST_ROW = 1024


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
        values = tuple(Pick.of(r, i) for i in range(r.results)) if r.results > 1 else (r,)
    return list(values)


Compute = Callable[[Value, list[tuple[Axis, int]]], Sequence[Value]]


def emit_reduction(lo: Lowering, view: View, dims: Any, compute: Compute) -> View | tuple[View, ...]:
    """One kernel that reads a tensor once and stores the current node's result, or several: what `compute` makes of an
    element and the axes."""
    rank, result = len(view.at), lo.node.meta["val"]
    over = dims_of(dims, rank)
    where, axes = reduction_space(view, over)
    single = isinstance(result, torch.Tensor)
    stores: list[Store] = []
    views = []
    for i, (value, val) in enumerate(zip(compute(view.read(where), axes), [result] if single else result, strict=True)):
        buffer = lo.buffer(lo.node.name if single else lo.result_name(i), val, "arena", lo.dense_stride(val))
        keep = len(buffer.shape) == rank
        at = [ZERO if d in over else w for d, w in enumerate(where) if keep or d not in over]
        stores.append(Store(buffer.name, tuple(at), Cast.of(val.dtype, value)))
        views.append(View.whole(buffer))
    lo.add_kernel(stores, lo.node.name)
    return views[0] if single else tuple(views)


def _simple(kind: str, by: str = "result") -> Callable[..., Any]:
    """sum, prod, amax, amin, any, all: `by` says which dtype they accumulate in."""

    def fn(lo: Lowering, node: fx.Node, x: fx.Node, dims: Any = None, *args: Any, **kw: Any) -> Any:
        def compute(value: Value, axes: list[tuple[Axis, int]]) -> list[Value]:
            value = truth(value) if by == "truth" else to_compute(value, node.meta["val"].dtype)
            return reduce_values(kind, (value,), axes)

        _nonempty(lo, x, dims, kind)
        return emit_reduction(lo, lo.view(x), dims, compute)

    return fn


def _nonempty(lo: Lowering, x: fx.Node, dims: Any, kind: str) -> None:
    if kind in ("max", "min", "argmax", "argmin"):
        view = lo.view(x)
        for d in dims_of(dims, len(view.at)):
            if not (view.shape[d] - 1).is_nonneg():
                raise Unsupported(f"{kind} over a dimension that may be empty")


lowers(aten.sum.dim_IntList, aten.sum.default, prims.sum.default)(_simple("sum"))
lowers(aten.prod.default, aten.prod.dim_int)(_simple("prod"))
lowers(aten.amax.default, aten.max.default, prims.amax.default)(_simple("max"))
lowers(aten.amin.default, aten.min.default)(_simple("min"))
lowers(aten.any.default, aten.any.dim, aten.any.dims)(_simple("any", "truth"))
lowers(aten.all.default, aten.all.dim, aten.all.dims)(_simple("all", "truth"))


def count_of(view: View, dims: Any) -> Expr:
    """How many elements a reduction over some dimensions takes together."""
    return product(view.shape[d] for d in dims_of(dims, len(view.at)))


@lowers(aten.mean.dim, aten.mean.default)
def _mean(lo: Lowering, node: fx.Node, x: fx.Node, dims: Any = None, keepdim: bool = False, **kw: Any) -> Any:
    view = lo.view(x)

    def compute(value: Value, axes: list[tuple[Axis, int]]) -> list[Value]:
        total = reduce_values("sum", (to_compute(value, node.meta["val"].dtype),), axes)[0]
        return [Op.of("div", total, count_value(count_of(view, dims), total.dtype))]

    return emit_reduction(lo, view, dims, compute)


def count_value(count: Expr, dtype: torch.dtype) -> Value:
    """A number of elements as a float."""
    if count.is_const:
        return Const.of(count.value, dtype)
    return Cast.of(dtype, IndexOf.of(count))


def variance(value: Value, axes: list[tuple[Axis, int]], count: Expr, correction: float) -> tuple[Value, Value]:
    """Variance and mean in two passes: the mean, then the squares about it, both corrected by how far off that mean is,
    which the second pass sees (the corrected two-pass algorithm of Chan, Golub and LeVeque, 1983). Without it a norm of
    equal numbers, whose sums are rounded one way at each step, is not zero. One walk over a row that is not held."""
    n, zero = count_value(count, value.dtype), Const.of(0, value.dtype)
    if in_one_walk(value.dtype, axes, count):
        _, mean, squares = reduce_values("welford", (value,), axes)
    else:
        first = Op.of("div", reduce_values("sum", (value,), axes)[0], n)
        away = Op.of("sub", value, first)
        off = Op.of("div", reduce_values("sum", (away,), axes)[0], n)
        squares = reduce_values("sum", (Op.of("mul", away, away),), axes)[0]
        squares = Op.of("maximum", Op.of("sub", squares, Op.of("mul", Op.of("mul", off, off), n)), zero)
        mean = Op.of("add", first, off)
    left = Op.of("maximum", Op.of("sub", n, Const.of(correction, value.dtype)), zero)
    return Op.of("div", squares, left), mean


def in_one_walk(dtype: torch.dtype, axes: list[tuple[Axis, int]], count: Expr) -> bool:
    """Whether what is reduced is known to be too long to be held between two passes, and lies in rows that are worth a
    partial result each. In float64 a chunk fills a core's nearest cache: 1.2 times the time of two walks."""
    if dtype is not torch.float32 or not axes or axes[0][1] != LANES or not count.is_const or count.value <= LONG_ROW:
        return False
    size = axes[0][0].size
    return size.is_const and size.value >= LEAST_ROW


@lowers(ours.softmax_statistics)
def _softmax_statistics(lo: Lowering, node: fx.Node, x: fx.Node, dim: int) -> Any:
    return emit_reduction(lo, lo.view(x), dim, lambda value, axes: reduce_values("softmax", (value,), axes))


@lowers(aten.var.correction, aten.std.correction, prims.var.default, aten.var_mean.correction)
def _var(
    lo: Lowering, node: fx.Node, x: fx.Node, dims: Any = None, correction: Any = 1, keepdim: bool = False, **kw: Any
) -> Any:
    view, val, both = lo.view(x), node.meta["val"], node.target is aten.var_mean.correction
    correction = _literal(1 if correction is None else correction)

    def compute(value: Value, axes: list[tuple[Axis, int]]) -> list[Value]:
        value = to_compute(value, (val[0] if both else val).dtype)
        var, mean = variance(value, axes, count_of(view, dims), correction)
        if node.target is aten.std.correction:
            var = Op.of("sqrt", var)
        return [var, mean] if both else [var]

    return emit_reduction(lo, view, dims, compute)


def _literal(x: Any) -> float:
    if isinstance(x, (int, float)):
        return float(x)
    raise Unsupported("a symbolic number where a literal is needed")


def _arg_reduction(kind: str, part: slice) -> Callable[..., Any]:
    """max and min with indices, argmax, argmin: a `part` of (value, index), over all dimensions where dim is None."""

    def fn(lo: Lowering, node: fx.Node, x: fx.Node, dim: Any = None, keepdim: bool = False) -> Any:
        if dim is None and keepdim:
            raise Unsupported(f"{kind} over everything with keepdim")
        _nonempty(lo, x, dim, kind)
        view = lo.view(x)
        if dim is None:
            view, dim = view.reshape((product(view.shape),)), 0
        if dtypes.row(view.buffer.dtype).dtype is torch.bool:
            raise Unsupported(f"{kind} of bools")

        def compute(value: Value, axes: list[tuple[Axis, int]]) -> list[Value]:
            index: Value = IndexOf.of(axes[0][0].expr) if axes else Const.of(0, torch.int64)
            return reduce_values(kind, (to_compute(value, value.dtype), index), axes)[part]

        return emit_reduction(lo, view, dim, compute)

    return fn


lowers(aten.max.dim)(_arg_reduction("argmax", slice(2)))
lowers(aten.min.dim)(_arg_reduction("argmin", slice(2)))
lowers(aten.argmax.default)(_arg_reduction("argmax", slice(1, 2)))
lowers(aten.argmin.default)(_arg_reduction("argmin", slice(1, 2)))
