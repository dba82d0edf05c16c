"""Joins written in place: the pieces of a concatenation, a padding, a stack or a scattered slice are stored by their
producers where the joined buffer has them (`Buffer.inside`), and the join itself moves no byte (DESIGN.md, section 3).

The other form is one kernel that chooses by position; it fuses with what computes the pieces and with what reads the
result, and then moves less than a buffer that is written and read. Which form moves less depends on all that fuses, so
both are fused, and the one whose kernels move fewer bytes is taken, each group of joins that share kernels by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from minifuse.ir import dtypes
from minifuse.ir.decision import Decision
from minifuse.ir.index import ONE, ZERO, Expr
from minifuse.ir.kernel import Kernel
from minifuse.ir.plan import Buffer, Extern, Free, Join, Launch, Plan, Step, TensorRef, launch_traffic
from minifuse.ir.value import Cast, Const, Load, topological
from minifuse.passes.context import CompileContext

from .fuse import fuse
from .fuse.log import JOINED, given
from .memory import ALIGN, LARGE_BYTES, PRODUCTS, has_real_out, held, most_alive, peak, spans, unknown_at_start
from .regions import Piece, copy_kernel, covers, pieces, strides_of

MEMORY_ROUNDS = 3
FEW = 4


@dataclass(frozen=True, eq=False)
class Candidate:
    """A kernel, step `at` of the plan, that fills a buffer by position alone."""

    at: int
    buffer: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Verdict:
    """What became of one piece: the buffer that it is, and why it is copied nevertheless (empty: written in place)."""

    piece: str
    why: str = ""


def fuse_joined(plan: Plan, ctx: CompileContext) -> Plan:
    """Merge kernels, with joins in place where that moves fewer bytes; the plan computes the same values, bit for bit.

    Each join in place takes one of `fusion_fuel`. The plan with its joins, before fusion, is kept as the stage "join".
    """
    fuel = ctx.options.fusion_fuel
    found = [] if fuel is not None and fuel <= 0 else candidates(plan)
    entries = given(ctx)
    if not found and entries is None:
        return fuse(plan, ctx)
    rewriting = Rewriting(plan)
    able = []
    for c in found:
        verdicts = rewriting.verdicts(c)
        if all(v.why for v in verdicts):
            record(ctx, plan, c, verdicts, False, "no piece can be")
        elif rewriting.vanishes(c):
            record(ctx, plan, c, verdicts, False, "its readers choose for themselves, and it is not stored")
        else:
            able.append(c)
    if entries is not None:
        wanted = {e.first for e in entries if e.rule == JOINED}
        return replayed(plan, ctx, [c for c in able if c.buffer in wanted])
    if not able:
        return fuse(plan, ctx)
    trial = Trial(plan, able, ctx)
    taken = trial.choose(fuel)
    ctx.stages["join"] = trial.plans[taken]
    if fuel is None:
        ctx.decisions += trial.decisions[taken]
        return trial.fused[taken]
    left = replace(ctx, options=replace(ctx.options, fusion_fuel=fuel - len(taken)))
    return fuse(trial.plans[taken], left)


def replayed(plan: Plan, ctx: CompileContext, taken: Sequence[Candidate]) -> Plan:
    """The joins in place that a log names, then what else it says."""
    rewriting = Rewriting(plan)
    for c in sorted(taken, key=lambda c: -c.at):
        record(ctx, plan, c, rewriting.verdicts(c), True, "as the log says")
        rewriting.write(c)
    ctx.stages["join"] = rewriting.finish() if taken else plan
    return fuse(ctx.stages["join"], ctx)


def candidates(plan: Plan) -> list[Candidate]:
    """The kernels that choose by position alone where each element of a fresh buffer comes from."""
    late = unknown_at_start(plan)
    found = []
    for at, step in enumerate(plan.steps):
        if not isinstance(step, Launch) or len(step.writes) != 1:
            continue
        (name,) = step.writes
        buffer = plan.buffers[name]
        if (
            buffer.storage != "arena"
            or name in plan.mutated
            or late
            and any(s.name in late for s in step.kernel.symbols())
        ):
            continue
        made = pieces(step.kernel)
        if made:
            found.append(Candidate(at, name, tuple(made)))
    return found


def record(
    ctx: CompileContext,
    plan: Plan,
    c: Candidate,
    verdicts: Sequence[Verdict],
    taken: bool,
    reason: str,
    **facts: object,
) -> None:
    """One decision a join: how many of its pieces their producers write in place, and why the others are copied."""
    apart = "".join(dict.fromkeys(f"; {v.piece or 'a part'} {v.why}" for v in verdicts if v.why))
    inside = sum(not v.why for v in verdicts)
    step = plan.steps[c.at]
    assert isinstance(step, Launch)
    names = dict.fromkeys((*(v.piece for v in verdicts if v.piece), step.name))
    facts = {
        "inside": inside,
        "pieces": len(verdicts),
        "apart": apart,
        **facts,
        "first": step.name,
        "second": step.name,
    }
    ctx.record(JOINED, *names, taken=taken, reason=reason + "{apart}", where=plan.origins.get(step.name, ""), **facts)


# -- rewriting a plan ---------------------------------------------------------------------------------
class Rewriting:
    """The plan with some joins in place. The last join comes first, so that one that is a piece of it moves whole."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.buffers = dict(plan.buffers)
        self.made: dict[int, list[Step]] = {}
        self.kept = {o.buffer for o in plan.outputs if isinstance(o, TensorRef)} | set(plan.mutated)
        self.held = held(plan)
        self.writer: dict[str, Step] = {}
        self.readers: dict[str, list[Step]] = {}
        for step in plan.steps:
            if isinstance(step, Free):
                continue
            for name in step.writes:
                self.writer[name] = step
            for name in step.reads:
                self.readers.setdefault(name, []).append(step)

    def verdicts(self, c: Candidate) -> list[Verdict]:
        """What would become of each piece."""
        taken: set[str] = set()
        found = []
        for piece in c.pieces:
            v = piece.value.arg if isinstance(piece.value, Cast) else piece.value
            name = v.param if isinstance(v, Load) else ""
            place = self.place(c, piece, taken)
            found.append(Verdict(name, place if isinstance(place, str) else ""))
            taken.add(name)
        return found

    def place(self, c: Candidate, piece: Piece, taken: set[str]) -> Buffer | str:
        """A piece's buffer as a region of the joined one, or why it cannot be."""
        parent = self.buffers[c.buffer]
        if isinstance(piece.value, Cast):
            return "has another dtype"
        if not isinstance(piece.value, Load):
            return "is a fill" if isinstance(piece.value, Const) else "is computed here"
        b = self.buffers[piece.value.param]
        writer = self.writer.get(b.name)
        if b.storage in ("input", "constant") or writer is None:
            return "is an input"
        if b.name in taken:
            return "appears twice"
        if b.name in self.kept:
            return "is returned on its own"
        if b.name in self.held:
            return "may be kept by an operator"
        if b.inside is not None:
            return f"lies in {self.owner(b.name)} already"
        if b.device != parent.device:
            return f"is on {b.device}"
        if not covers(piece, b):
            return "is joined in part"
        index = [i for i in piece.value.index if isinstance(i, Expr)]
        found = None if piece.value.mask is not None else strides_of(index, b.shape, piece.offset(parent.stride))
        if found is None:
            return "has an order that no strides give it there"
        stride, offset = found
        if refused := self.refused(b, writer, stride, offset):
            return refused
        whole, begin = parent.inside or (parent.name, ZERO)
        return replace(b, stride=stride, storage="inside", inside=(whole, begin + offset))

    def vanishes(self, c: Candidate) -> bool:
        """Whether nothing needs the joined buffer in memory: few kernels read it, and what it chooses from goes element
        by element or is stored anyway. Fused, it is then computed where it is read, and there is nothing to try."""
        readers = self.readers.get(c.buffer, [])
        if c.buffer in self.kept or len(readers) > FEW or not all(isinstance(r, Launch) for r in readers):
            return False
        names = {v.param for p in c.pieces for v in topological([p.value]) if isinstance(v, Load)}
        for _ in range(FEW):
            makers = [m for n in names if isinstance(m := self.writer.get(n), Launch)]
            if any(any(m.kernel.reductions) or any(m.kernel.scans) for m in makers):
                return False
            names = {n for m in makers for n in m.reads}
        return True

    def owner(self, name: str) -> str:
        """The joined buffer that a region is a piece of."""
        joins = (s for made in self.made.values() for s in made if isinstance(s, Join))
        return next(j.buffer for j in joins if name in j.regions)

    def refused(self, b: Buffer, writer: Step, stride: tuple[Expr, ...], offset: Expr) -> str:
        """Why an operator of ATen that writes or reads a piece needs it elsewhere. Bits must not depend on the place,
        so rows stay as they are, but for those that a product on a CPU writes; of one column it takes another path."""
        together = all(n is ONE or s is d for n, s, d in zip(b.shape, stride, b.stride, strict=True))
        if isinstance(writer, Extern):
            if not has_real_out(writer, self.plan):
                return f"is made by {writer.target}, which has no out="
            rows = len(stride) > 1 and stride[-1] is ONE and (b.shape[-1] - 2).is_nonneg()
            if not together and not (rows and writer.target in PRODUCTS and b.device.type == "cpu"):
                return f"would have its rows apart where {writer.target} writes them"
        readers = [s for s in self.readers.get(b.name, ()) if isinstance(s, Extern)]
        for reader in readers:
            if not together:
                return f"would have its rows apart where {reader.target} reads them"
        aligned = all(factor * dtypes.itemsize(b.dtype) % ALIGN == 0 for _, factor in offset.terms)
        if (isinstance(writer, Extern) and together or readers) and not aligned:
            return "would lie where ATen has it unaligned"
        return ""

    def write(self, c: Candidate) -> None:
        """Put a join in place."""
        step, parent = self.plan.steps[c.at], self.buffers[c.buffer]
        assert isinstance(step, Launch)
        whole, begin = parent.inside or (parent.name, ZERO)
        steps: list[Step] = []
        regions: list[str] = []
        taken: set[str] = set()
        for k, piece in enumerate(c.pieces):
            b = self.place(c, piece, taken)
            if isinstance(b, str):
                name = f"{c.buffer}_part{k}"
                while name in self.buffers:
                    name += "_"
                at = begin + piece.begin(parent.stride)
                b = Buffer(name, parent.dtype, piece.shape, parent.stride, parent.device, "inside", None, (whole, at))
                self.buffers[name] = b
                steps.append(copy_kernel(b, piece, self.buffers, step.kernel.origins[0]))
            else:
                taken.add(b.name)
                self.buffers[b.name] = b
            regions.append(b.name)
        steps.append(Join(c.buffer, tuple(regions), step.name))
        self.made[c.at] = steps

    def finish(self) -> Plan:
        steps = [s for k, step in enumerate(self.plan.steps) for s in self.made.get(k, [step])]
        return replace(self.plan, buffers=self.buffers, steps=tuple(map(self.laid_out, steps)))

    def laid_out(self, step: Step) -> Step:
        """A launch whose parameters have the strides that their buffers have now."""
        if not isinstance(step, Launch):
            return step
        kernel = step.kernel
        params = tuple(replace(p, stride=self.buffers[b].stride)
                       for p, b in zip(kernel.params, step.binding, strict=True))  # fmt: skip
        if params == kernel.params:
            return step
        return replace(step, kernel=Kernel(kernel.axes, params, kernel.body, kernel.origins))


def joined(plan: Plan, some: Iterable[Candidate]) -> Plan:
    """The plan with these joins in place."""
    rewriting = Rewriting(plan)
    for c in sorted(some, key=lambda c: -c.at):
        rewriting.write(c)
    return rewriting.finish()


# -- deciding -----------------------------------------------------------------------------------------
Chosen = frozenset[Candidate]


@dataclass
class Trial:
    """Both forms of some joins, fused, and what each moves."""

    plan: Plan
    able: list[Candidate]
    ctx: CompileContext
    plans: dict[Chosen, Plan] = field(default_factory=dict)
    fused: dict[Chosen, Plan] = field(default_factory=dict)
    decisions: dict[Chosen, list[Decision]] = field(default_factory=dict)

    @property
    def price(self) -> int:
        """What starting a kernel costs, in bytes of traffic: a join that makes one more must save that."""
        return int(self.ctx.device.launch * self.ctx.device.dram)

    def fuse(self, some: Chosen) -> Plan:
        """The plan with some joins in place, fused as far as fusion goes."""
        if some not in self.fused:
            options = replace(self.ctx.options, fusion_fuel=None)
            ctx = CompileContext(self.ctx.name, self.ctx.stage, options, device=self.ctx.device)
            self.plans[some] = joined(self.plan, some) if some else self.plan
            self.fused[some] = fuse(self.plans[some], ctx)
            self.decisions[some] = ctx.decisions
        return self.fused[some]

    def choose(self, fuel: int | None) -> Chosen:
        """The joins that move fewer bytes in place, as many as there is fuel for; decisions are recorded."""
        every = frozenset(self.able)
        before, after = self.fuse(frozenset()), self.fuse(every)
        saved, more = compare(self.plan, self.able, before, after)
        chosen = [c for c in self.able if saved[c] > 0 and saved[c] >= more[c] * self.price]
        taken = frozenset(chosen if fuel is None else chosen[:fuel])
        longer: dict[Candidate, int] = {}
        limit, _ = peak(before)
        for n in range(MEMORY_ROUNDS):
            most, early = before_whole(self.fuse(taken))
            if most <= limit + max(LARGE_BYTES, limit // 128) or not taken:
                break
            blamed = [c for c in taken if c.buffer in early] if n < MEMORY_ROUNDS - 1 else []
            longer |= dict.fromkeys(blamed or taken, most - limit)
            taken -= frozenset(longer)
        more_held = max(peak(self.fuse(taken))[0] - limit, 0)
        rewriting = Rewriting(self.plan)
        for c in sorted(self.able, key=lambda c: -c.at):
            self.say(c, rewriting.verdicts(c), c in taken, saved[c], more[c], longer.get(c, more_held))
            if c in taken:
                rewriting.write(c)
        return taken

    def say(self, c: Candidate, verdicts: Sequence[Verdict], taken: bool, saved: int, more: int, longer: int) -> None:
        facts: dict[str, object] = {"saved_bytes": saved, "more_kernels": more, "longer_bytes": longer}
        if taken:
            reason = "{inside} of {pieces} pieces by their producers, saves {saved_bytes}"
            reason += "; memory's peak is {longer_bytes} higher with all that are" if longer else ""
        elif saved <= 0:
            reason = "one kernel that chooses by position moves no more: {saved_bytes} would be saved"
        elif saved < more * self.price:
            reason = "{more_kernels} more kernels would save {saved_bytes} alone"
        elif longer:
            reason = "it would save {saved_bytes}, and memory's peak would be {longer_bytes} higher"
        else:
            reason = "it would save {saved_bytes}: no fuel is left"
        record(self.ctx, self.plan, c, verdicts, taken, reason, **facts)


def compare(
    plan: Plan, able: Sequence[Candidate], before: Plan, after: Plan
) -> tuple[dict[Candidate, int], dict[Candidate, int]]:
    """The bytes that each join saves in place, and how many kernels it adds.

    Counted over the kernels that differ between two plans and have operators in common, from one to the next; joins
    that share such kernels share the figures.
    """
    first, second = (
        Counter((tuple(sorted(s.kernel.origins)), launch_traffic(p, s).total) for s in p.launches)
        for p in (before, after)
    )
    kernels = [(names, 1, nbytes) for names, nbytes in (first - second).elements()]
    kernels += [(names, -1, nbytes) for names, nbytes in (second - first).elements()]
    above: dict[str, str] = {}

    def root(name: str) -> str:
        while (up := above.get(name, name)) != name:
            above[name] = above.get(up, up)
            name = up
        return name

    for names, _, _ in kernels:
        for name in names:
            above[root(name)] = root(names[0])
    saved: dict[str, int] = {}
    more: dict[str, int] = {}
    for names, sign, nbytes in kernels:
        group = root(names[0])
        saved[group] = saved.get(group, 0) + sign * nbytes
        more[group] = more.get(group, 0) - sign
    groups = {}
    for c in able:
        step = plan.steps[c.at]
        assert isinstance(step, Launch)
        groups[c] = root(step.kernel.origins[0])
    return {c: saved.get(g, 0) for c, g in groups.items()}, {c: more.get(g, 0) for c, g in groups.items()}


def before_whole(plan: Plan) -> tuple[int, set[str]]:
    """The most bytes that are alive at once, and the joined buffers that are alive then before they are whole."""
    found = spans(plan)
    most, where = most_alive(found.values())
    whole = {step.buffer: k for k, step in enumerate(plan.steps) if isinstance(step, Join)}
    return most, {n for n, k in whole.items() if n in found and found[n][0] <= where < k}
