"""Operators that see memory: what ATen makes of them depends on eager's strides, and on more than a tensor's elements.

A view of eager's may lie otherwise here. Where such an operator is left to ATen it is given eager's memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from minifuse.ir import dtypes
from minifuse.ir.plan import Buffer, Extern, TensorRef
from minifuse.ir.shape import is_overlapping

from .nodes import is_dense, memory_of
from .pointwise import Unsupported
from .registry import lowers
from .view import View

if TYPE_CHECKING:
    from .graph import Lowering

aten = torch.ops.aten
BY_PLACE = (
    aten.as_strided.default, aten.as_strided_scatter.default, aten.diagonal_scatter.default,
    aten.select_scatter.default, aten.slice_scatter.default,
)  # fmt: skip


def refuse_overlap(lo: Lowering, x: fx.Node) -> None:
    """Unsupported for a view some of whose elements share memory: eager writes into a copy of all the memory, strides
    and all, so that what is written shows at each of them. Of what is expanded it makes an ordinary copy."""
    val = x.meta["val"]
    if is_overlapping(*lo.hints(lo.sizes(val.shape), lo.strides(val.stride()))):
        raise Unsupported("a scatter into a view whose elements share memory")


@lowers(aten.diagonal_scatter.default)
def _diagonal_scatter(lo: Lowering, node: fx.Node, x: fx.Node, *args: Any, **kw: Any) -> View:
    refuse_overlap(lo, x)
    raise Unsupported("a scatter that was not taken apart")


def arguments(lo: Lowering, node: fx.Node) -> Any:
    """A call's arguments for ATen, the first as it lies in eager where that matters."""
    if node.target not in BY_PLACE or not isinstance(node.args[0], fx.Node):
        return lo.tree(node.args)
    return _as_eager_has_it(lo, node.args[0]), *lo.tree(node.args[1:])


def _as_eager_has_it(lo: Lowering, x: fx.Node) -> Any:
    """A tensor by eager's strides, in memory of its own that holds all that eager's holds.

    That is the memory of the first node that has it: an input, or a copy of what that node computed, which here may
    lie otherwise, and lies in the arena among others.
    """
    val = x.meta["val"]
    if not isinstance(lo.env[x], View) or not dtypes.supported(val.dtype):
        return lo.tree(x)
    root = next(n for n in lo.graph.nodes if memory_of(n) == memory_of(x) and isinstance(lo.env.get(n), View))
    whole, owned = lo.env[root], root.meta["val"]
    shape, stride = lo.sizes(owned.shape), lo.strides(owned.stride())
    if whole.buffer.storage == "input" and whole.index == View.whole(whole.buffer).index:
        buffer = whole.buffer
    elif is_dense(shape, stride, lo.hint):
        name = lo.fresh_name(f"{root.name}_laid")
        laid = lo.emit(whole.read, owned, name, stride)
        buffer = Buffer(lo.fresh_name(f"{name}_own"), owned.dtype, shape, stride, owned.device, "extern")
        lo.buffers[buffer.name] = buffer
        call, why = (lo.ref(laid),), "memory of its own for an operator that sees memory"
        lo.steps.append(Extern(aten.clone.default, call, (), (buffer.name,), why, origin=buffer.name))
        lo.origin[buffer.name] = lo.where()
    else:
        return lo.tree(x)
    offset = lo.size(val.storage_offset()) - lo.size(owned.storage_offset())
    return TensorRef(buffer.name, lo.sizes(val.shape), lo.strides(val.stride()), offset)
