"""Optimal checkpoints for a chain of unlike stages, by dynamic programming over memory."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .baselines import RecomputeAll, SaveAll
from .budget import limit_of, within
from .chen import crossings
from .plan import RematPlan, assemble
from .priced import PricedMinCut
from .problem import Problem, Value

SLOTS = 500
# How many stages a forward is cut into at most, each tried, and how many sizes of memory plans are made for.
_STAGES, _TRIED = (8, 16, 40), 12
F_ALL, F_CK, F_NONE, B = OPERATIONS = ("F_all", "F_ck", "F_none", "B")
_INFINITE = float("inf")


@dataclass(frozen=True)
class Link:
    """A stage of a chain: seconds of its forward and its backward; bytes of its output (a), of all that its backward
    reads of it, output included (ā), and of what either holds only while it runs."""

    forward: float
    backward: float
    output: float
    kept: float
    forward_extra: float = 0.0
    backward_extra: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """Seconds of a whole step, infinite where memory does not suffice, and its operations: (operation, stage)."""

    makespan: float
    operations: tuple[tuple[str, int], ...]


class Chain:
    """Theorem 1 of Beaumont and others (INRIA RR-9302): the least time of stages i..j in m slots, for all i, j and m.

    The input of stage i and the gradient of j's output are there; the first counts with what is outside. Either i keeps
    all (F_all), or its input alone is kept (F_ck), stages up to some s run without a trace (F_none), s..j are done with
    the output of s - 1 kept, and then i..s-1 again. `again` is how often a stage's forward may run again, None: any
    number. Bytes are rounded up to slots; a schedule is the best of those that keep a checkpoint until it is used.
    """

    def __init__(self, links: Sequence[Link], nbytes: float, slots: int = SLOTS, again: int | None = None) -> None:
        self.links, self.nbytes, self.slots = links, nbytes, slots
        self.levels = 1 if again is None else again + 1
        self.unbounded = again is None
        n = len(links)
        self.start = np.concatenate([[0.0], np.cumsum([k.forward for k in links])])
        self.output = [self.parts(k.output) for k in links]
        self.kept = [self.parts(k.kept) for k in links]
        self.best = np.full((self.levels, n, n, slots + 1), _INFINITE)
        self.split = np.zeros((self.levels, n, n, slots + 1), dtype=np.int16)
        for level in range(self.levels):
            for i in range(n):
                self.best[level, i, i, self.alone(i) :] = links[i].forward + links[i].backward
            for width in range(1, n):
                for i in range(n - width):
                    self.fill(level, i, i + width)

    def parts(self, nbytes: float) -> int:
        return min(self.slots + 1, math.ceil(nbytes * self.slots / self.nbytes)) if nbytes > 0 else 0

    def alone(self, i: int) -> int:
        """Slots of one stage's forward and backward: its output's gradient, all it keeps, and what is temporary."""
        link = self.links[i]
        return self.output[i] + self.kept[i] + self.parts(max(link.forward_extra, link.backward_extra))

    def least(self, i: int, j: int) -> int:
        """Slots of running i..j-1 without a trace, beside the gradient of j's output."""
        run = [self.output[s] + (self.output[s - 1] if s > i else 0) + self.parts(self.links[s].forward_extra)
               for s in range(i, j)]  # fmt: skip
        return self.output[j] + max(run)

    def fill(self, level: int, i: int, j: int) -> None:
        slots = self.slots
        least = self.least(i, j)
        options = np.full((j - i + 1, slots + 1), _INFINITE)
        if self.kept[i] <= slots:  # F_all
            options[0, self.kept[i] :] = self.best[level, i + 1, j, : slots + 1 - self.kept[i]]
            options[0] += self.best[level, i, i]
        lower = level if self.unbounded else level - 1
        for s in range(i + 1, j + 1) if lower >= 0 else ():  # F_ck, F_none, ..., then s..j, then i..s-1 again
            held = self.output[s - 1]
            if held <= slots:
                row = options[s - i]
                row[held:] = self.best[level, s, j, : slots + 1 - held]
                row += self.start[s] - self.start[i] + self.best[lower, i, s - 1]
                row[:least] = _INFINITE
        self.split[level, i, j] = options.argmin(axis=0)
        self.best[level, i, j] = options.min(axis=0)

    def schedule(self, nbytes: float | None = None) -> Schedule:
        """The best of all stages in this many bytes; of all that there are without a number."""
        m = self.slots if nbytes is None else min(self.slots, math.floor(nbytes * self.slots / self.nbytes))
        top, n = self.levels - 1, len(self.links)
        if m < 0 or np.isinf(self.best[top, 0, n - 1, m]):
            return Schedule(_INFINITE, ())
        return Schedule(float(self.best[top, 0, n - 1, m]), tuple(self.operations(top, 0, n - 1, m)))

    def operations(self, level: int, i: int, j: int, m: int) -> Iterator[tuple[str, int]]:
        if i == j:
            yield F_ALL, i
            yield B, i
            return
        s = int(self.split[level, i, j, m])
        if s == 0:
            yield F_ALL, i
            yield from self.operations(level, i + 1, j, m - self.kept[i])
            yield B, i
            return
        yield F_CK, i
        yield from ((F_NONE, k) for k in range(i + 1, i + s))
        yield from self.operations(level, i + s, j, m - self.output[i + s - 1])
        yield from self.operations(level if self.unbounded else level - 1, i, i + s - 1, m)


@dataclass(frozen=True)
class RotorDp:
    """Checkpoints of the forward as a chain, placed by dynamic programming.

    Olivier Beaumont, Lionel Eyraud-Dubois, Julien Hermann, Alexis Joly and Alena Shilova, "Optimal checkpointing for
    heterogeneous chains: how to train deep neural networks with limited memory", INRIA RR-9302, 2019; ACM TOMS, 2024
    ("rotor"); `Chain` is their Theorem 1. Our backward computes a value again at most once, so the plan is that of the
    recursion restricted to one level (`again=1`): a stretch that runs again keeps all then.

    On a graph that is no chain stages end where the fewest bytes cross, and a stage's output is all that crosses: what
    a later stage reads is in the output of each between. A stage that keeps all keeps what the minimum cut saves
    of it. The memory of the program is searched, for it does not see the backward's own values: of its plans, and of
    those between two, the fastest within the limit is taken. Without a budget it is `save_all`.
    """

    slots: int = SLOTS
    name: str = field(default="rotor_dp", init=False)

    def plan(self, problem: Problem) -> RematPlan:
        began = time.perf_counter()
        plan = replace(SaveAll().plan(problem), policy=self.name)
        if plan.peak_bytes > (limit := limit_of(problem)):
            plan = within(problem, limit, [plan, *self.candidates(problem)], self.name)
        return replace(plan, solve_seconds=time.perf_counter() - began)

    def candidates(self, problem: Problem) -> Iterator[RematPlan]:
        """The plan of each size of memory, from all that the stages keep downwards, as far as they differ."""
        forward = [v for v in problem.values if v.phase == "forward"]
        crossing = crossings(problem, forward)
        cut = PricedMinCut().fastest(problem)
        once = RecomputeAll.names(problem)
        seen: set[frozenset[str]] = set()
        for most in _STAGES:
            stages = self.stages(problem, forward, crossing, most)
            kept = [frozenset(v.name for v in forward[a:b]) & frozenset(cut.saved) for a, b in stages]
            for first in self.schedules(problem, forward, crossing, stages, kept):
                keeps = (kept[i] for what, i in first if what == F_ALL)
                behind = (crossing[stages[i][0] - 1] for what, i in first if i and what != F_NONE)
                if (saved := once.union(*keeps, *behind)) not in seen:
                    seen.add(saved)
                    yield assemble(problem, saved, self.name)

    def schedules(
        self,
        problem: Problem,
        forward: list[Value],
        crossing: list[frozenset[str]],
        stages: list[tuple[int, int]],
        kept: list[frozenset[str]],
    ) -> Iterator[tuple[tuple[str, int], ...]]:
        """The forward of each schedule: the operations before the first backward."""
        if len(stages) < 2:
            return
        links = [self.link(problem, forward[a:b], keep, crossing[b - 1])
                 for (a, b), keep in zip(stages, kept, strict=True)]  # fmt: skip
        whole = sum(k.kept for k in links) + 2 * max(k.output for k in links) + 1
        chain = Chain(links, whole, self.slots, again=1)
        (fits,) = np.nonzero(np.isfinite(chain.best[-1, 0, -1]))
        for m in np.unique(np.geomspace(max(1, fits[0]), self.slots, _TRIED).astype(int)) if len(fits) else ():
            operations = chain.schedule(whole * (m + 0.5) / self.slots).operations
            yield operations[: next((t for t, (what, _) in enumerate(operations) if what == B), 0)]

    @staticmethod
    def stages(
        problem: Problem, forward: list[Value], crossing: list[frozenset[str]], most: int
    ) -> list[tuple[int, int]]:
        """Where each begins and ends: at the fewest bytes that cross, of as many stretches of equal bytes, at most."""
        sizes = np.array([sum(problem[n].nbytes for n in names) for names in crossing])
        held = np.cumsum([v.nbytes if v.storage == v.name and v.savable else 0 for v in forward])
        if not len(held):
            return []
        share = (held * most // (held[-1] + 1)).astype(int)
        ends = []
        for k in range(most):
            (at,) = np.nonzero(share == k)
            if len(at):
                ends.append(int(at[len(at) - 1 - sizes[at][::-1].argmin()]) + 1)
        ends = [e for e in ends if e < len(forward)]
        return list(zip([0, *ends], [*ends, len(forward)], strict=True))

    @staticmethod
    def link(problem: Problem, values: list[Value], kept: frozenset[str], behind: frozenset[str]) -> Link:
        seconds = sum(problem.recompute_seconds(v) for v in values)
        output = problem.saved_bytes(behind)
        mine = {v.name for v in values}
        return Link(seconds, 2 * seconds, output, problem.saved_bytes(kept | (behind & mine)))
