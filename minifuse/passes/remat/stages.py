"""The backward of a problem as stages that read the forward: what an integer program of what to save is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from .baselines import runs_once
from .mincut import INFINITE, again_price, save_price
from .plan import RematPlan, closure
from .problem import Problem, Value
from .simulate import Side, backward_order, backward_side, loaded_of, tangents_of

# What is smaller than this share of the limit is saved where it may be, and does not count.
TINY = 1e-4
# How many entries the rows within stages may have before they are added only where a plan breaks them.
_ENTRIES = 300_000


@dataclass
class Node:
    """A value of the forward that the backward may be given: what saving it and computing it again cost in seconds,
    what it is computed from, the stages that read it, those in which it may have to be there, and those whose kernel
    may compute it within itself. Bytes are none where the limit does not notice them."""

    value: Value
    at: int
    nbytes: int
    keep: float
    again: float
    inputs: set[str]
    read: set[int] = field(default_factory=set)
    readers: set[str] = field(default_factory=set)
    stages: list[int] = field(default_factory=list)
    runs: set[int] = field(default_factory=set)
    within: set[int] = field(default_factory=set)
    nested: set[int] = field(default_factory=set)
    inline: bool = False

    @property
    def is_tuple(self) -> bool:
        return not self.value.savable


@dataclass(frozen=True)
class Stage:
    """A kernel of the backward that reads the forward: the backward's own bytes before it, while it runs, and at most
    from its end to the next; `fresh` are the sizes of what it could write over a value that was computed again."""

    before: int
    during: int
    behind: int
    fresh: frozenset[int] = frozenset()


class Stages:
    """The backward of a problem as stages, and the values that they read, as a model of what to save under a limit.

    Left out, without loss: what only the backward reads, which it computes free of charge; views; a pointwise value
    with one reader that is no larger and no dearer to save, which takes it over; and what is too small to count.
    """

    def __init__(self, problem: Problem, limit: float, first: RematPlan) -> None:
        self.problem = problem
        self.small: set[str] = set()
        self.nodes: dict[str, Node] = {}
        self.of: dict[str, int] = {}
        self.forward: list[tuple[int, frozenset[str]]] = []
        self.stages: list[Stage] = []
        self.ahead = 0
        self.late: dict[str, int] = {}
        self.order: tuple[int, ...] = ()
        self.build(limit, first)
        self.contract()
        self.window()
        self.entries = sum(len(n.runs) for n in self.nodes.values()) * len(self.nodes)

    def rows_inside(self) -> set[int]:
        """The stages that get rows for each value computed again: all, if those are not too many, else none yet."""
        return set(range(len(self.stages))) if self.entries <= _ENTRIES else set()

    def build(self, limit: float, first: RematPlan) -> None:
        problem = self.problem
        forward = [v.name for v in problem.values if v.savable and (v.phase == "forward" or v.pinned)]
        actions = closure(problem, forward)
        side, ids = backward_of(problem, actions)
        taken = {problem[i].storage for n in backward_order(problem, actions) if problem[n].kind == "extern"
                 for i in problem[n].inputs}  # fmt: skip
        for at, v in enumerate(problem.values):
            if v.phase == "forward":
                self.late.update(dict.fromkeys((problem[i].storage for i in v.inputs), at))
            if v.kind == "view" or v.is_given or (v.phase != "forward" and not (v.phase == "either" and v.pinned)):
                continue
            where = self.nodes[v.inputs[0]].at if v.kind == "item" and v.inputs[0] in self.nodes else at
            keep = save_price(v, problem.save_seconds)
            again = INFINITE if runs_once(problem, v) else again_price(v, problem.recompute_seconds)
            nbytes = v.nbytes if v.storage == v.name and v.savable else 0
            if nbytes <= TINY * limit and keep < INFINITE:
                self.small.add(v.name)
                continue
            inline = v.kind in ("kernel", "symbol") and v.name not in taken
            inputs = self.sources(v)
            self.nodes[v.name] = Node(v, where, nbytes, keep, again, inputs, inline=inline)
            for i in inputs:
                self.nodes[i].readers.add(v.name)
        ids = in_order_of(side, ids, problem, first)
        self.order = tuple(ids)
        self.count(side, ids)
        self.run_forward(limit)

    def sources(self, v: Value) -> set[str]:
        """The nodes that it is computed from, through views and what only the backward computes."""
        found, seen = set[str](), set[str]()
        stack = list(v.inputs)
        while stack:
            name = stack.pop()
            if name in seen:
                continue
            seen.add(name)
            if name in self.nodes:
                found.add(name)
            elif name not in self.small and not self.problem[name].is_given:
                stack.extend(self.problem[name].inputs)
        return found

    def count(self, side: Side, ids: list[int]) -> None:
        """The stages, with the bytes that are the backward's own."""
        step = {i: t for t, i in enumerate(ids)}
        last = {n: max(step[i] for i, u in side.units.items() if n in u.reads)
                for n in {n for u in side.units.values() for n in u.reads}}  # fmt: skip
        last.update(dict.fromkeys(side.kept, len(ids)))
        own = np.zeros(len(ids) + 1, dtype=np.int64)
        made = {n: step[i] for i, u in side.units.items() for n in u.writes}
        for n, end in last.items():
            if n in made or self.problem[n].phase == "tangent":
                own[made.get(n, -1) + 1 : end + 1] += self.problem.sizes[n]
        for t, i in enumerate(ids):
            unit = side.units[i]
            taken = side.taken_over(unit, unit.writes, [n for n in unit.reads if last[n] == t])
            fresh = [self.problem.sizes[n] for n in unit.writes if n not in taken]
            during = int(own[t]) + sum(fresh) + unit.scratch
            over = frozenset(fresh) if unit.is_kernel else frozenset[int]()
            reads = [n for n in unit.reads if n in self.nodes]
            if reads or t == len(ids) - 1:
                self.stages.append(Stage(int(own[t]), during, 0, over))
                reads += [n for n in side.kept if n in self.nodes] if t == len(ids) - 1 else []
                for n in reads:
                    self.nodes[n].read.add(len(self.stages) - 1)
            elif self.stages:
                self.stages[-1] = replace(self.stages[-1], behind=max(self.stages[-1].behind, during))
            else:
                self.ahead = max(self.ahead, during)
            for v in unit.members:
                self.of[v.name] = max(0, len(self.stages) - 1)

    def run_forward(self, limit: float) -> None:
        """What the forward holds whatever is saved, and what else it is done with, where both may be too much."""
        problem = self.problem
        outputs = {r for r in (problem[n].storage for n in problem.forward_outputs) if not problem[r].is_given}
        side = Side(problem, (v for v in problem.values if v.phase == "forward"), (), outputs)
        run = side.run({}, {})
        end: dict[str, int] = {}
        for t, name in enumerate(run.steps):
            unit = side.units[side.unit_of[name]]
            end.update(dict.fromkeys((*(v.name for v in unit.members), *unit.reads), t))
        whole = sum(n.nbytes for n in self.nodes.values())
        for t, row in enumerate(run.held):
            if sum(row) + whole > limit:
                done = frozenset(n for n in self.nodes if n not in outputs and end.get(n, t) < t)
                if self.forward and self.forward[-1][1] == done:
                    self.forward[-1] = (max(self.forward[-1][0], sum(row)), done)
                else:
                    self.forward.append((sum(row), done))

    def contract(self) -> None:
        nodes = self.nodes
        changed = True
        while changed:
            changed = False
            for name in reversed([*nodes]):
                node = nodes[name]
                gone = not node.read and not node.readers
                if gone or node.again == INFINITE:  # nothing is computed for it
                    for i in node.inputs:
                        nodes[i].readers.discard(name)
                    node.inputs = set()
                if gone:
                    del nodes[name]
                    changed = True
                    continue
                if node.read or len(node.readers) > 1 or node.again == INFINITE or node.value.tag:
                    continue
                other = nodes[next(iter(node.readers))]
                if self.late.get(name, 0) > other.at:  # the forward holds it longer in any case
                    continue
                if other.keep > node.keep or other.nbytes > node.nbytes or other.keep == INFINITE:
                    continue
                if node.inline and other.value.kind != "extern":
                    other.again += node.again
                    other.inputs = (other.inputs - {name}) | node.inputs
                    for i in node.inputs:
                        nodes[i].readers.discard(name)
                        nodes[i].readers.add(other.value.name)
                    del nodes[name]
                    changed = True
                elif node.keep < INFINITE and other.inline and not node.inline:
                    node.keep = INFINITE

    def window(self) -> None:
        """The stages in which each node may have to be there, and those in which it may be computed: before the first
        kernel that reads it, within one, or within what is computed again."""
        for node in reversed(self.nodes.values()):
            readers = [self.nodes[r] for r in node.readers]
            node.nested = {t for r in readers for t in (*r.runs, *r.nested)} if node.inline else set()
            node.within = node.read.union(*(r.within for r in readers)) if node.inline else set()
            node.stages = sorted(node.read.union(*(r.runs | r.nested | r.within for r in readers)))
            apart = not node.inline or any(r.runs and r.value.kind == "extern" for r in readers)
            if node.again == INFINITE:
                node.nested, node.within = set(), set()
            elif apart:
                node.runs = {t for t in node.stages if t <= min(node.read, default=t)}

    def broken(self, plan: RematPlan, limit: float) -> set[int]:
        """The stages in which what is computed again first makes a plan hold too much."""
        found: set[int] = set()
        line = plan.timeline
        again: list[float] = []
        for name, held in zip(line.steps[line.forward :], line.total[line.forward :], strict=True):
            if name in self.of and self.problem[name].phase != "forward":
                if again and max(again) > limit:
                    found.add(self.of[name])
                again = []
            else:
                again.append(float(held))
        return found


def backward_of(problem: Problem, actions: Mapping[str, str]) -> tuple[Side, list[int]]:
    """The backward that loads what `actions` says, and its kernels in their order."""
    side = backward_side(problem, actions)
    steps = side.run({**dict.fromkeys(loaded_of(problem, actions), "saved"), **tangents_of(problem)}, {}).steps
    return side, [side.unit_of[s] for s in steps]


def in_order_of(side: Side, ids: list[int], problem: Problem, plan: RematPlan) -> list[int]:
    """The kernels of a backward, `ids` in order, in the order that another plan runs them; what it does not run goes to
    its first reader."""
    other, theirs = backward_of(problem, plan.actions)
    step = {i: t for t, i in enumerate(theirs)}
    place: dict[int, int] = {}
    for i in reversed(ids):
        unit = side.units[i]
        known = [step[other.unit_of[v.name]] for v in unit.members if v.name in other.unit_of]
        place[i] = max(known) if known else min((place[s] for s in unit.succs), default=len(theirs))
    return sorted(ids, key=lambda i: place[i])
