"""The CPU's `DeviceModel`: measured once a machine, and kept in the cache directory."""

from __future__ import annotations

import functools
import json
import platform
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minifuse import compat
from minifuse.ir import device as devices
from minifuse.ir.device import UNBOUNDED, DeviceModel, Level
from minifuse.ir.plan import content_hash

from .cache import DiskCache

# A figure is the best of so many runs, and of all that fit into so many seconds: others may be at work on the machine.
ROUNDS, SECONDS = 5, 0.03
# Bytes: a copy larger than this takes more memory and time than its figure is worth.
LARGEST_COPY = 1 << 27
# The share of a cache that the buffers between two kernels have; what else is at work has the rest.
OURS = 7 / 8
# Rows, terms and columns of the product that two libraries are compared at: that of a layer of a thousand features.
PRODUCT = (256, 1024, 2048)


@functools.cache
def cpu_model(cache_dir: str | None) -> DeviceModel:
    """The rates of this machine's CPU: read from the cache directory, else measured (about a second) and written.

    What is kept is found by the processor, torch's version, the text of this module and, but for the library that
    multiplies (no number may change with threads), torch's number of threads.
    """
    cache = DiskCache(cache_dir)
    parts = [_processor(), torch.__version__, Path(__file__).read_text()]
    model = _kept(cache, "device", [*parts, str(torch.get_num_threads())], lambda: asdict(measure()))
    return replace(DeviceModel.from_json(model), onednn=_kept(cache, "products", parts, onednn))


def _kept(cache: DiskCache, name: str, parts: Sequence[str], measured: Callable[[], Any]) -> Any:
    """What JSON holds of a measurement, from the cache or made now and put there."""
    key = f"{name}_{content_hash(' '.join(parts))}"
    if (path := cache.get(key)) is not None:
        return json.loads(Path(path).read_bytes())
    with cache.lock("device"):  # of processes that start together one measures: the others take what it found
        if (path := cache.get(key)) is not None:
            return json.loads(Path(path).read_bytes())
        with ThreadPoolExecutor(1) as apart:  # a compile runs among fake tensors, which are a thread's own
            found = apart.submit(measured).result()
        cache.put(key, json.dumps(found).encode())
    return found


def measure() -> DeviceModel:
    """Bytes/s of a copy that fits into each level of the caches and of one that fits into none, flop/s of a matrix
    product, seconds of a call that does nothing, each to two digits. Vector instructions are one a cycle and thread."""
    threads = torch.get_num_threads()
    levels, largest = [], 0.0
    for name, nbytes in _caches(threads):
        # half of a level, so that all of it stays there
        levels.append(Level(name, nbytes, _copy_rate(min(int(nbytes) // 4, LARGEST_COPY))))
        largest = nbytes
    levels.append(Level("DRAM", UNBOUNDED, _copy_rate(min(max(int(2 * largest), 1 << 26), LARGEST_COPY))))
    for k in range(len(levels) - 2, -1, -1):  # no level is slower than the next one
        levels[k] = replace(levels[k], rate=max(levels[k].rate, levels[k + 1].rate))
    a, b, one = (torch.ones(*shape, device="cpu") for shape in ((512, 512), (512, 512), (16,)))
    product, tiny = torch.empty_like(a), torch.empty_like(one)
    flops = 2 * 512**3 / _seconds(lambda: torch.mm(a, b, out=product))
    launch = _seconds(lambda: torch.neg(one, out=tiny), runs=100)
    vector = threads * _clock() * _lanes()
    # Where others run, a product's threads wait for each other ten times as long: half a multiply-add a cycle is sure.
    return DeviceModel("cpu", tuple(levels), _digits(max(flops, vector)), _digits(vector), _digits(launch), threads)


def _seconds(work: Callable[[], object], runs: int = 1) -> float:
    """Of a run of `work`, after one that warms up."""
    work()
    best, rounds, start = float("inf"), 0, time.perf_counter()
    while rounds < ROUNDS or time.perf_counter() - start < SECONDS:
        begin = time.perf_counter()
        for _ in range(runs):
            work()
        best, rounds = min(best, (time.perf_counter() - begin) / runs), rounds + 1
    return best


def _copy_rate(nbytes: int) -> float:
    """By torch's threads; by one where they are kept waiting for each other."""
    source = torch.ones(max(nbytes, 4096) // 4, device="cpu")
    target = torch.empty_like(source)
    alone, into = source.numpy(), target.numpy()
    seconds = min(_seconds(lambda: target.copy_(source)), _seconds(lambda: np.copyto(into, alone)))
    return _digits(8 * source.numel() / seconds)


def onednn() -> float:
    """The rate of oneDNN's products over that of ATen's, each by a weight as it is stored; 0 where there is none."""
    if compat.LINEAR is None or not torch.backends.mkldnn.enabled:
        return 0.0
    rows, inner, columns = PRODUCT
    x, w = torch.ones(rows, inner, device="cpu"), torch.ones(columns, inner, device="cpu")
    product = torch.empty(rows, columns, device="cpu")
    works = (lambda: torch.mm(x, w.t(), out=product), lambda: compat.LINEAR(x, w, None, "none", [], ""))
    best = [float("inf")] * 2
    for turn in range(ROUNDS + 1):  # by turns: what else the machine does slows both
        for k, work in enumerate(works):
            begin = time.perf_counter()
            work()
            best[k] = min(best[k], time.perf_counter() - begin) if turn else best[k]
    return _digits(best[0] / best[1])


def _digits(x: float) -> float:
    return float(f"{x:.1e}")


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else f"{platform.machine()} {platform.processor()}"


def _clock() -> float:
    """Cycles a second; 2.5e9 where the system does not say."""
    try:
        found = re.search(r"cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return 1e6 * float(found[1]) if found else 2.5e9


def _lanes() -> int:
    """Floats in a vector register."""
    capability = torch.backends.cpu.get_cpu_capability()
    return 16 if "AVX512" in capability else 8 if "AVX2" in capability else 4


def _caches(threads: int) -> list[tuple[str, float]]:
    """Name and bytes of our share of the second and third level, as far as so many threads reach; the named model's
    where the system does not say."""
    found: dict[str, float] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, size = (index / "level").read_text().strip(), (index / "size").read_text().strip()
            shared = len(_cpus((index / "shared_cpu_list").read_text()))
        except (OSError, ValueError):
            continue
        if level in ("2", "3") and size.endswith("K"):
            found[f"L{level}"] = OURS * 1024.0 * int(size[:-1]) * -(-threads // shared)
    return list(found.items()) or [(level.name, level.nbytes) for level in devices.CPU.levels[:-1]]


def _cpus(text: str) -> list[int]:
    """The numbers of a list such as `0-3,8`."""
    parts = (part.split("-") for part in text.strip().split(","))
    return [n for first, *last in parts for n in range(int(first), int((last or [first])[0]) + 1)]
