"""Scatters: stores at computed places, where values that meet join in order (on a CPU; elsewhere they are ATen's)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from minifuse import compat
from minifuse.ir.index import ONE, ZERO, Axis, Expr
from minifuse.ir.kernel import Check, Store
from minifuse.ir.shape import delinearize, product
from minifuse.ir.value import Cast, Const, IndexOf, Load, Op, Value, topological

from .indexing import computed, joint_place, wrapped
from .pointwise import Unsupported
from .registry import lowers
from .view import View

if TYPE_CHECKING:
    from .graph import Lowering

aten = torch.ops.aten
# The mode of a store by what torch calls it.
_REDUCES = {
    "sum": "add", "add": "add", "prod": "mul", "multiply": "mul", "amax": "maximum", "amin": "minimum", "last": "last",
}  # fmt: skip


def _scatter(
    lo: Lowering,
    val: torch.Tensor,
    base: fx.Node | None,
    at: Sequence[Expr | Value],
    value: Value,
    mode: str,
    over: Expr,
    checks: Sequence[Check] = (),
    mask: Value | None = None,
) -> View:
    """A kernel that stores `base` (zeros where None) everywhere, then `value` at `at`, along `over` in order.

    Where the graph writes the result over `base`, an input that nothing else reads any more, the input takes the values
    at once and nothing is copied.
    """
    if lo.ctx.options.target == "triton" or val.device.type != "cpu":
        raise Unsupported("a scatter: ATen's, whose atomics suit the device")
    if val.dtype is torch.bool and mode != "last":
        raise Unsupported("a scatter that joins bools")
    name, axis, body = lo.node.name, over.atom, list[Store]()
    read = {v.param for v in topological([value, *(i for i in at if isinstance(i, Value))]) if isinstance(v, Load)}
    if base is not None and base.name not in read and _written_over(lo, base):
        buffer = lo.view(base).buffer
        lo.mutated.add(buffer.name)
        # An index that raises must not have written anything into what is the caller's.
        for check in checks:
            mask = check.condition if mask is None else Op.of("and", mask, check.condition)
    else:
        buffer = lo.buffer(name, val, "arena", lo.dense_stride(val))
        where = lo.axes(buffer.shape, "b")
        first = Const.of(0, val.dtype) if base is None else Cast.of(val.dtype, lo.view(base).read(where))
        body.append(Store(name, where, first))
    order = axis if isinstance(axis, Axis) else None
    body.append(Store(buffer.name, tuple(at), Cast.of(val.dtype, value), mask, mode, order))
    lo.add_kernel([*checks, *body], name)
    return View.whole(buffer)


def _written_over(lo: Lowering, base: fx.Node) -> bool:
    """Whether the current node's result ends in `base`, an input, and nobody could tell when it is written: nothing
    reads the input any more, by whatever view, and the result is not returned beside it."""
    node = lo.node
    if base.op != "placeholder" or base.name not in lo.written_inputs:
        return False
    later, n = set(), node.next
    while n.op != "root":
        later.add(n)
        n = n.next
    returned = {compat.storage_id(m.meta.get("val")) for m in lo.graph.output_node().all_input_nodes}
    if compat.storage_id(node.meta["val"]) in returned:
        return False
    views = [m for m, v in lo.env.items() if isinstance(v, View) and v.buffer.name == base.name]
    after = [(u, m) for m in views for u in m.users if u in later]
    return [(u.target, u.args[:2], m) for u, m in after] == [(aten.copy_.default, (base, node), base)]


def _one_axis(shape: Sequence[Expr]) -> tuple[Expr, tuple[Expr, ...]]:
    """An axis over all of a shape, and its coordinates there."""
    size = product(shape)
    over = ZERO if size is ONE else Axis("n", size).expr
    return over, tuple(delinearize(over, shape)) if shape else ()


@lowers(aten.embedding_dense_backward.default)
def _embedding_backward(
    lo: Lowering, node: fx.Node, grad: fx.Node, indices: fx.Node, rows: Any, padding: Any, by_frequency: bool
) -> View:
    if by_frequency:
        raise Unsupported("gradients scaled by how often a row was taken")
    val, g, tokens = node.meta["val"], lo.view(grad), lo.view(indices)
    over, where = _one_axis(tokens.shape)
    row, check = wrapped(
        lo, tokens.read(where), lo.size(rows), "index out of range in self: dimension 0", negative=False
    )
    (column,) = lo.axes(g.shape[-1:], "c")
    mask = Op.of("ne", Cast.of(torch.int64, tokens.read(where)), IndexOf.of(lo.size(padding)))
    return _scatter(lo, val, None, [row, column], g.read((*where, column)), "add", over, [check], mask)


@lowers(aten.index_put.default)
def _index_put(
    lo: Lowering,
    node: fx.Node,
    x: fx.Node,
    indices: Sequence[fx.Node | None],
    values: fx.Node,
    accumulate: bool = False,
) -> View:
    table, val, new = lo.view(x), node.meta["val"], lo.view(values)
    views = {d: lo.view(i) for d, i in enumerate(indices) if i is not None}
    masks = [v for v in views.values() if v.buffer.dtype in (torch.bool, torch.uint8)]
    if masks:
        return _put_by_mask(lo, val, table, views, new, accumulate)
    if not views:
        raise Unsupported("index_put without an index")
    rank, first = joint_place(views)
    padded = [(ONE,) * (rank - len(v.at)) + v.shape for v in views.values()]
    over, inner = _one_axis([next((s for s in sizes if s is not ONE), ONE) for sizes in zip(*padded, strict=True)])
    others = lo.axes([s for d, s in enumerate(table.shape) if d not in views], "c")
    given = [*others[:first], *inner, *others[first:]]
    at, checks = computed(lo, views, table.shape, inner, others)
    mode = "add" if accumulate else "last"
    return _scatter(lo, val, x, at, new.broadcast_read(given), mode, over, checks)


def _put_by_mask(
    lo: Lowering, val: torch.Tensor, table: View, views: dict[int, View], new: View, accumulate: bool
) -> View:
    """One mask over the leading dimensions and one value for all that it chooses: a choice element by element."""
    if accumulate or list(views) != [0] or any(s is not ONE for s in new.shape):
        raise Unsupported("an index by a mask: its size depends on data")
    chosen = views[0]

    def value(where: tuple[Expr, ...]) -> Value:
        there = Cast.of(torch.bool, chosen.read(where[: len(chosen.at)]))
        return Op.of("where", there, Cast.of(val.dtype, new.broadcast_read(where)), table.read(where))

    return lo.emit(value, val)


@lowers(
    aten.scatter.src, aten.scatter.value, aten.scatter.reduce, aten.scatter.value_reduce, aten.scatter_add.default,
    aten.scatter_reduce.two,
)  # fmt: skip
def _scatter_along(
    lo: Lowering, node: fx.Node, x: fx.Node, dim: int, index: fx.Node, src: Any, reduce: str = "", *,
    include_self: bool = True,
) -> View:  # fmt: skip
    """Along one dimension, at `index`, whose shape is the part of `src` taken."""
    mode = _REDUCES.get(reduce or ("add" if node.target is aten.scatter_add.default else "last"))
    if mode is None or not include_self:
        raise Unsupported(f"scatter_reduce by {reduce}" + ("" if include_self else " without what is there"))
    table, at, val = lo.view(x), lo.view(index), node.meta["val"]
    if ZERO in at.shape:  # of as many dimensions as it likes
        return lo.emit(lambda where: Cast.of(val.dtype, table.read(where)), val)
    if not table.at or not at.at:
        raise Unsupported("a scatter without dimensions")
    dim %= len(table.at)
    where = lo.axes(at.shape, "c")
    position, check = wrapped(
        lo, at.read(where), table.shape[dim], f"index out of bounds for dimension {dim}", negative=False
    )
    given = lo.view(src).read(where) if isinstance(src, fx.Node) and isinstance(lo.env[src], View) else lo.scalar(src)
    if given is None:
        raise Unsupported(f"a scatter of {src!r}")
    coordinates: list[Expr | Value] = [position if d == dim else w for d, w in enumerate(where)]
    return _scatter(lo, val, x, coordinates, Cast.of(val.dtype, given), mode, where[dim], [check])
