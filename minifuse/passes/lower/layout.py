"""Rows that matrix products read and write on a GPU begin on 16 bytes, whatever their length.

The libraries' kernels load 16 bytes at a time, along rows that all begin on a multiple of them: for a vocabulary of
50,257 in bfloat16 they fall back to kernels that load 2 bytes and take seven times as long (H200: 13.3 ms in place of
1.8). So a matrix that the plan allocates, and that a product reads or writes, has its rows apart by the next multiple.
What the caller sees keeps eager's strides.
"""

from __future__ import annotations

import torch
from torch import fx

from minifuse.ir import dtypes

aten = torch.ops.aten

ROW_BYTES = 16
SHORTEST = 64
"""Elements of a row: padding a shorter one would cost more than a ninth of it."""
PRODUCTS = frozenset({aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default})
_VIEWS = frozenset({
    aten.view.default, aten._unsafe_view.default, aten.t.default, aten.transpose.int, aten.permute.default,
    aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim, aten.alias.default, aten.detach.default,
})  # fmt: skip


def padded_rows(graph: fx.Graph) -> dict[str, int]:
    """By node, the elements from one row of its result to the next, where that is not their number."""
    found: dict[str, int] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in PRODUCTS:
            continue
        for used in (node, *node.all_input_nodes):
            while used.op == "call_function" and used.target in _VIEWS:
                used = used.all_input_nodes[0]
            row = _padded(used)
            if row is not None:
                found[used.name] = row
    return found


def _padded(node: fx.Node) -> int | None:
    val = node.meta.get("val")
    if node.op != "call_function" or not isinstance(val, torch.Tensor) or val.device.type != "cuda" or val.dim() < 2:
        return None
    n = val.shape[-1]
    if not isinstance(n, int) or n < SHORTEST or not dtypes.supported(val.dtype) or not val.is_contiguous():
        return None
    step = ROW_BYTES // min(val.dtype.itemsize, ROW_BYTES)
    return -(-n // step) * step if n % step else None
