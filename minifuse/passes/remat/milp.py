"""A mixed-integer program as it is written down: columns with a price each, and rows of names and coefficients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from minifuse.ir.lazy import Deferred

from .mincut import INFINITE

sparse, optimize = Deferred("scipy.sparse"), Deferred("scipy.optimize")

# What HiGHS says of its status (scipy.optimize.milp).
_STATUS = {0: "optimal", 1: "time limit", 2: "infeasible", 3: "unbounded", 4: "solver error"}

Row = Mapping[int, float]


@dataclass(frozen=True)
class Answer:
    """What the solver found: a value for each column or None, its price, a bound below it, and how it ended."""

    x: np.ndarray | None
    cost: float
    bound: float | None
    status: str


@dataclass
class Model:
    """A program to be minimised; a column is between 0 and 1, one that costs infinitely much is 0."""

    costs: list[float] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    ends: list[tuple[int, int]] = field(default_factory=list)
    entries: list[float] = field(default_factory=list)

    def binary(self, cost: float = 0.0) -> int:
        self.costs.append(cost)
        self.whole.append(1)
        return len(self.costs) - 1

    def column(self) -> int:
        """One that may be a fraction."""
        self.costs.append(0.0)
        self.whole.append(0)
        return len(self.costs) - 1

    def at_least(self, row: Row, bound: float) -> None:
        self.ends.extend((len(self.lower), column) for column in row)
        self.entries.extend(row.values())
        self.lower.append(bound)

    def at_most(self, row: Row, bound: float) -> None:
        self.at_least({column: -entry for column, entry in row.items()}, -bound)

    def solve(self, seconds: float, gap: float) -> Answer:
        """The cheapest within a relative gap, or the best found in time, by HiGHS (Huangfu and Hall, 2018)."""
        if not self.costs:
            return Answer(np.zeros(0), 0.0, 0.0, _STATUS[0])
        price = np.array(self.costs)
        fixed = np.isinf(price)
        price[fixed] = 0.0
        unit = price.max(initial=0.0) or 1.0
        rows, columns = np.array(self.ends, dtype=np.int64).reshape(-1, 2).T
        matrix = sparse.csr_matrix((self.entries, (rows, columns)), shape=(len(self.lower), len(price)))
        solved = optimize.milp(
            price / unit,
            constraints=optimize.LinearConstraint(matrix, np.array(self.lower), INFINITE),
            integrality=np.array(self.whole),
            bounds=optimize.Bounds(0.0, np.where(fixed, 0.0, 1.0)),
            options={"time_limit": seconds, "mip_rel_gap": gap},
        )
        bound = getattr(solved, "mip_dual_bound", None)
        words = _STATUS[solved.status]
        if solved.x is None:
            return Answer(None, INFINITE, None if bound is None or np.isinf(bound) else bound * unit, words)
        if bound is None:
            bound = solved.fun
        far = (solved.fun - bound) / max(abs(solved.fun), 1e-12)
        if far > 1e-9:
            words = f"{'within the gap' if solved.status == 0 else words}, gap {far:.2%}"
        return Answer(solved.x, solved.fun * unit, bound * unit, words)
