"""Creation: fills, ranges, random numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from minifuse import compat
from minifuse.ir import dtypes
from minifuse.ir.index import Expr, as_expr
from minifuse.ir.shape import contiguous_strides, is_injective, linearize
from minifuse.ir.value import Cast, Const, IndexOf, Op, Random, Value

from .pointwise import Unsupported, check_fits
from .registry import lowers
from .view import View

if TYPE_CHECKING:
    from .graph import Lowering

aten = torch.ops.aten
prims = torch.ops.prims


def _fill(lo: Lowering, node: fx.Node, value: Any) -> View:
    val = node.meta["val"]
    number = lo.scalar(value)
    if number is None or not dtypes.supported(val.dtype):
        raise Unsupported("a fill with an unknown value or dtype")
    check_fits(value, val.dtype)
    if isinstance(number, Const):
        return lo.emit(lambda _: Const.of(number.value, val.dtype), val)
    return lo.emit(lambda _: Cast.of(val.dtype, number), val)


@lowers(aten.full.default, aten.full_like.default)
def _full(lo: Lowering, node: fx.Node, like: Any, value: Any, **kw: Any) -> View:
    return _fill(lo, node, value)


@lowers(aten.scalar_tensor.default)
def _scalar_tensor(lo: Lowering, node: fx.Node, value: Any, **kw: Any) -> View:
    return _fill(lo, node, value)


@lowers(aten.lift_fresh_copy.default)
def _lift_fresh_copy(lo: Lowering, node: fx.Node, x: fx.Node) -> View:
    """A number that the program's text has: what reads it has it too, on whatever device."""
    source = lo.ctx.stages.get("constants", {}).get(x.name)
    if not isinstance(source, torch.Tensor) or source.dim() or not dtypes.supported(source.dtype):
        return lo.pointwise(node)
    with compat.real_tensors():
        number = source.item()
    made = _fill(lo, node, number)
    lo.literals[made.buffer.name] = number
    return made


def _filled(value: int) -> Callable[..., View]:
    return lambda lo, node, *args, **kw: _fill(lo, node, value)


lowers(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)(_filled(0))
lowers(aten.ones.default, aten.ones_like.default, aten.new_ones.default)(_filled(1))


@lowers(
    aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default,
    aten.new_empty_strided.default, aten.empty_permuted.default,
)  # fmt: skip
def _empty(lo: Lowering, node: fx.Node, *args: Any, **kw: Any) -> View:
    shape, stride = lo.shape(node), lo.strides(node.meta["val"].stride())
    if not is_injective(*lo.hints(shape, stride)):
        raise Unsupported("an empty tensor whose elements share memory")
    return _fill(lo, node, 0)


def _iota(lo: Lowering, node: fx.Node, start: Any, step: Any) -> View:
    val = node.meta["val"]
    if not dtypes.is_float(val.dtype):  # as ATen, which takes the ends of a range of integers for integers
        start, step = (int(s) if isinstance(s, float) else s for s in (start, step))

    def value(where: tuple[Expr, ...]) -> Value:
        if all(isinstance(s, (int, fx.Node, torch.SymInt)) and not isinstance(s, bool) for s in (start, step)):
            return Cast.of(val.dtype, IndexOf.of(where[0] * lo.size(step) + lo.size(start)))
        k = Cast.of(torch.float64, IndexOf.of(where[0]))
        first, by = (Const.of(s, torch.float64) for s in (start, step))
        return Cast.of(val.dtype, Op.of("add", first, Op.of("mul", k, by)))

    return lo.emit(value, val)


@lowers(aten.arange.start_step, aten.arange.start)
def _arange(lo: Lowering, node: fx.Node, start: Any, end: Any, step: Any = 1, **kw: Any) -> View:
    return _iota(lo, node, start, step)


@lowers(aten.arange.default)
def _arange_end(lo: Lowering, node: fx.Node, end: Any, **kw: Any) -> View:
    return _iota(lo, node, 0, 1)


@lowers(prims.iota.default)
def _prims_iota(lo: Lowering, node: fx.Node, length: Any, *, start: Any = 0, step: Any = 1, **kw: Any) -> View:
    return _iota(lo, node, start, step)


@lowers(torch.ops.minifuse.random.default)
def _random(
    lo: Lowering, node: fx.Node, size: Any, seed: fx.Node, offset: int, kind: str, low: Any, high: Any,
    dtype: torch.dtype, device: torch.device,
) -> View:  # fmt: skip
    source = lo.view(seed)
    strides = contiguous_strides(lo.shape(node))

    def value(where: tuple[Expr, ...]) -> Value:
        key = source.read([as_expr(0)] * len(source.at))
        drawn = Random.of("bits" if kind == "integer" else kind, key, offset, linearize(where, strides))  # type: ignore[arg-type]
        if kind != "integer":
            return drawn
        # 63 bits keep the remainder's sign plain
        bits = Op.of("and", drawn, Const.of((1 << 63) - 1, torch.int64))
        first, span = lo.size(low), lo.size(high) - lo.size(low)
        return Op.of("add", Op.of("mod", bits, IndexOf.of(span)), IndexOf.of(first))

    return lo.emit(value, node.meta["val"])
