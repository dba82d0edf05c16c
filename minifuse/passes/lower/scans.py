"""Scans: running sums, products and extrema along a dimension."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from minifuse.ir import dtypes
from minifuse.ir.index import ONE, Axis, Expr
from minifuse.ir.value import LANES, Const, IndexOf, Op, Scan, Value

from .pointwise import Unsupported, to_compute
from .registry import lowers
from .view import View

if TYPE_CHECKING:
    from .graph import Lowering

aten = torch.ops.aten


class _Running:
    """A view of a tensor along one dimension, ready to be scanned."""

    def __init__(self, lo: Lowering, node: fx.Node, x: fx.Node, dim: int, dtype: torch.dtype) -> None:
        self.lo, self.node, self.view, self.dtype = lo, node, lo.view(x), dtype
        self.dim = dim % max(len(self.view.at), 1)
        found = self.view.strided()
        scalar = not self.view.at
        self.lanes = LANES if not scalar and (found is None or found.stride[self.dim] is ONE) else 1

    def axis(self, where: tuple[Expr, ...]) -> Axis | None:
        """The scanned axis; None where it has one element."""
        atom = where[self.dim].atom if where else None
        return atom if isinstance(atom, Axis) else None

    def value(self, where: tuple[Expr, ...]) -> Value:
        """An element, in what it is accumulated in."""
        return to_compute(self.view.read(where), self.dtype)

    def scan(self, kind: str, value: Value, where: tuple[Expr, ...]) -> Value:
        axis = self.axis(where)
        return value if axis is None else Scan.of(kind, value, axis, self.lanes)


def _in_double(val: torch.Tensor) -> torch.dtype:
    """What is accumulated in, one element after the other: on a CPU a double for floats, as in ATen. A sum of 4 million
    in float was 4e-5 off where ATen's is 6e-8."""
    return torch.float64 if val.device.type == "cpu" and val.dtype is torch.float32 else val.dtype


def _cumulative(kind: str) -> Any:
    def fn(lo: Lowering, node: fx.Node, x: fx.Node, dim: int, *, dtype: Any = None) -> View:
        val = node.meta["val"]
        run = _Running(lo, node, x, dim, val.dtype)
        if run.lanes == 1:
            run.dtype = _in_double(val)
        return lo.emit(lambda where: run.scan(kind, run.value(where), where), val)

    return fn


lowers(aten.cumsum.default)(_cumulative("sum"))
lowers(aten.cumprod.default)(_cumulative("prod"))


@lowers(aten.logcumsumexp.default)
def _logcumsumexp(lo: Lowering, node: fx.Node, x: fx.Node, dim: int) -> View:
    """On a CPU in order, as ATen does: an error in a logarithm is a factor of what its exponential makes, the gradient
    first. Lanes joined in a tree took 3.5 times as long, for each join is an exponential."""
    val = node.meta["val"]
    run = _Running(lo, node, x, dim, _in_double(val))
    run.lanes = 1 if val.device.type == "cpu" else run.lanes
    return lo.emit(lambda where: run.scan("logsumexp", run.value(where), where), val)


def _extremum(kind: str) -> Any:
    """cummax and cummin: the running extremum, and the last place that it was reached at or, once NaN, of a NaN."""

    def fn(lo: Lowering, node: fx.Node, x: fx.Node, dim: int) -> tuple[View, ...]:
        vals = node.meta["val"]
        if vals[0].dtype is torch.bool:
            raise Unsupported(f"cum{kind} of bools")
        run = _Running(lo, node, x, dim, vals[0].dtype)

        def place(where: tuple[Expr, ...]) -> Value:
            axis = run.axis(where)
            if axis is None:
                return Const.of(0, torch.int64)
            value = run.value(where)
            reached = Op.of("eq", value, run.scan(kind, value, where))
            if dtypes.is_float(value.dtype):
                reached = Op.of("or", reached, Op.of("ne", value, value))
            here = Op.of("where", reached, IndexOf.of(axis.expr), Const.of(0, torch.int64))
            return run.scan("max", here, where)

        best = lo.emit(lambda where: run.scan(kind, run.value(where), where), vals[0], lo.result_name(0))
        return best, lo.emit(place, vals[1], lo.result_name(1))

    return fn


lowers(aten.cummax.default)(_extremum("max"))
lowers(aten.cummin.default)(_extremum("min"))
