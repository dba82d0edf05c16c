"""What policies make of a problem at every budget: the predicted peak of a step against its predicted seconds."""

from __future__ import annotations

import dataclasses
import importlib
import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minifuse.errors import OptionError, RematError
from minifuse.ir.decision import bytes_text
from minifuse.ir.lazy import Deferred
from minifuse.passes.remat.budget import eager_peak, limit_of
from minifuse.passes.remat.partition import ask
from minifuse.passes.remat.plan import RematPlan, RematPolicy, gap
from minifuse.passes.remat.policies import POLICIES, resolve
from minifuse.passes.remat.problem import Problem
from minifuse.passes.remat.verify import verify_plan

from .html import page
from .tables import seconds_text, table

if TYPE_CHECKING:
    from rich.console import RenderableType

rich_console, rich_text = Deferred("rich.console"), Deferred("rich.text")

SCHEMA = 1
BUDGETS = (1.0, 0.8, 0.6, 0.4, 0.3, 0.2, 0.1, 0.05, 0.0)
PLOTS = (".png", ".svg", ".html")
HEADINGS = ("policy", "budget", "peak", "of eager", "step", "saved", "host", "extra flops", "planned in", "gap",
            "within", "status")  # fmt: skip
FIGURES = HEADINGS[1:10]


@dataclass(frozen=True)
class Point:
    """One plan: `peak_bytes` and `step_seconds` of a forward and its backward as predicted, bytes that are saved and
    offloaded, flops that are done twice, and the seconds that the policy took.

    `budget` is None of a policy that does not look at it and is asked once; `within` are the budgets that were asked
    for and that the plan keeps. `gap` is how far the plan's seconds, value by value (`cost_seconds`), are above the
    policy's own lower bound, as a share of that; None without one, and where the bound is of other seconds.
    """

    policy: str
    budget: float | None
    peak_bytes: int
    step_seconds: float
    saved_bytes: int
    offloaded_bytes: int
    extra_flops: float
    plan_seconds: float
    gap: float | None
    status: str
    within: tuple[float, ...]


@dataclass(frozen=True)
class Failure:
    """A policy that gave no sound plan, and what is wrong."""

    policy: str
    budget: float
    error: str


@dataclass(frozen=True)
class Curve:
    """The plans of one graph, policy by policy; `eager_bytes` is eager's peak, as predicted."""

    graph: str
    device: str
    values: int
    eager_bytes: int
    points: tuple[Point, ...]
    failures: tuple[Failure, ...] = ()

    @property
    def title(self) -> str:
        eager = f"eager's step holds {bytes_text(self.eager_bytes)} at its peak"
        return f"{self.graph}: {self.values} values, {eager}, as predicted; rates of {self.device}"

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The cells below `HEADINGS`."""
        return [
            (
                p.policy,
                "any" if p.budget is None else budget_text(p.budget),
                bytes_text(p.peak_bytes),
                f"{p.peak_bytes / max(self.eager_bytes, 1):.2f}",
                seconds_text(p.step_seconds),
                bytes_text(p.saved_bytes),
                bytes_text(p.offloaded_bytes) if p.offloaded_bytes else "",
                flops_text(p.extra_flops),
                seconds_text(p.plan_seconds),
                "" if p.gap is None else f"{p.gap:.1%}",
                within_text(p),
                p.status,
            )
            for p in self.points
        ]

    @property
    def failed(self) -> list[str]:
        """A sentence for each failure."""
        return [f"{f.policy} at {budget_text(f.budget)}: {f.error}" for f in self.failures]

    def __rich__(self) -> RenderableType:
        made = table(*HEADINGS, figures=FIGURES, wraps="status", title=self.title)
        for row in self.rows:
            made.add_row(*map(rich_text.Text, row))
        return rich_console.Group(made, *map(rich_text.Text, self.failed))


def curve_of(
    graph: str,
    problem: Problem,
    policies: Sequence[RematPolicy],
    budgets: Sequence[float] = BUDGETS,
    done: Callable[[int], None] = lambda count: None,
) -> Curve:
    """Every policy at every budget, each plan verified; `done` hears of each that is behind.

    A policy that gives one plan at all budgets, of several, has one point.
    """
    asked = {b: replace(problem, memory_budget=b, on_budget="best") for b in budgets}
    limits = {b: limit_of(each) for b, each in asked.items()}
    points: list[Point] = []
    failures: list[Failure] = []
    for policy in policies:
        found: dict[float, tuple[RematPlan, float]] = {}
        for budget, each in asked.items():
            began = time.perf_counter()
            try:
                plan = ask(policy, each)
                found[budget] = plan, time.perf_counter() - began
                verify_plan(each, plan)
            except RematError as error:
                found.pop(budget, None)
                failures.append(Failure(policy.name, budget, str(error)))
            done(1)
        if len(found) == len(budgets) > 1 and len({(p.saved, p.offloaded) for p, _ in found.values()}) == 1:
            plan, took = found[budgets[0]]
            kept = tuple(b for b in budgets if plan.peak_bytes <= limits[b])
            points.append(point(policy.name, problem, plan, None, took, kept))
            continue
        for budget, (plan, took) in found.items():
            kept = (budget,) if plan.peak_bytes <= limits[budget] else ()
            points.append(point(policy.name, problem, plan, budget, took, kept))
    eager = eager_peak(problem)
    return Curve(graph, problem.device.name, len(problem.values), eager, tuple(points), tuple(failures))


def point(
    policy: str, problem: Problem, plan: RematPlan, budget: float | None, took: float, within: tuple[float, ...]
) -> Point:
    return Point(policy, budget, plan.peak_bytes, plan.step_seconds, plan.saved_bytes, plan.offloaded_bytes,
                 plan.extra_flops, took, gap(problem, plan), plan.status, within)  # fmt: skip


# -- what the command line says ------------------------------------------------------------------
def policies_of(names: str | None, seconds: float | None = None) -> list[RematPolicy]:
    """The policies of a list with commas, else all that ship: a name, a plan's path (.json), or `MODULE:NAME` of a
    policy, a class of policies without arguments, or a function of the problem. Those with a field `seconds` take that.

    Raises RematError for a name that is unknown, OptionError for what cannot be imported.
    """
    found = [*POLICIES.values()] if names is None else [policy_of(n.strip()) for n in names.split(",")]
    return [p if seconds is None else limited(p, seconds) for p in found]


def policy_of(name: str) -> RematPolicy:
    if ":" not in name:
        return resolve(name)
    found = attribute(name)
    return resolve(found() if isinstance(found, type) else found)


def limited(policy: Any, seconds: float) -> RematPolicy:
    """The policy with so many seconds to search, where it is a dataclass that takes a limit."""
    takes = dataclasses.is_dataclass(policy) and any(f.name == "seconds" and f.init for f in fields(policy))
    return replace(policy, seconds=seconds) if takes else policy


def attribute(path: str) -> Any:
    """What `MODULE:NAME` is. Raises OptionError where it cannot be imported."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise OptionError(f"{path}: expected MODULE:NAME of what can be imported; {error}") from error


def budgets_of(text: str) -> list[float]:
    """Budgets from a list with commas: shares from 0 to 1, or whole bytes above 1. Raises OptionError for another."""
    found: list[float] = []
    for word in text.split(","):
        try:
            value = float(word)
        except ValueError:
            value = -1.0
        if not (0 <= value <= 1 or value > 1 and value.is_integer()):
            raise OptionError(f"--budgets: got {word.strip()!r}, expected shares from 0 to 1, or whole bytes above 1")
        found.append(value if value <= 1 else int(value))
    return list(dict.fromkeys(found))


def budget_text(budget: float) -> str:
    return f"{budget:g}" if budget <= 1 else bytes_text(budget)


def flops_text(n: float) -> str:
    unit, size = next((u for u in (("G", 1e9), ("M", 1e6), ("k", 1e3)) if n >= u[1]), ("", 1.0))
    return f"{n / size:.3g} {unit}".rstrip()


def within_text(p: Point) -> str:
    """`yes` or `no`; of a plan for all budgets the least share, and the least bytes, that it keeps to."""
    if p.budget is not None or not p.within:
        return "yes" if p.within else "no"
    least = [min(part) for part in ([b for b in p.within if b <= 1], [b for b in p.within if b > 1]) if part]
    return "from " + ", ".join(map(budget_text, least))


# -- files -----------------------------------------------------------------------------------------
def to_json(curves: Sequence[Curve]) -> Mapping[str, Any]:
    """Everything as plain data, bytes and seconds; `schema` changes when a key changes its meaning."""
    return {"schema": SCHEMA, "graphs": [asdict(c) for c in curves]}


def plotter(path: Path) -> Callable[[Sequence[Curve]], bytes]:
    """What draws a file of this name: peak (MB) against step (ms), a line a policy, the graphs side by side.

    Raises OptionError for a name that ends otherwise than in PLOTS, and where matplotlib is missing.
    """
    if path.suffix not in PLOTS:
        raise OptionError(f"--plot: got {str(path)!r}, expected a name that ends in {', '.join(PLOTS)}")
    try:
        import matplotlib  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise OptionError("--plot needs matplotlib: pip install minifuse[plot]") from error

    def draw(curves: Sequence[Curve]) -> bytes:
        with matplotlib.rc_context({"svg.hashsalt": "minifuse", "svg.fonttype": "none"}):
            figure = Figure(figsize=(6.4 * len(curves), 4.8), layout="constrained")
            for axes, curve in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
                for name, points in lines_of(curve):
                    axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
                axes.axvline(curve.eager_bytes / 1e6, color="grey", linestyle=":", label="eager's peak")
                axes.set(title=curve.graph, xlabel="predicted peak (MB)", ylabel="predicted step (ms)")
                axes.legend(fontsize="small")
            out = io.BytesIO()
            kind = "png" if path.suffix == ".png" else "svg"
            plain = dict.fromkeys(("Date", "Creator", "Format", "Type")) if kind == "svg" else None
            figure.savefig(out, format=kind, metadata=plain, dpi=150)
        if path.suffix != ".html":
            return out.getvalue()
        svg = out.getvalue().decode()
        return page("curves.html.j2", curves=curves, headings=HEADINGS, svg=svg[svg.index("<svg") :]).encode()

    return draw


def lines_of(curve: Curve) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Each policy's points as its budgets were asked for: MB, ms."""
    for name in dict.fromkeys(p.policy for p in curve.points):
        mine = [(p.peak_bytes / 1e6, 1e3 * p.step_seconds) for p in curve.points if p.policy == name]
        yield name, [*dict.fromkeys(mine)]
