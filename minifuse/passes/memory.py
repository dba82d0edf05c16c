"""Memory: where each buffer lives, when it dies, and how arena buffers share one block.

A kernel writes a large result over what it is the last to read, where it goes element by element. Externs whose ATen
operator has a real `out=` overload write into planned memory; the others' results are adopted. Arena offsets are found
by `pack` when the sizes are known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any

import torch

from minifuse import compat
from minifuse.ir import dtypes
from minifuse.ir.index import ONE
from minifuse.ir.kernel import Kernel, Store, rewrite
from minifuse.ir.plan import Buffer, Extern, Free, Launch, Plan, Region, Step, TensorRef
from minifuse.ir.value import Load, Value
from minifuse.passes.context import CompileContext
from minifuse.passes.schedule import canonical

from .scratch import Layout, scratch_bytes

aten = torch.ops.aten

PRODUCTS = frozenset({aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default})
"""Matrix products: they write rows that lie apart as they write them together."""

EXCHANGED = frozenset({compat.LINEAR, aten.convolution.default, aten.convolution_backward.default})
"""Operators whose large results the pool takes over, each a memory of its own."""

ALIGN = 64
# A buffer of this size has a block of its own, which returns to the pool when its last reader has run: one
# arena for all would be held from the first step to the last. Smaller ones share the arena.
LARGE_BYTES = 1 << 18
# Below this a block is torch's allocator's, which keeps such pieces warm itself; from it on, the pool's.
POOLED_BYTES = 1 << 20
# What a call holds beside the pool is told to it in such parts of what it holds at most.
BESIDE_PARTS = 32


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
    kept = held(plan)
    buffers: dict[str, Buffer] = {}
    steps: list[Step] = []
    real = {s.results[0] for s in plan.externs if has_real_out(s, plan)}
    for name, b in plan.buffers.items():
        if b.storage in ("input", "constant", "inside") or b.storage == "extern" and name not in real:
            buffers[name] = b
        elif name in outputs or name in kept or large(plan, b) or any(s.name in late for s in b.extent.symbols()):
            buffers[name] = replace(b, storage="pooled")
        else:
            buffers[name] = replace(b, storage="arena")
    last = {name: end for name, (_, end) in lifetimes(plan).items()}
    uses = [memory_of(plan, step) for step in plan.steps]
    final = {name: i for i, used in enumerate(uses) for name in used}
    before: dict[str, int] = {}
    ours = own_memory(plan, buffers)
    for i, (step, (first, end)) in enumerate(zip(plan.steps, together(plan), strict=True)):
        if isinstance(step, Free):
            continue
        if isinstance(step, Extern) and step.results and step.results[0] in real:
            step = replace(step, out=True)
        elif isinstance(step, Launch):
            apart = [n for n in uses[i] if final[n] == i and n in ours and n not in outputs and n not in step.writes]
            if step.region is not None:  # what others of it used, but for what each tile has its own part of
                apart = [n for n in apart if n in step.region.shared or before.get(n, -1) < first]
            step = take_over(step, [n for n in apart if not used_in_part(n, step, plan)], buffers)
        before.update(dict.fromkeys(uses[i], i))
        steps.append(step)
        if i < end:
            continue
        used = dict.fromkeys(chain.from_iterable(uses[first : end + 1]))
        dead = [n for n in used if last[n] == i and n not in outputs and buffers[n].storage != "constant"]
        if dead:
            steps.append(Free(tuple(name for n in dead for name in (*plan.regions.get(n, ()), n))))
    return replace(plan, buffers=buffers, steps=tuple(steps))


def memory_of(plan: Plan, step: Step) -> dict[str, None]:
    """The memory that a step uses, in its order."""
    return {} if isinstance(step, Free) else dict.fromkeys(map(plan.memory, (*step.reads, *step.writes)))


def together(plan: Plan) -> list[tuple[int, int]]:
    """For each step the first and the last of those that run with it: itself, or the launches of its region."""
    found = [(i, i) for i in range(len(plan.steps))]
    regions: dict[Region, list[int]] = {}
    for i, step in enumerate(plan.steps):
        if isinstance(step, Launch) and step.region is not None:
            regions.setdefault(step.region, []).append(i)
    for members in regions.values():
        for i in range(members[0], members[-1] + 1):
            found[i] = (members[0], members[-1])
    return found


def own_memory(plan: Plan, buffers: Mapping[str, Buffer]) -> set[str]:
    """Blocks of their own that nothing else can hold on to."""
    kept = held(plan)
    return {n for n, b in buffers.items() if b.storage in ("pooled", "extern") and n not in kept}


def used_in_part(name: str, step: Launch, plan: Plan) -> bool:
    """Whether a kernel reads or writes a region of a buffer by a name of its own."""
    return not set(plan.regions.get(name, ())).isdisjoint(step.binding)


def held(plan: Plan) -> set[str]:
    """Buffers that may be in use after their last reader: a custom operator may keep what it was given or what it
    gave, a region (`invoke_subgraph`) may return it, a collective may still be reading it."""
    found: set[str] = set()
    for step in plan.externs:
        target = step.target
        ours = isinstance(target, compat.OpOverload) and (target.namespace == "aten" or target is compat.LINEAR)
        if not ours or step.effect:
            found |= {*step.reads, *step.writes}
    return found


def take_over(step: Launch, dying: Collection[str], buffers: dict[str, Buffer]) -> Launch:
    """Write results over what the kernel is the last to read, element by element; notes it in `buffers`.

    A store and every load of the buffer must be at the same offset: the kernel then loads what it overwrites, and
    runs a store after all loads of it, as for an input that the user's program overwrites.
    """
    kernel = step.kernel
    bound = [m.buffers for m in step.members]
    free = [s for s in kernel.stores if s.param not in kernel.reads
            and all(buffers[b[s.param]].storage == "pooled" for b in bound)]  # fmt: skip
    uses = Counter(step.binding)
    taken: dict[str, Store] = {}
    # what two tensors of a batch read, neither is the last to read
    for param in [p.name for p in kernel.params
                  if all(b[p.name] in dying and (len(bound) == 1 or uses[b[p.name]] == 1) for b in bound)]:  # fmt: skip
        for s in free:
            pairs = [(buffers[b[s.param]], buffers[b[param]]) for b in bound]
            alike = all((x.dtype, x.extent, x.device) == (y.dtype, y.extent, y.device) for x, y in pairs)
            if alike and element_by_element(kernel, param, s):
                buffers.update((new.name, replace(new, reuses=old.name)) for new, old in pairs)
                taken[param] = s
                free.remove(s)
                break
    if not taken:
        return step

    def moved(v: Value) -> Value | None:
        if isinstance(v, Load) and v.param in taken:
            return Load.of(taken[v.param].param, taken[v.param].index, v.dtype, v.mask, v.other)
        return None

    params = tuple(p for p in kernel.params if p.name not in taken)
    kernel = Kernel(kernel.axes, params, rewrite(kernel.body, None, moved), kernel.origins)
    return replace(step, kernel=canonical(kernel), binding=tuple(b[p.name] for b in bound for p in params))


def element_by_element(kernel: Kernel, param: str, store: Store) -> bool:
    """Whether a parameter is loaded only at the offset that one store, the only one of its parameter, writes."""
    if sum(s.param == store.param for s in kernel.stores) > 1:
        return False
    at = kernel.param(store.param).offset(store.index)
    return all(
        not any(isinstance(i, Value) for i in v.index) and kernel.param(param).offset(v.index) is at
        for v in kernel.loads
        if v.param == param
    )


def large(plan: Plan, b: Buffer) -> bool:
    return plan.hint(b.extent) * dtypes.itemsize(b.dtype) >= LARGE_BYTES


def unknown_at_start(plan: Plan) -> set[str]:
    """Symbols that a step of the plan defines, sizes that depend on data, and those computed from them."""
    late = {name for s in plan.externs for _, name in s.sizes} | {name for s in plan.externs for _, _, name in s.dims}
    while more := {n for n, s in plan.symbols.items() if n not in late and s.mentions(late)}:
        late |= more
    return late


def mentioned(plan: Plan, step: Step, late: set[str]) -> set[str]:
    """The sizes that depend on data and the opaque results that a step mentions; `late` is `unknown_at_start`."""
    if isinstance(step, Extern):
        found = set(step.mentions)
    elif isinstance(step, Launch) and late:
        found = {s.name for s in step.symbols}
    else:
        return set()
    while more := {n for name in found & late for n in plan.symbols[name].mentions(late)} - found:
        found |= more
    return found


def has_real_out(step: Extern, plan: Plan) -> bool:
    """Whether the operator writes where it is told: an `out=` overload that is not generated.

    A generated overload computes elsewhere and copies.
    """
    target, plain = step.target, step.single and not step.effect and not step.dims and len(step.writes) == 1
    if not plain or not isinstance(target, compat.OpOverload):
        return False
    buffer = plan.buffers[step.writes[0]]
    dense = buffer.is_contiguous or buffer.inside is not None or (target in PRODUCTS and has_rows(buffer))
    if target.namespace != "aten" or not dense or not dtypes.supported(buffer.dtype):
        return False
    return out_overload(target) is not None


def has_rows(buffer: Buffer) -> bool:
    """Whether a matrix, or a batch of them, is contiguous but for what lies between its rows: products write that."""
    *outer, last = buffer.stride
    steps = zip(outer, outer[1:], buffer.shape[1:], strict=False)
    return bool(outer) and last is ONE and all(a is b * n for a, b, n in steps)


def out_overload(target: compat.OpOverload) -> compat.OpOverload | None:
    """The overload that takes `out=` with the same arguments, where ATen has a real one."""
    packet = target.overloadpacket
    wanted = [(a.name, str(a.type)) for a in target._schema.arguments]
    for name in ("out", f"{target._overloadname}_out"):
        if name in packet.overloads():
            found = getattr(packet, name)
            takes = [(a.name, str(a.type)) for a in found._schema.arguments if not a.is_out]
            outs = [a for a in found._schema.arguments if a.is_out]
            if takes == wanted and len(outs) == 1 and torch.Tag.generated not in found.tags:
                return found
    return None


def arena_intervals(plan: Plan) -> tuple[Interval, ...]:
    """When each arena buffer is alive, by step."""
    return tuple(Interval(n, *ends) for n, ends in lifetimes(plan).items() if plan.buffers[n].storage == "arena")


def lifetimes(plan: Plan) -> dict[str, tuple[int, int]]:
    """The first step that uses a buffer or a part of it, and the last, of each whose memory is its own. Launches that
    run tile by tile use theirs all of the time."""
    span: dict[str, tuple[int, int]] = {}
    for step, (first, last) in zip(plan.steps, together(plan), strict=True):
        for name in memory_of(plan, step):
            span[name] = (span[name][0] if name in span else first, last)
    return span


def first_owner(plan: Plan, name: str) -> str:
    """The buffer whose memory this one has taken over, itself where it has a memory of its own."""
    while (before := plan.buffers[name].reuses) is not None:
        name = before
    return name


def spans(plan: Plan) -> dict[str, tuple[int, int, int]]:
    """The first and the last step and the bytes of what a call holds: its results, to its end if they are returned,
    what dies with it, and the scratch of operators. Symbols are at their hints."""
    end = len(plan.steps)
    found = {n: (0, 0) for n in plan.donated if n in plan.buffers}
    found |= {n: (0 if n in found else first, last) for n, (first, last) in lifetimes(plan).items()}
    for name in [n for n in found if plan.buffers[n].reuses is not None]:  # what is taken over is one memory
        first, last = found.pop(name)
        owner = first_owner(plan, name)
        found[owner] = (min(first, found.get(owner, (first,))[0]), max(last, found.get(owner, (0, last))[1]))
    returned = {first_owner(plan, o.buffer) for o in plan.outputs if isinstance(o, TensorRef)}
    given = {n for n, b in plan.buffers.items() if b.storage in ("input", "constant")} - plan.donated
    held = {n: (first, end if n in returned else last, nbytes_of(plan, n))
            for n, (first, last) in found.items() if n not in given}  # fmt: skip
    for k, step in enumerate(plan.steps):
        if isinstance(step, Extern) and (nbytes := scratch_of(plan, step)):
            held[f"scratch of {step.origin}"] = (k, k, nbytes)
    return held


def nbytes_of(plan: Plan, name: str) -> int:
    b = plan.buffers[name]
    return plan.hint(b.extent) * dtypes.itemsize(b.dtype)


def scratch_of(plan: Plan, step: Extern) -> int:
    """The bytes of an operator's own copies: see `scratch_bytes`."""
    if not step.results or not step.reads or plan.buffers[step.reads[0]].device.type != "cpu":
        return 0

    def layout(x: TensorRef | str) -> Layout:
        b = plan.buffers[x if isinstance(x, str) else x.buffer]
        shape, stride = (b.shape, b.stride) if isinstance(x, str) else (x.shape, x.stride)
        return Layout(tuple(map(plan.hint, shape)), tuple(map(plan.hint, stride)), dtypes.itemsize(b.dtype))

    return scratch_bytes(step.target, step.args, step.results[0], layout)


def peak(plan: Plan) -> tuple[int, int]:
    """The most bytes that a call holds at once (see `spans`), and the first step at which it does."""
    return most_alive(spans(plan).values())


@dataclass(frozen=True)
class Needs:
    """What a call holds at most, what of its inputs is the pool's, and, at each step from which it differs, what is not
    the pool's: bytes. The latter in parts of `peak`, so that it changes at few steps."""

    peak: int
    given: int
    beside: dict[int, int]


def exchanged(target: Any, b: Buffer) -> bool:
    """Whether an operator allocates a large result: memory that the pool gives up for it and takes over. Else its
    results and the pool's would each hold what both need at once at most."""
    large = not b.nbytes.is_const or b.nbytes.value >= POOLED_BYTES
    return target in EXCHANGED and b.device.type == "cpu" and large


def needs(plan: Plan, behind: int = 0) -> Needs:
    """What a call will hold, for the pool to make room: tangents, what is too small for it, what operators allocate and
    keep, their scratch, and what is allocated `behind` the call, is not the pool's. Nothing on a GPU is."""
    if any(b.device.type != "cpu" for b in plan.buffers.values()):
        return Needs(0, 0, {})
    held = spans(plan)
    held["behind"] = (len(plan.steps), len(plan.steps), behind)
    made_by = {name: step.target for step in plan.externs for name in step.writes}

    def pooled(name: str) -> bool:
        b = plan.buffers.get(name)
        if b is None or b.storage == "extern" and not exchanged(made_by[name], b):
            return False
        return b.storage == "arena" or held[name][2] >= POOLED_BYTES and not compat.is_tangent_name(name)

    ours = set(filter(pooled, held))
    most, _ = most_alive(held.values())
    part = max(most // BESIDE_PARTS, POOLED_BYTES)
    beside: dict[int, int] = {}
    before = 0
    for step, nbytes in alive(span for n, span in held.items() if n not in ours):
        level = (nbytes + part // 2) // part * part
        if level != before:
            before = beside[step] = level
    return Needs(most, sum(held[n][2] for n in ours & plan.donated), beside)


def alive(lives: Iterable[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """The steps at which what is alive changes, of spans of a first and a last step and bytes, and the bytes then."""
    change: dict[int, int] = {}
    for first, end, nbytes in lives:
        change[first] = change.get(first, 0) + nbytes
        change[end + 1] = change.get(end + 1, 0) - nbytes
    steps = sorted(change)
    return list(zip(steps, accumulate(change[step] for step in steps), strict=True))


def most_alive(lives: Iterable[tuple[int, int, int]]) -> tuple[int, int]:
    """The most bytes that are alive at once, of spans of a first and a last step and bytes, and the first such step."""
    most, where = max(((nbytes, -step) for step, nbytes in alive(lives)), default=(0, 0))
    return most, -where


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
