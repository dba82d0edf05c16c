"""What becomes of each activation: saved, computed again in which kernels, or kept by the host; and the peak of a step.

A view over a `RematPlan`, the decisions that it left, and the plan of the backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from minifuse.ir.decision import Decision, bytes_text
from minifuse.ir.lazy import Deferred
from minifuse.ir.plan import Plan
from minifuse.passes.memory import peak
from minifuse.passes.remat.plan import RematPlan
from minifuse.passes.remat.problem import OFFLOAD, RECOMPUTE, SAVE

from .tables import WIDTH, clip, count, printed, seconds_text, table
from .timeline import Drawing, draw

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

rich_console, rich_text = Deferred("rich.console"), Deferred("rich.text")

SCHEMA = 1
SHOWN = 40
FIGURES = ("bytes", "saving", "again", "there and back")


@dataclass(frozen=True)
class Activation:
    """A value that the backward needs of the forward.

    `nbytes` of memory, each storage once: none where `shares` names a value above it that has the same. `module` and
    `where` are the path of the module and the user's line that it is computed in. `save_seconds` is what saving it
    takes, `recompute_seconds` what computing it again, `transfer_seconds` the way to the host and back. `kernels` names
    the kernels of the backward, and the operators of ATen, that compute it again.
    """

    name: str
    action: str
    nbytes: int
    module: str
    where: str
    reason: str
    save_seconds: float
    recompute_seconds: float
    transfer_seconds: float = 0.0
    kernels: tuple[str, ...] = ()
    shares: str = ""


@dataclass(frozen=True)
class SavedTable:
    """The activations of one joint graph, the largest first, and the peaks (bytes).

    `planned` are the peaks of the forward's and the backward's plan, as far as they are known; `backward_only` counts
    the values that only the backward reads, which are no one's to save.
    """

    name: str
    plan: RematPlan
    activations: tuple[Activation, ...]
    planned: Mapping[str, int]
    backward_only: int = 0

    @property
    def saved(self) -> tuple[Activation, ...]:
        return self._having(SAVE)

    @property
    def recomputed(self) -> tuple[Activation, ...]:
        return self._having(RECOMPUTE)

    @property
    def offloaded(self) -> tuple[Activation, ...]:
        return self._having(OFFLOAD)

    def _having(self, action: str) -> tuple[Activation, ...]:
        return tuple(a for a in self.activations if a.action == action)

    @cached_property
    def drawing(self) -> Drawing | None:
        """The bytes of the step, to be drawn."""
        return draw(self.plan.timeline)

    @property
    def headline(self) -> list[str]:
        """The figures in sentences."""
        plan, line = self.plan, self.plan.timeline
        again, away = sum(a.nbytes for a in self.recomputed), sum(a.transfer_seconds for a in self.offloaded)
        parts = [
            f"saves {count(len(self.saved), 'value')} ({bytes_text(plan.saved_bytes)})",
            f"recomputes {len(self.recomputed)} ({bytes_text(again)}) in {seconds_text(plan.extra_seconds)}",
        ]
        if self.offloaded:
            host = f"offloads {len(self.offloaded)} ({bytes_text(plan.offloaded_bytes)})"
            parts.append(f"{host}, {seconds_text(away)} there and back")
        status = f", {plan.status}" if plan.status else ""
        side = "forward" if line.peak_step in line.steps[: line.forward] else "backward"
        reached = f" at {line.peak_step} in the {side}" if line.peak_step else ""
        sides = (("forward", line.forward_peak), ("boundary", line.boundary), ("backward", line.backward_peak))
        said = ", ".join(f"{name} {bytes_text(n)}" for name, n in sides)
        return [
            f"{self.name}: by {plan.policy}{status}; a step takes {seconds_text(plan.step_seconds)} by the model",
            ", ".join(parts),
            f"predicted peak {bytes_text(plan.peak_bytes)}{reached} ({said})",
            *([planned_text(self.planned)] if self.planned else []),
        ]

    def parts(self, width: int = WIDTH, shown: int | None = SHOWN) -> list[RenderableType]:
        """The headline and a table for each action, of `shown` rows (None: all of them)."""
        parts: list[RenderableType] = [rich_text.Text(line) for line in self.headline]
        for action in (SAVE, OFFLOAD, RECOMPUTE):
            rows = self._having(action)
            if rows:
                parts.append(self._table(action, rows, width, shown))
        if self.backward_only:
            parts.append(rich_text.Text(f"{count(self.backward_only, 'value')} more, which only the backward reads"))
        return parts

    def _table(self, action: str, rows: Sequence[Activation], width: int, shown: int | None) -> Table:
        away = action == OFFLOAD
        headings = (action, "bytes", "there and back" if away else "saving", "again", "module", "from",
                    "in kernels" if action == RECOMPUTE else "because")  # fmt: skip
        texts = []
        for a in rows[:shown]:
            said = ", ".join(a.kernels) if action == RECOMPUTE else a.reason
            said = f"shares the memory of {a.shares}" if a.shares else said
            seconds = a.transfer_seconds if away else a.save_seconds, a.recompute_seconds
            names = clip(a.name, 24), clip(a.module, width // 3), clip(a.where, 24)
            texts.append([names[0], bytes_text(a.nbytes), *map(seconds_text, seconds), *names[1:], said])
        left = sum(max(map(len, column)) + 2 for column in zip(headings[:-1], *(t[:-1] for t in texts), strict=True))
        made = table(*headings, figures=FIGURES)
        for *first, last in texts:
            made.add_row(*map(rich_text.Text, first), rich_text.Text(clip(last, max(width - left, 12))))
        if rest := rows[len(texts) :]:
            made.add_row(f"{len(rest)} more", bytes_text(sum(a.nbytes for a in rest)))
        return made

    def text(self, width: int = WIDTH, shown: int | None = None) -> str:
        """All of it in lines of `width`."""
        return printed(rich_console.Group(*self.parts(width, shown)), width)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data, seconds and bytes."""
        plan, line = self.plan, self.plan.timeline
        figures = ("policy", "status", "saved_bytes", "offloaded_bytes", "extra_flops", "extra_seconds", "step_seconds")
        peaks = {"step": line.peak_step, "forward": line.forward_peak, "boundary": line.boundary,
                 "backward": line.backward_peak}  # fmt: skip
        return {
            "name": self.name,
            **{name: getattr(plan, name) for name in figures},
            "predicted_peak": {"bytes": plan.peak_bytes, **peaks},
            "planned_peak": dict(self.planned),
            "backward_only": self.backward_only,
            **{name: [asdict(a) for a in getattr(self, name)] for name in ("saved", "recomputed", "offloaded")},
        }

    def __rich__(self) -> RenderableType:
        return rich_console.Group(*self.parts())

    def __str__(self) -> str:
        return printed(self)

    __repr__ = __str__


@dataclass(frozen=True)
class SavedReport:
    """What `minifuse.saved_report` found: a table for each graph that has a backward."""

    tables: tuple[SavedTable, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data; `schema` changes when a key changes its meaning."""
        return {"schema": SCHEMA, "graphs": [t.to_json() for t in self.tables]}

    def __rich__(self) -> RenderableType:
        none = rich_text.Text("no graph has a backward: nothing is saved")
        return rich_console.Group(*(self.tables or (none,)))

    def __str__(self) -> str:
        return printed(self)

    __repr__ = __str__


def saved_table(
    name: str, remat: RematPlan, decisions: Iterable[Decision], forward: Plan | None, backward: Plan | None
) -> SavedTable:
    """The table of one joint graph, from what the passes left of it.

    Where the decisions of the partition are not known (a backward that is not compiled yet), it has no modules and
    lines; where a plan is not known, no kernels or no planned peak.
    """
    facts = {d.subject[0]: d for d in decisions if d.rule == "rematerialise"}
    kernels = computing(backward)
    rows: list[Activation] = []
    owner: dict[str, str] = {}
    alone = 0
    for c in remat.choices.values():
        d = facts.get(c.name)
        if (facts and d is None) or not c.nbytes:
            continue
        fact: Mapping[str, Any] = d.facts if d is not None else {}
        if fact.get("phase") == "either" and c.action == RECOMPUTE:
            alone += 1
            continue
        held = fact.get("held", c.nbytes)
        first = owner.setdefault(fact.get("storage", c.name), c.name)
        rows.append(
            Activation(
                c.name,
                c.action,
                held,
                fact.get("module", ""),
                d.where if d is not None else "",
                c.reason,
                c.save_seconds,
                c.recompute_seconds,
                1e-6 * fact.get("transfer_us", 0.0),
                tuple(kernels.get(c.name, ())) if c.action == RECOMPUTE else (),
                first if first != c.name and not held else "",
            )
        )
    rows.sort(key=lambda a: -a.nbytes)
    plans = {"forward": forward, "backward": backward}
    return SavedTable(name, remat, tuple(rows), {s: peak(p)[0] for s, p in plans.items() if p is not None}, alone)


def computing(plan: Plan | None) -> dict[str, list[str]]:
    """The kernels, and the operators of ATen, that compute each FX node of a plan."""
    found: dict[str, list[str]] = {}
    for step in plan.launches if plan is not None else ():
        for op in step.kernel.origins:
            found.setdefault(op, []).append(step.name)
    for call in plan.externs if plan is not None else ():
        found.setdefault(call.origin, []).append(str(call.target))
    return found


def planned_text(planned: Mapping[str, int]) -> str:
    """The peaks of the plans that run; the greater one is the step's."""
    sides = f" ({', '.join(f'{s} {bytes_text(n)}' for s, n in planned.items())})" if len(planned) > 1 else ""
    of = "" if len(planned) > 1 else f" of the {next(iter(planned))}"
    return f"planned peak{of} {bytes_text(max(planned.values()))}{sides}"
