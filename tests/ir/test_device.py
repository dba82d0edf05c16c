"""Models of devices: what prices a plan."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from minifuse.ir.device import CPU, DEVICES, DeviceModel, named


@pytest.mark.parametrize("name", DEVICES)
def test_a_model_is_plain_data_and_its_levels_slow_down_as_they_grow(name: str) -> None:
    model = DEVICES[name]
    assert DeviceModel.from_json(json.loads(json.dumps(asdict(model)))) == model
    sizes, rates = zip(*((level.nbytes, level.rate) for level in model.levels), strict=True)
    assert list(sizes) == sorted(sizes) and list(rates) == sorted(rates, reverse=True)
    # A buffer that is made and read stays in a level that holds it beside another one of its size.
    assert model.rate(sizes[0] / 2) == rates[0] and model.rate(sizes[0]) == rates[1]
    assert model.seconds(1e12) == 1e12 / model.dram


def test_a_gpu_is_known_by_what_its_driver_calls_it() -> None:
    assert named("NVIDIA H100 80GB HBM3") is DEVICES["H100"]
    assert named("AMD Instinct MI300X") is DEVICES["MI300X"]
    assert named("cpu") is None and named("NVIDIA GeForce RTX 4090") is None
    assert CPU.units < DEVICES["A100"].units
