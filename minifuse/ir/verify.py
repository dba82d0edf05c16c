"""What constructors cannot see: rules over a whole kernel, a schedule, and a plan.

Passes are verified between one another, always in tests. A rule here refuses only what it can prove
wrong; sizes that are symbols are taken on trust.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from .index import ONE, ZERO, Axis, Expr, Sym
from .kernel import Kernel, Param, Schedule, Store
from .plan import Again, Binding, Buffer, Extern, Free, Join, Launch, Plan, Region, TensorRef
from .shape import cdiv, product
from .text import check_names
from .value import Index, Load


class VerificationError(Exception):
    """A rule of the IR is broken; the message names the step, the buffer and the rule."""


def _list(items: Iterable[object]) -> str:
    return "[" + ", ".join(map(str, items)) + "]"


# -- kernels ------------------------------------------------------------------------------------------
def verify_kernel(kernel: Kernel) -> None:
    """Raise VerificationError unless the kernel's accesses are within bounds, its stores write each
    element once, and what it loads from a parameter that it stores is loaded at the stored index.
    """
    try:
        check_names(kernel)
    except ValueError as e:
        raise VerificationError(str(e)) from None
    stored: dict[str, list[Store]] = {}
    for store in kernel.stores:
        stored.setdefault(store.param, []).append(store)
    for name, stores in stored.items():
        _verify_stores(kernel.param(name), stores)
    for load in kernel.loads:
        if load.mask is None:
            _verify_bounds("load", kernel.param(load.param), load.index)
    for load in kernel.loads:
        _verify_in_place(load.param, load, stored.get(load.param, []))
    for s in kernel.stores:
        if s.mode and (s.over is None) != (s.space <= _places(s)):
            raise VerificationError(f"store {s.param}: scattered over {s.over}, found {_list(s.index)}")


def _places(s: Store) -> frozenset[Axis]:
    """The axes along which a store's points differ whatever its computed coordinates hold."""
    return frozenset[Axis]().union(*(i.axes() for i in s.index if isinstance(i, Expr)))


def _verify_stores(param: Param, stores: list[Store]) -> None:
    if any(d.is_const and d.value == 0 and s is not ONE for s, d in zip(param.shape, param.stride, strict=True)):
        raise VerificationError(f"store {param.name}: elements of strides {_list(param.stride)} share memory")
    for index, n in Counter(s.index for s in stores).items():
        if n > 1:
            raise VerificationError(f"store {param.name}: {_list(index)} is written by {n} stores, expected one")
    for store in stores:
        if store.mask is None:
            _verify_bounds("store", param, store.index)
    points, numel = _points(stores), product(param.shape)
    if points is not None and numel.is_const and points > numel.value:
        raise VerificationError(
            f"store {param.name}: {points} points write {numel} elements, each is written at most once"
        )


def _points(stores: Iterable[Store]) -> int | None:
    """How many elements the stores write in all, None where a size is a symbol or a mask chooses."""
    total = 0
    for store in stores:
        if store.mask is not None or store.mode:
            return None
        size = product(a.size for a in store.space)
        if not size.is_const:
            return None
        total += size.value
    return total


def _verify_bounds(what: str, param: Param, index: tuple[Index, ...]) -> None:
    axes = frozenset[Axis]().union(*(i.axes() if isinstance(i, Expr) else i.axes for i in index))
    if any(a.size.is_const and a.size.value == 0 for a in axes):
        return
    for d, (entry, size) in enumerate(zip(index, param.shape, strict=True)):
        bounds = _exact_range(entry) if isinstance(entry, Expr) and size.is_const else None
        if bounds is not None and not 0 <= bounds[0] <= bounds[1] < size.value:
            raise VerificationError(
                f"{what} {param.name}: dimension {d} of size {size} is indexed {bounds[0]}..{bounds[1]} by {entry}"
            )


def _exact_range(e: Expr) -> tuple[int, int] | None:
    """Least and largest value of an integer combination of axes of known size, None of anything else."""
    low = high = 0
    for mono, coef in e.terms:
        if not mono:
            low, high = low + coef, high + coef
            continue
        axis = mono[0]
        if len(mono) > 1 or not isinstance(axis, Axis) or not axis.size.is_const:
            return None
        reach = coef * (axis.size.value - 1)
        low, high = low + min(0, reach), high + max(0, reach)
    return low, high


def _verify_in_place(what: str, load: Load, stores: Iterable[Store]) -> None:
    for store in stores:
        if load.index != store.index:
            raise VerificationError(
                f"{what} is loaded at {_list(load.index)} and stored at {_list(store.index)}: "
                "what a kernel stores it loads at the stored index only"
            )


# -- schedules ----------------------------------------------------------------------------------------
def verify_schedule(kernel: Kernel, schedule: Schedule) -> None:
    """Raise VerificationError unless the loops run every point of every root once, grid loops first
    and over no reduced axis, lane loops last, and what is held or written past the caches exists.
    """
    needed = kernel.ordered.union(*(root.space for root in kernel.body))
    missing = [a.name for a in kernel.axes if a in needed and a not in {loop.axis for loop in schedule.loops}]
    if missing:
        raise VerificationError(f"schedule {schedule}: no loop over {_list(missing)}")
    kinds = [loop.kind for loop in schedule.loops]
    if "grid" in kinds[len(schedule.grid) :]:
        raise VerificationError(f"schedule {schedule}: grid loops come first")
    scanned = {s.over for s in kernel.scans}
    behind = False
    for loop in schedule.loops:
        if behind and loop.kind != "lane" and loop.axis not in scanned:
            raise VerificationError(f"schedule {schedule}: lane loops are the last, but for scans")
        behind = behind or loop.kind == "lane"
    for n, loop in enumerate(schedule.loops):
        if loop.axis not in kernel.axes:
            raise VerificationError(f"schedule {schedule}: {loop.axis} is not an axis of {_list(kernel.axes)}")
        if loop.kind == "grid" and loop.axis in kernel.ordered:
            raise VerificationError(f"schedule {schedule}: the grid runs over {loop.axis}, which is reduced or scanned")
        inside = any(later.axis is loop.axis for later in schedule.loops[n + 1 :])
        if inside and loop.step <= 1:
            raise VerificationError(f"schedule {schedule}: {loop.axis} has an inner loop, so its outer one has a tile")
        if loop.step > 1 and not inside and loop.kind != "lane":
            raise VerificationError(f"schedule {schedule}: the tile of {loop.axis} has no loop inside")
    values = set(kernel.values())
    for v in schedule.held:
        if v not in values:
            raise VerificationError(f"schedule {schedule}: the held value {v!r} is not one of the kernel's")
    if not set(schedule.past) <= set(kernel.writes) - set(kernel.reads):
        raise VerificationError(f"schedule {schedule}: of {_list(schedule.past)} not each is written and not read")


# -- plans --------------------------------------------------------------------------------------------
@dataclass
class _Memory:
    """What a plan has done so far: buffers alive and freed, who wrote them, and sizes known."""

    plan: Plan
    where: str
    live: set[str]
    freed: set[str]
    writer: dict[str, str]
    symbols: set[str]
    taken: dict[str, str] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)

    def fail(self, problem: str) -> VerificationError:
        return VerificationError(f"plan {self.plan.name}, {self.where}: {problem}")

    def read(self, name: str) -> None:
        if name not in self.plan.buffers:
            raise self.fail(f"no buffer {name}")
        whole = self.plan.memory(name)
        if name in self.freed or whole in self.freed:
            raise self.fail(f"buffer {name} is used after it was freed")
        if name not in self.live:
            raise self.fail(f"buffer {name} is used before anything wrote it")
        if whole in self.taken:
            raise self.fail(f"buffer {name} is used after {self.taken[whole]} took its memory")

    def take(self, name: str) -> None:
        """Let a buffer that is about to be written take over the memory of the one that it reuses."""
        new = self.plan.buffers[name]
        if new.reuses is None or name in self.live:
            return
        self.read(new.reuses)
        old = self.plan.buffers[new.reuses]
        if old.storage not in ("pooled", "extern") or (old.dtype, old.extent) != (new.dtype, new.extent):
            raise self.fail(
                f"buffer {name} cannot take the memory of {old.name}, {old.storage} of {old.extent} elements"
            )
        self.taken[new.reuses] = name
        self.live.add(name)

    def write(self, name: str, joins: tuple[str, ...] = ()) -> None:
        if name not in self.plan.buffers:
            raise self.fail(f"no buffer {name}")
        if name in self.freed:
            raise self.fail(f"buffer {name} is written after it was freed")
        given = self.plan.buffers[name].storage in ("input", "constant")
        if given and name not in self.plan.mutated:
            raise self.fail(f"buffer {name} is an input that the plan does not declare as mutated")
        over = self.plan.buffers[name].reuses
        if over is not None and self.taken.get(over) != name:
            raise self.fail(f"buffer {name} is to take the memory of {over}, which only a launch that writes it does")
        if not given and name in self.writer and name not in joins:
            raise self.fail(f"buffer {name} was written by {self.writer[name]} already")
        if (whole := self.plan.memory(name)) != name and whole in self.whole:
            raise self.fail(f"buffer {name} is written inside of {whole}, which was whole already")
        self.writer[name] = self.where
        self.live.add(name)

    def know(self, symbols: Iterable[Sym]) -> None:
        unknown = sorted({s.name for s in symbols} - self.symbols)
        if unknown:
            raise self.fail(f"size {unknown[0]} is used before an input or an extern defined it")

    def learn(self, names: Iterable[str]) -> None:
        """Sizes that are known from here on, and those that are computed from known ones."""
        self.symbols.update(names)
        given = self.plan.symbols
        while more := {n for n, s in given.items() if s.source and s.mentions(given) <= self.symbols} - self.symbols:
            self.symbols |= more

    def view(self, ref: TensorRef) -> None:
        self.read(ref.buffer)
        self.know(s for e in (*ref.shape, *ref.stride, ref.offset) for s in e.symbols())
        buffer = self.plan.buffers[ref.buffer]
        exprs = [*ref.shape, *ref.stride, ref.offset, *buffer.shape, *buffer.stride]
        # an input may be a part of a larger storage, whose other parts its views may reach
        if buffer.storage == "input" or not all(e.is_const for e in exprs) or product(ref.shape).value == 0:
            return
        last = ref.offset.value + sum((s.value - 1) * d.value for s, d in zip(ref.shape, ref.stride, strict=True))
        if ref.offset.value < 0 or last >= buffer.extent.value:
            raise self.fail(f"a view of buffer {ref.buffer} reaches element {last} of {buffer.extent}")


def verify_plan(plan: Plan) -> None:
    """Raise VerificationError unless buffers are written before they are read and not used after they
    are freed or taken over, each is written by one step (but for mutated inputs), launches bind buffers of their
    parameters' layout, kernels and schedules hold up, and every output exists at the end.
    """
    given = {b.name for b in plan.buffers.values() if b.storage == "constant" or b.name in plan.inputs}
    memory = _Memory(plan, "inputs", given, set(), {}, set())
    memory.learn(s for s in plan.symbols if s in plan.inputs)
    for name, buffer in plan.buffers.items():
        if name != buffer.name:
            raise memory.fail(f"buffer {buffer.name} is listed as {name}")
        if buffer.storage == "input" and name not in plan.inputs:
            raise memory.fail(f"buffer {name} is not among the inputs {_list(plan.inputs)}")
    _verify_regions(memory)
    verified: set[tuple[int, int]] = set()
    for n, step in enumerate(plan.steps):
        if isinstance(step, Launch):
            memory.where = f"step {n} {step.name}"
            try:
                if (key := (id(step.kernel), id(step.schedule))) not in verified:
                    verify_kernel(step.kernel)
                    if step.schedule is not None:
                        verify_schedule(step.kernel, step.schedule)
                    verified.add(key)
            except VerificationError as e:
                raise memory.fail(str(e)) from None
            _verify_launch(memory, step)
        elif isinstance(step, Extern):
            memory.where = f"step {n} {step.target}"
            _verify_extern(memory, step)
        elif isinstance(step, Join):
            memory.where = f"step {n} join"
            _verify_join(memory, step)
        elif isinstance(step, Free):
            memory.where = f"step {n} free"
            for name in step.buffers:
                if plan.memory(name) not in memory.taken:
                    memory.read(name)
                memory.live.discard(name)
                memory.freed.add(name)
    memory.where = "outputs"
    for n, output in enumerate(plan.outputs):
        if isinstance(output, TensorRef):
            memory.view(output)
        elif isinstance(output, Again) and not (
            0 <= output.output < n and isinstance(plan.outputs[output.output], TensorRef)
        ):
            raise memory.fail(f"output {n} is {output}, which is no tensor before it")
        elif isinstance(output, Expr):
            memory.know(output.symbols())


def _verify_regions(memory: _Memory) -> None:
    """Nothing stands between the launches of a region, and the grid of each has as many equal parts as it has tiles."""
    last: dict[Region, int] = {}
    for n, step in enumerate(memory.plan.steps):
        if not isinstance(step, Launch) or (region := step.region) is None:
            continue
        memory.where = f"step {n} {step.name}"
        if last.setdefault(region, n) < n - 1:
            raise memory.fail(f"step {last[region] + 1} stands between the launches of region {region.number}")
        last[region] = n
        grid = step.schedule.grid if step.schedule is not None else ()
        points = product(cdiv(loop.axis.size, loop.step) for loop in grid)
        if step.batched or (points % region.tiles) is not ZERO:
            raise memory.fail(f"the grid of {points} points is not {region.tiles} equal tiles")


def _verify_launch(memory: _Memory, step: Launch) -> None:
    kernel = step.kernel
    if len(step.binding) != len(kernel.params) * len(step.sizes):
        raise memory.fail(f"{len(step.binding)} buffers bound to {len(kernel.params)} parameters")
    if any({s for s, _ in row} != step.own for row in step.sizes):
        raise memory.fail("the tensors of a batch have different sizes of their own")
    memory.know(step.symbols)
    for run in step.members:
        _verify_binding(memory, kernel, run)
    if len(step.sizes) > 1:
        _verify_apart(memory, step)
    for name in dict.fromkeys(step.writes):
        memory.take(name)
    for name in dict.fromkeys(step.reads):
        memory.read(name)
    for run in step.members:
        _verify_writes(memory, kernel, run)


def _verify_binding(memory: _Memory, kernel: Kernel, run: Binding) -> None:
    for p in kernel.params:
        b = memory.plan.buffers.get(run.buffers[p.name])
        if b is None:
            raise memory.fail(f"no buffer {run.buffers[p.name]}")
        shape, stride = run.layout(p)
        # with a size of its own a parameter is all the memory of a buffer as one row
        row = p.shape != shape and b.is_dense and (shape, stride) == ((b.numel,), (ONE,))
        if p.dtype is not b.dtype or (shape, stride) != (b.shape, b.stride) and not row:
            raise memory.fail(
                f"parameter {p.name} is {p.dtype} {_list(shape)} strides {_list(stride)}, "
                f"buffer {b.name} is {b.dtype} {_list(b.shape)} strides {_list(b.stride)}"
            )


def _verify_apart(memory: _Memory, step: Launch) -> None:
    """No tensor of a batch needs what the kernel makes of another."""
    kernel, writer = step.kernel, dict[str, int]()
    for k, run in enumerate(step.members):
        for p in kernel.writes:
            if writer.setdefault(run.buffers[p], k) != k:
                raise memory.fail(f"two tensors of a batch write buffer {run.buffers[p]}")
    for k, run in enumerate(step.members):
        for p in kernel.reads:
            if writer.get(run.buffers[p], k) != k:
                raise memory.fail(f"a tensor of a batch reads buffer {run.buffers[p]}, which another one writes")


def _verify_writes(memory: _Memory, kernel: Kernel, run: Binding) -> None:
    bound, buffers = run.buffers, memory.plan.buffers
    stored: dict[str, list[Store]] = {}
    for store in kernel.stores:
        stored.setdefault(bound[store.param], []).append(store)
    for load in kernel.loads:
        try:
            _verify_in_place(f"buffer {bound[load.param]}", load, stored.get(bound[load.param], []))
        except VerificationError as e:
            raise memory.fail(str(e)) from None
    for name, stores in stored.items():
        memory.write(name, tuple(bound[p] for p in kernel.joins))
        points, numel = _points(stores), buffers[name].numel
        partly = points is not None and numel.is_const and points < numel.value
        if partly and buffers[name].storage != "input":
            raise memory.fail(f"buffer {name} has {numel} elements, the kernel writes {points}")


def _verify_extern(memory: _Memory, step: Extern) -> None:
    if step.single and len(step.results) != 1:
        raise memory.fail(f"one result expected, found {_list(step.results)}")
    for ref in step.refs:
        memory.view(ref)
    for name in step.writes:
        memory.write(name)
    memory.learn((*(symbol for _, symbol in step.sizes), *(symbol for _, _, symbol in step.dims)))


def _verify_join(memory: _Memory, step: Join) -> None:
    """The regions are written, lie inside of the buffer (or where it lies), and are each of its elements once."""
    for name in step.regions:
        memory.read(name)
    buffers, whole = memory.plan.buffers, memory.plan.memory(step.buffer)
    outside = [n for n in step.regions if memory.plan.memory(n) != whole or n == whole]
    if outside:
        raise memory.fail(f"buffer {outside[0]} is no region of {step.buffer}")
    memory.write(step.buffer)
    memory.whole.add(step.buffer)
    parent, parts = buffers[step.buffer], [buffers[n] for n in step.regions]
    exprs = [e for b in (parent, *parts) for e in (*b.shape, *b.stride, _begin(b))]
    if not all(e.is_const for e in exprs) or not 0 < parent.extent.value <= _MOST_MARKED:
        return
    marks = np.zeros(parent.extent.value, np.uint8)
    for b in parts:
        at = (_begin(b) - _begin(parent)).value
        if at < 0 or at + b.extent.value > marks.size and b.numel is not ZERO:
            raise memory.fail(f"region {b.name} at {at} reaches past the {marks.size} elements of {parent.name}")
        _elements(marks[at:], b)[...] += 1
    wrong = _elements(marks, parent) != 1
    if wrong.any() or marks.sum() != parent.numel.value:
        where, times = np.argwhere(wrong)[:1].tolist(), marks.max()
        raise memory.fail(f"the regions of {parent.name} are not each of its elements once: {where}, {times} times")


_MOST_MARKED = 1 << 22
"""The most elements of a buffer whose regions are marked one by one; those of a larger one are taken on trust."""


def _begin(b: Buffer) -> Expr:
    """The element of the memory that holds a buffer where it begins."""
    return ZERO if b.inside is None else b.inside[1]


def _elements(memory: np.ndarray, b: Buffer) -> np.ndarray:
    """The bytes that stand for a buffer's elements, in its shape."""
    shape, stride = (tuple(e.value for e in sizes) for sizes in (b.shape, b.stride))
    return np.lib.stride_tricks.as_strided(memory, shape, stride)
