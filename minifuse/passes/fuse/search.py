"""Greedy fusion by predicted time saved (DESIGN.md, section 4).

A candidate is a group and one that reads what it stores, or two that read one buffer, next to each other among its
readers. Candidates wait in a queue by the seconds that they save, the first of the captured graph first; one is scored
again when it is taken from it, then checked against the rules and merged or refused. Where siblings are refused, the
earlier one is tried with the next reader. What was refused is tried again, when the queue is empty, where one of the
two has grown since.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from minifuse.ir.decision import Decision
from minifuse.ir.plan import Buffer, Extern, Join, Launch, Plan, Step
from minifuse.passes import schedule, schedule_triton
from minifuse.passes.context import CompileContext

from . import chains, exact, inline, log
from .graph import Graph
from .group import Group
from .order import order
from .rules import RULES, Candidate, Force, Rule, named
from .unify import Refusal

# Readers of one buffer that a group is tried with and refused by, one after the other, before it gives up; fewer where
# the buffer takes a small share of a launch to read.
REFUSALS_IN_A_ROW, FEWER, SMALL_SHARE = 16, 2, 1 / 16


class Search:
    """The state of fusing one plan."""

    def __init__(self, plan: Plan, ctx: CompileContext) -> None:
        self.plan, self.ctx = plan, ctx
        self.fuel = ctx.options.fusion_fuel
        triton = schedule_triton.target(plan, ctx.options) == "triton"
        self.graph = Graph(plan, ctx.device, (schedule_triton if triton else schedule).LEAST_ROWS)
        given = tuple(ctx.options.fusion_rules)
        self.forced = tuple(r for r in given if isinstance(r, Force))
        self.given = tuple(r for r in given if not isinstance(r, Force))
        self.rules: tuple[Rule, ...] = (*self.given, *RULES)
        self.queue: list[tuple[float, int, int, int, int, int]] = []
        self.waiting: dict[tuple[int, int], Candidate] = {}
        self.tried: dict[tuple[int, int], tuple[int, int]] = {}
        self.refused: dict[tuple[int, int], Decision] = {}
        # the groups that a group was a candidate with: those that hold them now, and as they were then
        self.near: dict[int, set[int]] = {}
        self.pushed: dict[int, set[int]] = {}
        self.chain: dict[str, list[int]] = {}
        self.spots: dict[int, dict[str, int]] = {}
        self.misses: dict[tuple[int, str], int] = {}

    # -- candidates ------------------------------------------------------------------------------
    def push(self, a: int, b: int) -> None:
        groups = self.graph.groups
        if a == b or groups[a].fixed or groups[b].fixed:
            return
        if groups[a].first > groups[b].first:
            a, b = b, a
        c = Candidate(self.graph, groups[a], groups[b])
        if c.saving.nbytes > 0:
            self.wait(c)

    def wait(self, c: Candidate) -> None:
        a, b = c.a, c.b
        for i, j in ((a.id, b.id), (b.id, a.id)):
            self.near.setdefault(i, set()).add(j)
            self.pushed.setdefault(i, set()).add(j)
        self.waiting[a.id, b.id] = c
        heapq.heappush(self.queue, (-c.saving.seconds, -c.saving.nbytes, b.first, a.first, a.id, b.id))

    def find_candidates(self) -> None:
        """Every group with those that read what it stores, and with the next one that reads what it reads."""
        graph = self.graph
        for i, g in graph.groups.items():
            if not g.fixed:
                for name in g.reads:
                    chain = self.chain.setdefault(name, [])
                    self.spots.setdefault(i, {})[name] = len(chain)
                    chain.append(i)
        seen: set[tuple[int, int]] = set()
        pairs = [(graph.writer[n], r) for n, chain in self.chain.items() if n in graph.writer for r in chain]
        pairs += [pair for chain in self.chain.values() for pair in itertools.pairwise(chain)]
        for pair in pairs:
            if pair not in seen:
                seen.add(pair)
                self.push(*pair)

    def try_next(self, a: Group, b: Group) -> None:
        """The pair was refused: try the first with the readers behind the second."""
        theirs, small = self.spots.get(b.id, {}), SMALL_SHARE * self.graph.device.launch
        for name in a.reads:
            spot = theirs.get(name)
            if spot is None:
                continue
            misses = self.misses.get((a.id, name), 0)
            if misses >= (FEWER if self.graph.seconds[name] < small else REFUSALS_IN_A_ROW):
                continue
            self.misses[a.id, name] = misses + 1
            chain = self.chain[name]
            for k in range(spot + 1, len(chain)):
                c = self.graph.at(chain[k])
                if c >= 0 and c != a.id and c != b.id:
                    if c not in self.pushed.get(a.id, ()):
                        self.push(a.id, c)
                    break

    # -- the walk --------------------------------------------------------------------------------
    def decide(self) -> Search:
        """Merge the groups, by the user's log or by the rules."""
        entries = log.given(self.ctx)
        if entries is not None:
            self.replay(entries)
        else:
            self.search()
        return self

    def search(self) -> None:
        """Find what to fuse."""
        self.force()
        numbers = inline.constants(self)
        inline.gathered(self)
        if self.ctx.options.fusion == "exact":
            try:
                exact.plan(self)
            except exact.TooLargeError as why:
                self.ctx.record("exact", self.plan.name, taken=False, reason="fused greedily: {why}", why=str(why))
        chains.contract(self)
        self.find_candidates()
        again = True
        while again and not self.empty:
            again = self.drain()
            for pair in self.alive(self.tried):
                if self.tried.get(pair) != self.stamp(*pair):
                    self.push(*pair)
        inline.ride(self, numbers)

    def alive(self, pairs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """The groups that pairs of groups are in now, each pair once, those that became one left out."""
        at, groups = self.graph.at, self.graph.groups
        found = ((at(a), at(b)) for a, b in pairs)
        live = ((a, b) if groups[a].first <= groups[b].first else (b, a) for a, b in found if a >= 0 <= b and a != b)
        return iter(dict.fromkeys(live))

    def replay(self, entries: Iterable[log.Entry]) -> None:
        """Do what a log says, where it is legal."""
        steps = {step.name: i for i, step in self.graph.steps.items() if isinstance(step, Launch)}
        for e in entries:
            if e.rule == log.JOINED:
                continue  # done before
            a, b = (self.graph.at(steps.get(name, -1)) for name in (e.first, e.second))
            if self.empty:
                return
            if a < 0 or b < 0 or a == b:
                why = "both are in one kernel" if a == b >= 0 else "{missing} is no kernel of this graph any more"
                missing = e.first if a < 0 else e.second
                self.ctx.record("fusion log", e.first, e.second, taken=False, reason=why, missing=missing)
            elif e.rule == "inline":
                inline.obey(self, self.graph.groups[a], self.graph.groups[b])
            else:
                self.obey(a, b, "as the log says")

    def force(self) -> None:
        """Fuse what the user's `Force`s name, whether or not it shares a buffer."""
        for forced in self.forced:
            sides = [[i for i, g in self.graph.groups.items() if not g.fixed and named(self.plan, g, pattern)]
                     for pattern in forced.names or ()]  # fmt: skip
            for a, b in itertools.product(*sides) if sides else ():
                a, b = self.graph.at(a), self.graph.at(b)
                if a != b and not self.empty:
                    self.obey(a, b, "forced by the user")

    def obey(self, a: int, b: int, reason: str) -> None:
        """Fuse two groups if the rules of meaning allow it."""
        a, b = sorted((a, b), key=lambda i: self.graph.groups[i].first)
        c = Candidate(self.graph, self.graph.groups[a], self.graph.groups[b])
        broken = self.verdict(c, [r for r in self.rules if r.legal])
        if broken is None:
            self.accept(c, reason + ", saves {saved_bytes} of traffic")
        else:
            self.refuse(c, *broken)

    def drain(self) -> bool:
        """Take candidates from the queue until it is empty; whether any was merged."""
        graph, merged = self.graph, False
        while self.queue and not self.empty:
            seconds, nbytes, _, _, a, b = heapq.heappop(self.queue)
            c = self.waiting.pop((a, b), None)
            if c is None or not c.fresh:
                a, b = graph.at(a), graph.at(b)
                if a < 0 or b < 0 or a == b:
                    continue
                if graph.groups[a].first > graph.groups[b].first:
                    a, b = b, a
                c = Candidate(graph, graph.groups[a], graph.groups[b])
            if self.tried.get((a, b)) == self.stamp(a, b) or c.saving.nbytes <= 0:
                continue
            if (c.saving.seconds, c.saving.nbytes) < (-seconds, -nbytes):
                self.wait(c)
                continue
            self.tried[a, b] = self.stamp(a, b)
            merged = self.consider(c) or merged
        return merged

    def stamp(self, a: int, b: int) -> tuple[int, int]:
        return self.graph.groups[a].version, self.graph.groups[b].version

    @property
    def empty(self) -> bool:
        """Whether there is no fuel left."""
        return self.fuel is not None and self.fuel <= 0

    def spend(self) -> None:
        if self.fuel is not None:
            self.fuel -= 1

    def verdict(self, c: Candidate, rules: Sequence[Rule]) -> tuple[Rule, Mapping[str, Any]] | None:
        """The first rule that a candidate breaks, and the values that break it."""
        for rule in rules:
            if (facts := rule.broken(c)) is not None:
                return rule, facts
        return None

    def asked(self, c: Candidate) -> Sequence[Rule]:
        """The rules for a candidate: where the user forces it, those of meaning."""
        forced = any(f.matches(c) for f in self.forced)
        return [r for r in self.rules if r.legal] if forced else self.rules

    def consider(self, c: Candidate) -> bool:
        a, b = c.a, c.b
        broken = self.verdict(c, self.asked(c))
        if broken is None:
            self.accept(c, "saves {saved_bytes} of traffic")
            return True
        if inline.duplicate(self, a, b) or inline.duplicate(self, b, a):
            return True
        self.refuse(c, *broken)
        self.try_next(a, b)
        return False

    def accept(self, c: Candidate, reason: str) -> None:
        self.ctx.decisions.append(self.decision("fuse", c.a, c.b, True, reason, stake(c)))
        self.spend()
        self.merge(c)

    def refuse(self, c: Candidate, rule: Rule, facts: Mapping[str, Any]) -> None:
        reason = rule.reason + "; it would save {saved_bytes}"
        self.refused[c.a.id, c.b.id] = self.decision(rule.name, c.a, c.b, False, reason, {**stake(c), **facts})

    def decision(self, rule: str, a: Group, b: Group, taken: bool, reason: str, facts: Mapping[str, Any]) -> Decision:
        """About two groups: `first` and `second` are the kernels of the unfused plan that stand for them in a log."""
        origins, steps = self.plan.origins, self.graph.steps
        one, two = subject = (a.nodes[-1], b.nodes[-1])
        lines = dict.fromkeys((origins.get(one, ""), origins.get(two, "")))
        names = {"first": steps[a.id].name, "second": steps[b.id].name}  # type: ignore[union-attr]
        return Decision(rule, subject, taken, reason, {**facts, **names}, "; ".join(filter(None, lines)))

    def forbids(self, a: Group, b: Group) -> Refusal | None:
        """Which of the user's rules keeps two groups apart."""
        broken = self.verdict(Candidate(self.graph, a, b), self.given) if self.given else None
        return None if broken is None else Refusal(broken[0].name, broken[0].reason, broken[1])

    def merge(self, c: Candidate) -> None:
        a, b = c.a, c.b
        self.graph.merge(a, b, c.unified)
        at, gone = self.graph.at, {a.id, -1}
        mine, theirs = ({at(i) for i in self.near.pop(g.id, ())} - gone for g in (a, b))
        both = mine & theirs
        self.near[a.id] = mine | theirs
        few, many = sorted((self.pushed.pop(g.id, set()) for g in (a, b)), key=len)
        many |= few
        self.pushed[a.id] = many
        spots = self.spots.setdefault(a.id, {})
        for name, k in self.spots.pop(b.id, {}).items():
            spots[name] = max(k, spots.get(name, k))
            self.misses.pop((a.id, name), None)
        for i in sorted(both):
            self.push(a.id, i)

    def rewritten(self, g: Group) -> None:
        """A group reads other buffers than before: it is a neighbour of theirs."""
        graph = self.graph
        for name in g.reads:
            spots = self.spots.setdefault(g.id, {})
            if name in spots:
                continue
            chain = self.chain.setdefault(name, [])
            near = [r for r in (graph.at(i) for i in chain[-1:]) if r >= 0]
            spots[name] = len(chain)
            chain.append(g.id)
            for i in [*near, *([graph.writer[name]] if name in graph.writer else [])]:
                self.push(i, g.id)

    # -- the result ------------------------------------------------------------------------------
    def finish(self) -> Plan:
        graph = self.graph
        self.account()
        steps: list[Step] = []
        used: set[str] = set(graph.kept)
        for i in self.ordered():
            group = graph.groups[i]
            if group.fixed:
                step = graph.steps[i]
                assert isinstance(step, (Extern, Join))
            elif group.version == 0:
                launch = graph.steps[i]
                assert isinstance(launch, Launch)
                step = launch
                if not all(graph.needed(n, i) for n in step.writes):
                    step = group.build(lambda n, me=i: graph.needed(n, me), graph.buffers, self.plan.mutated)  # type: ignore[misc]
            else:
                step = group.build(lambda n, me=i: graph.needed(n, me), graph.buffers, self.plan.mutated)  # type: ignore[misc]
            if isinstance(step, Launch) and not step.kernel.body:
                continue
            used |= {*step.reads, *step.writes}
            steps.append(step)
        buffers: dict[str, Buffer] = {
            n: b for n, b in graph.buffers.items() if n in used or b.storage in ("input", "constant")
        }
        return replace(self.plan, steps=tuple(steps), buffers=buffers)

    def account(self) -> None:
        """Keep the refusals that still say something, and say of each operator that ended up alone why it did."""
        groups, best = self.graph.groups, dict[int, Decision]()
        for (a, b), decision in self.refused.items():
            if a in groups and b in groups:
                self.ctx.decisions.append(decision)
                for i in (a, b):
                    if i not in best or decision.facts["saved_seconds"] > best[i].facts["saved_seconds"]:
                        best[i] = decision
        for i, g in groups.items():
            if g.version or g.fixed or self.empty:
                continue
            node, where = g.nodes[-1], self.plan.origins.get(g.nodes[-1], "")
            if i in best:
                other = next((n for n in best[i].subject if n != node), node)
                self.ctx.record("alone", node, taken=True, reason="{why} keeps it from {other}, its best neighbour",
                                where=where, why=best[i].rule, other=other)  # fmt: skip
            else:
                reason = "no other kernel reads or writes a buffer of its own"
                self.ctx.record("alone", node, taken=True, reason=reason, where=where)

    def ordered(self) -> list[int]:
        """Steps in dependency order."""
        graph = self.graph
        fixed = {i: graph.steps[i] for i, g in graph.groups.items() if g.fixed}
        reads = {i: list(fixed[i].reads) if i in fixed else g.external for i, g in graph.groups.items()}  # type: ignore[union-attr]
        writes = {i: list(fixed[i].writes) if i in fixed else [n for n in g.writes if graph.needed(n, i)]  # type: ignore[union-attr]
                  for i, g in graph.groups.items()}  # fmt: skip
        return order(graph.groups, reads, writes, graph.bytes, graph.mortal)


def stake(c: Candidate) -> dict[str, Any]:
    """What is at stake: bytes, and predicted seconds."""
    return {"saved_bytes": c.saving.nbytes, "saved_seconds": c.saving.seconds}


def fuse(plan: Plan, ctx: CompileContext) -> Plan:
    """Merge kernels; the plan computes the same values, bit for bit."""
    return Search(plan, ctx).decide().finish()


class Landed(NamedTuple):
    """Where an operator of a plan is computed when the plan is fused, and the instructions of it alone."""

    kernel: int
    instructions: float


def landed(plan: Plan, ctx: CompileContext) -> dict[str, Landed]:
    """The operators of a plan that have a kernel, by name; one that several kernels compute is in the first."""
    search, found = Search(plan, ctx), dict[str, Landed]()
    groups = search.graph.groups
    alone = {node: g.instructions / len(g.nodes) for g in groups.values() for node in g.nodes}
    search.decide()
    for k, i in enumerate(search.ordered()):
        for node in groups[i].nodes if not groups[i].fixed else ():
            found.setdefault(node, Landed(k, alone.get(node, 0.0)))
    return found
