"""XLA's pass that brings a schedule below a limit of memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from examples.remat_policies.schedule import Schedule, Storage, limits, searched
from minifuse.remat import Problem, RematPlan


@dataclass(frozen=True)
class XLAGreedy:
    """Where a step holds more than the limit, what frees most there is computed again before its next reader.

    HloRematerialization of OpenXLA, xla/hlo/transforms/simplifiers/hlo_rematerialization.cc: the schedule is walked in
    order; at an instruction above the limit the best of what is alive and not read by it is rematerialised, with those
    of its inputs that are dead there (a block, of at most so many instructions), until the instruction fits or nothing
    would free any bytes (`MemoryReducedIfRematerialized`). There the best frees the most bytes, whatever it costs
    (`GetCostOfRecompute`); other walks here take the most bytes a second, and `within` chooses. Not taken over:
    compressed layouts, moves within the forward, and rematerialising what was rematerialised.

    What no walk can know is how long a stretch is worth computing again at once, so several `lengths` are tried; and
    `tried` lower limits, since the walk counts bytes less exactly than the simulator. Where none is within the limit,
    walks at higher ones compete for the least peak: one that may not recompute all that it wants ends higher.
    """

    lengths: tuple[int, ...] = (1, 4, 16, 64)
    tried: int = 2
    name: str = field(default="xla_greedy", init=False)

    def plan(self, problem: Problem) -> RematPlan:
        return searched(problem, self.name, self.below)

    def below(self, s: Schedule, limit: float) -> Iterator[RematPlan]:
        """The plans of walks at the limit, and where none is within it of walks at others."""
        least = float("inf")
        for plan in self.candidates(s, limit):
            least = min(least, plan.peak_bytes)
            yield plan
        for k in (1, 2, 3) if least > limit else ():
            yield from self.candidates(s, s.everything.peak_bytes * 0.6**k)

    def candidates(self, s: Schedule, limit: float) -> Iterator[RematPlan]:
        """The plans of walks at the limit and below it, and what they all lead to."""
        seen: set[frozenset[str]] = set()
        for by_seconds in (False, True):
            for longest in self.lengths:
                again = frozenset[str]()
                for below in limits(limit, 0.8 * limit, self.tried):
                    again = walk(s, below, again, longest, by_seconds)
                    if again not in seen:
                        seen.add(again)
                        yield s.plan(self.name, again)
        yield s.plan(self.name, {v.name for v in s.movable})


def walk(s: Schedule, limit: float, again: frozenset[str], longest: int, by_seconds: bool) -> frozenset[str]:
    """What is to be computed again so that no step holds more than `limit`, in stretches of at most `longest`."""
    held, uses = s.held(again), s.uses(again)
    refused: set[str] = set()
    for step in range(len(held)):
        while held[step] > limit:
            found = []
            for v in s.movable:
                if v.last < step < min(uses[v.name], default=-1) and v.name not in again and v.name not in refused:
                    block, freed = block_of(s, v, step, again, uses)
                    seconds = sum(s.storages[n].seconds for n in block) + 1e-9
                    found.append((freed / seconds if by_seconds else freed, v.name, block))
            for worth, name, block in sorted(found, key=lambda f: -f[0]):
                if worth > 0 and s.stretch(name, again | block) <= longest:
                    again |= block
                    held, uses = s.held(again), s.uses(again)
                    break
                refused.add(name)
            else:
                break
    return again


def block_of(
    s: Schedule, v: Storage, step: int, again: frozenset[str], uses: dict[str, list[int]]
) -> tuple[frozenset[str], int]:
    """A storage with what of its inputs is dead at a step, and the bytes that computing them again frees there."""
    block, stack, freed = {v.name}, [v], v.nbytes
    while stack:
        for i in (s.storages[n] for n in stack.pop().inputs):
            if i.name in again or i.name in block or max([i.last, *uses[i.name]]) >= step:
                continue
            if i.fixed:
                freed -= i.nbytes
            else:
                block.add(i.name)
                stack.append(i)
    return frozenset(block), freed
