"""Recomputation and offloading together: whichever of the two is predicted to cost less."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from examples.remat_policies.schedule import Schedule, Storage, finished, limits, schedule
from minifuse.remat import Problem, RematPlan, limit_of


@dataclass(frozen=True)
class OffloadHybrid:
    """Save what fits; of the rest recompute or offload each value, whichever is predicted to cost less.

    Olivier Beaumont, Lionel Eyraud-Dubois and Alena Shilova, "Efficient Combination of Rematerialization and Offloading
    for Training DNNs", NeurIPS 2021 (POFO). Taken from it: both are decided together, and transfers go beside the
    kernels, so that offloading costs nothing up to the seconds that a pass computes and its excess beyond. Their
    dynamic program is for a chain; here the schedule is walked as far as a step holds more than the limit, and what
    frees the most bytes a second goes. Where the device is the host (no `link`) a transfer is a copy, and hides
    behind nothing.

    The walk counts bytes less exactly than the simulator, so `tried` lower limits are tried: the fastest plan within
    the budget is taken, by the predicted seconds of a step.
    """

    tried: int = 5
    name: str = field(default="offload_hybrid", init=False)

    def plan(self, problem: Problem) -> RematPlan:
        began = time.perf_counter()
        s = schedule(problem)
        limit = limit_of(problem)
        if s.everything.peak_bytes <= limit:
            return finished(s.everything, began, policy=self.name)
        plans = [s.everything, *self.candidates(s, limit)]
        if fits := [p for p in plans if p.peak_bytes <= limit]:
            best = min(fits, key=lambda p: p.step_seconds)
            return finished(best, began, policy=self.name, status="within budget")
        plans += [p for k in (1, 2) for p in self.candidates(s, s.everything.peak_bytes * 0.5**k)]
        best = min(plans, key=lambda p: (p.peak_bytes, p.step_seconds))
        return finished(best, began, policy=self.name, status="over budget: no plan was found within it")

    def candidates(self, s: Schedule, limit: float) -> Iterator[RematPlan]:
        """The plans of walks at the limit and below it, with both ways out of memory and with offloading alone."""
        seen: set[tuple[frozenset[str], frozenset[str]]] = set()
        for may_recompute in (True, False):
            for below in limits(limit, limit / 2, self.tried):
                gone = walk(s, below, may_recompute)
                if gone not in seen:
                    seen.add(gone)
                    yield s.plan(self.name, *gone)


def walk(s: Schedule, limit: float, may_recompute: bool) -> tuple[frozenset[str], frozenset[str]]:
    """What is recomputed and what is offloaded so that no step holds more than `limit`, as far as any frees bytes."""
    again, away = frozenset[str](), frozenset[str]()
    held, uses = s.held(), s.uses(again)
    for step in range(len(held)):
        while held[step] > limit:
            found = [
                ((v.nbytes - kept) / (seconds + 1e-9), v.name, way)
                for v in s.movable
                if v.name not in again and v.name not in away and v.last < step < min(uses[v.name], default=-1)
                for seconds, kept, way in ways(s, v, step, again, away, uses, may_recompute)
                if v.nbytes > kept
            ]
            if not found:
                break
            _, name, way = max(found)
            again, away = (again | {name}, away) if way == "again" else (again, away | {name})
            held, uses = s.held(again, away), s.uses(again)
    return again, away


def ways(
    s: Schedule,
    v: Storage,
    step: int,
    again: frozenset[str],
    away: frozenset[str],
    uses: dict[str, list[int]],
    may_recompute: bool,
) -> Iterator[tuple[float, int, str]]:
    """The seconds that each way out of memory adds, and the bytes of inputs that it keeps at a step."""
    yield offload_seconds(s, v, away), 0, "away"
    if may_recompute:
        gone = again | away
        dead = (s.storages[i] for i in v.inputs if i not in gone and s.storages[i].last < step)
        yield v.seconds, sum(i.nbytes for i in dead if max(uses[i.name], default=-1) < step), "again"


def offload_seconds(s: Schedule, v: Storage, away: frozenset[str]) -> float:
    """Seconds that the transfers of one more value add to what the two passes compute, or to those before it."""
    problem = s.problem
    one = problem.transfer_seconds(problem[v.name])
    if not problem.device.link:
        return 2 * one
    before = sum(problem.transfer_seconds(problem[n]) for n in away)
    passes = sum(s.seconds[: s.forward]), sum(s.seconds[s.forward :])
    return sum(max(before + one - p, 0.0) - max(before - p, 0.0) for p in passes)
