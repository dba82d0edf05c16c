"""`mode="max-autotune"`: schedules that the GPU itself chooses, among a few around the one that the rules choose.

A candidate is a kernel with other tiles of its grid, or other warps. Neither is part of a reduction's tree, so each
gives the same bits. All candidates of a kernel are compiled beside each other, then timed in turn on memory of the
sizes that the plan has, the cache emptied before each run; the rules' own is kept unless another takes `GAIN` less.
What was chosen is kept in the cache directory, by the kernel, the device and the versions: the next compile takes it
without timing anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from minifuse import compat_triton
from minifuse.codegen import triton
from minifuse.codegen.printer import CodegenError
from minifuse.ir.kernel import Kernel, Schedule
from minifuse.ir.plan import Launch, Plan, Step, content_hash
from minifuse.ir.text import kernel_hash
from minifuse.options import TUNED_MODES
from minifuse.passes.context import CompileContext
from minifuse.passes.schedule_triton import WARP, blocks, problem, vector

from . import triton_launch
from .cache import DiskCache

TILES = (0.5, 2.0, 4.0)
WARPS = (0.5, 2.0)
MOST_TILE, MOST_WARPS = 16_384, 16
ROUNDS = 12
GAIN = 0.97
"""What another candidate may take of the rules' time, to be taken for them."""
SHARE = 0.4
"""Of the memory that is free, the most that timing one kernel takes."""
FLUSHED = 256 << 20


def tuned(plan: Plan, ctx: CompileContext) -> Plan:
    """The plan, in a mode that asks for it with schedules that were timed on its GPU; decisions say what each took."""
    device = triton_launch.main_device(plan)
    if ctx.options.mode not in TUNED_MODES or device.type == "cpu":
        return plan
    with ctx.phase("autotune"), torch.cuda.device(device):
        plan = ctx.stages["autotune"] = tune(plan, device, ctx)
    return plan


def tune(plan: Plan, device: torch.device, ctx: CompileContext) -> Plan:
    """The plan with the fastest schedule of each launch on a device."""
    steps: list[Step] = list(plan.steps)
    known: dict[Any, tuple[Schedule, Mapping[str, float]]] = {}
    cache = DiskCache(ctx.options.cache_dir)
    for i, step in enumerate(steps):
        if not isinstance(step, Launch) or step.schedule is None or step.batched:
            continue
        key = (step.kernel, step.schedule)
        if key not in known:
            known[key] = chosen(plan, step, device, ctx, cache)
        schedule, seconds = known[key]
        if seconds:
            rules, best = seconds[str_of(step.schedule)], seconds[str_of(schedule)]
            ctx.record("autotune", step.name, taken=schedule != step.schedule, where=plan.origins.get(step.name, ""),
                       reason="{schedule} took {best} us, the rules' choice {rules}, of {count} that were timed",
                       schedule=str_of(schedule), best=round(1e6 * best, 2), rules=round(1e6 * rules, 2),
                       count=len(seconds))  # fmt: skip
        steps[i] = replace(step, schedule=schedule)
    return replace(plan, steps=tuple(steps))


def str_of(s: Schedule) -> str:
    """A schedule in words, its warps too."""
    return f"{s}; {s.warps or 'rule'} warps"


def chosen(
    plan: Plan, step: Launch, device: torch.device, ctx: CompileContext, cache: DiskCache
) -> tuple[Schedule, Mapping[str, float]]:
    """The schedule of a launch that was fastest, and the seconds of each; none where nothing is to be chosen."""
    assert step.schedule is not None
    every = {str_of(s): s for s in candidates(step.kernel, step.schedule)}
    if len(every) == 1:
        return step.schedule, {}
    sizes = [plan.hint(plan.buffers[b].nbytes) for b in step.binding]
    name = "tuned_" + content_hash(" ".join([
        kernel_hash(step.kernel, step.schedule), *map(str, sizes), *every, device_name(device), torch.__version__,
        compat_triton.triton_version(), Path(__file__).read_text(),
    ]))  # fmt: skip
    found: dict[str, float] = {}
    if (path := cache.get(name)) is not None:
        found = json.loads(Path(path).read_bytes())
    elif sum(sizes) < SHARE * free_bytes(device):
        found = measured(plan, step, every, device, ctx)
        cache.put(name, json.dumps(found).encode())
    if str_of(step.schedule) not in found:
        return step.schedule, {}
    best = min(found, key=lambda k: (found[k], k))
    if found[best] > GAIN * found[str_of(step.schedule)]:
        best = str_of(step.schedule)
    return every[best], found


def candidates(kernel: Kernel, schedule: Schedule) -> Iterator[Schedule]:
    """The schedule itself, then those with other tiles of the grid or other warps, that Triton can run."""
    yield schedule
    rule = warps_of(kernel, schedule)
    if rule is None:
        return
    for share in WARPS:
        count = int(rule * share)
        if 1 <= count <= MOST_WARPS:
            yield replace(schedule, warps=count)
    least = WARP * vector(kernel)
    tiled = [k for k, loop in enumerate(schedule.loops) if loop.kind == "grid" and loop.step > 1]
    for k in tiled[-1:]:
        for share in TILES:
            step = int(schedule.loops[k].step * share)
            if not least <= step <= MOST_TILE:
                continue
            loops = (*schedule.loops[:k], replace(schedule.loops[k], step=step), *schedule.loops[k + 1 :])
            other = replace(schedule, loops=loops)
            if problem(kernel, other) is None and all(n <= MOST_TILE for n in blocks(other).values()):
                yield other


def warps_of(kernel: Kernel, schedule: Schedule) -> int | None:
    """The warps that the rule gives; None for a kernel that Triton cannot express."""
    try:
        return triton.write_kernel(Launch(kernel, tuple(p.name for p in kernel.params), schedule)).warps
    except CodegenError:
        return None


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]


def measured(
    plan: Plan, step: Launch, every: Mapping[str, Schedule], device: torch.device, ctx: CompileContext
) -> dict[str, float]:
    """Seconds of a launch under each schedule; without those that Triton refuses."""
    steps = {name: replace(step, schedule=s) for name, s in every.items()}
    kernels = {name: triton.write_kernel(one) for name, one in steps.items()}
    # kernels of equal loops have one text and differ in their warps alone
    texts = {kernel.name: (step, kernel) for kernel in kernels.values()}
    source = triton_launch.source_of(f"# {step.name}\n{kernel.text}" for step, kernel in texts.values())
    module = triton_launch.load_module(source, ctx.options.cache_dir)
    made = {n: triton_launch.Launched(getattr(module, k.name), steps[n], k, device) for n, k in kernels.items()}
    target = compat_triton.current_target()

    def compiles(one: triton_launch.Launched) -> bool:
        try:
            one.compile(one.usual(), target)
        except compat_triton.triton_errors():
            return False
        return True

    with ThreadPoolExecutor(triton_launch.COMPILERS) as pool:
        fit = dict(zip(made, pool.map(compiles, made.values()), strict=True))
    runs = dict(started(plan, step, {name: one for name, one in made.items() if fit[name]}, device))
    return {name: median(found) for name, found in timed(runs, ROUNDS).items()}


@dataclass(frozen=True)
class Start:
    """What starts a kernel once. It keeps the memory that its arguments point to."""

    run: Callable[..., Any]
    args: tuple[int, ...]
    stream: int
    memory: tuple[torch.Tensor, ...]

    def __call__(self) -> Any:
        return self.run(*self.args, stream=self.stream)


def started(
    plan: Plan, step: Launch, made: Mapping[str, triton_launch.Launched], device: torch.device
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What starts a launch once, on memory of zeros (an index of 0 is in every tensor)."""
    hints = {name: s.hint for name, s in plan.symbols.items()}
    memory = [torch.zeros(max(plan.hint(plan.buffers[b].nbytes), 1), dtype=torch.uint8, device=device)
              for b in step.binding]  # fmt: skip
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    for name, one in made.items():
        values = tuple(hints[s] for s in one.sizes)
        given = [values[k] for k in one.given] + ([flag.data_ptr()] if one.kernel.messages else [])
        run = one.runner(True, values)
        if run is not None:
            stream = torch.cuda.current_stream(device).cuda_stream
            yield name, Start(run, (*(t.data_ptr() for t in memory), *given), stream, (*memory, flag))


def timed(
    runs: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1, flushed: int = FLUSHED
) -> dict[str, list[float]]:
    """Seconds of the current GPU in each run of each, in turn, behind a write of so many bytes that empties the cache
    and lets the host run ahead."""
    flush = torch.empty(flushed, dtype=torch.uint8, device="cuda")
    for _ in range(warmup):
        for run in runs.values():
            run()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            begin.record()
            run()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: [a.elapsed_time(b) / 1e3 for a, b in pairs] for name, pairs in events.items()}
