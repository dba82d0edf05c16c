"""The policies by name, and what else the option `remat` may be: a function, a plan in a file, an installed plug-in."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from minifuse.errors import RematError
from minifuse.options import POLICIES as ENTRY_POINTS

from .baselines import RecomputeAll, SaveAll
from .checkmate import CheckmateMilp
from .chen import ChenSqrt
from .default import Default
from .knapsack import KnapsackBudget
from .korthikanti import KorthikantiSelective
from .mincut import MinCut
from .plan import RematPlan, RematPolicy, assemble
from .priced import PricedMinCut
from .problem import Problem
from .rotor import RotorDp

POLICIES: dict[str, RematPolicy] = {
    p.name: p
    for p in (
        Default(),
        PricedMinCut(),
        SaveAll(),
        RecomputeAll(),
        ChenSqrt(),
        KorthikantiSelective(),
        MinCut(),
        KnapsackBudget(),
        RotorDp(),
        CheckmateMilp(),
    )
}


@dataclass(frozen=True)
class FunctionPolicy:
    """A policy that is a function of the problem: it returns a plan, or the names of what to save."""

    function: Callable[[Problem], RematPlan | Iterable[str]]

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def plan(self, problem: Problem) -> RematPlan:
        """Raises RematError where it returns neither."""
        found = self.function(problem)
        if isinstance(found, RematPlan):
            return found
        if isinstance(found, Iterable) and not isinstance(found, str):
            return assemble(problem, [*found], self.name)
        raise RematError(f"{self.name}: expected a RematPlan or the names of what to save, found {found!r}")


@dataclass(frozen=True)
class Replay:
    """What a file says: a plan as `RematPlan.to_json` writes it, or a list of plans, one for each graph.

    A graph takes the first of them that names its values. What it costs is told anew, of this graph.
    """

    path: str
    name: str = "replay"

    def plan(self, problem: Problem) -> RematPlan:
        """Raises RematError where the file cannot be read, or holds no plan of this graph."""
        plans = self.read()
        for plan in plans:
            if not self.strange(problem, plan):
                status = f"replayed from {self.path}"
                made = assemble(problem, plan.saved, plan.policy, status=status, offloaded=plan.offloaded)
                return replace(made, lower_bound=plan.lower_bound)
        strange = self.strange(problem, plans[0]) if plans else ["no plan at all"]
        raise RematError(f"{self.path}: expected a plan of this graph, found {strange[0]}")

    def read(self) -> list[RematPlan]:
        try:
            data = json.loads(Path(self.path).read_text())
        except (OSError, ValueError) as error:
            raise RematError(f"{self.path}: expected rematerialisation plans as JSON: {error}") from error
        return [RematPlan.from_json(json.dumps(each)) for each in (data if isinstance(data, list) else [data])]

    @staticmethod
    def strange(problem: Problem, plan: RematPlan) -> list[str]:
        """What a plan says that is not about this graph."""
        unknown = [f"{n}, which is no value of it" for n in plan.choices if n not in problem.by_name]
        missing = [f"nothing of {n}, which its backward reads" for n in problem.required if n not in plan.choices]
        return unknown + missing


def named(name: str) -> Callable[[], RematPolicy] | None:
    """What finds a policy of this name, or None where there is none."""
    if name in POLICIES:
        return lambda: POLICIES[name]
    if name.endswith(".json"):
        return lambda: Replay(name)
    for point in entry_points(group=ENTRY_POINTS, name=name):
        return lambda: resolve(point.load())
    return None


def names() -> tuple[str, ...]:
    """Of the policies that ship, and of those that are installed."""
    return (*POLICIES, *(point.name for point in entry_points(group=ENTRY_POINTS) if point.name not in POLICIES))


def resolve(policy: Any) -> RematPolicy:
    """A policy from its name, the path of a plan, or a function of the problem; an object with `name` and `plan` is
    itself. Raises RematError that lists the names."""
    if isinstance(policy, (str, os.PathLike)):
        found = named(os.fspath(policy))
        if found is not None:
            return found()
        close = difflib.get_close_matches(str(policy), names(), n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        listed = ", ".join(names())
        raise RematError(
            f"no rematerialisation policy {str(policy)!r}{hint}; policies: {listed}, or a plan's path (.json)"
        )
    if callable(getattr(policy, "plan", None)) and isinstance(getattr(policy, "name", None), str):
        return policy
    if callable(policy):
        return FunctionPolicy(policy)
    raise RematError(
        f"a rematerialisation policy has a `name` and a `plan(problem)`, or is a function; found {policy!r}"
    )
