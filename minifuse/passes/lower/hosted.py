"""Numbers in the host's memory that kernels on a device read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from minifuse.ir.plan import Buffer, Extern, Opaque

from .view import View

if TYPE_CHECKING:
    from .graph import Lowering

aten = torch.ops.aten


def by_value(lo: Lowering, view: View, device: torch.device) -> View:
    """A number in the host's memory on a device: read when the call comes to it and handed over by value, as eager
    does. Nothing waits, and what the host writes there later is not seen."""
    key = (view.buffer.name, view.index, device)
    if key not in lo.numbers:
        name, dtype = lo.fresh_name(f"{view.buffer.name}_number"), view.buffer.dtype
        lo.buffers[name] = Buffer(name, dtype, (), (), device, "extern")
        read, made = aten._local_scalar_dense.default, aten.scalar_tensor.default
        why, given = "a number that the host holds", (("dtype", dtype), ("device", device))
        lo.steps += [
            Extern(read, (lo.ref(view),), (), (None,), why, origin=f"{name}_read"),
            Extern(made, (Opaque(f"{name}_read", None),), given, (name,), why, origin=name),
        ]
        lo.origin[name] = lo.where()
        lo.numbers[key] = View.whole(lo.buffers[name])
    return lo.numbers[key]
