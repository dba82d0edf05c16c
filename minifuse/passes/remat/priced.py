"""The minimum cut with a price on both sides, in seconds, and the budgets below it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from minifuse.ir.decision import bytes_text

from .baselines import SaveAll
from .mincut import INFINITE, Division, again_price, divide, save_price
from .plan import RematPlan, assemble, closure
from .problem import RECOMPUTE, SAVE, SYMBOL_BYTES, Problem, Value

_MAX_HULL_STEPS = 24
_FILL_STEPS = 32


@dataclass(frozen=True)
class Prices:
    """What a cut pays: seconds for each second (`time`) and for each byte saved; whether externs may run again."""

    externs: bool = False
    time: float = 1.0
    byte: float = 0.0


@dataclass(frozen=True)
class PricedMinCut:
    """Least seconds for the backward's inputs, exactly; below budget 1 the lower convex hull of seconds over bytes.

    Saving and recomputing both have a finite price (`mincut.divide`), unlike in the cut that torch's partitioner makes,
    so a long chain is recomputed only while all of it costs less than loading what it ends in. Matrix products,
    convolutions and attention are recomputed only under a budget or where the user asks for it.

    Below the bytes of that cut, a price on bytes (Everett 1963, generalised Lagrange multipliers) gives
    plans that no other plan with as few bytes beats; the last step between two of them saves values from the end
    of the forward on, since what is recomputed early in the backward stands beside everything that is still saved.
    """

    name: str = field(default="priced_mincut", init=False)

    def plan(self, problem: Problem) -> RematPlan:
        began = time.perf_counter()
        everything = SaveAll().plan(problem)
        found = _cut(problem, Prices())
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

    def _within(self, problem: Problem, start: frozenset[str], limit: float) -> tuple[frozenset[str], str]:
        """The cheapest saved set found within `limit` bytes, and how it was found."""
        high, low = start, _cut(problem, Prices(externs=True, time=1e-6, byte=1.0)).saved
        high_at, low_at = _cost(problem, high), _cost(problem, low)
        if low_at.nbytes > limit:
            return low, f"over budget: no plan saves less than {bytes_text(low_at.nbytes)} of {bytes_text(limit)}"
        for _ in range(_MAX_HULL_STEPS):
            if high_at.nbytes <= low_at.nbytes:
                break
            price = (low_at.seconds - high_at.seconds) / (high_at.nbytes - low_at.nbytes)
            middle = _cut(problem, Prices(externs=True, byte=max(price, 0.0))).saved
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
class _Cost:
    nbytes: int
    seconds: float


def _cost(problem: Problem, saved: frozenset[str]) -> _Cost:
    actions = closure(problem, saved)
    kept = [n for n, a in actions.items() if a == SAVE]
    loading = sum(problem.save_seconds(problem[n]) for n in kept)
    again = sum(problem.recompute_seconds(problem[n]) for n, a in actions.items() if a == RECOMPUTE)
    return _Cost(problem.saved_bytes(kept), loading + again)


def _cut(problem: Problem, prices: Prices) -> Division:
    def keep(v: Value) -> float:
        return prices.time * problem.save_seconds(v) + prices.byte * max(v.nbytes, SYMBOL_BYTES)

    def again(v: Value) -> float:
        if not prices.externs and v.phase != "either" and (v.kind == "extern" or v.tag == "prefer_save"):
            return INFINITE
        return prices.time * problem.recompute_seconds(v)

    return divide(problem, lambda v: save_price(v, keep), lambda v: again_price(v, again))


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
