"""Pointwise ATen operators as rows: what each means in operators of the kernel IR.

A row's function gets its arguments already read, broadcast and converted to the dtype that torch
computes in (`compute` of the common dtype: float32 for half types), and returns one value, which
the lowerer rounds to the result's dtype. Eager rounds a half result once an operator; so do we.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from minifuse import compat
from minifuse.ir import dtypes
from minifuse.ir.kernel import Check
from minifuse.ir.value import Cast, Const, Op, Value, topological

aten = torch.ops.aten
prims = torch.ops.prims


@dataclass(frozen=True)
class Row:
    """How one ATen operator is computed.

    `promote`: "result" converts every tensor argument to the result's dtype, "common" to the
    arguments' own common dtype (comparisons), "keep" leaves them as they are. `scalars` are
    positions that stay Python numbers.
    """

    fn: Callable[..., Value]
    promote: str = "result"
    scalars: tuple[int, ...] = ()


def const_like(x: Value, value: float | int | bool) -> Const:
    return Const.of(value, x.dtype)


def _op(name: str) -> Callable[..., Value]:
    return lambda *args: Op.of(name, *args)


def _scaled(name: str) -> Callable[..., Value]:
    """add and sub with alpha."""

    def fn(a: Value, b: Value, alpha: float | int = 1) -> Value:
        if a.dtype is torch.bool:
            return Op.of("or", a, b)
        return Op.of(name, a, b if alpha == 1 else Op.of("mul", b, const_like(b, alpha)))

    return fn


def _rsub(a: Value, b: Value, alpha: float | int = 1) -> Value:
    return _scaled("sub")(b, a, alpha)


def _mul(a: Value, b: Value) -> Value:
    return Op.of("and" if a.dtype is torch.bool else "mul", a, b)


def _div_mode(a: Value, b: Value, rounding_mode: str | None = None) -> Value:
    if not dtypes.is_float(a.dtype):
        return Op.of("floordiv" if rounding_mode == "floor" else "truncdiv", a, b)
    if rounding_mode == "floor":
        return floor_divide(a, b)
    quotient = Op.of("div", a, b)
    return Op.of("trunc", quotient) if rounding_mode == "trunc" else quotient


def floor_divide(a: Value, b: Value) -> Value:
    """Python's floor division of floats, as ATen writes it (c10::div_floor_floating)."""
    if not dtypes.is_float(a.dtype):
        return Op.of("floordiv", a, b)
    zero, one, half = (const_like(a, c) for c in (0, 1, 0.5))
    mod = Op.of("fmod", a, b)
    div = Op.of("div", Op.of("sub", a, mod), b)
    wrong = Op.of("and", Op.of("ne", mod, zero), Op.of("ne", Op.of("lt", b, zero), Op.of("lt", mod, zero)))
    div = Op.of("where", wrong, Op.of("sub", div, one), div)
    low = Op.of("floor", div)
    low = Op.of("where", Op.of("gt", Op.of("sub", div, low), half), Op.of("add", low, one), low)
    low = Op.of("where", Op.of("ne", div, zero), low, Op.of("copysign", zero, Op.of("div", a, b)))
    return Op.of("where", Op.of("eq", b, zero), Op.of("div", a, b), low)


def remainder(a: Value, b: Value) -> Value:
    if not dtypes.is_float(a.dtype):
        return Op.of("mod", a, b)
    zero = const_like(a, 0)
    mod = Op.of("fmod", a, b)
    wrong = Op.of("and", Op.of("ne", mod, zero), Op.of("ne", Op.of("lt", b, zero), Op.of("lt", mod, zero)))
    return Op.of("where", wrong, Op.of("add", mod, b), mod)


def _fmod(a: Value, b: Value) -> Value:
    return Op.of("fmod" if dtypes.is_float(a.dtype) else "rem", a, b)


def reciprocal(x: Value) -> Value:
    return Op.of("div", const_like(x, 1), x)


def rsqrt(x: Value) -> Value:
    return Op.of("div", const_like(x, 1), Op.of("sqrt", x))


def sigmoid(x: Value) -> Value:
    one = const_like(x, 1)
    return Op.of("div", one, Op.of("add", one, Op.of("exp", Op.of("neg", x))))


def _silu(x: Value) -> Value:
    return Op.of("div", x, Op.of("add", const_like(x, 1), Op.of("exp", Op.of("neg", x))))


def _bounded(kind: str, x: Value, bound: Value | float) -> Value:
    """Of zeros that differ in sign ATen gives the element before a number, and a bound that is a tensor before it."""
    return Op.of(kind, x, bound) if isinstance(bound, Value) else Op.of(kind, const_like(x, bound), x)


def _relu(x: Value) -> Value:
    return _bounded("maximum", x, 0)


def _square(x: Value) -> Value:
    return Op.of("mul", x, x)


def pow_scalar(x: Value, exponent: float | int) -> Value:
    """Small integer and half powers as ATen computes them; the rest by `pow`."""
    if exponent == 1:
        return x
    if exponent == 2:
        return _square(x)
    if exponent == 3:
        return Op.of("mul", _square(x), x)
    if exponent == 0:
        return const_like(x, 1)
    if not dtypes.is_float(x.dtype):
        if int(exponent) != exponent or exponent < 0 or exponent > 64:
            raise Unsupported(f"an integer to the power {exponent}")
        out: Value = const_like(x, 1)
        for bit in bin(int(exponent))[2:]:
            out = _square(out)
            out = Op.of("mul", out, x) if bit == "1" else out
        return out
    if exponent == 0.5:
        return Op.of("sqrt", x)
    if exponent == -0.5:
        return rsqrt(x)
    if exponent == -1:
        return reciprocal(x)
    if exponent == -2:
        return reciprocal(_square(x))
    return Op.of("pow", x, const_like(x, exponent))


class Unsupported(Exception):  # noqa: N818 - an answer, not a fault
    """This form of an operator has no kernel; it becomes an extern with this reason."""


def check_fits(number: object, dtype: torch.dtype) -> None:
    """Raises Unsupported for a Python number that ATen does not convert to `dtype`: it raises in place of wrapping. Of
    unsigned integers negative ones wrap."""
    if not isinstance(number, (int, float)) or dtype is torch.bool:
        return
    limits = torch.finfo(dtype) if dtypes.is_float(dtype) else torch.iinfo(dtype)
    low, known = (limits.min or -limits.max), math.isfinite(number)
    if not (low <= number <= limits.max if known else dtypes.is_float(dtype)):
        raise Unsupported(f"{number} does not fit {dtype}: ATen raises")


def _pow_tensor(x: Value, y: Value) -> Value:
    if not dtypes.is_float(x.dtype):
        raise Unsupported("an integer power with a tensor exponent")
    return Op.of("pow", x, y)


def _sign(x: Value) -> Value:
    if x.dtype is torch.bool:
        return x
    zero = const_like(x, 0)
    signed = Op.of("where", Op.of("lt", x, zero), const_like(x, -1 if x.dtype is not torch.uint8 else 0), zero)
    return Op.of("where", Op.of("gt", x, zero), const_like(x, 1), signed)


def _clamp(x: Value, low: Value | float | None = None, high: Value | float | None = None) -> Value:
    if low is not None:
        x = _bounded("maximum", x, low)
    if high is not None:
        x = _bounded("minimum", x, high)
    return x


def _isnan(x: Value) -> Value:
    return Op.of("ne", x, x) if dtypes.is_float(x.dtype) else Const.of(False, torch.bool)


def _isinf(x: Value) -> Value:
    if not dtypes.is_float(x.dtype):
        return Const.of(False, torch.bool)
    return Op.of("eq", Op.of("abs", x), const_like(x, math.inf))


def truth(x: Value) -> Value:
    """Whether an element is not zero; NaN is true."""
    return x if x.dtype is torch.bool else Op.of("ne", x, const_like(x, 0))


def _logical(name: str) -> Callable[..., Value]:
    return lambda *args: Op.of(name, *(truth(a) for a in args))


def _where(condition: Value, a: Value, b: Value) -> Value:
    return Op.of("where", truth(condition), a, b)


def _integer_only(name: str) -> Callable[..., Value]:
    def fn(*args: Value) -> Value:
        if dtypes.is_float(args[0].dtype):
            raise Unsupported(f"{name} of floats")
        return Op.of(name, *args)

    return fn


def _rounding(name: str) -> Callable[..., Value]:
    return lambda x: Op.of(name, x) if dtypes.is_float(x.dtype) else x


def _abs(x: Value) -> Value:
    return x if x.dtype in (torch.bool, torch.uint8) else Op.of("abs", x)


def _addcmul(a: Value, b: Value, c: Value, value: float | int = 1) -> Value:
    p = Op.of("mul", b, c) if value == 1 else Op.of("mul", Op.of("mul", const_like(b, value), b), c)
    return Op.of("add", a, p)


def _addcdiv(a: Value, b: Value, c: Value, value: float | int = 1) -> Value:
    b = b if value == 1 else Op.of("mul", const_like(b, value), b)
    return Op.of("add", a, Op.of("div", b, c))


def _lerp(a: Value, b: Value, weight: Value | float) -> Value:
    """As ATen: from the nearer end, so that the ends are exact."""
    d = Op.of("sub", b, a)
    w = weight if isinstance(weight, Value) else const_like(a, weight)
    near = Op.of("add", a, Op.of("mul", w, d))
    far = Op.of("sub", b, Op.of("mul", d, Op.of("sub", const_like(a, 1), w)))
    return Op.of("where", Op.of("lt", Op.of("abs", w), const_like(a, 0.5)), near, far)


def _threshold(x: Value, threshold: float, value: float) -> Value:
    return Op.of("where", Op.of("le", x, const_like(x, threshold)), const_like(x, value), x)


def _threshold_backward(grad: Value, x: Value, threshold: float) -> Value:
    return Op.of("where", Op.of("le", x, const_like(x, threshold)), const_like(grad, 0), grad)


def _nan_ignoring(name: str) -> Callable[..., Value]:
    def fn(a: Value, b: Value) -> Value:
        return Op.of("where", _isnan(a), b, Op.of("where", _isnan(b), a, Op.of(name, a, b)))

    return fn


def _masked_fill(x: Value, mask: Value, value: Value | float) -> Value:
    return Op.of("where", truth(mask), value if isinstance(value, Value) else const_like(x, value), x)


def _signbit(x: Value) -> Value:
    if not dtypes.is_float(x.dtype):
        return Op.of("lt", x, const_like(x, 0))
    return Op.of("lt", Op.of("copysign", const_like(x, 1), x), const_like(x, 0))


def _identity(x: Value, *_: object) -> Value:
    return x


def _relu6_like(x: Value, low: float = -1.0, high: float = 1.0) -> Value:
    return _clamp(x, low, high)


ROWS: dict[compat.OpOverload, Row] = {
    aten.add.Tensor: Row(_scaled("add")),
    aten.add.Scalar: Row(_scaled("add")),
    aten.sub.Tensor: Row(_scaled("sub")),
    aten.sub.Scalar: Row(_scaled("sub")),
    aten.rsub.Tensor: Row(_rsub),
    aten.rsub.Scalar: Row(_rsub),
    aten.mul.Tensor: Row(_mul),
    aten.mul.Scalar: Row(_mul),
    aten.div.Tensor: Row(_op("div")),
    aten.div.Scalar: Row(_op("div")),
    aten.div.Tensor_mode: Row(_div_mode),
    aten.div.Scalar_mode: Row(_div_mode),
    aten.floor_divide.default: Row(floor_divide),
    aten.remainder.Tensor: Row(remainder),
    aten.remainder.Scalar: Row(remainder),
    aten.fmod.Tensor: Row(_fmod),
    aten.fmod.Scalar: Row(_fmod),
    aten.neg.default: Row(_op("neg")),
    aten.abs.default: Row(_abs),
    aten.sign.default: Row(_sign),
    aten.sgn.default: Row(_sign),
    aten.signbit.default: Row(_signbit, "keep"),
    aten.reciprocal.default: Row(reciprocal),
    aten.sqrt.default: Row(_op("sqrt")),
    aten.rsqrt.default: Row(rsqrt),
    aten.square.default: Row(_square),
    aten.pow.Tensor_Scalar: Row(pow_scalar, scalars=(1,)),
    aten.pow.Tensor_Tensor: Row(_pow_tensor),
    aten.pow.Scalar: Row(_pow_tensor),
    aten.sigmoid.default: Row(sigmoid),
    aten.silu.default: Row(_silu),
    aten.relu.default: Row(_relu),
    aten.hardtanh.default: Row(_relu6_like, scalars=(1, 2)),
    aten.floor.default: Row(_rounding("floor")),
    aten.ceil.default: Row(_rounding("ceil")),
    aten.trunc.default: Row(_rounding("trunc")),
    aten.round.default: Row(_rounding("round")),
    aten.maximum.default: Row(_op("maximum")),
    aten.minimum.default: Row(_op("minimum")),
    aten.fmax.default: Row(_nan_ignoring("maximum")),
    aten.fmin.default: Row(_nan_ignoring("minimum")),
    aten.clamp.default: Row(_clamp, scalars=(1, 2)),
    aten.clamp.Tensor: Row(_clamp),
    aten.clamp_min.default: Row(_clamp, scalars=(1,)),
    aten.clamp_max.default: Row(lambda x, high: _clamp(x, None, high), scalars=(1,)),
    aten.copysign.Tensor: Row(_op("copysign")),
    aten.copysign.Scalar: Row(_op("copysign")),
    aten.eq.Tensor: Row(_op("eq"), "common"),
    aten.eq.Scalar: Row(_op("eq"), "common"),
    aten.ne.Tensor: Row(_op("ne"), "common"),
    aten.ne.Scalar: Row(_op("ne"), "common"),
    aten.lt.Tensor: Row(_op("lt"), "common"),
    aten.lt.Scalar: Row(_op("lt"), "common"),
    aten.le.Tensor: Row(_op("le"), "common"),
    aten.le.Scalar: Row(_op("le"), "common"),
    aten.gt.Tensor: Row(_op("gt"), "common"),
    aten.gt.Scalar: Row(_op("gt"), "common"),
    aten.ge.Tensor: Row(_op("ge"), "common"),
    aten.ge.Scalar: Row(_op("ge"), "common"),
    aten.isnan.default: Row(_isnan, "keep"),
    aten.isinf.default: Row(_isinf, "keep"),
    aten.logical_and.default: Row(_logical("and"), "keep"),
    aten.logical_or.default: Row(_logical("or"), "keep"),
    aten.logical_xor.default: Row(_logical("xor"), "keep"),
    aten.logical_not.default: Row(_logical("not"), "keep"),
    aten.bitwise_and.Tensor: Row(_integer_only("and")),
    aten.bitwise_and.Scalar: Row(_integer_only("and")),
    aten.bitwise_or.Tensor: Row(_integer_only("or")),
    aten.bitwise_or.Scalar: Row(_integer_only("or")),
    aten.bitwise_xor.Tensor: Row(_integer_only("xor")),
    aten.bitwise_xor.Scalar: Row(_integer_only("xor")),
    aten.bitwise_not.default: Row(_integer_only("not")),
    aten.bitwise_left_shift.Tensor: Row(_integer_only("shl")),
    aten.bitwise_left_shift.Tensor_Scalar: Row(_integer_only("shl")),
    aten.bitwise_right_shift.Tensor: Row(_integer_only("shr")),
    aten.bitwise_right_shift.Tensor_Scalar: Row(_integer_only("shr")),
    aten.__lshift__.Scalar: Row(_integer_only("shl")),
    aten.__rshift__.Scalar: Row(_integer_only("shr")),
    aten.__lshift__.Tensor: Row(_integer_only("shl")),
    aten.__rshift__.Tensor: Row(_integer_only("shr")),
    aten.where.self: Row(_where, "where"),
    aten.where.ScalarSelf: Row(_where, "where"),
    aten.where.ScalarOther: Row(_where, "where"),
    aten.masked_fill.Scalar: Row(_masked_fill, "fill", scalars=(2,)),
    aten.masked_fill.Tensor: Row(_masked_fill, "fill"),
    aten.addcmul.default: Row(_addcmul),
    aten.addcdiv.default: Row(_addcdiv),
    aten.lerp.Scalar: Row(_lerp, scalars=(2,)),
    aten.lerp.Tensor: Row(_lerp),
    aten.threshold.default: Row(_threshold, scalars=(1, 2)),
    aten.threshold_backward.default: Row(_threshold_backward, scalars=(2,)),
    aten.clone.default: Row(_identity),
    aten.lift_fresh_copy.default: Row(_identity),
    aten.contiguous.default: Row(_identity),
    aten._to_copy.default: Row(_identity),
    aten.to.dtype: Row(_identity, scalars=(1, 2, 3, 4)),
    prims.convert_element_type.default: Row(_identity, scalars=(1,)),
    prims.device_put.default: Row(_identity, scalars=(1, 2)),
}
for _name in (
    "exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh erf erfc"
).split():
    ROWS[getattr(aten, _name).default] = Row(_op(_name))
for _name in ("atan2", "hypot"):
    ROWS[getattr(aten, _name).default] = Row(_op(_name))
for _prim, _aten in (
    ("add", "add.Tensor"), ("sub", "sub.Tensor"), ("mul", "mul.Tensor"), ("div", "div.Tensor"), ("neg", "neg.default"),
    ("exp", "exp.default"), ("log", "log.default"), ("sqrt", "sqrt.default"), ("rsqrt", "rsqrt.default"),
    ("tanh", "tanh.default"), ("abs", "abs.default"), ("maximum", "maximum.default"), ("minimum", "minimum.default"),
    ("where", "where.self"), ("eq", "eq.Tensor"), ("ne", "ne.Tensor"), ("lt", "lt.Tensor"), ("le", "le.Tensor"),
    ("gt", "gt.Tensor"), ("ge", "ge.Tensor"), ("erf", "erf.default"), ("cos", "cos.default"), ("sin", "sin.default"),
    ("pow", "pow.Tensor_Tensor"), ("floor", "floor.default"), ("ceil", "ceil.default"), ("sign", "sign.default"),
):  # fmt: skip
    _packet, _overload = _aten.split(".")
    ROWS[getattr(prims, _prim).default] = ROWS[getattr(getattr(aten, _packet), _overload)]

DIVISIONS = frozenset({"truncdiv", "floordiv", "mod", "rem"})

# A number before a tensor, where the order matters or torch has an overload of its own.
for _name in "bitwise_and bitwise_or bitwise_xor bitwise_left_shift bitwise_right_shift remainder".split():
    ROWS[getattr(aten, _name).Scalar_Tensor] = ROWS[getattr(aten, _name).Tensor]


def to_compute(x: Value, dtype: torch.dtype) -> Value:
    """Convert to a dtype, then to what its arithmetic is done in."""
    return Cast.of(dtypes.row(dtype).compute, Cast.of(dtype, x))


def division_checks(value: Value) -> list[Check]:
    """Integer division by zero is an error, as in eager."""
    found = []
    for v in topological([value]):
        if isinstance(v, Op) and v.name in DIVISIONS and not (isinstance(v.args[1], Const) and v.args[1].value):
            nonzero = Op.of("ne", v.args[1], Const.of(0, v.args[1].dtype))
            found.append(Check(nonzero, "ZeroDivisionError"))
    return found
