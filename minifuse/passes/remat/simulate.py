"""What a step will hold and take: the kernels of a forward and its backward in the order that they will run, the bytes
that are alive while each does, and its seconds."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from minifuse.ir.lazy import Deferred
from minifuse.passes.fuse.order import order

from .problem import OFFLOAD, RECOMPUTE, SAVE, Problem, Value
from .transfers import arrivals, departures

sparse, csgraph = Deferred("scipy.sparse"), Deferred("scipy.sparse.csgraph")

Key = tuple[str, int] | str

CATEGORIES = ("saved", "outputs", "gradients", "temporary")
HOST = "host"
# The operators of the two ways.
TRANSFERS = ("minifuse.offload", "minifuse.reload")


@dataclass(frozen=True)
class Timeline:
    """Bytes that are alive while each step runs, by what they are for, and its seconds.

    `steps` names the last value of each kernel or operator, the first `forward` of them in the forward. `held` has a
    row of bytes a category of `CATEGORIES`: what the backward loads, what the caller is given of the forward and of
    the backward, and the rest, tangents and operators' scratch among it. Inputs and parameters are the caller's and
    count nothing. `host` is the bytes that are offloaded, `transfers` the seconds of the ways there, in the forward,
    and back.
    """

    steps: tuple[str, ...] = ()
    forward: int = 0
    held: tuple[tuple[int, ...], ...] = ((),) * len(CATEGORIES)
    seconds: tuple[float, ...] = ()
    host: tuple[int, ...] = ()
    transfers: tuple[float, float] = (0.0, 0.0)

    @cached_property
    def total(self) -> np.ndarray:
        """Bytes while each step runs."""
        return np.array(self.held, dtype=np.int64).sum(axis=0)

    @property
    def peak(self) -> int:
        return int(self.total.max(initial=0))

    @property
    def step_seconds(self) -> float:
        """Seconds of a forward and its backward, by the rates of the device; what is transferred is beside the rest."""
        passes = sum(self.seconds[: self.forward]), sum(self.seconds[self.forward :])
        return sum(map(max, passes, self.transfers))

    @property
    def peak_step(self) -> str:
        """Where the peak is first reached; empty where there is no step."""
        return self.steps[int(self.total.argmax())] if self.steps else ""

    @property
    def forward_peak(self) -> int:
        return int(self.total[: self.forward].max(initial=0))

    @property
    def boundary(self) -> int:
        """What is saved, and what of the forward the caller has, when the backward begins."""
        at = slice(self.forward, self.forward + 1) if len(self.steps) > self.forward else slice(self.forward - 1, None)
        return sum(sum(self.held[CATEGORIES.index(c)][at]) for c in ("saved", "outputs"))

    @property
    def backward_peak(self) -> int:
        return int(self.total[self.forward :].max(initial=0))

    def to_json(self) -> dict[str, Any]:
        held = dict(zip(CATEGORIES, self.held, strict=True))
        return {"steps": self.steps, "forward": self.forward, "held": held, "seconds": self.seconds, "host": self.host,
                "transfers": self.transfers}  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Timeline:
        """The inverse of `to_json`."""
        held = tuple(tuple(data["held"][c]) for c in CATEGORIES)
        rest = (tuple(data[name]) for name in ("seconds", "host", "transfers"))
        return cls(tuple(data["steps"]), data["forward"], held, *rest)


@dataclass
class Unit:
    """A kernel or an operator: its values, those that it computes `again` within itself, the storages that it reads of
    others and those that it writes for others. `loads` has the bytes of all that it reads, of the caller's too, by the
    value that they are read as: a view may be a part."""

    members: list[Value] = field(default_factory=list)
    again: dict[str, None] = field(default_factory=dict)
    loads: dict[str, float] = field(default_factory=dict)
    last: int = 0
    preds: set[int] = field(default_factory=set)
    succs: set[int] = field(default_factory=set)
    reads: dict[str, None] = field(default_factory=dict)
    writes: dict[str, None] = field(default_factory=dict)

    @property
    def scratch(self) -> int:
        """Bytes beyond what it reads and writes."""
        return max(v.scratch for v in self.members)

    @property
    def is_kernel(self) -> bool:
        """Whether it may write over what it is the last to read."""
        return all(v.kind in ("kernel", "reduction", "view") or v.group is not None for v in self.members)


@dataclass(frozen=True)
class Run:
    """A pass from its first step to its last: the steps, the bytes of each of `CATEGORIES` and the host's while each
    runs, its seconds, and what is alive behind the last with its category."""

    steps: list[str]
    held: list[list[int]]
    seconds: list[float]
    alive: dict[str, str]


class Side:
    """One of the two passes: `values` in an order that runs; `there` are the storages that it is given and that die
    with their last reader, `kept` those that outlive it; `inside` is computed in the kernels that read it."""

    def __init__(
        self,
        problem: Problem,
        values: Iterable[Value],
        there: Collection[str],
        kept: Collection[str],
        inside: Collection[str] = (),
    ) -> None:
        self.problem, self.there, self.inside = problem, frozenset(there), frozenset(inside)
        self.kept = frozenset[str]()
        self.units: dict[int, Unit] = {}
        self.unit_of: dict[str, int] = {}
        # a view is another name for memory, whoever reads it, and a tangent is there
        values = [v for v in values if v.kind != "view" and v.phase != "tangent" and v.name not in self.inside]
        reads = {v.name: sources(problem, v, self.inside) for v in values}
        root = problem.root
        made = {name: [r for i in read if (r := root[i]) in reads] for name, (read, _) in reads.items()}
        part = parts(problem, values, made)
        number: dict[tuple[Key, int], int] = {}
        for at, v in enumerate(values):
            key = unit_key(problem, v)
            i = self.unit_of[v.name] = number.setdefault((key, part.get(v.name, 0)), len(number))
            unit = self.units.setdefault(i, Unit())
            unit.members.append(v)
            unit.last = at
        for i, unit in self.units.items():
            for v in unit.members:
                read, again = reads[v.name]
                unit.again.update(dict.fromkeys(again))
                for name, nbytes in read.items():
                    self.link(i, unit, name, nbytes)
        self.keep(kept)

    def keep(self, kept: Collection[str]) -> None:
        """`kept` outlive the pass, and are written by the units that make them."""
        self.kept |= frozenset(kept)
        for at in {self.unit_of[n] for n in self.kept if n in self.unit_of}:
            unit = self.units[at]
            mine = (v.name for v in unit.members if v.name in self.kept)
            self.units[at] = replace(unit, writes={**unit.writes, **dict.fromkeys(mine)})

    def keeping(self, kept: Collection[str]) -> Side:
        """The pass with `kept` besides, of which the units and what they read are the same."""
        side = copy.copy(self)
        side.units = {**self.units}
        side.keep(kept)
        return side

    def link(self, i: int, unit: Unit, name: str, nbytes: float) -> None:
        """A unit runs after that of what it reads, and what it reads is in memory where another made it."""
        root = self.problem.root[name]
        maker = self.unit_of.get(root)
        if maker == i:
            return
        unit.loads[name] = max(unit.loads.get(name, 0.0), nbytes)
        if maker is not None:
            unit.preds.add(maker)
            self.units[maker].succs.add(i)
            unit.reads[root] = None
            self.units[maker].writes[root] = None
        elif root in self.there:
            unit.reads[root] = None

    def seconds(self, unit: Unit) -> float:
        """What it computes or what it moves, whichever takes longer; a transfer that goes beside the rest, nothing."""
        problem, device, sizes = self.problem, self.problem.device, self.problem.sizes
        if unit.members[0].op in TRANSFERS:
            return 0.0 if device.link else problem.transfer_seconds(unit.members[0])
        read: dict[str, float] = {}
        for name, nbytes in unit.loads.items():
            root = problem.root[name]
            read[root] = min(read.get(root, 0.0) + nbytes, sizes[root])
        moving = (sum(read.values()) + sum(map(sizes.__getitem__, unit.writes))) / device.dram
        flops = sum(v.flops for v in unit.members) + sum(problem[n].flops for n in unit.again)
        rate = device.flops if any(v.kind == "extern" for v in unit.members) else device.vector
        return device.launch + max(flops / rate, moving)

    def taken_over(self, unit: Unit, new: Iterable[str], dying: Iterable[str]) -> dict[str, str]:
        """The results of a kernel that take the place of what dies as they are written, and whose."""
        sizes, found = self.problem.sizes, dict[str, str]()
        over = [n for n in dying if n in self.unit_of]
        for n in new if over and unit.is_kernel else ():
            place = next((o for o in over if sizes[o] == sizes[n]), None)
            if place is not None:
                over.remove(place)
                found[n] = place
        return found

    def run(self, alive: Mapping[str, str], category: Mapping[str, str]) -> Run:
        """From what is `alive` before the first step, each storage with its category, as `category` has it of those
        that are made here (else temporary)."""
        reads = {i: list(u.reads) for i, u in self.units.items()}
        writes = {i: list(u.writes) for i, u in self.units.items()}
        sizes = self.problem.sizes
        left = Counter(n for names in reads.values() for n in names)
        alive, steps, rows, seconds = dict(alive), [], [], []
        held = dict.fromkeys((*CATEGORIES, HOST), 0)
        for name, kind in alive.items():
            held[kind] += sizes[name]
        for i in order(self.units, reads, writes, sizes, lambda n: n not in self.kept):
            unit = self.units[i]
            new = [n for n in unit.writes if n not in alive]
            left.subtract([*unit.reads])
            dying = [n for n in unit.reads if not left[n] and n not in self.kept]
            for n in new:
                alive[n] = category.get(n, "temporary")
                held[alive[n]] += sizes[n]
            for n in self.taken_over(unit, new, dying).values():
                held[alive.pop(n)] -= sizes[n]
            steps.append(unit.members[-1].name)
            scratch = unit.scratch
            held["temporary"] += scratch
            rows.append([*held.values()])
            held["temporary"] -= scratch
            seconds.append(self.seconds(unit))
            for n in (*dying, *(n for n in new if not left[n] and n not in self.kept)):
                if n in alive:
                    held[alive.pop(n)] -= sizes[n]
        return Run(steps, rows, seconds, alive)


def unit_key(problem: Problem, v: Value) -> Key:
    """What tells its unit: the results of one operator are one, and so are the values of one kernel."""
    known = problem.memo.setdefault(unit_key, {})
    if v.name not in known:
        maker = v
        while maker.kind == "item":
            maker = problem[maker.inputs[0]]
        known[v.name] = maker.name if maker.group is None else ("kernel", maker.group)
    return known[v.name]


def inlined(problem: Problem, values: Sequence[Value]) -> frozenset[str]:
    """What the backward computes again within each of the kernels that read it: pointwise values that no operator
    reads, where storing and loading them would take longer than computing them once a kernel."""
    root = problem.root
    taken = {root[i] for v in values if v.kind == "extern" for i in v.inputs}
    readers: dict[str, set[Key]] = {}
    for v in values:
        for i in v.inputs if v.kind != "view" else ():
            readers.setdefault(root[i], set()).add(unit_key(problem, v))
    device = problem.device
    instructions: dict[str, float] = {}  # of a value and of what is computed within its kernel for it
    for v in values:
        if v.phase == "forward" and v.kind in ("kernel", "symbol") and v.name not in taken:
            took = v.flops + sum(instructions.get(root[i], 0.0) for i in v.inputs)
            copies = max(len(readers.get(v.name, ())), 1)
            if (copies - 1) * took / device.vector <= (1 + copies) * v.nbytes / device.dram:
                instructions[v.name] = took
    return frozenset(instructions)


def sources(problem: Problem, v: Value, inside: frozenset[str]) -> tuple[dict[str, float], list[str]]:
    """What a value is computed from, with the bytes that are read of it, and what its kernel computes on the way."""
    if not inside or inside.isdisjoint(map(problem.root.__getitem__, v.inputs)):
        return directly(problem, v), []
    found: dict[str, float] = {}
    again: list[str] = []
    stack, seen = [v], {v.name}
    while stack:
        reader = stack.pop()
        for i in reader.inputs:
            root = problem[problem[i].storage]
            if root.name in inside:
                if root.name not in seen:
                    seen.add(root.name)
                    again.append(root.name)
                    stack.append(root)
                continue
            found[i] = max(found.get(i, 0.0), part_of(problem, reader, i) * root.nbytes)
    return found, again


def directly(problem: Problem, v: Value) -> dict[str, float]:
    """The bytes that it reads of each of its inputs."""
    known = problem.memo.setdefault(directly, {})
    if v.name not in known:
        known[v.name] = {i: part_of(problem, v, i) * problem[problem[i].storage].nbytes for i in v.inputs}
    return known[v.name]


def part_of(problem: Problem, reader: Value, name: str) -> float:
    """The share of a storage that a value reads of it as `name`: a view may be a part, and a pointwise kernel reads no
    more elements than it has."""
    count, whole = problem[name].elements, problem[problem[name].storage].elements
    if reader.kind == "kernel":
        count = min(count, reader.elements)
    return min(count / whole, 1.0) if whole else 1.0


def parts(problem: Problem, values: Sequence[Value], made: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Where kernels would need each other, the part of its kernel that each of their values is in; `made` has what each
    reads of the others.

    Fusion computed a value in each of several kernels, and one alone is named. A part more begins with each way from
    one of such kernels into another.
    """
    number: dict[Key, int] = {}
    unit = {v.name: number.setdefault(unit_key(problem, v), len(number)) for v in values}
    rows, columns = list[int](), list[int]()
    for name, roots in made.items():
        rows += map(unit.__getitem__, roots)
        columns += [unit[name]] * len(roots)
    graph = sparse.csr_matrix((np.ones(len(rows), np.int8), (rows, columns)), shape=(len(number), len(number)))
    _, labels = csgraph.connected_components(graph, connection="strong")
    many = np.bincount(labels)[labels] > 1
    part: dict[str, int] = {}
    for v in values if many.any() else ():
        if many[unit[v.name]]:
            steps = ((part[r], unit[r] != unit[v.name]) for r in made[v.name] if r in part)
            part[v.name] = max((at + crosses for at, crosses in steps), default=0)
    return part


def simulate(problem: Problem, actions: Mapping[str, str]) -> Timeline:
    """A forward and its backward, which loads, recomputes or fetches what `actions` says by name.

    Kernels are those that fusion made of the joint graph, a side's part of each; they run in the order of
    `fuse.order`, each value recomputed just before its first reader. A storage dies with its last reader, one that is
    saved in the backward; what a pass gives the caller lives to the end of that pass, and is the caller's from then on.
    """
    early = {n for n, a in actions.items() if a != RECOMPUTE and problem[n].phase == "either"}
    loaded = loaded_of(problem, actions)
    away = [problem[n] for n, a in actions.items() if a == OFFLOAD]
    hosted = dict.fromkeys((host_name(v) for v in away), HOST)
    outputs = {r for r in (problem[n].storage for n in problem.forward_outputs) if not problem[r].is_given}
    category = {**dict.fromkeys(outputs, "outputs"), **dict.fromkeys(loaded - outputs, "saved"), **hosted}

    first = forward_side(problem, early, away).keeping(category).run({}, category)

    backward, tangents = backward_side(problem, actions), tangents_of(problem)
    given = {n: kind for n, kind in first.alive.items() if n in loaded or n in hosted}
    then = backward.run({**given, **tangents}, dict.fromkeys(backward.kept, "gradients"))

    rows = [*first.held, *then.held]
    *held, host = zip(*rows, strict=True) if rows else ((),) * (len(CATEGORIES) + 1)
    way = sum(map(problem.transfer_seconds, away)) if problem.device.link else 0.0
    steps, seconds = (*first.steps, *then.steps), (*first.seconds, *then.seconds)
    return Timeline(steps, len(first.steps), tuple(held), seconds, host, (way, way))


def forward_side(problem: Problem, early: Collection[str], away: Sequence[Value]) -> Side:
    """The forward that computes `early` of what either pass may, and sends `away` to the host; that of a plan which
    does neither is made once."""
    if not early and not away and forward_side in problem.memo:
        return problem.memo[forward_side]
    mine = [v for v in problem.values if v.phase == "forward" or v.name in early]
    there, sent = sending(problem, away), arrivals(problem, mine, away)
    for v in sorted(away, key=lambda v: -sent[v.name]):
        mine.insert(sent[v.name] + 1, there[host_name(v)])
    side = Side(there, mine, (), ())
    if not early and not away:
        problem.memo[forward_side] = side
    return side


def loaded_of(problem: Problem, actions: Mapping[str, str]) -> frozenset[str]:
    """The storages that are saved."""
    roots = {problem[n].storage for n, a in actions.items() if a == SAVE}
    return frozenset(r for r in roots if not problem[r].is_given)


def tangents_of(problem: Problem) -> dict[str, str]:
    """What the backward begins with, with its category."""
    return {v.name: "temporary" for v in problem.values if v.phase == "tangent"}


def backward_side(problem: Problem, actions: Mapping[str, str]) -> Side:
    """The backward that loads, recomputes or fetches what `actions` says."""
    away = [problem[n] for n, a in actions.items() if a == OFFLOAD]
    there = fetching(problem, away)
    values = [there[n] for n in prefetched(problem, backward_order(problem, actions), away)]
    given = loaded_of(problem, actions).union(map(host_name, away), tangents_of(problem))
    gradients = {problem[n].storage for n in problem.backward_outputs if n in problem.by_name}
    return Side(there, values, given, gradients, inlined(there, values))


def prefetched(problem: Problem, order: list[str], away: Sequence[Value]) -> list[str]:
    """An order of the backward with the ways back begun so early that they are behind where they are needed."""
    if not away:
        return order
    at = departures(problem, [problem[n] for n in order], away)
    place = {n: i for i, n in enumerate(order)} | {n: i - 0.5 for n, i in at.items()}
    return sorted(order, key=lambda n: place[n])


def host_name(v: Value) -> str:
    """Of its copy in the host's memory."""
    return f"{v.name}_host"


def sending(problem: Problem, away: Sequence[Value]) -> Problem:
    """A forward's problem in which `away` are copied to the host as soon as they are made."""
    copies = {v.name: replace(v, name=host_name(v), storage=host_name(v), kind="extern", phase="forward",
                              inputs=(v.name,), group=None, op=TRANSFERS[0]) for v in away}  # fmt: skip
    if not copies:
        return problem
    values = ((v, copies[v.name]) if v.name in copies else (v,) for v in problem.values)
    return replace(problem, values=tuple(v for each in values for v in each))


def fetching(problem: Problem, away: Sequence[Value]) -> Problem:
    """A backward's problem in which `away` are computed from their copies on the host."""
    if not away:
        return problem
    names = {v.name for v in away}
    values = []
    for v in sending(problem, away).values:
        back = replace(v, kind="extern", inputs=(host_name(v),), group=None, op=TRANSFERS[1])
        values.append(back if v.name in names else replace(v, inputs=()) if v.op == TRANSFERS[0] else v)
    by_host = {host_name(v): v.name for v in away}
    values.sort(key=lambda v: problem.position[by_host.get(v.name, v.name)] - (v.name in by_host) / 2)
    return replace(problem, values=tuple(values))


def backward_order(problem: Problem, actions: Mapping[str, str]) -> list[str]:
    """The backward's values in the order they run: each recomputed value just before its first reader."""
    order: list[str] = []
    done: set[str] = {n for n, a in actions.items() if a == SAVE}
    away = {n for n, a in actions.items() if a == OFFLOAD}

    def emit(name: str) -> None:
        stack = [name]
        while stack:
            top = stack[-1]
            waiting = [] if top in done or top in away else [i for i in problem[top].inputs if i not in done]
            if waiting:
                stack.extend(reversed(waiting))
                continue
            stack.pop()
            if top not in done:
                done.add(top)
                order.append(top)

    results = [n for n in problem.backward_outputs if n in actions]
    for v in problem.values:
        if v.phase not in ("backward", "tangent"):
            continue
        if v.has_effect:  # It may overwrite an input that a result is still to be computed from.
            while results:
                emit(results.pop())
        emit(v.name)
    for name in reversed(results):
        emit(name)
    return order
