"""Concatenation, padding, scattering of slices, and copies into inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from minifuse.ir import dtypes
from minifuse.ir.index import ONE, ZERO, Expr
from minifuse.ir.kernel import Store
from minifuse.ir.value import Cast, Const, IndexOf, Op, Value

from .memory import refuse_overlap
from .pointwise import Unsupported, check_fits, joined, to_compute
from .registry import lowers
from .view import View

if TYPE_CHECKING:
    from .graph import Lowering

aten = torch.ops.aten
prims = torch.ops.prims


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
            mask = joined("and", inside)
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
    check_fits(value, val.dtype)
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
        mask = joined("and", tests) if tests else None
        for d, a in enumerate(view.at):
            if a.size is ONE and d in before:
                index[d] = ZERO
        return view.read(index, mask, None if mask is None else fill)

    return lo.emit(at, val)


@lowers(aten.slice_scatter.default)
def _slice_scatter(
    lo: Lowering, node: fx.Node, x: fx.Node, src: fx.Node, dim: int = 0, start: Any = None, end: Any = None,
    step: Any = 1,
) -> View:  # fmt: skip
    val = node.meta["val"]
    base, part = lo.view(x), lo.view(src)
    refuse_overlap(lo, x)
    dim %= len(base.at)
    begin = ZERO if start is None else lo.size(start)
    if begin.is_const and begin.value < 0:
        begin = begin + base.shape[dim]
    if not begin.is_nonneg():
        raise Unsupported("a slice_scatter whose start may be negative")
    size, by = part.shape[dim], lo.size(step)

    def value(where: tuple[Expr, ...]) -> Value:
        position, end = IndexOf.of(where[dim]), begin + size * by
        mask = Op.of("and", Op.of("ge", position, IndexOf.of(begin)), Op.of("lt", position, IndexOf.of(end)))
        # As far from the start as `where`, counted modulo the step, but never negative.
        ahead = where[dim] + begin * (by - 1)
        if by is not ONE:
            mask = Op.of("and", mask, Op.of("eq", IndexOf.of(ahead % by), Const.of(0, torch.int64)))
        at = list(where)
        at[dim] = ahead // by - begin if size is not ONE else ZERO
        inner = Cast.of(val.dtype, part.read(at, mask, Const.of(0, part.buffer.dtype)))
        return Op.of("where", mask, inner, Cast.of(val.dtype, base.broadcast_read(where)))

    return lo.emit(value, val)


@lowers(aten.select_scatter.default)
def _select_scatter(lo: Lowering, node: fx.Node, x: fx.Node, src: fx.Node, dim: int, index: Any) -> View:
    val = node.meta["val"]
    base, part = lo.view(x), lo.view(src)
    refuse_overlap(lo, x)
    dim %= len(base.at)
    at = lo.size(index)
    at = at + base.shape[dim] if at.is_const and at.value < 0 else at
    if not at.is_nonneg():
        raise Unsupported("a select_scatter whose index may be negative")

    def value(where: tuple[Expr, ...]) -> Value:
        mask = Op.of("eq", IndexOf.of(where[dim]), IndexOf.of(at))
        rest = [w for d, w in enumerate(where) if d != dim]
        inner = Cast.of(val.dtype, part.read(rest, mask, Const.of(0, part.buffer.dtype)))
        return Op.of("where", mask, inner, Cast.of(val.dtype, base.broadcast_read(where)))

    return lo.emit(value, val)


@lowers(aten.copy_.default)
def _copy_into(lo: Lowering, node: fx.Node, into: fx.Node, source: fx.Node, non_blocking: bool = False) -> View:
    """The write-back of a mutated input: a store into the caller's memory."""
    target = lo.view(into)
    if target.buffer.storage != "input" or not isinstance(source, fx.Node):
        raise Unsupported("a copy into something that is not an input")
    view = lo.view(source)
    where = lo.axes(target.shape)
    whole = View.whole(target.buffer)
    if view.buffer is target.buffer and view.strided() == target.strided():
        return target  # what is to be there was stored there
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
