"""Good plans in little time: what the default chooses from, and what exact solvers begin with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .baselines import SaveAll
from .blocks import Blocks
from .budget import within
from .chen import ChenSqrt
from .plan import RematPlan, assemble, effort
from .priced import PricedMinCut
from .problem import SAVE, Problem

# Of loads: what a byte saved is priced at beside its own, in plans that may take as long and hold less.
_PRICES = (0.5, 2.0)
# Plans whose seconds are so near are equally fast: the model of a step resolves no more.
_EQUAL = 0.01
# Limits that plans are mixed for, under a budget and without one.
_MIXED, _EASED = 24, 8
# Segments of the forward that are tried; cuts of low peaks that are given ends of blocks, how many, each of how many.
_SEGMENTS, _LOW, _ENDS, _NEAR = 12, 4, 3, 4


def search(problem: Problem, limit: float, policy: str) -> RematPlan:
    """The fastest plan found that holds at most `limit` bytes at its peak; that of the least peak where none does."""
    plan = fastest(problem, policy)
    return plan if plan.peak_bytes <= limit else within(problem, limit, [plan, *candidates(problem, policy)], policy)


def fastest(problem: Problem, policy: str) -> RematPlan:
    """Of equally fast plans, none slower than `save_all` and none that saves more bytes, that of the least peak."""
    priced = PricedMinCut()
    everything = SaveAll().plan(problem)
    plans = [priced.fastest(problem), everything, *priced.at(problem, _PRICES[: effort(problem, len(_PRICES))])]
    plans = list({p.saved: p for p in plans}.values())
    least = min(p.step_seconds for p in plans)
    if len(plans) > 1:  # the best of them in each block, of less and less memory, while that takes no longer
        for plan in Blocks(problem).mixtures(plans, effort(problem, _EASED), policy):
            plans.append(plan)
            least = min(least, plan.step_seconds)
            if plan.step_seconds > (1 + _EQUAL) * least:
                break
    most = min((1 + _EQUAL) * least, everything.step_seconds)
    fast = [p for p in plans if p.step_seconds <= most and p.saved_bytes <= everything.saved_bytes]
    return min(fast, key=lambda p: (p.peak_bytes, p.step_seconds))


def candidates(problem: Problem, policy: str) -> list[RematPlan]:
    """Plans of less and less memory, whatever the budget."""
    blocks = Blocks(problem)
    cuts = PricedMinCut().frontier(problem)
    plans = [SaveAll().plan(problem), *cuts, *ended(problem, blocks, cuts, policy)]
    mixed = blocks.mixtures(list({p.saved: p for p in plans}.values()), effort(problem, _MIXED), policy)
    return [*plans, *mixed, *ChenSqrt().candidates(problem, effort(problem, _SEGMENTS))]


def ended(problem: Problem, blocks: Blocks, cuts: Sequence[RematPlan], policy: str) -> Iterator[RematPlan]:
    """Cuts that save besides what ends a block, all of it or what lowers the peak: a cut sees no use in that, and the
    backward would compute many blocks again at once."""
    yield assemble(problem, blocks.boundaries, policy)
    for plan in cuts[1::2]:
        yield assemble(problem, {*plan.saved, *blocks.boundaries}, policy)
    for plan in sorted(cuts, key=lambda p: p.peak_bytes)[: effort(problem, _LOW)]:
        for _ in range(effort(problem, _ENDS)):
            at = blocks.block(plan.timeline.peak_step)
            near = [n for n in blocks.mains if n not in plan.choices or plan.choices[n].action != SAVE]
            near.sort(key=lambda n: (blocks.of[n] > at, abs(blocks.of[n] - at)))
            tried = [assemble(problem, {*plan.saved, n}, policy) for n in near[:_NEAR]]
            best = min(tried, key=lambda p: p.peak_bytes, default=plan)
            if best.peak_bytes >= plan.peak_bytes:
                break
            yield (plan := best)
