"""Pointwise ATen operators as rows: what each means in operators of the kernel IR.

A row's function gets its arguments already read, broadcast and converted to the dtype that torch
computes in (`compute` of the common dtype: float32 for half types), and returns one value, which
the lowerer rounds to the result's dtype. Eager rounds a half result once an operator; so do we.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from minifuse import compat
from minifuse.ir import dtypes
from minifuse.ir.kernel import Check
from minifuse.ir.value import Cast, Const, Op, Value, topological


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


def check_dtype(dtype: torch.dtype) -> None:
    """Raises Unsupported for a dtype that kernels do not have."""
    if not dtypes.supported(dtype):
        raise Unsupported(f"{dtype} has no kernels")


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


def _overload(name: str) -> compat.OpOverload:
    """The overload `namespace::name.overload`: ATen's where no namespace is said, the default one without a dot."""
    namespace, _, rest = name.rpartition("::")
    packet, _, overload = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace or "aten"), packet), overload or "default")


def _family(names: str, forms: str, row: Callable[[str], Row]) -> dict[str, Row]:
    """A row for each name, of the overloads that `forms` makes of it."""
    return {forms.format(name): row(name) for name in names.split()}


# A row an operator: all overloads that mean it, and what it is.
_TABLE: dict[str, Row] = {
    "add.Tensor add.Scalar prims::add": Row(_scaled("add")),
    "sub.Tensor sub.Scalar prims::sub": Row(_scaled("sub")),
    "rsub.Tensor rsub.Scalar": Row(_rsub),
    "mul.Tensor mul.Scalar prims::mul": Row(_mul),
    "div.Tensor div.Scalar prims::div": Row(_op("div")),
    "div.Tensor_mode div.Scalar_mode": Row(_div_mode),
    "floor_divide": Row(floor_divide),
    "remainder.Tensor remainder.Scalar remainder.Scalar_Tensor": Row(remainder),
    "fmod.Tensor fmod.Scalar": Row(_fmod),
    "abs prims::abs": Row(_abs),
    "sign sgn prims::sign": Row(_sign),
    "signbit": Row(_signbit, "keep"),
    "reciprocal": Row(reciprocal),
    "rsqrt prims::rsqrt": Row(rsqrt),
    "square": Row(_square),
    "pow.Tensor_Scalar": Row(pow_scalar, scalars=(1,)),
    "pow.Tensor_Tensor pow.Scalar prims::pow": Row(_pow_tensor),
    "sigmoid": Row(sigmoid),
    "silu": Row(_silu),
    "relu": Row(_relu),
    "hardtanh": Row(_relu6_like, scalars=(1, 2)),
    "fmax": Row(_nan_ignoring("maximum")),
    "fmin": Row(_nan_ignoring("minimum")),
    "clamp": Row(_clamp, scalars=(1, 2)),
    "clamp.Tensor": Row(_clamp),
    "clamp_min": Row(_clamp, scalars=(1,)),
    "clamp_max": Row(lambda x, high: _clamp(x, None, high), scalars=(1,)),
    "copysign.Tensor copysign.Scalar": Row(_op("copysign")),
    "isnan": Row(_isnan, "keep"),
    "isinf": Row(_isinf, "keep"),
    "where.self where.ScalarSelf where.ScalarOther prims::where": Row(_where, "where"),
    "masked_fill.Scalar": Row(_masked_fill, "fill", scalars=(2,)),
    "masked_fill.Tensor": Row(_masked_fill, "fill"),
    "addcmul": Row(_addcmul),
    "addcdiv": Row(_addcdiv),
    "lerp.Scalar": Row(_lerp, scalars=(2,)),
    "lerp.Tensor": Row(_lerp),
    "threshold": Row(_threshold, scalars=(1, 2)),
    "threshold_backward": Row(_threshold_backward, scalars=(2,)),
    "clone lift_fresh_copy contiguous _to_copy": Row(_identity),
    "fill.Scalar fill.Tensor": Row(lambda x, number: number),
    "to.dtype": Row(_identity, scalars=(1, 2, 3, 4)),
    "prims::convert_element_type": Row(_identity, scalars=(1,)),
    "prims::device_put": Row(_identity, scalars=(1, 2)),
    **_family("neg sqrt maximum minimum exp log sin cos tanh erf", "{0} prims::{0}", lambda name: Row(_op(name))),
    **_family("exp2 expm1 log2 log10 log1p tan asin acos atan sinh cosh asinh acosh atanh erfc atan2 hypot", "{0}",
              lambda name: Row(_op(name))),
    **_family("eq ne lt le gt ge", "{0}.Tensor {0}.Scalar prims::{0}", lambda name: Row(_op(name), "common")),
    **_family("floor ceil", "{0} prims::{0}", lambda name: Row(_rounding(name))),
    **_family("trunc round", "{0}", lambda name: Row(_rounding(name))),
    **_family("and or xor not", "logical_{0}", lambda name: Row(_logical(name), "keep")),
    **_family("and or xor", "bitwise_{0}.Tensor bitwise_{0}.Scalar bitwise_{0}.Scalar_Tensor",
              lambda name: Row(_integer_only(name))),
    "bitwise_not": Row(_integer_only("not")),
    "bitwise_left_shift.Tensor bitwise_left_shift.Tensor_Scalar bitwise_left_shift.Scalar_Tensor __lshift__.Scalar"
    " __lshift__.Tensor": Row(_integer_only("shl")),
    "bitwise_right_shift.Tensor bitwise_right_shift.Tensor_Scalar bitwise_right_shift.Scalar_Tensor __rshift__.Scalar"
    " __rshift__.Tensor": Row(_integer_only("shr")),
}  # fmt: skip
ROWS: dict[compat.OpOverload, Row] = {_overload(name): row for names, row in _TABLE.items() for name in names.split()}

DIVISIONS = frozenset({"truncdiv", "floordiv", "mod", "rem"})


def joined(op: str, values: Iterable[Value]) -> Value:
    """Values by an operator of two, from the first on."""
    return functools.reduce(lambda a, b: Op.of(op, a, b), values)


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
