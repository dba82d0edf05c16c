"""What to save under a limit on memory as an integer program, solved exactly or to a proven gap."""

from __future__ import annotations

import itertools
import time
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from .budget import limit_of, within
from .milp import Answer, Model, Row
from .mincut import INFINITE, again_price, save_price
from .plan import RematPlan, assemble, cost_seconds
from .priced import PricedMinCut
from .problem import Problem, Value
from .rotor import RotorDp
from .search import search
from .stages import TINY, Node, Stage, Stages

# How often it is solved.
_ROUNDS = 8
# Of so few values all that the simulator refuses is excluded, one plan at a time; the limit stays as it is.
_FEW = 12
# The share of the time that is left that a solve may take: one that fails leaves some to the next.
_SHARE = 0.6


@dataclass(frozen=True)
class CheckmateMilp:
    """The cheapest plan within the limit, by mixed-integer programming (HiGHS): seconds of what is saved and of what is
    recomputed, as `cost_seconds` counts them.

    Paras Jain, Ajay Jain, Aniruddha Nrusimha, Amir Gholami, Pieter Abbeel, Kurt Keutzer, Ion Stoica and Joseph
    Gonzalez, "Checkmate: Breaking the Memory Wall with Optimal Tensor Rematerialization", MLSys 2020. The stages
    advance as in their section 4.2: the forward is the first and computes everything, each kernel of the backward that
    reads the forward is one more, and R[t, v] and S[t, v] say what is computed in stage t and what is in memory when it
    begins (4.3); memory is counted within a stage as in 4.4, kernel by kernel. Unlike there, a value is computed again
    at most once, when it is first asked for, as our backward does; one that only kernels read is computed inside them,
    and takes no memory.

    The order of the backward is that of a plan: first of the better of `default` and `rotor_dp`, then of what was
    found. The simulator has the last word on the peak; where a plan holds too much, the inner limit is lowered.
    `lower_bound` is of the model with the limit asked, in the orders that were tried. `seconds` is for all solves,
    `gap` relative. Without a budget there are no rows of memory, and the plan is that of the minimum cut. Where no plan
    is found in time it is that of `default` or `rotor_dp`, and `status` says so.
    """

    seconds: float = 60.0
    gap: float = 1e-3
    name: str = field(default="checkmate_milp", init=False)

    def plan(self, problem: Problem) -> RematPlan:
        began = time.perf_counter()
        limit = limit_of(problem)
        if np.isinf(limit):
            plan = self.unlimited(problem)
        else:
            given = min((search(problem, limit, "default"), RotorDp().plan(problem)),
                        key=lambda p: (max(p.peak_bytes, limit), cost_seconds(problem, p)))  # fmt: skip
            plan = self.limited(problem, limit, given)
        return replace(plan, solve_seconds=time.perf_counter() - began)

    def unlimited(self, problem: Problem) -> RematPlan:
        """The minimum cut's objective as a linear program over what is saved and what is recomputed, in integers."""
        model = Model()
        nodes = [v for v in problem.values if v.phase not in ("backward", "tangent")]
        keep = {v.name: save_price(v, problem.save_seconds) for v in nodes}
        again = {v.name: again_price(v, lambda v: _again(problem, v)) for v in nodes}
        saved = {v.name: model.binary(keep[v.name]) for v in nodes}
        runs = {v.name: model.binary(again[v.name]) for v in nodes}
        for v in nodes:
            for i in v.inputs:
                model.at_least({saved[i]: 1, runs[i]: 1, runs[v.name]: -1}, 0)
        for n in problem.required:
            if not problem[n].is_given:
                model.at_least({saved[n]: 1, runs[n]: 1}, 1)
        answer = model.solve(self.seconds, self.gap)
        if answer.x is None:
            return replace(
                PricedMinCut().fastest(problem), policy=self.name, status=f"as priced_mincut: {answer.status}"
            )
        names = [n for n, i in saved.items() if answer.x[i] > 0.5]
        return assemble(problem, names, self.name, status=answer.status, lower_bound=answer.bound)

    def limited(self, problem: Problem, limit: float, given: RematPlan) -> RematPlan:
        """Solve, simulate, and solve again: with the rows within a stage that were broken, with the order of the plan
        found, without that plan, or with a lower inner limit. It begins with a plan that is `given`, and gives that
        where it finds no better one."""
        deadline = time.perf_counter() + self.seconds
        plans = [given]
        stages = Stages(problem, limit, given)
        inside = stages.rows_inside()
        orders = {stages.order}
        inner, tighter, bound, words = limit, 1.0, None, ""
        refused: list[frozenset[str]] = []
        for _ in range(_ROUNDS if len(stages.nodes) > _FEW else 2**_FEW):
            left = deadline - time.perf_counter()
            if left <= 0:
                break
            program = Program(stages, inner, inside)
            program.refuse(refused)
            answer = program.solve(_SHARE * left, self.gap)
            if inner == limit and answer.bound is not None:
                bound = answer.bound if bound is None else min(bound, answer.bound)
            words = words or answer.status
            if answer.x is None:
                break
            plans.append(plan := assemble(problem, program.saved(answer.x), self.name, status=answer.status))
            if plan.peak_bytes <= limit:
                words = answer.status
                break
            if broken := stages.broken(plan, limit) - inside:
                inside |= broken
            elif (other := Stages(problem, limit, plan)).order not in orders:
                orders.add(other.order)
                stages, inside, inner = other, other.rows_inside(), limit
            elif len(stages.nodes) <= _FEW:
                refused.append(program.saved(answer.x))
            else:
                inner -= tighter * max(plan.peak_bytes - limit, TINY * limit)
                tighter *= 2
        plans.append(within(problem, limit, plans, self.name))
        best = min(plans, key=lambda p: (max(p.peak_bytes, limit), cost_seconds(problem, p)))
        if best.saved == given.saved:
            words = f"as {given.policy}: {words}"
        if best.peak_bytes > limit:
            words = f"{best.status}; {words}"
        elif bound is not None:
            bound = min(bound, cost_seconds(problem, best))
        return replace(best, policy=self.name, status=words, lower_bound=bound)


def _again(problem: Problem, v: Value) -> float:
    """As the minimum cut without a budget: a library's operators run once."""
    fixed = v.phase != "either" and (v.kind == "extern" or v.tag == "prefer_save")
    return INFINITE if fixed else problem.recompute_seconds(v)


class Program:
    """The integer program of stages under a limit: what is saved (s), computed again in a stage (R), there when a stage
    begins (S), or computed within a stage's kernel or within what is computed again there."""

    def __init__(self, stages: Stages, limit: float, inside: Collection[int]) -> None:
        self.stages, self.limit, self.nodes = stages, max(limit, 1.0), stages.nodes
        self.model = Model()
        self.save: dict[str, int] = {}
        self.inline: dict[str, int] = {}
        self.again: dict[tuple[str, int], int] = {}
        self.there: dict[tuple[str, int], int] = {}
        self.kernel: dict[tuple[str, int], int] = {}
        self.nested: dict[tuple[str, int], int] = {}
        for name, node in self.nodes.items():
            self.columns(name, node)
        for name, node in self.nodes.items():
            self.rows(name, node)
        self.whole = sum(n.nbytes for n in self.nodes.values())
        self.memory(inside)

    def solve(self, seconds: float, gap: float) -> Answer:
        return self.model.solve(seconds, gap)

    def refuse(self, plans: Collection[frozenset[str]]) -> None:
        """The same again is no answer."""
        for saved in plans:
            row = {i: -1.0 if n in saved else 1.0 for n, i in self.save.items()}
            self.model.at_least(row, 1 - sum(n in saved for n in self.save))

    def saved(self, x: np.ndarray) -> frozenset[str]:
        return frozenset(n for n, i in self.save.items() if x[i] > 0.5) | self.stages.small

    def columns(self, name: str, node: Node) -> None:
        model, once = self.model, {}
        if node.keep < INFINITE:
            self.save[name] = model.binary(node.keep)
            once[self.save[name]] = 1.0
        if node.within or node.nested:
            self.inline[name] = model.binary(node.again)
            once[self.inline[name]] = 1.0
            for columns, stages in ((self.kernel, node.within), (self.nested, node.nested)):
                for t in sorted(stages):
                    columns[name, t] = model.column()
                    model.at_most({columns[name, t]: 1, self.inline[name]: -1}, 0)
        for t in sorted(node.runs):
            self.again[name, t] = model.binary(node.again)
            once[self.again[name, t]] = 1.0
        if not node.is_tuple:
            ends = node.stages[1:] if name in self.save or node.runs else []
            self.there.update({(name, t): model.column() for t in ends})
            if name in self.save:
                self.there[name, node.stages[0]] = self.save[name]
        if once:
            model.at_most(once, 1)

    def present(self, name: str, t: int) -> dict[int, float]:
        """S + R: whether it is in memory in stage t."""
        found = (columns.get((name, t)) for columns in (self.there, self.again))
        return {i: 1.0 for i in found if i is not None}

    def behind(self, name: str, t: int) -> dict[int, float]:
        """S of the stage behind t."""
        stages = self.nodes[name].stages
        at = bisect_right(stages, t)
        return self.present_first(name, stages[at]) if at < len(stages) else {}

    def before(self, name: str, t: int) -> dict[int, float]:
        """S of stage t, or of the next in which it may have to be there."""
        stages = self.nodes[name].stages
        at = bisect_left(stages, t)
        return self.present_first(name, stages[at]) if at < len(stages) else {}

    def present_first(self, name: str, t: int) -> dict[int, float]:
        return {self.there[name, t]: 1.0} if (name, t) in self.there else {}

    def rows(self, name: str, node: Node) -> None:
        model = self.model
        for t, then in itertools.pairwise(node.stages):  # it is there if it was, or was computed
            if (name, then) in self.there:
                model.at_least({**self.present(name, t), self.there[name, then]: -1}, 0)
        for t in node.read:
            model.at_least(self.present(name, t) | self.one(self.kernel, name, t), 1)
        for t in node.stages:
            for i in node.inputs:
                if (name, t) in self.kernel:
                    self.needs(self.kernel, name, i, t, self.kernel)
                for columns in (self.again, self.nested):
                    if (name, t) in columns:
                        self.needs(columns, name, i, t, self.nested)
        for t in node.runs - node.read:  # it is computed when it is first asked for
            uses = (columns.get((r, t)) for r in node.readers for columns in (self.again, self.nested, self.kernel))
            model.at_least({**{i: 1.0 for i in uses if i is not None}, self.again[name, t]: -1}, 0)
        if name in self.inline:  # it is computed apart if an operator that reads it runs again, and only then
            runs = [{self.again[r, t]: 1.0 for t in self.nodes[r].runs} for r in node.readers
                    if self.nodes[r].value.kind == "extern"]  # fmt: skip
            for run in runs:
                model.at_most({**run, self.inline[name]: 1}, 1)
            every = {i: 1.0 for run in runs for i in run}
            if node.runs:
                model.at_least({**every, **{self.again[name, t]: -1.0 for t in node.runs}}, 0)

    def needs(self, columns: Columns, name: str, i: str, t: int, within: Columns) -> None:
        source = self.nodes[i]
        if source.is_tuple:  # its results are made with it
            self.model.at_least({**self.one(self.again, i, t), columns[name, t]: -1}, 0)
        else:
            there = self.present(i, t) | self.one(within, i, t)
            self.model.at_least({**there, columns[name, t]: -1}, 0)

    @staticmethod
    def one(columns: Columns, name: str, t: int) -> dict[int, float]:
        return {columns[name, t]: 1.0} if (name, t) in columns else {}

    def memory(self, inside: Collection[int]) -> None:
        stages = self.stages
        for base, done in stages.forward:
            self.bytes_of({n: {self.save[n]: 1.0} for n in done if n in self.save}, base)
        self.bytes_of({n: self.before(n, 0) for n in self.nodes}, stages.ahead)
        for t, stage in enumerate(stages.stages):
            held = {n: self.held(n, t) for n in self.nodes}
            self.bytes_of(held, stage.during)
            if stage.behind:
                self.bytes_of({n: self.behind(n, t) for n in self.nodes}, stage.behind)
            if t in inside:
                self.within(t, stage, held)

    def held(self, name: str, t: int) -> dict[int, float]:
        """Whether it is in memory while the kernel of stage t runs."""
        node = self.nodes[name]
        if (name, t) not in self.there and (name, t) not in self.again:
            return self.behind(name, t)
        inner = [{self.kernel[r, t]: -1.0} for r in node.readers if (r, t) in self.kernel]
        over = {self.again[name, u]: 1.0 for u in node.runs if u <= t and node.nbytes in self.stages.stages[t].fresh}
        if not node.nbytes or not (inner or t in node.read):
            return self.behind(name, t)
        if t in node.read and not over:
            return self.present(name, t)
        held = self.model.column()
        self.model.at_least({held: 1, **_less(self.behind(name, t))}, 0)
        mine = self.one(self.kernel, name, t) | over
        for use in inner:
            self.model.at_least({held: 1, **use, **mine}, 0)
        if t in node.read:
            self.model.at_least({held: 1, **mine}, 1)
        return {held: 1.0}

    def within(self, t: int, stage: Stage, held: Mapping[str, Row]) -> None:
        """The bytes while each value is computed again in stage t, without those that were last read before."""
        here = sorted({n.at for name, n in self.nodes.items() if (name, t) in self.again})
        if not here:
            return
        until: dict[str, list[tuple[int, Row]]] = {}
        for name, node in self.nodes.items():
            if not node.nbytes or not self.present(name, t):
                continue
            readers = [(self.nodes[r].at, r) for r in node.readers]
            rest: Row = held[name]
            found: list[tuple[int, Row]] = []
            for at, r in sorted(readers, reverse=True):
                uses = [columns[r, t] for columns in (self.again, self.nested) if (r, t) in columns]
                if not uses:
                    continue
                column = self.model.column()
                for use in uses:
                    self.model.at_least({column: 1, use: -1, **self.one(self.nested, name, t)}, 0)
                if rest:
                    self.model.at_least({column: 1, **_less(rest)}, 0)
                rest = {column: 1.0}
                found.append((at, rest))
            until[name] = found[::-1]
        for at in here:
            row: dict[str, Row] = {}
            for name, node in self.nodes.items():
                if name not in until or node.at > at:
                    row[name] = self.before(name, t) if node.at != at else self.present(name, t)
                elif node.at == at:
                    row[name] = self.present(name, t)
                else:
                    row[name] = next((use for reader, use in until[name] if reader >= at), held[name])
            self.bytes_of(row, stage.before)

    def bytes_of(self, there: Mapping[str, Row], base: int) -> None:
        """The row that all this fits beside `base`, in shares of the limit; none where it always does."""
        if base + self.whole <= self.limit:
            return
        row: dict[int, float] = {}
        for name, columns in there.items():
            for i, many in columns.items():
                row[i] = row.get(i, 0.0) + many * self.nodes[name].nbytes / self.limit
        row = {i: share for i, share in row.items() if share}
        self.model.at_most(row, max(0.0, 1 - base / self.limit) if row else 0.0)


Columns = Mapping[tuple[str, int], int]


def _less(row: Row) -> dict[int, float]:
    return {i: -many for i, many in row.items()}
