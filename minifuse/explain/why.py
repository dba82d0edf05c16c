"""Why two nodes of a graph ended up in different kernels: the groups as fusion left them, asked again."""

from __future__ import annotations

import difflib
import itertools
from collections import deque
from dataclasses import dataclass

from minifuse.ir.decision import Decision
from minifuse.ir.plan import Extern, Join, Plan
from minifuse.passes.context import CompileContext
from minifuse.passes.fuse.log import entries, read
from minifuse.passes.fuse.rules import Candidate
from minifuse.passes.fuse.search import Search
from minifuse.records import Record


@dataclass(frozen=True)
class WhyNot:
    """The first thing that keeps two nodes apart.

    `rule` is a fusion rule's name, "extern" where an operator of ATen lies between, "join" where a buffer that is put
    together does, "nothing shared" where no way through memory joins them, "not reached" where no rule forbids it;
    empty where they are together. `between` names the nodes of the two neighbours on the way that it is about.
    """

    first: str
    second: str
    rule: str
    words: str
    between: tuple[str, str]

    @property
    def together(self) -> bool:
        return not self.rule

    def __str__(self) -> str:
        if self.together:
            return f"{self.first} and {self.second} are one kernel{self.words and ': '}{self.words}"
        about = "" if {*self.between} == {self.first, self.second} else f" ({self.between[0]} + {self.between[1]})"
        return f"{self.first} and {self.second} are apart: {self.rule}{about}: {self.words}"


def why_not(record: Record, first: str, second: str) -> WhyNot:
    """Why two FX nodes of a compiled graph are not in one kernel.

    Neighbours, and what the user forces, are asked the rules directly; else the shortest way from one to the other
    through what they read and write is walked, and the first pair on it that cannot be one kernel is the answer. Where
    other steps lie between two neighbours, the way is through them.

    Raises ValueError: a node that is in no kernel and no extern of the graph (a view, say), with near names.
    """
    plan = record.stages.get("join", record.stages["lower"])
    search = Search(plan, CompileContext(record.name, record.stage, record.options, device=record.device))
    log = read(entries(record.decisions, record.name))
    search.replay(log)
    pair = (first, second)
    starts, ends = holding(search, first), holding(search, second)
    if starts & ends:
        return WhyNot(first, second, "", "", pair)
    if batched(record, first, second):
        return WhyNot(first, second, "", "one launch over tensors of their own", pair)
    way = forced(search, starts, ends) or shortest(search, starts, ends)
    if not way:
        return WhyNot(first, second, "nothing shared", "no buffer leads from one to the other", pair)
    return along(search, way, first, second) or WhyNot(first, second, "not reached", unreached(record, len(log)), pair)


def along(search: Search, way: list[int], first: str, second: str) -> WhyNot | None:
    """What keeps the first two neighbours on a way apart that cannot be one kernel."""
    groups = search.graph.groups
    for a, b in itertools.pairwise(way):
        pair = (named(search, a, first, second), named(search, b, second, first))
        for i in (a, b):
            if groups[i].fixed:
                step = search.graph.steps[i]
                assert isinstance(step, (Extern, Join))
                words = f"the pieces of {named(search, i)} are written in place, and what reads the whole comes after"
                if isinstance(step, Extern):
                    words = f"{step.target} runs by ATen, {step.reason}"
                return WhyNot(first, second, "extern" if isinstance(step, Extern) else "join", words, pair)
        earlier, later = sorted((groups[a], groups[b]), key=lambda g: g.first)
        c = Candidate(search.graph, earlier, later)
        broken = search.verdict(c, search.asked(c))
        if broken is not None and broken[0].name == "cycle":  # what lies between
            found = along(search, shortest(search, {a}, {b}, direct=False), first, second)
            if found is not None:
                return found
        elif broken is not None:
            rule, facts = broken
            return WhyNot(first, second, rule.name, Decision(rule.name, pair, False, rule.reason, facts).words, pair)
        elif len(way) == 2 and c.saving.nbytes <= 0 and not forced(search, {a}, {b}):
            return WhyNot(first, second, "nothing shared", "one kernel would move no byte less than two", pair)
    return None


def forced(search: Search, starts: set[int], ends: set[int]) -> list[int]:
    """The first two groups that the user's rules fuse whether or not they share a buffer; empty where none do."""
    groups = search.graph.groups
    for a, b in itertools.product(sorted(starts), sorted(ends)):
        c = Candidate(search.graph, *sorted((groups[a], groups[b]), key=lambda g: g.first))
        if any(f.names and f.matches(c) for f in search.forced):
            return [a, b]
    return []


def batched(record: Record, first: str, second: str) -> bool:
    """Whether one launch runs the kernels of both for several tensors."""
    plans = [p for p in record.stages.values() if isinstance(p, Plan)]
    found = (launch for launch in plans[-1].launches if len(launch.sizes) > 1)
    return any({first, second} <= {*launch.kernel.origins} for launch in found)


def unreached(record: Record, fusions: int) -> str:
    """Why two that no rule keeps apart are apart."""
    options = record.options
    if options.fusion_fuel is not None and fusions >= options.fusion_fuel:
        return f"fuel ended after {options.fusion_fuel} fusions"
    if options.fusion_log:
        return "no rule forbids it; the fusion log does not have it"
    return "no rule forbids it; the search chose others, or gave up on what they share"


def holding(search: Search, node: str) -> set[int]:
    """The groups that compute a node."""
    found = {i for i, g in search.graph.groups.items() if node in g.nodes}
    if not found:
        known = sorted({n for g in search.graph.groups.values() for n in g.nodes})
        near = difflib.get_close_matches(node, known, 3)
        hint = f"; near: {', '.join(near)}" if near else f"; some that are: {', '.join(known[:8])}"
        raise ValueError(f"{node!r} is computed by no kernel and no extern of {search.ctx.name}{hint}")
    return found


def shortest(search: Search, starts: set[int], ends: set[int], direct: bool = True) -> list[int]:
    """The shortest way between groups over shared buffers: along dependencies where there is one, else over any
    neighbour; not from one to the other at once, unless `direct`. Empty where there is none."""
    graph = search.graph
    sharing = [names for names in (graph.readers[n] for n in graph.readers) if len(names) > 1]
    beside: dict[int, set[int]] = {i: {*g.succs, *g.preds} for i, g in graph.groups.items()}
    for readers in sharing:
        for i in readers:
            beside[i] |= readers
    ahead = {i: g.succs for i, g in graph.groups.items()}
    behind = {i: g.preds for i, g in graph.groups.items()}
    neighbours = any(beside[i] & ends for i in starts)
    kinds = [beside] if neighbours else [ahead, behind, beside]
    if not direct:
        kinds = [{i: s - ends if i in starts else s for i, s in near.items()} for near in (ahead, behind)]
    for steps in kinds:
        came: dict[int, int | None] = dict.fromkeys(sorted(starts))
        queue = deque(came)
        while queue:
            i = queue.popleft()
            if i in ends:
                way: list[int] = []
                at: int | None = i
                while at is not None:
                    way.append(at)
                    at = came[at]
                return way[::-1]
            for s in sorted(steps[i]):
                if s not in came:
                    came[s] = i
                    queue.append(s)
    return []


def named(search: Search, i: int, *asked: str) -> str:
    """The node that stands for a group: one that was asked about, else the last one."""
    nodes = search.graph.groups[i].nodes
    return next((n for n in asked if n in nodes), nodes[-1])
