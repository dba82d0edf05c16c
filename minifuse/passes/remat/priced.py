"""The minimum cut with a price on both sides, in seconds, and the budgets below it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from minifuse.ir.decision import bytes_text

from .baselines import SaveAll
from .budget import limit_of, within
from .mincut import INFINITE, Division, again_price, divide, save_price
from .plan import RematPlan, assemble, closure, cost_seconds, effort
from .problem import SAVE, SYMBOL_BYTES, Problem, Value

# Plans that are tried at most.
_TRIED = 24


@dataclass(frozen=True)
class Prices:
    """What a cut pays: seconds for each second (`time`) and for each byte saved; whether externs may run again."""

    externs: bool = False
    time: float = 1.0
    byte: float = 0.0


@dataclass(frozen=True)
class PricedMinCut:
    """Least seconds for the backward's inputs, exactly; with a budget the lower convex hull of seconds over bytes.

    Saving and recomputing both have a finite price (`mincut.divide`), unlike in the cut that torch's partitioner makes,
    so a long chain is recomputed only while all of it costs less than loading what it ends in. Matrix products,
    convolutions and attention are recomputed only under a budget or where the user asks for it.

    Below the peak of that cut, a price on bytes (Everett 1963, generalised Lagrange multipliers) gives plans that no
    other plan with as few bytes beats; of these, and of some between two of them, `budget.within` chooses.
    """

    name: str = field(default="priced_mincut", init=False)

    def plan(self, problem: Problem) -> RematPlan:
        began = time.perf_counter()
        plan = self.fastest(problem)
        if plan.peak_bytes > (limit := limit_of(problem)):
            plan = within(problem, limit, self.frontier(problem, plan), self.name)
        return replace(plan, solve_seconds=time.perf_counter() - began)

    def fastest(self, problem: Problem) -> RematPlan:
        """The plan of the least seconds, whatever it holds; that of `save_all` where it would save more bytes."""
        found = _cut(problem, Prices())
        plan = assemble(problem, found.saved, self.name, status="optimal", lower_bound=found.lower_bound)
        everything = SaveAll.names(problem)
        most = problem.saved_bytes(n for n, action in closure(problem, everything).items() if action == SAVE)
        if plan.saved_bytes <= most:
            return plan
        status = (
            f"saves as save_all: the cheapest plan saves {bytes_text(plan.saved_bytes)}, "
            f"more than its {bytes_text(most)}"
        )
        return assemble(problem, everything, self.name, status=status, lower_bound=found.lower_bound)

    def at(self, problem: Problem, prices: Sequence[float]) -> Iterator[RematPlan]:
        """The cuts at which a byte that is saved costs so many loads more; no library's operator runs again."""
        for price in prices:
            saved = _cut(problem, Prices(byte=price / problem.device.dram)).saved
            yield assemble(problem, saved, self.name, status=f"a byte at {price:g} loads")

    def frontier(self, problem: Problem, fastest: RematPlan) -> list[RematPlan]:
        """From `fastest` on the cuts that are the fastest of those with no more bytes, for a price of a byte between
        nothing and all that time is worth; a library's operators may run again.

        The price at which two of them cost the same gives one between them, or shows that there is none (Eisner and
        Severance, "Mathematical Techniques for Efficient Record Segmentation in Large Shared Databases", 1976); the
        widest gap is looked into first.
        """
        least = assemble(problem, _cut(problem, Prices(externs=True, time=1e-6, byte=1.0)).saved, self.name)
        found = {p.saved: p for p in (fastest, least)}
        gaps = [(fastest, least)]
        while gaps and len(found) < effort(problem, _TRIED):
            more, fewer = gaps.pop(max(range(len(gaps)), key=lambda k: gaps[k][0].saved_bytes - gaps[k][1].saved_bytes))
            nbytes = more.saved_bytes - fewer.saved_bytes
            seconds = cost_seconds(problem, fewer) - cost_seconds(problem, more)
            if nbytes <= 0 or seconds <= 0:
                continue
            plan = assemble(problem, _cut(problem, Prices(externs=True, byte=seconds / nbytes)).saved, self.name)
            if plan.saved not in found:
                found[plan.saved] = plan
                gaps += [(more, plan), (plan, fewer)]
        return sorted(found.values(), key=lambda p: -p.saved_bytes)


def _cut(problem: Problem, prices: Prices) -> Division:
    def keep(v: Value) -> float:
        return prices.time * problem.save_seconds(v) + prices.byte * max(v.nbytes, SYMBOL_BYTES)

    def again(v: Value) -> float:
        if not prices.externs and v.phase != "either" and (v.kind == "extern" or v.tag == "prefer_save"):
            return INFINITE
        return prices.time * problem.recompute_seconds(v)

    return divide(problem, lambda v: save_price(v, keep), lambda v: again_price(v, again))
