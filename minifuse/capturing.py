"""The graphs that a function goes through, without running it: for research, for tests, and to read.

    graphs = minifuse.capture(model, x)
    print(graphs.text("joint"))                 # forward and backward in one graph
    graphs.problem.to_networkx()                # what a rematerialisation policy is asked

AOT autograd and the passes are those of `torch.compile(…, backend="minifuse")`. `capture` does without Dynamo: the
function is traced as it runs, on tensors without data, and a branch of Python code is taken as it falls for these
arguments. `captures` is for what cannot be traced so: Dynamo captures the function, graph by graph, as it runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from . import compat
from .backend import Boxed, Graph, boxed, eager_strides, module_name, run_aot
from .explain.saved import SavedReport, saved_table
from .ir.decision import Decision
from .ir.plan import Plan
from .ir.text import print_plan
from .options import Options
from .passes.pipeline import make_plan
from .passes.remat.plan import RematPlan, RematPolicy
from .passes.remat.policies import resolve
from .passes.remat.problem import Problem

STAGES = ("captured", "joint", "forward", "backward", "inference")


@dataclass
class Capture:
    """What a function becomes, stage by stage.

    `graphs` holds FX graphs of ATen operators: "captured", and either "joint", "forward" and "backward" or, where
    nothing needs a gradient, "inference". `plans` holds the scheduled and placed plan of each of the last four.
    `inputs` names the inputs of "captured" in order: parameters and buffers by their path, then "input 0"… the
    tensors among the arguments. `problem` and `remat` are what the policy was asked and what it said.
    """

    name: str
    inputs: tuple[str, ...]
    graphs: dict[str, fx.GraphModule] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)
    decisions: dict[str, list[Decision]] = field(default_factory=dict)
    problem: Problem | None = None
    remat: RematPlan | None = None

    def text(self, stage: str) -> str:
        """The graph of a stage as Python, or, for "plan STAGE", the plan that came of it.

        Raises KeyError naming the stages that there are.
        """
        kind, _, rest = stage.partition(" ")
        if kind == "plan" and rest in self.plans:
            return print_plan(self.plans[rest])
        if stage not in self.graphs:
            raise KeyError(f"no stage {stage!r} in {self.name}; stages: {', '.join(self.stages)}")
        return self.graphs[stage].print_readable(print_output=False)

    @property
    def stages(self) -> tuple[str, ...]:
        """What `text` takes, in the order that they are made."""
        graphs = (s for s in STAGES if s in self.graphs)
        return (*graphs, *(f"plan {s}" for s in STAGES if s in self.plans))

    def __str__(self) -> str:
        rows = [f"{self.name}: {len(self.inputs)} inputs"]
        for name in (s for s in STAGES if s in self.graphs):
            calls = sum(n.op == "call_function" for n in self.graphs[name].graph.nodes)
            plan = self.plans.get(name)
            planned = "" if plan is None else f" -> {len(plan.launches)} kernels, {len(plan.externs)} calls of ATen"
            rows.append(f"  {name:10}{calls:5} operators{planned}")
        return "\n".join(rows)

    __repr__ = __str__


def capture(
    fn: Callable[..., Any], *args: Any, compile_options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Capture:
    """Trace `fn(*args, **kwargs)` and return its graphs at each stage; no tensor of the caller is read or written.

    `fn` is a function or a module, whose parameters and buffers become inputs. Arguments may nest tensors in lists,
    tuples and dicts; what is not a tensor is a constant of the graph. A backward is there where gradients are enabled
    and a parameter or an argument requires one. `compile_options` are those of `torch.compile`.

    Raises:
        OptionError: an unknown option.
        RematError: a policy whose plan is wrong.
    """
    options = Options.parse(compile_options)
    state = dict(_state(fn)) if isinstance(fn, nn.Module) else {}
    leaves, spec = compat.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    name = type(fn).__name__ if isinstance(fn, nn.Module) else getattr(fn, "__name__", "function")

    def flat(*tensors: torch.Tensor) -> list[Any]:
        mine = dict(zip(state, tensors, strict=False))
        filled = list(leaves)
        for i, tensor in zip(places, tensors[len(state) :], strict=True):
            filled[i] = tensor
        inner_args, inner_kwargs = compat.tree_unflatten(filled, spec)
        out = (
            torch.func.functional_call(fn, mine, inner_args, inner_kwargs, tie_weights=False)
            if isinstance(fn, nn.Module)
            else fn(*inner_args, **inner_kwargs)
        )
        return [x for x in compat.tree_flatten(out)[0] if isinstance(x, torch.Tensor)]

    tensors = [*state.values(), *(leaves[i] for i in places)]
    found = Capture(name, (*state, *(f"input {k}" for k in range(len(places)))))
    with compat.faked(tensors) as fakes:
        gm = compat.trace(flat, fakes, fn)
        found.graphs["captured"] = copied(gm)
        strides: list[tuple[Any, ...] | None] = [tuple(n.meta["val"].stride()) for n in gm.graph.output_node().args[0]]  # type: ignore[union-attr]
        asked = _Asked(resolve(options.remat))
        run_aot(_Recorder(name, replace(options, remat=asked), strides, found), gm, fakes)
        found.problem = asked.problem
    return found


def captures(
    fn: Callable[..., Any], *args: Any, compile_options: Mapping[str, Any] | None = None, **kwargs: Any
) -> list[Capture]:
    """What `torch.compile(fn, backend="minifuse")` makes of `fn(*args, **kwargs)`: one a graph that Dynamo captures.

    The function runs once, its operators by ATen; buffers of a module and torch's generator are as they were after it.
    Inputs of a capture are named as Dynamo names them. Raises what `capture` does.
    """
    options = Options.parse(compile_options)
    found: list[Capture] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        name = f"graph{len(found)}_{module_name(gm)}"
        one = Capture(name, tuple(n.name for n in gm.graph.nodes if n.op == "placeholder"))
        one.graphs["captured"] = copied(gm)
        found.append(one)
        asked = _Asked(resolve(options.remat))
        program = run_aot(_Recorder(name, replace(options, remat=asked), eager_strides(gm), one), gm, inputs)
        one.problem = asked.problem
        return program

    fn = compat.original(fn)
    buffers = [(b, b.clone()) for b in fn.buffers()] if isinstance(fn, nn.Module) else []
    try:
        with torch.random.fork_rng(), compat.errors_of_backends():
            torch.compile(fn, backend=backend)(*args, **kwargs)
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    return found


def saved_report(
    model: Callable[..., Any], *args: Any, compile_options: Mapping[str, Any] | None = None, **kwargs: Any
) -> SavedReport:
    """What becomes of each activation of `model(*args, **kwargs)` in training: saved, computed again or offloaded, its
    bytes, module and line, and why; and the predicted peak of a step. Runs and raises as `captures` does."""
    graphs = captures(model, *args, compile_options=compile_options, **kwargs)
    return SavedReport(
        tuple(
            saved_table(g.name, g.remat, g.decisions["backward"], g.plans["forward"], g.plans["backward"])
            for g in graphs
            if g.remat is not None
        )
    )


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by path, a shared one once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph of one's own, its inputs and outputs flat."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return fx.GraphModule(gm, graph)


class _Asked:
    """A policy that remembers the problem it was asked."""

    def __init__(self, policy: RematPolicy) -> None:
        self.policy = policy
        self.name = policy.name
        self.problem: Problem | None = None

    def plan(self, problem: Problem) -> RematPlan:
        self.problem = problem
        return self.policy.plan(problem)


class _Recorder(Graph):
    """The callbacks of a compile, up to the plan: nothing is built and nothing enters the reports."""

    def __init__(self, name: str, options: Options, strides: list[tuple[Any, ...] | None], found: Capture) -> None:
        super().__init__(name, options, strides)
        self.found = found

    def keep(self, stage: str, gm: fx.GraphModule) -> None:
        self.found.graphs[stage] = copied(gm)

    def partition(
        self, joint: fx.GraphModule, inputs: Sequence[Any], **kw: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        forward, backward = super().partition(joint, inputs, **kw)
        # AOT autograd would ask for the backward when it first runs, and here it never does
        self.compile(copied(backward), "backward", {})
        return forward, backward

    def compile(self, gm: fx.GraphModule, stage: str, strides: dict[int, tuple[Any, ...]]) -> Boxed:
        ctx = self.context(stage, gm)
        self.keep(stage, gm)
        gm.graph.eliminate_dead_code()
        self.found.plans[stage] = make_plan(gm.graph, ctx, strides)
        self.found.decisions[stage] = ctx.decisions
        self.found.remat = ctx.stages.get("remat", self.found.remat)
        return boxed(gm)
