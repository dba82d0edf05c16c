"""Kernels that nobody reads: operators of which the graph uses the shape alone."""

from __future__ import annotations

from dataclasses import replace

from minifuse.ir.kernel import Check
from minifuse.ir.plan import Launch, Plan, Step, TensorRef


def without_unread(plan: Plan) -> Plan:
    """The plan less the launches that check nothing and whose results no step and no caller reads."""
    read = {o.buffer for o in plan.outputs if isinstance(o, TensorRef)} | plan.mutated
    steps: list[Step] = []
    for step in reversed(plan.steps):
        if isinstance(step, Launch) and read.isdisjoint(step.writes):
            if not any(isinstance(root, Check) for root in step.kernel.body):
                continue
        read.update(getattr(step, "reads", ()))
        steps.append(step)
    if len(steps) == len(plan.steps):
        return plan
    steps.reverse()
    used = read.union(*(getattr(step, "writes", ()) for step in steps))
    buffers = {n: b for n, b in plan.buffers.items() if n in used or b.storage in ("input", "constant")}
    return replace(plan, steps=tuple(steps), buffers=buffers)
