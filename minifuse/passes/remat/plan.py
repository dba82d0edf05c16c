"""What a policy decided: for each value that the backward needs, load it or compute it again, and what that costs."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from minifuse.errors import RematError
from minifuse.ir.decision import bytes_text

from .problem import Problem, Value

SAVE = "save"
RECOMPUTE = "recompute"


@dataclass(frozen=True)
class Choice:
    """What becomes of one value: `action` is `SAVE` or `RECOMPUTE`; bytes and seconds are what each would have cost."""

    name: str
    action: str
    reason: str
    nbytes: int
    save_seconds: float
    recompute_seconds: float


@dataclass(frozen=True)
class RematPlan:
    """A policy's answer.

    `choices` has every value that the backward gets from the forward's side, inputs included (action save, no bytes).
    `saved_bytes` counts each storage once and no input; `extra_flops`, `extra_traffic` (bytes) and `extra_seconds` are
    those of what is recomputed; `peak_bytes` is the largest sum of live intermediates, inputs not counted, of a
    forward followed by its backward; `lower_bound` is a proven bound on the seconds of the policy's own objective,
    None where it has none.
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
    solve_seconds: float = field(default=0.0, compare=False)

    @cached_property
    def saved(self) -> tuple[str, ...]:
        return tuple(n for n, c in self.choices.items() if c.action == SAVE)

    @cached_property
    def recomputed(self) -> tuple[str, ...]:
        return tuple(n for n, c in self.choices.items() if c.action == RECOMPUTE)

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> RematPlan:
        """The inverse of `to_json`."""
        data: dict[str, Any] = json.loads(text)
        data["choices"] = {n: Choice(**c) for n, c in data["choices"].items()}
        return cls(**data)

    def __str__(self) -> str:
        head = (
            f"{self.policy}: saves {bytes_text(self.saved_bytes)}, recomputes {len(self.recomputed)} values in "
            f"{1e6 * self.extra_seconds:.3g} us, peak {bytes_text(self.peak_bytes)}  {self.status}".rstrip()
        )
        rows = (f"  {c.action:10}{c.name}  {bytes_text(c.nbytes)}  {c.reason}" for c in self.choices.values())
        return "\n".join((head, *rows))


@runtime_checkable
class RematPolicy(Protocol):
    """A way to decide. `plan` is a pure function of the problem; whatever it returns is verified before it is used."""

    @property
    def name(self) -> str: ...

    def plan(self, problem: Problem) -> RematPlan: ...


def closure(problem: Problem, saved: Collection[str]) -> dict[str, str]:
    """What the backward does with each value when it may load `saved` and inputs: SAVE or RECOMPUTE, in graph order.

    A member of `saved` that nothing needs does not appear; a value outside it appears as recomputed, whether or not
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
        else:
            actions[name] = RECOMPUTE
            stack.extend(v.inputs)
    return dict(sorted(actions.items(), key=lambda item: problem.position[item[0]]))


def assemble(
    problem: Problem,
    saved: Collection[str],
    policy: str,
    *,
    status: str = "",
    lower_bound: float | None = None,
    solve_seconds: float = 0.0,
) -> RematPlan:
    """The plan that loads `saved` (as far as it is needed) and recomputes what else the backward reads.

    Raises RematError for a name in `saved` that no value of the problem has.
    """
    saved = dict.fromkeys(saved)
    for name in saved:
        if name not in problem.by_name:
            close = difflib.get_close_matches(str(name), problem.by_name, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise RematError(f"{policy}: cannot save {name!r}{hint}; expected the names of values of the problem")
    actions = closure(problem, saved)
    choices = {}
    for name, action in actions.items():
        v = problem[name]
        costs = problem.save_seconds(v), problem.recompute_seconds(v)
        choices[name] = Choice(name, action, _reason(problem, v, actions), 0 if v.is_given else v.nbytes, *costs)
    again = [problem[n] for n, a in actions.items() if a == RECOMPUTE and problem[n].phase == "forward"]
    return RematPlan(
        policy,
        choices,
        saved_bytes=problem.saved_bytes(n for n, a in actions.items() if a == SAVE),
        extra_flops=sum(v.flops * (1 if v.kind == "extern" else v.copies) for v in again),
        extra_traffic=sum(v.traffic for v in again),
        extra_seconds=sum(problem.recompute_seconds(v) for v in again),
        peak_bytes=peak_bytes(problem, actions),
        status=status,
        lower_bound=lower_bound,
        solve_seconds=solve_seconds,
    )


def _reason(problem: Problem, v: Value, actions: Mapping[str, str]) -> str:
    """Why a value is saved or recomputed. A comparison is said only of numbers that bear it out."""
    producer = v
    while producer.kind == "item":
        producer = problem[producer.inputs[0]]
    save, again = problem.save_seconds(v), problem.recompute_seconds(v)
    if v.is_given:
        return f"{v.phase}: it is there anyway"
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


def peak_bytes(problem: Problem, actions: Mapping[str, str]) -> int:
    """The largest sum of live storages over a forward and its backward.

    A value inside a fused kernel that nothing outside reads never reaches memory and counts nothing; inputs,
    parameters and tangents belong to the caller. Storages die at their last reader; saved ones at the last reader in
    the backward; outputs live on.
    """
    early = {n for n, a in actions.items() if a == SAVE and problem[n].phase == "either"}
    forward = [v for v in problem.values if v.phase == "forward" or v.name in early]
    backward = [problem[n] for n in backward_order(problem, actions)]
    steps = [(v, False) for v in forward] + [(v, True) for v in backward]
    kept = {problem[n].storage for n in problem.forward_outputs}
    loaded = {problem[n].storage for n, a in actions.items() if a == SAVE}
    last: dict[tuple[str, bool], int] = {}
    crosses: set[tuple[str, bool]] = set()

    def instance(root: str, in_backward: bool) -> tuple[str, bool]:
        return root, in_backward and root not in loaded

    for at, (v, in_backward) in enumerate(steps):
        for name in (v.name, *v.inputs):
            key = instance(problem[name].storage, in_backward)
            last[key] = at
            source = problem[key[0]]
            if v.group is None or source.group != v.group or source.kind == "extern" or in_backward != key[1]:
                crosses.add(key)
    for root in kept:
        last[root, False] = len(steps)
        crosses.add((root, False))
    for root in loaded:
        crosses.add((root, False))
    for name in problem.backward_outputs:
        key = instance(problem[name].storage, True)
        last[key] = len(steps)
        crosses.add(key)
    dies: dict[int, list[tuple[str, bool]]] = {}
    for key, at in last.items():
        dies.setdefault(at, []).append(key)
    live: set[tuple[str, bool]] = set()
    held = peak = 0
    for at, (v, in_backward) in enumerate(steps):
        key = instance(v.storage, in_backward)
        owner = problem[key[0]]
        if owner.phase not in ("input", "parameter", "tangent") and key in crosses and key not in live:
            live.add(key)
            held += owner.nbytes
            peak = max(peak, held)
        for key in dies.get(at, ()):
            if key in live:
                live.remove(key)
                held -= problem[key[0]].nbytes
    return peak
