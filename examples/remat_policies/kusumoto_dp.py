"""Recomputation along a chain of lower sets, by dynamic programming."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from examples.remat_policies.schedule import Schedule, limits, searched
from minifuse.remat import Problem, RematPlan

# Seconds are counted in so many parts of those of the whole forward, rounded up.
_PARTS = 96


@dataclass(frozen=True)
class KusumotoDP:
    """The forward in parts that end in lower sets; what crosses from one to the rest is saved, the rest recomputed.

    Mitsuru Kusumoto, Takuya Inoue, Gentaro Watanabe, Takuya Akiba and Masanori Koyama, "A Graph Theoretic Framework of
    Recomputation Algorithms for Memory-Efficient Backpropagation", NeurIPS 2019: a canonical strategy is a chain of
    lower sets L1 < L2 < ... of the forward, of which the boundaries are saved (section 3); the least bytes saved for
    each lower set and each overhead in seconds are found by dynamic programming under a bound on the peak
    (section 4.2), over the family of the sets of ancestors of one value (section 4.3). Of the strategies within a bound
    that of the least overhead is the time-centric, that of the most the memory-centric (section 4.4).

    Of the family at most `family` sets are kept, in each run of as many storages the one of the fewest bytes on its
    boundary. Bounds fall from the peak of saving everything, and `within` chooses: it counts what the last part does
    not recompute, and what is fused.
    """

    family: int = 160
    tried: int = 12
    name: str = field(default="kusumoto_dp", init=False)

    def plan(self, problem: Problem) -> RematPlan:
        return searched(problem, self.name, lambda s, limit: self.candidates(s))

    def candidates(self, s: Schedule) -> Iterator[RematPlan]:
        """The time-centric and the memory-centric strategy at each bound on the peak."""
        chain = Chain(s, self.family)
        seen: set[frozenset[str]] = set()
        for bound in limits(chain.works.max(), chain.least(), self.tried):
            for again in chain.strategies(bound):
                if again not in seen:
                    seen.add(again)
                    yield s.plan(self.name, again)


class Chain:
    """Lower sets in order of size, and what a step from one to each that holds it costs and saves."""

    def __init__(self, s: Schedule, family: int) -> None:
        self.names = list(s.storages)
        at = {n: k for k, n in enumerate(self.names)}
        every = list(s.storages.values())
        # what must be saved takes its bytes in any case: the strategies differ in the rest
        self.nbytes = np.array([0.0 if v.fixed else v.nbytes for v in every])
        self.seconds = np.array([0.0 if v.fixed else v.seconds for v in every])
        n = len(every)
        reads = np.zeros((n, n), dtype=bool)
        below = np.eye(n, dtype=bool)
        for k, v in enumerate(every):
            for i in v.inputs:
                reads[at[i], k] = True
                below[k] |= below[at[i]]
        sets = np.vstack([np.zeros((1, n), dtype=bool), below, np.ones((1, n), dtype=bool)])
        _, first = np.unique(sets, axis=0, return_index=True)
        sets = sets[np.sort(first)]
        edge = sets & ((~sets).astype(np.float32) @ reads.T.astype(np.float32) > 0)
        kept = thinned(edge @ self.nbytes, family)
        sets, edge = sets[kept], edge[kept]
        order = np.argsort(sets.sum(axis=1), kind="stable")
        self.sets, self.edge = sets[order], edge[order]
        inside, members, ends = (~self.sets).astype(float), self.sets.astype(float), self.edge.astype(float)
        # of the step from set i to set j, at [i, j]
        self.holds = (members @ (1 - members).T == 0) & ~np.eye(len(members), dtype=bool)
        self.saves = inside @ (ends * self.nbytes).T
        again = inside @ ((members - ends) * self.seconds).T
        unit = max(self.seconds.sum(), 1e-12) / _PARTS
        self.parts = np.ceil(again / unit - 1e-9).astype(np.int64)
        # the part's values and their gradients (section 3), but for those that stay within kernels
        fused = np.array([v.inside for v in every])
        self.works = 2 * (inside @ (members * np.where(fused, 0.0, self.nbytes)).T)

    def strategies(self, bound: float) -> list[frozenset[str]]:
        """What is recomputed by the strategies of the least and the most overhead whose peak is within `bound`."""
        count, width = len(self.sets), 2 * _PARTS
        saved = np.full((count, width), np.inf)
        saved[0, 0] = 0.0
        before = np.zeros((count, width), dtype=np.int64)
        spent = np.arange(width)
        for j in range(1, count):
            into = np.flatnonzero(self.holds[:, j])
            left = spent[None, :] - self.parts[into, j][:, None]
            held = np.where(left >= 0, saved[into[:, None], np.maximum(left, 0)], np.inf)
            held = np.where(held + self.works[into, j][:, None] <= bound, held + self.saves[into, j][:, None], np.inf)
            best = held.argmin(axis=0)
            saved[j], before[j] = held[best, spent], into[best]
        ends = np.flatnonzero(np.isfinite(saved[-1]))
        return [self.again(before, int(t)) for t in dict.fromkeys((ends[0], ends[-1]))] if len(ends) else []

    def least(self) -> float:
        """The least bound on the peak that a strategy keeps to, within one part in a hundred."""
        low, high = self.works.max() / 1024, float(self.works.max() + self.saves.max())
        while high > 1.01 * low:
            bound = (low * high) ** 0.5
            low, high = (low, bound) if self.strategies(bound) else (bound, high)
        return high

    def again(self, before: np.ndarray, spent: int) -> frozenset[str]:
        """What is on no boundary of the chain that ends with so many parts of overhead."""
        kept = np.zeros(len(self.names), dtype=bool)
        j = len(self.sets) - 1
        while j:
            kept |= self.edge[j]
            i = int(before[j, spent])
            spent -= int(self.parts[i, j])
            j = i
        return frozenset(n for n, keep, size in zip(self.names, kept, self.nbytes, strict=True) if not keep and size)


def thinned(cost: np.ndarray, count: int) -> np.ndarray:
    """The cheapest of each run of rows, in at most `count` runs; the first and the last row in any case."""
    runs = np.array_split(np.arange(1, len(cost) - 1), max(1, min(count, len(cost)) - 2))
    return np.array([0, *(int(run[cost[run].argmin()]) for run in runs if len(run)), len(cost) - 1])
