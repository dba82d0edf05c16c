"""The check that no policy can bypass: a plan that passes gives the gradients that saving everything gives."""

from __future__ import annotations

from minifuse.errors import RematError
from minifuse.ir.decision import bytes_text

from .budget import limit_of, unavoidable
from .plan import Choice, RematPlan
from .problem import ACTIONS, OFFLOAD, SAVE, Problem, Value


def verify_plan(problem: Problem, plan: RematPlan) -> None:
    """Raise RematError, naming the value and the rule, unless the plan is sound.

    Rules: every value that the backward reads, and every input of a recomputed one, is saved or recomputed; what is
    named exists and needs no tangent; what draws random numbers, has an effect, communicates or defines a
    data-dependent size is not recomputed; nothing is recomputed from an input that the forward overwrites (the
    backward's own operators may read one: autograd's version check has passed); what cannot be saved is not; what the
    user said must be saved or recomputed is; the bytes that the plan reports are those of what it saves; its peak
    is within the budget, unless the user takes the best that was found.
    """
    for name, choice in plan.choices.items():
        if name != choice.name:
            raise _broken(plan, name, f"is listed under another value's name, {choice.name}")
        if name not in problem.by_name:
            raise _broken(plan, name, "does not exist in the joint graph")
        v = problem[name]
        if v.phase in ("backward", "tangent"):
            raise _broken(plan, name, "needs a tangent: it exists only in the backward")
        _check_action(problem, plan, v, choice)
    for name in problem.required:
        if name not in plan.choices:
            raise _broken(plan, name, "is read by the backward and neither saved nor recomputed")
    if problem.on_budget == "error" and plan.peak_bytes > (limit := limit_of(problem)):
        raise RematError(
            f"{plan.policy}: the least peak of a step that was found is {bytes_text(plan.peak_bytes)}, the budget is "
            f"{bytes_text(int(limit))}{unavoidable(problem, limit)}; raise memory_budget, or take this plan with "
            "on_budget='best'"
        )
    nbytes = problem.saved_bytes(plan.saved)
    if nbytes != plan.saved_bytes:
        raise RematError(f"{plan.policy}: the plan reports {plan.saved_bytes} saved bytes, its values hold {nbytes}")


def _check_action(problem: Problem, plan: RematPlan, v: Value, choice: Choice) -> None:
    if choice.action == SAVE:
        if not v.savable and not v.is_given:
            raise _broken(plan, v.name, "cannot be saved: it is no tensor or size")
        if v.must_recompute:
            raise _broken(plan, v.name, "is saved, and tagged must_recompute")
        return
    if choice.action not in ACTIONS:
        raise _broken(plan, v.name, f"has the action {choice.action!r}, expected one of {', '.join(ACTIONS)}")
    if choice.action == OFFLOAD:
        if v.is_given or v.kind in ("view", "symbol") or not v.savable:
            raise _broken(plan, v.name, "cannot be offloaded: it is no tensor that the forward makes")
        if v.must_recompute:
            raise _broken(plan, v.name, "is offloaded, and tagged must_recompute")
        return
    if v.is_given:
        raise _broken(plan, v.name, "is an input: it cannot be recomputed")
    if v.pinned:
        raise _broken(plan, v.name, f"is recomputed, and may run only once: {v.pinned}")
    if v.tag == "must_save":
        raise _broken(plan, v.name, "is recomputed, and tagged must_save")
    for i in v.inputs:
        if i in problem.by_name and problem[i].is_given and not problem[i].savable:
            raise _broken(plan, v.name, f"is recomputed from {i}, which the forward overwrites")
        if i not in plan.choices:
            raise _broken(plan, v.name, f"is recomputed from {i}, which is neither saved nor recomputed")


def _broken(plan: RematPlan, name: str, rule: str) -> RematError:
    return RematError(f"{plan.policy}: {name} {rule}")
