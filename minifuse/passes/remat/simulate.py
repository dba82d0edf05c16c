"""What a step will hold in memory: the kernels of a forward and its backward in the order that they will run, and the
bytes that are alive while each does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from minifuse.ir.lazy import Deferred
from minifuse.passes.fuse.order import order

from .problem import SAVE, Problem, Value

sparse, csgraph = Deferred("scipy.sparse"), Deferred("scipy.sparse.csgraph")

Key = tuple[str, int] | str

CATEGORIES = ("saved", "outputs", "gradients", "temporary")


@dataclass(frozen=True)
class Timeline:
    """Bytes that are alive while each step runs, by what they are for.

    `steps` names the last value of each kernel or operator, the first `forward` of them in the forward. `held` has a
    row of bytes a category of `CATEGORIES`: what the backward loads, what the caller is given of the forward and of
    the backward, and the rest, tangents among it. Inputs and parameters are the caller's and count nothing.
    """

    steps: tuple[str, ...] = ()
    forward: int = 0
    held: tuple[tuple[int, ...], ...] = ((),) * len(CATEGORIES)

    @cached_property
    def total(self) -> np.ndarray:
        """Bytes while each step runs."""
        return np.array(self.held, dtype=np.int64).sum(axis=0)

    @property
    def peak(self) -> int:
        return int(self.total.max(initial=0))

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
        return {"steps": self.steps, "forward": self.forward, "held": dict(zip(CATEGORIES, self.held, strict=True))}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Timeline:
        """The inverse of `to_json`."""
        return cls(tuple(data["steps"]), data["forward"], tuple(tuple(data["held"][c]) for c in CATEGORIES))


@dataclass
class Unit:
    """A kernel or an operator: its values, the storages that it reads of others and those that it writes for others."""

    members: list[Value] = field(default_factory=list)
    last: int = 0
    preds: set[int] = field(default_factory=set)
    succs: set[int] = field(default_factory=set)
    reads: dict[str, None] = field(default_factory=dict)
    writes: dict[str, None] = field(default_factory=dict)

    @property
    def is_kernel(self) -> bool:
        """Whether it may write over what it is the last to read."""
        return all(v.kind in ("kernel", "reduction", "view") for v in self.members)


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
        self.problem, self.there, self.kept = problem, frozenset(there), frozenset(kept)
        self.units: dict[int, Unit] = {}
        self.unit_of: dict[str, int] = {}
        # a view is another name for memory, whoever reads it, and a tangent is there
        values = [v for v in values if v.kind != "view" and v.phase != "tangent"]
        values = [v for v in values if v.name not in inside]
        apart = knotted(problem, values, self.key, inside)
        number: dict[Key, int] = {}
        for at, v in enumerate(values):
            key = self.key(v)
            i = self.unit_of[v.name] = number.setdefault(v.name if key in apart else key, len(number))
            unit = self.units.setdefault(i, Unit())
            unit.members.append(v)
            unit.last = at
        for i, unit in self.units.items():
            for v in unit.members:
                for root in sources(problem, v, inside):
                    self.link(i, unit, root)
                if v.name in self.kept:
                    unit.writes[v.name] = None

    def key(self, v: Value) -> Key:
        """What tells its unit: the results of one operator are one, and so are the values of one kernel."""
        while v.kind == "item":
            v = self.problem[v.inputs[0]]
        return v.name if v.group is None else ("kernel", v.group)

    def link(self, i: int, unit: Unit, root: str) -> None:
        """A unit runs after that of what it reads, and what it reads is in memory where another made it."""
        maker = self.unit_of.get(root)
        if maker is None and root in self.there:
            unit.reads[root] = None
        elif maker is not None and maker != i:
            unit.preds.add(maker)
            self.units[maker].succs.add(i)
            unit.reads[root] = None
            self.units[maker].writes[root] = None

    def nbytes(self, root: str) -> int:
        """None of a tuple: its items are what has memory."""
        v = self.problem[root]
        return v.nbytes if v.savable or v.is_given else 0

    def run(
        self, alive: Mapping[str, str], category: Mapping[str, str]
    ) -> tuple[list[str], list[list[int]], dict[str, str]]:
        """The steps, the bytes of each category while each runs, and what is alive behind the last; `alive` before the
        first, each storage with its category, as `category` has it of those that are made here (else temporary)."""
        reads = {i: list(u.reads) for i, u in self.units.items()}
        writes = {i: list(u.writes) for i, u in self.units.items()}
        sizes = {n: self.nbytes(n) for names in (*reads.values(), *writes.values(), alive) for n in names}
        left = Counter(n for names in reads.values() for n in names)
        alive, steps, rows = dict(alive), [], []
        held = Counter[str]()
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
            over = [n for n in dying if n in self.unit_of] if unit.is_kernel else []
            for n in new:  # a result takes the place of what dies as it is written
                found = next((o for o in over if sizes[o] == sizes[n]), None)
                if found is not None:
                    over.remove(found)
                    held[alive.pop(found)] -= sizes[found]
            steps.append(unit.members[-1].name)
            rows.append([held[c] for c in CATEGORIES])
            for n in (*dying, *(n for n in new if not left[n] and n not in self.kept)):
                if n in alive:
                    held[alive.pop(n)] -= sizes[n]
        return steps, rows, alive


def inlined(problem: Problem, values: Sequence[Value]) -> frozenset[str]:
    """What the backward computes again within the kernels that read it: pointwise values that no operator reads."""
    taken = {problem[i].storage for v in values if v.kind == "extern" for i in v.inputs}
    again = (v for v in values if v.phase == "forward" and v.kind in ("kernel", "symbol"))
    return frozenset(v.name for v in again if v.name not in taken)


def sources(problem: Problem, v: Value, inside: Collection[str]) -> dict[str, None]:
    """The storages that a value is computed from, those of what is computed inside its kernel in its place."""
    found: dict[str, None] = {}
    stack = [problem[i].storage for i in v.inputs]
    seen = set(stack)
    while stack:
        root = stack.pop()
        if root not in inside:
            found[root] = None
            continue
        more = {problem[i].storage for i in problem[root].inputs} - seen
        seen |= more
        stack.extend(more)
    return found


def knotted(
    problem: Problem, values: Sequence[Value], key: Callable[[Value], Key], inside: Collection[str]
) -> set[Key]:
    """The kernels that would need each other: fusion computed a value in each of several, and one alone is named."""
    number: dict[Key, int] = {}
    unit = {v.name: number.setdefault(key(v), len(number)) for v in values}
    reads = ((root, v.name) for v in values for root in sources(problem, v, inside))
    ends = {(unit[r], unit[n]) for r, n in reads if r in unit and unit[r] != unit[n]}
    rows, columns = np.array(sorted(ends), dtype=np.int64).reshape(-1, 2).T
    graph = sparse.csr_matrix((np.ones(len(rows), np.int8), (rows, columns)), shape=(len(number), len(number)))
    _, labels = csgraph.connected_components(graph, connection="strong")
    many = np.bincount(labels)[labels] > 1
    return {k for k, i in number.items() if many[i]}


def simulate(problem: Problem, actions: Mapping[str, str]) -> Timeline:
    """A forward and its backward, which loads and recomputes what `actions` says (SAVE or RECOMPUTE by name).

    Kernels are those that fusion made of the joint graph, a side's part of each; they run in the order of
    `fuse.order`, each value recomputed just before its first reader. A storage dies with its last reader, one that is
    saved in the backward; what a pass gives the caller lives to the end of that pass, and is the caller's from then on.
    """
    early = {n for n, a in actions.items() if a == SAVE and problem[n].phase == "either"}
    loaded = {problem[n].storage for n, a in actions.items() if a == SAVE and not problem[problem[n].storage].is_given}
    outputs = {r for r in (problem[n].storage for n in problem.forward_outputs) if not problem[r].is_given}
    gradients = {problem[n].storage for n in problem.backward_outputs if n in problem.by_name}
    category = {**dict.fromkeys(outputs, "outputs"), **dict.fromkeys(loaded - outputs, "saved")}
    forward = Side(
        problem, (v for v in problem.values if v.phase == "forward" or v.name in early), (), loaded | outputs
    )
    first, before, alive = forward.run({}, category)
    tangents = {v.name: "temporary" for v in problem.values if v.phase == "tangent"}
    order_back = [problem[n] for n in backward_order(problem, actions)]
    backward = Side(problem, order_back, loaded | tangents.keys(), gradients, inlined(problem, order_back))
    there = {n: kind for n, kind in alive.items() if n in loaded}
    then, behind, _ = backward.run({**there, **tangents}, dict.fromkeys(gradients, "gradients"))
    rows = [*before, *behind]
    held = tuple(tuple(row[k] for row in rows) for k in range(len(CATEGORIES)))
    return Timeline((*first, *then), len(first), held)


def backward_order(problem: Problem, actions: Mapping[str, str]) -> list[str]:
    """The backward's values in the order they run: each recomputed value just before its first reader."""
    order: list[str] = []
    done: set[str] = {n for n, a in actions.items() if a == SAVE}

    def emit(name: str) -> None:
        stack = [name]
        while stack:
            top = stack[-1]
            waiting = [] if top in done else [i for i in problem[top].inputs if i not in done]
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
