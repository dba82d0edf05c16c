"""Splitting a reduction along its own tree: a launch over the chunks, then what needs their results.

The first launch also runs what walks the reduced axis and needs no result of it, so that a norm's input gradient and
its weights' gradients, or a bias' gradient and the pointwise backward that it sums, are one pass over their data. No
bit changes: the chunks are those of the reduction's meaning on the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from minifuse.ir import ops
from minifuse.ir.index import ZERO, Axis, Expr, as_expr
from minifuse.ir.kernel import Check, Kernel, Param, Root, Store, rewrite
from minifuse.ir.plan import Buffer
from minifuse.ir.shape import cdiv, contiguous_strides
from minifuse.ir.value import Const, IndexOf, Load, Op, Pick, Reduce, Value, topological


@dataclass(frozen=True)
class Tree:
    """How a reduction is cut: chunks of `block` elements, whose results are reduced with `lanes` in turn."""

    block: int
    lanes: int


@dataclass(frozen=True)
class Halves:
    """What a split makes: the launch over `part`, and the roots that load its results and reduce them over `part`."""

    first: Kernel
    part: Axis
    rest: tuple[Root, ...]
    params: tuple[Param, ...]


def divide(kernel: Kernel, found: Sequence[Reduce]) -> tuple[list[Root], list[Root]]:
    """Roots that walk the axis of these reductions and need no result of them, and the others.

    A store over something that the others load is with them: they are to see what it overwrites.
    """
    needs: set[Value] = set(found)
    for v in kernel.values():
        if any(a in needs for a in v.args):
            needs.add(v)
    beside = [r for r in kernel.body if found[0].over in r.space and not any(v in needs for v in r.values)]
    while True:
        rest = [r for r in kernel.body if r not in beside]
        loaded = {v.param for v in topological(v for r in rest for v in r.values) if isinstance(v, Load)}
        late = [r for r in beside if isinstance(r, Store) and r.param in loaded]
        if not late:
            return beside, rest
        beside = [r for r in beside if r not in late]


def fresh_axis(name: str, size: Expr, kernel: Kernel) -> Axis:
    """An axis whose name no axis of the kernel has."""
    taken = {a.name for a in kernel.axes}
    while name in taken:
        name += "_"
    return Axis(name, size)


def halves(kernel: Kernel, found: Sequence[Reduce], tree: Tree, name: str, buffers: dict[str, Buffer]) -> Halves:
    """Split these reductions, all over one axis and of one tree; the partial results become buffers of the plan.

    What needs none of them and runs over the axis goes with the first launch, masked past the axis' end.
    """
    over = found[0].over
    part = fresh_axis("p", cdiv(over.size, tree.block), kernel)
    inner = fresh_axis("q", as_expr(tree.block), kernel)
    whole = part.expr * tree.block + inner.expr
    even = (over.size % tree.block) is ZERO
    inside = None if even else Op.of("lt", IndexOf.of(whole), IndexOf.of(over.size))
    beside, others = divide(kernel, found)
    params = {p.name: p for p in kernel.params}
    begun = list(guarded(beside, over, whole, inside))
    partial: dict[Reduce, tuple[Load, ...]] = {}
    for r in found:
        axes = [part, *(a for a in kernel.axes if a in r.axes)]
        at = tuple(a.expr for a in axes)
        args = tuple(at_part(a, over, whole, inside) for a in (r.args if inside is None else r.parts))
        if inside is not None:
            nothing = [ops.REDUCTIONS[r.kind].identity(r.dtype), *[0] * (r.results - 1)]
            args = tuple(Op.of("where", inside, a, Const.of(n, r.dtype)) for a, n in zip(args, nothing, strict=True))
        chunk = Reduce.of(r.kind, args, inner, r.lanes)
        loads = []
        for value in results_of(chunk):
            buffer = new_buffer(f"{name}_part{len(params) - len(kernel.params)}", r.dtype, axes, kernel, buffers)
            params[buffer.name] = buffer.as_param()
            begun.append(Store(buffer.name, at, value))
            loads.append(Load.of(buffer.name, at, r.dtype))
        partial[r] = tuple(loads)

    def joined(v: Value) -> Value | None:
        if isinstance(v, Reduce) and v in partial:
            return Reduce.of(v.kind, partial[v], part, tree.lanes)
        return None

    first = closed(Kernel((part, *kernel.axes, inner), tuple(params.values()), tuple(begun), kernel.origins))
    rest = rewrite(others, None, joined)
    return Halves(first, part, rest, tuple(params.values()))


def results_of(r: Reduce) -> list[Value]:
    """What a reduction gives: itself, or a `Pick` of each of its values."""
    return [r] if r.results == 1 else [Pick.of(r, i) for i in range(r.results)]


def splits(r: Reduce) -> bool:
    """Whether a reduction can be cut into chunks: one that takes elements, not their indices beside them."""
    return len(r.args) == 1


def guarded(roots: Sequence[Root], over: Axis, whole: Expr, inside: Value | None) -> tuple[Root, ...]:
    """Roots at an element of a chunk; past the axis' end nothing is loaded, stored or checked."""
    if inside is None:
        return rewrite(roots, {over: whole})
    out: list[Root] = []
    for r in roots:
        value = at_part(r.value, over, whole, inside)
        if isinstance(r, Check):
            out.append(Check(Op.of("or", value, Op.of("not", inside)), r.message))
        else:
            (moved,) = rewrite([replace(r, value=value, mask=inside)], {over: whole})
            out.append(moved)
    return tuple(out)


def at_part(value: Value, over: Axis, whole: Expr, inside: Value | None) -> Value:
    """A value at an element of a chunk; what it loads past the axis' end is zero."""
    out: dict[Value, Value] = {}
    for v in topological([value]):
        new = v.rebuild(tuple(out[a] for a in v.args), lambda e: e.substitute({over: whole}))
        if inside is not None and isinstance(new, Load) and over in v.axes:
            mask = inside if new.mask is None else Op.of("and", new.mask, inside)
            new = Load.of(new.param, new.index, new.dtype, mask, new.other or Const.of(0, new.dtype))
        out[v] = new
    return out[value]


def new_buffer(
    name: str, dtype: torch.dtype, axes: Sequence[Axis], kernel: Kernel, buffers: dict[str, Buffer]
) -> Buffer:
    """A new buffer of the plan with one dimension an axis."""
    while name in buffers:
        name += "_"
    shape = tuple(a.size for a in axes)
    device = buffers[kernel.params[0].name].device
    buffers[name] = Buffer(name, dtype, shape, contiguous_strides(shape), device)
    return buffers[name]


def closed(kernel: Kernel) -> Kernel:
    """Without the parameters and the axes that the body does not touch."""
    used = {*kernel.reads, *kernel.writes}
    return replace(with_live_axes(kernel), params=tuple(p for p in kernel.params if p.name in used))


def with_live_axes(kernel: Kernel) -> Kernel:
    """Without the axes that the body does not touch."""
    axes = {a for r in kernel.body for a in r.space} | {r.over for r in kernel.reductions}
    axes |= {a for v in kernel.values() for a in v.axes}
    return replace(kernel, axes=tuple(a for a in kernel.axes if a in axes))
