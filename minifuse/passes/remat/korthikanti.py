"""Selective recomputation: what takes much memory for few flops."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from .baselines import SaveAll, runs_once
from .plan import RematPlan, assemble
from .problem import SYMBOL_BYTES, Problem, Value

PRODUCTS = ("aten.bmm", "aten.baddbmm")
SOFTMAX_EXPONENTS = ("aten.exp", "aten._softmax", "aten._safe_softmax")


@dataclass(frozen=True)
class KorthikantiSelective:
    """Recompute the core of attention: the products of queries and keys, their softmax and its dropout, and what they
    make of the values; save the rest.

    Vijay Korthikanti and others, "Reducing Activation Recomputation in Large Transformer Models", 2022, section 5: the
    core holds 5as/h of the bytes of a layer's activations (70% for GPT-3) for 2.7% of its flops. It is found as what
    lies on a way from one product of two activations to another through an exponential. Attention that one operator
    computes has no such core: it keeps none of it. A mask of dropout is drawn again where its numbers come of a seed.
    """

    name: str = field(default="korthikanti_selective", init=False)

    def plan(self, problem: Problem) -> RematPlan:
        began = time.perf_counter()
        core = self.core(problem)
        kept = [n for n in SaveAll().plan(problem).saved if n not in core]
        # the core is computed from what enters it
        entering = {i for n in core for i in problem[n].inputs if i not in core and self.keepable(problem, problem[i])}
        # but for a mask, which is drawn again from its seed
        seeds = {n: found for n in entering if (found := self.seeds(problem, n))}
        pinned = {n for n in core if runs_once(problem, problem[n]) and problem[n].savable}
        pinned |= {seed for found in seeds.values() for seed in found}
        saved = {n for n in (*kept, *entering) if not problem[n].is_given and n not in seeds} | pinned
        status = f"recomputes {len(core)} values of attention" if core else "no attention in parts"
        return assemble(problem, saved, self.name, status=status, solve_seconds=time.perf_counter() - began)

    @staticmethod
    def keepable(problem: Problem, v: Value) -> bool:
        return not v.is_given and v.savable and v.kind != "view" and v.phase == "forward" and not v.wants_recompute

    @staticmethod
    def seeds(problem: Problem, name: str) -> set[str]:
        """The seeds that a pointwise value is computed from, where it is computed from nothing else that has a size."""
        found, stack = set[str](), [name]
        while stack:
            v = problem[stack.pop()]
            if v.is_random and v.nbytes <= SYMBOL_BYTES and v.savable:
                found.add(v.name)
            elif v.kind in ("kernel", "view", "symbol") and not v.pinned:
                stack.extend(v.inputs)
            elif v.kind != "constant":
                return set()
        return found

    @staticmethod
    def core(problem: Problem) -> set[str]:
        """Names of the values between two products, those of the products included."""
        products = {v.name for v in problem.values if v.op in PRODUCTS and v.phase == "forward"}
        readers: dict[str, list[Value]] = {}
        for v in problem.values:
            for i in v.inputs if v.phase == "forward" else ():
                readers.setdefault(i, []).append(v)
        core: set[str] = set()
        for first in products:
            behind, stack = set[str](), [first]
            ends = set()
            while stack:  # what comes of it before another operator that is no kernel
                name = stack.pop()
                for r in readers.get(name, ()):
                    if r.name in products:
                        ends.add(r.name)
                    elif r.kind != "extern" and r.name not in behind:
                        behind.add(r.name)
                        stack.append(r.name)
            if not ends or not any(problem[n].op in SOFTMAX_EXPONENTS for n in behind):
                continue
            leads = set(ends)
            stack = list(ends)
            while stack:
                for i in problem[stack.pop()].inputs:
                    if i in behind and i not in leads:
                        leads.add(i)
                        stack.append(i)
            core |= {first, *leads}
        return core
