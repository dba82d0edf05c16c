"""Regions: which boxes a joined buffer consists of, and where the elements of a piece lie in it.

A concatenation, a padding, a stack and a scattered slice are lowered to one kernel that chooses by position: `where`
of tests of its coordinates. Read back, that is a list of boxes, each with the value that is stored there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from minifuse.ir.index import ONE, ZERO, Atom, Axis, Expr
from minifuse.ir.kernel import Kernel, Param, Store
from minifuse.ir.plan import Buffer, Launch
from minifuse.ir.shape import contiguous_strides, linearize, product
from minifuse.ir.value import IndexOf, Load, Op, Value, topological

from .schedule import digits, divisions

Box = tuple[tuple[Expr, Expr], ...]
"""The first coordinate and one past the last, a dimension."""


@dataclass(frozen=True)
class Piece:
    """What is stored in a box, at `where`, coordinates within the box."""

    box: Box
    where: tuple[Expr, ...]
    value: Value

    @property
    def shape(self) -> tuple[Expr, ...]:
        return tuple(end - begin for begin, end in self.box)

    def begin(self, stride: Sequence[Expr]) -> Expr:
        """The place of the first element in a buffer of these strides that holds the box."""
        return linearize([begin for begin, _ in self.box], stride)

    def offset(self, stride: Sequence[Expr]) -> Expr:
        """The place of `where` in a buffer of these strides that holds the box."""
        return linearize([begin + at for (begin, _), at in zip(self.box, self.where, strict=True)], stride)


def pieces(kernel: Kernel) -> list[Piece]:
    """The boxes that a kernel's only store fills, none twice; empty where it does not choose by position alone."""
    (store, *others) = kernel.body
    if others or not isinstance(store, Store) or store.mask is not None or store.mode or _choice(store.value) is None:
        return []
    axes = [i.atom if isinstance(i, Expr) else None for i in store.index]
    if any(not isinstance(a, Axis) and i is not ZERO for a, i in zip(axes, store.index, strict=True)):
        return []
    left: list[Box] = [tuple((ZERO, a.size if isinstance(a, Axis) else ONE) for a in axes)]
    found: list[tuple[Box, Value]] = []
    value = store.value
    while left:
        chosen = _choice(value)
        if chosen is None:
            found += [(box, value) for box in left]
            break
        mask, here, value = chosen
        tests = _tests(mask, store)
        fitting = None if tests is None else next((k for k, b in enumerate(left) if _within(tests, b)), None)
        if tests is None or fitting is None:
            return []
        outer = left[fitting]
        box = tuple(
            (b if low is None else low, e if high is None else high)
            for (b, e), (low, high) in zip(outer, tests, strict=True)
        )
        left[fitting : fitting + 1] = _around(outer, box)
        found.append((box, _under(here, mask)))
    made = [_local(box, value, axes) for box, value in found if not any(b is e for b, e in box)]
    return made if len(made) > 1 else []


def _choice(v: Value) -> tuple[Value, Value, Value] | None:
    """The test, what is taken where it holds, and what elsewhere."""
    if isinstance(v, Op) and v.name == "where":
        mask, here, there = v.args
        return mask, here, there
    if isinstance(v, Load) and v.mask is not None and v.other is not None:
        return v.mask, v, v.other
    return None


def _conjuncts(mask: Value) -> list[Value]:
    if isinstance(mask, Op) and mask.name == "and":
        return [m for a in mask.args for m in _conjuncts(a)]
    return [mask]


def _tests(mask: Value, store: Store) -> list[tuple[Expr | None, Expr | None]] | None:
    """The bounds of each coordinate that a mask tests, None where it tests anything else."""
    bounds: list[tuple[Expr | None, Expr | None]] = [(None, None)] * len(store.index)
    for test in _conjuncts(mask):
        if not isinstance(test, Op) or not all(isinstance(a, IndexOf) for a in test.args):
            return None
        place, limit = (a.expr for a in test.args if isinstance(a, IndexOf))
        if limit.axes() or not place.axes() or place not in store.index:
            return None
        d = store.index.index(place)
        low, high = {"ge": (limit, None), "lt": (None, limit), "eq": (limit, limit + 1)}.get(test.name, (None, None))
        if low is None and high is None or low and bounds[d][0] or high and bounds[d][1]:
            return None
        bounds[d] = (low or bounds[d][0], high or bounds[d][1])
    return bounds


def _within(tests: list[tuple[Expr | None, Expr | None]], box: Box) -> bool:
    """Whether bounds lie inside of a box, provably."""
    return all(
        (low is None or low is b or (low - b).is_nonneg()) and (high is None or high is e or (e - high).is_nonneg())
        for (low, high), (b, e) in zip(tests, box, strict=True)
    )


def _around(outer: Box, box: Box) -> list[Box]:
    """What of a box another one inside of it leaves, as boxes."""
    out: list[Box] = []
    for d, ((b, e), (low, high)) in enumerate(zip(outer, box, strict=True)):
        for begin, end in ((b, low), (high, e)):
            if begin is not end:
                out.append((*box[:d], (begin, end), *outer[d + 1 :]))
    return out


def _under(value: Value, mask: Value) -> Value:
    """A value where a mask holds."""
    known = {mask, *_conjuncts(mask)}
    out: dict[Value, Value] = {}
    for v in topological([value]):
        new = v.rebuild(tuple(out[a] for a in v.args), lambda e: e)
        if isinstance(new, Load) and new.mask is not None and set(_conjuncts(new.mask)) <= known:
            new = Load.of(new.param, new.index, new.dtype)
        elif isinstance(new, Op) and new.name == "where" and set(_conjuncts(new.args[0])) <= known:
            new = new.args[1]
        out[v] = new
    return out[value]


def _local(box: Box, value: Value, axes: Sequence[object]) -> Piece:
    """A piece in coordinates of its own."""
    where = tuple(ZERO if e - b is ONE else Axis(f"i{d}", e - b).expr for d, (b, e) in enumerate(box))
    env: dict[Atom, Expr] = {a: b + at for a, (b, _), at in zip(axes, box, where, strict=True) if isinstance(a, Axis)}
    out: dict[Value, Value] = {}
    for v in topological([value]):
        out[v] = v.rebuild(tuple(out[a] for a in v.args), lambda e: e.substitute(env))
    return Piece(box, where, out[value])


def copy_kernel(region: Buffer, piece: Piece, buffers: dict[str, Buffer], origin: str) -> Launch:
    """A launch that stores a piece in its region."""
    store = Store(region.name, piece.where, piece.value)
    loads = dict.fromkeys(v.param for v in topological([piece.value]) if isinstance(v, Load))
    params: list[Param] = [buffers[n].as_param() for n in (*loads, region.name)]
    axes = tuple(sorted(store.space, key=lambda a: a.name))
    return Launch(Kernel(axes, tuple(params), (store,), (origin,)), tuple(p.name for p in params), None, region.name)


# -- where the elements of a buffer lie ---------------------------------------------------------------
def strides_of(index: Sequence[Expr], shape: Sequence[Expr], offset: Expr) -> tuple[tuple[Expr, ...], Expr] | None:
    """Strides and an offset by which a buffer of `shape` has its element `index` at place `offset` of some memory.

    Both are expressions of the same axes, over which `index` must run through all of the shape once. None where no
    strides do that.
    """
    index, offset = _digits((*index, offset))
    axes = offset.axes().union(*(e.axes() for e in index))
    strides: list[Expr | None] = []
    used: set[Axis] = set()
    for e, size in zip(index, shape, strict=True):
        factors = {e.coefficient(a): a for a in e.axes()}
        if None in factors or len(factors) < len(e.axes()) or e.substitute(dict.fromkeys(e.axes(), ZERO)) is not ZERO:
            return None
        unit, reach = None, ONE
        for _ in range(len(factors)):
            a = factors.pop(reach, None)
            step = None if a is None else offset.coefficient(a)
            if a is None or step is None or step.axes() or a in used:
                return None
            unit = step if unit is None else unit
            if step is not unit * reach:
                return None
            used.add(a)
            reach = reach * a.size
        if reach is not size:
            return None
        strides.append(unit)
    if used != axes:
        return None
    dense = contiguous_strides(shape)
    for d in reversed(range(len(strides))):  # a dimension of one element steps over those behind it
        if strides[d] is None:
            behind = strides[d + 1] if d + 1 < len(strides) else None
            strides[d] = dense[d] if behind is None else behind * shape[d + 1]
    return tuple(s for s in strides if s is not None), offset.substitute(dict.fromkeys(axes, ZERO))


def _digits(exprs: Iterable[Expr]) -> tuple[tuple[Expr, ...], Expr]:
    """Expressions with each axis that one of them divides cut in two axes, the high and the low digit."""
    found = tuple(exprs)
    for _ in range(16):
        cut = next((c for e in found for c in divisions(e)), None)
        if cut is None:
            break
        axis, width = cut
        high, low = digits(axis, width)
        env: dict[Atom, Expr] = {axis: high.expr * width + low.expr}
        found = tuple(e.substitute(env) for e in found)
    return found[:-1], found[-1]


def covers(piece: Piece, buffer: Buffer) -> bool:
    """Whether a piece has as many elements as a buffer."""
    return product(piece.shape) is buffer.numel
