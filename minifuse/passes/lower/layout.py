"""Rows that matrix products read and write on a GPU begin on 16 bytes, whatever their length.

The libraries' kernels load 16 bytes at a time, along rows that all begin on a multiple of them: for a vocabulary of
50,257 in bfloat16 they fall back to kernels that load 2 bytes and take seven times as long (H200: 13.3 ms in place of
1.8). So a matrix that the plan allocates, and that a product reads or writes, has its rows apart by the next multiple.
What the caller sees keeps eager's strides, and so does what an operator reads that kernels do not have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from minifuse.ir import dtypes
from minifuse.passes.memory import PRODUCTS

from .nodes import is_alias, memory_of

aten = torch.ops.aten

ROW_BYTES = 16
SHORTEST = 64
"""Elements of a row: padding a shorter one would cost more than a ninth of it."""
_TURNS = frozenset({aten.t.default, aten.transpose.int, aten.permute.default})
_VIEWS = frozenset({
    aten.view.default, aten._unsafe_view.default, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.alias.default, aten.detach.default,
})  # fmt: skip


def padded_rows(graph: fx.Graph, lowered: Callable[[Any], bool]) -> dict[str, int]:
    """By node, the elements from one row of its result to the next, where that is not their number.

    Who else reads such a result must take it by its strides: kernels do (`lowered` says of which operators), other
    operators need not, and of outputs that share its memory a copy would have none to share.
    """
    found: dict[str, int] = {}
    output = graph.output_node()
    returned = Counter(memory_of(n) for n in output.all_input_nodes)
    for node in graph.nodes:
        for used in (node, *node.all_input_nodes) if node.target in PRODUCTS else ():
            root = _root(used)
            if root is None or root.name in found or returned[memory_of(root)] > 1:
                continue
            row = _padded(root)
            if row is not None and _by_strides(root, root.meta["val"].shape[-1], lowered):
                found[root.name] = row
    return found


def _root(node: fx.Node) -> fx.Node | None:
    """The call whose rows a view has."""
    while node.target in _TURNS or node.target in _VIEWS:
        source = node.all_input_nodes[0]
        if node.target in _VIEWS and node.meta["val"].shape[-1:] != source.meta["val"].shape[-1:]:
            return None
        node = source
    return node


def _by_strides(node: fx.Node, n: int, lowered: Callable[[Any], bool]) -> bool:
    """Whether all that reads a result, or a view of it that keeps its rows of n, takes it as it lies."""
    for user in node.users:
        if user.target in _TURNS or (user.target in _VIEWS and user.meta["val"].shape[-1] == n):
            if not _by_strides(user, n, lowered):
                return False
        elif user.op != "output" and user.target not in PRODUCTS and (is_alias(user) or not lowered(user.target)):
            return False
    return True


def _padded(node: fx.Node) -> int | None:
    val = node.meta.get("val")
    if node.op != "call_function" or not isinstance(val, torch.Tensor) or val.device.type != "cuda" or val.dim() < 2:
        return None
    n = val.shape[-1]
    if not isinstance(n, int) or n < SHORTEST or not dtypes.supported(val.dtype) or not val.is_contiguous():
        return None
    step = ROW_BYTES // min(val.dtype.itemsize, ROW_BYTES)
    return -(-n // step) * step if n % step else None
