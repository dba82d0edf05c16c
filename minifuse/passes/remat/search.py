"""Good plans in little time: what the default chooses from, and what exact solvers begin with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

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
    return Search(problem, policy).within(limit)


@dataclass(frozen=True)
class Search:
    """The plans of one problem: each is made once."""

    problem: Problem
    policy: str

    def within(self, limit: float) -> RematPlan:
        plan = self.fastest()
        if plan.peak_bytes <= limit:
            return plan
        return within(self.problem, limit, [plan, *self.candidates(limit)], self.policy)

    @cached_property
    def everything(self) -> RematPlan:
        return SaveAll().plan(self.problem)

    @cached_property
    def cheapest(self) -> RematPlan:
        """Value by value."""
        return PricedMinCut().fastest(self.problem)

    @cached_property
    def blocks(self) -> Blocks:
        return Blocks(self.problem)

    def fastest(self) -> RematPlan:
        """Of equally fast plans, none slower than `save_all` and none that saves more bytes, that of the least peak."""
        everything = self.everything
        prices = _PRICES[: effort(self.problem, len(_PRICES))]
        plans = [self.cheapest, everything, *PricedMinCut().at(self.problem, prices)]
        plans = list({p.saved: p for p in plans}.values())
        least = min(p.step_seconds for p in plans)
        if len(plans) > 1:  # the best of them in each block, of less and less memory, while that takes no longer
            for plan in self.blocks.mixtures(plans, effort(self.problem, _EASED), self.policy):
                plans.append(plan)
                least = min(least, plan.step_seconds)
                if plan.step_seconds > (1 + _EQUAL) * least:
                    break
        most = min((1 + _EQUAL) * least, everything.step_seconds)
        fast = [p for p in plans if p.step_seconds <= most and p.saved_bytes <= everything.saved_bytes]
        return min(fast, key=lambda p: (p.peak_bytes, p.step_seconds))

    def candidates(self, limit: float) -> list[RematPlan]:
        """Plans of less and less memory, whatever the limit; of a long graph's mixtures, those at the limit."""
        cuts = PricedMinCut().frontier(self.problem, self.cheapest)
        plans = [self.everything, *cuts, *self.ended(cuts)]
        unlike = list({p.saved: p for p in plans}.values())
        few = effort(self.problem, _MIXED)
        mixed = self.blocks.mixtures(unlike, few, self.policy, None if few == _MIXED else limit)
        segments = ChenSqrt().candidates(self.problem, self.blocks.crossing, effort(self.problem, _SEGMENTS))
        return [*plans, *mixed, *segments]

    def ended(self, cuts: Sequence[RematPlan]) -> Iterator[RematPlan]:
        """Cuts that save besides what ends a block, all of it or what lowers the peak: a cut sees no use in that, and
        the backward would compute many blocks again at once."""
        yield assemble(self.problem, self.blocks.boundaries, self.policy)
        for plan in cuts[1::2]:
            yield assemble(self.problem, {*plan.saved, *self.blocks.boundaries}, self.policy)
        for plan in sorted(cuts, key=lambda p: p.peak_bytes)[: effort(self.problem, _LOW)]:
            for _ in range(effort(self.problem, _ENDS)):
                at = self.blocks.block(plan.timeline.peak_step)
                near = [n for n in self.blocks.mains if plan.actions.get(n) != SAVE]
                near.sort(key=lambda n: (self.blocks.of[n] > at, abs(self.blocks.of[n] - at)))
                tried = [
                    assemble(self.problem, {*plan.saved, n}, self.policy) for n in near[: effort(self.problem, _NEAR)]
                ]
                best = min(tried, key=lambda p: p.peak_bytes, default=plan)
                if best.peak_bytes >= plan.peak_bytes:
                    break
                yield (plan := best)
