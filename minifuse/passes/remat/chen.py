"""Checkpoints at every so many bytes of a forward, as for a chain of layers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from .baselines import RecomputeAll, SaveAll
from .plan import RematPlan, assemble
from .problem import Problem, Value

# How many segment sizes are tried, between all of the forward and the smallest that differ.
_TRIED = 12


@dataclass(frozen=True)
class ChenSqrt:
    """The forward in segments of about equal bytes; the backward computes a segment again from where it begins.

    Tianqi Chen, Bing Xu, Chiyuan Zhang and Carlos Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016: a
    chain of n layers in about sqrt(n) segments takes O(sqrt(n)) memory for one more forward. As in their Algorithm 3, a
    segment ends where it holds more than b bytes, and b is searched; of the plans found the one of the least predicted
    peak is taken. On a graph that is no chain a segment ends
    where the fewest bytes cross. Matrix products are recomputed like all else; what may run only once is saved.
    """

    name: str = field(default="chen_sqrt", init=False)

    def plan(self, problem: Problem) -> RematPlan:
        began = time.perf_counter()
        crossing = crossings(problem, [v for v in problem.values if v.phase == "forward"])
        plans = [SaveAll().plan(problem), *self.candidates(problem, crossing)]
        best = min(plans, key=lambda p: (p.peak_bytes, p.extra_seconds))
        return assemble(problem, best.saved, self.name, status=best.status, solve_seconds=time.perf_counter() - began)

    def candidates(self, problem: Problem, crossing: list[frozenset[str]], tried: int = _TRIED) -> Iterator[RematPlan]:
        """One for each b, from one segment on; `crossing` is what crosses behind each value of the forward."""
        forward = [v for v in problem.values if v.phase == "forward"]
        always = RecomputeAll.names(problem)
        whole = sum(v.nbytes for v in forward if v.storage == v.name and v.savable)
        seen: set[frozenset[str]] = set()
        for k in range(tried):
            ends = self.ends(problem, forward, crossing, whole / 2 ** (k * _TRIED / tried / 2))
            saved = always | frozenset(n for at in ends for n in crossing[at])
            if saved not in seen:
                seen.add(saved)
                yield assemble(problem, saved, self.name, status=f"{len(ends) + 1} segments")

    @staticmethod
    def ends(problem: Problem, forward: list[Value], crossing: list[frozenset[str]], limit: float) -> list[int]:
        """Where segments end: behind `limit` bytes, at the place of the fewest bytes in the next half of as many."""
        sizes = [sum(problem[n].nbytes for n in names) for names in crossing]
        found: list[int] = []
        held, best = 0, -1
        for at, v in enumerate(forward):
            held += v.nbytes if v.storage == v.name and v.savable else 0
            if held >= limit and at + 1 < len(forward):
                best = at if best < 0 or sizes[at] < sizes[best] else best
                if held >= 1.5 * limit or not sizes[best]:
                    found.append(best)
                    held, best = 0, -1
        return found


def crossings(problem: Problem, forward: list[Value]) -> list[frozenset[str]]:
    """Behind each value of the forward, what later ones of it read: the storages that cross, less what is given and
    what the user forbids to keep."""
    last: dict[str, int] = {}
    for at, v in enumerate(forward):
        for i in v.inputs:
            last[problem[i].storage] = at
    found, alive = [], set[str]()
    ends: dict[int, list[str]] = {}
    for root, at in last.items():
        ends.setdefault(at, []).append(root)
    for at, v in enumerate(forward):
        alive.difference_update(ends.get(at, ()))
        if v.storage == v.name and v.savable and not v.must_recompute and last.get(v.name, -1) > at:
            alive.add(v.name)
        found.append(frozenset(alive))
    return found
