"""Peak memory of a step: eager, Inductor and minifuse beside the least that minifuse's plan needs.

    python -m benchmarks.peak [--quick] [--models bert,llama] [--json FILE] [--check]

The first three are the most bytes alive in a warm step beyond the model and its inputs (see `benchmarks.harness`).
`live peak` is the most that is alive at once in minifuse's plans, each result from the step that writes it to its last
reader, what it takes over counted once: no allocator could do with less. `arena ratio` is what the small buffers are
packed into, over the most of them that are alive at once.
"""

from __future__ import annotations

import sys

from minifuse.ir.plan import Plan
from minifuse.passes.memory import ALIGN, arena_intervals, most_alive, pack, peak
from minifuse.records import RECORDS

from . import harness, models
from .harness import Board, Column, ProbeError, Target


def board() -> Board:
    return Board(
        "Peak memory of a step",
        [
            Column("eager peak", harness.megabytes),
            Column("inductor peak", harness.megabytes),
            Column("peak", harness.megabytes),
            Column("of eager ratio", harness.ratio, Target("<=", 1.0)),
            Column("of inductor ratio", harness.ratio, Target("<=", 1.0)),
            Column("live peak", harness.megabytes),
            Column("of live ratio", harness.ratio),
            Column("arena ratio", harness.ratio, Target("<=", 1.03)),
        ],
    )


def probe_plans(path: str, training: bool) -> dict[str, float]:
    """The most bytes alive in a step's plans, and how well the arenas are packed. Run it through `fresh`."""
    models.stepper(path, "minifuse", training)()
    plans = [r.stages["memory"] for r in RECORDS if "memory" in r.stages]
    return {"live_peak": max(peak(p)[0] for p in plans), "arena_ratio": max(map(packing, plans))}


def packing(plan: Plan) -> float:
    """Bytes of a plan's arena over the most bytes of its buffers that are alive at once."""
    spans = arena_intervals(plan)
    sizes = {s.buffer: plan.hint(plan.buffers[s.buffer].extent) * plan.buffers[s.buffer].dtype.itemsize for s in spans}
    _, total = pack(spans, sizes)
    most, _ = most_alive((s.first, s.last, -(-max(sizes[s.buffer], 1) // ALIGN) * ALIGN) for s in spans)
    return total / most if most else 1.0


def measure(table: Board, entry: models.Entry, training: bool) -> None:
    row = f"{entry.name} {'training' if training else 'inference'}"
    peaks = [harness.peak(entry.path, b, training) for b in ("eager", "inductor", "minifuse")]
    plans = harness.fresh(probe_plans, entry.path, training)
    table.add(row, **plans)
    eager, inductor, ours = peaks
    if eager and inductor and ours:
        table.add(row, eager_peak=eager, inductor_peak=inductor, peak=ours)
        table.add(row, of_eager_ratio=ours / eager, of_inductor_ratio=ours / inductor)
        if plans["live_peak"] >= 1e6:  # of less the compiler's own objects would be compared
            table.add(row, of_live_ratio=ours / plans["live_peak"])


def main() -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--models", default="", help="comma-separated names")
    options = parser.parse_args()
    table = board()
    for entry in models.select(options.quick, False, options.models):
        for training in (True, False) if entry.training else (False,):
            try:
                measure(table, entry, training)
            except ProbeError as error:
                table.fail(f"{entry.name} {'training' if training else 'inference'}", error)
    return harness.finish(table, options)


if __name__ == "__main__":
    sys.exit(main())
