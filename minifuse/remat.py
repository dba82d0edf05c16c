"""Rematerialisation for those who write policies: the problem, the plan, and what checks and prices one.

docs/writing-a-remat-policy.md walks through one; the policies that ship are in `minifuse/passes/remat/`.
"""

from __future__ import annotations

from .passes.remat import (
    OFFLOAD,
    POLICIES,
    RECOMPUTE,
    SAVE,
    Choice,
    Problem,
    RematPlan,
    RematPolicy,
    Timeline,
    Value,
    assemble,
    eager_peak,
    limit_of,
    resolve,
    runs_once,
    verify_plan,
    within,
)

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
