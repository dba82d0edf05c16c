"""What a policy decided: for each value that the backward needs, load it or compute it again, and what that costs."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from minifuse.errors import RematError
from minifuse.ir.decision import bytes_text

from .problem import OFFLOAD, RECOMPUTE, SAVE, Problem, Value
from .simulate import Timeline, simulate

# Of graphs of more values fewer plans are tried, but so many in any case.
_VALUES, _FEWEST = 1500, 2


@dataclass(frozen=True)
class Choice:
    """What becomes of one value: `action` is `SAVE`, `RECOMPUTE` or `OFFLOAD`; bytes and seconds are what the first two
    would have cost."""

    name: str
    action: str
    reason: str
    nbytes: int
    save_seconds: float
    recompute_seconds: float


class Choices(Mapping[str, Choice]):
    """The choice for each value of `actions`, in their order: `make` gives its numbers and its words when it is asked
    for. A search makes many plans and reads of most what they do and no more."""

    def __init__(self, actions: Mapping[str, str], make: Callable[[str], Choice]) -> None:
        self.actions, self._make = actions, make
        self._made: dict[str, Choice] = {}

    def __getitem__(self, name: str) -> Choice:
        if name not in self._made:
            if name not in self.actions:
                raise KeyError(name)
            self._made[name] = self._make(name)
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self.actions

    def __iter__(self) -> Iterator[str]:
        return iter(self.actions)

    def __len__(self) -> int:
        return len(self.actions)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ({**self},)


@dataclass(frozen=True)
class RematPlan:
    """A policy's answer.

    `choices` has every value that the backward gets from the forward's side, inputs included (action save, no bytes).
    `saved_bytes` counts each storage once and no input, `offloaded_bytes` what the host keeps; `extra_flops`,
    `extra_traffic` (bytes) and `extra_seconds` are those of what is recomputed; `timeline` is what a forward and its
    backward will hold, step by step, and take, `peak_bytes` the most of it; `lower_bound` is a proven bound on the
    seconds of the policy's own objective, None without one.
    """

    policy: str
    choices: Mapping[str, Choice]
    saved_bytes: int
    extra_flops: float
    extra_traffic: float
    extra_seconds: float
    peak_bytes: int
    status: str = ""
    lower_bound: float | None = None
    offloaded_bytes: int = 0
    solve_seconds: float = field(default=0.0, compare=False)
    timeline: Timeline = field(default_factory=Timeline, repr=False)

    @property
    def actions(self) -> Mapping[str, str]:
        """The action of each choice."""
        if isinstance(self.choices, Choices):
            return self.choices.actions
        return {n: c.action for n, c in self.choices.items()}

    @cached_property
    def saved(self) -> tuple[str, ...]:
        return tuple(n for n, action in self.actions.items() if action == SAVE)

    @cached_property
    def recomputed(self) -> tuple[str, ...]:
        return tuple(n for n, action in self.actions.items() if action == RECOMPUTE)

    @cached_property
    def offloaded(self) -> tuple[str, ...]:
        return tuple(n for n, action in self.actions.items() if action == OFFLOAD)

    @property
    def step_seconds(self) -> float:
        """Predicted seconds of a forward and its backward."""
        return self.timeline.step_seconds

    def to_json(self) -> str:
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        choices = [asdict(c) for c in self.choices.values()]
        return json.dumps({**data, "choices": choices, "timeline": self.timeline.to_json()}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> RematPlan:
        """The inverse of `to_json`. Raises RematError for a text that it did not write."""
        try:
            data: dict[str, Any] = json.loads(text)
            data["choices"] = {c["name"]: Choice(**c) for c in data["choices"]}
            return cls(**{**data, "timeline": Timeline.from_json(data["timeline"])})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RematError(
                f"expected a rematerialisation plan as JSON, found {type(error).__name__}: {error}"
            ) from error

    def diff(self, other: RematPlan) -> str:
        """What another plan does otherwise: figures that differ, and values whose action does, the largest first."""
        figures = ("saved_bytes", "offloaded_bytes", "peak_bytes", "extra_flops", "extra_traffic", "extra_seconds",
                   "step_seconds")  # fmt: skip
        lines = [f"{self.policy} -> {other.policy}"]
        for name in figures:
            before, after = getattr(self, name), getattr(other, name)
            if before != after:
                lines.append(f"  {name}: {before:.6g} -> {after:.6g} ({after - before:+.6g})")
        absent = Choice("", "not needed", "", 0, 0.0, 0.0)
        names = [n for n in {**self.choices, **other.choices}
                 if self.choices.get(n, absent).action != other.choices.get(n, absent).action]  # fmt: skip
        for n in sorted(names, key=lambda n: -max(p.choices.get(n, absent).nbytes for p in (self, other))):
            before, after = (p.choices.get(n, absent) for p in (self, other))
            nbytes = max(before.nbytes, after.nbytes)
            lines.append(
                f"  {n}: {before.action} -> {after.action}, {bytes_text(nbytes)}; {after.reason or before.reason}"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        offloads = f", offloads {bytes_text(self.offloaded_bytes)}" if self.offloaded else ""
        head = (
            f"{self.policy}: saves {bytes_text(self.saved_bytes)}, recomputes {len(self.recomputed)} values in "
            f"{1e6 * self.extra_seconds:.3g} us{offloads}, peak {bytes_text(self.peak_bytes)}  {self.status}".rstrip()
        )
        rows = (f"  {c.action:10}{c.name}  {bytes_text(c.nbytes)}  {c.reason}" for c in self.choices.values())
        return "\n".join((head, *rows))


@runtime_checkable
class RematPolicy(Protocol):
    """A way to decide. `plan` is a pure function of the problem; whatever it returns is verified before it is used."""

    @property
    def name(self) -> str: ...

    def plan(self, problem: Problem) -> RematPlan: ...


def closure(problem: Problem, saved: Collection[str], offloaded: Collection[str] = ()) -> dict[str, str]:
    """What the backward does with each value when it may load `saved` and inputs and fetch `offloaded`, in graph order.

    A member of either that nothing needs does not appear; a value outside it appears as recomputed, whether or not
    that is allowed.
    """
    actions: dict[str, str] = {}
    stack = list(problem.required)
    while stack:
        name = stack.pop()
        if name in actions:
            continue
        v = problem[name]
        if v.is_given or name in saved:
            actions[name] = SAVE
        elif name in offloaded:
            actions[name] = OFFLOAD
        else:
            actions[name] = RECOMPUTE
            stack.extend(v.inputs)
    return dict(sorted(actions.items(), key=lambda item: problem.position[item[0]]))


def effort(problem: Problem, most: int) -> int:
    """How many plans of a kind a policy tries that would try `most`: fewer of a long graph."""
    return max(min(most, _FEWEST), min(most, most * _VALUES // max(len(problem.values), 1)))


def cost_seconds(problem: Problem, plan: RematPlan) -> float:
    """Seconds that a plan's loads, transfers and recomputation take, value by value."""
    moved = sum(problem.offload_seconds(problem[n]) for n in plan.offloaded)
    return sum(problem.save_seconds(problem[n]) for n in plan.saved) + moved + plan.extra_seconds


def gap(problem: Problem, plan: RematPlan) -> float | None:
    """What a plan costs at most beyond the cheapest, as a share of the step; None where its policy proved no bound."""
    if plan.lower_bound is None or not plan.step_seconds:
        return None
    return max(cost_seconds(problem, plan) - plan.lower_bound, 0.0) / plan.step_seconds


def assemble(
    problem: Problem,
    saved: Collection[str],
    policy: str,
    *,
    status: str = "",
    lower_bound: float | None = None,
    solve_seconds: float = 0.0,
    offloaded: Collection[str] = (),
) -> RematPlan:
    """The plan that loads `saved` and fetches `offloaded` (as far as they are needed) and recomputes what else the
    backward reads. What is in both is saved.

    Raises RematError for a name that no value of the problem has.
    """
    saved, offloaded = dict.fromkeys(saved), dict.fromkeys(offloaded)
    for name in (*saved, *offloaded):
        if name not in problem.by_name:
            close = difflib.get_close_matches(str(name), problem.by_name, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise RematError(f"{policy}: cannot save {name!r}{hint}; expected the names of values of the problem")
    actions = closure(problem, saved, offloaded)
    again = [problem[n] for n, a in actions.items() if a == RECOMPUTE and problem[n].phase == "forward"]
    timeline = simulate(problem, actions)
    return RematPlan(
        policy,
        Choices(actions, functools.partial(_choice, problem, actions)),
        saved_bytes=problem.saved_bytes(n for n, a in actions.items() if a == SAVE),
        extra_flops=sum(v.flops * (1 if v.kind == "extern" else v.copies) for v in again),
        extra_traffic=sum(v.traffic for v in again),
        extra_seconds=sum(problem.recompute_seconds(v) for v in again),
        peak_bytes=timeline.peak,
        status=status,
        lower_bound=lower_bound,
        offloaded_bytes=sum(problem[n].nbytes for n, a in actions.items() if a == OFFLOAD),
        solve_seconds=solve_seconds,
        timeline=timeline,
    )


def _choice(problem: Problem, actions: Mapping[str, str], name: str) -> Choice:
    v = problem[name]
    costs = problem.save_seconds(v), problem.recompute_seconds(v)
    return Choice(name, actions[name], _reason(problem, v, actions), 0 if v.is_given else v.nbytes, *costs)


def _reason(problem: Problem, v: Value, actions: Mapping[str, str]) -> str:
    """Why a value is saved or recomputed. A comparison is said only of numbers that bear it out."""
    producer = v
    while producer.kind == "item":
        producer = problem[producer.inputs[0]]
    save, again = problem.save_seconds(v), problem.recompute_seconds(v)
    if v.is_given:
        return f"{v.phase}: it is there anyway"
    if actions[v.name] == OFFLOAD:
        beside = "beside the kernels" if problem.device.link else "simulated: the device is the host"
        return f"kept by the host, {1e6 * problem.offload_seconds(v):.3g} us there and back, {beside}"
    if actions[v.name] == SAVE:
        if producer.pinned:
            return f"{producer.pinned}: it runs once"
        if v.tag in ("must_save", "prefer_save"):
            return f"tagged {v.tag}"
        if producer.kind == "extern":
            return "an extern: recomputing it costs its flops"
        if save < again:
            return "loading it costs less"
        more = _missing(problem, v, actions)
        if not more:
            return "the policy keeps it"
        others = f" and {len(more) - 1} more" if len(more) > 1 else ""
        return f"recomputing it would need {more[0]}{others} too, saved or recomputed"
    if v.wants_recompute:
        return f"tagged {v.tag}"
    if v.phase == "either":
        return "only the backward reads it"
    if v.kind in ("view", "item", "symbol", "constant"):
        return "free"
    return "recomputing it costs less" if again < save else "the policy recomputes it"


def _missing(problem: Problem, v: Value, actions: Mapping[str, str]) -> list[str]:
    """What the backward would have to be given, besides what it has, to compute a value: the nearest first."""
    found: dict[str, None] = {}
    queue = list(v.inputs)
    for name in queue:
        if name not in actions and name not in found and not problem[name].is_given:
            found[name] = None
            queue.extend(problem[name].inputs)
    return list(found)
