"""The table of structural lowerers: overload -> the function that lowers it.

A lowerer takes the `Lowering`, the node and the node's arguments, and returns what the node stands
for. It raises `Unsupported` with a reason to leave the node to ATen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

STRUCTURAL: dict[Any, Callable[..., Any]] = {}


def lowers(*targets: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a lowerer for these overloads."""

    def add(fn: Callable[..., Any]) -> Callable[..., Any]:
        for t in targets:
            STRUCTURAL[t] = fn
        return fn

    return add


def dims_of(dims: Any, rank: int) -> list[int]:
    """The dimensions that an operator names, sorted and not negative; all of them for None or an empty list, and none
    of a tensor that has none, which may be named 0 or -1."""
    if rank == 0 or dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(rank))
    return sorted({d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])})
