"""Compile time, step time and peak memory on the CPU: eager, Inductor and minifuse side by side.

    python -m benchmarks.cpu [--quick] [--all] [--models bert,llama] [--json FILE] [--check]

Each row is a model in training or inference. `compile` is the first call in a fresh process with empty caches; `step`
the median of interleaved rounds in one process; `peak` the bytes alive in a step beyond the model (see
`benchmarks.harness`). Ratios of time are speeds: `vs eager` 1.2 means that eager takes 1.2 times as long.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from . import harness, models
from .harness import Board, Column, ProbeError, Target

COMPILE_OF_INDUCTORS = 1 / 6


def board(backend: str) -> Board:
    return Board(
        f"CPU, {torch.get_num_threads()} threads: {backend} beside eager and Inductor",
        [
            Column("compile", harness.seconds),
            Column("inductor compile", harness.seconds),
            Column("compile ratio", harness.ratio, Target("<=", COMPILE_OF_INDUCTORS)),
            Column("eager step"),
            Column("inductor step"),
            Column("step"),
            Column("vs inductor", harness.ratio, Target(">=", 0.98)),
            Column("vs eager", harness.ratio, Target(">=", 1.0)),
            Column("eager peak", harness.megabytes),
            Column("peak", harness.megabytes),
            Column("peak ratio", harness.ratio, Target("<=", 1.0)),
        ],
    )


def probe_steps(path: str, training: bool, backends: list[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Interleaved step times of each backend, as `Sample` fields. Run it through `fresh`."""
    cases = {name: models.stepper(path, name, training) for name in backends}
    return {name: vars(sample) for name, sample in harness.interleaved(cases, rounds).items()}


def measure(table: Board, entry: models.Entry, training: bool, backends: list[str], rounds: int) -> None:
    """Fill the row of one model; a backend that fails leaves its figures out and its error below the table."""
    row, backend = f"{entry.name} {'training' if training else 'inference'}", backends[-1]
    compiled = [name for name in backends if name != "eager"]
    first = {name: harness.fresh(harness.probe_cold_compile, entry.path, name, training) for name in compiled}
    steps = {
        name: harness.Sample(**figures)
        for name, figures in harness.fresh(probe_steps, entry.path, training, backends, rounds).items()
    }
    peaks = {name: harness.peak(entry.path, name, training) for name in ("eager", backend)}
    table.add(
        row,
        compile=first[backend],
        eager_step=steps["eager"],
        step=steps[backend],
        vs_eager=steps["eager"].median / steps[backend].median,
    )
    if "inductor" in backends:
        table.add(
            row,
            inductor_compile=first["inductor"],
            compile_ratio=first[backend] / first["inductor"],
            inductor_step=steps["inductor"],
            vs_inductor=steps["inductor"].median / steps[backend].median,
        )
    eager, own = peaks["eager"], peaks[backend]
    if eager and own:
        table.add(row, eager_peak=eager, peak=own, peak_ratio=own / eager)


def main() -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--all", action="store_true", help="the whole model set, not only the transformers")
    parser.add_argument("--models", default="", help="comma-separated names")
    parser.add_argument("--training-only", action="store_true")
    parser.add_argument("--backends", default="eager,inductor,minifuse", type=_backends, help="the last is measured")
    options = parser.parse_args()
    entries = models.select(options.quick, not options.all, options.models)
    table = board(options.backends[-1])
    for entry in entries:
        for training in (True, False) if entry.training else (False,):
            if training or not (options.training_only and entry.training):
                try:
                    measure(table, entry, training, options.backends, rounds=7 if options.quick else 21)
                except ProbeError as error:
                    table.fail(f"{entry.name} {'training' if training else 'inference'}", error)
    summarise(table)
    return harness.finish(table, options)


def summarise(table: Board) -> None:
    """A row for training and one for inference, with the geometric means of the ratios of all of their rows."""
    for kind in ("training", "inference"):
        rows = [row for name, row in table.rows.items() if name.endswith(kind)]
        means = {c: [row[c] for row in rows if c in row] for c in ("compile ratio", "vs inductor", "vs eager")}
        if len(rows) > 1 and all(means.values()):
            name = f"geometric mean, {kind}"
            table.add(name, **{c.replace(" ", "_"): harness.geometric_mean(found) for c, found in means.items()})
            table.hold(name, {"vs inductor": Target(">=", 1.08)})


def _backends(text: str) -> list[str]:
    names = text.split(",")
    if "eager" not in names or names[-1] == "eager":
        raise argparse.ArgumentTypeError("eager and, last, the backend to measure")
    return names


if __name__ == "__main__":
    sys.exit(main())
