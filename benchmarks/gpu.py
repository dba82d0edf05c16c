"""Memory-bound kernels and models on a GPU: eager, Inductor and minifuse beside the GPU's own copy.

    python -m benchmarks.gpu [--quick] [--rows softmax,layer] [--models bert_base] [--autotune] [--tests]
                             [--warm 4] [--profile 4] [--seconds 480] [--json FILE] [--check]

Each compiled row's results are compared with eager's first, a model's in inference. `of copy` is the share of the
bandwidth of `copy_` that a row reaches: the least bytes that it can move (each input once, each output once) over its
time. A time is the median of interleaved calls between two events, each behind a write of 512 MB that empties the cache
and lets the host run ahead. Rows with `backward` are a forward and a backward. Ratios of time are speeds. Where there
is no GPU the benchmark says so and ends.

Rows are measured in a process of their own, and another takes the rest where a row ends it: after a fault on the GPU
nothing else runs in one. `--tests` runs the GPU's tests first; what they say is in the JSON, and the exit status is
theirs where they fail. With `--warm N` as many processes compile all rows first, beside each other, so that the one
that measures finds their kernels on the disk. The JSON also holds each row's kernels with their time, as the device
tells it, of Inductor and of minifuse; `--profile N` has Nsight Compute say what bounds the N worst rows. All is written
to FILE, else to GPU-DATE.json in $OUT or in benchmarks/results, and what the profiler says beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from minifuse.runtime import triton_tune

from . import gpu_models, harness, launches, models
from .harness import Board, Column, Sample, Target

HALF = torch.bfloat16
FLUSH_BYTES = 512 << 20
RESULTS = Path(__file__).with_name("results")
TEST_SECONDS = 200.0
WARM_SHARE = 0.4
"""Of the time that is left, what compiling ahead may take."""
PROFILED, MOST_KERNELS = 5, 40
PROFILE_SECONDS = 15.0
NSIGHT = "SpeedOfLight MemoryWorkloadAnalysis Occupancy LaunchStats WarpStateStats InstructionStats".split()
TOLERANCE = 3e-2
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
    drawn: bool = False  # random numbers are its own: not compared with eager's


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
    Row("dropout residual layer norm 32768x1024", _residual_norm, ((32768, 1024), (32768, 1024), (1024,), (1024,)), 3,
        drawn=True),
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
    return {name: Sample.of(found) for name, found in triton_tune.timed(cases, rounds, warmup, FLUSH_BYTES).items()}


def compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """A function compiled by a backend; `autotune` is Inductor searching."""
    torch._dynamo.reset()
    if backend == "eager":
        return function
    if backend == "autotune":
        return torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False)
    return torch.compile(function, backend=models.resolve(backend), dynamic=False)


def inputs_of(row: Row) -> list[Tensor]:
    return [torch.randn(s, device="cuda", dtype=row.dtype, requires_grad=row.train) for s in row.shapes]


def step_of(row: Row, inputs: list[Tensor], backend: str) -> Callable[[], Any]:
    run = compiled(row.run, backend)
    if not row.train:
        return lambda: run(*inputs)
    torch.manual_seed(0)
    gradient = torch.randn_like(row.run(*inputs))  # not ones: of a batch norm they give no gradient

    return lambda: torch.autograd.grad(run(*inputs), inputs, gradient)


def leaves(result: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    return [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]


def compare(found: Any, expected: Any) -> None:
    """Raise ValueError where results are further from eager's than rounding to bfloat16 takes them."""
    for a, b in zip(leaves(found), leaves(expected), strict=True):
        if a.is_floating_point():
            off = float((a.double() - b.double()).norm() / b.double().norm())
            if not off <= TOLERANCE:
                raise ValueError(f"a result of {list(a.shape)} is {off:.2g} off eager's, relative to its norm")


Kernels = dict[str, list[tuple[str, float, float]]]


def measure(table: Board, row: Row, backends: list[str], rounds: int) -> Kernels:
    """Fill a row. A backend that fails leaves its figure out and its error below the table."""
    inputs = inputs_of(row)
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    cases: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source)}
    for backend in backends:
        try:
            step = step_of(row, inputs, backend)
            if backend == "eager" or row.drawn or row.dtype is not HALF:
                step()
            else:
                compare(step(), cases["eager"]())
            cases[backend] = step
        except Exception as error:
            table.fail(row.name, failure(backend, error))
    times = timed(cases, rounds)
    least = row.moved * inputs[0].nbytes
    bandwidth = 2 * source.nbytes / times["copy"].median
    table.add(row.name, bytes=least, copy=bandwidth)
    report(table, row.name, backends, times)
    if backends[-1] in times:
        table.add(row.name, of_copy=least / times[backends[-1]].median / bandwidth)
    return {name: kernels_of(run) for name, run in cases.items() if name in backends[1:]}


def kernels_of(step: Callable[[], Any]) -> list[tuple[str, float, float]]:
    """The kernels of a step, slowest first: name, launches a step, seconds a step."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(PROFILED):
            step()
        torch.cuda.synchronize()
    found = [
        (event.key[:100], event.count / PROFILED, event.self_device_time_total / 1e6 / PROFILED)
        for event in profiler.key_averages()
        if event.self_device_time_total
    ]
    return sorted(found, key=lambda kernel: -kernel[2])[:MOST_KERNELS]


def failure(backend: str, error: Exception) -> str:
    """An error as the table shows it; where it came from is printed."""
    traceback.print_exception(error)
    return f"{backend}: {type(error).__name__}: {str(error)[-500:]}"


def measure_model(table: Board, entry: models.Entry, training: bool, backends: list[str], rounds: int) -> Kernels:
    """A model's step, and the largest memory that it allocates."""
    name = f"{entry.name} {'training' if training else 'inference'}"
    cases: dict[str, Callable[[], Any]] = {}
    for backend in backends:
        try:
            torch.manual_seed(0)
            torch._dynamo.reset()
            with torch.device("cuda"):
                step = models.stepper(entry.path, _named(backend), training)
            if backend == "eager" or training:
                step()
            else:
                compare(step(), cases["eager"]())
            torch.cuda.reset_peak_memory_stats()
            step()
            if backend in ("inductor", backends[-1]):
                peak = {"peak" if backend == backends[-1] else "inductor_peak": torch.cuda.max_memory_allocated()}
                table.add(name, **peak)
            cases[backend] = step
        except Exception as error:
            table.fail(name, failure(backend, error))
    report(table, name, backends, timed(cases, rounds))
    table.hold(name, {"vs inductor": Target(">=", 1.0)})
    return {backend: kernels_of(step) for backend, step in cases.items() if backend in backends[1:]}


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


def jobs_of(options: argparse.Namespace) -> dict[str, tuple[Callable[..., Kernels], tuple[Any, ...]]]:
    """What is measured, by name."""
    wanted = [part for part in options.rows.split(",") if part]
    rows = [r for r in ROWS if (any(w in r.name for w in wanted) if wanted else r.quick or not options.quick)]
    if unknown := [name for name in options.models.split(",") if name and name not in gpu_models.MODELS]:
        raise SystemExit(f"no model {', '.join(unknown)}; models: {', '.join(gpu_models.MODELS)}")
    chosen = [] if wanted else [gpu_models.MODELS[name] for name in options.models.split(",") if name]
    steps: dict[str, tuple[Callable[..., Kernels], tuple[Any, ...]]] = {
        f"{entry.name} {'training' if training else 'inference'}": (measure_model, (entry, training))
        for entry in chosen
        for training in (True, False)
    }
    return {row.name: (measure, (row,)) for row in rows} | steps


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
        begin = time.time()
        table, kernels = board(backends), {}
        try:
            kernels = job(table, *what, backends, rounds)
            torch.cuda.synchronize()
        except Exception as error:
            table.fail(name, failure(name, error))
        append(path, name, (table.rows.get(name, {}), table.errors.get(name), table.special, kernels))
        print(f"{name}: {time.time() - begin:.1f} s", flush=True)
        torch.cuda.synchronize()  # a fault on the GPU ends this process: the next one begins with a new context
        torch.cuda.empty_cache()


def append(path: Path, name: str, made: Any) -> None:
    with path.open("ab") as file:
        pickle.dump((name, made), file)


def records(path: Path) -> list[tuple[str, Any]]:
    """(name, None) where a job began, (name, (figures, error, targets, kernels)) where it ended."""
    found = []
    with path.open("rb") as file, contextlib.suppress(EOFError, pickle.UnpicklingError):
        while True:
            found.append(pickle.load(file))
    return found


def again(*extra: str) -> list[str]:
    """The command of another process of this benchmark."""
    return [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:], *extra]


def warm_up(options: argparse.Namespace, until: float) -> float:
    """Compile all rows in processes beside each other, until the time is up; the seconds that it took."""
    begin = time.time()
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    parts = [
        subprocess.Popen(again("--compile", str(k), "--until", str(until)), env=environment)
        for k in range(options.warm)
    ]
    for part in parts:
        try:
            part.wait(max(until + GRACE - time.time(), 1))
        except subprocess.TimeoutExpired:
            part.kill()
            part.wait()
    return time.time() - begin


def compile_part(options: argparse.Namespace, backends: list[str]) -> None:
    """Run one of `--warm` parts of the rows once, for what that leaves on the disk."""
    for name, (_, what) in list(jobs_of(options).items())[options.compile :: options.warm]:
        for backend in backends[1:]:
            if time.time() > options.until:
                return
            try:
                if isinstance(what[0], Row):
                    row = what[0]
                    inputs = inputs_of(row)
                    step_of(row, inputs, backend)()
                else:
                    torch._dynamo.reset()
                    with torch.device("cuda"):
                        models.stepper(what[0].path, _named(backend), what[1])()
                torch.cuda.synchronize()
            except Exception as error:
                print(f"compiled ahead: {name}: {failure(backend, error)}", file=sys.stderr)
            inputs = []
            torch.cuda.empty_cache()


def measured(options: argparse.Namespace, backends: list[str], until: float) -> tuple[Board, dict[str, Kernels]]:
    """The table and the kernels of each row, filled by processes that begin where the one before ended, until the time
    is up."""
    names, table, kernels = list(jobs_of(options)), board(backends), {}
    with tempfile.NamedTemporaryFile(suffix=".pickle") as file:
        path, ended = Path(file.name), ""
        while time.time() < until and {n for n, _ in records(path)} < set(names):
            known = len(records(path))
            command = again("--serve", file.name, "--until", str(until))
            try:
                code = subprocess.run(command, timeout=max(until + GRACE - time.time(), 1)).returncode
                ended = f"the process ended with {code}"
            except subprocess.TimeoutExpired:
                ended = "took too long"
            if len(records(path)) == known:
                break
        found = dict(records(path))
    for name in names:
        figures, error, special, kernels[name] = found.get(name) or ({}, ended or "not run", {}, {})
        table.rows[name] = figures
        table.special.update(special)
        if name not in found:
            error = f"not run: {options.seconds:.0f} s were up" if time.time() >= until else f"not run: {ended}"
        if error:
            table.fail(name, error)
    return table, kernels


def nsight(table: Board, count: int, path: Path, until: float) -> None:
    """What Nsight Compute says of the kernels of the rows furthest from a copy, written to a file."""
    tool = shutil.which("ncu")
    if tool is None:
        print("Nsight Compute (ncu) is not there: nothing is profiled")
        return
    far = {name: row["of copy"] for name, row in table.rows.items() if "of copy" in row}
    sections = [word for section in NSIGHT for word in ("--section", section)]
    with path.open("w") as file:
        for name in sorted(far, key=far.__getitem__)[:count]:
            if time.time() > until:
                break
            kernels = ["--kernel-name", "regex:^k_", "--launch-count", "8", "--clock-control", "none"]
            file.write(f"== {name}: {far[name]:.2f} of a copy\n")
            file.flush()
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run([tool, *sections, *kernels, *again("--once", name)], stdout=file,
                               stderr=subprocess.STDOUT, timeout=max(until + GRACE - time.time(), 1))  # fmt: skip
    print(f"written: {path}")


def once(name: str) -> None:
    """A row's step by minifuse, twice."""
    row = next(row for row in ROWS if row.name == name)
    inputs = inputs_of(row)
    step = step_of(row, inputs, "minifuse")
    for _ in range(2):
        step()
    torch.cuda.synchronize()


def launching() -> dict[str, float] | str:
    """Microseconds of the host a kernel, by launcher, from a process of its own; or what went wrong."""
    try:
        return {name: 1e6 * s for name, s in harness.fresh(probe_launches).items()}
    except harness.ProbeError as error:
        return str(error)


def probe_launches() -> dict[str, float]:
    """`launches.measure` on the current GPU. Run it through `fresh`."""
    return launches.measure(torch.device("cuda", torch.cuda.current_device()))


def tested(seconds: float) -> dict[str, Any]:
    """The GPU's tests in a process of their own: exit status, what failed, and the last line."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-rfE", "--durations=5", "--show-capture=no"]
    if importlib.util.find_spec("xdist") is not None and (os.cpu_count() or 1) >= 8:
        command += ["-n", "6"]
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
    parser.add_argument("--models", default=",".join(gpu_models.MODELS), help="comma-separated names; empty for none")
    parser.add_argument("--autotune", action="store_true", help="Inductor's max-autotune too, which takes minutes")
    parser.add_argument("--tests", action="store_true", help="run the GPU's tests first")
    parser.add_argument("--warm", type=int, default=0, metavar="N", help="processes that compile all rows first")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="rows that Nsight Compute looks at")
    parser.add_argument("--seconds", type=float, default=480, help="no row starts after this long, tests included")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--once", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: no CUDA or ROCm device")
        if options.json:
            Path(options.json).write_text(json.dumps({"schema": 1, "skipped": "no CUDA or ROCm device"}) + "\n")
        return 0
    backends = ["eager", "inductor", *(["autotune"] if options.autotune else []), "minifuse"]
    if options.once:
        once(options.once)
        return 0
    if options.compile is not None:
        compile_part(options, backends)
        return 0
    if options.serve:
        serve(options, backends)
        return 0
    begin = time.time()
    until = begin + options.seconds
    with ThreadPoolExecutor() as pool:  # what is tested and what is compiled ahead are not timed: beside each other
        testing = pool.submit(tested, TEST_SECONDS) if options.tests else None
        ahead = warm_up(options, begin + WARM_SHARE * options.seconds) if options.warm else None
    tests = testing.result() if testing else None
    (table, kernels), options.json = measured(options, backends, until), str(place(options))
    status = harness.finish(table, options)
    path = Path(options.json)
    gpu = {"driver": driver(), "cuda": torch.version.cuda, "hip": torch.version.hip}
    more = {"gpu": gpu, "tests": tests, "compiled_ahead_seconds": ahead, "kernels": kernels, "launch_us": launching()}
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}, indent=1) + "\n")
    print(f"written: {path}")
    print(f"microseconds a launch: {more['launch_us']}")
    if options.profile:
        nsight(table, options.profile, path.with_suffix(".ncu.txt"), time.time() + PROFILE_SECONDS * options.profile)
    if tests is not None:
        print(f"tests: exit {tests['exit']}; benchmark: exit {status}")
    return int(tests["exit"] if tests else 0) or status


if __name__ == "__main__":
    sys.exit(main())
