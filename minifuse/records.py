"""The record of what was compiled in this process, for reports; plain data, newest last."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from minifuse.ir.decision import Decision
from minifuse.ir.device import CPU, DeviceModel
from minifuse.options import Options

KEPT = 256


@dataclass
class Record:
    """One compiled graph: its stages by name, its decisions, and seconds by phase; what it was compiled with, and
    whether that was in an earlier process (`warm`)."""

    name: str
    stage: str
    stages: dict[str, Any]
    decisions: list[Decision]
    seconds: dict[str, float]
    source: dict[str, str] = field(default_factory=dict)
    options: Options = field(default_factory=Options)
    device: DeviceModel = CPU
    warm: bool = False


RECORDS: deque[Record] = deque(maxlen=KEPT)
