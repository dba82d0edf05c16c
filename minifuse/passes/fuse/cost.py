"""What a kernel takes and what one kernel saves against two, in bytes and in seconds of a device.

The model is the roofline's: a kernel takes its launch, and the longer of moving its bytes and of issuing its
instructions. A buffer moves at the rate of the level of memory that holds it between two kernels, in lines: what an
access skips within a line takes as long as what it touches.
"""

from __future__ import annotations

from typing import NamedTuple

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


def saving(graph: Graph, a: Group, b: Group) -> Saving:
    """What is shared is loaded once, and what only the two use is not stored."""
    nbytes, memory, moved = 0, 0.0, graph.moved
    small, large = (a, b) if len(a.reads) <= len(b.reads) else (b, a)
    made = [(large, small, n) for n in small.reads if n in large.writes] if large.writes else []
    made += [(small, large, n) for n in small.writes if n in large.reads and n not in large.writes]
    for name, places in small.reads.items():
        if name in large.reads and name not in large.writes and name not in small.writes:
            m = min(moved(name, places), moved(name, large.reads[name]))
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
