"""The graph of groups: what depends on what, in an order that merges keep up to date, and who reads which buffer."""

from __future__ import annotations

import heapq
from collections.abc import Collection
from copy import copy
from math import prod
from typing import Any, NamedTuple

from minifuse.ir import dtypes
from minifuse.ir.device import DeviceModel
from minifuse.ir.index import Axis, Expr
from minifuse.ir.plan import Extern, Free, Join, Launch, Plan, Step, TensorRef
from minifuse.ir.value import Index, index_axes
from minifuse.passes.memory import mentioned, unknown_at_start
from minifuse.passes.schedule import HOLD_BYTES

from .group import Group, Tree, innermost
from .unify import Unified

# Groups looked at between two before they count as too far apart to tell.
LOOKED_AT = 2_000
# Groups looked at that wait for a fusion.
WAITING = 12
# Bytes that an element of a row takes while a kernel holds it between its passes.
ROW_ITEM = 4
# The version of a group that is in the graph no more.
GONE = -1
# What memory gives at once: an access that skips within it takes as long as one that does not.
LINE_BYTES = 64


class Moved(NamedTuple):
    """What accesses of one buffer move: the bytes of its elements, and seconds for the lines that these are in."""

    nbytes: int
    seconds: float


class TooFarError(Exception):
    """Whether one group depends on another was not found out in `LOOKED_AT` steps."""


class Graph:
    """Groups by the place of their first step in the plan, their edges, and the readers and the writer of each buffer.

    `rank` orders the groups topologically; a merge changes the ranks of what it moves alone (Pearce and Kelly, "A
    Dynamic Topological Sort Algorithm for Directed Acyclic Graphs", 2006). `place` leads from a step of the plan to
    the group that holds it; `lost` counts what took readers from buffers and was no merge. `least_rows` is how many
    rows a column's sum needs to be split into chunks of them.
    """

    def __init__(self, plan: Plan, device: DeviceModel, least_rows: int) -> None:
        self.plan = plan
        self.device = device
        self.least_rows = least_rows
        self.buffers = plan.buffers
        self.bytes = {name: plan.hint(b.nbytes) for name, b in plan.buffers.items()}
        self.seconds = {name: device.seconds(n) for name, n in self.bytes.items()}
        self.devices = {b.device for b in plan.buffers.values()}
        self.extents: dict[frozenset[Axis], int] = {}
        self.moves: dict[tuple[str, tuple[Index, ...]], Moved] = {}
        self.kept = {o.buffer for o in plan.outputs if isinstance(o, TensorRef)} | set(plan.mutated)
        self.lost = 0
        self.groups: dict[int, Group] = {}
        self.steps: dict[int, Step] = {}
        self.writer: dict[str, int] = {}
        self.readers: dict[str, set[int]] = {}
        self.place: dict[int, int] = {}
        for i, step in enumerate(plan.steps):
            if not isinstance(step, Free):
                self.add(i, step)
        self.rank = {i: k for k, i in enumerate(self.groups)}
        self.link()
        self.tree = self.descendants()

    def add(self, i: int, step: Launch | Extern | Join) -> None:
        if isinstance(step, Launch):
            kernel = step.kernel
            tree = Tree(kernel.body, (i,) * len(kernel.body))
            group = Group(i, step.name, kernel.origins, i, i, self.extent, tree, values=kernel.values())
        else:
            group = Group(i, step.origin, (step.origin,), i, i, self.extent, fixed=True)
        self.groups[i] = group
        self.steps[i] = step
        self.place[i] = i
        for b in group.reads if isinstance(step, Launch) else step.reads:
            self.readers.setdefault(b, set()).add(i)

    # -- edges -----------------------------------------------------------------------------------
    def link(self) -> None:
        """Edges: a reader after its writer, a writer of an input after those that read it, effects in order,
        and what depends on a number after the step that finds it."""
        effect: int | None = None
        late = unknown_at_start(self.plan)
        numbers: dict[str, int] = {}
        seen: dict[str, list[int]] = {}
        for i, step in self.steps.items():
            assert not isinstance(step, Free)
            if isinstance(step, Extern) and step.effect:
                if effect is not None:
                    self.edge(effect, i)
                effect = i
            for name in mentioned(self.plan, step, late):
                if name in numbers:
                    self.edge(numbers[name], i)
            if isinstance(step, Extern):
                numbers |= dict.fromkeys(step.defines, i)
            uses: Group | Extern | Join = self.groups[i] if isinstance(step, Launch) else step
            for b in uses.reads:
                if b in self.writer:
                    self.edge(self.writer[b], i)
                seen.setdefault(b, []).append(i)
            for b in [*uses.writes, *self.mutates(step)]:
                for r in [*seen.get(b, []), *([self.writer[b]] if b in self.writer else [])]:
                    self.edge(r, i)
                self.writer[b] = i

    def mutates(self, step: Step) -> list[str]:
        """Inputs that an extern writes into: everything mutated that it mentions."""
        if not isinstance(step, Extern) or not step.effect:
            return []
        return [b for b in step.reads if b in self.plan.mutated]

    def edge(self, a: int, b: int) -> None:
        if a != b:
            self.groups[a].succs.add(b)
            self.groups[b].preds.add(a)

    def descendants(self) -> dict[int, tuple[int, int]]:
        """Each step's place in a tree where a step hangs from the last of those that it needs, and the place behind all
        that hangs from it in turn. What one step leads to there it leads to whatever is merged: a path stays a path."""
        above = {i: max(g.preds, default=-1) for i, g in self.groups.items()}
        size = dict.fromkeys(above, 1)
        for i in reversed(above):
            if above[i] >= 0:
                size[above[i]] += size[i]
        free, places = {-1: 0}, {}
        for i, up in above.items():
            begin = free[up]
            free[up], free[i] = begin + size[i], begin + 1
            places[i] = (begin, begin + size[i])
        return places

    # -- order -----------------------------------------------------------------------------------
    def reach(self, start: Group, goal: Group, forward: bool) -> set[int] | None:
        """The groups after `start` that lie before `goal` in the order (before and after, where not `forward`), or None
        where one of them leads to the goal. What is nearest to the goal is looked at first, so that a path is found
        soon where there is one; most are found by their first step, in the tree of `descendants`.

        Raises TooFarError.
        """
        rank, groups, tree, sign = self.rank, self.groups, self.tree, 1 if forward else -1
        end, (begin, behind) = sign * rank[goal.id], tree[goal.id]
        heap: list[tuple[int, int]] = []
        seen: set[int] = set()
        further = start.succs if forward else start.preds
        while True:
            for s in further:
                if s not in seen and sign * rank[s] < end:
                    at, last = tree[s]
                    if at < begin < last if forward else begin < at < behind:
                        return None
                    seen.add(s)
                    heapq.heappush(heap, (-sign * rank[s], s))
            if not heap:
                return seen
            g = groups[heapq.heappop(heap)[1]]
            further = g.succs if forward else g.preds
            if goal.id in further:
                return None
            if len(seen) > LOOKED_AT:
                raise TooFarError

    def in_order(self, a: Group, b: Group) -> tuple[Group, Group]:
        return (a, b) if self.rank[a.id] < self.rank[b.id] else (b, a)

    def cyclic(self, a: Group, b: Group) -> bool:
        """Whether one of two groups depends on the other through a third: merging them would make a cycle.

        Raises TooFarError.
        """
        first, last = self.in_order(a, b)
        if len(first.succs) <= len(last.preds):
            return self.reach(first, last, True) is None
        return self.reach(last, first, False) is None

    def reorder(self, a: Group, b: Group) -> None:
        """Keep `rank` an order when b joins a: between the two, what leads to the later one goes before the merged
        group, what depends on the earlier one behind it."""
        first, last = self.in_order(a, b)
        before = self.reach(last, first, False)
        after = self.reach(first, last, True) if before else None
        if not before or not after:
            self.rank[a.id] = self.rank[last.id if before else first.id]
            return
        moved = [*sorted(before, key=self.rank.__getitem__), a.id, *sorted(after, key=self.rank.__getitem__)]
        slots = sorted(self.rank[i] for i in {*before, *after, first.id, last.id})
        for i, k in zip(moved, slots, strict=False):
            self.rank[i] = k

    # -- merging ---------------------------------------------------------------------------------
    def at(self, step: int) -> int:
        """The group that a step of the plan is in now; -1 where it is in none any more."""
        place = self.place
        found = step
        while found >= 0 and (up := place[found]) != found:
            found = up
        while step != found and (up := place[step]) != found:
            place[step] = found
            step = up
        return found

    def merge(self, a: Group, b: Group, how: Unified) -> None:
        """b joins a; what they alone read is not stored any more."""
        self.reorder(a, b)
        mixed = how.chunked
        a.join(b, how)
        self.absorb(a, b)
        # What nobody reads at all is left to the end: its loops are in the body until then.
        for name in [n for n in a.stored if n not in self.kept and self.readers.get(n) == {a.id}]:
            if name not in self.plan.mutated and name not in a.scattered:
                a.drop(name)
                del self.writer[name]
                self.readers.pop(name, None)
        a.derive()
        a.chunked = a.chunked or b.chunked or mixed and a.mixed
        a.version += 1

    def absorb(self, a: Group, b: Group) -> None:
        """a takes b's edges, reads and writes."""
        self.rank.pop(b.id)
        self.place[b.id] = a.id
        b.version = GONE
        for n in b.writes:
            self.writer[n] = a.id
        for n in b.reads:
            self.readers[n].discard(b.id)
            self.readers[n].add(a.id)
        for s in b.succs:
            self.groups[s].preds.discard(b.id)
            if s != a.id:
                self.edge(a.id, s)
        for p in b.preds:
            self.groups[p].succs.discard(b.id)
            if p != a.id:
                self.edge(p, a.id)
        a.succs.discard(b.id)
        a.preds.discard(b.id)
        del self.groups[b.id]

    def bury(self, a: Group) -> bool:
        """Drop a kernel if nobody reads it any more; whether nobody did."""
        if any(n in self.kept or self.readers.get(n, set()) - {a.id} for n in a.writes) or a.checks:
            return False
        for n in a.reads:
            self.readers[n].discard(a.id)
        for n in a.writes:
            self.writer.pop(n, None)
            self.readers.pop(n, None)
        for s in a.succs:
            self.groups[s].preds.discard(a.id)
        for p in a.preds:
            self.groups[p].succs.discard(a.id)
        self.rank.pop(a.id)
        self.place[a.id] = -1
        a.version = GONE
        self.lost += 1
        del self.groups[a.id]
        return True

    def copy(self) -> Graph:
        """A graph whose merges leave this one as it is."""
        made = copy(self)
        made.groups = {i: g.copy() for i, g in self.groups.items()}
        made.writer, made.place, made.rank = dict(self.writer), dict(self.place), dict(self.rank)
        made.readers = {n: set(r) for n, r in self.readers.items()}
        return made

    def extent(self, axes: frozenset[Axis]) -> int:
        """Points of a space of loops, dynamic sizes at their hints."""
        found = self.extents.get(axes)
        if found is None:
            found = self.extents[axes] = prod(self.plan.hint(x.size) for x in axes)
        return found

    def moved(self, name: str, places: Collection[tuple[Index, ...]]) -> Moved:
        """What a kernel moves of a buffer that it accesses at some places, each of which runs over some elements."""
        if len(places) == 1:
            (place,) = places
            found = self.moves.get((name, place))
            if found is None:
                found = self.moves[name, place] = self.move(name, place)
            return found
        each = [self.moved(name, (place,)) for place in places]
        return Moved(min(sum(m.nbytes for m in each), self.bytes[name]),
                     min(sum(m.seconds for m in each), self.seconds[name]))  # fmt: skip

    def move(self, name: str, place: tuple[Index, ...]) -> Moved:
        buffer, whole = self.buffers[name], self.bytes[name]
        item = dtypes.itemsize(buffer.dtype)
        nbytes = self.extent(index_axes(place)) * item
        if nbytes >= whole:
            return Moved(whole, self.seconds[name])
        steps = [abs(self.plan.hint(c * stride))
                 for i, stride in zip(place, buffer.stride, strict=True) if isinstance(i, Expr)
                 for c in map(i.coefficient, i.axes()) if c is not None]  # fmt: skip
        lines = nbytes * min(max(min(steps, default=LINE_BYTES), 1), max(LINE_BYTES // item, 1))
        return Moved(nbytes, self.seconds[name] * min(lines, whole) / whole)

    def innermost(self, g: Group) -> Axis | None:
        """The axis that vectors of a group run along."""
        if g.inner is None:
            g.inner = (innermost(g, self.buffers, self.bytes),)
        return g.inner[0]

    def holds(self, row: frozenset[Axis]) -> bool:
        """Whether a kernel holds a row over these axes between its passes."""
        return ROW_ITEM * self.extent(row) <= HOLD_BYTES

    # -- questions -------------------------------------------------------------------------------
    def only_between(self, name: str, a: Group, b: Group) -> bool:
        """Whether a buffer is read by these two alone, and by no caller."""
        return name not in self.kept and self.readers.get(name, set()) <= {a.id, b.id}

    def dies(self, a: Group, b: Group) -> bool:
        """Whether nothing outside b reads what a stores."""
        return not a.checks and all(self.only_between(n, a, b) for n in a.writes)

    def overwritten(self, a: Group) -> bool:
        """Whether a group reads an input that some step writes: its reader may run after the write."""
        return not self.plan.mutated.isdisjoint(a.reads)

    def mortal(self, name: str) -> bool:
        """Whether a buffer's memory is free once its last reader has run."""
        storage = self.buffers[name].storage
        given = storage == "constant" or storage == "input" and name not in self.plan.donated
        return not given and name not in self.kept

    def first_use(self, g: Group, but: Group) -> int | None:
        """The rank of the first step that waits for a group: its own where none does, None where another alone does."""
        if g.succs == {but.id}:
            return None
        return min((self.rank[s] for s in g.succs if s != but.id), default=self.rank[g.id])

    def freed_between(self, first: Group, last: Group) -> int:
        """Bytes that are free when the second of two groups runs, less those that are in use, since what depends on the
        first has run; the nearest of that, where it is much."""
        rank, end = self.rank, self.rank[last.id]
        ran, found = [first.id], {first.id}
        for i in ran:
            if len(ran) > WAITING:
                break
            more = sorted(s for s in self.groups[i].succs - found if rank[s] < end)
            found.update(more)
            ran += more
        uses: list[Any] = [self.steps[i] if self.groups[i].fixed else self.groups[i] for i in ran[1:]]
        made = {n for u in uses for n in u.writes}
        read = {n for u in uses for n in u.reads if n not in made and n not in first.writes and self.mortal(n)}
        freed = sum(self.bytes[n] for n in read if all(rank[r] < end for r in self.readers[n]))
        held = sum(self.bytes[n] for n in made if n in self.kept or not self.readers.get(n, set()) <= found)
        return max(freed - held, 0)

    def needed(self, name: str, me: int) -> bool:
        """Whether something besides a group reads a buffer."""
        return name in self.kept or bool(self.readers.get(name, set()) - {me})
