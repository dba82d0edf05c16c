"""Memory-bound kernels and three models on a GPU: eager, Inductor and minifuse beside the GPU's own copy.

    python -m benchmarks.gpu [--quick] [--rows softmax,layer] [--autotune] [--tests] [--seconds 480] [--json FILE]
                             [--check]

`of copy` is the share of the bandwidth of `copy_` that a row reaches: the least bytes that it can move (each input
once, each output once) over its time. A time is the median of interleaved calls between two events, each behind a
write of 512 MB that empties the cache and lets the host run ahead. Rows with `backward` are a forward and a
backward. Ratios of time are speeds. Where there is no GPU the benchmark says so and ends.

Rows are measured in a process of their own, and another takes the rest where a row ends it: after a fault on the GPU
nothing else runs in one. `--tests` runs the GPU's tests first; what they say is in the JSON, and the exit status is
theirs where they fail. The JSON is written to FILE, else to GPU-DATE.json in $OUT or in benchmarks/results.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import harness, models
from .harness import Board, Column, Sample, Target

HALF = torch.bfloat16
FLUSH_BYTES = 512 << 20
MODELS = "bert,gpt2,llama"
RESULTS = Path(__file__).with_name("results")
TEST_SECONDS = 200.0
GRACE = 40.0
"""Seconds that the last row may take once no other starts."""


@dataclass(frozen=True)
class Row:
    """A function of tensors on the GPU. `moved`: how often the bytes of its first input are moved at least.

    `shapes` are those of its inputs; the first is the one that counts. `train` runs the backward too.
    """

    name: str
    run: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    moved: float
    dtype: torch.dtype = HALF
    train: bool = False
    quick: bool = False


def _chain(x: Tensor) -> Tensor:
    for k in range(8):
        x = x * (1.0 + k / 64)
    return x


def _residual_norm(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(residual + F.dropout(x, 0.1), (x.shape[-1],), w, b)


def _rms_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), w)


def _layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), w, b)


def _softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)


def _cross_entropy(x: Tensor) -> Tensor:
    labels = torch.arange(x.shape[0], device=x.device) * 7919 % x.shape[1]
    return F.cross_entropy(x.float(), labels)


def _rope(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = q.shape[-1] // 2
    turned = torch.cat((-q[..., half:], q[..., :half]), -1)
    return q * cos + turned * sin


def _adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> None:
    m.mul_(0.9).add_(g, alpha=0.1)
    v.mul_(0.95).addcmul_(g, g, value=0.05)
    p.mul_(1 - 3e-4 * 0.1).sub_(3e-4 * m / (v.abs().sqrt() + 1e-8))


def _adaln(x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    h = F.layer_norm(x, (x.shape[-1],)) * (1 + scale[:, None]) + shift[:, None]
    return residual + gate[:, None] * h


def _norm_rows(name: str, run: Callable[..., Tensor], vectors: int) -> tuple[Row, ...]:
    shapes = ((32768, 4096), *(((4096,),) * vectors))
    return (
        Row(f"{name} 32768x4096", run, shapes, 2, quick=True),
        Row(f"{name} 32768x4096 backward", run, shapes, 5, train=True, quick=True),
    )


ROWS = (
    Row("multiply chain", _chain, ((16384, 16384),), 2, quick=True),
    Row("bias gelu 16384x16384", lambda x, b: F.gelu(x + b), ((16384, 16384), (16384,)), 2, quick=True),
    Row("swiglu 16384x14336", lambda x, y: F.silu(x) * y, ((16384, 14336), (16384, 14336)), 3),
    Row("dropout residual layer norm 32768x1024", _residual_norm, ((32768, 1024), (32768, 1024), (1024,), (1024,)), 3),
    *_norm_rows("rms norm", _rms_norm, 1),
    *_norm_rows("layer norm", _layer_norm, 2),
    *(Row(f"softmax 8192x{n}", _softmax, ((8192, n),), 2, quick=n == 4096) for n in (1024, 4096, 16384, 131072)),
    *(Row(f"softmax 8192x{n} backward", _softmax, ((8192, n),), 5, train=True) for n in (4096, 131072)),
    Row("cross entropy 8192x128256 backward", _cross_entropy, ((8192, 128256),), 3, train=True, quick=True),
    Row("rope 8x32x4096x128", _rope, ((8, 32, 4096, 128), (4096, 128), (4096, 128)), 2),
    Row("adamw 124M", _adamw, ((124_000_000,),) * 4, 7, torch.float32),
    Row("batch norm 64x256x56x56 backward", lambda x, w, b: F.batch_norm(x, None, None, w, b, True),
        ((64, 256, 56, 56), (256,), (256,)), 7, train=True),
    Row("group norm silu 32x256x64x64", lambda x, w, b: F.silu(F.group_norm(x, 32, w, b)),
        ((32, 256, 64, 64), (256,), (256,)), 2),
    Row("adaln 64x1024x1152", _adaln, ((64, 1024, 1152), *((64, 1152),) * 3, (64, 1024, 1152)), 3),
    Row("column sum 32768x4096", lambda x: x.sum(0), ((32768, 4096),), 1, quick=True),
    Row("full sum 2^28", lambda x: x.sum(), ((1 << 28,),), 1),
    Row("transpose add 16384x16384", lambda x, y: x + y.t(), ((16384, 16384), (16384, 16384)), 3),
)  # fmt: skip


def timed(cases: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 3) -> dict[str, Sample]:
    """GPU seconds of each case, interleaved, the cache emptied before each call."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(warmup):
        for run in cases.values():
            run()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            begin.record()
            run()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: Sample.of([a.elapsed_time(b) / 1e3 for a, b in pairs]) for name, pairs in events.items()}


def compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """A function compiled by a backend; `autotune` is Inductor searching."""
    torch._dynamo.reset()
    if backend == "eager":
        return function
    if backend == "autotune":
        return torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False)
    return torch.compile(function, backend=models.resolve(backend), dynamic=False)


def step_of(row: Row, inputs: list[Tensor], backend: str) -> Callable[[], Any]:
    run = compiled(row.run, backend)
    if not row.train:
        return lambda: run(*inputs)
    gradient = torch.ones_like(row.run(*inputs))

    def step() -> None:
        torch.autograd.grad(run(*inputs), inputs, gradient)

    return step


def measure(table: Board, row: Row, backends: list[str], rounds: int) -> None:
    """Fill a row. A backend that fails leaves its figure out and its error below the table."""
    inputs = [torch.randn(s, device="cuda", dtype=row.dtype, requires_grad=row.train) for s in row.shapes]
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    cases: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source)}
    for backend in backends:
        try:
            step = step_of(row, inputs, backend)
            step()
            cases[backend] = step
        except Exception as error:
            table.fail(row.name, f"{backend}: {str(error)[-500:]}")
    times = timed(cases, rounds)
    least = row.moved * inputs[0].nbytes
    bandwidth = 2 * source.nbytes / times["copy"].median
    table.add(row.name, bytes=least, copy=bandwidth)
    report(table, row.name, backends, times)
    if backends[-1] in times:
        table.add(row.name, of_copy=least / times[backends[-1]].median / bandwidth)


def measure_model(table: Board, entry: models.Entry, training: bool, backends: list[str], rounds: int) -> None:
    """A model's step, and the largest memory that it allocates."""
    name = f"{entry.name} {'training' if training else 'inference'}"
    cases: dict[str, Callable[[], Any]] = {}
    for backend in backends:
        try:
            torch.manual_seed(0)
            torch._dynamo.reset()
            with torch.device("cuda"):
                step = models.stepper(entry.path, _named(backend), training)
            step()
            torch.cuda.reset_peak_memory_stats()
            step()
            if backend in ("inductor", backends[-1]):
                peak = {"peak" if backend == backends[-1] else "inductor_peak": torch.cuda.max_memory_allocated()}
                table.add(name, **peak)
            cases[backend] = step
        except Exception as error:
            table.fail(name, f"{backend}: {str(error)[-500:]}")
    report(table, name, backends, timed(cases, rounds))
    table.hold(name, {"vs inductor": Target(">=", 1.0)})


def _named(backend: str) -> str:
    return "inductor" if backend == "autotune" else backend


def report(table: Board, name: str, backends: list[str], times: Mapping[str, Sample]) -> None:
    ours = times.get(backends[-1])
    table.add(name, **{b: times[b] for b in backends[:-1] if b in times})
    if ours is None:
        return
    table.add(name, ours=ours)
    table.add(name, **{f"vs_{b}": times[b].median / ours.median for b in backends[:-1] if b in times})


def board(backends: list[str]) -> Board:
    others = backends[:-1]
    return Board(
        f"{torch.cuda.get_device_name()}: {backends[-1]} beside {', '.join(others)}",
        [
            Column("bytes", harness.megabytes),
            Column("copy", lambda rate: f"{rate / 1e9:.0f} GB/s"),
            *(Column(name) for name in others),
            Column("ours"),
            Column("of copy", harness.ratio, Target(">=", 0.92)),
            *(Column(f"vs {name}", harness.ratio) for name in others),
            Column("inductor peak", harness.megabytes),
            Column("peak", harness.megabytes),
        ],
    )


def jobs_of(options: argparse.Namespace) -> dict[str, tuple[Callable[..., None], tuple[Any, ...]]]:
    """What is measured, by name. Models are first: they are few, and a row left out for time is one kernel of many."""
    wanted = [part for part in options.rows.split(",") if part]
    rows = [r for r in ROWS if (any(w in r.name for w in wanted) if wanted else r.quick or not options.quick)]
    chosen = models.select(names=options.models) if options.models and not wanted else []
    found: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
        f"{entry.name} {'training' if training else 'inference'}": (measure_model, (entry, training))
        for entry in chosen
        for training in (True, False)
    }
    return found | {row.name: (measure, (row,)) for row in rows}


def serve(options: argparse.Namespace, backends: list[str]) -> None:
    """Measure the jobs that the file of records has not begun, and add a record at the begin and the end of each."""
    path = Path(options.serve)
    begun = {name for name, _ in records(path)}
    rounds = 11 if options.quick else 31
    for name, (job, what) in jobs_of(options).items():
        if name in begun:
            continue
        if time.time() > options.until:
            return
        append(path, name, None)
        table = board(backends)
        try:
            job(table, *what, backends, rounds)
            torch.cuda.synchronize()
        except Exception as error:
            table.fail(name, str(error)[-500:])
        append(path, name, (table.rows.get(name, {}), table.errors.get(name), table.special))
        torch.cuda.synchronize()  # a fault on the GPU ends this process: the next one begins with a new context
        torch.cuda.empty_cache()


def append(path: Path, name: str, made: Any) -> None:
    with path.open("ab") as file:
        pickle.dump((name, made), file)


def records(path: Path) -> list[tuple[str, Any]]:
    """(name, None) where a job began, (name, (figures, error, targets)) where it ended."""
    found = []
    with path.open("rb") as file, contextlib.suppress(EOFError, pickle.UnpicklingError):
        while True:
            found.append(pickle.load(file))
    return found


def measured(options: argparse.Namespace, backends: list[str], until: float) -> Board:
    """The table, filled by processes that begin where the one before ended, until the time is up."""
    names, table = list(jobs_of(options)), board(backends)
    with tempfile.NamedTemporaryFile(suffix=".pickle") as file:
        path, ended = Path(file.name), ""
        while time.time() < until and {n for n, _ in records(path)} < set(names):
            known = len(records(path))
            command = [
                sys.executable,
                "-m",
                "benchmarks.gpu",
                *sys.argv[1:],
                "--serve",
                file.name,
                "--until",
                str(until),
            ]
            try:
                code = subprocess.run(command, timeout=max(until + GRACE - time.time(), 1)).returncode
                ended = f"the process ended with {code}"
            except subprocess.TimeoutExpired:
                ended = "took too long"
            if len(records(path)) == known:
                break
        found = dict(records(path))
    for name in names:
        figures, error, special = found.get(name) or ({}, ended or "not run", {})
        table.rows[name] = figures
        table.special.update(special)
        if name not in found:
            error = f"not run: {options.seconds:.0f} s were up" if time.time() >= until else f"not run: {ended}"
        if error:
            table.fail(name, error)
    return table


def tested(seconds: float) -> dict[str, Any]:
    """The GPU's tests in a process of their own: exit status, what failed, and the last line."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rfE"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds)
        code, text = done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        text = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        code, text = 124, f"{text}\nstopped after {seconds:.0f} s"
    print(text, flush=True)
    lines = text.strip().splitlines() or [""]
    return {"exit": code, "failed": [x for x in lines if x.startswith(("FAILED", "ERROR"))], "last": lines[-1]}


def driver() -> str | None:
    """The version of the GPU's driver, where its tool says so."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    return None


def place(options: argparse.Namespace) -> Path:
    """Where the JSON goes."""
    if options.json:
        return Path(options.json)
    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return Path(os.environ.get("OUT") or RESULTS) / f"{gpu}-{time.strftime('%Y-%m-%d')}.json"


def main() -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--rows", default="", help="comma-separated parts of names")
    parser.add_argument("--models", default=MODELS, help="comma-separated names; empty for none")
    parser.add_argument("--autotune", action="store_true", help="Inductor's max-autotune too, which takes minutes")
    parser.add_argument("--tests", action="store_true", help="run the GPU's tests first")
    parser.add_argument("--seconds", type=float, default=480, help="no row starts after this long, tests included")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: no CUDA or ROCm device")
        if options.json:
            Path(options.json).write_text(json.dumps({"schema": 1, "skipped": "no CUDA or ROCm device"}) + "\n")
        return 0
    backends = ["eager", "inductor", *(["autotune"] if options.autotune else []), "minifuse"]
    if options.serve:
        serve(options, backends)
        return 0
    until = time.time() + options.seconds
    tests = tested(TEST_SECONDS) if options.tests else None
    table, options.json = measured(options, backends, until), str(place(options))
    status = harness.finish(table, options)
    path = Path(options.json)
    gpu = {"driver": driver(), "cuda": torch.version.cuda, "hip": torch.version.hip}
    path.write_text(json.dumps({**json.loads(path.read_text()), "gpu": gpu, "tests": tests}, indent=1) + "\n")
    print(f"written: {path}")
    if tests is not None:
        print(f"tests: exit {tests['exit']}; benchmark: exit {status}")
    return int(tests["exit"] if tests else 0) or status


if __name__ == "__main__":
    sys.exit(main())
