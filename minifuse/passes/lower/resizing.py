"""Resizing by a power of two: an output reads its nearest inputs, and an input's gradient asks the outputs near it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from minifuse.ir import dtypes
from minifuse.ir.index import ONE, ZERO, Axis, Expr, as_expr
from minifuse.ir.value import LANES, Cast, Const, IndexOf, Op, Reduce, Value

from .pointwise import Unsupported
from .pooling import UNROLLED, Place, Window, average, element, inside, summed
from .registry import lowers
from .view import View

if TYPE_CHECKING:
    from .graph import Lowering

aten = torch.ops.aten


Enlarged = tuple[Expr, Expr, int]
"""Along one dimension: the small size, the large one, and how many times that is."""


def enlargements(
    lo: Lowering, small: fx.Node, large: fx.Node, scales: Sequence[float | None], odd: bool = False
) -> list[Enlarged]:
    """By a power of two each, with which ATen's floating indices are exact; Unsupported otherwise, and where `odd`."""
    found = []
    sizes = lo.shape(small)[2:], lo.shape(large)[2:]
    for s, o, scale in zip(*sizes, scales or [None] * len(sizes[0]), strict=True):
        times = (o // s).value if s is not ZERO and (o // s).is_const else 0
        if odd or s * times is not o or scale not in (None, times) or times.bit_count() != 1:
            raise Unsupported("a resizing that is no plain enlargement by a power of two")
        found.append((s, o, times))
    return found


def _of_ranks(*names: str, tail: str = "") -> list[Any]:
    return [getattr(aten, f"{name}{n}d{tail}").default for name in names for n in (1, 2, 3)]


@lowers(*_of_ranks("upsample_nearest", "_upsample_nearest_exact"))
def _nearest(lo: Lowering, node: fx.Node, x: fx.Node, size: Any, *scales: float | None) -> View:
    view, dims = lo.view(x), enlargements(lo, x, node, scales)

    def value(where: tuple[Expr, ...]) -> Value:
        return view.read([*where[:2], *(o // t for o, (_, _, t) in zip(where[2:], dims, strict=True))])

    return lo.emit(value, node.meta["val"])


@lowers(*_of_ranks("upsample_nearest", "_upsample_nearest_exact", tail="_backward"))
def _nearest_backward(lo: Lowering, node: fx.Node, grad: fx.Node, out: Any, size: Any, *scales: float | None) -> View:
    return average(lo, grad, [Window(o, s, t, t) for s, o, t in enlargements(lo, node, grad, scales)], False, 1)


LINEAR = ("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d")


@lowers(*(getattr(aten, name).default for name in LINEAR))
def _linear(lo: Lowering, node: fx.Node, x: fx.Node, size: Any, align_corners: bool, *scales: float | None) -> View:
    """Output `o` of an enlargement by t lies `(2 * o + 1 - t) / (2 * t)` into the input."""
    view = lo.view(x)
    dims = enlargements(lo, x, node, scales, align_corners or not dtypes.is_float(view.buffer.dtype))

    def value(where: tuple[Expr, ...]) -> Value:
        def along(places: list[Place]) -> Value:
            d = len(places)
            if d == len(dims):
                return element(view, where[:2], places)
            o, (size, _, t) = where[2 + d], dims[d]
            if t == 1:
                return along([*places, (o, [])])
            behind = o % t * 2 + 1 + t
            (low, has_low), (high, has_high) = (inside(o // t + behind // (2 * t) - k, size) for k in (1, 0))
            a, b = along([*places, (low, has_low)]), along([*places, (high, has_high)])
            a, b = chosen(has_low, a, b), chosen(has_high, b, a)
            weight = Op.of("mul", Cast.of(a.dtype, IndexOf.of(behind % (2 * t))), Const.of(0.5 / t, a.dtype))
            rest = Op.of("sub", Const.of(1, a.dtype), weight)
            return Op.of("add", Op.of("mul", rest, a), Op.of("mul", weight, b))

        return along([])

    return lo.emit(value, node.meta["val"])


def chosen(tests: Sequence[Value], there: Value, beside: Value) -> Value:
    """A neighbour, or the other one at the border."""
    return reduce(lambda v, test: Op.of("where", test, v, beside), tests, there)


@lowers(*(getattr(aten, f"{name}_backward").default for name in LINEAR))
def _linear_backward(
    lo: Lowering, node: fx.Node, grad: fx.Node, out: Any, size: Any, align_corners: bool, *scales: float | None
) -> View:
    view, dims = lo.view(grad), enlargements(lo, node, grad, scales, align_corners)
    windows = [Window(o, s, 2 * t, t, t // 2) if t > 1 else Window(o, s, 1, 1) for s, o, t in dims]
    looped = prod(w.taps for w in windows) > UNROLLED
    strides = lo.strides(grad.meta["val"].stride()) if (found := view.strided()) is None else found.stride
    unit = [s is ONE for s in strides[2:]]
    if looped and not any(unit) and node.meta["val"].device.type == "cpu":
        # 1.5 times ATen's time, where along planes it is a third.
        raise Unsupported(f"the gradient of an enlargement from more than {UNROLLED} elements that lie apart")

    def value(where: tuple[Expr, ...]) -> Value:
        def along(places: list[Place]) -> Value:
            d = len(places)
            if d == len(windows):
                return element(view, where[:2], places)
            w, p = windows[d], where[2 + d]
            if w.taps == 1:
                return along([*places, (p, [])])

            def part(k: Expr) -> Value:
                given = along([*places, w.read(p, k)])
                away, one = 2 * (k - w.pad) + 1 - w.stride, Const.of(1, given.dtype)
                first, last = (Op.of("eq", IndexOf.of(p), IndexOf.of(end)) for end in (ZERO, w.out - 1))
                if away.is_const:
                    edge = first if away.value < 0 else last
                    weight: Value = Const.of(1 - abs(away.value) / (2 * w.stride), given.dtype)
                else:
                    edge = Op.of("where", Op.of("lt", IndexOf.of(away), IndexOf.of(ZERO)), first, last)
                    far = Op.of("abs", Cast.of(given.dtype, IndexOf.of(away)))
                    weight = Op.of("sub", one, Op.of("mul", far, Const.of(0.5 / w.stride, given.dtype)))
                return Op.of("mul", Op.of("where", edge, one, weight), given)

            if not looped:
                return summed([part(as_expr(k)) for k in range(w.taps)])
            axis = Axis(f"i{2 + d}k", as_expr(w.taps))
            return Reduce.of("sum", (part(axis.expr),), axis, LANES if unit[d] else 1)

        return along([])

    return lo.emit(value, node.meta["val"])
