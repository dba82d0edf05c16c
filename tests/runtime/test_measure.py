"""The CPU's rates: measured once, kept, and of the right size."""

from __future__ import annotations

from pathlib import Path

import pytest

from minifuse.ir import device as devices
from minifuse.runtime import measure


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the machine was measured."""
    times: list[int] = []
    true = measure.measure

    def once() -> devices.DeviceModel:
        times.append(1)
        return true()

    monkeypatch.setattr(measure, "measure", once)
    measure.cpu_model.cache_clear()
    return times


def test_a_machine_is_measured_once_and_what_is_kept_is_read(tmp_path: Path, counted: list[int]) -> None:
    first = measure.cpu_model(str(tmp_path))
    assert measure.cpu_model(str(tmp_path)) is first
    measure.cpu_model.cache_clear()
    assert measure.cpu_model(str(tmp_path)) == first and len(counted) == 1
    (entry,) = [p for p in tmp_path.rglob("*") if p.name.startswith("device_")]
    entry.write_bytes(entry.read_bytes()[:-7])
    measure.cpu_model.cache_clear()
    again = measure.cpu_model(str(tmp_path))
    assert len(counted) == 2 and again.name == first.name


def test_the_rates_are_those_of_a_computer() -> None:
    found = measure.measure()
    assert found.units >= 1 and 1e8 < found.vector < 1e14 and 1e9 < found.flops < 1e15 and 1e-8 < found.launch < 1e-3
    rates, sizes = [level.rate for level in found.levels], [level.nbytes for level in found.levels]
    assert sorted(rates, reverse=True) == rates and sorted(sizes) == sizes and 1e8 < rates[-1] < 1e13
    assert found.rate(1e15) == found.dram


@pytest.mark.parametrize(("text", "cpus"), [("0", [0]), ("0-3,8", [0, 1, 2, 3, 8]), ("2,4-5\n", [2, 4, 5])])
def test_lists_of_processors_are_read(text: str, cpus: list[int]) -> None:
    assert measure._cpus(text) == cpus
