"""How planning time grows with the graph: 1,000 to 20,000 nodes of six kinds.

    python -m benchmarks.growth [--quick] [--kinds chain,skips] [--json FILE] [--check]

Planning is the pass that fuses; lowering and scheduling stand beside it. Each graph is planned once a round, in rounds
over all sizes, garbage collected before. A doubling is the largest ratio of the medians of two sizes, per doubling of
the nodes.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import sys

from minifuse.options import Options
from minifuse.passes.context import CompileContext
from minifuse.passes.pipeline import make_plan

from . import harness
from .graphs import GRAPHS
from .harness import Board, Column, Target

SIZES = (1_000, 2_500, 5_000, 10_000, 20_000)
QUICK = (1_000, 4_000)


def board() -> Board:
    return Board(
        "Planning time by the number of nodes",
        [
            Column("nodes"),
            Column("kernels unfused"),
            Column("kernels"),
            Column("lower", harness.seconds),
            Column("fuse", harness.seconds, Target("<=", 2.5)),
            Column("schedule", harness.seconds),
            Column("a doubling", harness.ratio, Target("<=", 2.3)),
        ],
    )


def main() -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--kinds", default="", help=f"comma-separated: {', '.join(GRAPHS)}")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    kinds = options.kinds.split(",") if options.kinds else list(GRAPHS)
    if unknown := set(kinds) - set(GRAPHS):
        parser.error(f"no kind {sorted(unknown)}; kinds: {', '.join(GRAPHS)}")
    sizes = QUICK if options.quick else SIZES
    table = board()
    for kind in kinds:
        seconds: dict[int, list[float]] = {n: [] for n in sizes}
        figures: dict[int, dict[str, float]] = {}
        graphs = {n: GRAPHS[kind](n) for n in sizes}
        for _ in range(options.rounds):
            for n, graph in graphs.items():
                ctx = CompileContext(kind, "inference", Options())
                gc.collect()
                plan = make_plan(graph, ctx)
                seconds[n].append(ctx.seconds["fuse"])
                unfused = len(ctx.stages["lower"].launches)
                figures[n] = {"nodes": len(graph.nodes), "kernels_unfused": unfused, "kernels": len(plan.launches)}
                figures[n] |= {name: ctx.seconds[name] for name in ("lower", "schedule")}
        medians = {n: statistics.median(seconds[n]) for n in sizes}
        for n in sizes:
            table.add(f"{kind} {n}", fuse=medians[n], **figures[n])
            table.hold(f"{kind} {n}", {"fuse": Target("<=", 2.5)})
        doublings = [
            math.exp(math.log(medians[b] / medians[a]) / math.log2(figures[b]["nodes"] / figures[a]["nodes"]))
            for a, b in itertools.pairwise(sizes)
        ]
        table.add(f"{kind} {sizes[-1]}", a_doubling=max(doublings))
        table.hold(f"{kind} {sizes[-1]}", {"fuse": Target("<=", 2.5), "a doubling": Target("<=", 2.3)})
    return harness.finish(table, options)


if __name__ == "__main__":
    sys.exit(main())
