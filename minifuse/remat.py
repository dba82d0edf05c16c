"""Rematerialisation for those who write policies: the problem, the plan, and what checks and prices one.

docs/writing-a-remat-policy.md walks through one; the policies that ship are in `minifuse/passes/remat/`.
"""

from __future__ import annotations

from .passes.remat.baselines import runs_once
from .passes.remat.budget import eager_peak, limit_of, within
from .passes.remat.plan import Choice, RematPlan, RematPolicy, assemble
from .passes.remat.policies import POLICIES, resolve
from .passes.remat.problem import OFFLOAD, RECOMPUTE, SAVE, Problem, Value
from .passes.remat.simulate import Timeline
from .passes.remat.verify import verify_plan

__all__ = [
    "OFFLOAD",
    "POLICIES",
    "RECOMPUTE",
    "SAVE",
    "Choice",
    "Problem",
    "RematPlan",
    "RematPolicy",
    "Timeline",
    "Value",
    "assemble",
    "eager_peak",
    "limit_of",
    "resolve",
    "runs_once",
    "verify_plan",
    "within",
]
