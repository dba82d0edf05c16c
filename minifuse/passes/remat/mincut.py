"""The minimum cut that divides what the backward loads from what it computes again, and the budgets below it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from minifuse.errors import RematError
from minifuse.ir.decision import bytes_text
from minifuse.ir.lazy import Deferred

from .baselines import SaveAll
from .plan import RECOMPUTE, SAVE, RematPlan, assemble, closure
from .problem import SYMBOL_BYTES, Problem, Value

sparse, csgraph = Deferred("scipy.sparse"), Deferred("scipy.sparse.csgraph")

INFINITE = float("inf")
_FINITE_TOTAL = 2**30
_INFINITE_CAPACITY = 2**31 - 1
_MAX_HULL_STEPS = 24
_FILL_STEPS = 32


@dataclass(frozen=True)
class Cut:
    """A minimum cut: which vertices lie on the source's side, the sum of its edges, and a proven lower bound on it."""

    source_side: np.ndarray
    weight: float
    lower_bound: float


def minimum_cut(size: int, edges: Sequence[tuple[int, int, float]], source: int, sink: int) -> Cut | None:
    """The minimum cut of a graph without antiparallel edges; None if every cut has an infinite edge.

    `maximum_flow` takes 32-bit integers. Finite capacities are scaled so that, each rounded up, they sum to at most
    2**30; an infinite edge has 2**31 - 1, above any finite cut, so no cut that contains one is chosen while another
    exists, and no flow overflows. Capacities that are integers and sum to at most 2**30 are not scaled: the cut is
    then exact. Otherwise, with E finite edges and scale s, rounding up adds less than 1/s an edge, so the weight found
    is within E/s of the minimum; `lower_bound` is the scaled flow less that. Of several minimum cuts it is the one
    nearest to the sink.
    """
    merged: dict[tuple[int, int], float] = {}
    for u, v, capacity in edges:
        if capacity > 0:
            merged[u, v] = merged.get((u, v), 0.0) + capacity
    if not merged:
        side = np.ones(size, dtype=bool)
        side[sink] = False
        return Cut(side, 0.0, 0.0)
    ends = np.array(list(merged), dtype=np.int32)
    weight = np.fromiter(merged.values(), dtype=np.float64, count=len(merged))
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
class Prices:
    """What a cut pays: seconds for each second (`time`) and for each byte saved; whether externs may run again."""

    externs: bool = False
    time: float = 1.0
    byte: float = 0.0


@dataclass(frozen=True)
class MinCut:
    """Least seconds for the backward's inputs, exactly; below budget 1 the lower convex hull of seconds over bytes.

    A value is an edge in -> out that costs what saving it costs; source -> in costs what recomputing it costs; a
    reader's `in` beyond the cut pulls its inputs' `out` beyond it. Saving versus recomputing with finite costs for both
    is the project-selection form (Picard, "Maximal closure of a graph", 1976) of the cut that torch's partitioner
    makes, so a long chain is recomputed only while all of it costs less than loading what it ends in. Matrix products,
    convolutions and attention are recomputed only under a budget or where the user asks for it.

    Below the bytes of that cut, a price on bytes (Everett 1963, generalised Lagrange multipliers) gives
    plans that no other plan with as few bytes beats; the last step between two of them saves values from the end
    of the forward on, since what is recomputed early in the backward stands beside everything that is still saved.
    """

    name: str = field(default="mincut", init=False)

    def plan(self, problem: Problem) -> RematPlan:
        began = time.perf_counter()
        everything = SaveAll().plan(problem)
        found = self._cheapest(problem, Prices())
        plan = assemble(problem, found.saved, self.name, status="optimal", lower_bound=found.lower_bound)
        if plan.saved_bytes > everything.saved_bytes:
            kept = frozenset(everything.saved)
            status = (
                f"saves as save_all: the cheapest plan saves {bytes_text(plan.saved_bytes)}, "
                f"more than its {bytes_text(everything.saved_bytes)}"
            )
            plan = assemble(problem, kept, self.name, status=status, lower_bound=found.lower_bound)
        limit = problem.memory_budget * everything.saved_bytes
        if problem.memory_budget < 1 and plan.saved_bytes > limit:
            saved, status = self._within(problem, frozenset(plan.saved), limit)
            plan = assemble(problem, saved, self.name, status=status)
        return replace(plan, solve_seconds=time.perf_counter() - began)

    def _cheapest(self, problem: Problem, prices: Prices) -> _Saved:
        cut = _cut(problem, prices)
        if cut is None:
            raise RematError(f"no plan: {_dead_end(problem)}")
        return cut

    def _within(self, problem: Problem, start: frozenset[str], limit: float) -> tuple[frozenset[str], str]:
        """The cheapest saved set found within `limit` bytes, and how it was found."""
        high, low = start, self._cheapest(problem, Prices(externs=True, time=1e-6, byte=1.0)).saved
        high_at, low_at = _cost(problem, high), _cost(problem, low)
        if low_at.nbytes > limit:
            return low, f"over budget: no plan saves less than {bytes_text(low_at.nbytes)} of {bytes_text(limit)}"
        for _ in range(_MAX_HULL_STEPS):
            if high_at.nbytes <= low_at.nbytes:
                break
            price = (low_at.seconds - high_at.seconds) / (high_at.nbytes - low_at.nbytes)
            middle = self._cheapest(problem, Prices(externs=True, byte=max(price, 0.0))).saved
            at = _cost(problem, middle)
            better = at.seconds + price * at.nbytes < (low_at.seconds + price * low_at.nbytes) * (1 - 1e-6)
            if not better or not low_at.nbytes < at.nbytes < high_at.nbytes:
                break
            if at.nbytes > limit:
                high, high_at = middle, at
            else:
                low, low_at = middle, at
        return _fill(problem, low, high, limit), "within budget"


@dataclass(frozen=True)
class _Saved:
    saved: frozenset[str]
    lower_bound: float


@dataclass(frozen=True)
class _Cost:
    nbytes: int
    seconds: float


def _cost(problem: Problem, saved: frozenset[str]) -> _Cost:
    actions = closure(problem, saved)
    kept = [n for n, a in actions.items() if a == SAVE]
    loading = sum(problem.save_seconds(problem[n]) for n in kept)
    again = sum(problem.recompute_seconds(problem[n]) for n, a in actions.items() if a == RECOMPUTE)
    return _Cost(problem.saved_bytes(kept), loading + again)


def _cut(problem: Problem, prices: Prices) -> _Saved | None:
    values = [v for v in problem.values if v.phase not in ("backward", "tangent")]
    index = {v.name: 2 + 2 * i for i, v in enumerate(values)}
    edges: list[tuple[int, int, float]] = []
    for v in values:
        at = index[v.name]
        edges.append((at, at + 1, _save_price(problem, v, prices)))
        edges.append((0, at, _recompute_price(problem, v, prices)))
        edges.extend((index[i] + 1, at, INFINITE) for i in v.inputs)
    edges.extend((index[name] + 1, 1, INFINITE) for name in problem.required if not problem[name].is_given)
    cut = minimum_cut(2 + 2 * len(values), edges, 0, 1)
    if cut is None:
        return None
    saved = frozenset(n for n, at in index.items() if cut.source_side[at] and not cut.source_side[at + 1])
    return _Saved(saved, cut.lower_bound)


def _save_price(problem: Problem, v: Value, prices: Prices) -> float:
    if v.is_given:
        return 0.0 if v.savable else INFINITE
    if not v.savable or v.kind == "view" or v.wants_recompute:
        return INFINITE
    return prices.time * problem.save_seconds(v) + prices.byte * max(v.nbytes, SYMBOL_BYTES)


def _recompute_price(problem: Problem, v: Value, prices: Prices) -> float:
    if v.is_given or v.pinned or v.tag == "must_save":
        return INFINITE
    if not v.wants_recompute and not prices.externs and v.phase != "either":
        if v.kind == "extern" or v.tag == "prefer_save":
            return INFINITE
    return 0.0 if v.wants_recompute else prices.time * problem.recompute_seconds(v)


def _fill(problem: Problem, low: frozenset[str], high: frozenset[str], limit: float) -> frozenset[str]:
    """Between two plans, of which only `low` fits: add what `high` saves, the forward's end first, while it fits.

    The candidates do not depend on the limit, so a larger limit never gives fewer bytes.
    """
    more = sorted(high - low, key=lambda n: -problem.position[n])
    best, best_bytes = low, _cost(problem, low).nbytes
    ceiling = _cost(problem, high).nbytes
    for step in range(1, _FILL_STEPS):
        saved = low | frozenset(more[: len(more) * step // _FILL_STEPS])
        nbytes = _cost(problem, saved).nbytes
        if best_bytes < nbytes <= min(limit, ceiling):
            best, best_bytes = saved, nbytes
    return best


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
