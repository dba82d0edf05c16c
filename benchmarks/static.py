"""Triton kernels without a GPU: what each asks of memory, and what the assembler says of it.

    python -m benchmarks.static [--quick] [--target cuda:90] [--rows softmax,norm] [--models bert,llama] [--json FILE]
                                [--check]

Every distinct kernel of the rows of `benchmarks.gpu` and of a training step of the model set, planned for an H100 and
compiled for a target: cuda:80, cuda:90, cuda:100 or hip:gfx942. A row is a kernel. Nothing is timed but compilation.

* `bytes`: asked for, in 32-byte sectors, over the least (each input once, each output once): see
  `benchmarks.requested`.
* `wide loads`, `wide stores`: the share of global accesses, by bytes asked for, that are of 128 bits or more. Not held
  where they are under a fiftieth of the kernel's bytes.
* `spilled`, `registers` (a thread), `shared`; `blocks`: how many fit a multiprocessor; `in flight`: bytes of loads that
  these have asked for before they wait for the first.
* `barriers`: that a program waits at, a reduction of a row across its threads.
* `issue`: instructions over what the processor issues while the least bytes move at the device's bandwidth: an H100
  stays bound by memory up to 49 instructions an element of float32 that is read and written (6.1 a byte), and other
  targets in proportion to their units, clock and bandwidth. `instructions` are those an element of the largest buffer.
* `last wave`: the share of the grid's rounds over the processor that is filled.

A kernel that moves its bytes in less time than its launch takes is bound by that: it is held to bytes, spills and
barriers alone (`bound`: launch).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import minifuse
from minifuse.capturing import Capture
from minifuse.ir.plan import Plan
from minifuse.options import Options
from minifuse.passes.context import CompileContext
from minifuse.runtime.triton_launch import Interpreted, Launched

from . import gpu, harness, models, requested
from .assembled import TARGETS, Assembled, assembled, gpu_target
from .harness import Board, Column, ProbeError, Target

OPTIONS = {"target": "triton", "device_model": "H100"}
MATTERS = 0.02
FLIGHT = 28 << 10


@dataclass(frozen=True)
class Processor:
    """What a target's largest chip has: multiprocessors, and what one holds of threads, programs, bytes of shared
    memory and 32-bit registers a lane of `simds`; the bytes/s of its memory, and instructions a byte that it issues
    meanwhile."""

    name: str
    units: int
    warp: int
    warps: int
    programs: int
    shared: int
    registers: int
    bandwidth: float
    issue: float

    def resident(self, a: Assembled) -> int:
        """How many programs a multiprocessor holds at once."""
        warps = a.threads // self.warp
        a_warp = -(-max(a.registers, 16) // 8) * 8 * self.warp
        fits = [self.programs, self.warps // warps, self.registers // (a_warp * warps)]
        if a.shared:
            fits.append(self.shared // (a.shared + 1024))
        return max(min(fits), 0)


# CUDA C++ Programming Guide, "Compute Capabilities": 64 warps, 32 programs and 64K registers a multiprocessor, 164 and
# 228 KB of shared memory; AMD CDNA3 ISA reference: 4 SIMDs of 8 waves, 512 registers of 64 lanes each, 64 KB. Units,
# clocks and bandwidths of the data sheets (`minifuse.ir.device`). One instruction a cycle and quarter of a unit, of
# which an H100 reaches 0.69 beside full bandwidth (49 instructions a float32 read and written, measured).
def _processor(name: str, units: int, clock: float, bandwidth: float, shared: int = 228 << 10) -> Processor:
    return Processor(name, units, 32, 64, 32, shared, 65_536, bandwidth, 0.69 * units * 128 * clock / bandwidth)


PROCESSORS = {
    "cuda:80": _processor("A100", 108, 1.41e9, 2.04e12, 164 << 10),
    "cuda:90": _processor("H100", 132, 1.755e9, 3.35e12),
    "cuda:100": _processor("B200", 148, 1.965e9, 7.7e12),
    "hip:gfx942": Processor("MI300X", 304, 64, 32, 32, 64 << 10, 131_072, 5.3e12, 0.69 * 304 * 256 * 2.1e9 / 5.3e12),
}


# -- cases ------------------------------------------------------------------------------------------
Case = tuple[str, str]
"""A kind, "row" or "model", and a name."""


def cases(options: argparse.Namespace) -> list[Case]:
    wanted = [w for w in options.rows.split(",") if w]
    rows = [r.name for r in gpu.ROWS if any(w in r.name for w in wanted) or not (wanted or options.models)]
    found = [("row", name) for name in rows]
    if options.models or not (options.quick or wanted):
        paths = [name for name in options.models.split(",") if ":" in name]
        found += [("model", path) for path in paths]
        if not paths:
            found += [("model", entry.name) for entry in models.select(options.quick, names=options.models)]
    return found


def captured(case: Case) -> list[Capture]:
    """The graphs of a case, planned; nothing of them runs but the operators of a model, by ATen."""
    kind, name = case
    if ":" in name:
        model, args, kwargs = models.load(name)
        return [minifuse.capture(model, *args, compile_options=OPTIONS, **kwargs)]
    if kind == "model":
        entry = models.MODELS[name]
        model, args, kwargs = models.load(entry.path)
        torch._dynamo.reset()
        if not entry.training:
            return minifuse.captures(model, *args, compile_options=OPTIONS, **kwargs)
        return minifuse.captures(models.Loss(model.train()), *args, compile_options=OPTIONS, **kwargs)
    row = next(r for r in gpu.ROWS if r.name == name)
    tensors = [torch.empty(s, dtype=row.dtype, requires_grad=row.train) for s in row.shapes]
    with torch.set_grad_enabled(row.train):
        return [minifuse.capture(row.run, *tensors, compile_options=OPTIONS)]


def planned(case: Case) -> Iterator[tuple[str, Plan, CompileContext]]:
    for k, graph in enumerate(captured(case)):
        for stage, plan in graph.plans.items():
            yield f"{stage}{k or ''}", plan, CompileContext(plan.name, stage, Options.parse(OPTIONS))


def probe_requested(which: list[Case]) -> dict[str, Any]:
    """What the kernels of some cases ask for, by kernel. Run it through `fresh` with `requested.INTERPRETED`."""
    watch = requested.Watch()
    found: dict[str, Any] = {}
    for case in which:
        for _, plan, ctx in planned((case[0], case[1])):
            for name, one, _ in requested.launches(plan, ctx, Interpreted):
                key = f"{case[1]} {name}"
                if key not in found:
                    watch.prepare(sys.modules[one.function.fn.__module__])
                    try:
                        found[key] = requested.count(watch, plan, one)
                    except Exception as why:  # the row is short, and says why
                        found[key] = {"error": f"{type(why).__name__}: {why}"}
    return found


# -- the table --------------------------------------------------------------------------------------
def board(target: str) -> Board:
    return Board(
        f"Triton kernels compiled for {target} ({PROCESSORS[target].name}), not run",
        [
            Column("least", harness.megabytes),
            Column("bytes", "{:.3f}x".format, Target("<=", 1.02)),
            Column("wide loads", "{:.1%}".format, Target(">=", 0.99)),
            Column("wide stores", "{:.1%}".format, Target(">=", 0.95)),
            Column("spilled", str, Target("<=", 0)),
            Column("registers"),
            Column("shared"),
            Column("blocks", str, Target(">=", 2)),
            Column("in flight", lambda b: f"{b / 1024:.1f} KB", Target(">=", FLIGHT)),
            Column("barriers", "{:.2g}".format, Target("<=", 3)),
            Column("instructions", "{:.1f}".format),
            Column("issue", "{:.2f}".format, Target("<=", 0.8)),
            Column("last wave", "{:.1%}".format, Target(">=", 0.8)),
            Column("compile", harness.seconds),
            Column("bound"),
            Column("schedule", shown=False),
            Column("held", shown=False),
        ],
    )


def last_wave(programs: float, units: int, resident: int) -> float:
    """The share of the rounds of a grid that is filled: rounds of as many programs as fit at once, or as there are
    multiprocessors where not all of those have one."""
    at_once = units * max(resident, 1) if programs > units * max(resident, 1) else units
    rounds = programs / at_once
    return rounds / -(-programs // at_once) if rounds else 0.0


def figures(
    one: Launched, plan: Plan, a: Assembled, asked: dict[str, Any], p: Processor, source: str
) -> dict[str, Any]:
    """The row of a kernel."""
    keys = ("read", "written", "unmasked read", "unmasked written", "lanes")
    read, written, read_whole, written_whole, lanes = ({int(k): v for k, v in asked[key].items()} for key in keys)
    often = a.executions(lanes, requested.loops_of(Path(source).read_text(), one.kernel.name))
    issued = sum(often) * a.threads * asked["programs"]
    resident = p.resident(a)
    largest = max(plan.hint(plan.buffers[b].nbytes) // plan.buffers[b].dtype.itemsize for b in one.step.binding)
    row: dict[str, Any] = {
        "least": asked["least"],
        "bytes": asked["requested"] / asked["least"],
        "wide_loads": a.wide(False, read, read_whole),
        "wide_stores": a.wide(True, written, written_whole),
        "spilled": a.spilled,
        "registers": a.registers,
        "shared": a.shared,
        "blocks": resident,
        "in_flight": resident * a.threads * a.in_flight,
        "instructions": issued / len(one.step.sizes) / largest,
        "issue": issued / (asked["least"] * p.issue),
        "last_wave": last_wave(asked["programs"], p.units, resident),
        "bound": "launch" if asked["least"] / p.bandwidth < 3e-6 else "memory",
        "schedule": f"{one.step.schedule}; {one.kernel.warps} warps",
    }
    for name, nbytes in (("wide_loads", read), ("wide_stores", written)):
        if sum(nbytes.values()) < MATTERS * asked["requested"]:
            row[name] = None
    if asked["reductions"]:
        row["barriers"] = sum(n for n, i in zip(often, a.code, strict=True) if i.barrier) / asked["reductions"]
    return {name: figure for name, figure in row.items() if figure is not None}


def hold(table: Board, name: str) -> None:
    """Hold a kernel to what is asked of it: bytes in flight or else two programs, and where a launch takes longer than
    its bytes nothing that makes these fast."""
    row = table.rows[name]
    targets = {c.name: c.target for c in table.columns if c.target and c.name in row}
    del targets["in flight" if row["blocks"] >= 2 else "blocks"]
    if row["bound"] == "launch":
        targets = {k: t for k, t in targets.items() if k in ("bytes", "spilled", "barriers")}
    table.hold(name, targets)
    row["held"] = list(targets)


def measure(table: Board, case: Case, asked: dict[str, Any], target: str) -> None:
    for stage, plan, ctx in planned(case):
        every = list(requested.launches(plan, ctx, Launched))

        def made(item: tuple[str, Launched, str]) -> tuple[Any, float]:
            begin = time.perf_counter()
            try:
                return item[1].compile(item[1].usual(), gpu_target(target)), time.perf_counter() - begin
            except Exception as why:  # what the compiler refuses is a row that is short
                return why, 0.0

        with ThreadPoolExecutor(2) as pool:
            compiled = list(pool.map(made, every))
        for (kernel, one, source), (result, took) in zip(every, compiled, strict=True):
            name = f"{case[1]} {stage} {one.step.name}"
            found = asked.get(f"{case[1]} {kernel}", {"error": "not counted"})
            if isinstance(result, Exception) or "error" in found:
                table.fail(name, result if isinstance(result, Exception) else found["error"])
                continue
            a = assembled(result, source)
            table.add(name, **figures(one, plan, a, found, PROCESSORS[target], source), compile=took)
            hold(table, name)


def main() -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--target", default="cuda:90", choices=TARGETS)
    parser.add_argument("--rows", default="", help="comma-separated parts of the names of rows of benchmarks.gpu")
    parser.add_argument("--models", default="", help="comma-separated names, or MODULE:CALLABLE")
    options = parser.parse_args()
    folder = tempfile.TemporaryDirectory()
    os.environ["TRITON_CACHE_DIR"] = folder.name  # what is compiled is timed
    table = board(options.target)
    every = cases(options)
    parts = [[c for c in every if c[0] == "row"], *([c] for c in every if c[0] == "model")]
    for part in filter(None, parts):
        try:
            asked = harness.fresh(probe_requested, part, env=requested.INTERPRETED)
        except ProbeError as error:
            for case in part:
                table.fail(case[1], error)
            continue
        for case in part:
            measure(table, case, asked, options.target)
    return harness.finish(table, options)


if __name__ == "__main__":
    sys.exit(main())
