"""Common subexpression elimination: equal calls of pure ATen operators become one."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from minifuse import compat

from .lower.nodes import memory_of


def merge_equal(graph: fx.Graph) -> int:
    """Merge calls of one operator with equal arguments, in place; returns how many went.

    A result that shares memory with an output stays, for eager returns two tensors; so does what draws random numbers
    or allocates, what is tagged by `torch.utils.checkpoint`, and what comes behind a mutation stands apart from what
    comes before it. A call of the backward stays beside one of the forward: whether it is worth saving that is for
    rematerialisation to say.
    """
    returned = {memory_of(n) for n in graph.output_node().all_input_nodes} - {None}
    seen: dict[Any, fx.Node] = {}
    merged = 0
    for node in list(graph.nodes):
        target = node.target
        if node.op != "call_function" or not isinstance(target, compat.OpOverload):
            continue
        if target._schema.is_mutable:
            seen.clear()
        pure = target.namespace == "aten" and not target._schema.is_mutable and "recompute" not in node.meta
        tensor = isinstance(node.meta.get("val"), torch.Tensor)
        if not pure or not tensor or not _repeats(target) or memory_of(node) in returned:
            continue
        key = (node.meta.get("partitioner_tag"), target, _key(node.args), _key(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            merged += 1
    return merged


def _repeats(target: compat.OpOverload) -> bool:
    """Whether a second call gives the same numbers as the first."""
    return torch.Tag.nondeterministic_seeded not in target.tags and "empty" not in target._schema.name


def _key(x: Any) -> Any:
    """An argument as a key; a number keeps its type and its sign of zero."""
    if isinstance(x, fx.Node):
        return x
    if isinstance(x, (tuple, list)):
        return tuple(_key(i) for i in x)
    if isinstance(x, dict):
        return tuple((k, _key(v)) for k, v in x.items())
    return type(x), repr(x)
