"""How far greedy fusion is from the plan of least predicted time, over pieces cut from the models.

    python -m benchmarks.exact [--quick] [--pieces N] [--json FILE] [--check]

A piece is 8 to 24 kernels that follow each other in the unfused plan of a model's forward or backward; what comes from
outside is an input, what is used outside an output. Both planners ask the same rules and the same cost model. Pieces
whose groups are more than the exact planner looks at are counted and drawn anew. The draw is seeded.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from dataclasses import replace

import minifuse
from minifuse.ir.index import ZERO
from minifuse.ir.plan import Extern, Launch, Plan, TensorRef
from minifuse.options import Options
from minifuse.passes.context import CompileContext
from minifuse.passes.fuse.exact import TooLargeError, choose, columns, total
from minifuse.passes.fuse.search import Search

from . import harness, models
from .harness import Board, Column, Target

FEWEST, MOST = 8, 24


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def board() -> Board:
    shown = [Column("pieces"), Column("too large"), Column("median distance", percent), Column("worst", percent)]
    table = Board("Greedy fusion beside the plan of least predicted time",
                  [*shown, Column("greedy", harness.seconds), Column("exact", harness.seconds)])  # fmt: skip
    table.hold("all", {"median distance": Target("<=", 0.0), "worst": Target("<=", 0.05)})
    return table


def piece(plan: Plan, begin: int, kernels: int) -> Plan | None:
    """A plan of the steps from `begin` on that hold so many kernels; None where there are not so many, or where a step
    writes into an input."""
    steps, left = [], kernels
    for step in plan.steps[begin:]:
        if left and isinstance(step, (Launch, Extern)):
            steps.append(step)
            left -= isinstance(step, Launch)
    names = dict.fromkeys(n for s in steps for n in (*s.reads, *s.writes))
    inside = {n for s in steps for n in s.writes}
    if left or not plan.mutated.isdisjoint(names) or any(isinstance(s, Extern) and s.effect for s in steps):
        return None
    chosen = {id(s) for s in steps}
    later = {n for s in plan.steps if isinstance(s, (Launch, Extern)) and id(s) not in chosen for n in s.reads}
    later |= {o.buffer for o in plan.outputs if isinstance(o, TensorRef)}
    buffers = {n: b if n in inside else replace(b, storage="input") for n, b in plan.buffers.items() if n in names}
    outputs = tuple(TensorRef(n, buffers[n].shape, buffers[n].stride, ZERO) for n in names if n in inside & later)
    inputs = tuple(n for n in names if n not in inside)
    return replace(plan, inputs=inputs, buffers=buffers, steps=tuple(steps), outputs=outputs, donated=frozenset(inputs))


def distance(plan: Plan) -> tuple[float, float, float]:
    """How much longer greedy's kernels are predicted to take, as a share; the planners' own seconds.

    Raises TooLargeError.
    """
    exact = Search(plan, CompileContext("exact", "inference", Options()))
    start = time.perf_counter()
    least = sum(c.seconds for c in choose(exact, columns(exact)))
    middle = time.perf_counter()
    greedy = Search(plan, CompileContext("greedy", "inference", Options()))
    greedy.search()
    end = time.perf_counter()
    graph = greedy.graph
    found = total(graph, (i for i, g in graph.groups.items() if not g.fixed))
    # Greedy also computes cheap producers where they are read, which the exact planner does not.
    return max(found / least - 1, 0.0), end - middle, middle - start


def main() -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--pieces", type=int, default=100)
    options = parser.parse_args()
    count = 20 if options.quick else options.pieces
    table = board()
    draw = random.Random(0)
    plans: list[tuple[str, Plan]] = []
    for entry in models.select(options.quick):
        before = len(minifuse.reports())
        models.stepper(entry.path, "minifuse", entry.training)()
        plans += [(entry.name, r.unfused) for r in minifuse.reports()[before:] if r.kernels_unfused > FEWEST]
    figures: dict[str, list[tuple[float, float, float]]] = {name: [] for name, _ in plans}
    large = dict.fromkeys(figures, 0)
    while sum(map(len, figures.values())) < count:
        name, plan = draw.choice(plans)
        cut = piece(plan, draw.randrange(len(plan.steps)), draw.randint(FEWEST, MOST))
        if cut is None:
            continue
        try:
            figures[name].append(distance(cut))
        except TooLargeError:
            large[name] += 1
    figures["all"] = [f for some in figures.values() for f in some]
    large["all"] = sum(large.values())
    for name, some in figures.items():
        if some:
            far, greedy, exact = zip(*some, strict=True)
            table.add(name, pieces=len(some), too_large=large[name], median_distance=statistics.median(far),
                      worst=max(far), greedy=sum(greedy), exact=sum(exact))  # fmt: skip
    return harness.finish(table, options)


if __name__ == "__main__":
    sys.exit(main())
