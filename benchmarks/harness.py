"""What the benchmarks share: timing, memory, fresh processes, and the table with its verdict.

* **Step time** is the median of interleaved rounds: every backend runs once a round, so that a slow phase of the
  machine falls on all; the spread is the distance of the quartiles.
* **Cold compile** is the first call in a fresh process with empty caches, after an eager step has warmed the libraries.
* **Peak memory** of a warm step is the kernel's count of resident pages, beyond what is resident when nothing of a step
  is left, in a fresh process where every block of 128 KB or more is a mapping of its own (`held`). It sees each tensor
  however it is cached or pooled, and pages that are given back one by one. The profiler's count would miss a pool that
  was filled before the step.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import math
import operator
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from minifuse.runtime.program import POOL

from . import models

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Sample:
    """Timings of one case: median and quartiles in seconds, of `count` runs."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Sample:
        low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (seconds[0],) * 3
        return cls(statistics.median(seconds), low, high, len(seconds))

    def __str__(self) -> str:
        """The median and half the distance of the quartiles: `12.3 ms ±2%`."""
        unit, scale = ("s", 1.0) if self.median >= 1 else ("ms", 1e3) if self.median >= 1e-3 else ("µs", 1e6)
        return f"{self.median * scale:.3g} {unit} ±{50 * (self.high - self.low) / self.median:.0f}%"


def interleaved(
    cases: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 2,
    ready: Callable[[Callable[[], Any]], Any] | None = None,
) -> dict[str, Sample]:
    """Time each case once a round, in an order that rotates, after `warmup` runs of each; `ready` is called with a case
    before each run that is timed."""
    for _ in range(warmup):
        for run in cases.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                if ready is not None:
                    ready(cases[name])
                start = time.perf_counter()
                cases[name]()
                seconds[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return {name: Sample.of(values) for name, values in seconds.items()}


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


# -- fresh processes


class ProbeError(Exception):
    """A probe's process failed; holds the end of what it wrote."""


def fresh(function: Callable[..., Any], *args: Any, env: Mapping[str, str] | None = None) -> Any:
    """`function(*args)` in a new process with empty compile caches; arguments and result travel as JSON.

    Raises:
        ProbeError: the process failed.
    """
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory, "result.json")
        caches = {
            "TORCHINDUCTOR_CACHE_DIR": f"{directory}/inductor",
            "TRITON_CACHE_DIR": f"{directory}/triton",
            "MINIFUSE_CACHE_DIR": f"{directory}/minifuse",
        }
        module = function.__module__
        if module == "__main__":
            module = Path(sys.argv[0]).relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        request = json.dumps([module, function.__name__, args, str(result)])
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.harness", request],
            cwd=ROOT,
            env={**os.environ, **caches, **(env or {})},
            capture_output=True,
            text=True,
        )
        if done.returncode or not result.exists():
            raise ProbeError(f"{function.__name__}{args}: exit {done.returncode}\n{done.stderr[-2000:]}")
        return json.loads(result.read_text())


def _serve(request: str) -> None:
    module, name, args, result = json.loads(request)
    value = getattr(importlib.import_module(module), name)(*args)
    Path(result).write_text(json.dumps(value))


def probe_cold_compile(path: str, backend: str, training: bool, layers: bool = False) -> float:
    """Seconds of the first call (first step, for training) of a compiled model, or of one whose layers are compiled.
    Run it through `fresh`."""
    models.stepper(path, "eager", training)()
    step = models.stepper(path, backend, training, layers)
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


COUNTED = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024), "MALLOC_MMAP_MAX_": "1000000"}
"""The environment of a process whose steps are counted by `held`: a block of 128 KB or more is a mapping of its own."""


def probe_peak(path: str, backend: str, training: bool) -> int | None:
    """Bytes of a warm step of a model: see `held`. None where the system does not count them. Run it through `peak`."""
    if not os.access("/proc/self/clear_refs", os.W_OK) or platform.libc_ver()[0] != "glibc":
        return None
    return held(models.stepper(path, backend, training))


def held(step: models.Step) -> int:
    """The most bytes that a warm step holds beyond what the process does when nothing of it is left, the memory that
    minifuse's pool keeps between steps included; over two steps.

    From the kernel's count of resident pages, so that pages given back one by one are not counted; what libraries and
    the compiler keep for good is not the step's. Run it in a process with `COUNTED`, where large blocks that are freed
    leave at once.
    """
    for _ in range(3):
        step()
    found = []
    for _ in range(2):
        step.clear()
        give_back(pooled=False)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        rest = _resident() - POOL.held_bytes
        step()
        found.append(_resident() - rest)
    return max(found)


def give_back(pooled: bool = True) -> None:
    """Give the system what lies idle in the C library, and in minifuse's pool."""
    gc.collect()
    if pooled:
        POOL.trim()
    ctypes.CDLL(None).malloc_trim(0)


def peak(path: str, backend: str, training: bool) -> int | None:
    """`probe_peak` in a fresh process."""
    return fresh(probe_peak, path, backend, training, env=COUNTED)


def _resident() -> int:
    """The largest resident set of this process so far, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024  # type: ignore[index]


# -- the table


@dataclass(frozen=True)
class Target:
    """What a column must hold: `<= 0.25` or `>= 1.08`."""

    compare: str
    limit: float

    def met(self, value: float) -> bool:
        return {"<=": operator.le, ">=": operator.ge}[self.compare](value, self.limit)

    def __str__(self) -> str:
        return f"{self.compare} {self.limit:.3g}"


@dataclass(frozen=True)
class Column:
    """One figure a row: its heading, how it is shown, and the target it is held to; without `shown`, for the JSON
    alone."""

    name: str
    show: Callable[[Any], str] = str
    target: Target | None = None
    shown: bool = True


def ratio(value: float) -> str:
    return f"{value:.2f}x"


def megabytes(value: float) -> str:
    return f"{value / 1e6:.4g} MB"


def seconds(value: float) -> str:
    return f"{value:.3g} s"


@dataclass
class Board:
    """A benchmark's table. A row's missing figure shows as `-` and, where the column has a target, counts as short."""

    title: str
    columns: Sequence[Column]
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    special: dict[tuple[str, str], Target] = field(default_factory=dict)

    def hold(self, row: str, targets: Mapping[str, Target]) -> None:
        """Hold a row to targets of its own, by column, in place of the columns'."""
        self.special.update({(row, column): target for column, target in targets.items()})

    def _targets(self, row: str) -> dict[str, Target]:
        own = {column: target for (name, column), target in self.special.items() if name == row}
        return own or {c.name: c.target for c in self.columns if c.target}

    def add(self, name: str, **figures: Any) -> None:
        """Add figures to the row `name`; a key is a column's name with `_` for a space."""
        row = self.rows.setdefault(name, {})
        for key, value in figures.items():
            column = next((c.name for c in self.columns if c.name.replace(" ", "_") == key), None)
            if column is None:
                raise KeyError(f"no column {key!r} in {[c.name for c in self.columns]}")
            row[column] = value

    def fail(self, name: str, error: object) -> None:
        """Note that a figure of a row could not be taken; the row counts as short."""
        self.rows.setdefault(name, {})
        self.errors[name] = str(error)

    def short(self) -> list[str]:
        """Names of the rows that miss a target."""
        return [name for name in self.rows if not self._met(name)]

    def _met(self, name: str) -> bool:
        figures = ((target, self.rows[name].get(column)) for column, target in self._targets(name).items())
        return name not in self.errors and all(value is not None and target.met(value) for target, value in figures)

    def verdict(self) -> str:
        short = self.short()
        return f"verdict: {len(short)} of {len(self.rows)} rows short: {', '.join(short)}" if short else "verdict: met"

    def print(self, console: Console) -> None:
        table = Table(title=self.title, title_justify="left")
        table.add_column("case")
        columns = [c for c in self.columns if c.shown]
        for column in columns:
            table.add_column(f"{column.name}\n{column.target or ''}", justify="right")
        for name, row in self.rows.items():
            targets = self._targets(name)
            table.add_row(name, *(self._cell(c, row.get(c.name), targets.get(c.name)) for c in columns))
        console.print(table)
        for name, error in self.errors.items():
            console.print(f"{name}: {error}", markup=False)

    @staticmethod
    def _cell(column: Column, value: Any, target: Target | None) -> str:
        if value is None:
            return "-"
        text = column.show(value) + (f" ({target})" if target and target != column.target else "")
        return f"[red]{text}[/red]" if target and not target.met(value) else text

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "title": self.title,
            "targets": {c.name: str(c.target) for c in self.columns if c.target},
            "rows": {name: {k: _plain(v) for k, v in row.items()} for name, row in self.rows.items()},
            "errors": self.errors,
            "short": self.short(),
            "verdict": self.verdict(),
            "versions": versions(),
            "machine": machine(),
        }


def _plain(value: Any) -> Any:
    return vars(value) if isinstance(value, Sample) else value


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a figure depends on."""
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "minifuse"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Processor, threads that torch uses, and the GPU where there is one."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "processor": model[1] if model else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a subset, with fewer rounds")
    parser.add_argument("--json", metavar="FILE", help="write the table, versions and machine")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a row is short")
    return parser


def finish(board: Board, options: argparse.Namespace) -> int:
    """Print the table and, as the last line, the verdict; write the JSON. Returns the exit status."""
    board.print(Console(width=None if sys.stdout.isatty() else 180))
    if options.json:
        Path(options.json).write_text(json.dumps(board.to_json(), indent=1) + "\n")
    print(board.verdict())
    return 1 if options.check and board.short() else 0


if __name__ == "__main__":
    _serve(sys.argv[1])
