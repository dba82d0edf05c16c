"""Indexing: embedding, gather, index_select, advanced indices, as loads at computed places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import fx

from minifuse.ir.index import ONE, ZERO, Expr
from minifuse.ir.kernel import Check
from minifuse.ir.value import Cast, Const, IndexOf, Load, Op, Value, at_values

from .nodes import source_line
from .pointwise import Unsupported
from .registry import lowers
from .view import View

if TYPE_CHECKING:
    from .graph import Lowering

aten = torch.ops.aten
prims = torch.ops.prims


def wrapped(lo: Lowering, index: Load, size: Expr, message: str, negative: bool = True) -> tuple[Value, Check]:
    """A loaded index with negative values wrapped, where these count from the end, and bad ones led to zero, and its
    check, whose message goes on with the extent where it is known and the user's line."""
    line = source_line(lo.node, code=False)
    message += (f" of {size} elements" if size.is_const else "") + (f" ({line})" if line else "")
    position: Value = Cast.of(torch.int64, index)
    n = IndexOf.of(size)
    zero = Const.of(0, torch.int64)
    if negative:
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
    row, check = wrapped(
        lo, tokens.read(where[:-1]), table.shape[0], "index out of range in self: dimension 0", negative=False
    )
    return lo.emit(lambda at: gather_read(table, [row, at[-1]]), val, checks=[check])


def gather_read(view: View, where: Sequence[Expr | Value]) -> Load:
    """Read a view at coordinates of which some are loaded values."""
    env = {a: w for a, w in zip(view.at, where, strict=True) if isinstance(w, Expr)}
    computed = {a: w for a, w in zip(view.at, where, strict=True) if not isinstance(w, Expr)}
    return Load.of(view.buffer.name, [at_values(i, env, computed) for i in view.index], view.buffer.dtype)


@lowers(aten.gather.default)
def _gather(lo: Lowering, node: fx.Node, x: fx.Node, dim: int, index: fx.Node, sparse_grad: bool = False) -> View:
    table, at, val = lo.view(x), lo.view(index), node.meta["val"]
    if ZERO in at.shape:  # of as many dimensions as it likes
        return lo.emit(lambda _: Const.of(0, val.dtype), val)
    if not table.at:
        raise Unsupported("gather from a tensor without dimensions")
    dim %= len(table.at)
    where = lo.axes(lo.shape(node))
    message = f"index out of bounds for dimension {dim}"
    position, check = wrapped(lo, at.read(where), table.shape[dim], message, negative=False)
    # Beside a table of one dimension an index may have none.
    coordinates = [position if d == dim else ZERO if n is ONE else where[d] for d, n in enumerate(table.shape)]
    return lo.emit(lambda _: gather_read(table, coordinates), val, checks=[check])


@lowers(aten.index_select.default)
def _index_select(lo: Lowering, node: fx.Node, x: fx.Node, dim: int, index: fx.Node) -> View:
    table, at = lo.view(x), lo.view(index)
    if not table.at or not at.at:
        raise Unsupported("index_select without dimensions")
    dim %= len(table.at)
    where = lo.axes(lo.shape(node))
    position, check = wrapped(
        lo, at.read([where[dim]]), table.shape[dim], f"index out of range in self: dimension {dim}", negative=False
    )
    coordinates: list[Expr | Value] = [position if d == dim else w for d, w in enumerate(where)]
    return lo.emit(lambda _: gather_read(table, coordinates), node.meta["val"], checks=[check])


@lowers(aten.index.Tensor)
def _index(lo: Lowering, node: fx.Node, x: fx.Node, indices: Sequence[fx.Node | None]) -> View:
    table = lo.view(x)
    given = [(d, i) for d, i in enumerate(indices) if i is not None]
    if not given or any(lo.view(i).buffer.dtype in (torch.bool, torch.uint8) for _, i in given):
        raise Unsupported("an index by a mask: its size depends on data")
    views = {d: lo.view(i) for d, i in given}
    if any(v.buffer.device != table.buffer.device for v in views.values()):
        raise Unsupported("an index on another device")
    rank, first = joint_place(views)
    where = lo.axes(lo.shape(node))
    inner = where[first : first + rank]
    coordinates, checks = computed(lo, views, table.shape, inner, where[:first] + where[first + rank :])
    return lo.emit(lambda _: gather_read(table, coordinates), node.meta["val"], checks=checks)


def joint_place(views: Mapping[int, View]) -> tuple[int, int]:
    """How many dimensions indices have together, and behind how many others they stand: their own where they are
    neighbours, else none."""
    places = sorted(views)
    together = places == list(range(places[0], places[0] + len(places)))
    return max(len(v.at) for v in views.values()), places[0] if together else 0


def computed(
    lo: Lowering, views: Mapping[int, View], shape: Sequence[Expr], inner: Sequence[Expr], others: Sequence[Expr]
) -> tuple[list[Expr | Value], list[Check]]:
    """Coordinates in a shape: those that indices say, at `inner`, with their checks, and the `others` in order."""
    rest = iter(others)
    coordinates: list[Expr | Value] = []
    checks = []
    for d, size in enumerate(shape):
        if d not in views:
            coordinates.append(next(rest))
            continue
        value, check = wrapped(lo, views[d].broadcast_read(inner), size, f"index out of bounds for dimension {d}")
        coordinates.append(value)
        checks.append(check)
    return coordinates, checks
