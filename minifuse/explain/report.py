"""What the compiler did to a graph, as figures and as text.

A `Report` is a view over a `Record`: nothing is computed while a graph compiles, each figure when it is asked for.
Bytes are those of `ir.kernel.launch_traffic`, the accounting of fusion, rematerialisation and the benchmarks;
sizes that are symbols count at their hints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from minifuse.ir import ops
from minifuse.ir.decision import Decision, bytes_text
from minifuse.ir.device import DeviceModel
from minifuse.ir.index import Expr
from minifuse.ir.lazy import Deferred
from minifuse.ir.plan import Extern, Launch, Plan, launch_traffic, least_traffic
from minifuse.ir.value import Cast, Op, Random, Reduce, Scan, Value
from minifuse.passes.fuse.log import entries
from minifuse.passes.memory import peak
from minifuse.passes.remat.plan import Choice, RematPlan
from minifuse.passes.remat.problem import RECOMPUTE, SAVE
from minifuse.records import RECORDS, Record

from .saved import SavedTable, planned_text, saved_table
from .tables import WIDTH, clip, count, printed, table
from .why import WhyNot, why_not

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

rich_console, rich_text = Deferred("rich.console"), Deferred("rich.text")

SCHEMA = 1
FIGURES = ("ops", "calls", "read", "written", "bytes", "at least")
KERNELS_SHOWN = 8
EXTERNS_SHOWN = 4
REFUSALS_SHOWN = 4
SIZES_SHOWN = 4


@dataclass(frozen=True)
class LaunchReport:
    """One launch: the operators in its kernel, the user's lines that they come from, and what it moves (bytes).

    No run takes less than `lower_bound` seconds at the rates of the device model; `bound` says which rate that is:
    "memory" (bytes through main memory), "compute" (instructions) or "launch" (starting it).
    """

    name: str
    ops: tuple[str, ...]
    lines: tuple[str, ...]
    read: int
    written: int
    instructions: float
    lower_bound: float
    bound: str
    interpreted: bool

    @property
    def nbytes(self) -> int:
        return self.read + self.written


@dataclass(frozen=True)
class ExternReport:
    """One call of an operator that minifuse does not generate: why, the user's line, and bytes of its operands."""

    op: str
    reason: str
    where: str
    nbytes: int


@dataclass(frozen=True)
class Report:
    """The account of one compiled graph. `print` shows a screen of it, the worst first; `to_json` has all of it."""

    record: Record

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def stage(self) -> str:
        """ "forward", "backward" or "inference"."""
        return self.record.stage

    @property
    def plan(self) -> Plan:
        """The plan that runs."""
        return self.record.stages["memory"]

    @property
    def unfused(self) -> Plan:
        """The plan before fusion: a kernel an operator."""
        return self.record.stages["lower"]

    # -- figures ---------------------------------------------------------------------------------
    @property
    def kernels(self) -> int:
        """Launches of kernels in a call."""
        return len(self.plan.launches)

    @property
    def kernels_unfused(self) -> int:
        """Launches there would be with a kernel an operator."""
        return len(self.unfused.launches)

    @cached_property
    def kernel_bytes(self) -> int:
        """Bytes that the kernels of a call read and write."""
        return sum(launch_traffic(self.plan, s).total for s in self.plan.launches)

    @cached_property
    def bytes_unfused(self) -> int:
        """Bytes that they would move unfused."""
        return sum(launch_traffic(self.unfused, s).total for s in self.unfused.launches)

    @cached_property
    def least_bytes(self) -> int:
        """Bytes that no choice of kernels saves: inputs, outputs and what ATen's operators give and take, each once."""
        return least_traffic(self.unfused).total

    @cached_property
    def extern_bytes(self) -> int:
        """Bytes of what ATen's operators read and write, each operand once."""
        return sum(e.nbytes for e in self.externs)

    @cached_property
    def operators(self) -> tuple[int, int]:
        """How many of the graph's operators run in generated kernels, and in interpreted ones."""
        generated = {op for r in self.launches if not r.interpreted for op in r.ops}
        interpreted = {op for r in self.launches if r.interpreted for op in r.ops} - generated
        return len(generated), len(interpreted)

    @cached_property
    def coverage(self) -> float:
        """Share of the graph's pointwise and reduction operators that run in generated code, 0 to 1.

        The rest are interpreted, or externs that torch tags as pointwise or as reductions. Matrix products,
        convolutions, attention, sorting and the like count on neither side.
        """
        generated, interpreted = self.operators
        operators = generated + interpreted + sum(is_fusible(e) for e in self.plan.externs)
        return generated / operators if operators else 1.0

    # -- parts -----------------------------------------------------------------------------------
    @property
    def decisions(self) -> Sequence[Decision]:
        """Every choice that was made and every one that was refused, in order."""
        return self.record.decisions

    @property
    def fusion_log(self) -> list[dict[str, str]]:
        """The fusions in order, as plain data; given to another compile as `fusion_log` they give the same plan."""
        return entries(self.record.decisions, self.name)

    def why_not(self, first: str, second: str) -> WhyNot:
        """Why two FX nodes are not in one kernel: see `minifuse.explain.why.why_not`."""
        return why_not(self.record, first, second)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of the compile by phase: `dynamo` captures, `aot` traces, and within it `decompose` what
        operators are taken apart into; they stand with a graph's forward. A `warm start` reads the rest."""
        return self.record.seconds

    @property
    def remat(self) -> RematPlan | None:
        """What the partition of the joint graph decided; None where there was no joint graph."""
        return self.record.stages.get("remat")

    @property
    def saved(self) -> tuple[Choice, ...]:
        """The values that the backward loads, the largest first; inputs of the graph are not among them."""
        return self._choices(SAVE)

    @property
    def recomputed(self) -> tuple[Choice, ...]:
        """The values that the backward computes again, the largest first; views and sizes are not among them."""
        return self._choices(RECOMPUTE)

    def _choices(self, action: str) -> tuple[Choice, ...]:
        found = self.remat.choices.values() if self.remat is not None else ()
        return tuple(sorted((c for c in found if c.action == action and c.nbytes), key=lambda c: -c.nbytes))

    @property
    def partner(self) -> Report | None:
        """The report of the other pass of a training step, where that is compiled and remembered."""
        other = {"forward": "backward", "backward": "forward"}.get(self.stage)
        name = f"{self.name.removesuffix(self.stage)}{other}"
        return next((Report(r) for r in reversed(tuple(RECORDS)) if other and r.name == name), None)

    def saved_table(self) -> SavedTable | None:
        """What becomes of each activation, where it is computed again, and the peaks of the step; None where there
        was no joint graph. Modules, lines and kernels are there once the backward is compiled."""
        if self.remat is None:
            return None
        passes = {r.stage: r for r in (self, self.partner) if r is not None}
        forward, backward = passes.get("forward"), passes.get("backward")
        plans = (r.plan if r is not None else None for r in (forward, backward))
        decisions = backward.decisions if backward is not None else ()
        return saved_table(self.name, self.remat, decisions, *plans)

    @property
    def peaks(self) -> str:
        """The predicted peak beside that of the plans that run: of a step, or of a forward alone."""
        assert self.remat is not None
        passes = [self] if self.stage == "forward" else [r for r in (self.partner, self) if r is not None]
        planned = planned_text({r.stage: peak(r.plan)[0] for r in passes})
        if self.stage == "forward":
            return f"predicted peak of the forward {bytes_text(self.remat.timeline.forward_peak)}; {planned}"
        sides = self.remat.timeline.forward_peak, self.remat.timeline.backward_peak
        said = "forward {}, backward {}".format(*map(bytes_text, sides))
        return f"predicted peak {bytes_text(self.remat.peak_bytes)} ({said}); {planned}"

    @cached_property
    def interpreted(self) -> tuple[str, ...]:
        """Names of the launches that run op by op with torch, because no target's code could be made for them."""
        return tuple(r.name for r in self.launches if r.interpreted)

    @cached_property
    def launches(self) -> tuple[LaunchReport, ...]:
        """The kernels in the order that they run."""
        plan, device = self.plan, self.record.device
        named = {d.subject[0] for d in self.decisions if d.rule == "interpreted"}
        slow = {s.kernel for s in plan.launches if s.name in named}
        unit = self.record.stages.get("unit")
        compiled = unit is None or bool(unit.source)
        return tuple(_launch_report(plan, s, device, not compiled or s.kernel in slow) for s in plan.launches)

    @cached_property
    def externs(self) -> tuple[ExternReport, ...]:
        """The calls of ATen in the order that they run."""
        plan = self.plan
        return tuple(
            ExternReport(str(e.target), e.reason, plan.origins.get(e.origin, ""), launch_traffic(plan, e).total)
            for e in plan.externs
        )

    # -- as text ---------------------------------------------------------------------------------
    def to_json(self) -> dict[str, Any]:
        """Everything as plain data; `schema` changes when a key changes its meaning."""
        figures = ("name", "stage", "kernels", "kernels_unfused", "kernel_bytes", "bytes_unfused", "least_bytes",
                   "extern_bytes")  # fmt: skip
        return {
            "schema": SCHEMA,
            **{name: getattr(self, name) for name in figures},
            "coverage": self.coverage,
            "interpreted": list(self.interpreted),
            "launches": [asdict(r) for r in self.launches],
            "externs": [asdict(e) for e in self.externs],
            "saved": [asdict(c) for c in self.saved],
            "recomputed": [asdict(c) for c in self.recomputed],
            "seconds": dict(self.seconds),
            "decisions": [d.to_json() for d in self.decisions],
        }

    def __str__(self) -> str:
        return printed(self)

    __repr__ = __str__

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [rich_text.Text(line) for line in self.headline]
        if self.launches:
            parts.append(self._kernel_table())
        if self.externs:
            parts.append(self._extern_table())
        refused = self.costliest_refusals(REFUSALS_SHOWN)
        if refused:
            parts.append(rich_text.Text("Refused, by the bytes that it would have saved"))
            parts += [rich_text.Text(f"  {clip(str(d), WIDTH - 2)}") for d in refused]
        return rich_console.Group(*parts)

    @cached_property
    def headline(self) -> list[str]:
        """The figures in sentences."""
        calls = count(len(self.externs), "ATen call")
        lines = [
            f"{self.name}: {count(self.kernels_unfused, 'operator')} in {count(self.kernels, 'kernel')}, "
            f"{bytes_text(self.bytes_unfused)} -> {bytes_text(self.kernel_bytes)}; "
            f"{calls} ({bytes_text(self.extern_bytes)}); {self.coverage:.0%} of what can fuse is generated code"
        ]
        if self.remat is not None:
            model = f"{1e6 * self.remat.extra_seconds:.3g} us by the model"
            loaded = f"loads {len(self.saved)} values ({bytes_text(self.remat.saved_bytes)})"
            again = f"recomputes {len(self.recomputed)} in {model}"
            lines += [f"backward, by {self.remat.policy}: {loaded}, {again}", self.peaks]
        total = sum(self.seconds.values())
        spent = [(phase, s) for phase, s in sorted(self.seconds.items(), key=lambda item: -item[1]) if s >= total / 200]
        how = "read from the cache" if self.record.warm else "compiled"
        lines.append(f"{how} in {total:.2f} s: " + ", ".join(f"{phase} {1e3 * s:.0f} ms" for phase, s in spent))
        sizes = [f"{d.subject[0]}: {d.words} {d.where}" for d in self.decisions if d.rule == "size"]
        lines += [clip(line, WIDTH) for line in sizes[:SIZES_SHOWN]]
        if len(sizes) > SIZES_SHOWN:
            lines.append(f"{len(sizes) - SIZES_SHOWN} sizes more")
        if self.interpreted:
            lines.append(f"interpreted, slowly: {', '.join(self.interpreted)}")
        return lines

    def costliest_refusals(self, count: int) -> list[Decision]:
        """The refused fusions worth the most bytes, one for each pair of kernels that stayed apart."""
        kernel_of = {op: r.name for r in self.launches for op in r.ops}
        apart: dict[frozenset[str], Decision] = {}
        for d in self.decisions:
            pair = frozenset(kernel_of.get(op, op) for op in d.subject)
            if not d.taken and "saved_bytes" in d.facts and len(pair) > 1:
                best = apart.setdefault(pair, d)
                if d.facts["saved_bytes"] > best.facts["saved_bytes"]:
                    apart[pair] = d
        return sorted(apart.values(), key=lambda d: -d.facts["saved_bytes"])[:count]

    def _kernel_table(self) -> Table:
        rows = sorted(self.launches, key=lambda r: (not r.interpreted, -r.nbytes))
        made = table("kernel", "ops", "read", "written", "at least", "bound", "from", figures=FIGURES)
        for r in rows[:KERNELS_SHOWN]:
            bound = "interpreted" if r.interpreted else r.bound
            figures = str(len(r.ops)), bytes_text(r.read), bytes_text(r.written), f"{1e6 * r.lower_bound:.3g} us"
            made.add_row(rich_text.Text(r.name), *figures, bound, rich_text.Text(clip("; ".join(r.lines), 56)))
        if len(rows) > KERNELS_SHOWN:
            rest = rows[KERNELS_SHOWN:]
            read, written = sum(r.read for r in rest), sum(r.written for r in rest)
            ops_in_rest = str(sum(len(r.ops) for r in rest))
            made.add_row(f"{len(rest)} more", ops_in_rest, bytes_text(read), bytes_text(written), "", "", "")
        return made

    def _extern_table(self) -> Table:
        by_op: dict[tuple[str, str], list[ExternReport]] = {}
        for e in self.externs:
            by_op.setdefault((e.op, e.reason), []).append(e)
        rows = sorted(by_op.items(), key=lambda item: -sum(e.nbytes for e in item[1]))
        made = table("ATen", "calls", "bytes", "because", "first from", figures=FIGURES)
        for (op, reason), calls in rows[:EXTERNS_SHOWN]:
            texts = (rich_text.Text(clip(reason, 36)), rich_text.Text(clip(calls[0].where, 26)))
            nbytes = sum(e.nbytes for e in calls)
            made.add_row(rich_text.Text(clip(op, 36)), str(len(calls)), bytes_text(nbytes), *texts)
        if len(rows) > EXTERNS_SHOWN:
            rest = [e for _, calls in rows[EXTERNS_SHOWN:] for e in calls]
            made.add_row(f"{len(rows) - EXTERNS_SHOWN} more", str(len(rest)), bytes_text(sum(e.nbytes for e in rest)))
        return made


def reports() -> list[Report]:
    """A report for each graph compiled in this process, the oldest first (the last `records.KEPT` are remembered).

    A backward is compiled, and appears, when it first runs.
    """
    return [Report(record) for record in tuple(RECORDS)]


def is_fusible(extern: Extern) -> bool:
    """Whether torch calls an operator pointwise or a reduction."""
    tags = getattr(extern.target, "tags", ())
    return torch.Tag.pointwise in tags or torch.Tag.reduction in tags


def _launch_report(plan: Plan, step: Launch, device: DeviceModel, interpreted: bool) -> LaunchReport:
    moved = launch_traffic(plan, step)
    count = sum(instructions(plan, step.kernel.values(), m.sizes) for m in step.members)
    times = {"memory": moved.total / device.dram, "compute": count / device.vector, "launch": device.launch}
    bound = max(times, key=times.__getitem__)
    ops_of = step.kernel.origins
    lines = tuple(dict.fromkeys(plan.origins[o] for o in ops_of if plan.origins.get(o)))
    return LaunchReport(
        step.name, ops_of, lines, moved.read, moved.written, count, times[bound], bound, interpreted
    )  # fmt: skip


def instructions(plan: Plan, values: Iterable[Value], sizes: Mapping[Any, Expr] | None = None) -> float:
    """Instructions to compute these values once at each point that they vary over, by the costs of the op table;
    `sizes` are those of a launch's own."""
    total = 0.0
    for v in values:
        if isinstance(v, Op):
            cost = ops.TABLE[v.name].cost
        elif isinstance(v, Random):
            cost = ops.RANDOM_COST
        elif isinstance(v, Reduce):
            cost = ops.REDUCTIONS[v.kind].cost
        elif isinstance(v, (Cast, Scan)):
            cost = 1.0
        else:
            continue
        axes = v.axes | {v.over} if isinstance(v, Reduce) else v.axes
        total += cost * prod(plan.hint(a.size, sizes) for a in axes)
    return total
