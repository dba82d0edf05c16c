"""Questions about FX nodes and buffers that lowering asks."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import fx

from minifuse import compat
from minifuse.ir.index import ONE, Expr, Sym


def names_symbol(size: Expr, symbol: str) -> bool:
    return isinstance(size.atom, Sym) and size.atom.name == symbol


def finds_size(node: fx.Node, known: Container[str]) -> bool:
    """Whether a tensor's size is not known before an operator has run: of a slice up to a number read from a tensor."""
    val = node.meta.get("val")
    if not node.meta.get("unbacked_bindings") or not isinstance(val, torch.Tensor):
        return False
    sizes: list[Any] = [s for s in val.shape if not isinstance(s, int)]
    return any(name not in known for s in sizes if compat.is_unbacked(s) for name in compat.symbol_names(s))


def is_dense(shape: Sequence[Expr], stride: Sequence[Expr], hint: Callable[[Expr], int]) -> bool:
    """Whether strides are a permutation of row-major ones: every element its own memory.

    Symbols count at their hint: torch computes the strides of its results from the sizes, and the two may be equal
    by a guard that our expressions know nothing of.
    """
    expected = 1
    left = [(hint(s), hint(d)) for s, d in zip(shape, stride, strict=True) if s is not ONE]
    while left:
        step = next((pair for pair in left if pair[1] == expected), None)
        if step is None:
            return False
        left.remove(step)
        expected *= max(step[0], 1)
    return True


def is_effect(node: fx.Node) -> bool:
    """Whether a node must run, once, in its place: it draws numbers, writes or talks to others."""
    if node.op != "call_function":
        return False
    target = node.target
    if isinstance(target, compat.OpOverload):
        if torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable:
            return True
        return target.namespace in ("minifuse", "_c10d_functional", "c10d") or "assert" in target.name()
    return isinstance(target, compat.HigherOrderOperator) or not target.__module__.startswith("_operator")


def is_alias(node: fx.Node) -> bool:
    """Whether a result is a view of an argument, by the operator's schema."""
    target = node.target
    return isinstance(target, compat.OpOverload) and any(r.alias_info is not None for r in target._schema.returns)


def memory_of(node: fx.Node) -> int | None:
    """What nodes whose results share memory have in common."""
    return compat.storage_id(node.meta.get("val"))


def mutated_arguments(node: fx.Node) -> list[fx.Node]:
    """The arguments that a call writes into, by its schema."""
    if not isinstance(node.target, compat.OpOverload) or not node.target._schema.is_mutable:
        return []
    written = [(i, a.name) for i, a in enumerate(node.target._schema.arguments)
               if a.alias_info is not None and a.alias_info.is_write]  # fmt: skip
    found = [node.args[i] if i < len(node.args) else node.kwargs.get(name) for i, name in written]
    return [arg for arg in found if isinstance(arg, fx.Node)]


def module_path(node: fx.Node) -> str:
    """The path of the innermost module that a node is computed in, of a node of the backward that of what it is the
    gradient of: `layers.0.mlp`; empty at the top, and where Dynamo did not capture the graph."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    path = next((path for path, _ in reversed(stack.values())), "")
    words = re.findall(r"\w+", path.replace("_modules", ""))[1:]
    return ".".join(words[1:] if words[:1] in (["self"], ["fn"]) else words)


def source_line(node: fx.Node, code: bool = True) -> str:
    """The user's line that a node comes from: `model.py:41`, and the `code` there."""
    trace = node.meta.get("stack_trace")
    if not trace:
        return ""
    frames = re.findall(r'File "([^"]*)", line (\d+), in [^\n]*\n?\s*([^\n]*)', trace)
    if not frames:
        return ""
    file, line, text = frames[-1]
    return f"{file.rsplit('/', 1)[-1]}:{line} {text.strip() if code else ''}".rstrip()


def result_type(args: Sequence[Any]) -> torch.dtype:
    """The common dtype of arguments of a graph node, as eager's promotion has it."""
    vals = [a.meta["val"] if isinstance(a, fx.Node) else a for a in args]
    vals = [v for v in vals if isinstance(v, (torch.Tensor, bool, int, float, torch.SymInt, torch.SymFloat))]
    plain = [
        compat.size_hint(v) if isinstance(v, torch.SymInt) else float(v) if isinstance(v, torch.SymFloat) else v
        for v in vals
    ]
    if len(plain) == 1:
        only = plain[0]
        return only.dtype if isinstance(only, torch.Tensor) else torch.tensor(only, device="cpu").dtype
    found = torch.result_type(plain[0], plain[1])
    for v in plain[2:]:
        found = (
            torch.result_type(torch.empty((), dtype=found, device="cpu"), v)
            if not isinstance(v, torch.Tensor)
            else (torch.promote_types(found, v.dtype))
        )
    return found
