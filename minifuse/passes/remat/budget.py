"""Plans under a limit on what a step holds at its peak."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from minifuse.ir.decision import bytes_text

from .baselines import SaveAll
from .plan import RematPlan, assemble, effort
from .problem import Problem

# Plans that are tried between two neighbours of a frontier.
_FILL_STEPS = 16


def eager_peak(problem: Problem) -> int:
    """Bytes at the peak of a step by eager, as predicted: each operator by itself, and what autograd saves."""
    if eager_peak not in problem.memo:
        alone = replace(problem, values=tuple(replace(v, group=None) for v in problem.values))
        problem.memo[eager_peak] = SaveAll().plan(alone).peak_bytes
    return problem.memo[eager_peak]


def limit_of(problem: Problem) -> float:
    """The most bytes that a step may hold at its peak: infinite where the budget is 1, none where it is 0."""
    budget = problem.memory_budget
    if budget in (0, 1):
        return float("inf") if budget else 0.0
    return budget if budget > 1 else budget * eager_peak(problem)


def within(problem: Problem, limit: float, plans: Iterable[RematPlan], policy: str) -> RematPlan:
    """The fastest plan that holds at most `limit` bytes at its peak, of some and of those between two neighbours; the
    one of the least peak where none does.

    The plans that no other beats in both are a frontier; between the two around the limit, more and more of what the
    larger saves is saved, the end of the forward first, since what is recomputed early in the backward stands beside
    everything that is still saved. Neither depends on the limit: where `plans` do not either, a smaller limit never
    gives a higher peak.
    """
    plans = list(plans)
    seconds = {id(p): p.step_seconds for p in plans}
    frontier: list[RematPlan] = []
    for p in sorted(plans, key=lambda p: (p.peak_bytes, seconds[id(p)])):
        if not frontier or seconds[id(p)] < seconds[id(frontier[-1])]:
            frontier.append(p)
    fits = [p for p in frontier if p.peak_bytes <= limit]
    if not fits:
        return over(replace(frontier[0], policy=policy), limit)
    best = low = fits[-1]
    least = seconds[id(low)]
    above = frontier[len(fits) :][:1]
    saved, away = frozenset(low.saved), low.offloaded
    more = sorted((n for p in above for n in p.saved if n not in saved), key=lambda n: -problem.position[n])
    steps = effort(problem, _FILL_STEPS)
    for step in range(1, steps) if more else ():
        plan = assemble(problem, [*saved, *more[: len(more) * step // steps]], policy, offloaded=away)
        if low.peak_bytes <= plan.peak_bytes <= limit and (took := plan.step_seconds) < least:
            best, least = plan, took
    return replace(best, policy=policy, status="within budget")


def over(plan: RematPlan, limit: float) -> RematPlan:
    """A plan that is the best found, and says that it is not within the limit."""
    words = f"over budget: no plan was found below {bytes_text(plan.peak_bytes)} of {bytes_text(int(limit))}"
    return replace(plan, status=words)


def unavoidable(problem: Problem, limit: float) -> str:
    """What says that no plan at all is within a limit, where that is known: the gradients alone are more. Else empty.

    They are all alive when the backward ends.
    """
    returned = {problem.root[n] for n in problem.backward_outputs if n in problem.by_name}
    nbytes = problem.saved_bytes(returned)
    return f"; the gradients alone are {bytes_text(nbytes)}" if nbytes > limit else ""
