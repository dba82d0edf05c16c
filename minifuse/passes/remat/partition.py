"""AOT autograd's partition function: price the joint graph, ask a policy, verify its plan, cut the graph in two."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import fx

from minifuse import compat
from minifuse.errors import RematError
from minifuse.ir import device as devices
from minifuse.ir.decision import Decision
from minifuse.passes.fuse import Landed

from .build import build_problem, is_effect
from .plan import RematPlan, RematPolicy
from .policies import resolve
from .problem import OFFLOAD, RECOMPUTE, SAVE, Problem
from .simulate import backward_order, backward_side, unit_key
from .transfers import arrivals, departures, fetch, send
from .verify import verify_plan


def partition(
    joint: fx.GraphModule,
    joint_inputs: Sequence[Any],
    *,
    num_fwd_outputs: int,
    policy: Any = "default",
    budget: float = 1.0,
    on_budget: str = "error",
    kernels: Mapping[str, Landed] | None = None,
    is_kernel: Callable[[fx.Node], bool],
    record: Callable[[Decision], None] = lambda decision: None,
    device: devices.DeviceModel = devices.CPU,
    static_lifetime_input_indices: Sequence[int] | None = None,
    **_: Any,
) -> tuple[fx.GraphModule, fx.GraphModule, RematPlan]:
    """Split a joint graph into a forward that also returns what is saved, and a backward that takes it.

    `joint_inputs` and further keywords are AOT autograd's and are not looked at. `joint` is not edited. `record` gets
    one Decision a value that the backward takes from the forward's side. Each recomputed value runs just before its
    first reader.

    Raises:
        RematError: an unknown policy, one that raises or returns no plan, a graph that has no plan, or a plan that
            fails `verify_plan`.
    """
    chosen = resolve(policy)
    problem = build_problem(
        joint,
        num_fwd_outputs,
        kernels,
        is_kernel,
        device=device,
        memory_budget=budget,
        on_budget=on_budget,
        static_inputs=frozenset(static_lifetime_input_indices or ()),
    )
    plan = ask(chosen, problem)
    verify_plan(problem, plan)
    for decision in decisions(problem, plan):
        record(decision)
    forward, backward = _apply(joint, problem, plan, num_fwd_outputs)
    return forward, backward, plan


def ask(policy: RematPolicy, problem: Problem) -> RematPlan:
    """A policy's plan. Raises RematError, naming the policy, when it raises or returns anything else."""
    expected = f"the rematerialisation policy {policy.name!r}: expected plan() to return a RematPlan"
    try:
        plan = policy.plan(problem)
    except RematError:
        raise
    except Exception as error:
        raise RematError(f"{expected}, found {type(error).__name__}: {error}") from error
    if not isinstance(plan, RematPlan):
        raise RematError(f"{expected}, found {plan!r}")
    return plan


def decisions(problem: Problem, plan: RematPlan) -> list[Decision]:
    """The plan as the compiler's record: taken is a value recomputed or fetched, refused one that is loaded.

    `held` are the bytes that a value adds to what was kept before it: none where it shares its storage with one.
    """
    held: set[str] = set()
    template = "{action}: {why}; saving it takes {nbytes} and {save_us} us, recomputing it {recompute_us} us"
    out = []
    for name, choice in plan.choices.items():
        v = problem[name]
        if v.is_given or (v.kind in ("view", "item", "symbol") and choice.action != SAVE):
            continue
        facts = {
            "action": choice.action,
            "why": choice.reason,
            "nbytes": choice.nbytes,
            "save_us": round(1e6 * choice.save_seconds, 3),
            "recompute_us": round(1e6 * choice.recompute_seconds, 3),
            "policy": plan.policy,
            "phase": v.phase,
            "module": v.module,
            "storage": v.storage,
            "held": 0 if v.storage in held or problem[v.storage].is_given else v.nbytes,
            "transfer_us": round(1e6 * problem.offload_seconds(v), 3) if choice.action == OFFLOAD else 0.0,
        }
        if choice.action != RECOMPUTE:
            held.add(v.storage)
        out.append(Decision("rematerialise", (name,), choice.action != SAVE, template, facts, v.where))
    return out


def _apply(
    joint: fx.GraphModule, problem: Problem, plan: RematPlan, num_fwd_outputs: int
) -> tuple[fx.GraphModule, fx.GraphModule]:
    saved = [n for n in joint.graph.nodes if n.op != "get_attr" and n.name in plan.choices and _is_saved(plan, n)]
    forward, backward = compat.extract_forward_backward(joint, saved, num_fwd_outputs=num_fwd_outputs)
    once = {v.name for v in problem.values if v.phase == "forward"}
    _drop_dead(forward, lambda n: n.name in once)
    _drop_dead(backward, lambda n: n.name not in once)
    actions = plan.actions
    order = backward_order(problem, actions)
    rank: dict[str, float] = {name: i for i, name in enumerate(order)}
    if plan.offloaded:
        rank |= _offload(forward, backward, problem, plan, order, rank)
    _reorder(backward, rank)
    spread(problem, backward, backward_side(problem, actions).inside)
    forward.recompile()
    backward.recompile()
    return forward, backward


def spread(problem: Problem, backward: fx.GraphModule, inside: Collection[str]) -> None:
    """Give each kernel of the backward that reads a value of `inside` a computation of its own, just before it.

    Fusion would else compute it in the first of them, and store it for the others.
    """
    kernel: dict[fx.Node, Any] = {}
    for n in reversed(backward.graph.nodes):
        v = problem.by_name.get(n.name)
        if v is None or n.op != "call_function" or v.storage not in inside:
            kernel[n] = unit_key(problem, v) if v is not None else n
            continue
        users: dict[Any, list[fx.Node]] = {}
        for user in n.users:
            users.setdefault(kernel[user], []).append(user)
        first, *others = users or {n: []}
        kernel[n] = first
        for key in others:
            with backward.graph.inserting_before(min(users[key])):
                copy = backward.graph.node_copy(n)
            kernel[copy] = key
            for user in users[key]:
                user.replace_input_with(n, copy)


def _offload(
    forward: fx.GraphModule, backward: fx.GraphModule, problem: Problem, plan: RematPlan, order: list[str],
    at: Mapping[str, float],
) -> dict[str, float]:  # fmt: skip
    """Put the ways to the host and back into the graphs; the places in the backward's `order`, where values are `at`,
    of those back."""
    away = [problem[n] for n in plan.offloaded]
    made = [problem[n.name] for n in forward.graph.nodes if n.name in problem.by_name]
    send(forward, {n: made[i].name for n, i in arrivals(problem, made, away).items()})
    begins = departures(problem, [problem[n] for n in order], away)
    rank: dict[str, float] = {}
    for name, (way, x) in fetch(backward, plan.offloaded).items():
        rank[way], rank[x] = begins[name] - 0.5, at[name] - 0.25
    return rank


def _is_saved(plan: RematPlan, n: fx.Node) -> bool:
    """Whether the backward takes it from the forward: from memory, or from the host's."""
    return plan.actions[n.name] != RECOMPUTE


def _drop_dead(module: fx.GraphModule, mine: Callable[[fx.Node], bool]) -> None:
    """Remove what nothing reads, and the effects that belong to the other graph."""

    def stays(n: fx.Node) -> bool:
        return n.op in ("placeholder", "output") or (is_effect(n) and mine(n))

    module.graph.eliminate_dead_code(is_impure_node=stays)


def _reorder(module: fx.GraphModule, rank: Mapping[str, float]) -> None:
    """Put a graph's nodes in the order that the plan was priced in; those it does not rank stay first."""
    body = [n for n in module.graph.nodes if n.op not in ("placeholder", "output")]
    output = module.graph.output_node()
    for n in sorted(body, key=lambda n: rank.get(n.name, -1)):
        output.prepend(n)
