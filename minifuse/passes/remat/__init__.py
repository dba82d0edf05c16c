"""Rematerialisation: what the backward loads, and what it computes again."""

from .baselines import runs_once
from .budget import eager_peak, limit_of, within
from .build import build_problem
from .partition import partition
from .plan import Choice, RematPlan, RematPolicy, assemble
from .policies import POLICIES, resolve
from .problem import OFFLOAD, RECOMPUTE, SAVE, Problem, Value
from .simulate import Timeline, simulate
from .verify import verify_plan

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
    "build_problem",
    "eager_peak",
    "limit_of",
    "partition",
    "resolve",
    "runs_once",
    "simulate",
    "verify_plan",
    "within",
]
