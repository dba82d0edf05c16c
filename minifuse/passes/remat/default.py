"""What the compiler does when it is not told otherwise."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from .budget import limit_of, over
from .checkmate import CheckmateMilp
from .plan import RematPlan
from .problem import Problem
from .search import search

# Graphs of so few values are solved exactly under a budget, as far as these seconds go.
_FEW, _SECONDS = 80, 0.5
# What the exact solver's plan must gain of a step to be taken, and how often it looks for a lower peak.
_GAIN, _LOWER = 0.005, 4


@dataclass(frozen=True)
class Default:
    """The fastest plan, and of plans as fast the one of the least peak; with a budget, the fastest found that holds no
    more at the peak of a step.

    Without a budget it is chosen from the minimum cut of seconds, cuts at which a byte has a price too, `save_all`, and
    the best of them block by block, by the predicted seconds of the whole step: a plan is never predicted slower than
    `save_all`. A cut prices values one by one; the step counts kernels, and what each of them reads.

    With one, plans compete that mix the cuts of `priced_mincut` block by block (`blocks`), those cuts themselves, and
    checkpoints at every so many bytes (`chen_sqrt`): a cut counts what is saved, and does not see how much a long
    stretch holds while the backward computes it again. A small graph goes to `checkmate_milp` besides.
    """

    name: str = field(default="default", init=False)

    def plan(self, problem: Problem) -> RematPlan:
        began = time.perf_counter()
        limit = limit_of(problem)
        plan = search(problem, limit, self.name)
        if plan.step_seconds and limit < float("inf") and len(problem.values) <= _FEW:
            plan = self.exact(problem, limit, plan)
        return replace(plan, policy=self.name, solve_seconds=time.perf_counter() - began)

    @staticmethod
    def exact(problem: Problem, limit: float, plan: RematPlan) -> RematPlan:
        """The integer program's plan where it is better: faster, or lower and lower where none is within the limit."""
        solver = CheckmateMilp(seconds=_SECONDS)
        if plan.peak_bytes <= limit:
            found = solver.limited(problem, limit, plan)
            return found if found.step_seconds < (1 - _GAIN) * plan.step_seconds else plan
        for _ in range(_LOWER):
            target = max(limit, plan.peak_bytes - 1)
            found = solver.limited(problem, target, plan)
            if found.peak_bytes > target:
                break
            if found.peak_bytes <= limit:
                return found
            plan = over(found, limit)
        return plan
