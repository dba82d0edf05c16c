"""What a kernel keeps in registers: the values that are alive at once, by a scan over its body in order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

from minifuse.ir import dtypes
from minifuse.ir.index import Axis
from minifuse.ir.kernel import Root
from minifuse.ir.value import Const, IndexOf, Reduce, Value, topological

WORD = 4


def live_words(body: Iterable[Root], blocks: Mapping[Axis, int]) -> int:
    """The most 32-bit words that a program has alive at once, of blocks of so many elements an axis.

    Each value is computed right before its first reader and lives until its last one (the linear scan of Poletto and
    Sarkar, "Linear scan register allocation", 1999); a column's running result lives throughout.
    """
    order = topological(v for root in body for v in root.values)
    last = {v: k for k, v in enumerate(order)}
    for k, v in enumerate(order):
        for a in v.args:
            last[a] = k
    ends: dict[int, int] = {}
    alive = most = always = 0
    for k, v in enumerate(order):
        words = 0 if isinstance(v, (Const, IndexOf)) else size(v, blocks)
        if isinstance(v, Reduce) and v.lanes == 1:
            always += words
        alive += words
        ends[last[v]] = ends.get(last[v], 0) + words
        most = max(most, alive)
        alive -= ends.pop(k, 0)
    return most + always


def size(v: Value, blocks: Mapping[Axis, int]) -> int:
    """Words of a block of a value."""
    return prod(blocks[a] for a in v.axes if a in blocks) * max(dtypes.itemsize(v.dtype), WORD) // WORD
