"""Views as index maps: what a node of the FX graph stands for while it is lowered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minifuse.ir.index import ONE, ZERO, Axis, Expr, IntLike, as_expr
from minifuse.ir.plan import Buffer, TensorRef
from minifuse.ir.shape import contiguous_strides, delinearize, linearize, product
from minifuse.ir.value import Index, Load, Value


@dataclass(frozen=True)
class View:
    """A tensor value: a buffer read through an index map.

    `at` holds a placeholder axis a dimension of the view, `index` an expression over them a
    dimension of the buffer. No view copies; those that torch could express as strides become a
    `TensorRef`, the others are read by kernels alone.
    """

    buffer: Buffer
    at: tuple[Axis, ...]
    index: tuple[Expr, ...]

    @staticmethod
    def whole(buffer: Buffer) -> View:
        at = placeholders(buffer.shape)
        return View(buffer, at, tuple(a.expr for a in at))

    @property
    def shape(self) -> tuple[Expr, ...]:
        return tuple(a.size for a in self.at)

    def reindex(self, shape: Sequence[IntLike], coordinates: Sequence[Expr], at: tuple[Axis, ...]) -> View:
        """The view of `shape` whose element `at` is this view's element `coordinates`."""
        env = dict(zip(self.at, coordinates, strict=True))
        return View(self.buffer, at, tuple(i.substitute(env) for i in self.index))  # type: ignore[arg-type]

    def read(self, where: Sequence[Expr], mask: Value | None = None, other: Value | None = None) -> Load:
        """The value at logical coordinates of this view."""
        env = dict(zip(self.at, where, strict=True))
        index: list[Index] = [i.substitute(env) for i in self.index]  # type: ignore[arg-type]
        return Load.of(self.buffer.name, index, self.buffer.dtype, mask, other)

    def broadcast_read(self, where: Sequence[Expr]) -> Load:
        """The value at coordinates of a shape that this one broadcasts to (right-aligned)."""
        skip = len(where) - len(self.at)
        return self.read([ZERO if a.size is ONE else w for a, w in zip(self.at, where[skip:], strict=True)])

    def strided(self) -> TensorRef | None:
        """This view as strides and an offset, or None where it is not affine."""
        if self.index == tuple(a.expr for a in self.at) and self.shape == self.buffer.shape:
            return TensorRef(self.buffer.name, self.shape, self.buffer.stride, ZERO)
        offset = linearize(self.index, self.buffer.stride)
        strides: list[Expr] = []
        for a in self.at:
            if a.size is ONE:
                offset = offset.substitute({a: ZERO})
                strides.append(ONE)
                continue
            c = offset.coefficient(a)
            if c is None or any(other in c.atoms() for other in self.at):
                return None
            if not c.is_nonneg() and any(factor < 0 for _, factor in c.terms):
                return None  # torch has no negative strides
            strides.append(c)
            offset = offset.substitute({a: ZERO})
        # a dimension of one element may have any stride: give it the one of a dense layout
        dense = contiguous_strides(self.shape)
        for d, a in enumerate(self.at):
            if a.size is ONE:
                strides[d] = strides[d + 1] * self.at[d + 1].size if d + 1 < len(strides) else dense[d]
        return TensorRef(self.buffer.name, self.shape, tuple(strides), offset)

    # -- the view operators ----------------------------------------------------------------------
    def reshape(self, shape: Sequence[IntLike]) -> View:
        sizes = tuple(as_expr(s) for s in shape)
        at = placeholders(sizes)
        return self.reindex(sizes, _reshape_coordinates(self.shape, at), at)

    def permute(self, order: Sequence[int]) -> View:
        order = [d % len(self.at) for d in order] if self.at else []
        at = placeholders([self.at[d].size for d in order])
        back: list[Expr] = [ZERO] * len(order)
        for new, old in enumerate(order):
            back[old] = at[new].expr
        return self.reindex((), back, at)

    def expand(self, shape: Sequence[IntLike]) -> View:
        skip = len(shape) - len(self.at)
        sizes = [self.at[d - skip].size if _is_minus_one(s) else as_expr(s) for d, s in enumerate(shape)]
        at = placeholders(sizes)
        back = [ZERO if a.size is ONE else at[d + skip].expr for d, a in enumerate(self.at)]
        return self.reindex(sizes, back, at)

    def slice(self, dim: int, start: IntLike, size: IntLike, step: IntLike = 1) -> View:
        at = placeholders([as_expr(size) if d == dim else a.size for d, a in enumerate(self.at)])
        back = [a.expr * step + as_expr(start) if d == dim else a.expr for d, a in enumerate(at)]
        return self.reindex((), back, at)

    def select(self, dim: int, index: IntLike) -> View:
        at = placeholders([a.size for d, a in enumerate(self.at) if d != dim])
        back = [a.expr for a in at]
        back.insert(dim, as_expr(index))
        return self.reindex((), back, at)

    def flip(self, dims: Sequence[int]) -> View:
        at = placeholders(self.shape)
        back = [a.size - 1 - a.expr if d in dims else a.expr for d, a in enumerate(at)]
        return self.reindex((), back, at)

    def squeeze(self, dims: Sequence[int]) -> View:
        gone = {d for d in dims if self.at[d].size is ONE}
        at = placeholders([a.size for d, a in enumerate(self.at) if d not in gone])
        rest = iter(at)
        return self.reindex((), [ZERO if d in gone else next(rest).expr for d in range(len(self.at))], at)

    def unsqueeze(self, dim: int) -> View:
        sizes = [a.size for a in self.at]
        sizes.insert(dim, ONE)
        at = placeholders(sizes)
        return self.reindex((), [a.expr for d, a in enumerate(at) if d != dim], at)


def placeholders(shape: Sequence[IntLike]) -> tuple[Axis, ...]:
    return tuple(Axis(f"d{d}", s) for d, s in enumerate(shape))


def _is_minus_one(s: IntLike) -> bool:
    return isinstance(s, int) and s == -1


def _reshape_coordinates(old: Sequence[Expr], at: Sequence[Axis]) -> list[Expr]:
    """Coordinates in the old shape of a point of the new one, splitting no more than needed.

    Both shapes are cut into the smallest runs of dimensions with equal products, so that a run
    that is only split or only kept needs no division.
    """
    out: list[Expr] = []
    i = j = 0
    while i < len(old) or j < len(at):
        run_old, run_new = [], []
        a = b = ONE
        if i < len(old):
            run_old.append(old[i])
            a, i = old[i], i + 1
        if j < len(at):
            run_new.append(at[j])
            b, j = at[j].size, j + 1
        while a is not b:
            # grow the run that is provably smaller; where neither is, take all that is left
            if i < len(old) and ((b - a).is_nonneg() or j >= len(at)):
                run_old.append(old[i])
                a, i = a * old[i], i + 1
            elif j < len(at):
                run_new.append(at[j])
                b, j = b * at[j].size, j + 1
            else:
                break
        if len(run_old) == 1 and len(run_new) == 1:
            out.append(run_new[0].expr)
            continue
        sizes = [x.size for x in run_new]
        if product(run_old) is ZERO:
            # nothing is read; an empty axis in the index keeps the load inside its empty loop
            empty = next((x.expr for x in run_new if x.size is ZERO), ZERO)
            out.extend([empty] * len(run_old))
            continue
        out.extend(delinearize(linearize([x.expr for x in run_new], contiguous_strides(sizes)), run_old))
    return out
