"""What the compiler does when it is not told otherwise."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from .budget import limit_of, within
from .chen import ChenSqrt
from .plan import RematPlan
from .priced import PricedMinCut
from .problem import Problem


@dataclass(frozen=True)
class Default:
    """The fastest plan; with a budget, the fastest found that holds no more at the peak of a step.

    Without a budget it is `priced_mincut`. With one, the cuts at rising prices of a byte compete with checkpoints at
    every so many bytes (`chen_sqrt`): a cut counts what is saved, and does not see how much a long stretch holds while
    the backward computes it again.
    """

    name: str = field(default="default", init=False)

    def plan(self, problem: Problem) -> RematPlan:
        began = time.perf_counter()
        priced = PricedMinCut()
        plan = replace(priced.fastest(problem), policy=self.name)
        if plan.peak_bytes > (limit := limit_of(problem)):
            plans = [plan, *priced.frontier(problem), *ChenSqrt().candidates(problem)]
            plan = within(problem, limit, plans, self.name)
        return replace(plan, solve_seconds=time.perf_counter() - began)
