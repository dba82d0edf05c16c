"""Greedy fusion by bytes of memory traffic saved (DESIGN.md, section 4).

Every pair of kernels that shares a buffer is a candidate. A candidate is scored when it is taken
from the queue, checked against the rules, and merged or refused with a reason; the neighbours of a
merged pair are scored anew. Legality comes first, then benefit, then limits.
"""

from __future__ import annotations

import heapq
from dataclasses import replace

from minifuse.ir.index import Axis, Expr
from minifuse.ir.kernel import Store
from minifuse.ir.plan import Buffer, Extern, Free, Join, Launch, Plan, Step, TensorRef
from minifuse.passes import schedule, schedule_triton
from minifuse.passes.context import CompileContext
from minifuse.passes.memory import unknown_at_start

from .group import Group, NotInvertible, build, forward
from .legality import CHEAP, MAX_VALUES, Legality
from .order import order
from .unify import Refusal, Unified

READERS_CONSIDERED = 4


class Fuser(Legality):
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
        triton = schedule_triton.target(plan, ctx.options) == "triton"
        self.least_rows = (schedule_triton if triton else schedule).LEAST_ROWS
        self.queue: list[tuple[int, int, int, int, int]] = []
        for i, step in enumerate(plan.steps):
            if not isinstance(step, Free):
                self.add(i, step)
        self.slots: list[int | None] = list(self.groups)
        self.rank = {i: k for k, i in enumerate(self.groups)}
        self.link()

    # -- the graph of steps ----------------------------------------------------------------------
    def add(self, i: int, step: Launch | Extern | Join) -> None:
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
            assert not isinstance(step, Free)
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
        if isinstance(verdict, Refusal) and (self.inline(a, b) or self.inline(b, a)):
            return
        where = self.plan.origins.get(b.nodes[-1], "")
        subject = (a.nodes[-1], b.nodes[-1])
        if isinstance(verdict, Refusal):
            reason = verdict.reason + "; it would save {saved_bytes}"
            self.ctx.record(verdict.rule, *subject, taken=False, reason=reason,
                            where=where, saved_bytes=worth, **verdict.facts)  # fmt: skip
            return
        self.ctx.record("fuse", *subject, taken=True, reason="saves {saved_bytes} of traffic", where=where,
                        saved_bytes=worth, kernel=a.name)  # fmt: skip
        self.spend()
        self.merge(a, b, verdict)

    def spend(self) -> None:
        if self.fuel is not None:
            self.fuel -= 1

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
        a.chunked = a.chunked or b.chunked or how.chunked and a.mixed
        a.version += 1
        self.push_neighbours(a.id)

    def to_inlined(self, a: Group, name: str) -> None:
        if name in self.plan.mutated or name in a.scattered:
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
            for name in [n for n in g.writes if n not in self.plan.mutated]:
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
        if (
            a.cost * uses > CHEAP
            and uses > 1
            or uses > 8
            or any(self.groups[r].size + a.size > MAX_VALUES for r in readers)
        ):
            return False
        for r in readers:
            if any(not isinstance(i, Expr) for index in self.groups[r].reads[name] for i in index):
                return False
            if self.groups[r].reduced and a.size > 60:
                return False
        if any(isinstance(i, Expr) and not isinstance(i.atom, Axis) and not i.is_const for i in a.writes[name]):
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
        for i in self.ordered():
            group = self.groups[i]
            if group.fixed:
                step = self.steps[i]
                assert isinstance(step, (Extern, Join))
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

    def ordered(self) -> list[int]:
        """Steps in dependency order."""
        fixed = {i: self.steps[i] for i, g in self.groups.items() if g.fixed}
        reads = {i: list(fixed[i].reads) if i in fixed else g.external for i, g in self.groups.items()}  # type: ignore[union-attr]
        writes = {i: list(fixed[i].writes) if i in fixed else [n for n in g.writes if self.needed(n, i)]  # type: ignore[union-attr]
                  for i, g in self.groups.items()}  # fmt: skip

        def dies(name: str) -> bool:
            storage = self.buffers[name].storage
            given = storage == "constant" or storage == "input" and name not in self.plan.donated
            return not given and name not in self.kept

        return order(self.groups, reads, writes, self.bytes, dies)


def fuse(plan: Plan, ctx: CompileContext) -> Plan:
    """Merge kernels; the plan computes the same values, bit for bit."""
    return Fuser(plan, ctx).run()
