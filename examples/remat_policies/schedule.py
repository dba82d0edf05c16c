"""What the policies here share: a step as a row of kernels, and the memory that goes from one of them to another.

The kernels and their order are those of `save_all`'s timeline. What a kernel computes and uses up within itself is no
storage: its seconds are counted with those of what is computed from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from minifuse.remat import POLICIES, Problem, RematPlan, Value, assemble, limit_of, runs_once, within


@dataclass(frozen=True)
class Storage:
    """Memory that one kernel of the forward writes and another reads, or could.

    `seconds` are those of computing it again from `inputs`, the storages that it is made of. It is written at the step
    `made`, read in the forward, or kept for the caller, until `last` and in the backward at `uses`. `fixed` says that
    it must be saved; `inside` that no operator reads it in the backward, so that it is computed again within the
    kernels that do and takes no memory.
    """

    name: str
    nbytes: int
    seconds: float
    inputs: tuple[str, ...]
    made: int
    last: int
    uses: tuple[int, ...]
    fixed: bool
    inside: bool


@dataclass(frozen=True)
class Schedule:
    """The storages of a problem in the order that they are made, over the steps of a forward and its backward.

    Of `steps` steps `forward` are the forward's; `seconds` has what each takes and `others` the bytes beside the
    storages while it runs: gradients, and what the backward uses up.
    """

    problem: Problem
    everything: RematPlan
    storages: Mapping[str, Storage]
    always: frozenset[str]
    forward: int
    seconds: tuple[float, ...]
    others: np.ndarray

    @cached_property
    def movable(self) -> list[Storage]:
        """Those about which there is something to decide."""
        return [s for s in self.storages.values() if not s.fixed]

    @cached_property
    def readers(self) -> dict[str, list[str]]:
        """The storages that are made of each."""
        found: dict[str, list[str]] = {n: [] for n in self.storages}
        for s in self.storages.values():
            for i in s.inputs:
                found[i].append(s.name)
        return found

    def stretch(self, name: str, again: Collection[str]) -> int:
        """How many storages would be computed again in one stretch, none between them saved, with this one."""
        seen, stack = {name}, [name]
        while stack:
            n = stack.pop()
            more = [m for m in (*self.storages[n].inputs, *self.readers[n]) if m in again and m not in seen]
            seen.update(more)
            stack.extend(more)
        return len(seen)

    def uses(self, again: Collection[str]) -> dict[str, list[int]]:
        """The steps of the backward at which each storage is read where `again` are computed again at their first."""
        found = {s.name: list(s.uses) for s in self.storages.values()}
        for s in reversed(tuple(self.storages.values())):
            if s.name in again and found[s.name]:
                for i in s.inputs:
                    found[i].append(min(found[s.name]))
        return found

    def held(self, again: Collection[str] = (), away: Collection[str] = ()) -> np.ndarray:
        """Bytes while each step runs where `again` are computed again and `away` fetched at their first use."""
        change = np.zeros(len(self.seconds) + 1, dtype=np.int64)
        uses = self.uses(again)
        for s in self.storages.values():
            used = uses[s.name]
            spans = [(s.made, max([s.last, *used]))]
            if s.name in again or s.name in away:
                spans = [(s.made, s.last)]
                if used and not (s.inside and s.name in again):
                    spans.append((min(used), max(used)))
            for first, last in spans:
                change[first] += s.nbytes
                change[last + 1] -= s.nbytes
        return change[:-1].cumsum() + self.others

    def plan(self, policy: str, again: Collection[str], away: Collection[str] = ()) -> RematPlan:
        """The plan that computes `again` again, offloads `away` and saves the other storages."""
        saved = [n for n in self.storages if n not in again and n not in away]
        return assemble(self.problem, [*self.always, *saved], policy, offloaded=away)


def finished(plan: RematPlan, began: float, **changes: Any) -> RematPlan:
    """A plan with the seconds since `began` (of `time.perf_counter`) as those that it took."""
    return replace(plan, solve_seconds=time.perf_counter() - began, **changes)


def searched(problem: Problem, policy: str, candidates: Callable[[Schedule, float], Iterable[RematPlan]]) -> RematPlan:
    """The fastest within the limit of `save_all`'s plan, of the candidates, and of those between two of them."""
    began = time.perf_counter()
    s, limit = schedule(problem), limit_of(problem)
    plan = s.everything
    if plan.peak_bytes > limit:
        plan = within(problem, limit, [plan, *candidates(s, limit)], policy)
    return finished(plan, began, policy=policy)


def limits(highest: float, lowest: float, count: int) -> Iterator[float]:
    """Limits in falling order, each the same share of the one before."""
    share = (max(lowest, 1) / max(highest, 1)) ** (1 / max(count - 1, 1))
    return (highest * share**k for k in range(count))


def schedule(problem: Problem) -> Schedule:
    """The schedule of a problem, by the plan that saves everything."""
    everything = POLICIES["save_all"].plan(problem)
    always = frozenset(n for n in POLICIES["recompute_all"].plan(problem).saved if not problem[n].is_given)
    timeline = everything.timeline
    steps = {(t >= timeline.forward, _kernel(problem, problem[n])): t for t, n in enumerate(timeline.steps)}
    values = [v for v in problem.values if v.phase in ("forward", "either", "backward") and v.kind != "view"]
    at: dict[str, int] = {}
    step = {False: 0, True: timeline.forward}
    for v in values:
        side, key = v.phase != "forward", _kernel(problem, v)
        if v.phase != "either" or (side, key) in steps:
            at[v.name] = step[side] = steps.get((side, key), step[side])

    names = _names(problem, everything, values, at)
    own, seconds = set(names), dict.fromkeys(names, 0.0)
    inputs: dict[str, tuple[str, ...]] = {}
    reads: dict[str, list[int]] = {n: [] for n in names}
    uses: dict[str, list[int]] = {n: [] for n in names}
    operators: set[str] = set()  # what an operator of the backward reads
    used_up: dict[str, tuple[dict[str, None], dict[str, None]]] = {}  # its storages, and what is computed on the way
    for v in values:
        found: dict[str, None] = {}
        inner = {v.name: None}
        for root in (problem[i].storage for i in v.inputs):
            more, between = ({root: None}, {}) if root in own else used_up.get(root, ({}, {}))
            found.update(more)
            inner.update(between)
        for n in found if v.name in at else ():
            (reads if v.phase == "forward" else uses)[n].append(at[v.name])
        if v.name in at and v.phase != "forward":
            operators.update(found if v.kind == "extern" else ())
        elif v.name in own:
            inputs[v.name] = tuple(found)
            seconds[v.name] = sum(problem.recompute_seconds(problem[n]) for n in inner)
        else:
            used_up[v.name] = found, inner
    direct = {problem[n].storage for n in everything.saved}
    outputs = {problem[n].storage for n in problem.forward_outputs}
    storages = {}
    for n in names:
        v = problem[n]
        last = timeline.forward - 1 if n in outputs else max([at[n], *reads[n]])
        used = tuple(sorted(set(uses[n]))) or ((timeline.forward,) if n in direct else ())
        fixed = n in always or v.tag == "must_save" or runs_once(problem, v)
        inside = v.kind == "kernel" and n not in operators
        storages[n] = Storage(n, v.nbytes, seconds[n], inputs[n], at[n], last, used, fixed, inside)
    bare = Schedule(problem, everything, storages, always, timeline.forward, timeline.seconds,
                    np.zeros(len(timeline.steps), dtype=np.int64))  # fmt: skip
    return replace(bare, others=np.maximum(timeline.total - bare.held(), 0))


def _kernel(problem: Problem, v: Value) -> str | int:
    """What tells its kernel: the results of one operator are one, and so are the values of one group."""
    while v.kind == "item":
        v = problem[v.inputs[0]]
    return v.name if v.group is None else v.group


def _names(problem: Problem, everything: RematPlan, values: Iterable[Value], at: Mapping[str, int]) -> list[str]:
    """What has memory of its own: what is saved, what another step reads, what may run only once, and reductions, which
    are small beside what they spare."""
    saved = {problem[n].storage for n in everything.saved}
    crossing = {r for v in values for r in (problem[i].storage for i in v.inputs) if at.get(r) != at.get(v.name)}
    return [
        v.name
        for v in values
        if v.phase == "forward" and v.savable and v.storage == v.name and v.kind != "symbol" and not v.wants_recompute
        and (v.name in saved or v.name in crossing or v.kind == "reduction" or runs_once(problem, v))
    ]  # fmt: skip
