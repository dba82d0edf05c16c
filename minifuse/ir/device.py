"""What a device can do, as plain data: the rates that price a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

UNBOUNDED = 1e18


@dataclass(frozen=True)
class Level:
    """A level of the memory hierarchy, shared by the whole device: bytes that it holds, bytes/s that it moves."""

    name: str
    nbytes: float
    rate: float


@dataclass(frozen=True)
class DeviceModel:
    """The roofline of one device.

    `levels` go from the smallest to main memory. `flops` is what matrix products reach at the dtype that training uses,
    `vector` the elementwise instructions/s of generated code, `launch` the seconds that starting one kernel or extern
    costs, `units` how many cores or multiprocessors share the work of a kernel, `registers` the 32-bit registers of one
    of them that a row is held in (0 where it is held in memory), `onednn` the rate of oneDNN's products by weights over
    that of ATen's (below 1 where it has none), `link` the bytes/s each way to the host's memory, beside which kernels
    run (0 where the device is the host).
    """

    name: str
    levels: tuple[Level, ...]
    flops: float
    vector: float
    launch: float
    units: int
    registers: int = 0
    onednn: float = 0.0
    link: float = 0.0

    @property
    def dram(self) -> float:
        """Bytes/s of main memory."""
        return self.levels[-1].rate

    def rate(self, nbytes: float) -> float:
        """Bytes/s at which a buffer of this size moves from one kernel to the next: what it fits in twice, since the
        kernel between reads or writes as much, holds it."""
        return next((level.rate for level in self.levels[:-1] if 2 * nbytes <= level.nbytes), self.dram)

    def seconds(self, nbytes: float) -> float:
        """Seconds to move a buffer of this size once."""
        return nbytes / self.rate(nbytes)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DeviceModel:
        """The model that `dataclasses.asdict` gave."""
        return cls(**{**data, "levels": tuple(Level(**level) for level in data["levels"])})


def _gpu(
    name: str, units: int, l2: float, l2_rate: float, dram: float, flops: float, vector: float, link: float,
    registers: int = 65_536,
) -> DeviceModel:  # fmt: skip
    levels = (Level("L2", l2, l2_rate), Level("HBM", UNBOUNDED, dram))
    return DeviceModel(name, levels, flops, vector, launch=3e-6, units=units, registers=registers, link=link)


# Vendors' peaks: dense bf16 tensor-core flops, and fp32 lanes times boost clock for `vector` (an fma counts once).
# Rates of caches and the launch are round figures of the right size, not data sheets'. Registers: 64K a multiprocessor
# (CUDA C++ Programming Guide, "Compute Capabilities"); 4 times 512 of 64 lanes (AMD CDNA3 ISA reference, 2024). `link`:
# PCIe of the same data sheets, a direction: 32 GB/s of generation 4, 64 of generation 5.
_ROWS = (
    # Two AVX-512 cores of a server: a warm copy of 64 MB takes 2.8 ms; one vector instruction a cycle and core.
    DeviceModel("cpu", (Level("L2", 2e6, 1.5e11), Level("L3", 3e7, 1e11), Level("DRAM", UNBOUNDED, 4e10)),
                2.0e11, 8.0e10, 2e-6, 2),
    # NVIDIA A100 80GB SXM datasheet (2021): 108 SMs, 40 MB L2, 2.04 TB/s, 312 TFLOP/s bf16, 19.5 TFLOP/s fp32.
    _gpu("A100", 108, 4.0e7, 5.0e12, 2.04e12, 3.12e14, 9.7e12, 3.2e10),
    # NVIDIA H100 SXM datasheet (2023): 132 SMs, 50 MB L2, 3.35 TB/s, 989 TFLOP/s bf16, 67 TFLOP/s fp32.
    _gpu("H100", 132, 5.0e7, 5.5e12, 3.35e12, 9.89e14, 3.3e13, 6.4e10),
    # NVIDIA H200 SXM datasheet (2024): 132 SMs, 50 MB L2, 4.8 TB/s, 989 TFLOP/s bf16, 67 TFLOP/s fp32.
    _gpu("H200", 132, 5.0e7, 5.5e12, 4.8e12, 9.89e14, 3.3e13, 6.4e10),
    # NVIDIA HGX B200 datasheet (2025): 148 SMs, 126 MB L2, 7.7 TB/s, 2.25 PFLOP/s dense bf16, 75 TFLOP/s fp32 a GPU.
    _gpu("B200", 148, 1.26e8, 1.0e13, 7.7e12, 2.25e15, 3.75e13, 6.4e10),
    # AMD Instinct MI300X datasheet (2023): 304 CUs, 256 MB Infinity Cache at 17.2 TB/s, 5.3 TB/s, 1307 TFLOP/s bf16,
    # 163.4 TFLOP/s fp32.
    _gpu("MI300X", 304, 2.56e8, 1.72e13, 5.3e12, 1.307e15, 8.17e13, 6.4e10, 131_072),
)  # fmt: skip
DEVICES: dict[str, DeviceModel] = {row.name: row for row in _ROWS}
CPU = DEVICES["cpu"]


def named(name: str) -> DeviceModel | None:
    """The model of a GPU by what its driver calls it ("NVIDIA H100 80GB HBM3"); None where it is not known."""
    return next((row for key, row in DEVICES.items() if row is not CPU and key in name), None)
