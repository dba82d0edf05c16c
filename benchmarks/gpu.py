"""Memory-bound kernels and three models on a GPU: eager, Inductor and minifuse beside the GPU's own copy.

    python -m benchmarks.gpu [--quick] [--rows softmax,layer] [--autotune] [--seconds 330] [--json FILE] [--check]

`of copy` is the share of the bandwidth of `copy_` that a row reaches: the least bytes that it can move (each input
once, each output once) over its time. A time is the median of interleaved calls between two events, each behind a
write of 512 MB that empties the cache and lets the host run ahead. Rows with `backward` are a forward and a
backward. Ratios of time are speeds. Where there is no GPU the benchmark says so and ends.
"""

from __future__ import annotations

import json
import sys
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


def main() -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--rows", default="", help="comma-separated parts of names")
    parser.add_argument("--models", default=MODELS, help="comma-separated names; empty for none")
    parser.add_argument("--autotune", action="store_true", help="Inductor's max-autotune too, which takes minutes")
    parser.add_argument("--seconds", type=float, default=330, help="no row starts after this long")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: no CUDA or ROCm device")
        if options.json:
            Path(options.json).write_text(json.dumps({"schema": 1, "skipped": "no CUDA or ROCm device"}) + "\n")
        return 0
    backends = ["eager", "inductor", *(["autotune"] if options.autotune else []), "minifuse"]
    table, started = board(backends), time.monotonic()
    rounds = 11 if options.quick else 31
    wanted = [part for part in options.rows.split(",") if part]
    rows = [r for r in ROWS if (any(w in r.name for w in wanted) if wanted else r.quick or not options.quick)]
    chosen = models.select(names=options.models) if options.models and not wanted else []
    # the models first: they are few, and a row that is left out for time is a kernel among many
    jobs: list[tuple[str, Callable[..., None], tuple[Any, ...]]] = [
        (f"{entry.name} {'training' if training else 'inference'}", measure_model, (entry, training))
        for entry in chosen
        for training in (True, False)
    ]
    jobs += [(row.name, measure, (row,)) for row in rows]
    for name, job, what in jobs:
        if time.monotonic() - started > options.seconds:
            table.fail(name, f"not run: {options.seconds:.0f} s were up")
            continue
        try:
            job(table, *what, backends, rounds)
        except Exception as error:
            table.fail(name, str(error)[-500:])
        torch.cuda.empty_cache()
    return harness.finish(table, options)


if __name__ == "__main__":
    sys.exit(main())
