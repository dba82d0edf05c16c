"""Blocks of a Triton kernel, and how their rows are reduced.

A reduction over a lane is an expression; one that also runs in loops folds what each block gives, in the tree that
`schedule_triton` writes down. The text calls helpers of `triton_prelude`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from minifuse.ir import dtypes, ops
from minifuse.ir.index import ZERO, Axis
from minifuse.ir.kernel import Schedule
from minifuse.ir.value import Reduce, Scan, Value, topological
from minifuse.passes.schedule_triton import blocks, power_of_2

from .looptree import Fold
from .printer import CodegenError, Printer
from .triton_text import LIMIT, combine, fixed, literal, register, typed

NEAR = 4
"""Neighbours of a long row that are joined before equal places of its blocks are: what a thread has of them at once."""
LAST_INDEX = (1 << 63) - 1


class BlockRows:
    """The blocks of a kernel's schedule, and the text of its reductions."""

    def __init__(self, schedule: Schedule) -> None:
        self.blocks = blocks(schedule)
        self.dims = list(self.blocks)
        self.accumulators: dict[Fold, tuple[str, ...]] = {}
        self.parts: dict[Fold, int] = {}
        self.placed: set[Fold] = set()

    def lane_axes(self, axes: frozenset[Axis] | set[Axis]) -> list[Axis]:
        return [a for a in self.dims if a in axes]

    def shape(self, axes: frozenset[Axis] | set[Axis], near: Axis | None = None) -> str:
        """The block that a value over these axes is: 1 along the dimensions that it does not vary over, and a `NEAR`th
        of that whose neighbours are joined."""
        if not any(a in axes for a in self.dims):
            return "[]"
        sizes = (self.blocks[a] // (NEAR if a is near else 1) if a in axes else 1 for a in self.dims)
        return "[" + ", ".join(map(str, sizes)) + "]"

    def ragged(self, axis: Axis) -> bool:
        """Whether a block may reach past the end of an axis; one without elements has a block of one."""
        return (axis.size % self.blocks[axis]) is not ZERO or axis.size is ZERO

    # -- reductions ------------------------------------------------------------------------------
    def fold_read(self, p: Printer, r: Reduce) -> tuple[str, ...] | None:
        """A reduction over a lane alone is an expression."""
        if p.tree.folds[r]:
            return None
        scope = p.scope_of(p.tree.loops_of(r.axes))
        names = tuple(p.fresh() for _ in r.parts)
        other = self.beside(p, r)
        if other is None:
            scope.lines += self.across(p, r, names)
            return names
        first, second, at = self.masked(p, r)[0], self.masked(p, other)[0], ", ".join(map(str, self.sides(r)))
        scope.names[other] = (p.fresh(),)
        scope.lines += self.shaped((*names, *scope.names[other]), f"mf_sums({first}, {second}, {at})", r.axes)
        return names

    def beside(self, p: Printer, r: Reduce) -> Reduce | None:
        """Another sum over the same row that can be taken with this one: none needs the other."""
        if r.kind != "sum":
            return None
        below = {v for v in topological(r.args) if isinstance(v, Reduce)}
        for s in p.kernel.reductions:
            same = s.kind == "sum" and s.over is r.over and s.axes == r.axes and register(s.dtype) is register(r.dtype)
            if same and s is not r and s not in below and not p.tree.folds[s] and p.find(s) is None:
                needed = {v for v in topological(s.args) if isinstance(v, Reduce)}
                if all(p.find(v) is not None for v in needed):
                    return s
        return None

    def masked(self, p: Printer, r: Reduce) -> list[str]:
        """The arguments over every lane, with the identity where there is no element."""
        mask = f"m_{r.over.name}" if self.ragged(r.over) else ""
        args = []
        for a, identity in zip(r.parts, self.identities(r), strict=True):
            x = p.name(a)
            args.append(self.spread(r, a, f"tl.where({mask}, {x}, {identity})" if mask else x))
        return args

    def across(self, p: Printer, r: Reduce, names: tuple[str, ...]) -> list[str]:
        """The lines that reduce the arguments over their lane."""
        size = r.over.size
        counted = r.kind == "welford" and fixed(r.parts[0]) == 1.0 and size.is_const
        whole = counted and 0 < size.value <= self.blocks[r.over]
        return self.reduced(r, self.masked(p, r), names, size.value if whole else 0)

    def reduced(self, r: Reduce, args: Sequence[str], names: tuple[str, ...], count: int = 0) -> list[str]:
        """The lines that reduce what is there over a lane: so many elements, where that is said."""
        helper = f"mf_rowelements({', '.join(args)}, {count}" if count else f"{row_helper(r)}({', '.join(args)}"
        before, n, after = self.sides(r)
        return self.shaped(names, f"{helper}, {before}, {n}, {after})", r.axes)

    def shaped(self, names: tuple[str, ...], found: str, axes: frozenset[Axis], near: Axis | None = None) -> list[str]:
        """The lines that name what a helper gives, as blocks over these axes."""
        shape = self.shape(axes, near)
        if shape == "[]":
            return [f"{', '.join(names)} = {found}"]
        if len(names) == 1:
            return [f"{names[0]} = tl.reshape({found}, {shape})"]
        flat = [f"{n}_" for n in names]
        return [f"{', '.join(flat)} = {found}", *(f"{n} = tl.reshape({n}_, {shape})" for n in names)]

    def spread(self, r: Reduce | Scan, arg: Value, text: str) -> str:
        """An argument over every lane of what is reduced or scanned."""
        whole = r.axes | {r.over}
        return text if set(self.lane_axes(whole)) <= set(arg.axes) else f"tl.broadcast_to({text}, {self.shape(whole)})"

    def sides(self, r: Reduce | Scan) -> tuple[int, int, int]:
        """The elements of the block in front of the reduced or scanned axis, along it, and behind it."""
        at, whole = self.dims.index(r.over), r.axes | {r.over}
        before = math.prod(self.blocks[a] for a in self.dims[:at] if a in whole)
        after = math.prod(self.blocks[a] for a in self.dims[at + 1 :] if a in whole)
        return before, self.blocks[r.over], after

    def identities(self, r: Reduce | Scan) -> tuple[str, ...]:
        """What an empty reduction holds, and for an argument reduction an index that never wins."""
        identity = ops.REDUCTIONS[r.kind].identity(r.dtype)
        first = literal(float(identity), r.dtype) if r.dtype is torch.float32 else typed(identity, r.dtype)
        parts = r.parts[1:] if isinstance(r, Reduce) else ()
        return (first, *(typed(LAST_INDEX if a.dtype is torch.int64 else 0.0, a.dtype) for a in parts))

    def fold_begin(self, p: Printer, fold: Fold) -> None:
        r, loop = fold.value, p.loops[fold.loop]
        name = p.fresh("a")
        names = tuple(f"{name}_{k}" for k in range(r.results)) if r.results > 1 else (name,)
        shape = self.shape(r.axes)
        ordered = r.kind in ("sum", "prod") or ops.REDUCTIONS[r.kind].element
        row = r.over in self.blocks and r.over.size.is_const
        if row and fold.level == 0 and r.kind != "welford":
            # neighbours are joined, results at equal places of the blocks folded, and what is there at the end reduced
            self.placed.add(fold)
            shape = self.shape(r.axes | {r.over}, near=r.over)
        elif row and ordered:
            # the results of the blocks are a row in turn: each has its place in a block of its own
            around = [
                p.loops[k].step
                for k in p.tree.loops_of(r.axes | {r.over})
                if k < fold.loop and p.loops[k].axis is r.over
            ]
            whole = around[-1] if around else r.over.size.value
            self.parts[fold] = power_of_2(-(-whole // loop.step))
            if shape != "[]" or self.parts[fold] > LIMIT // 65_536:
                raise CodegenError(f"a row of {r.over.size} elements beside other lanes")
            shape = f"[{self.parts[fold]}]"
        for n, a, identity in zip(names, r.parts, self.identities(r), strict=True):
            p.line(f"{n} = tl.full({shape}, {identity}, {dtypes.row(register(a.dtype)).triton})")
        self.accumulators[fold] = names

    def fold_step(self, p: Printer, fold: Fold) -> None:
        r, into = fold.value, self.accumulators[fold]
        if fold.level > 0:
            args = self.accumulators[p.tree.folds[r][fold.level - 1]]
        elif fold in self.placed:
            masked, args = ", ".join(self.masked(p, r)), tuple(p.fresh() for _ in r.parts)
            front, n, behind = self.sides(r)
            joined = f"{row_helper(r)}({masked}, {front * n // NEAR}, {NEAR}, {behind})"
            p.here.lines += self.shaped(args, joined, r.axes | {r.over}, near=r.over)
        elif r.over in self.blocks:
            for a in r.parts:
                p.name(a)
            args = tuple(p.fresh() for _ in r.parts)
            p.here.lines += self.across(p, r, args)
        else:
            args = tuple(p.name(a) for a in r.parts)
        if fold in self.parts:
            step, count = p.loops[fold.loop].step, self.parts[fold]
            here = f"tl.arange(0, {count}) == {r.over.name}_{fold.loop} // {step} % {count}"
            for name, part in zip(into, args, strict=True):
                p.line(f"{name} = tl.where({here}, {part}, {name})")
            return
        p.line(f"{', '.join(into)} = {combine(r, into, args)}")

    def fold_end(self, p: Printer, fold: Fold) -> tuple[str, ...]:
        if fold in self.placed:
            found, (front, n, behind) = tuple(p.fresh() for _ in fold.value.parts), self.sides(fold.value)
            joined = f"{row_helper(fold.value)}({', '.join(self.accumulators[fold])}, {front}, {n // NEAR}, {behind})"
            p.here.lines += self.shaped(found, joined, fold.value.axes)
            self.accumulators[fold] = found
        if fold in self.parts:
            r, blocks = fold.value, ", ".join(self.accumulators[fold])
            self.accumulators[fold] = tuple(p.fresh() for _ in r.parts)
            names = ", ".join(self.accumulators[fold])
            p.line(f"{names} = {row_helper(r)}({blocks}, 1, {self.parts[fold]}, 1)")
        return self.accumulators[fold]


def row_helper(r: Reduce) -> str:
    """What reduces a row of a block."""
    return f"mf_row{r.kind}" if r.results > 1 else f"mf_{r.kind}"
