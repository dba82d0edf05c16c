"""`mode="reduce-overhead"`: what a program does on a GPU, recorded once and started as a whole.

The recordings are PyTorch's trees of CUDA graphs, which also own their memory: a program runs twice as it is, then is
recorded, then replayed; one recording for each value of its sizes. Parameters and what a forward saved stay where they
are, other inputs are copied to where the recording reads them. What cannot be recorded runs as it is, and a decision
says why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from minifuse import compat
from minifuse.ir.plan import Extern, Launch, Plan
from minifuse.passes.context import CompileContext

from .program import Program
from .triton_launch import TritonProgram

_TRANSFERS = ("minifuse.offload", "minifuse.reload")


def why_not(plan: Plan, program: Program, gm: fx.GraphModule, ctx: CompileContext) -> str:
    """Why a program is not recorded; empty where it is."""
    if not isinstance(program, TritonProgram) or not program.on_gpu:
        return "it runs on the CPU"
    for b in plan.buffers.values():
        if b.device.type == "cpu":
            return f"{b.name} is on the CPU"
        if b.device.index is not None and b.device.index != program.device.index:
            return f"{b.name} is on another device"
    for step in plan.steps:
        if isinstance(step, Launch) and step.batched:
            return f"{step.name} runs over many tensors, whose addresses are looked up"
        if isinstance(step, Extern) and str(step.target).startswith(_TRANSFERS):
            return f"{step.target} copies between the host and the device beside the program"
    if interpreted := next((d for d in ctx.decisions if d.rule == "interpreted"), None):
        return f"{interpreted.subject[0]} is interpreted"
    if unsafe := compat.unrecordable(gm):
        return f"{unsafe} cannot be recorded"
    return ""


class Recorded:
    """A program that is replayed: called like it, it first raises what a check of an earlier call has found."""

    def __init__(self, program: TritonProgram, replay: Callable[[list[Any]], Any]) -> None:
        self._boxed_call = True
        self.program = program
        self.replay = replay

    def __call__(self, args: list[Any]) -> Any:
        if self.program.flags is not None:
            self.program.raise_late()
        return self.replay(args)


def recorded(program: Program, gm: fx.GraphModule, ctx: CompileContext, forward: bool = True) -> Callable[..., Any]:
    """The program behind recordings of it, or as it is; the decision `cuda-graph` says which. A backward whose
    `forward` is not recorded is not either."""
    plan = program.plan
    why = why_not(plan, program, gm, ctx) if forward else "its forward is not recorded"
    reason = "run as it is: {why}" if why else "recorded, one graph for each value of its sizes"
    ctx.record("cuda-graph", ctx.name, taken=not why, reason=reason, why=why)
    if why or not isinstance(program, TritonProgram):
        beside = forward and ctx.stage == "backward" and torch.cuda.is_available()
        return Beside(program) if beside else program
    more = {"device_index": program.device.index or 0, "static_input_idxs": static_inputs(gm, ctx.stage),
            "mutated_input_idxs": tuple(k for k, name in enumerate(plan.inputs) if name in plan.mutated)}  # fmt: skip
    return Recorded(program, compat.cuda_graphs(program, gm, ctx.stage, **more))


def static_inputs(gm: fx.GraphModule, stage: str) -> tuple[int, ...]:
    """The inputs of a graph whose memory stays where it is: parameters and buffers, and what a forward has saved."""
    if stage == "backward":
        inputs = gm.graph.find_nodes(op="placeholder")
        return tuple(k for k, n in enumerate(inputs) if not compat.is_tangent(n))
    return tuple(getattr(compat.forward_metadata(), "static_input_indices", None) or ())


class Beside:
    """A backward that runs as it is behind a recorded forward: the trees are told that one runs."""

    def __init__(self, program: Program) -> None:
        self._boxed_call = True
        self.program = program

    def __call__(self, args: list[Any]) -> Any:
        compat.say_backward_runs(torch.cuda.current_device())
        return self.program(args)
