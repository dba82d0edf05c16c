"""Pooling: an output combines a window of inputs; the gradient of an input asks the outputs whose windows cover it.

A window is written out in ATen's order, so that a sum has its bits and the same one wins a tie. Nothing is scattered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from minifuse.ir import dtypes, ops
from minifuse.ir.index import ONE, ZERO, Axis, Expr, as_expr
from minifuse.ir.kernel import Store
from minifuse.ir.shape import contiguous_strides, linearize
from minifuse.ir.value import Cast, Const, IndexOf, Op, Value

from .pointwise import Unsupported, joined, to_compute
from .reductions import reduce_values
from .registry import STRUCTURAL, lowers
from .view import View

if TYPE_CHECKING:
    from .graph import Lowering

aten = torch.ops.aten

UNROLLED = 64  # elements of a window that are written out; a larger sum is a loop, a larger maximum goes to ATen
Place = tuple[Expr, list[Value]]  # a coordinate, and what must hold for an element to be there


def inside(at: Expr, size: Expr) -> Place:
    """A coordinate with the tests of `0 <= at < size`, less what is known."""
    tests: list[Value] = [] if at.is_nonneg() else [Op.of("ge", IndexOf.of(at), IndexOf.of(ZERO))]
    return at, tests if (size - 1 - at).is_nonneg() else [*tests, Op.of("lt", IndexOf.of(at), IndexOf.of(size))]


@dataclass(frozen=True)
class Window:
    """Along one dimension, output `o` reads the inputs `o * stride - pad + k * dilation`, k < taps."""

    size: Expr
    out: Expr
    taps: int
    stride: int
    pad: int = 0
    dilation: int = 1

    def start(self, o: Expr) -> Expr:
        return o * self.stride - self.pad

    def read(self, o: Expr, k: Expr) -> Place:
        return inside(self.start(o) + k * self.dilation, self.size)

    def entry(self, o: Expr, dtype: torch.dtype) -> Value:
        """How far behind its start a window enters the input."""
        before = IndexOf.of((self.start(o) // self.dilation) * -self.dilation, dtype)
        return Op.of("maximum", before, Const.of(0, dtype)) if self.pad else Const.of(0, dtype)

    def readers(self, p: Expr) -> list[Place]:
        """The outputs that read input `p`, in ascending order."""
        if self.stride == 1:
            return [inside(p + self.pad - k * self.dilation, self.out) for k in reversed(range(self.taps))]
        if self.dilation != 1:
            raise Unsupported("the gradient of a pooling with a stride and a dilation")
        whole, rest = p // self.stride, p % self.stride + self.pad
        if not isinstance(p.atom, Axis) or (p.atom.size % self.stride) is not ZERO:
            whole, rest = ZERO, p + self.pad  # else the schedule cuts the axis in two and outputs lie side by side
        last, k = whole + rest // self.stride, IndexOf.of(rest % self.stride)
        found = []
        for j in reversed(range(-(-self.taps // self.stride))):
            o, tests = inside(last - j, self.out)
            left = self.taps - j * self.stride
            found.append((o, tests if left >= self.stride else [Op.of("lt", k, IndexOf.of(left)), *tests]))
        return found

    def count(self, o: Expr, padded: bool) -> Value:
        """How many elements of the input, or of the padded input, a window has; 1 where there are none."""
        begin, end = self.start(o), self.start(o) + self.taps
        most = self.size + (self.pad if padded else 0)
        if (padded or begin.is_nonneg()) and (most - end).is_nonneg():
            return Const.of(self.taps, torch.int64)
        low = IndexOf.of(begin) if padded else Op.of("maximum", IndexOf.of(begin), IndexOf.of(ZERO))
        count = Op.of("sub", Op.of("minimum", IndexOf.of(end), IndexOf.of(most)), low)
        return Op.of("maximum", count, IndexOf.of(ONE))


def planes(lo: Lowering, x: fx.Node, out: fx.Node) -> list[tuple[Expr, Expr]]:
    """The dimensions that the current node pools over: sizes of its input and of its output."""
    n = 3 if "3d" in lo.node.target._schema.name else 2  # type: ignore[union-attr]
    vals = [v[0] if isinstance(v, (tuple, list)) else v for v in (x.meta["val"], out.meta["val"])]
    return list(zip(*(lo.sizes(v.shape)[-n:] for v in vals), strict=True))


def pool_windows(
    lo: Lowering, x: fx.Node, out: fx.Node, kernel: Any, stride: Any, padding: Any, dilation: Any = 1
) -> list[Window]:
    """The windows of a pooling whose arguments are a number, or one a dimension."""
    sizes = planes(lo, x, out)
    given = [[a] if isinstance(a, int) else list(a) for a in (kernel, stride or kernel, padding, dilation)]
    if not all(isinstance(n, int) for a in given for n in a):
        raise Unsupported("a pooling by a size that is not known")
    each = zip(*(a * (len(sizes) // len(a)) for a in given), strict=True)
    return [Window(*size, *numbers) for size, numbers in zip(sizes, each, strict=True)]


def even_windows(lo: Lowering, x: fx.Node, out: fx.Node) -> list[Window]:
    """The windows of an adaptive pooling, all of one length."""
    found = []
    for s, o in planes(lo, x, out):
        if o is ZERO or not (s // o).is_const or (s % o) is not ZERO:
            raise Unsupported("an adaptive pooling by windows of several lengths")
        found.append(Window(s, o, (s // o).value, (s // o).value))
    return found


def element(view: View, lead: Sequence[Expr], places: Sequence[Place], other: Any = 0) -> Value:
    """A value by its leading coordinates and its place in each dimension; `other` where it is not there."""
    tests = [t for _, found in places for t in found]
    mask = joined("and", tests) if tests else None
    other = Const.of(other, view.buffer.dtype) if tests else None
    return to_compute(view.read([*lead, *(at for at, _ in places)], mask, other), view.buffer.dtype)


def spots(windows: Sequence[Window]) -> Iterator[tuple[Expr, ...]]:
    return product(*([as_expr(k) for k in range(w.taps)] for w in windows))


def reads(windows: Sequence[Window], at: Sequence[Expr], ks: Sequence[Expr]) -> list[Place]:
    return [w.read(o, k) for w, o, k in zip(windows, at, ks, strict=True)]


def summed(values: Sequence[Value]) -> Value:
    """In order from zero, as ATen adds."""
    return joined("add", [Const.of(0, values[0].dtype), *values])


def readers(windows: Sequence[Window], at: Sequence[Expr]) -> list[tuple[Place, ...]]:
    """The outputs that read an input."""
    found = list(product(*(w.readers(p) for w, p in zip(windows, at, strict=True))))
    if len(found) > UNROLLED:
        raise Unsupported(f"a gradient of windows of which more than {UNROLLED} overlap")
    return found


def shared(total: Value, windows: Sequence[Window], at: Sequence[Expr], padded: bool, divisor: int | None) -> Value:
    """A sum, or a gradient, divided among the elements of an output's window."""
    if divisor is None:
        counts = [w.count(o, padded) for w, o in zip(windows, at, strict=True)]
        known = prod(c.value for c in counts if isinstance(c, Const))
        unknown = [c for c in counts if not isinstance(c, Const)]
        count = joined("mul", [*unknown, Const.of(known, torch.int64)])
    else:
        count = Const.of(divisor, torch.int64)
    return Op.of("div" if dtypes.is_float(total.dtype) else "truncdiv", total, Cast.of(total.dtype, count))


def average(lo: Lowering, x: fx.Node, windows: Sequence[Window], padded: bool, divisor: int | None) -> View:
    view, n = lo.view(x), len(windows)
    whole = all(w.out is ONE and w.size is as_expr(w.taps) and not w.pad for w in windows)
    if whole and divisor is None and dtypes.is_float(view.buffer.dtype):
        return STRUCTURAL[aten.mean.dim](lo, lo.node, x, list(range(-n, 0)), True)

    def value(where: tuple[Expr, ...]) -> Value:
        def tap(ks: Sequence[Expr]) -> Value:
            return element(view, where[:-n], reads(windows, where[-n:], ks))

        if prod(w.taps for w in windows) > UNROLLED:
            axes = [Axis(f"i{d}k", as_expr(w.taps)) for d, w in enumerate(windows)]
            (total,) = reduce_values("sum", (tap([a.expr for a in axes]),), [(a, 1) for a in reversed(axes)])
        else:
            total = summed([tap(ks) for ks in spots(windows)])
        return shared(total, windows, where[-n:], padded, divisor)

    return lo.emit(value, lo.node.meta["val"])


def average_backward(lo: Lowering, grad: fx.Node, windows: Sequence[Window], padded: bool, divisor: int | None) -> View:
    view, n = lo.view(grad), len(windows)

    def value(where: tuple[Expr, ...]) -> Value:
        def part(places: Sequence[Place]) -> Value:
            return shared(element(view, where[:-n], places), windows, [o for o, _ in places], padded, divisor)

        return summed([part(places) for places in readers(windows, where[-n:])])

    return lo.emit(value, lo.node.meta["val"])


def plane(windows: Sequence[Window]) -> tuple[tuple[Expr, ...], torch.dtype]:
    """Strides of a place in a plane, and a dtype for it: of 32 bits a register holds as many as of floats."""
    size, *strides = contiguous_strides([ONE, *(w.size for w in windows)])
    return tuple(strides), torch.int32 if size.is_const and size.value < 2**31 else torch.int64


def maximum(lo: Lowering, x: fx.Node, windows: Sequence[Window]) -> tuple[View, ...]:
    """The largest element of a window and its place in the plane: the first of equals, the last NaN."""
    if prod(w.taps for w in windows) > UNROLLED:
        raise Unsupported(f"a maximum over windows of more than {UNROLLED} elements")
    view, n, vals = lo.view(x), len(windows), lo.node.meta["val"]
    buffers = [lo.buffer(lo.result_name(i), v, "arena", lo.dense_stride(v)) for i, v in enumerate(vals)]
    where = lo.axes(buffers[0].shape)
    lead, at, (strides, dtype) = where[:-n], where[-n:], plane(windows)
    lowest = ops.REDUCTIONS["max"].identity(view.buffer.dtype)
    best: Value = to_compute(Const.of(lowest, view.buffer.dtype), view.buffer.dtype)
    entries = [w.entry(o, dtype) for w, o in zip(windows, at, strict=True)]
    index = joined("add", [Op.of("mul", e, IndexOf.of(s, dtype)) for e, s in zip(entries, strides, strict=True)])
    for ks in spots(windows):
        value = element(view, lead, reads(windows, at, ks), lowest)
        wins = Op.of("gt", value, best)
        if dtypes.is_float(value.dtype):
            wins = Op.of("or", wins, Op.of("ne", value, value))
        offset = linearize([k * w.dilation for w, k in zip(windows, ks, strict=True)], strides)
        best, index = Op.of("where", wins, value, best), Op.of("where", wins, IndexOf.of(offset, dtype), index)
    start = IndexOf.of(linearize([w.start(o) for w, o in zip(windows, at, strict=True)], strides), dtype)
    made = zip(buffers, (best, Op.of("add", index, start)), strict=True)
    lo.add_kernel([Store(b.name, where, Cast.of(b.dtype, v)) for b, v in made], lo.node.name)
    return tuple(View.whole(b) for b in buffers)


def maximum_backward(lo: Lowering, grad: fx.Node, indices: fx.Node, windows: Sequence[Window]) -> View:
    val, n, view, picked = lo.node.meta["val"], len(windows), lo.view(grad), lo.view(indices)
    if val.device.type == "cpu" and lo.strides(val.stride())[-n - 1] is not ONE:
        raise Unsupported("the gradient of a maximum over planes on a CPU: ATen's scatter walks the outputs alone")
    strides, dtype = plane(windows)

    def value(where: tuple[Expr, ...]) -> Value:
        lead, mine = where[:-n], IndexOf.of(linearize(where[-n:], strides), dtype)

        def part(places: Sequence[Place]) -> Value:
            given = element(view, lead, places)
            won = Op.of("eq", Cast.of(dtype, element(picked, lead, places, -1)), mine)
            return Op.of("where", won, given, Const.of(0, given.dtype))

        return summed([part(places) for places in readers(windows, where[-n:])])

    return lo.emit(value, val)


@lowers(aten.avg_pool2d.default, aten.avg_pool3d.default)
def _avg_pool(
    lo: Lowering, node: fx.Node, x: fx.Node, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor: int | None = None,
) -> View:  # fmt: skip
    return average(lo, x, pool_windows(lo, x, node, kernel, stride, padding), count_include_pad, divisor)


@lowers(aten.avg_pool2d_backward.default, aten.avg_pool3d_backward.default)
def _avg_pool_backward(
    lo: Lowering, node: fx.Node, grad: fx.Node, x: fx.Node, kernel: Any, stride: Any, padding: Any, ceil_mode: bool,
    count_include_pad: bool, divisor: int | None,
) -> View:  # fmt: skip
    return average_backward(lo, grad, pool_windows(lo, x, grad, kernel, stride, padding), count_include_pad, divisor)


@lowers(aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default)
def _max_pool(
    lo: Lowering, node: fx.Node, x: fx.Node, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False,
) -> tuple[View, ...]:  # fmt: skip
    return maximum(lo, x, pool_windows(lo, x, node, kernel, stride, padding, dilation))


@lowers(aten.max_pool2d_with_indices_backward.default, aten.max_pool3d_with_indices_backward.default)
def _max_pool_backward(
    lo: Lowering, node: fx.Node, grad: fx.Node, x: fx.Node, kernel: Any, stride: Any, padding: Any, dilation: Any,
    ceil_mode: bool, indices: fx.Node,
) -> View:  # fmt: skip
    return maximum_backward(lo, grad, indices, pool_windows(lo, x, grad, kernel, stride, padding, dilation))


@lowers(aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool3d.default)
def _adaptive_avg_pool(lo: Lowering, node: fx.Node, x: fx.Node, size: Any) -> View:
    return average(lo, x, even_windows(lo, x, node), False, None)


@lowers(aten._adaptive_avg_pool2d_backward.default, aten._adaptive_avg_pool3d_backward.default)
def _adaptive_avg_pool_backward(lo: Lowering, node: fx.Node, grad: fx.Node, x: fx.Node) -> View:
    return average_backward(lo, grad, even_windows(lo, x, grad), False, None)


@lowers(aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default)
def _adaptive_max_pool(lo: Lowering, node: fx.Node, x: fx.Node, size: Any) -> tuple[View, ...]:
    return maximum(lo, x, even_windows(lo, x, node))


@lowers(aten.adaptive_max_pool2d_backward.default, aten.adaptive_max_pool3d_backward.default)
def _adaptive_max_pool_backward(lo: Lowering, node: fx.Node, grad: fx.Node, x: fx.Node, indices: fx.Node) -> View:
    return maximum_backward(lo, grad, indices, even_windows(lo, x, grad))
