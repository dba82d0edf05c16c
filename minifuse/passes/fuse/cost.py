"""What a kernel takes and what one kernel saves against two, in bytes and in seconds of a device.

The model is the roofline's: a kernel takes its launch, and the longer of moving its bytes and of issuing its
instructions. A buffer moves at the rate of the level of memory that holds it between two kernels, in lines: what an
access skips within a line takes as long as what it touches.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from minifuse.ir.index import ZERO, Expr
from minifuse.ir.value import Index

from .graph import Graph
from .group import Group

# Digits: what sums of floats differ by in another order must not decide.
PICOSECONDS = 12


class Saving(NamedTuple):
    """What one kernel takes less than two: bytes of traffic, and predicted seconds."""

    nbytes: int
    seconds: float


def moving(graph: Graph, g: Group) -> float:
    """Seconds to read and write what a group touches of each buffer once."""
    if g.moving < 0:
        writes = g.writes
        g.moving = sum([graph.moved(n, (at,)).seconds for n, at in writes.items()])
        g.moving += sum([graph.moved(n, at).seconds for n, at in g.reads.items() if n not in writes])
    return g.moving


def taken(graph: Graph, memory: float, instructions: float) -> float:
    """Predicted seconds of a kernel that moves its bytes in `memory` seconds."""
    return graph.device.launch + max(memory, instructions / graph.device.vector)


def alone(graph: Graph, g: Group) -> float:
    """Predicted seconds of a group as one kernel."""
    if g.alone < 0:
        g.alone = taken(graph, moving(graph, g), g.instructions)
    return g.alone


def disjoint(some: Collection[tuple[Index, ...]], others: Collection[tuple[Index, ...]]) -> bool:
    """Whether accesses of one buffer share no element: one half of its columns and the other, say."""
    return all(any(_before(x, y) or _before(y, x) for x, y in zip(p, q, strict=True)) for p in some for q in others)


def _before(x: Index, y: Index) -> bool:
    """Whether each element of one index lies before each of another one; their axes are different variables."""
    if not isinstance(x, Expr) or not isinstance(y, Expr) or x is y:
        return False
    if any((c := e.coefficient(a)) is None or not c.is_nonneg() for e in (x, y) for a in e.axes()):
        return False
    last, first = x.substitute({a: a.size - 1 for a in x.axes()}), y.substitute(dict.fromkeys(y.axes(), ZERO))
    return (first - last - 1).is_nonneg()


def saving(graph: Graph, a: Group, b: Group) -> Saving:
    """What is shared is loaded once, and what only the two use is not stored."""
    nbytes, memory, moved = 0, 0.0, graph.moved
    small, large = (a, b) if len(a.reads) <= len(b.reads) else (b, a)
    made = [(large, small, n) for n in small.reads if n in large.writes] if large.writes else []
    made += [(small, large, n) for n in small.writes if n in large.reads and n not in large.writes]
    for name, places in small.reads.items():
        if name in large.reads and name not in large.writes and name not in small.writes:
            m = min(moved(name, places), moved(name, large.reads[name]))
            if m.nbytes == graph.bytes[name] or not disjoint(places, large.reads[name]):
                nbytes, memory = nbytes + m.nbytes, memory + m.seconds
    for writer, reader, name in made:
        if name in graph.plan.mutated:
            nbytes += 1  # a reader and the writer of an input: worth trying
            continue
        m = moved(name, reader.reads[name])
        nbytes, memory = nbytes + m.nbytes, memory + m.seconds
        if graph.only_between(name, a, b):
            m = moved(name, (writer.writes[name],))
            nbytes, memory = nbytes + m.nbytes, memory + m.seconds
    if not nbytes:
        return Saving(0, 0.0)
    apart = alone(graph, a) + alone(graph, b)
    together = taken(graph, a.moving + b.moving - memory, a.instructions + b.instructions)
    return Saving(nbytes, round(apart - together, PICOSECONDS))
