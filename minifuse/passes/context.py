"""What a compile carries from pass to pass: options, decisions, timings and names."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from minifuse.ir import device as devices
from minifuse.ir.decision import Decision
from minifuse.options import Options


@dataclass
class CompileContext:
    """One compile of one graph. Passes read `options` and `device` and append to `decisions`; nothing else.

    `stage` is "inference", "forward" or "backward"; `seconds` maps a phase to its duration. `tangents` is the bytes
    that autograd allocates behind a forward for its backward.
    """

    name: str
    stage: str
    options: Options
    decisions: list[Decision] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    stages: dict[str, Any] = field(default_factory=dict)
    device: devices.DeviceModel = devices.CPU
    tangents: int = 0

    def record(self, rule: str, *subject: str, taken: bool, reason: str, where: str = "", **facts: Any) -> None:
        self.decisions.append(Decision(rule, subject, taken, reason, facts, where))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


@contextmanager
def without_collection() -> Iterator[None]:
    """No garbage collection inside: a compile makes much and drops little, and a collection walks all of torch's
    objects each time (half of the time to plan 4,000 nodes)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
