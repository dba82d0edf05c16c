"""Which results a kernel writes past the caches: those that nobody reads while they would still be there.

A line that is written is first read, unless it is written whole and past the caches: a large result moves a third less.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

from minifuse.ir.plan import Free, Join, Launch, Plan, Step, launch_traffic
from minifuse.passes.context import CompileContext
from minifuse.passes.memory import LARGE_BYTES
from minifuse.passes.schedule_triton import target


def stream(plan: Plan, ctx: CompileContext) -> Plan:
    """Note in each schedule for a CPU the parameters that are written past the caches."""
    if target(plan, ctx.options) == "triton":
        return plan
    room = ctx.device.levels[-2].nbytes
    moved = [0 if isinstance(s, (Free, Join)) else launch_traffic(plan, s).total for s in plan.steps]
    passed = [0, *accumulate(moved)]
    if passed[-1] <= room:
        return plan
    end, after = passed[-1], dict[str, int]()
    steps: list[Step] = []
    for i, step in reversed(list(enumerate(plan.steps))):
        if isinstance(step, Free):
            steps.append(step)
            continue
        if isinstance(step, Launch):
            sizes = {b: plan.hint(plan.buffers[b].nbytes) for b in step.writes}
            # what moves between its first byte that is written and the first that is read
            near = step.region.shared if step.region else ()
            far = {b for b, n in sizes.items() if n >= LARGE_BYTES and b not in near
                   and n + after.get(plan.memory(b), end) - passed[i + 1] > room}  # fmt: skip
            step = write_past(step, far) if far else step
        after.update((plan.memory(b), passed[i]) for b in step.reads)
        steps.append(step)
    return replace(plan, steps=tuple(reversed(steps)))


def write_past(step: Launch, far: set[str]) -> Launch:
    """The launch, with the parameters that it writes only and that stand for such buffers alone written so."""
    assert step.schedule is not None
    written = [p for p in dict.fromkeys(step.kernel.writes) if p not in step.kernel.reads]
    past = tuple(p for p in written if all(m.buffers[p] in far for m in step.members))
    return replace(step, schedule=replace(step.schedule, past=past)) if past else step
