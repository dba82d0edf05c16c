"""Values of the kernel IR: typed, immutable, interned (DESIGN.md, section 3).

Two values with the same meaning are one object, so common subexpressions are found when they are built.
Every constructor checks what it is given; a wrong value cannot exist.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

import torch

from . import dtypes, ops
from .index import Axis, Expr, FloorDiv, Mod, as_expr

_values: weakref.WeakValueDictionary[tuple, Value] = weakref.WeakValueDictionary()
NO_AXES: frozenset[Axis] = frozenset()
Part = TypeVar("Part")


def _among(fields: Iterable[Any], kind: type[Part]) -> list[Part]:
    """What of a kind is among fields, themselves or in a tuple."""
    found: list[Part] = []
    for f in fields:
        if isinstance(f, kind):
            found.append(f)
        elif type(f) is tuple:
            found += [x for x in f if isinstance(x, kind)]
    return found


def _field(i: int) -> Any:
    """A name for entry `i` of `Value.fields`."""
    return property(lambda self: self.fields[i])


class Value:
    """A typed value that varies over `axes`; immutable and interned, so `is` compares meaning. `args` are the values
    that it is computed from: those among its fields, in order."""

    __slots__ = ("__weakref__", "args", "axes", "dtype", "fields")
    args: tuple[Value, ...]
    dtype: torch.dtype
    axes: frozenset[Axis]
    fields: tuple[Any, ...]

    @classmethod
    def _make(cls, fields: tuple, dtype: torch.dtype, axes: frozenset[Axis]) -> Any:
        key = (cls, fields, dtype)
        found = _values.get(key)
        if found is None:
            found = object.__new__(cls)
            found.fields, found.dtype, found.axes = fields, dtype, axes
            found.args = tuple(_among(fields, Value))
            _values[key] = found
        return found

    @property
    def exprs(self) -> list[Expr]:
        """The index expressions that it is made of, in order."""
        return _among(self.fields, Expr)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self)._make, (self.fields, self.dtype, self.axes)

    def rebuild(self, args: tuple[Value, ...], index: Callable[[Expr], Expr]) -> Value:
        """The same value over other arguments, with every index expression mapped."""
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__.lower()}{self.fields}: {dtypes.name(self.dtype)}"


Index = Expr | Value


def same_axis(e: Expr, how: str) -> Axis:
    """What an axis that is run over in order has become. Raises ValueError for what is no axis."""
    if not isinstance(e.atom, Axis):
        raise ValueError(f"a {how} axis must stay an axis, found {e}")
    return e.atom


def index_axes(index: Iterable[Index]) -> frozenset[Axis]:
    found = NO_AXES
    for i in index:
        found = found | (i.axes() if isinstance(i, Expr) else i.axes)
    return found


class Load(Value):
    """An element of a parameter at a logical index: an expression or a loaded integer a dimension.

    Where `mask` is false nothing is read and the value is `other`.
    """

    __slots__ = ()
    fields: tuple[str, tuple[Index, ...], Value | None, Value | None]

    @staticmethod
    def of(
        param: str,
        index: Iterable[Index],
        dtype: torch.dtype,
        mask: Value | None = None,
        other: Value | None = None,
    ) -> Load:
        index = tuple(index)
        axes = index_axes(index)
        if (mask is None) != (other is None):
            raise TypeError(f"load {param}: a mask needs an other value, and the reverse")
        if mask is not None and other is not None:
            if mask.dtype is not torch.bool or other.dtype is not dtype:
                raise TypeError(f"load {param}: expected a bool mask and a {dtype} other")
            axes = axes | mask.axes | other.axes
        return Load._make((param, index, mask, other), dtype, axes)

    param: str = _field(0)
    index: tuple[Index, ...] = _field(1)
    mask: Value | None = _field(2)
    other: Value | None = _field(3)

    def rebuild(self, args: tuple[Value, ...], index: Callable[[Expr], Expr]) -> Value:
        rest = iter(args)
        at = tuple(next(rest) if isinstance(i, Value) else index(i) for i in self.index)
        return Load.of(self.param, at, self.dtype, *rest)

    def rename(self, param: str) -> Load:
        return Load.of(param, self.index, self.dtype, self.mask, self.other)


class Const(Value):
    """A literal of the dtype; -0.0, infinities and NaN keep their identity."""

    __slots__ = ()
    fields: tuple[str, Any]

    @staticmethod
    def of(value: Any, dtype: torch.dtype) -> Const:
        if dtypes.is_float(dtype):
            value = float(value)
        elif dtype is torch.bool:
            value = bool(value)
        else:
            value = int(value)
            info = torch.iinfo(dtype)
            span = 1 << info.bits
            value = (value - info.min) % span + info.min
        return Const._make((repr(value), _Literal(value)), dtype, NO_AXES)

    @property
    def value(self) -> Any:
        return self.fields[1].value


class _Literal:
    """Wraps a constant so that -0.0 == 0.0 and nan != nan do not confuse the intern table."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Literal) and repr(self.value) == repr(other.value)

    def __hash__(self) -> int:
        return hash(repr(self.value))

    def __repr__(self) -> str:
        return repr(self.value)


class IndexOf(Value):
    """An integer expression of axes and sizes as a value (`SizeOf` where it has no axes)."""

    __slots__ = ()
    fields: tuple[Expr]

    @staticmethod
    def of(expr: Expr | int, dtype: torch.dtype = torch.int64) -> IndexOf:
        expr = as_expr(expr)
        if dtype not in (torch.int64, torch.int32):
            raise TypeError(f"an index is int64 or int32, found {dtype}")
        return IndexOf._make((expr,), dtype, expr.axes())

    expr: Expr = _field(0)

    def rebuild(self, args: tuple[Value, ...], index: Callable[[Expr], Expr]) -> Value:
        return IndexOf.of(index(self.expr), self.dtype)


class Op(Value):
    """A row of the op table applied to arguments."""

    __slots__ = ()
    fields: tuple[str, tuple[Value, ...]]

    @staticmethod
    def of(name: str, *args: Value) -> Op:
        dtype = ops.result_dtype(name, tuple(a.dtype for a in args))
        return Op._make((name, args), dtype, index_axes(args))

    name: str = _field(0)

    def rebuild(self, args: tuple[Value, ...], index: Callable[[Expr], Expr]) -> Value:
        return Op.of(self.name, *args)


class Cast(Value):
    """A conversion, rounding as torch does; casts to a half type round even in registers."""

    __slots__ = ()
    fields: tuple[Value]

    @staticmethod
    def of(dtype: torch.dtype, arg: Value) -> Value:
        if arg.dtype is dtype:
            return arg
        if dtypes.is_half(dtype) and isinstance(arg, Cast) and arg.arg.dtype is dtype and arg.dtype is torch.float32:
            return arg.arg  # widening is exact, so rounding again gives the same number
        if isinstance(arg, Const) and (not dtypes.is_half(dtype)) and _const_casts(arg.value, dtype):
            held = dtypes.rounded(arg.value, arg.dtype) if isinstance(arg.value, float) else arg.value
            return Const.of(held, dtype)
        return Cast._make((arg,), dtype, arg.axes)

    arg: Value = _field(0)

    def rebuild(self, args: tuple[Value, ...], index: Callable[[Expr], Expr]) -> Value:
        return Cast.of(self.dtype, args[0])


def _const_casts(value: Any, dtype: torch.dtype) -> bool:
    """Whether a literal converts without a question (no float to integer out of range)."""
    if dtypes.is_float(dtype) or dtype is torch.bool:
        return True
    return not isinstance(value, float) or (value == value and abs(value) < 2**31)


RandomKind = Literal["uniform", "normal", "bits"]


class Random(Value):
    """A number drawn by Philox4x32-10 (Salmon et al., SC 2011) at a logical linear index.

    `seed` is an int64 value, `offset` tells streams of one seed apart. "uniform" is float32 in
    [0, 1) with 24 bits, "normal" float32 by Box-Muller, "bits" an int64 of 64 random bits. A block of Philox has four
    words, for as many uniform numbers that follow each other, or two of the others.
    """

    __slots__ = ()
    fields: tuple[RandomKind, Value, int, Expr]

    @staticmethod
    def of(kind: RandomKind, seed: Value, offset: int, index: Expr) -> Random:
        if kind not in ("uniform", "normal", "bits"):
            raise ValueError(f"expected uniform, normal or bits, found {kind!r}")
        if seed.dtype is not torch.int64:
            raise TypeError(f"a seed is int64, found {seed.dtype}")
        dtype = torch.int64 if kind == "bits" else torch.float32
        return Random._make((kind, seed, offset, index), dtype, seed.axes | index.axes())

    kind: RandomKind = _field(0)
    seed: Value = _field(1)
    offset: int = _field(2)
    index: Expr = _field(3)

    def rebuild(self, args: tuple[Value, ...], index: Callable[[Expr], Expr]) -> Value:
        return Random.of(self.kind, args[0], self.offset, index(self.index))


LANES = 16
ROW_CHUNK = 4096
COLUMN_CHUNK = 64
LONG_ROW = 16_384
"""The longest row that both targets hold between two passes: in a core's cache, in a program's registers. The
statistics of a longer one, where its length is known, are found in one walk."""


class Reduce(Value):
    """A reduction of its arguments over one axis; over several axes it is a nest of these.

    The tree is part of the meaning, so that no schedule can change a bit. Element k goes to
    partial result `k % lanes` of chunk `k // chunk`; a partial result folds its elements in order
    from the identity; partial results of a chunk join by halves (p with p + lanes/2, and so on);
    the chunks' results are reduced in turn as a column. `lanes` is 16 where the reduced dimension
    was the innermost in memory when lowered ("row"), else 1 ("column").

    A kind that joins several values ("softmax", "welford") keeps a chunk of a row and passes over it more than once;
    how that sums is each target's. Its argument is an element, or its arguments are partial results.
    """

    __slots__ = ()
    fields: tuple[str, tuple[Value, ...], Axis, int]

    @staticmethod
    def of(kind: str, args: Iterable[Value], over: Axis, lanes: int = LANES) -> Reduce:
        args = tuple(args)
        if kind not in ops.REDUCTIONS:
            raise KeyError(f"no reduction {kind!r}; known: {', '.join(ops.REDUCTIONS)}")
        row = ops.REDUCTIONS[kind]
        if len(args) != row.results and not (row.element and len(args) == 1):
            raise TypeError(f"{kind} takes {row.results} values, found {len(args)}")
        if row.element and (not dtypes.is_float(args[0].dtype) or len({a.dtype for a in args}) > 1):
            raise TypeError(f"{kind} takes floats of one dtype, found {', '.join(str(a.dtype) for a in args)}")
        if lanes not in (1, LANES):
            raise ValueError(f"a reduction has 1 or {LANES} lanes, found {lanes}")
        if dtypes.is_half(args[0].dtype):
            raise TypeError(f"{kind} on {args[0].dtype} must accumulate in float32 with casts around")
        return Reduce._make((kind, args, over, lanes), args[0].dtype, index_axes(args) - {over})

    kind: str = _field(0)

    over: Axis = _field(2)
    lanes: int = _field(3)

    @property
    def results(self) -> int:
        """How many values it gives, each with a `Pick` where there are several."""
        return ops.REDUCTIONS[self.kind].results

    @property
    def parts(self) -> tuple[Value, ...]:
        """Its arguments as partial results: one value for each that it gives."""
        if len(self.args) == self.results:
            return self.args
        element = ops.REDUCTIONS[self.kind].element
        return tuple(self.args[0] if e is None else Const.of(e, self.dtype) for e in element)

    @property
    def chunk(self) -> int:
        return ROW_CHUNK if self.lanes > 1 else COLUMN_CHUNK

    def rebuild(self, args: tuple[Value, ...], index: Callable[[Expr], Expr]) -> Value:
        return Reduce.of(self.kind, args, same_axis(index(self.over.expr), "reduced"), self.lanes)


class Scan(Value):
    """The running reduction of its argument along an axis: at k what elements 0..k give together.

    As with `Reduce` the order is part of the meaning. With 1 lane each element joins the running result in turn, from
    the identity. With 16, where the scanned dimension was the innermost in memory when lowered, elements are taken 16
    at a time: element p joins p-1, then p-2, p-4 and p-8 (Hillis and Steele, "Data Parallel Algorithms", 1986), and
    the running result of what lies before joins all of them.
    """

    __slots__ = ()
    fields: tuple[str, Value, Axis, int]

    @staticmethod
    def of(kind: str, arg: Value, over: Axis, lanes: int = LANES) -> Scan:
        if kind not in ops.REDUCTIONS or ops.REDUCTIONS[kind].scan is None:
            known = ", ".join(k for k, row in ops.REDUCTIONS.items() if row.scan is not None)
            raise KeyError(f"no scan {kind!r}; known: {known}")
        if lanes not in (1, LANES):
            raise ValueError(f"a scan has 1 or {LANES} lanes, found {lanes}")
        if dtypes.is_half(arg.dtype):
            raise TypeError(f"{kind} on {arg.dtype} must accumulate in float32 with casts around")
        return Scan._make((kind, arg, over, lanes), arg.dtype, arg.axes | {over})

    kind: str = _field(0)
    arg: Value = _field(1)
    over: Axis = _field(2)
    lanes: int = _field(3)

    def rebuild(self, args: tuple[Value, ...], index: Callable[[Expr], Expr]) -> Value:
        return Scan.of(self.kind, args[0], same_axis(index(self.over.expr), "scanned"), self.lanes)


class Pick(Value):
    """Result `i` of a value with several results."""

    __slots__ = ()
    fields: tuple[Reduce, int]

    @staticmethod
    def of(value: Reduce, i: int) -> Pick:
        if not 0 <= i < value.results:
            raise IndexError(f"pick {i} of {value.results} results")
        return Pick._make((value, i), value.parts[i].dtype, value.axes)

    value: Reduce = _field(0)
    i: int = _field(1)

    def rebuild(self, args: tuple[Value, ...], index: Callable[[Expr], Expr]) -> Value:
        assert isinstance(args[0], Reduce)
        return Pick.of(args[0], self.i)


def topological(roots: Iterable[Value]) -> list[Value]:
    """Values reachable from the roots, arguments first. Iterative, so that depth is no limit."""
    done: dict[Value, None] = {}
    for root in roots:
        stack = [root]
        while stack:
            v = stack[-1]
            waiting = v.args and v not in done and [a for a in v.args if a not in done]
            if waiting:
                stack.extend(reversed(waiting))
            else:
                done[stack.pop()] = None
    return list(done)


def at_values(e: Expr, env: Mapping[Any, Expr], values: Mapping[Axis, Value]) -> Index:
    """An index expression with axes replaced by expressions and some of them by computed integers."""

    def is_free(part: Expr) -> bool:
        return values.keys().isdisjoint(part.atoms())

    def as_value(part: Expr) -> Value:
        made = at_values(part, env, values)
        return made if isinstance(made, Value) else IndexOf.of(made)

    if is_free(e):
        return e.substitute(env)
    rest, total = as_expr(0), None
    for mono, coef in e.terms:
        factor, term = as_expr(coef), None
        for a in mono:
            if is_free(a.expr):
                factor = factor * a.expr.substitute(env)
                continue
            part: Value
            if isinstance(a, (FloorDiv, Mod)):
                part = Op.of("floordiv" if isinstance(a, FloorDiv) else "mod", as_value(a.num), as_value(a.den))
            else:
                part = values[a]  # type: ignore[index]
            term = part if term is None else Op.of("mul", term, part)
        if term is None:
            rest = rest + factor
            continue
        if factor is not as_expr(1):
            term = Op.of("mul", term, IndexOf.of(factor))
        total = term if total is None else Op.of("add", total, term)
    assert total is not None
    return total if rest is as_expr(0) else Op.of("add", total, IndexOf.of(rest))
