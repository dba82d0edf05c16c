"""Greedy fusion by bytes of memory traffic saved (DESIGN.md, section 4).

Every pair of kernels that shares a buffer is a candidate. A candidate is scored when it is taken
from the queue, checked against the rules, and merged or refused with a reason; the neighbours of a
merged pair are scored anew. Legality comes first, then benefit, then limits.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import replace
from math import prod

from minifuse.ir.index import Axis, Expr
from minifuse.ir.kernel import Store
from minifuse.ir.plan import Buffer, Extern, Free, Launch, Plan, Step, TensorRef
from minifuse.passes.context import CompileContext
from minifuse.passes.memory import unknown_at_start

from .group import Group, NotInvertible, build, forward, grid_axes, innermost
from .unify import Equation, Refusal, Unified, unify

MAX_BUFFERS = 28
MAX_VALUES = 600
MIN_GRID = 32
SMALL_WORK = 16_384
CHEAP = 24.0
READERS_CONSIDERED = 4
NEAR_STEPS = 24
LONG_BYTES = 65_536


class Fuser:
    """The state of fusing one plan."""

    def __init__(self, plan: Plan, ctx: CompileContext) -> None:
        self.plan = plan
        self.ctx = ctx
        self.buffers = plan.buffers
        self.fuel = ctx.options.fusion_fuel
        self.bytes = {name: plan.hint(b.nbytes) for name, b in plan.buffers.items()}
        self.groups: dict[int, Group] = {}
        self.steps: dict[int, Step] = {}
        self.writer: dict[str, int] = {}
        self.readers: dict[str, set[int]] = {}
        self.kept = {o.buffer for o in plan.outputs if isinstance(o, TensorRef)} | set(plan.mutated)
        self.queue: list[tuple[int, int, int, int, int]] = []
        for i, step in enumerate(plan.steps):
            if not isinstance(step, Free):
                self.add(i, step)
        self.slots: list[int | None] = list(self.groups)
        self.rank = {i: k for k, i in enumerate(self.groups)}
        self.link()

    # -- the graph of steps ----------------------------------------------------------------------
    def add(self, i: int, step: Launch | Extern) -> None:
        if isinstance(step, Launch):
            group = Group(i, step.name, step.kernel.body, step.kernel.origins, i, i)
        else:
            group = Group(i, step.origin, (), (step.origin,), i, i, fixed=True)
        self.groups[i] = group
        self.steps[i] = step
        for b in step.reads:
            self.readers.setdefault(b, set()).add(i)

    def link(self) -> None:
        """Edges: a reader after its writer, a writer of an input after those that read it, effects in order,
        and what depends on a number after the step that finds it."""
        effect: int | None = None
        late = unknown_at_start(self.plan)
        numbers: dict[str, int] = {}
        seen: dict[str, list[int]] = {}
        for i, step in self.steps.items():
            if isinstance(step, Extern) and step.effect:
                if effect is not None:
                    self.edge(effect, i)
                effect = i
            assert isinstance(step, (Launch, Extern))
            for name in self.numbers(step, late):
                if name in numbers:
                    self.edge(numbers[name], i)
            if isinstance(step, Extern):
                numbers |= dict.fromkeys(step.defines, i)
            for b in step.reads:
                if b in self.writer:
                    self.edge(self.writer[b], i)
                seen.setdefault(b, []).append(i)
            for b in [*step.writes, *self.mutates(step)]:
                for r in [*seen.get(b, []), *([self.writer[b]] if b in self.writer else [])]:
                    self.edge(r, i)
                self.writer[b] = i

    def numbers(self, step: Step, late: set[str]) -> set[str]:
        """The sizes that depend on data and the opaque results that a step mentions."""
        if isinstance(step, Extern):
            found = set(step.mentions)
        elif isinstance(step, Launch) and late:
            found = {s.name for s in step.kernel.symbols()}
        else:
            return set()
        symbols = self.plan.symbols
        while more := {n for name in found & late for n in symbols[name].mentions(late)} - found:
            found |= more
        return found

    def mutates(self, step: Step) -> list[str]:
        """Inputs that an extern writes into: everything mutated that it mentions."""
        if not isinstance(step, Extern) or not step.effect:
            return []
        return [b for b in step.reads if b in self.plan.mutated]

    def edge(self, a: int, b: int) -> None:
        if a != b:
            self.groups[a].succs.add(b)
            self.groups[b].preds.add(a)

    def between(self, a: Group, b: Group) -> set[int] | None:
        """The steps that depend on a and are ordered before b, or None when b depends on one of them.

        `rank` is a topological order of the groups that merges keep up to date (as in Pearce and
        Kelly, "A Dynamic Topological Sort Algorithm", 2006), so that only what lies between a and
        b is looked at.
        """
        end = self.rank[b.id]
        stack = [s for s in a.succs if s != b.id and self.rank[s] < end]
        seen = set(stack)
        while stack:
            for s in self.groups[stack.pop()].succs:
                if s == b.id:
                    return None
                if s not in seen and self.rank[s] < end:
                    seen.add(s)
                    stack.append(s)
        return seen

    def path(self, a: Group, b: Group) -> bool:
        """Whether one of two groups depends on the other through a third: merging them would make a cycle."""
        if self.rank[a.id] > self.rank[b.id]:
            a, b = b, a
        return self.between(a, b) is None

    def reorder(self, a: Group, b: Group) -> None:
        """Keep `rank` an order when b joins a: what depends on the earlier one moves behind both."""
        first, last = (a, b) if self.rank[a.id] < self.rank[b.id] else (b, a)
        after = self.between(first, last) or set()
        begin, end = self.rank[first.id], self.rank[last.id]
        slots = [k for k in range(begin, end + 1) if self.slots[k] is not None]
        here = [self.slots[k] for k in slots]
        ordered = [i for i in here if i not in after and i != a.id and i != b.id]
        ordered += [a.id, *(i for i in here if i in after)]
        for k in slots:
            self.slots[k] = None
        for k, i in zip(slots, ordered, strict=False):
            assert i is not None
            self.slots[k] = i
            self.rank[i] = k

    # -- candidates ------------------------------------------------------------------------------
    def saved(self, a: Group, b: Group) -> int:
        """Bytes that one kernel moves less than two: what is shared is loaded once, and what only
        they use is not stored."""
        total = 0
        for producer, consumer in ((a, b), (b, a)):
            for name in producer.writes.keys() & consumer.reads.keys() - self.plan.mutated:
                total += self.bytes[name]
                if name not in self.kept and self.readers[name] <= {a.id, b.id}:
                    total += self.bytes[name]
        for name in a.reads.keys() & b.reads.keys():
            if name not in a.writes and name not in b.writes:
                total += self.bytes[name]
        overwritten = (a.reads.keys() & b.writes.keys()) | (b.reads.keys() & a.writes.keys())
        return total + len(overwritten & self.plan.mutated)

    def push(self, a: int, b: int) -> None:
        if a == b or self.groups[a].fixed or self.groups[b].fixed:
            return
        if self.groups[a].first > self.groups[b].first:
            a, b = b, a
        ga, gb = self.groups[a], self.groups[b]
        worth = self.saved(ga, gb)
        if worth > 0:
            heapq.heappush(self.queue, (-worth, ga.first, gb.first, a, b))

    def push_neighbours(self, i: int) -> None:
        g = self.groups[i]
        for name in g.writes:
            for r in sorted(self.readers.get(name, ())):
                self.push(i, r)
        for name in g.reads:
            if name in self.writer:
                self.push(self.writer[name], i)
            near = sorted(self.readers[name], key=lambda r: abs(self.groups[r].first - g.first))
            for r in near[: READERS_CONSIDERED + 1]:
                self.push(i, r)

    # -- the walk --------------------------------------------------------------------------------
    def run(self) -> Plan:
        self.inline_constants()
        self.inline_gathered()
        for i in list(self.groups):
            if not self.groups[i].fixed:
                self.push_neighbours(i)
        tried: dict[tuple[int, int], tuple[int, int]] = {}
        while self.queue:
            worth, _, _, a, b = heapq.heappop(self.queue)
            if a not in self.groups or b not in self.groups:
                continue
            ga, gb = self.groups[a], self.groups[b]
            stamp = (ga.version, gb.version)
            if tried.get((a, b)) == stamp:
                continue
            now = self.saved(ga, gb)
            if now != -worth:
                self.push(a, b)
                continue
            tried[(a, b)] = stamp
            self.consider(ga, gb, now)
        return self.finish()

    def consider(self, a: Group, b: Group, worth: int) -> None:
        if self.fuel is not None and self.fuel <= 0:
            return
        verdict = self.legal(a, b)
        if isinstance(verdict, Refusal) and self.inline(a, b):
            return
        where = self.plan.origins.get(b.nodes[-1], "")
        subject = (a.nodes[-1], b.nodes[-1])
        if isinstance(verdict, Refusal):
            self.ctx.record(verdict.rule, *subject, taken=False, reason=verdict.reason + "; it would save {saved_bytes}",
                            where=where, saved_bytes=worth, **verdict.facts)  # fmt: skip
            return
        self.ctx.record("fuse", *subject, taken=True, reason="saves {saved_bytes} of traffic", where=where,
                        saved_bytes=worth, kernel=a.name)  # fmt: skip
        self.spend()
        self.merge(a, b, verdict)

    def spend(self) -> None:
        if self.fuel is not None:
            self.fuel -= 1

    # -- legality --------------------------------------------------------------------------------
    def legal(self, a: Group, b: Group) -> Unified | Refusal:
        if self.path(a, b):
            return Refusal("cycle", "another step between them depends on one and feeds the other", {})
        buffers = len({*a.reads, *b.reads, *a.writes, *b.writes})
        if buffers > MAX_BUFFERS:
            return Refusal("too many buffers", "{found} buffers, at most {limit}", {"found": buffers, "limit": MAX_BUFFERS})
        if a.size + b.size > MAX_VALUES:
            return Refusal("too large", "{found} values, at most {limit}", {"found": a.size + b.size, "limit": MAX_VALUES})
        devices = {self.buffers[n].device for n in [*a.writes, *b.writes, *a.reads, *b.reads]}
        if len(devices) > 1:
            return Refusal("devices", "on {devices}", {"devices": sorted(map(str, devices))})
        hard: list[Equation] = []
        soft: list[Equation] = []
        for name in [n for n in a.writes if n in b.reads] + [n for n in b.writes if n in a.reads]:
            ahead, behind = (a, b) if name in a.writes else (b, a)
            for index in behind.reads[name]:
                if not all(isinstance(i, Expr) for i in index):
                    return Refusal("gathered", "{buffer} is read at an index that is computed", {"buffer": name})
                pairs = zip(ahead.writes[name], index, strict=True)
                for w, r in pairs:
                    assert isinstance(r, Expr)
                    hard.append((w, r) if ahead is a else (r, w))
        for name in a.reads:
            if name in b.reads:
                left, right = a.reads[name], b.reads[name]
                if len(left) == 1 and len(right) == 1:
                    for x, y in zip(next(iter(left)), next(iter(right)), strict=True):
                        if isinstance(x, Expr) and isinstance(y, Expr):
                            soft.append((x, y))
        vertical = bool(hard)
        found = unify(hard if vertical else self.sibling_equations(a, b, soft), soft, a.axes, b.axes, a.reduced)
        if isinstance(found, Refusal):
            return found
        return self.parallel(a, b, found) or self.lengthens(a, b) or found

    def lengthens(self, a: Group, b: Group) -> Refusal | None:
        """One kernel runs when the earlier of the two is needed; what the other writes then waits for its reader.

        Bytes that wait over more than a few steps must be paid for by inputs that die earlier.
        """
        need_a, need_b = self.first_use(a, b), self.first_use(b, a)
        late = b if need_b > need_a else a
        distance = abs(need_a - need_b)
        if distance <= NEAR_STEPS:
            return None
        other = a if late is b else b
        waits = sum(self.bytes[n] for n in late.writes if not self.readers.get(n, set()) <= {a.id, b.id})
        dies = sum(self.bytes[n] for n in late.reads if self.readers[n] <= {a.id, b.id} and n not in other.writes)
        if waits <= dies or waits < LONG_BYTES:
            return None
        return Refusal("lengthens memory", "{waiting_bytes} more would wait over {steps} steps",
                       {"waiting_bytes": waits - dies, "steps": distance})  # fmt: skip

    def first_use(self, g: Group, but: Group) -> int:
        """The rank of the first step that waits for a group, itself where none does."""
        return min((self.rank[s] for s in g.succs if s != but.id), default=self.rank[g.id])

    def sibling_equations(self, a: Group, b: Group, soft: list[Equation]) -> list[Equation]:
        """Siblings must agree on how they walk what they share, or sharing saves nothing."""
        return [(x, y) for x, y in soft if isinstance(x.atom, Axis) or isinstance(y.atom, Axis) or x.axes() or y.axes()]

    def parallel(self, a: Group, b: Group, how: Unified) -> Refusal | None:
        """The merged kernel must keep enough independent work and its rows."""

        def moved(g: Group, env: dict[Axis, Expr]) -> tuple[list[frozenset[Axis]], frozenset[Axis]]:
            if not env:
                return g.spaces, g.reduced
            image = {x: env[x].axes() if x in env else frozenset({x}) for x in g.axes}
            spaces = [frozenset().union(*(image[x] for x in s)) if s else s for s in g.spaces]
            return spaces, frozenset().union(*(image[x] for x in g.reduced)) if g.reduced else g.reduced

        for g, env in ((a, how.first), (b, how.second)):
            if any(not isinstance(env[x].atom, Axis) for x in g.reduced if x in env):
                return Refusal("splits a reduction", "{axis} is reduced and would be cut in two",
                               {"axis": sorted(map(str, g.reduced))})  # fmt: skip
        spaces_a, reduced_a = moved(a, how.first)
        spaces_b, reduced_b = moved(b, how.second)
        dead = self.dies(a, b)
        if dead and not a.reduced:
            spaces_a = []
        spaces, reduced = spaces_a + spaces_b, reduced_a | reduced_b
        grid = grid_axes(spaces, reduced)
        work = max((self.extent(s) for s in spaces), default=1)
        before = [(grid_axes(s, r), g) for s, r, g in ((spaces_a, reduced_a, a), (spaces_b, reduced_b, b)) if s]
        heavy = [self.extent(g) for (g, _), s in zip(before, (x for x in (spaces_a, spaces_b) if x), strict=True)
                 if max(self.extent(axes) for axes in s) > SMALL_WORK]  # fmt: skip
        if heavy and self.extent(grid) < min(MIN_GRID, *heavy):
            return Refusal("loses parallelism", "{left} independent rows of {before}",
                           {"left": self.extent(grid), "before": min(heavy)})  # fmt: skip
        for old, g in before:
            env = how.first if g is a else how.second
            inner = innermost(g, self.buffers)
            inside = frozenset() if inner is None else env[inner].axes() if inner in env else frozenset({inner})
            lost = old - grid - reduced - inside
            if lost and work > SMALL_WORK:
                return Refusal("different rows", "{name} runs over {lost}, which the other does not have",
                               {"name": g.name, "lost": sorted(map(str, lost))})  # fmt: skip
        if dead and not a.reduced and a.cost > CHEAP and spaces_b:
            ran = {x for y in a.axes for x in (how.first[y].axes() if y in how.first else {y})}
            times = work / max(self.extent(ran), 1)
            inner = innermost(b, self.buffers)
            if times > 1 and inner in ran:
                return Refusal("recomputes", "{name} would run {times} times", {"name": a.name, "times": round(times)})
        return None

    def dies(self, a: Group, b: Group) -> bool:
        """Whether nothing outside b reads what a stores."""
        return not a.checks and all(
            n not in self.kept and self.readers.get(n, set()) <= {a.id, b.id} for n in a.writes
        )

    def extent(self, axes: Iterable[Axis]) -> int:
        return prod(self.plan.hint(x.size) for x in axes)

    # -- merging ---------------------------------------------------------------------------------
    def merge(self, a: Group, b: Group, how: Unified) -> None:
        self.reorder(a, b)
        body_a, inlined_a = a.substitute(how.first)
        body_b, inlined_b = b.substitute(how.second)
        a.body = body_a + body_b
        a.inlined = {**inlined_a, **inlined_b}
        if b.last > a.last:
            a.name = b.name
        a.nodes = a.nodes + b.nodes
        a.first, a.last = min(a.first, b.first), max(a.last, b.last)
        self.absorb(a, b)
        for name in [n for n in a.writes if n not in self.kept and self.readers.get(n, set()) <= {a.id}]:
            # read inside alone: the value travels in registers
            self.to_inlined(a, name)
        a.refresh()
        a.version += 1
        self.push_neighbours(a.id)

    def to_inlined(self, a: Group, name: str) -> None:
        if name in self.plan.mutated:
            return
        store = next(r for r in a.body if isinstance(r, Store) and r.param == name)
        a.body = tuple(r for r in a.body if r is not store)
        a.inlined[name] = store
        del self.writer[name]
        self.readers.pop(name, None)

    def absorb(self, a: Group, b: Group) -> None:
        """a takes b's edges, reads and writes."""
        self.rank.pop(b.id)
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

    # -- inlining --------------------------------------------------------------------------------
    def inline_constants(self) -> None:
        """Kernels that read nothing are computed where they are used."""
        for g in list(self.groups.values()):
            if g.fixed or g.reads or g.checks or not g.pure or g.cost > CHEAP:
                continue
            for name in list(g.writes):
                for r in sorted(self.readers.get(name, ())):
                    reader = self.groups[r]
                    gathered = any(not isinstance(i, Expr) for at in reader.reads.get(name, ()) for i in at)
                    if not reader.fixed and not gathered and self.affordable(reader):
                        self.inline_into(g, reader)
            self.bury(g)

    def inline_gathered(self) -> None:
        """What a kernel picks elements of by a computed index is computed at those elements alone."""
        for reader in list(self.groups.values()):
            if reader.fixed:
                continue
            again = True
            while again:
                again = False
                for name, places in list(reader.reads.items()):
                    maker = self.groups.get(self.writer.get(name, -1))
                    if maker is None or maker.fixed or not maker.pure or maker.checks or name in self.plan.mutated:
                        continue
                    if self.reads_overwritten(maker) or not any(not isinstance(i, Expr) for at in places for i in at):
                        continue
                    picked = sum(self.extent(a for i in at for a in (i.axes() if isinstance(i, Expr) else i.axes))
                                 for at in places)  # fmt: skip
                    small = picked * max(len(maker.reads), 1) * 4 < self.bytes[name]
                    if small and reader.size + maker.size <= MAX_VALUES and self.affordable(reader):
                        again = self.gather_into(maker, reader) or again

    def gather_into(self, maker: Group, reader: Group) -> bool:
        try:
            self.inline_into(maker, reader)
        except NotInvertible:
            return False
        self.ctx.record("inline", maker.nodes[-1], reader.nodes[-1], taken=True,
                        reason="computed at the elements that are picked, not stored",
                        where=self.plan.origins.get(reader.nodes[-1], ""))  # fmt: skip
        self.bury(maker)
        return True

    def affordable(self, reader: Group) -> bool:
        if self.fuel is not None and self.fuel <= 0:
            return False
        self.spend()
        return True

    def inline(self, a: Group, b: Group) -> bool:
        """Compute a's values where b loads them, at whatever index; a stays for its other readers.

        Pays when all of a's readers are kernels, a is cheap, and what they would read moves fewer
        bytes than storing a's result and reading it back.
        """
        if not a.pure or a.checks or len(a.writes) != 1 or self.reads_overwritten(a) or self.path(a, b):
            return False
        (name,) = a.writes
        if name in self.kept or name not in b.reads or name in self.plan.mutated:
            return False
        readers = self.readers[name] - {a.id}
        if any(self.groups[r].fixed or name not in self.groups[r].reads for r in readers):
            return False
        uses = sum(len(self.groups[r].reads[name]) for r in readers)
        if a.cost * uses > CHEAP and uses > 1 or uses > 8 or any(self.groups[r].size + a.size > MAX_VALUES for r in readers):
            return False
        for r in readers:
            if any(not isinstance(i, Expr) for index in self.groups[r].reads[name] for i in index):
                return False
            if self.groups[r].reduced and a.size > 60:
                return False
        if any(not isinstance(i.atom, Axis) and not i.is_const for i in a.writes[name]):
            return False
        before = self.bytes[name] * (1 + len(readers)) + sum(self.bytes[n] for n in a.reads)
        after = sum(self.bytes[n] for r in readers for n in a.reads if n not in self.groups[r].reads)
        if after >= before:
            return False
        for r in sorted(readers):
            if self.fuel is not None and self.fuel <= 0:
                break
            self.spend()
            reader = self.groups[r]
            self.ctx.record("inline", a.nodes[-1], reader.nodes[-1], taken=True,
                            reason="computed where it is read, saves {saved_bytes} over all readers",
                            where=self.plan.origins.get(reader.nodes[-1], ""), saved_bytes=before - after)  # fmt: skip
            self.inline_into(a, reader)
            self.push_neighbours(r)
        self.bury(a)
        return True

    def reads_overwritten(self, a: Group) -> bool:
        """Whether a group reads an input that some step writes: its reader may run after the write."""
        return not self.plan.mutated.isdisjoint(a.reads)

    def inline_into(self, a: Group, reader: Group) -> None:
        stores = {r.param: r for r in forward(a.body, a.inlined) if isinstance(r, Store) and r.param in reader.reads}
        reader.replace_loads(stores)
        for name in stores:
            self.readers[name].discard(reader.id)
        for n in a.reads:
            if n not in a.writes:
                self.readers[n].add(reader.id)
                if n in self.writer:
                    self.edge(self.writer[n], reader.id)
        reader.nodes = (*a.nodes, *(n for n in reader.nodes if n not in a.nodes))
        reader.version += 1

    def bury(self, a: Group) -> None:
        """Drop a kernel that nobody reads any more."""
        if any(n in self.kept or self.readers.get(n, set()) - {a.id} for n in a.writes) or a.checks:
            return
        for n in a.reads:
            self.readers[n].discard(a.id)
        for n in a.writes:
            self.writer.pop(n, None)
            self.readers.pop(n, None)
        for s in a.succs:
            self.groups[s].preds.discard(a.id)
        for p in a.preds:
            self.groups[p].succs.discard(a.id)
        self.slots[self.rank.pop(a.id)] = None
        del self.groups[a.id]

    # -- the result ------------------------------------------------------------------------------
    def finish(self) -> Plan:
        steps: list[Step] = []
        used: set[str] = set(self.kept)
        for i in self.order():
            group = self.groups[i]
            if group.fixed:
                step = self.steps[i]
                assert isinstance(step, Extern)
            else:
                step = build(group, lambda n, me=i: self.needed(n, me), self.buffers, self.plan.mutated)  # type: ignore[misc]
                if not step.kernel.body:
                    continue
            used |= {*step.reads, *step.writes}
            steps.append(step)
        buffers: dict[str, Buffer] = {
            n: b for n, b in self.buffers.items() if n in used or b.storage in ("input", "constant")
        }
        return replace(self.plan, steps=tuple(steps), buffers=buffers)

    def needed(self, name: str, me: int) -> bool:
        return name in self.kept or bool(self.readers.get(name, set()) - {me})

    def order(self) -> list[int]:
        """Steps in dependency order, as near to the original as that allows."""
        waiting = {i: len(g.preds) for i, g in self.groups.items()}
        ready = [(g.last, i) for i, g in self.groups.items() if not g.preds]
        heapq.heapify(ready)
        out = []
        while ready:
            _, i = heapq.heappop(ready)
            out.append(i)
            for s in self.groups[i].succs:
                waiting[s] -= 1
                if waiting[s] == 0:
                    heapq.heappush(ready, (self.groups[s].last, s))
        if len(out) != len(self.groups):
            raise AssertionError("fusion made a cycle")
        return out


def fuse(plan: Plan, ctx: CompileContext) -> Plan:
    """Merge kernels; the plan computes the same values, bit for bit."""
    return Fuser(plan, ctx).run()
