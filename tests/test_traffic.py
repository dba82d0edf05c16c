"""The benchmark of traffic counts on minifuse's side what the hand counts; Inductor's side is checked where it runs."""

from __future__ import annotations

import pytest
import torch

import minifuse
from benchmarks import counted, traffic
from minifuse.records import RECORDS


@pytest.mark.parametrize("program", counted.COUNTED, ids=lambda p: p.name)
def test_a_programs_traffic_is_what_the_hand_counts(program: counted.Counted) -> None:
    torch._dynamo.reset()
    RECORDS.clear()
    found = traffic.probe_minifuse(program.path, False)
    assert {name: found[name] for name in counted.FIGURES} == {name: getattr(program, name) for name in counted.FIGURES}
    assert len(minifuse.reports()) == 1
