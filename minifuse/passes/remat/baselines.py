"""The two ends of the scale: keep what autograd would keep, or keep as little as correctness allows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from .plan import RematPlan, assemble
from .problem import Problem, Value


@dataclass(frozen=True)
class SaveAll:
    """Save every forward value that the backward reads, views as their base; honours user tags, not the budget."""

    name: str = field(default="save_all", init=False)

    def plan(self, problem: Problem) -> RematPlan:
        began = time.perf_counter()
        return assemble(problem, self.names(problem), self.name, solve_seconds=time.perf_counter() - began)

    @staticmethod
    def names(problem: Problem) -> frozenset[str]:
        """What is saved, as far as the backward needs it."""
        return _names(problem, lambda v: v.phase == "forward" or v.kind == "symbol")


@dataclass(frozen=True)
class RecomputeAll:
    """Save only inputs, what may not run twice, and what the user tagged to be saved. The budget is not looked at."""

    name: str = field(default="recompute_all", init=False)

    def plan(self, problem: Problem) -> RematPlan:
        began = time.perf_counter()
        return assemble(problem, self.names(problem), self.name, solve_seconds=time.perf_counter() - began)

    @staticmethod
    def names(problem: Problem) -> frozenset[str]:
        """What is saved, as far as the backward needs it, by every plan."""
        return _names(problem, lambda v: v.tag == "must_save" or runs_once(problem, v))


def runs_once(problem: Problem, v: Value) -> bool:
    """Whether it, or the operator that it is a result of, may not run again in the backward."""
    if v.kind == "item":
        return runs_once(problem, problem[v.inputs[0]])
    return v.pinned is not None or any(_is_lost(problem, problem[i]) for i in v.inputs)


def _is_lost(problem: Problem, v: Value) -> bool:
    """Whether the backward cannot have it: an input that the forward overwrites, or a view of one."""
    if v.kind == "view":
        return _is_lost(problem, problem[v.inputs[0]])
    return v.is_given and not v.savable


def _names(problem: Problem, keep: Callable[[Value], bool]) -> frozenset[str]:
    return frozenset(
        v.name
        for v in problem.values
        if v.savable and v.kind != "view" and not v.wants_recompute and not v.is_given and keep(v)
    )
