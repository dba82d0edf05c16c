"""The `widen` option: half-precision intermediates of a fused kernel stay in float32.

Eager rounds a half-precision result at each operator, and so does a fused kernel by default. Here the
round trip of a value that a kernel both makes and reads is dropped, as other compilers do; what is
stored is rounded still. A result then depends on what was fused: the numerics rule is given up.
"""

from __future__ import annotations

from dataclasses import replace

from minifuse.ir import dtypes
from minifuse.ir.kernel import Kernel, rewrite
from minifuse.ir.plan import Launch, Plan, Step
from minifuse.ir.value import Cast, Value
from minifuse.passes.context import CompileContext

_REASON = "{dropped} roundings to half precision dropped; results depend on what is fused"


def widen(plan: Plan, ctx: CompileContext) -> Plan:
    """Drop the round trips to half precision inside each kernel, where the option asks; decisions say how many."""
    if not ctx.options.widen:
        return plan
    steps: list[Step] = []
    for step in plan.steps:
        if isinstance(step, Launch):
            kernel, dropped = widened(step.kernel)
            if dropped:
                ctx.record("widen", step.name, taken=True, reason=_REASON, dropped=dropped,
                           where=plan.origins.get(step.name, ""))  # fmt: skip
                step = replace(step, kernel=kernel)
        steps.append(step)
    return replace(plan, steps=tuple(steps))


def widened(kernel: Kernel) -> tuple[Kernel, int]:
    """The kernel without casts to a half type and straight back, and how many there were."""
    dropped: set[Value] = set()

    def drop(v: Value) -> Value | None:
        if not isinstance(v, Cast) or not isinstance(v.arg, Cast):
            return None
        rounded = v.arg
        if not dtypes.is_half(rounded.dtype) or rounded.arg.dtype is not v.dtype:
            return None
        dropped.add(v)
        return rounded.arg

    body = rewrite(kernel.body, replace_value=drop)
    return (replace(kernel, body=body), len(dropped)) if dropped else (kernel, 0)
