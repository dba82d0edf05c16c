"""What a device can do, as plain data: the rates that price a plan."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceModel:
    """The roofline of one device.

    `dram` and `cache` are bytes/s (main memory; the last cache level), `flops` is what matrix products reach at the
    dtype that training uses, `vector` the elementwise instructions/s of generated code, `launch` the seconds that
    starting one kernel or extern costs.
    """

    name: str
    dram: float
    cache: float
    flops: float
    vector: float
    launch: float


# Vendor peaks, de-rated nowhere: dense bf16 tensor-core flops, and fp32 lanes times boost clock for `vector`
# (an fma counts once). `cache` and `launch` are round figures of the right size, not measurements.
_ROWS = (
    # Two AVX-512 cores of a server: a warm copy of 64 MB takes 2.8 ms; one vector instruction a cycle and core.
    DeviceModel("cpu", 4.0e10, 1.0e11, 2.0e11, 8.0e10, 2e-6),
    # NVIDIA A100 80GB SXM datasheet (2021): 2.04 TB/s, 312 TFLOP/s bf16, 19.5 TFLOP/s fp32.
    DeviceModel("A100", 2.04e12, 5.0e12, 3.12e14, 9.7e12, 4e-6),
    # NVIDIA H100 SXM datasheet (2023): 3.35 TB/s, 989 TFLOP/s bf16, 67 TFLOP/s fp32.
    DeviceModel("H100", 3.35e12, 5.5e12, 9.89e14, 3.3e13, 3e-6),
    # NVIDIA H200 SXM datasheet (2024): 4.8 TB/s, 989 TFLOP/s bf16, 67 TFLOP/s fp32.
    DeviceModel("H200", 4.8e12, 5.5e12, 9.89e14, 3.3e13, 3e-6),
)
DEVICES: dict[str, DeviceModel] = {row.name: row for row in _ROWS}
CPU = DEVICES["cpu"]
