"""PyTorch's memory budget, with its plans made sound."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from .baselines import RecomputeAll
from .budget import eager_peak
from .mincut import MinCut
from .plan import RematPlan, assemble
from .problem import Problem

# Sizes are counted in so many parts of what there is room for, rounded up.
_PARTS = 4096


@dataclass(frozen=True)
class KnapsackBudget:
    """Of what PyTorch's cut saves, the values that take longest to recompute, as many as the budget has room for.

    As PyTorch's option `activation_memory_budget` ("Current and New Activation Checkpointing Techniques in PyTorch",
    pytorch.org, 2025): 0 saves what must be, 1 what `mincut` saves, and between the two a
    knapsack is filled, here by dynamic programming (Kellerer, Pferschy and Pisinger, "Knapsack Problems", 2004,
    section 2.3). Unlike there, what draws random numbers is saved at every budget, and not drawn again. A budget in
    bytes is taken as its share of eager's peak.
    """

    name: str = field(default="knapsack_budget", init=False)

    def plan(self, problem: Problem) -> RematPlan:
        began = time.perf_counter()
        most, least = MinCut().plan(problem), RecomputeAll().plan(problem)
        always = frozenset(n for n in least.saved if not problem[n].is_given)
        more = [problem[n] for n in most.saved if n not in always and not problem[n].is_given]
        budget = problem.memory_budget
        share = budget if budget <= 1 else budget / max(eager_peak(problem), 1)
        room = min(share, 1.0) * sum(v.nbytes for v in more)
        sizes = np.array([v.nbytes for v in more], dtype=np.float64)
        worth = np.array([problem.recompute_seconds(v) for v in more])
        chosen = knapsack(sizes, worth, room)
        saved = always | frozenset(v.name for v, take in zip(more, chosen, strict=True) if take)
        status = f"{int(chosen.sum())} of {len(more)} values fit"
        return assemble(problem, saved, self.name, status=status, solve_seconds=time.perf_counter() - began)


def knapsack(sizes: np.ndarray, worth: np.ndarray, room: float) -> np.ndarray:
    """Which items to take: the most worth in `room`, sizes rounded up to 1/4096 of it. What takes no room is taken."""
    if not len(sizes) or sizes.sum() <= room:
        return np.ones(len(sizes), dtype=bool)
    unit = room / _PARTS
    parts = np.ceil(sizes / unit).astype(np.int64) if unit > 0 else np.where(sizes > 0, _PARTS + 1, 0)
    best = np.zeros(_PARTS + 1)
    taken = np.zeros((len(sizes), _PARTS + 1), dtype=bool)
    for k, (size, value) in enumerate(zip(parts, worth, strict=True)):
        if size > _PARTS:
            continue
        other = np.full(_PARTS + 1, -1.0)
        other[size:] = best[: _PARTS + 1 - size] + value
        taken[k] = other >= best if value > 0 or size == 0 else other > best
        best = np.where(taken[k], other, best)
    chosen = np.zeros(len(sizes), dtype=bool)
    left = _PARTS
    for k in reversed(range(len(sizes))):
        if taken[k, left]:
            chosen[k] = True
            left -= parts[k]
    return chosen
