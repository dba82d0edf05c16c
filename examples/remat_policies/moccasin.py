"""Retention intervals by constraint programming."""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from examples.remat_policies.schedule import Schedule, finished, schedule
from minifuse.errors import RematError
from minifuse.remat import POLICIES, Problem, RematPlan, limit_of, within

# Memory is counted in bytes, at most so many parts of the peak of saving everything; seconds in parts of their sum.
_MEMORY, _SECONDS = 1 << 30, 100_000
# Seconds of a clock in one of the solver's deterministic time, about.
_TIME = 8


@dataclass(frozen=True)
class Moccasin:
    """When each value is in memory, by a constraint program: the least seconds of recomputation within the budget.

    Burak Bartan, Haoming Li, Harris Teague, Christopher Lott and Bistra Dilkina, "Moccasin: Efficient Tensor
    Rematerialization for Neural Networks", ICML 2023: a value has at most C retention intervals, each begins with its
    computation and is one interval variable, so that n values take O(n) integer variables; a cumulative constraint
    keeps to the budget. Here C = 2: one interval from the forward, which lasts until the last reader of the forward or
    of the step, and one in the backward, from its first reader to its last. The solver is OR-Tools' CP-SAT.

    The `most` largest values are decided, the others saved. Where no plan is within the budget, the bytes above it are
    made few first. `limit` is about in seconds: the solver stops by its deterministic time, so that a problem has one
    answer, and by the clock at twice as many. `lower_bound` is the solver's, on the seconds of recomputation; where the
    simulator finds the plan above the budget, it is solved again with as much less.
    """

    limit: float = 10.0
    most: int = 96
    name: str = field(default="moccasin", init=False)

    def plan(self, problem: Problem) -> RematPlan:
        """Raises RematError where OR-Tools is not installed."""
        began = time.perf_counter()
        model = solver()
        s = schedule(problem)
        budget = limit_of(problem)
        if s.everything.peak_bytes <= budget:
            return finished(s.everything, began, policy=self.name, status="optimal", lower_bound=0.0)
        again, status, bound = self.solve(model, s, budget, self.limit)
        plan = s.plan(self.name, again)
        if status != "over budget" and plan.peak_bytes > budget:
            lower = budget - (plan.peak_bytes - budget)
            other, status, _ = self.solve(model, s, lower, self.limit / 2)
            plan = within(problem, budget, [plan, s.plan(self.name, other)], self.name)
        return finished(plan, began, policy=self.name, status=status, lower_bound=bound)

    def solve(
        self, cp_model: Any, s: Schedule, budget: float, limit: float
    ) -> tuple[frozenset[str], str, float | None]:
        """What is recomputed, the solver's status, and its bound on the seconds, None where the budget is not kept."""
        peak, total = s.everything.peak_bytes, max(sum(v.seconds for v in s.movable), 1e-12)
        unit = max(1.0, peak / _MEMORY)
        decided = {v.name: v for v in sorted(s.movable, key=lambda v: -v.nbytes)[: self.most] if v.nbytes}
        m = cp_model.CpModel()
        end = len(s.seconds) - 1
        again = {n: m.new_bool_var(f"again_{n}") for n in decided}
        starts = {n: m.new_int_var(s.forward, end, f"start_{n}") for n in decided}
        ends = {n: m.new_int_var(0, end + 1, f"end_{n}") for n in decided}  # of what is saved, or of the second one
        spans, sizes = [], []
        others = s.others.astype(float)
        for v in s.storages.values():
            size = int(np.ceil(v.nbytes / unit))
            if not size:
                continue
            if v.name not in decided:
                others[v.made : max([v.last, *v.uses]) + 1] += v.nbytes
                continue
            a = again[v.name]
            spans.append(m.new_fixed_size_interval_var(v.made, v.last + 1 - v.made, f"forward_{v.name}"))
            kept = m.new_int_var(0, end + 1, f"kept_{v.name}")
            spans.append(m.new_optional_interval_var(v.last + 1, kept, ends[v.name], a.Not(), f"saved_{v.name}"))
            sizes += [size, size]
            if not v.inside:
                length = m.new_int_var(0, end + 1, f"length_{v.name}")
                second = (starts[v.name], length, ends[v.name], a, f"again_{v.name}")
                spans.append(m.new_optional_interval_var(*second))
                sizes.append(size)
        for v in decided.values():
            m.add(ends[v.name] >= max([v.last, *v.uses]) + 1).only_enforce_if(again[v.name].Not())
            if v.uses:
                m.add(starts[v.name] <= v.uses[0])
                m.add(ends[v.name] >= v.uses[-1] + 1)
            for i in v.inputs:
                if i in decided:  # an input is there as it is computed again
                    m.add(ends[i] >= starts[v.name] + 1).only_enforce_if(again[v.name])
                    m.add(starts[i] <= starts[v.name]).only_enforce_if([again[v.name], again[i]])
        self.add_others(m, spans, sizes, others / unit)
        capacity = m.new_int_var(0, 2 * _MEMORY, "capacity")
        over = m.new_int_var(0, 2 * _MEMORY, "over")
        m.add_cumulative(spans, sizes, capacity)
        m.add(over >= capacity - int(budget / unit))
        costs = {n: max(1, round(_SECONDS * v.seconds / total)) for n, v in decided.items()}
        seconds = sum(costs[n] * a for n, a in again.items())
        m.minimize(seconds + 4 * _SECONDS * over)
        saved = set(POLICIES["default"].plan(s.problem).saved)
        hint = {n for n in decided if n not in saved}
        uses = s.uses(hint)
        for n, v in decided.items():
            m.add_hint(again[n], n in hint)
            m.add_hint(starts[n], min(uses[n], default=s.forward))
            m.add_hint(ends[n], max([v.last, *uses[n]]) + 1)
        found = cp_model.CpSolver()
        found.parameters.num_workers = 1
        found.parameters.random_seed = 0
        found.parameters.max_deterministic_time = limit / _TIME
        found.parameters.max_time_in_seconds = 2 * limit
        status = found.status_name(found.solve(m)).lower()
        if status not in ("optimal", "feasible"):
            raise RematError(f"{self.name}: expected a plan within {limit} s, found the status {status}")
        chosen = frozenset(n for n, a in again.items() if found.value(a))
        if found.value(over):
            return chosen, "over budget", None
        slack = len(decided) + 1  # of rounding each cost
        return chosen, status, max(0.0, (found.best_objective_bound - slack) * total / _SECONDS)

    @staticmethod
    def add_others(m: Any, spans: list[Any], sizes: list[int], others: np.ndarray) -> None:
        """What no choice changes, as intervals of equal bytes."""
        parts = np.ceil(others).astype(int)
        edges = [0, *(np.flatnonzero(np.diff(parts)) + 1), len(parts)]
        for first, behind in pairwise(edges):
            if parts[first]:
                spans.append(m.new_fixed_size_interval_var(int(first), int(behind - first), f"others_{first}"))
                sizes.append(int(parts[first]))


def solver() -> Any:
    """OR-Tools' `cp_model`."""
    try:
        return importlib.import_module("ortools.sat.python.cp_model")
    except ImportError as error:
        raise RematError("moccasin: expected OR-Tools, found none: pip install ortools") from error
