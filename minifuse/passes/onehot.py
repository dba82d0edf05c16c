"""Sums of one element: what is zero everywhere but at one place needs no sum.

The gradient of a cross entropy is zero but at each row's label, and its softmax' backward sums it along the row: as
many comparisons as the row has classes, for a value that is known. `sum over i of where(i == k & c, v, 0)`, where
nothing but `i` varies along the row, is `v + 0` where `c` holds and `k` is in the row, else 0: those are the bits of
the sum too, since adding zeros changes none but the sign of -0.

What is left compares the place with each index of the row. A place is an int64, as indices are for torch; where it is
in the row an int32 holds it, and -1 stands for one that is not: half the width at each element.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from minifuse.ir.index import Axis
from minifuse.ir.kernel import Kernel, rewrite
from minifuse.ir.plan import Launch, Plan, Step
from minifuse.ir.value import Cast, Const, IndexOf, Op, Reduce, Value
from minifuse.passes.context import CompileContext
from minifuse.passes.split import with_live_axes

LARGEST = (1 << 31) - 1
_REASON = "{sums} sums of what is zero but at one place of {over} are that one's value"


def pick_one_hot(plan: Plan, ctx: CompileContext) -> Plan:
    """Replace each sum of one element by it; decisions say how many."""
    steps: list[Step] = []
    for step in plan.steps:
        if isinstance(step, Launch):
            kernel, found = without_one_hot_sums(step.kernel)
            step = step if kernel is step.kernel else replace(step, kernel=kernel)
            if found:
                over = ", ".join(sorted({str(r.over) for r in found}))
                ctx.record("one-hot", step.name, taken=True, reason=_REASON, sums=len(found), over=over,
                           where=plan.origins.get(step.name, ""))  # fmt: skip
        steps.append(step)
    return replace(plan, steps=tuple(steps))


def without_one_hot_sums(kernel: Kernel) -> tuple[Kernel, set[Reduce]]:
    """The kernel without such sums, and which those were."""
    found: set[Reduce] = set()

    def pick(v: Value) -> Value | None:
        if isinstance(v, Op) and v.name == "eq":
            return narrowed(v)
        if not isinstance(v, Reduce) or v.kind != "sum":
            return None
        if (one := element(v)) is not None:
            found.add(v)
        return one

    body = rewrite(kernel.body, replace_value=pick)
    return (kernel if body == kernel.body else with_live_axes(replace(kernel, body=body))), found


def element(r: Reduce) -> Value | None:
    """The value of a sum of one element, or None where it is another sum."""
    arg = r.args[0]
    if not (isinstance(arg, Op) and arg.name == "where"):
        return None
    condition, value, other = arg.args
    if not (isinstance(other, Const) and other.value == 0) or r.over in value.axes:
        return None
    place: Value | None = None
    rest: list[Value] = []
    for part in conjuncts(condition):
        compared = place_of(part)
        if compared is not None and compared[0] is r.over and place is None:
            place = compared[1]
        elif r.over in part.axes:
            return None
        else:
            rest.append(part)
    if place is None:
        return None
    first, size = Const.of(0, place.dtype), IndexOf.of(r.over.size, place.dtype)
    holds = Op.of("and", Op.of("ge", place, first), Op.of("lt", place, size))
    for part in rest:
        holds = Op.of("and", holds, part)
    zero = Const.of(0.0 if r.dtype.is_floating_point else 0, r.dtype)
    return Op.of("where", holds, Op.of("add", value, zero), zero)


def narrowed(v: Op) -> Value | None:
    """A comparison of a row's index with a place, in int32 where the row's length fits one."""
    axis, place = place_of(v) or (None, None)
    if axis is None or place is None or place.dtype is not torch.int64 or isinstance(place, (Const, IndexOf)):
        return None
    if not axis.size.is_const or axis.size.value > LARGEST:
        return None
    inside = Op.of("and", Op.of("ge", place, Const.of(0, torch.int64)),
                   Op.of("lt", place, IndexOf.of(axis.size, torch.int64)))  # fmt: skip
    short = Cast.of(torch.int32, Op.of("where", inside, place, Const.of(-1, torch.int64)))
    return Op.of("eq", IndexOf.of(axis.expr, torch.int32), short)


def conjuncts(v: Value) -> Iterator[Value]:
    """The conditions that one holds as, each by itself."""
    if isinstance(v, Op) and v.name == "and" and v.dtype is torch.bool:
        for a in v.args:
            yield from conjuncts(a)
    else:
        yield v


def place_of(v: Value) -> tuple[Axis, Value] | None:
    """The axis whose index a condition compares, and what that is to be, which does not vary along it."""
    if isinstance(v, Op) and v.name == "eq":
        for index, other in (v.args, v.args[::-1]):
            axis = next((a for a in index.axes if isinstance(index, IndexOf) and index.expr == a.expr), None)
            if axis is not None and axis not in other.axes:
                return axis, other
    return None
