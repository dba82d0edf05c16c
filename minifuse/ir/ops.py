"""The op table: one row a pointwise operator of the kernel IR.

A row says how many arguments the operator takes, what dtype it gives, what it means (a torch
function, which the interpreter calls), its text in each target, what an element costs in
instructions, and how near a target's result must be to the interpreter's. A new pointwise operator
is one row here, and one in `passes/lower/pointwise.py` that says which ATen operators it stands for.

Text templates: `{0}`, `{1}`… are the argument texts. In C an argument is a scalar or a vector of 16
lanes of one element type, and operators work on both. A template starting with `@` names a helper
that exists once a dtype, for vectors: `@exp` is `mf_exp_f32(…)`; scalars go through the vector
helper, so that a value's bits do not depend on whether its kernel had lanes for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import dtypes

# Instructions of a Philox4x32-10 draw: ten rounds of two wide products and four xors, vectorised.
RANDOM_COST = 40.0
# Of a load where a mask holds: the mask, and a vector filled in part.
MASKED_COST = 2.0


@dataclass(frozen=True)
class OpRow:
    """One pointwise operator.

    `rule`: "same" (all arguments of one dtype, which the result has), "bool" (arguments of one
    dtype, a bool result), "where" (a bool, then two of one dtype). `kinds` holds the letters of what
    it takes: f floating, i integer, b bool. `ulp`: the largest error against the
    correctly rounded result in units in the last place; 0 means bit for bit.
    """

    name: str
    arity: int
    rule: str
    kinds: str
    meaning: Callable[..., torch.Tensor]
    c: str
    triton: str
    cost: float = 1
    ulp: float = 0


_T = torch


def _shift(fn: Callable, fill: Callable) -> Callable:
    """Shifts by a negative amount or by the width or more give `fill`, as in torch."""

    def meaning(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        bits = torch.iinfo(a.dtype).bits
        bad = (b < 0) | (b >= bits)
        return torch.where(bad, fill(a), fn(a, torch.where(bad, torch.zeros_like(b), b)))

    return meaning


def _lib(name: str, meaning: Callable, cost: float, arity: int = 1, ulp: float = 4) -> OpRow:
    """An operator from a vector maths library."""
    args = ", ".join("{%d}" % i for i in range(arity))
    return OpRow(name, arity, "same", "f", meaning, "@" + name, f"libdevice.{name}({args})", cost, ulp)


_ROWS: tuple[OpRow, ...] = (
    OpRow("add", 2, "same", "fi", _T.add, "({0} + {1})", "({0} + {1})"),
    OpRow("sub", 2, "same", "fi", _T.sub, "({0} - {1})", "({0} - {1})"),
    OpRow("mul", 2, "same", "fi", _T.mul, "({0} * {1})", "({0} * {1})"),
    OpRow("div", 2, "same", "f", _T.div, "({0} / {1})", "tl.div_rn({0}, {1})", 8),
    OpRow("neg", 1, "same", "fi", _T.neg, "(-{0})", "(-{0})"),
    OpRow("abs", 1, "same", "fi", _T.abs, "@abs", "tl.abs({0})"),
    OpRow("truncdiv", 2, "same", "i", lambda a, b: _T.div(a, b, rounding_mode="trunc"), "@truncdiv", "mf.truncdiv({0}, {1})", 20),
    OpRow("floordiv", 2, "same", "i", lambda a, b: _T.div(a, b, rounding_mode="floor"), "@floordiv", "mf.floordiv({0}, {1})", 22),
    OpRow("mod", 2, "same", "i", _T.remainder, "@mod", "mf.mod({0}, {1})", 22),
    OpRow("rem", 2, "same", "i", _T.fmod, "@rem", "mf.rem({0}, {1})", 20),
    OpRow("fmod", 2, "same", "f", _T.fmod, "@fmod", "libdevice.fmod({0}, {1})", 30),
    OpRow("sqrt", 1, "same", "f", _T.sqrt, "@sqrt", "tl.sqrt_rn({0})", 8),
    OpRow("floor", 1, "same", "f", _T.floor, "@floor", "tl.floor({0})"),
    OpRow("ceil", 1, "same", "f", _T.ceil, "@ceil", "tl.ceil({0})"),
    OpRow("trunc", 1, "same", "f", _T.trunc, "@trunc", "libdevice.trunc({0})"),
    OpRow("round", 1, "same", "f", _T.round, "@round", "libdevice.rint({0})"),
    OpRow("copysign", 2, "same", "f", _T.copysign, "@copysign", "libdevice.copysign({0}, {1})", 2),
    OpRow("maximum", 2, "same", "fib", _T.maximum, "@maximum", "mf.maximum({0}, {1})", 2),
    OpRow("minimum", 2, "same", "fib", _T.minimum, "@minimum", "mf.minimum({0}, {1})", 2),
    OpRow("logaddexp", 2, "same", "f", _T.logaddexp, "@logaddexp", "mf.logaddexp({0}, {1})", 40, 4),
    OpRow("eq", 2, "bool", "fib", _T.eq, "@eq", "({0} == {1})"),
    OpRow("ne", 2, "bool", "fib", _T.ne, "@ne", "({0} != {1})"),
    OpRow("lt", 2, "bool", "fib", _T.lt, "@lt", "({0} < {1})"),
    OpRow("le", 2, "bool", "fib", _T.le, "@le", "({0} <= {1})"),
    OpRow("gt", 2, "bool", "fib", _T.gt, "@gt", "({0} > {1})"),
    OpRow("ge", 2, "bool", "fib", _T.ge, "@ge", "({0} >= {1})"),
    OpRow("and", 2, "same", "ib", _T.bitwise_and, "({0} & {1})", "({0} & {1})"),
    OpRow("or", 2, "same", "ib", _T.bitwise_or, "({0} | {1})", "({0} | {1})"),
    OpRow("xor", 2, "same", "ib", _T.bitwise_xor, "({0} ^ {1})", "({0} ^ {1})"),
    OpRow("not", 1, "same", "ib", _T.bitwise_not, "@not", "mf.invert({0})"),
    OpRow("shl", 2, "same", "i", _shift(_T.bitwise_left_shift, _T.zeros_like), "@shl", "mf.shl({0}, {1})", 3),
    OpRow("shr", 2, "same", "i", _shift(_T.bitwise_right_shift, lambda a: -(a < 0).to(a.dtype)), "@shr", "mf.shr({0}, {1})", 3),
    OpRow("where", 3, "where", "fib", _T.where, "@where", "tl.where({0}, {1}, {2})"),
    _lib("exp", _T.exp, 12),
    _lib("exp2", _T.exp2, 12),
    _lib("expm1", _T.expm1, 20),
    _lib("log", _T.log, 16),
    _lib("log2", _T.log2, 16),
    _lib("log10", _T.log10, 16),
    _lib("log1p", _T.log1p, 20),
    _lib("sin", _T.sin, 20),
    _lib("cos", _T.cos, 20),
    _lib("tan", _T.tan, 30),
    _lib("asin", _T.asin, 25),
    _lib("acos", _T.acos, 25),
    _lib("atan", _T.atan, 25),
    _lib("sinh", _T.sinh, 30),
    _lib("cosh", _T.cosh, 30),
    _lib("tanh", _T.tanh, 25),
    _lib("asinh", _T.asinh, 30),
    _lib("acosh", _T.acosh, 30),
    _lib("atanh", _T.atanh, 30),
    _lib("erf", _T.erf, 25),
    _lib("erfc", _T.erfc, 40),
    _lib("pow", _T.pow, 60, arity=2),
    _lib("atan2", _T.atan2, 40, arity=2),
    _lib("hypot", _T.hypot, 30, arity=2),
)  # fmt: skip

TABLE: dict[str, OpRow] = {row.name: row for row in _ROWS}


def row(name: str) -> OpRow:
    """The row of an operator. Raises KeyError that lists the known ones."""
    try:
        return TABLE[name]
    except KeyError:
        raise KeyError(f"no operator {name!r} in the table; known: {', '.join(sorted(TABLE))}") from None


def kind_of(dtype: torch.dtype) -> str:
    """The letter of `OpRow.kinds` for a dtype."""
    if dtype is torch.bool:
        return "b"
    return "f" if dtypes.is_float(dtype) else "i"


class DtypeError(TypeError):
    """An operator of the table was given a dtype that its row does not take."""


def result_dtype(name: str, args: tuple[torch.dtype, ...]) -> torch.dtype:
    """The dtype that an operator gives. Raises TypeError saying what was found and expected: DtypeError where another
    dtype would do."""
    r = row(name)
    if len(args) != r.arity:
        raise TypeError(f"{name} takes {r.arity} arguments, found {len(args)}")
    values = args
    if r.rule == "where":
        if args[0] is not torch.bool:
            raise TypeError(f"{name} chooses by a bool, found {args[0]}")
        values = args[1:]
    if len(set(values)) != 1:
        raise TypeError(f"{name} takes arguments of one dtype, found {', '.join(map(str, args))}")
    if kind_of(values[0]) not in r.kinds:
        raise DtypeError(
            f"{name} takes dtypes of kind {r.kinds!r}, found {values[0]} (f: floating, i: integer, b: bool)"
        )
    if dtypes.is_half(values[0]) and r.rule == "same":
        raise TypeError(f"{name} on {values[0]} must be written in float32 with casts around it")
    return torch.bool if r.rule == "bool" else values[0]


@dataclass(frozen=True)
class ReduceRow:
    """One kind of reduction: how many values it carries, its identity, its meaning, and that of its running results.

    `combine` names the operator of the table that joins two partial results (what carries several values has its own
    helper in each target; `identity` is that of the first). `element` says what one element is as a partial result,
    None where it stands itself: a reduction that has it takes elements, or as many arguments as it carries values.
    `cost` is instructions an element.
    """

    name: str
    results: int
    combine: str
    identity: Callable[[torch.dtype], Any]
    meaning: Callable[..., Any]
    scan: Callable[..., torch.Tensor] | None = None
    element: tuple[float | None, ...] = ()
    cost: float = 1


def _lowest(dtype: torch.dtype) -> Any:
    if dtype is torch.bool:
        return False
    return float("-inf") if dtypes.is_float(dtype) else torch.iinfo(dtype).min


def _highest(dtype: torch.dtype) -> Any:
    if dtype is torch.bool:
        return True
    return float("inf") if dtypes.is_float(dtype) else torch.iinfo(dtype).max


def _arg(fn: Callable) -> Callable:
    def meaning(values: torch.Tensor, index: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        at = fn(values, dim, keepdim=True)
        return values.gather(dim, at), index.expand_as(values).gather(dim, at)

    return meaning


def _softmax(x: torch.Tensor, *more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The maximum, and the sum of exponentials of what lies how far below it: 0 where nothing is over -inf."""
    *weights, dim = more
    most = x.amax(dim, True)
    e = _T.exp(x - most.masked_fill(most == float("-inf"), 0))
    return most, (e * weights[0] if weights else e).sum(dim, True)


def _welford(*given: Any) -> tuple[torch.Tensor, ...]:
    """How many there are, their mean, and the sum of squares about it."""
    *parts, dim = given
    n, mean, squares = parts if len(parts) > 1 else (_T.ones_like(parts[0]), parts[0], _T.zeros_like(parts[0]))
    total = n.sum(dim, True)
    centre = (n * mean).sum(dim, True) / total.clamp(min=1)
    return total, centre, (squares + n * (mean - centre).square()).sum(dim, True)


def _in_its_dtype(fn: Callable, **given: Any) -> Callable:
    return lambda a, dim: fn(a, dim, dtype=a.dtype, **given)


REDUCTIONS: dict[str, ReduceRow] = {
    r.name: r
    for r in (
        ReduceRow("sum", 1, "add", lambda d: 0, _in_its_dtype(_T.sum, keepdim=True), _in_its_dtype(_T.cumsum)),
        ReduceRow("prod", 1, "mul", lambda d: 1, _in_its_dtype(_T.prod, keepdim=True), _in_its_dtype(_T.cumprod)),
        ReduceRow("max", 1, "maximum", _lowest, lambda a, dim: a.amax(dim, True), lambda a, dim: a.cummax(dim).values),
        ReduceRow("min", 1, "minimum", _highest, lambda a, dim: a.amin(dim, True), lambda a, dim: a.cummin(dim).values),
        ReduceRow("logsumexp", 1, "logaddexp", _lowest, lambda a, dim: a.logsumexp(dim, True), _T.logcumsumexp),
        ReduceRow("any", 1, "or", lambda d: False, lambda a, dim: a.any(dim, keepdim=True)),
        ReduceRow("all", 1, "and", lambda d: True, lambda a, dim: a.all(dim, keepdim=True)),
        ReduceRow("argmax", 2, "argmax", _lowest, _arg(torch.argmax)),
        ReduceRow("argmin", 2, "argmin", _highest, _arg(torch.argmin)),
        # One walk over a row gives what a softmax needs (Milakov and Gimelshein, "Online normalizer calculation for
        # softmax", 2018), or a norm (Welford, 1962; joined as Chan, Golub and LeVeque, 1983, join).
        ReduceRow("softmax", 2, "softmax", _lowest, _softmax, element=(None, 1.0), cost=16),
        ReduceRow("welford", 3, "welford", lambda d: 0, _welford, element=(1.0, None, 0.0), cost=4),
    )
}
