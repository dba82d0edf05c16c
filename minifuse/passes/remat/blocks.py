"""Plans that differ from block to block: of several for the whole graph, the best for each stretch of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .baselines import RecomputeAll
from .chen import ChenSqrt, crossings
from .plan import RematPlan, assemble
from .problem import Problem, Value

# Blocks that are asked for; one ends where at most this share of its bytes crosses into the next.
_BLOCKS, _CROSSING = 48, 1 / 4
# Memory is counted in so many parts of the limit; so many limits are tried, one below the other at this ratio.
_PARTS, _RATIO, _LIMITS = 2048, 0.95, 24


@dataclass(frozen=True)
class Figures:
    """Of one plan, by block: the bytes that it saves, the most that is held beyond what is saved of blocks before while
    the block is worked on in either pass, and its seconds in both."""

    saved: np.ndarray
    work: np.ndarray
    seconds: np.ndarray


class Blocks:
    """A forward in stretches between which few bytes cross, and the plans that mix others stretch by stretch.

    What a stretch saves, holds and takes under a plan is read off the plan's timeline, as if nothing of it depended on
    the others: little crosses. Of each stretch one plan is chosen, so that the sum of seconds is least and memory
    stays below a limit wherever the step is: what is saved before a stretch, and its own work. That is a
    multiple-choice knapsack with a limit at each item, by dynamic programming over the saved bytes (Kellerer, Pferschy
    and Pisinger, "Knapsack Problems", 2004, section 11.5). What comes of it is simulated like any other plan.
    """

    mains: tuple[str, ...]
    """The largest value that crosses at each place where a stretch could end."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        forward = [v for v in problem.values if v.phase == "forward"]
        self.crossing = crossings(problem, forward)
        self.ends = self._ends(forward)
        self.always = RecomputeAll.names(problem)
        self.of: dict[str, int] = {}
        block, ends = 0, set(self.ends)
        for at, v in enumerate(forward):
            self.of[v.name] = block
            block += at in ends
        self.count = block + 1
        for v in problem.values:
            if v.phase == "either":
                self.of[v.name] = max((self.of[i] for i in v.inputs if i in self.of), default=0)

    def _ends(self, forward: list[Value]) -> list[int]:
        whole = sum(v.nbytes for v in forward if v.storage == v.name and v.savable)
        found, held = [], 0
        places = ChenSqrt.ends(self.problem, forward, self.crossing, whole / _BLOCKS)
        sizes, position = self.problem.sizes, self.problem.position
        largest = (max(names, key=lambda n: (sizes[n], position[n])) for at in places if (names := self.crossing[at]))
        self.mains = tuple(dict.fromkeys(largest))
        for at, v in enumerate(forward):
            held += v.nbytes if v.storage == v.name and v.savable else 0
            if at in places and sum(self.problem[n].nbytes for n in self.crossing[at]) <= _CROSSING * held:
                found.append(at)
                held = 0
        return found

    @property
    def boundaries(self) -> frozenset[str]:
        """What crosses from a block into the next, and what may run once."""
        return self.always.union(*(self.crossing[at] for at in self.ends))

    def block(self, name: str) -> int:
        """That of a value of either pass."""
        return self.behind.get(name, self.of.get(name, 0))

    @cached_property
    def behind(self) -> dict[str, int]:
        """The block that each value of the backward belongs to: that of the latest value that it reads of the forward,
        else that of the earliest that its gradients have reached."""
        found: dict[str, int] = {}
        for v in self.problem.values:
            if v.phase in ("backward", "tangent"):
                read = [self.of[i] for i in v.inputs if i in self.of]
                reached = [found[i] for i in v.inputs if i in found]
                found[v.name] = max(read) if read else min(reached, default=self.count - 1)
        return found

    def figures(self, plan: RematPlan) -> Figures:
        saved, work, seconds = (np.zeros(self.count) for _ in range(3))
        for root in {self.problem[n].storage for n in plan.saved}:
            if not self.problem[root].is_given:
                saved[self.of[root]] += self.problem[root].nbytes
        before = np.concatenate(([0.0], np.cumsum(saved)[:-1]))
        timeline = plan.timeline
        for k, (name, held, took) in enumerate(zip(timeline.steps, timeline.total, timeline.seconds, strict=True)):
            b = self.block(name) if k >= timeline.forward else self.of.get(name, 0)
            work[b] = max(work[b], held - before[b])
            seconds[b] += took
        return Figures(saved, work, seconds)

    def mixtures(
        self, plans: Sequence[RematPlan], most: int, policy: str, limit: float | None = None
    ) -> Iterator[RematPlan]:
        """The fastest mixture at each of falling limits, from the largest peak of the plans on, `most` of them; where a
        limit is given, those at and below it."""
        found = self.choices(plans)
        if limit is not None:
            every = list(found)
            found = iter(every[min(sum(bound > limit for bound, _ in every), max(len(every) - most, 0)) :])
        for _, chosen in itertools.islice(found, most):
            saved = (n for k in {*chosen} for n in plans[k].saved if n in self.of and chosen[self.of[n]] == k)
            status = f"{len({*chosen})} plans in {self.count} blocks"
            yield assemble(self.problem, {*saved, *self.always}, policy, status=status)

    def choices(self, plans: Sequence[RematPlan]) -> Iterator[tuple[float, tuple[int, ...]]]:
        """Falling limits, and which plan each block follows in the fastest mixture within; as far as that changes."""
        figures = [self.figures(p) for p in plans]
        seen = set[tuple[int, ...]]()
        for bound in max(p.peak_bytes for p in plans) * _RATIO ** np.arange(_LIMITS):
            # of tensors without elements there is nothing to share
            chosen = self.mix(figures, bound) if bound else None
            if chosen is None:
                return
            if chosen not in seen:
                seen.add(chosen)
                yield float(bound), chosen

    def mix(self, figures: Sequence[Figures], limit: float) -> tuple[int, ...] | None:
        """Which plan each block follows at a limit of bytes; None where no mixture is within it."""
        part = limit / _PARTS
        best = np.full(_PARTS + 1, np.inf)
        best[0] = 0.0
        choices = np.zeros((self.count, _PARTS + 1), dtype=np.int32)
        steps = [[round(f.saved[b] / part) for f in figures] for b in range(self.count)]
        for b in range(self.count):
            after = np.full(_PARTS + 1, np.inf)
            for k, f in enumerate(figures):
                room = min(int((limit - f.work[b]) / part), _PARTS - steps[b][k])
                if f.work[b] > limit or room < 0:
                    continue
                reached = best[: room + 1] + f.seconds[b]
                place = slice(steps[b][k], steps[b][k] + room + 1)
                better = reached < after[place]
                after[place][better] = reached[better]
                choices[b, place][better] = k
            best = after
        if not np.isfinite(best).any():
            return None
        at, chosen = int(best.argmin()), []
        for b in reversed(range(self.count)):
            chosen.append(int(choices[b, at]))
            at -= steps[b][chosen[-1]]
        return tuple(reversed(chosen))
