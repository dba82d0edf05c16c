"""Seconds to compile: the first call in a fresh process, again in that process, and in the next process.

    python -m benchmarks.compile_time [--quick] [--models bert,gpt2] [--json FILE] [--check]

A training step of each model (a call, where it is not trained). `cold` starts with empty caches; `again` is the same
process after `torch.compiler.reset()`; `warm` is a new process with the caches that the cold one left. `dynamo alone`
and `aot alone` (`aot_eager`, Dynamo and AOT autograd) are what capture takes. `layers` compiles the layers of each
stack and not the model (regional compilation), also from empty caches: equal layers are compiled once. `a kernel` is
the time of the C compiler over the kernels that it was given; `ours` is all of minifuse's own phases but for that and
what torch traces (`decompose`, operators taken apart), and the last column names them all. How planning grows with the
graph is `benchmarks.growth`.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from typing import Any

import torch

import minifuse

from . import harness, models
from .harness import Board, Column, ProbeError, Target

BACKENDS = ("dynamo", "aot_eager", "inductor", "minifuse")
THEIRS = ("dynamo", "aot", "decompose", "compile", "warm start")


def milliseconds(value: float) -> str:
    return f"{1e3 * value:.3g} ms"


def board() -> Board:
    return Board(
        "Seconds to compile a training step",
        [
            Column("dynamo alone", harness.seconds),
            Column("aot alone", harness.seconds),
            Column("inductor cold", harness.seconds),
            Column("cold", harness.seconds),
            Column("cold ratio", harness.ratio, Target("<=", 1 / 6)),
            Column("over aot ratio", harness.ratio, Target("<=", 1.3)),
            Column("inductor warm", harness.seconds),
            Column("warm", harness.seconds),
            Column("warm ratio", harness.ratio, Target("<=", 1.0)),
            Column("over dynamo ratio", harness.ratio, Target("<=", 1.3)),
            Column("inductor again", harness.seconds),
            Column("again", harness.seconds),
            Column("inductor layers", harness.seconds),
            Column("layers", harness.seconds),
            Column("a kernel", milliseconds, Target("<=", 0.02)),
            Column("ours", harness.seconds, Target("<=", 1.0)),
            Column("phases"),
        ],
    )


def probe(path: str, backend: str, training: bool) -> dict[str, Any]:
    """Seconds of the first call, and of the first after a reset; minifuse's own phases. Run it through `fresh`."""
    models.stepper(path, "eager", training)()
    found: dict[str, Any] = {}
    for what in ("first", "again"):
        torch.compiler.reset()
        step = models.stepper(path, backend, training)
        start = time.perf_counter()
        step()
        found[what] = time.perf_counter() - start
        if what == "first":
            seconds: dict[str, float] = {}
            for r in minifuse.reports():
                for phase, s in r.seconds.items():
                    seconds[phase] = seconds.get(phase, 0.0) + s
            units = [r.record.stages["unit"] for r in minifuse.reports() if "unit" in r.record.stages]
            kernels = {name for unit in units for name in re.findall(r"\bk_[0-9a-f]{16}\b", unit.source)}
            compiler = sum(r.record.stages.get("compiler seconds", 0.0) for r in minifuse.reports())
            found |= {"seconds": seconds, "kernels": len(kernels), "compiler": compiler}
    return found


def layers_of(entry: models.Entry, backend: str) -> float | None:
    """Seconds of a cold start where each layer is compiled by itself; None of a model without."""
    if not models.compile_layers(models.load(entry.path)[0], "eager"):
        return None
    return harness.fresh(harness.probe_cold_compile, entry.path, backend, entry.training, True)


def measure(table: Board, entry: models.Entry, backends: tuple[str, ...]) -> None:
    """Fill the row of one model. Raises ProbeError."""
    found: dict[str, dict[str, Any]] = {}
    for backend in backends:
        with tempfile.TemporaryDirectory() as kept:
            caches = {f"{name}_CACHE_DIR": f"{kept}/{name}" for name in ("TORCHINDUCTOR", "TRITON", "MINIFUSE")}
            found[backend] = harness.fresh(probe, entry.path, backend, entry.training, env=caches)
            if backend in ("inductor", "minifuse"):
                warm = harness.fresh(probe, entry.path, backend, entry.training, env=caches)
                found[backend]["warm"] = warm["first"]
                found[backend]["layers"] = layers_of(entry, backend)
    ours = found["minifuse"]
    own = {phase: s for phase, s in ours["seconds"].items() if phase not in THEIRS}
    dynamo, aot = found["dynamo"]["first"], found["aot_eager"]["first"]
    spent = sorted(ours["seconds"].items(), key=lambda item: -item[1])
    table.add(
        entry.name,
        dynamo_alone=dynamo,
        aot_alone=aot,
        cold=ours["first"],
        over_aot_ratio=ours["first"] / aot,
        warm=ours["warm"],
        over_dynamo_ratio=ours["warm"] / dynamo,
        again=ours["again"],
        layers=ours["layers"],
        a_kernel=ours["compiler"] / max(ours["kernels"], 1),
        ours=sum(own.values()),
        phases=", ".join(f"{phase} {1e3 * s:.0f} ms" for phase, s in spent if s >= 0.01),
    )
    if "inductor" in found:
        theirs = found["inductor"]
        table.add(
            entry.name,
            inductor_cold=theirs["first"],
            cold_ratio=ours["first"] / theirs["first"],
            inductor_warm=theirs["warm"],
            warm_ratio=ours["warm"] / theirs["warm"],
            inductor_again=theirs["again"],
            inductor_layers=theirs["layers"],
        )


def main() -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--models", default="", help="comma-separated names")
    parser.add_argument("--without-inductor", action="store_true")
    options = parser.parse_args()
    table = board()
    backends = tuple(b for b in BACKENDS if b != "inductor" or not options.without_inductor)
    for entry in models.select(options.quick, names=options.models):
        try:
            measure(table, entry, backends)
        except ProbeError as error:
            table.fail(entry.name, error)
    return harness.finish(table, options)


if __name__ == "__main__":
    sys.exit(main())
