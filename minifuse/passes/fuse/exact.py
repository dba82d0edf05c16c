"""The plan of least predicted time, for graphs of a few dozen kernels (DESIGN.md, section 4).

Every group that legal merges of one kernel at a time lead to is a column of a set partition: each kernel is in exactly
one chosen group, and the groups depend on each other without a cycle. HiGHS solves it (Huangfu and Hall, "Parallelizing
the dual revised simplex method", 2018) through `scipy.optimize.milp`; a cycle among chosen groups is forbidden when it
is seen, and the problem solved again. The rules and the costs are those of the greedy search.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import networkx as nx
import numpy as np

from minifuse.ir.lazy import Deferred

from .cost import alone
from .graph import Graph
from .rules import Candidate

if TYPE_CHECKING:
    from .search import Search

sparse, optimize = Deferred("scipy.sparse"), Deferred("scipy.optimize")

MOST_KERNELS = 60
MOST_GROUPS = 30_000


class TooLargeError(Exception):
    """The graph has more kernels or more groups than are looked at."""


@dataclass(frozen=True)
class Column:
    """A group that could be: the steps in it, in the order in which merges take them in, and its predicted seconds."""

    steps: tuple[int, ...]
    seconds: float


def columns(search: Search) -> list[Column]:
    """Every group that merges of one kernel at a time lead to.

    Raises TooLargeError.
    """
    kernels = [i for i, g in search.graph.groups.items() if not g.fixed]
    if len(kernels) > MOST_KERNELS:
        raise TooLargeError(f"{len(kernels)} kernels, at most {MOST_KERNELS}")
    found: dict[frozenset[int], Column] = {}
    for i in kernels:
        found[frozenset([i])] = Column((i,), alone(search.graph, search.graph.groups[i]))
    for i in kernels:
        stack: list[tuple[Graph, tuple[int, ...]]] = [(search.graph, (i,))]
        while stack:
            graph, steps = stack.pop()
            at = graph.at(steps[0])
            for t in neighbours(graph, at):
                grown = frozenset((*steps, t))
                if grown in found:
                    continue
                a, b = sorted((graph.groups[at], graph.groups[t]), key=lambda g: g.first)
                c = Candidate(graph, a, b)
                if c.saving.nbytes <= 0 or search.verdict(c, search.rules) is not None:
                    continue
                if len(found) >= MOST_GROUPS:
                    raise TooLargeError(f"more than {MOST_GROUPS} groups")
                merged = graph.copy()
                merged.merge(merged.groups[a.id], merged.groups[b.id], c.unified)
                found[grown] = Column((*steps, t), alone(merged, merged.groups[a.id]))
                stack.append((merged, (*steps, t)))
    return list(found.values())


def neighbours(graph: Graph, i: int) -> list[int]:
    """Kernels that read or write what a group does."""
    g = graph.groups[i]
    near = {r for n in (*g.reads, *g.writes) for r in graph.readers.get(n, ())}
    near |= {graph.writer[n] for n in g.reads if n in graph.writer}
    return sorted(j for j in near if j != i and not graph.groups[j].fixed)


def choose(search: Search, given: Sequence[Column]) -> list[Column]:
    """The columns of a plan of least predicted time."""
    kernels = sorted({i for c in given for i in c.steps})
    row = {i: k for k, i in enumerate(kernels)}
    cells = [(row[i], k) for k, c in enumerate(given) for i in c.steps]
    ones = np.ones(len(cells))
    cover = sparse.csr_array((ones, tuple(np.array(cells).T)), shape=(len(kernels), len(given)))
    rows, low, high = [cover], [np.ones(len(kernels))], [np.ones(len(kernels))]
    cost = np.array([c.seconds for c in given])
    while True:
        matrix = sparse.vstack(rows, format="csr")
        constraint = optimize.LinearConstraint(matrix, np.concatenate(low), np.concatenate(high))
        # In microseconds: the solver's tolerances are absolute.
        whole, bounds = np.ones(len(given)), optimize.Bounds(0, 1)
        solved = optimize.milp(1e6 * cost, constraints=constraint, integrality=whole, bounds=bounds)
        if solved.x is None:
            raise TooLargeError(f"the solver found nothing: {solved.message}")
        picked = [int(k) for k in np.flatnonzero(solved.x > 0.5)]
        cycle = cyclic(search.graph, [given[k] for k in picked])
        if not cycle:
            return [given[k] for k in picked]
        mask = np.zeros(len(given))
        mask[[picked[k] for k in cycle]] = 1
        rows.append(sparse.csr_array(mask[None]))
        low.append(np.zeros(1))
        high.append(np.array([len(cycle) - 1.0]))


def cyclic(graph: Graph, chosen: Sequence[Column]) -> list[int]:
    """The places of some columns that depend on each other in a circle; empty where none do."""
    place = {i: ("column", k) for k, c in enumerate(chosen) for i in c.steps}
    edges: list[tuple[object, object]] = []
    for i, g in graph.groups.items():
        edges += [(place.get(i, i), place.get(s, s)) for s in g.succs if place.get(i, i) != place.get(s, s)]
    try:
        found = nx.find_cycle(nx.DiGraph(edges))
    except nx.NetworkXNoCycle:
        return []
    return [node[1] for node, _ in found if isinstance(node, tuple)]


def total(graph: Graph, ids: Iterable[int]) -> float:
    """Predicted seconds of kernels together."""
    return sum(alone(graph, graph.groups[i]) for i in ids)


def plan(search: Search) -> None:
    """Make the merges of a plan of least predicted time.

    Raises TooLargeError, with nothing merged.
    """
    for column in choose(search, columns(search)):
        for t in column.steps[1:]:
            if search.empty:
                return
            a, b = search.graph.at(column.steps[0]), search.graph.at(t)
            a, b = sorted((a, b), key=lambda i: search.graph.groups[i].first)
            c = Candidate(search.graph, search.graph.groups[a], search.graph.groups[b])
            broken = search.verdict(c, search.rules)
            if broken is None:
                search.accept(c, "part of the plan of least predicted time, saves {saved_bytes} of traffic")
            else:
                search.refuse(c, *broken)
