"""Common subexpression elimination: equal calls of pure ATen operators become one."""

from __future__ import annotations

from collections.abc import Collection, Iterable
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
        if "recompute" in node.meta or not is_pure(node) or memory_of(node) in returned:
            continue
        key = (node.meta.get("partitioner_tag"), target, _key(node.args), _key(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            merged += 1
    return merged


def is_pure(node: fx.Node) -> bool:
    """Whether a call is of an ATen operator that gives one tensor, and a second such call the same."""
    target = node.target
    if not isinstance(target, compat.OpOverload) or target.namespace != "aten" or target._schema.is_mutable:
        return False
    return isinstance(node.meta.get("val"), torch.Tensor) and _repeats(target)


def twins(nodes: Iterable[fx.Node], first: Collection[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Of calls outside `first`, those that are equal to one in it, once their arguments are replaced by theirs."""
    found: dict[fx.Node, fx.Node] = {}
    seen: dict[Any, fx.Node] = {}
    for node in nodes:
        if is_pure(node):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: found.get(n, n))
            key = (node.target, _key(args), _key(kwargs))
            if node in first:
                seen.setdefault(key, node)
            elif key in seen:
                found[node] = seen[key]
    return found


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
