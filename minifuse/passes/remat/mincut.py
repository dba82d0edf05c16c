"""Minimum cuts: the solver, and the partition that PyTorch's own partitioner makes by one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from minifuse.errors import RematError
from minifuse.ir.lazy import Deferred

from .plan import RematPlan, assemble
from .problem import SYMBOL_BYTES, Problem, Value

sparse, csgraph = Deferred("scipy.sparse"), Deferred("scipy.sparse.csgraph")

INFINITE = float("inf")
_FINITE_TOTAL = 2**30
_INFINITE_CAPACITY = 2**31 - 1
# What torch's partitioner weighs bytes by, for each operator between a value and the backward, and the most of them.
_FURTHER, _FURTHEST = 1.1, 100


@dataclass(frozen=True)
class Cut:
    """A minimum cut: which vertices lie on the source's side, the sum of its edges, and a proven lower bound on it."""

    source_side: np.ndarray
    weight: float
    lower_bound: float


def minimum_cut(size: int, edges: Sequence[tuple[int, int, float]] | np.ndarray, source: int, sink: int) -> Cut | None:
    """The minimum cut of a graph without antiparallel edges; None if every cut has an infinite edge.

    An edge is a row of tail, head and capacity. `maximum_flow` takes 32-bit integers. Finite capacities are scaled so
    that, each rounded up, they sum to at most 2**30; an infinite edge has 2**31 - 1, above any finite cut, so no cut
    that contains one is chosen while another exists, and no flow overflows. Capacities that are integers and sum to at
    most 2**30 are not scaled: the cut is then exact. Otherwise, with E finite edges and scale s, rounding up adds less
    than 1/s an edge, so the weight found is within E/s of the minimum; `lower_bound` is the scaled flow less that. Of
    several minimum cuts it is the one nearest to the sink.
    """
    rows = np.asarray(edges, dtype=np.float64).reshape(-1, 3)
    rows = rows[rows[:, 2] > 0]
    if not len(rows):
        side = np.ones(size, dtype=bool)
        side[sink] = False
        return Cut(side, 0.0, 0.0)
    merged = sparse.coo_matrix((rows[:, 2], rows[:, :2].astype(np.int32).T), shape=(size, size)).tocsr().tocoo()
    ends, weight = np.stack((merged.row, merged.col), axis=1), merged.data
    infinite = np.isinf(weight)
    if _reaches(size, ends[infinite], source, sink):
        return None
    finite = weight[~infinite]
    exact = finite.sum() <= _FINITE_TOTAL and bool((finite == np.floor(finite)).all())
    scale = 1.0 if exact else (_FINITE_TOTAL - len(finite)) / finite.sum()
    units = np.full(len(weight), _INFINITE_CAPACITY, dtype=np.int64)
    units[~infinite] = np.ceil(finite * scale)
    graph = sparse.csr_matrix((units.astype(np.int32), (ends[:, 0], ends[:, 1])), shape=(size, size))
    result = csgraph.maximum_flow(graph, source, sink)
    residual = (graph.astype(np.int64) - result.flow.astype(np.int64)).tocsr()
    residual.data = (residual.data > 0).astype(np.int8)
    residual.eliminate_zeros()
    side = np.ones(size, dtype=bool)
    side[csgraph.breadth_first_order(residual.T.tocsr(), sink, return_predecessors=False)] = False
    crossing = side[ends[:, 0]] & ~side[ends[:, 1]]
    error = 0.0 if exact else len(finite) / scale
    return Cut(side, float(weight[crossing].sum()), max(0.0, result.flow_value / scale - error))


def _reaches(size: int, ends: np.ndarray, source: int, sink: int) -> bool:
    graph = sparse.csr_matrix((np.ones(len(ends), dtype=np.int8), (ends[:, 0], ends[:, 1])), shape=(size, size))
    return sink in csgraph.breadth_first_order(graph, source, return_predecessors=False)


@dataclass(frozen=True)
class Division:
    """What a cut of a problem saves, and a proven bound on its price."""

    saved: frozenset[str]
    lower_bound: float


def divide(problem: Problem, save: Callable[[Value], float], again: Callable[[Value], float]) -> Division:
    """The cheapest division into what the backward loads, at `save` a value, and what it computes again, at `again`.

    A value is an edge in -> out that costs what saving it costs; source -> in costs what recomputing it costs; a
    reader's `in` beyond the cut pulls its inputs' `out` beyond it. With finite costs for both this is the
    project-selection form (Picard, "Maximal closure of a graph", 1976). Raises RematError where there is no plan.
    """
    network = _Network.of(problem)
    values = network.values
    prices = np.array([(save(v), again(v)) for v in values], dtype=np.float64).reshape(-1, 2)
    own = 2 + 2 * np.arange(len(values), dtype=np.float64)
    saved = np.stack((own, own + 1, prices[:, 0]), axis=1)
    recomputed = np.stack((np.zeros(len(values)), own, prices[:, 1]), axis=1)
    cut = minimum_cut(2 + 2 * len(values), np.concatenate((saved, recomputed, network.fixed)), 0, 1)
    if cut is None:
        raise RematError(f"no plan: {_dead_end(problem)}")
    chosen = cut.source_side[2::2] & ~cut.source_side[3::2]
    return Division(frozenset(values[i].name for i in np.flatnonzero(chosen)), cut.lower_bound)


@dataclass(frozen=True)
class _Network:
    """What the cuts of a problem have in common: `values` that may be cut, and the edges that no price changes."""

    values: tuple[Value, ...]
    fixed: np.ndarray

    @classmethod
    def of(cls, problem: Problem) -> _Network:
        if cls not in problem.memo:
            values = tuple(v for v in problem.values if v.phase not in ("backward", "tangent"))
            index = {v.name: 2 + 2 * i for i, v in enumerate(values)}
            edges = [(index[i] + 1, index[v.name], INFINITE) for v in values for i in v.inputs]
            edges += [(index[n] + 1, 1, INFINITE) for n in problem.required if not problem[n].is_given]
            problem.memo[cls] = cls(values, np.array(edges, dtype=np.float64).reshape(-1, 3))
        return problem.memo[cls]


def save_price(v: Value, price: Callable[[Value], float]) -> float:
    """What saving a value costs: nothing of an input, too much of what cannot be or what the user wants recomputed."""
    if v.is_given:
        return 0.0 if v.savable else INFINITE
    return INFINITE if not v.savable or v.kind == "view" or v.wants_recompute else price(v)


def again_price(v: Value, price: Callable[[Value], float]) -> float:
    """What recomputing it costs: too much of what may run once, nothing where the user wants it."""
    if v.is_given or v.pinned or v.tag == "must_save":
        return INFINITE
    return 0.0 if v.wants_recompute else price(v)


def _dead_end(problem: Problem) -> str:
    """The first value that is needed and can be neither kept nor computed again."""
    seen: set[str] = set()
    stack = [n for n in problem.required if not problem[n].is_given]
    while stack:
        v = problem[stack.pop()]
        if v.name in seen:
            continue
        seen.add(v.name)
        keepable = v.savable and (v.is_given or (v.kind != "view" and not v.wants_recompute))
        if keepable:
            continue
        if v.is_given:
            return f"{v.name} is what a value must be recomputed from, and the forward overwrites it"
        if v.pinned:
            return f"{v.name} cannot be saved and may run only once ({v.pinned})"
        if v.tag == "must_save":
            return f"{v.name} is tagged must_save and cannot be saved"
        stack.extend(v.inputs)
    return "the backward needs a value that can be neither saved nor recomputed"


@dataclass(frozen=True)
class MinCut:
    """As PyTorch's default partitioner: the fewest bytes, at no price for what is recomputed (Horace He and Shangdi Yu,
    "Transcending Runtime-Memory Tradeoffs in Checkpointing by being Fusion Aware", MLSys 2023).

    Matrix products, convolutions and reductions are never recomputed, whatever it costs to keep them. A byte counts
    twice where nothing else has it written, and more the further the value is from the backward that reads it. The
    budget is not looked at: see `knapsack_budget`.
    """

    name: str = field(default="mincut", init=False)

    def plan(self, problem: Problem) -> RematPlan:
        began = time.perf_counter()
        far = self._distances(problem)

        def keep(v: Value) -> float:
            return max(v.nbytes, SYMBOL_BYTES) * (1 if v.stored else 2) * _FURTHER ** min(far[v.name], _FURTHEST)

        def again(v: Value) -> float:
            dear = v.phase != "either" and (v.kind in ("extern", "reduction") or v.tag == "prefer_save")
            return INFINITE if dear else 0.0

        found = divide(problem, lambda v: save_price(v, keep), lambda v: again_price(v, again))
        return assemble(problem, found.saved, self.name, solve_seconds=time.perf_counter() - began)

    @staticmethod
    def _distances(problem: Problem) -> dict[str, int]:
        """How many operators lie between a value and the first in the backward that reads what comes of it."""
        required, far = set(problem.required), dict[str, int]()
        nearest = {v.name: _FURTHEST for v in problem.values}
        for v in reversed(problem.values):
            far[v.name] = 1 if v.name in required else nearest[v.name]
            for i in v.inputs:
                nearest[i] = min(nearest[i], far[v.name] + 1)
        return far
