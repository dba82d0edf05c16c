"""Rematerialisation: what the backward loads, and what it computes again."""

from .build import build_problem
from .partition import partition
from .plan import Choice, RematPlan, RematPolicy, assemble
from .policies import POLICIES, resolve
from .problem import RECOMPUTE, SAVE, Problem, Value
from .simulate import Timeline, simulate
from .verify import verify_plan

__all__ = [
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
    "build_problem",
    "partition",
    "resolve",
    "simulate",
    "verify_plan",
]
