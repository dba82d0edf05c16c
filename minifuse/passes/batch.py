"""Batches: independent launches of one kernel become one launch over many tensors.

An optimiser's step is the same kernel for each of a model's parameters. What differs between them is the number of
elements, so a kernel that walks whole tensors element by element is written anew over `n` elements, a size of its own,
whatever the tensors' shapes; others (a reduction, a transpose) batch where they are equal as they stand. A number that
such a kernel stores besides, a count of steps, is stored by a launch of its own behind it.

Launches are independent where they have one depth in the graph of steps: every edge leads to a greater one, so steps of
one depth may run as one and no cycle comes of it. A launch may run deeper than it could, up to what waits for it. All
of it is near-linear in the number of launches: no two are compared that do not share a kernel and lie side by side.

The pass comes behind the schedules: they have cut long reductions into launches, which batch as any others do, and have
made one axis of what is contiguous.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from minifuse.ir import dtypes
from minifuse.ir.decision import Decision
from minifuse.ir.index import ONE, ZERO, Axis, Expr, Sym
from minifuse.ir.kernel import Check, Kernel, Param, Root, Schedule, Store, rewrite
from minifuse.ir.plan import Launch, Plan, Step, launch_traffic
from minifuse.ir.shape import product
from minifuse.ir.value import LANES, Load, Op, Value, index_axes, topological
from minifuse.passes import schedule, schedule_triton
from minifuse.passes.context import CompileContext
from minifuse.passes.depth import Depths
from minifuse.passes.memory import peak
from minifuse.passes.split import closed

MOVED_BYTES = 1 << 16
"""The most that a launch may share with other steps to be moved past some of them: it would leave the caches, and would
have to be kept for longer, all for the time of one launch, in which a CPU reads about as much from main memory."""
HELD_BYTES = 1 << 20
"""The most that the launches of a batch share with other steps, where it comes from several places of the plan."""
ATTEMPTS = 4


@dataclass(frozen=True)
class Form:
    """A kernel over any number of elements: `16 * own` where vectors of 16 fill the tensors, else `own`.

    `size` is what `own` stands for, `params` are the names that the parameters have in the kernel that it comes from,
    `roots` what it takes from there.
    """

    kernel: Kernel
    params: tuple[str, ...]
    size: Expr
    roots: tuple[Root, ...]

    def launch(self, step: Launch, own: Sym, name: str) -> Launch:
        """This of a launch, by itself."""
        return Launch(self.kernel, step.buffers(self.params), None, name, (((own, self.size),),))


@dataclass(frozen=True)
class Piece:
    """What of a step, by its position, could run over any size; `cut` where that is not all of the step."""

    form: Form
    step: Launch
    at: int
    cut: bool


def batch(plan: Plan, ctx: CompileContext) -> Plan:
    """Put independent launches of one kernel together; the plan computes the same values, bit for bit.

    Fuel counts as in fusion, a launch saved each, behind what fusion may use: the launches of the unfused plan.
    """
    fuel = ctx.options.fusion_fuel
    if fuel is not None:
        fuel -= len(ctx.stages.get("lower", plan).launches)
    if len(plan.launches) < 2 or fuel is not None and fuel <= 0:
        return plan
    return Batcher(plan, ctx, fuel).run()


class Batcher:
    """The state of batching one plan: `nodes` are its steps, some cut into what a batch may take and the rest, and
    `pieces` has the ones that would run over any size."""

    def __init__(self, plan: Plan, ctx: CompileContext, fuel: int | None) -> None:
        self.plan = plan
        self.ctx = ctx
        self.fuel = fuel
        triton = schedule_triton.target(plan, ctx.options) == "triton"
        self.choose = schedule_triton.choose if triton else schedule.choose
        name = "n"
        while name in plan.symbols:
            name += "_"
        self.own = Sym(name)
        self.known = {k: forms(k, self.own) for k in dict.fromkeys(s.kernel for s in plan.launches)}
        self.parts: dict[Any, tuple[Kernel, tuple[str, ...], Schedule]] = {}
        self.nodes: list[Step] = []
        self.pieces: dict[int, Piece] = {}
        self.said: list[Decision] = []
        self.near = False  # whether only what lies side by side may be one

    def run(self) -> Plan:
        whole: set[int] = set()
        for _ in range(ATTEMPTS):
            batches, order = self.attempt(whole)
            # a step that was cut, and of which no batch took a piece, stays whole
            used = {self.pieces[i].at for found in batches.values() for i in found if i in self.pieces}
            lone = {p.at for p in self.pieces.values() if p.cut} - used
            if not lone:
                break
            whole |= lone
        steps = [self.joined(batches[i]) if i in batches else self.alone(i) for i in order]
        made = replace(self.plan, steps=tuple(steps)) if batches else self.plan
        if not self.near and any(found[-1] - found[0] >= len(found) for found in batches.values()):
            before, after = peak(self.plan)[0], peak(made)[0]
            if after > before + HELD_BYTES:  # all that the last of a batch is computed from is held
                self.near = True
                return self.run()
        self.explain()
        self.ctx.decisions += self.said
        return made

    def attempt(self, whole: set[int]) -> tuple[dict[int, list[int]], list[int]]:
        """Batches by their last node, and the order of all nodes, where the steps `whole` are not cut."""
        self.said = []
        groups = self.groups(whole)
        if not groups:
            return {}, []
        fuel = self.fuel
        depths = Depths(replace(self.plan, steps=tuple(self.nodes)))
        batches: dict[int, list[int]] = {}
        # what nothing waits for finds its place first, and makes room for what it waits for
        for group in sorted(groups, key=lambda g: -g[-1]):
            clusters = depths.clusters(group)
            for before, after in pairwise(clusters):
                one, two = (depths.depth[found[0]] for found in (before, after))
                self.refuse(before[0], after[0], "they depend on one another, or on steps that do: one runs {first}"
                            " steps deep, the other {second}", first=one, second=two)  # fmt: skip
            for cluster in clusters:
                found = self.affordable(cluster, depths)
                found = found if fuel is None else found[: fuel + 1]
                if len(found) > 1:
                    batches[found[-1]] = found
                    fuel = None if fuel is None else fuel - len(found) + 1
        return batches, depths.ordered({i: last for last, found in batches.items() for i in found})

    # -- candidates ------------------------------------------------------------------------------
    def groups(self, whole: set[int]) -> list[list[int]]:
        """Nodes of one kernel, in order: those that run over any size, and those that are equal as they stand."""
        self.nodes, self.pieces = [], {}
        steps = [(at, s) for at, s in enumerate(self.plan.steps) if isinstance(s, Launch)]
        found = {at: [] if at in whole else self.known[s.kernel] for at, s in steps}
        shared = Counter((f.kernel, self.devices(s)) for at, s in steps for f in found[at])
        groups: dict[Any, list[int]] = {}
        for at, step in enumerate(self.plan.steps):
            if isinstance(step, Launch):
                devices = self.devices(step)
                taken = [f for f in found[at] if shared[f.kernel, devices] > 1]
                roots = {r for f in taken for r in f.roots}
                rest = tuple(r for r in step.kernel.body if r not in roots)
                for k, f in enumerate(taken):
                    groups.setdefault((f.kernel, devices), []).append(len(self.nodes))
                    self.pieces[len(self.nodes)] = Piece(f, step, at, bool(rest) or len(taken) > 1)
                    self.nodes.append(f.launch(step, self.own, f"{step.name}_{k}" if k else step.name))
                if not rest:
                    continue
                step = self.part(step, rest, f"{step.name}_rest") if taken else step
                if not any(isinstance(r, Check) or r.mode for r in rest):
                    groups.setdefault((step.kernel, step.schedule, devices), []).append(len(self.nodes))
            self.nodes.append(step)
        return [g for g in groups.values() if len(g) > 1]

    def devices(self, step: Launch) -> frozenset[torch.device]:
        return frozenset(self.plan.buffers[b].device for b in step.binding)

    def part(self, step: Launch, roots: tuple[Root, ...], name: str) -> Launch:
        """Some roots of a launch by themselves."""
        if (step.kernel, roots) not in self.parts:
            kernel = schedule.collapse(closed(replace(step.kernel, body=roots)))
            final = schedule.canonical(kernel)
            params = tuple(p.name for p in kernel.params)
            self.parts[step.kernel, roots] = final, params, self.choose(final, self.plan.hint)
        final, params, loops = self.parts[step.kernel, roots]
        return Launch(replace(final, origins=step.kernel.origins), step.buffers(params), loops, name)

    # -- what pays -------------------------------------------------------------------------------
    def affordable(self, cluster: list[int], depths: Depths) -> list[int]:
        """Those of independent launches that one launch may take: all where they lie side by side, else those that
        share little with other steps."""
        if cluster[-1] - cluster[0] < len(cluster):
            return cluster
        total, found = 0, list[int]()
        if self.near:
            self.refuse(cluster[0], cluster[-1], "launches of several places in one would raise the peak of memory")
            return found
        for i in cluster:
            shared = depths.shared_bytes(i)
            if shared <= MOVED_BYTES and total + shared <= HELD_BYTES:
                total += shared
                found.append(i)
            elif i != cluster[0]:
                self.refuse(cluster[0], i, "it would be moved past {steps} steps with {shared_bytes} that others"
                            " write or read", steps=i - cluster[0], shared_bytes=shared)  # fmt: skip
        return found

    def refuse(self, one: int, two: int, reason: str, **facts: Any) -> None:
        names = tuple(s.name for s in (self.nodes[one], self.nodes[two]) if isinstance(s, Launch))
        self.said.append(Decision("batch", names, False, reason, facts, self.plan.origins.get(names[-1], "")))

    def explain(self) -> None:
        """A decision for each kernel over any size that has the operators of another, and is not it."""
        names = {s.kernel: s.name for s in reversed(self.plan.launches)}
        first: dict[Any, tuple[Form, str]] = {}
        seen: set[Kernel] = set()
        for kernel, f in ((kernel, f) for kernel, found in self.known.items() for f in found):
            operators = tuple(v.name for v in f.kernel.values() if isinstance(v, Op))
            like, name = first.setdefault((operators, len(f.kernel.params)), (f, names[kernel]))
            if f.kernel not in seen and f.kernel != like.kernel:
                reason, facts = "the kernels differ: {difference}", {"difference": difference(like, f)}
                where = self.plan.origins.get(names[kernel], "")
                self.said.append(Decision("batch", (name, names[kernel]), False, reason, facts, where))
            seen.add(f.kernel)

    # -- the result ------------------------------------------------------------------------------
    def alone(self, i: int) -> Step:
        """A node that no batch took: as it was, or a piece of it by itself."""
        node, piece = self.nodes[i], self.pieces.get(i)
        if piece is None or not isinstance(node, Launch):
            return node
        return self.part(piece.step, piece.form.roots, node.name) if piece.cut else piece.step

    def joined(self, found: list[int]) -> Launch:
        """The launch of a batch, and its decision."""
        steps = [s for s in (self.nodes[i] for i in found) if isinstance(s, Launch)]
        loops, sizes = steps[0].schedule, tuple(s.sizes[0] for s in steps)
        if steps[0].own:
            every = sum(self.plan.hint(size) for row in sizes for _, size in row)
            known = {name: s.hint for name, s in self.plan.symbols.items()} | {self.own.name: every}
            loops = self.choose(steps[0].kernel, lambda e: e.evaluate(known))
        kernels = (p.step.kernel for i in found if (p := self.pieces.get(i)))
        origins = tuple(dict.fromkeys(o for k in (*kernels, *(s.kernel for s in steps)) for o in k.origins))
        binding = tuple(b for s in steps for b in s.binding)
        made = Launch(replace(steps[0].kernel, origins=origins), binding, loops, steps[0].name, sizes)
        reason = "{tensors} tensors in one launch that moves {moved_bytes}, {saved} launches saved"
        facts = {"tensors": len(steps), "saved": len(steps) - 1, "moved_bytes": launch_traffic(self.plan, made).total}
        names, where = tuple(s.name for s in steps), self.plan.origins.get(made.name, "")
        self.said.append(Decision("batch", names, True, reason, facts, where))
        return made


# -- one kernel for tensors of any size -------------------------------------------------------------
def forms(kernel: Kernel, own: Sym) -> list[Form]:
    """What of a kernel could run over any number of elements: the roots that walk one set of tensors, element by
    element, whole and in the order of their memory. A kernel may hold several sets that share numbers alone; all of
    them come before what stores a number, for they read what it was."""
    if kernel.ordered or any(isinstance(r, Check) or r.mode for r in kernel.body):
        return []
    above: dict[str, str] = {}

    def set_of(name: str) -> str:
        while (up := above.setdefault(name, name)) != name:
            above[name] = name = above.setdefault(up, up)
        return name

    walks: list[tuple[Store, str]] = []
    for r in kernel.stores:
        if r.index:
            accesses: list[Load | Store] = [r, *(v for v in topological(r.values) if isinstance(v, Load))]
            single = not index_axes(r.index)
            tensors = {a.param for a in accesses if a.index and (single or index_axes(a.index))}
            for name in sorted(tensors | {a.param for a in accesses if a.index and a.param in kernel.writes}):
                above[set_of(name)] = set_of(r.param)
            walks.append((r, r.param))
    sets: dict[str, list[Root]] = {}
    for r, name in walks:
        sets.setdefault(set_of(name), []).append(r)
    return [f for roots in sets.values() if (f := form(kernel, tuple(roots), own)) is not None]


def form(whole: Kernel, roots: tuple[Root, ...], own: Sym) -> Form | None:
    """These roots of a kernel over any number of elements, None where they do not walk all tensors alike."""
    kernel = closed(replace(whole, body=roots))
    if len(kernel.axes) > 1:
        kernel = schedule.collapse(kernel)
    if len(kernel.axes) > 1:
        return None
    axis = kernel.axes[0] if kernel.axes else None
    size = ONE if axis is None else axis.size
    params = {p.name: p for p in kernel.params}
    rows: set[str] = set()
    others: set[str] = set()
    for a in kernel.accesses:
        p, offset = params[a.param], params[a.param].offset(a.index)
        computed = any(isinstance(i, Value) for i in a.index)
        walked = not computed and (bool(a.index) if axis is None else offset is axis.expr)
        if walked and product(p.shape) is size:
            rows.add(p.name)
        elif axis is not None and axis in offset.atoms():
            return None
        else:
            others.add(p.name)
    if rows & others or any(s.param not in rows for s in kernel.stores):
        return None
    vectors = (size % LANES) is ZERO
    long = Axis("i0", own.expr * LANES if vectors else own.expr)

    def row(v: Value) -> Value | None:
        if isinstance(v, Load) and v.param in rows:
            return Load.of(v.param, (long.expr,), v.dtype, v.mask, v.other)
        return None

    body = rewrite(kernel.body, {} if axis is None else {axis: long.expr}, row)
    body = tuple(replace(r, index=(long.expr,)) for r in body if isinstance(r, Store))
    order = dict.fromkeys([*kernel.reads, *kernel.writes])
    given = tuple(Param(n, params[n].dtype, (long.size,), (ONE,)) if n in rows else params[n] for n in order)
    made = schedule.canonical(Kernel((long,), given, body, kernel.origins))
    return Form(made, tuple(order), size // LANES if vectors else size, roots)


def difference(one: Form, two: Form) -> str:
    """What keeps two kernels of the same operators from being one."""
    for p, q in zip(one.kernel.params, two.kernel.params, strict=True):
        if p.dtype is not q.dtype:
            return f"{p.name} is {dtypes.name(p.dtype)} in one and {dtypes.name(q.dtype)} in the other"
        if len(p.shape) != len(q.shape):
            return f"{p.name} is a number in one and a tensor in the other"
    if one.kernel.axes[0].size is not two.kernel.axes[0].size:
        return f"vectors of {LANES} fill the tensors of one alone"
    return "their constants, or the order of their operands"
