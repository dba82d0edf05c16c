"""The pipeline: what happens to a graph between capture and code, in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from minifuse.ir.plan import Plan
from minifuse.ir.verify import verify_plan

from .batch import batch
from .context import CompileContext, without_collection
from .join import fuse_joined
from .lower import lower
from .memory import place
from .onehot import pick_one_hot
from .schedule import schedule
from .schedule_triton import schedule as schedule_triton
from .schedule_triton import target
from .streams import stream
from .tiles import tile
from .widen import widen


@dataclass(frozen=True)
class Pass:
    """A pass over plans: it returns a new plan and records what it decided."""

    name: str
    run: Callable[[Plan, CompileContext], Plan]


def schedule_for_target(plan: Plan, ctx: CompileContext) -> Plan:
    """Loops for what the plan's kernels will be written in."""
    return schedule_triton(plan, ctx) if target(plan, ctx.options) == "triton" else schedule(plan, ctx)


def place_and_stream(plan: Plan, ctx: CompileContext) -> Plan:
    """Where each buffer lives, and what is written past the caches."""
    return stream(place(plan, ctx), ctx)


PASSES = (
    Pass("fuse", fuse_joined),
    Pass("widen", widen),
    Pass("one-hot", pick_one_hot),
    Pass("schedule", schedule_for_target),
    Pass("batch", batch),
    Pass("tiles", tile),
    Pass("memory", place_and_stream),
)


def make_plan(
    graph: fx.Graph, ctx: CompileContext, output_strides: Mapping[int, tuple[Any, ...]] | None = None
) -> Plan:
    """Lower a functional ATen graph and run the passes; with `verify`, each result is checked.

    Every stage is kept in `ctx.stages` under its pass' name, the unfused plan as "lower".
    """
    with without_collection():
        with ctx.phase("lower"):
            plan = lower(graph, ctx, dict(output_strides or {}))
        ctx.stages["lower"] = plan
        if ctx.options.verify:
            verify_plan(plan)
        for p in PASSES:
            with ctx.phase(p.name):
                plan = p.run(plan, ctx)
            ctx.stages[p.name] = plan
            if ctx.options.verify:
                with ctx.phase("verify"):
                    verify_plan(plan)
    return plan
