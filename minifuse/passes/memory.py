"""Memory: where each buffer lives, when it dies, and how arena buffers share one block.

Externs whose ATen operator has a real `out=` overload write into planned memory; the others'
results are adopted. Arena offsets are found by `pack` when the sizes are known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from minifuse import compat
from minifuse.ir import dtypes
from minifuse.ir.plan import Buffer, Extern, Free, Launch, Plan, Step, TensorRef
from minifuse.passes.context import CompileContext

ALIGN = 64
# A buffer of this size has a block of its own, which returns to the pool when its last reader has run: one
# arena for all would be held from the first step to the last. Smaller ones share the arena.
LARGE_BYTES = 1 << 18


@dataclass(frozen=True)
class Interval:
    """A buffer of the arena: alive from step `first` to step `last`, both included."""

    buffer: str
    first: int
    last: int


def place(plan: Plan, ctx: CompileContext) -> Plan:
    """Storage for every buffer, and a `Free` after the last reader of each adopted result."""
    outputs = {o.buffer for o in plan.outputs if isinstance(o, TensorRef)}
    late = unknown_at_start(plan)
    buffers: dict[str, Buffer] = {}
    steps: list[Step] = []
    real = {s.results[0] for s in plan.externs if has_real_out(s, plan)}
    for name, b in plan.buffers.items():
        if b.storage in ("input", "constant") or b.storage == "extern" and name not in real:
            buffers[name] = b
        elif name in outputs or large(plan, b) or any(s.name in late for s in b.extent.symbols()):
            buffers[name] = replace(b, storage="pooled")
        else:
            buffers[name] = replace(b, storage="arena")
    last: dict[str, int] = {}
    for i, step in enumerate(plan.steps):
        for name in {*step.reads, *step.writes} if not isinstance(step, Free) else ():
            last[name] = i
    for i, step in enumerate(plan.steps):
        if isinstance(step, Extern) and step.results and step.results[0] in real:
            step = replace(step, out=True)
        steps.append(step)
        if isinstance(step, Free):
            continue
        dead = [n for n in dict.fromkeys((*step.reads, *step.writes)) if last[n] == i and n not in outputs]
        dead = [n for n in dead if buffers[n].storage != "constant"]
        if dead:
            steps.append(Free(tuple(dead)))
    return replace(plan, buffers=buffers, steps=tuple(steps))


def large(plan: Plan, b: Buffer) -> bool:
    return plan.hint(b.extent) * dtypes.itemsize(b.dtype) >= LARGE_BYTES


def unknown_at_start(plan: Plan) -> set[str]:
    """Symbols that a step of the plan defines, sizes that depend on data, and those computed from them."""
    late = {name for s in plan.externs for _, name in s.sizes} | {name for s in plan.externs for _, _, name in s.dims}
    while more := {n for n, s in plan.symbols.items() if n not in late and s.mentions(late)}:
        late |= more
    return late


def has_real_out(step: Extern, plan: Plan) -> bool:
    """Whether the operator writes where it is told: an `out=` overload that is not generated.

    A generated overload computes elsewhere and copies.
    """
    target = step.target
    if (
        not step.single
        or step.effect
        or step.dims
        or len(step.writes) != 1
        or not isinstance(target, compat.OpOverload)
    ):
        return False
    buffer = plan.buffers[step.writes[0]]
    if target.namespace != "aten" or not buffer.is_contiguous or not dtypes.supported(buffer.dtype):
        return False
    return out_overload(target) is not None


def out_overload(target: compat.OpOverload) -> compat.OpOverload | None:
    """The overload that takes `out=` with the same arguments, where ATen has a real one."""
    packet = target.overloadpacket
    wanted = [a.name for a in target._schema.arguments]
    for name in ("out", f"{target._overloadname}_out"):
        if name in packet.overloads():
            found = getattr(packet, name)
            takes = [a.name for a in found._schema.arguments if not a.is_out]
            outs = [a for a in found._schema.arguments if a.is_out]
            if takes == wanted and len(outs) == 1 and torch.Tag.generated not in found.tags:
                return found
    return None


def arena_intervals(plan: Plan) -> tuple[Interval, ...]:
    """When each arena buffer is alive, by step."""
    span: dict[str, tuple[int, int]] = {}
    for i, step in enumerate(plan.steps):
        if isinstance(step, Free):
            continue
        for name in (*step.reads, *step.writes):
            if plan.buffers[name].storage == "arena":
                first, _ = span.get(name, (i, i))
                span[name] = (first, i)
    return tuple(Interval(name, *ends) for name, ends in span.items())


def pack(intervals: Sequence[Interval], nbytes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Offsets in bytes and the arena's size: largest first, each at the lowest gap that fits.

    Best-fit by decreasing size (Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net
    Inference", 2020, greedy by size).
    """
    order = sorted(intervals, key=lambda v: (-nbytes[v.buffer], v.first, v.buffer))
    placed: list[tuple[int, int, Interval]] = []
    offsets: dict[str, int] = {}
    total = 0
    for v in order:
        size = -(-max(nbytes[v.buffer], 1) // ALIGN) * ALIGN
        at = 0
        best: int | None = None
        slack = 0
        for begin, end, other in placed:
            if other.last < v.first or v.last < other.first:
                continue
            if begin - at >= size and (best is None or begin - at < slack):
                best, slack = at, begin - at
            at = max(at, end)
        where = at if best is None else best
        offsets[v.buffer] = where
        total = max(total, where + size)
        placed.append((where, where + size, v))
        placed.sort(key=lambda p: p[0])
    return offsets, total


def peak_bytes(plan: Plan) -> int:
    """Bytes of the arena with every size at its hint."""
    intervals = arena_intervals(plan)
    sizes = {v.buffer: plan.hint(plan.buffers[v.buffer].extent) * dtypes.itemsize(plan.buffers[v.buffer].dtype)
             for v in intervals}  # fmt: skip
    return pack(intervals, sizes)[1]


def launches_between_externs(plan: Plan) -> list[list[Step]]:
    """Runs of launches that one call can do; each extern stands alone."""
    runs: list[list[Step]] = []
    for step in plan.steps:
        if isinstance(step, Free):
            continue
        if isinstance(step, Launch) and runs and isinstance(runs[-1][0], Launch):
            runs[-1].append(step)
        else:
            runs.append([step])
    return runs
