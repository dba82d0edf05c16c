"""What the examples share: compiling with a backend by name, training side by side, and minifuse's own account."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


def compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """`torch.compile` by the backend's name; `eager` is the function itself."""
    return function if backend == "eager" else torch.compile(function, backend=backend)


@dataclass
class Run:
    """One training run: its losses and the seconds of its steps; the first step includes compiling."""

    name: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        """Seconds of the first step."""
        return self.seconds[0]

    @property
    def step(self) -> float:
        """Median seconds of a later step."""
        later = sorted(self.seconds[2:]) or self.seconds
        return later[len(later) // 2]

    def __str__(self) -> str:
        return (
            f"{self.name:10} loss {self.losses[0]:.4f} -> {self.losses[-1]:.4f}   "
            f"first step {self.first:6.2f} s   step {1e3 * self.step:7.1f} ms"
        )


def train(
    name: str, model: nn.Module, loss: Callable[..., Tensor], batches: Iterable[tuple[Any, ...]], rate: float = 1e-3
) -> Run:
    """Train with AdamW on each batch in turn: `loss(model, *batch)`, compiled by the backend `name`."""
    model = copy.deepcopy(model).train()
    step_loss = compiled(loss, name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    run = Run(name)
    for batch in batches:
        start = time.perf_counter()
        optimizer.zero_grad()
        value = step_loss(model, *batch)
        value.backward()
        optimizer.step()
        run.losses.append(value.item())
        run.seconds.append(time.perf_counter() - start)
    return run


def compare(
    backend: str, model: nn.Module, loss: Callable[..., Tensor], batches: list[tuple[Any, ...]], rate: float = 1e-3
) -> None:
    """Train one model on the same batches eager and compiled; print both, and the largest gap of their losses."""
    eager, other = (train(name, model, loss, batches, rate) for name in ("eager", backend))
    print(eager)
    print(other)
    gap = max(abs(a - b) / abs(a) for a, b in zip(eager.losses, other.losses))
    print(f"losses agree to {gap:.1e}; a step is {eager.step / other.step:.2f}x eager's speed")
    print_reports(backend)


def reports(backend: str) -> list[Any]:
    """minifuse's report on each graph that it has compiled; none for another backend."""
    return importlib.import_module("minifuse").reports() if backend == "minifuse" else []


def print_reports(backend: str) -> None:
    """A line for each graph: kernels and bytes before and after fusion."""
    for report in reports(backend):
        print(
            f"{report.stage:9} {report.kernels_unfused:4} ops -> {report.kernels:4} kernels, "
            f"{report.bytes_unfused / 1e6:8.1f} MB -> {report.kernel_bytes / 1e6:8.1f} MB"
        )
