"""View operators: index maps, no copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from minifuse.ir.index import ONE, ZERO, Axis, Expr, as_expr
from minifuse.ir.shape import is_injective, linearize, product
from minifuse.ir.value import Cast, Const, IndexOf, Op, Value

from .memory import refuse_overlap
from .nodes import is_dense
from .pointwise import Unsupported, joined
from .registry import dims_of, lowers
from .view import View, placeholders

if TYPE_CHECKING:
    from .graph import Lowering

aten = torch.ops.aten
prims = torch.ops.prims


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
    lo: Lowering, node: fx.Node, x: fx.Node, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1
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
    return view.slice(dim, begin, lo.shape(node)[dim], lo.size(step))


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
    return view.flip(dims_of(dims, len(view.at)) if dims else [])


@lowers(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def _squeeze(lo: Lowering, node: fx.Node, x: fx.Node, dims: Any = None) -> View:
    view = lo.view(x)
    return view.squeeze(dims_of(dims, len(view.at))) if dims != [] else view


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
def _split_with_sizes(lo: Lowering, node: fx.Node, x: fx.Node, sizes: Sequence[Any], dim: int = 0) -> tuple[View, ...]:
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


def _lies(lo: Lowering, x: fx.Node, node: fx.Node) -> View:
    """A tensor that `node` is a view of: written where it is not in memory and elements of the view share some, which
    its strides tell a caller."""
    view, val = lo.view(x), node.meta["val"]
    if view.strided() is None and not is_injective(*lo.hints(lo.shape(node), lo.strides(val.stride()))):
        return lo.emit(view.read, x.meta["val"])
    return view


@lowers(aten.unfold.default)
def _unfold(lo: Lowering, node: fx.Node, x: fx.Node, dim: int, size: int, step: int) -> View:
    view = _lies(lo, x, node)
    if not view.at:
        return view.reshape(lo.shape(node))
    dim %= len(view.at)
    at = placeholders(lo.shape(node))
    back = [a.expr * step + at[-1].expr if d == dim else a.expr for d, a in enumerate(at[:-1])]
    return view.reindex((), back, at)


def _by_place(place: Expr, shape: Sequence[Expr], stride: Sequence[Expr], lo: Lowering) -> list[Expr]:
    """Coordinates of the element at a place in memory, where a shape lies there by strides that nest."""
    order = sorted(range(len(shape)), key=lambda d: (lo.hint(stride[d]), lo.hint(shape[d])), reverse=True)
    at = [ZERO] * len(shape)
    for d in order:
        if shape[d] is not ONE:
            at[d], place = place // stride[d], place % stride[d]
    return at


def _range(place: Expr, at: Sequence[Axis]) -> tuple[Expr, Expr]:
    """The first and the last place that a view by strides touches."""
    return place.substitute(dict.fromkeys(at, ZERO)), place.substitute({a: a.size - 1 for a in at})


@lowers(aten.as_strided.default)
def _as_strided(
    lo: Lowering, node: fx.Node, x: fx.Node, size: Any, stride: Sequence[Any], storage_offset: Any = None
) -> View:
    """Elements by their place in memory: within a tensor that is dense in eager, or within a buffer laid out alike."""
    view, val = _lies(lo, x, node), x.meta["val"]
    found, buffer = view.strided(), view.buffer
    here, begin = lo.strides(val.stride()), lo.size(val.storage_offset())
    at = placeholders(lo.shape(node))
    place = ZERO if storage_offset is None else lo.size(storage_offset) - begin
    for a, step in zip(at, stride, strict=True):
        place = place + a.expr * lo.size(step)
    first, last = _range(place, at)
    if is_dense(view.shape, here, lo.hint) and first.is_nonneg() and (product(view.shape) - 1 - last).is_nonneg():
        return view.reindex((), _by_place(place, view.shape, here, lo), at)
    if found is None or any(
        n is not ONE and a is not b for n, a, b in zip(view.shape, found.stride, here, strict=True)
    ):
        raise Unsupported("as_strided of a view that has other strides in eager")
    if not is_dense(buffer.shape, buffer.stride, lo.hint):
        raise Unsupported("as_strided of a buffer with gaps")
    return View(buffer, at, tuple(_by_place(found.offset + place, buffer.shape, buffer.stride, lo)))


@lowers(aten.as_strided_scatter.default)
def _as_strided_scatter(
    lo: Lowering, node: fx.Node, x: fx.Node, src: fx.Node, size: Any, stride: Sequence[Any], storage_offset: Any = None
) -> View:
    """A tensor with the elements at some places of eager's memory replaced."""
    view, part, val = lo.view(x), lo.view(src), x.meta["val"]
    refuse_overlap(lo, x)
    steps, here, begin = lo.sizes(stride), lo.strides(val.stride()), lo.size(val.storage_offset())
    if not is_injective(*lo.hints(part.shape, steps)):
        raise Unsupported("as_strided_scatter to places that overlap")
    offset = ZERO if storage_offset is None else lo.size(storage_offset) - begin

    def value(where: tuple[Expr, ...]) -> Value:
        place = linearize(where, here) - offset
        at = _by_place(place, part.shape, steps, lo)
        tests = [] if place.is_nonneg() else [("ge", place, ZERO)]
        tests += [("lt", a, n) for a, n in zip(at, part.shape, strict=True) if not (n - 1 - a).is_nonneg()]
        tests += [] if linearize(at, steps) is place else [("eq", linearize(at, steps), place)]
        if not tests:
            return Cast.of(val.dtype, part.read(at))
        mask = joined("and", (Op.of(name, IndexOf.of(a), IndexOf.of(b)) for name, a, b in tests))
        inner = Cast.of(val.dtype, part.read(at, mask, Const.of(0, part.buffer.dtype)))
        return Op.of("where", mask, inner, Cast.of(val.dtype, view.read(where)))

    return lo.emit(value, node.meta["val"])


@lowers(aten.repeat.default)
def _repeat(lo: Lowering, node: fx.Node, x: fx.Node, repeats: Any) -> View:
    view = lo.view(x)
    skip = len(repeats) - len(view.at)

    def value(where: tuple[Expr, ...]) -> Value:
        # Of an empty dimension nothing is read, and the empty axis says so.
        return view.read([w if a.size is ZERO else w % a.size for w, a in zip(where[skip:], view.at, strict=True)])

    return lo.emit(value, node.meta["val"])
