"""Rematerialisation: what the backward loads, and what it computes again."""

from .build import build_problem
from .partition import partition
from .plan import RECOMPUTE, SAVE, Choice, RematPlan, RematPolicy, assemble
from .policies import POLICIES, resolve
from .problem import Problem, Value
from .verify import verify_plan

__all__ = [
    "POLICIES",
    "RECOMPUTE",
    "SAVE",
    "Choice",
    "Problem",
    "RematPlan",
    "RematPolicy",
    "Value",
    "assemble",
    "build_problem",
    "partition",
    "resolve",
    "verify_plan",
]
