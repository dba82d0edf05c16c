"""Regions: kernels one behind the other that run tile by tile, so that what one leaves the next finds in the caches.

Kernels stay apart where their loops differ: a group norm's statistics are sums over all of an image, what they
normalise is walked by channels. But the outermost rows are often the same. Where each kernel reads and writes, in the
k-th of n equal parts of its grid, but the k-th of n equal parts of every buffer that one of them leaves for another,
the parts may run one behind the other: the first of every kernel, then the second. A region is that, of the fewest
parts that the nearest cache holds; no bit depends on it. Kernels whose sizes are known at the call only stay apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from minifuse.ir.index import Axis
from minifuse.ir.kernel import Check
from minifuse.ir.plan import Launch, Plan, Region, Step, touched
from minifuse.ir.value import Value
from minifuse.passes.context import CompileContext
from minifuse.passes.schedule_triton import target

# More parts are not worth the calls: a part is at least some thousands of elements.
MOST_TILES = 4096
# A longer region would keep nothing that one of so many does not.
MOST_LAUNCHES = 16


@dataclass(frozen=True)
class _Found:
    """Launches one behind the other, and what `choose` says of them, if they are more than one."""

    launches: list[Launch]
    tiles: int = 0
    reason: str = ""
    facts: dict[str, object] = field(default_factory=dict)


def tile(plan: Plan, ctx: CompileContext) -> Plan:
    """Mark the launches that run tile by tile on a CPU."""
    if target(plan, ctx.options) == "triton":
        return plan
    steps: list[Step] = []
    found = _Found([])
    for step in plan.steps:
        if isinstance(step, Launch) and tileable(step):
            longer = _longer(plan, ctx, found, step)
            if longer is None:
                steps += _marked(plan, ctx, found, len(steps))
            found = longer or _Found([step])
            continue
        steps += [*_marked(plan, ctx, found, len(steps)), step]
        found = _Found([])
    steps += _marked(plan, ctx, found, len(steps))
    return replace(plan, steps=tuple(steps))


def tileable(step: Launch) -> bool:
    """Whether a launch's grid can be cut at all: one of known sizes, whose checks nobody waits for."""
    grid = step.schedule.grid if step.schedule is not None else ()
    known = all(a.size.is_const and a.size.value for a in step.kernel.axes)
    even = known and not any(loop.axis.size.value % loop.step for loop in grid)
    return bool(grid) and even and not step.batched and not any(isinstance(r, Check) for r in step.kernel.body)


def _longer(plan: Plan, ctx: CompileContext, found: _Found, step: Launch) -> _Found | None:
    """The launches that may run tile by tile with one more; says why not where it shares what they write."""
    made = {b for s in found.launches for b in s.writes}
    if made.isdisjoint((*step.reads, *step.writes)) or len(found.launches) == MOST_LAUNCHES:
        return None
    launches = [*found.launches, step]
    tiles, reason, facts = choose(plan, ctx, launches)
    if tiles:
        return _Found(launches, tiles, reason, facts)
    ctx.record("region", found.launches[-1].name, step.name, taken=False, reason=reason,
               where=plan.origins.get(step.name, ""), **facts)  # fmt: skip
    return None


def _marked(plan: Plan, ctx: CompileContext, found: _Found, number: int) -> list[Launch]:
    launches = found.launches
    if not found.tiles:
        return launches
    ctx.record("region", *(s.name for s in launches), taken=True, reason=found.reason,
               where=plan.origins.get(launches[0].name, ""), **found.facts)  # fmt: skip
    region = Region(number, found.tiles, frozenset(shared(launches)))
    return [replace(s, region=region) for s in launches]


def shared(launches: Sequence[Launch]) -> list[str]:
    """Buffers that one of the launches writes and another one reads or writes."""
    users: dict[str, int] = {}
    for s in launches:
        for b in {*s.reads, *s.writes}:
            users[b] = users.get(b, 0) + 1
    return [b for b in dict.fromkeys(b for s in launches for b in s.writes) if users[b] > 1]


def choose(plan: Plan, ctx: CompileContext, launches: Sequence[Launch]) -> tuple[int, str, dict[str, object]]:
    """How many tiles, 0 for none, why, and the figures of the reason."""
    between, device = shared(launches), ctx.device
    near = device.levels[0]
    common = _common(plan, launches, between)
    if not common:
        return 0, "no part of {buffers} is read where it was written", {"buffers": ", ".join(between)}
    sizes: dict[str, int] = {}
    users: dict[str, list[Launch]] = {}
    for s in launches:
        for found in touched(plan, s):
            for b, n in found.items():
                sizes[b] = max(sizes.get(b, 0), n)
                if not any(s is other for other in users.setdefault(b, [])):
                    users[b].append(s)
    whole = sum(sizes.values())
    # a thread has a tile of its own
    even = [n for n in sorted(common) if n >= device.units and (n % device.units == 0 or n >= 4 * device.units)]
    fitting = [n for n in even if whole / n * device.units <= near.nbytes]
    facts: dict[str, object] = {"whole": whole, "room": int(near.nbytes)}
    if not fitting:
        least = -(-whole // max(common)) * device.units
        reason = "the least tiles, for each thread one, are {tile} bytes, and the nearest cache has {room}"
        return 0, reason, facts | {"tile": least}
    tiles = fitting[0]
    # what several only read they find in the cache too, where all of them walk it in such parts
    read = [b for b, by in users.items() if len(by) > 1 and b not in between]
    kept = [*between, *(b for b in read if tiles in _common(plan, users[b], [b]))]
    facts |= {"kept": sum(sizes[b] for b in kept), "tiles": tiles}
    saved = sum(sizes[b] * (1 / device.rate(sizes[b]) - 1 / near.rate) for b in kept)
    if saved <= 0:
        return 0, "the {kept} bytes that they share stay in the nearest cache anyway", facts
    return tiles, "{tiles} tiles keep {kept} bytes in the nearest cache", facts | {"seconds": saved}


def _common(plan: Plan, launches: Iterable[Launch], buffers: Sequence[str]) -> set[int]:
    """The numbers of parts that all of the launches keep to in these buffers."""
    return set.intersection(*(set(tilings(plan, s, buffers)) for s in launches))


def tilings(plan: Plan, step: Launch, between: Iterable[str]) -> Iterator[int]:
    """The numbers of equal parts of a launch's grid in each of which it touches but that part of certain buffers."""
    assert step.schedule is not None
    params = {name: step.binding[k] for k, name in enumerate(p.name for p in step.kernel.params)}
    wanted = set(between)
    accesses = []
    for access in step.kernel.accesses:
        name = params[access.param]
        if name not in wanted:
            continue
        buffer, param = plan.buffers[name], step.kernel.param(access.param)
        if buffer.inside is not None or name in plan.regions or not buffer.extent.is_const or not buffer.is_dense:
            return
        if any(isinstance(i, Value) for i in access.index):
            return
        offset = param.offset(access.index)
        strides: dict[Axis, int] = {}
        for a in offset.axes():
            c = offset.coefficient(a)
            if c is None or not c.is_const or not a.size.is_const:
                return
            strides[a] = c.value
            offset = offset - a.expr * c
        if not offset.is_const:
            return
        accesses.append((strides, offset.value, buffer.extent.value))
    yield from (n for n, k, part in _cuts(step) if all(_keeps(step, a, n, k, part) for a in accesses))


def _cuts(step: Launch) -> Iterator[tuple[int, int, int]]:
    """`n`, `k`, `part`: n parts of the grid are its loops before the k-th, and ranges of `part` points of that."""
    assert step.schedule is not None
    outer = 1
    for k, loop in enumerate(step.schedule.grid):
        count = loop.axis.size.value // loop.step
        for ranges in range(2, min(count, MOST_TILES // outer) + 1):
            if not count % ranges:
                yield outer * ranges, k, count // ranges
        outer *= count
        if outer > MOST_TILES:
            return


def _keeps(step: Launch, access: tuple[dict[Axis, int], int, int], n: int, k: int, part: int) -> bool:
    """Whether an access touches, in each part, but that part of its buffer, `extent` elements of it in all."""
    assert step.schedule is not None
    strides, first, extent = access
    if extent % n:
        return False
    share = extent // n
    fixed: dict[Axis, int] = {}
    grid = step.schedule.grid
    counts = [loop.axis.size.value // loop.step for loop in grid]
    for j, loop in enumerate(grid[: k + 1]):
        if loop.axis in fixed:
            return False
        # points of this loop from one part to the next, and how many parts that is
        points = part if j == k else 1
        parts = 1 if j == k else prod(counts[j + 1 : k]) * (counts[k] // part)
        moves = counts[j] // points > 1
        if moves and strides.get(loop.axis, 0) * loop.step * points != share * parts:
            return False
        fixed[loop.axis] = points * loop.step
    spans = (c * (fixed.get(a, a.size.value) - 1) for a, c in strides.items())
    return first >= 0 and first + sum(spans) < share
