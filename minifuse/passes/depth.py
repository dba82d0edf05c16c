"""How deep each step of a plan lies in the graph of what must run before what, and orders of it that join steps."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from minifuse.ir.plan import Extern, Free, Plan
from minifuse.passes.memory import mentioned, unknown_at_start


class Depths:
    """The graph of a plan's steps, each by its position, and a depth for each that is greater than those of all that it
    waits for. Of steps with one depth none waits for another, not through others either."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.before: list[list[int]] = [[] for _ in plan.steps]
        self.after: list[list[int]] = [[] for _ in plan.steps]
        self.writer: dict[str, int] = {}
        self.readers: dict[str, int] = {}
        self.link()
        self.depth: list[int] = []
        for before in self.before:
            self.depth.append(1 + max((self.depth[i] for i in before), default=-1))

    def link(self) -> None:
        """Edges: a reader behind its writer, a writer of an input behind those that read it, effects in order, and what
        depends on a number behind the step that finds it."""
        late = unknown_at_start(self.plan)
        numbers: dict[str, int] = {}
        seen: dict[str, list[int]] = {}
        effect: int | None = None
        for i, step in enumerate(self.plan.steps):
            if isinstance(step, Free):
                raise ValueError("a plan whose memory is placed keeps its order")
            waits = {numbers[name] for name in mentioned(self.plan, step, late) if name in numbers}
            writes = list(step.writes)
            if isinstance(step, Extern):
                numbers |= dict.fromkeys(step.defines, i)
                if step.effect:
                    waits |= set() if effect is None else {effect}
                    effect = i
                    writes += [b for b in step.reads if b in self.plan.mutated]
            for b in step.reads:
                waits |= {self.writer[b]} if b in self.writer else set()
                seen.setdefault(b, []).append(i)
                self.readers[b] = self.readers.get(b, 0) + 1
            for b in writes:
                waits |= {*seen.pop(b, ()), *([self.writer[b]] if b in self.writer else ())}
                self.writer[b] = i
            self.before[i] = sorted(waits - {i})
            for j in self.before[i]:
                self.after[j].append(i)

    def clusters(self, group: Sequence[int]) -> list[list[int]]:
        """Steps that can have one depth together, each list in order; they have it from then on.

        The depths that a step can have, those of all others as they are, lie between what it waits for and what waits
        for it. Sorted by the least, one walk finds the fewest depths that meet every interval.
        """
        ends = {i: self.ends(i) for i in group}
        found: list[tuple[int, list[int]]] = []
        most = -1.0
        for i in sorted(group, key=lambda i: (ends[i][0], i)):
            low, high = ends[i]
            if not found or low > most:
                found.append((low, []))
                most = high
            most = min(most, high)
            found[-1][1].append(i)
            found[-1] = low, found[-1][1]
        out: list[list[int]] = []
        for depth, members in found:
            kept: dict[int, None] = {}
            for i in sorted(members):
                low, high = self.ends(i)  # one may have moved that this one waits for, or that waits for it
                if low <= depth <= high:
                    self.depth[i] = depth
                    kept[i] = None
            out += [list(kept), *([i] for i in members if i not in kept)]
        return [found for found in out if found]

    def ends(self, i: int) -> tuple[int, float]:
        low = 1 + max((self.depth[j] for j in self.before[i]), default=-1)
        return low, min((self.depth[j] - 1 for j in self.after[i]), default=float("inf"))

    def shared_bytes(self, i: int) -> int:
        """Bytes of what a step reads that others of the plan write, or that dies with the call, and of what it writes
        that others read; the memory that stays the caller's aside."""
        plan, step = self.plan, self.plan.steps[i]
        assert not isinstance(step, Free)
        names = {b for b in step.reads if self.writer.get(b, i) != i} | {b for b in step.writes if self.readers.get(b)}
        names = {b for b in names if plan.buffers[b].storage != "input"} | (set(step.reads) & plan.donated)
        return sum(plan.hint(plan.buffers[b].nbytes) for b in names)

    def ordered(self, where: Mapping[int, int]) -> list[int]:
        """An order of the steps where those of one `where` are one step, at that position; the plan's own order
        otherwise, but for what waits for a step that has moved."""
        at = [where.get(i, i) for i in range(len(self.before))]
        waiting: dict[int, int] = dict.fromkeys(at, 0)
        edges: dict[int, list[int]] = {}
        for i, before in enumerate(self.before):
            for j in before:
                waiting[at[i]] += 1
                edges.setdefault(at[j], []).append(at[i])
        ready = [i for i, left in waiting.items() if not left]
        heapq.heapify(ready)
        out: list[int] = []
        while ready:
            i = heapq.heappop(ready)
            out.append(i)
            for j in edges.get(i, ()):
                waiting[j] -= 1
                if not waiting[j]:
                    heapq.heappush(ready, j)
        if len(out) != len(waiting):
            raise AssertionError("a batch made a cycle")
        return out
