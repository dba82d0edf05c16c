"""The kernel IR: values, kernels, schedules and plans (DESIGN.md, section 3).

A `Kernel` says what is computed: axes, parameters (the buffers that it touches), and a body of
stores and checks whose values form a graph. A `Schedule` says how: which loops, in which order,
which of them are the parallel grid and which one is the vector lane. A `Plan` is a sequence of
steps over buffers.

Values are interned: two values with the same meaning are one object, so common subexpressions are
found when they are built. Every constructor checks what it is given; a wrong kernel cannot exist.
"""

from __future__ import annotations

import hashlib
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch

from . import dtypes, ops
from .index import Axis, Expr, Sym, as_expr, contiguous_strides, linearize, product

_values: weakref.WeakValueDictionary[tuple, Value] = weakref.WeakValueDictionary()
NO_AXES: frozenset[Axis] = frozenset()


# -- values -----------------------------------------------------------------------------------------
class Value:
    """A typed value that varies over `axes`; immutable and interned, so `is` compares meaning."""

    __slots__ = ("__weakref__", "axes", "dtype", "fields")
    dtype: torch.dtype
    axes: frozenset[Axis]
    fields: tuple[Any, ...]
    names: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def _make(cls, fields: tuple, dtype: torch.dtype, axes: frozenset[Axis]) -> Any:
        key = (cls, fields, dtype)
        found = _values.get(key)
        if found is None:
            found = object.__new__(cls)
            found.fields, found.dtype, found.axes = fields, dtype, axes
            _values[key] = found
        return found

    @property
    def args(self) -> tuple[Value, ...]:
        """The values that this one is computed from, in order."""
        return ()

    def rebuild(self, args: tuple[Value, ...], index: Callable[[Expr], Expr]) -> Value:
        """The same value over other arguments, with every index expression mapped."""
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__.lower()}{self.fields}: {dtypes.name(self.dtype)}"


Index = Expr | Value


def _index_axes(index: Iterable[Index]) -> frozenset[Axis]:
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
        if (mask is None) != (other is None):
            raise TypeError(f"load {param}: a mask needs an other value, and the reverse")
        if mask is not None and other is not None:
            if mask.dtype is not torch.bool or other.dtype is not dtype:
                raise TypeError(f"load {param}: expected a bool mask and a {dtype} other")
        axes = _index_axes(index)
        for v in (mask, other):
            axes = axes if v is None else axes | v.axes
        return Load._make((param, index, mask, other), dtype, axes)

    @property
    def param(self) -> str:
        return self.fields[0]

    @property
    def index(self) -> tuple[Index, ...]:
        return self.fields[1]

    @property
    def mask(self) -> Value | None:
        return self.fields[2]

    @property
    def other(self) -> Value | None:
        return self.fields[3]

    @property
    def args(self) -> tuple[Value, ...]:
        found = tuple(i for i in self.index if isinstance(i, Value))
        if self.mask is not None and self.other is not None:
            found += (self.mask, self.other)
        return found

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

    @property
    def expr(self) -> Expr:
        return self.fields[0]

    def rebuild(self, args: tuple[Value, ...], index: Callable[[Expr], Expr]) -> Value:
        return IndexOf.of(index(self.expr), self.dtype)


class Op(Value):
    """A row of the op table applied to arguments."""

    __slots__ = ()
    fields: tuple[str, tuple[Value, ...]]

    @staticmethod
    def of(name: str, *args: Value) -> Op:
        dtype = ops.result_dtype(name, tuple(a.dtype for a in args))
        axes = NO_AXES
        for a in args:
            axes = axes | a.axes
        return Op._make((name, args), dtype, axes)

    @property
    def name(self) -> str:
        return self.fields[0]

    @property
    def args(self) -> tuple[Value, ...]:
        return self.fields[1]

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
            return Const.of(_round_const(arg.value, arg.dtype), dtype)
        return Cast._make((arg,), dtype, arg.axes)

    @property
    def arg(self) -> Value:
        return self.fields[0]

    @property
    def args(self) -> tuple[Value, ...]:
        return self.fields

    def rebuild(self, args: tuple[Value, ...], index: Callable[[Expr], Expr]) -> Value:
        return Cast.of(self.dtype, args[0])


def _const_casts(value: Any, dtype: torch.dtype) -> bool:
    """Whether a literal converts without a question (no float to integer out of range)."""
    if dtypes.is_float(dtype) or dtype is torch.bool:
        return True
    return not isinstance(value, float) or (value == value and abs(value) < 2**31)


def _round_const(value: Any, dtype: torch.dtype) -> Any:
    return torch.tensor(value, dtype=dtype).item() if isinstance(value, float) else value


RandomKind = Literal["uniform", "normal", "bits"]


class Random(Value):
    """A number drawn by Philox4x32-10 (Salmon et al., SC 2011) at a logical linear index.

    `seed` is an int64 value, `offset` tells streams of one seed apart. "uniform" is float32 in
    [0, 1) with 24 bits, "normal" float32 by Box-Muller, "bits" an int64 of 64 random bits.
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

    @property
    def kind(self) -> RandomKind:
        return self.fields[0]

    @property
    def seed(self) -> Value:
        return self.fields[1]

    @property
    def offset(self) -> int:
        return self.fields[2]

    @property
    def index(self) -> Expr:
        return self.fields[3]

    @property
    def args(self) -> tuple[Value, ...]:
        return (self.seed,)

    def rebuild(self, args: tuple[Value, ...], index: Callable[[Expr], Expr]) -> Value:
        return Random.of(self.kind, args[0], self.offset, index(self.index))


LANES = 16
ROW_CHUNK = 4096
COLUMN_CHUNK = 128


class Reduce(Value):
    """A reduction of its arguments over one axis; over several axes it is a nest of these.

    The tree is part of the meaning, so that no schedule can change a bit. Element k goes to
    partial result `k % lanes` of chunk `k // chunk`; a partial result folds its elements in order
    from the identity; partial results of a chunk join by halves (p with p + lanes/2, and so on);
    the chunks' results are reduced in turn as a column. `lanes` is 16 where the reduced dimension
    was the innermost in memory when lowered ("row"), else 1 ("column").
    """

    __slots__ = ()
    fields: tuple[str, tuple[Value, ...], Axis, int]

    @staticmethod
    def of(kind: str, args: Iterable[Value], over: Axis, lanes: int = LANES) -> Reduce:
        args = tuple(args)
        if kind not in ops.REDUCTIONS:
            raise KeyError(f"no reduction {kind!r}; known: {', '.join(ops.REDUCTIONS)}")
        if len(args) != ops.REDUCTIONS[kind].results:
            raise TypeError(f"{kind} takes {ops.REDUCTIONS[kind].results} values, found {len(args)}")
        if lanes not in (1, LANES):
            raise ValueError(f"a reduction has 1 or {LANES} lanes, found {lanes}")
        if dtypes.is_half(args[0].dtype):
            raise TypeError(f"{kind} on {args[0].dtype} must accumulate in float32 with casts around")
        axes = NO_AXES
        for a in args:
            axes = axes | a.axes
        return Reduce._make((kind, args, over, lanes), args[0].dtype, axes - {over})

    @property
    def kind(self) -> str:
        return self.fields[0]

    @property
    def args(self) -> tuple[Value, ...]:
        return self.fields[1]

    @property
    def over(self) -> Axis:
        return self.fields[2]

    @property
    def lanes(self) -> int:
        return self.fields[3]

    @property
    def chunk(self) -> int:
        return ROW_CHUNK if self.lanes > 1 else COLUMN_CHUNK

    def rebuild(self, args: tuple[Value, ...], index: Callable[[Expr], Expr]) -> Value:
        over = index(self.over.expr).atom
        if not isinstance(over, Axis):
            raise ValueError(f"a reduced axis must stay an axis, found {index(self.over.expr)}")
        return Reduce.of(self.kind, args, over, self.lanes)


class Pick(Value):
    """Result `i` of a value with several results."""

    __slots__ = ()
    fields: tuple[Reduce, int]

    @staticmethod
    def of(value: Reduce, i: int) -> Pick:
        if not 0 <= i < len(value.args):
            raise IndexError(f"pick {i} of {len(value.args)} results")
        return Pick._make((value, i), value.args[i].dtype, value.axes)

    @property
    def value(self) -> Reduce:
        return self.fields[0]

    @property
    def i(self) -> int:
        return self.fields[1]

    @property
    def args(self) -> tuple[Value, ...]:
        return (self.value,)

    def rebuild(self, args: tuple[Value, ...], index: Callable[[Expr], Expr]) -> Value:
        assert isinstance(args[0], Reduce)
        return Pick.of(args[0], self.i)


# -- kernels ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Store:
    """Write a value into a parameter at a logical index. Every element is written once.

    `space` holds the axes that the store runs over: those of the index, all of which it needs.
    """

    param: str
    index: tuple[Expr, ...]
    value: Value

    @property
    def space(self) -> frozenset[Axis]:
        return _index_axes(self.index) | self.value.axes


@dataclass(frozen=True)
class Check:
    """Raise `message` after the launch if `condition` is false at any point of its axes."""

    condition: Value
    message: str

    @property
    def value(self) -> Value:
        return self.condition

    @property
    def space(self) -> frozenset[Axis]:
        return self.condition.axes


Root = Store | Check


@dataclass(frozen=True)
class Param:
    """A buffer as a kernel sees it: logical shape and strides in elements."""

    name: str
    dtype: torch.dtype
    shape: tuple[Expr, ...]
    stride: tuple[Expr, ...]

    def offset(self, index: Iterable[Expr]) -> Expr:
        return linearize(index, self.stride)


@dataclass(frozen=True)
class Kernel:
    """What one launch computes. Every load sees the memory as it was before the launch, wherever in
    `body` it stands; a parameter that is stored is not loaded at another index than the stored one."""

    axes: tuple[Axis, ...]
    params: tuple[Param, ...]
    body: tuple[Root, ...]
    origins: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        known = {p.name: p for p in self.params}
        if len(known) != len(self.params):
            raise ValueError(f"two parameters of one name in {[p.name for p in self.params]}")
        axes = set(self.axes)
        for root in self.body:
            if isinstance(root, Store):
                param = known.get(root.param)
                if param is None:
                    raise ValueError(f"store to {root.param}: not a parameter of {sorted(known)}")
                if len(root.index) != len(param.shape):
                    raise ValueError(f"store {root.param}: {len(root.index)} indices, rank {len(param.shape)}")
                if root.value.dtype is not param.dtype:
                    raise TypeError(f"store {root.param}: {root.value.dtype} into {param.dtype}")
                if not root.value.axes <= _index_axes(root.index):
                    raise ValueError(f"store {root.param}: its value varies over more than its index")
            elif root.condition.dtype is not torch.bool:
                raise TypeError(f"a check needs a bool, found {root.condition.dtype}")
            if not root.space <= axes:
                raise ValueError(f"axes {sorted(map(str, root.space - axes))} are not the kernel's")
        for v in self.values():
            if isinstance(v, Load):
                param = known.get(v.param)
                if param is None:
                    raise ValueError(f"load of {v.param}: not a parameter of {sorted(known)}")
                if len(v.index) != len(param.shape) or v.dtype is not param.dtype:
                    raise ValueError(f"load {v.param}: rank or dtype differs from {param}")
            elif isinstance(v, Reduce) and v.over not in axes:
                raise ValueError(f"reduces over {v.over}, which is not an axis of the kernel")

    def values(self) -> tuple[Value, ...]:
        """All values, arguments before users, in an order that depends on the body alone."""
        return self._values

    @cached_property
    def _values(self) -> tuple[Value, ...]:
        return tuple(topological(root.value for root in self.body))

    @property
    def loads(self) -> Iterator[Load]:
        return (v for v in self.values() if isinstance(v, Load))

    @property
    def stores(self) -> Iterator[Store]:
        return (r for r in self.body if isinstance(r, Store))

    @property
    def reductions(self) -> Iterator[Reduce]:
        return (v for v in self.values() if isinstance(v, Reduce))

    def param(self, name: str) -> Param:
        return next(p for p in self.params if p.name == name)

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """Names of parameters that are loaded, in order of first use."""
        return tuple(dict.fromkeys(v.param for v in self.loads))

    @cached_property
    def writes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(s.param for s in self.stores))

    def symbols(self) -> frozenset[Sym]:
        """Every dynamic size in axes, shapes, strides and indices."""
        found: set[Sym] = set()
        exprs = [a.size for a in self.axes]
        for p in self.params:
            exprs += [*p.shape, *p.stride]
        for v in self.values():
            if isinstance(v, Load):
                exprs += [i for i in v.index if isinstance(i, Expr)]
            elif isinstance(v, IndexOf):
                exprs.append(v.expr)
            elif isinstance(v, Random):
                exprs.append(v.index)
        for e in exprs:
            for a in e.atoms():
                found |= {a} if isinstance(a, Sym) else a.size.symbols() if isinstance(a, Axis) else set()
        return frozenset(found)


def topological(roots: Iterable[Value]) -> list[Value]:
    """Values reachable from the roots, arguments first. Iterative, so that depth is no limit."""
    done: dict[Value, None] = {}
    for root in roots:
        stack: list[tuple[Value, bool]] = [(root, False)]
        while stack:
            v, ready = stack.pop()
            if v in done:
                continue
            if ready:
                done[v] = None
                continue
            stack.append((v, True))
            stack.extend((a, False) for a in reversed(v.args) if a not in done)
    return list(done)


def rewrite(
    roots: Iterable[Root],
    env: Mapping[Any, Expr] | None = None,
    replace_value: Callable[[Value], Value | None] | None = None,
) -> tuple[Root, ...]:
    """The same roots with axes substituted by `env` and values replaced where asked.

    `replace_value` is called on each rebuilt value and may return another one for it.
    """
    roots = tuple(roots)
    env = env or {}
    seen: dict[Expr, Expr] = {}

    def index(e: Expr) -> Expr:
        if e not in seen:
            seen[e] = e.substitute(env)
        return seen[e]

    out: dict[Value, Value] = {}
    for v in topological(r.value for r in roots):
        args = v.args
        new_args = tuple(out[a] for a in args)
        new = v.rebuild(new_args, index) if env or any(a is not b for a, b in zip(args, new_args, strict=True)) else v
        if replace_value is not None:
            new = replace_value(new) or new
        out[v] = new
    return tuple(
        Store(r.param, tuple(index(i) for i in r.index), out[r.value])
        if isinstance(r, Store)
        else Check(out[r.condition], r.message)
        for r in roots
    )


# -- schedules --------------------------------------------------------------------------------------
LoopKind = Literal["grid", "loop", "lane"]


@dataclass(frozen=True)
class Loop:
    """One loop of a schedule. An axis with `step` > 1 is tiled: a later loop of it runs inside.

    "grid" loops are parallel and come first; "lane" is the vector axis, the last one.
    """

    axis: Axis
    kind: LoopKind
    step: int = 1

    def __str__(self) -> str:
        return f"{self.axis.name}: {self.kind}" + (f" tile {self.step}" if self.step > 1 else "")


@dataclass(frozen=True)
class Schedule:
    """How a kernel runs: loops from the outermost in, and the values kept in a row buffer."""

    loops: tuple[Loop, ...]
    held: tuple[Value, ...] = ()

    @property
    def grid(self) -> tuple[Loop, ...]:
        return tuple(loop for loop in self.loops if loop.kind == "grid")

    @property
    def lane(self) -> Axis | None:
        return next((loop.axis for loop in self.loops if loop.kind == "lane"), None)

    def __str__(self) -> str:
        return ", ".join(map(str, self.loops)) or "scalar"


# -- plans ------------------------------------------------------------------------------------------
Storage = Literal["input", "constant", "pooled", "arena", "extern"]


@dataclass(frozen=True)
class Buffer:
    """Memory that steps read and write. Shape in elements, strides in elements.

    `storage`: "input" is the caller's, "constant" the graph's own, "pooled" is a block of its own (what the caller
    gets, and what is large), "arena" shares the call's arena, "extern" is what an ATen operator allocated.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[Expr, ...]
    stride: tuple[Expr, ...]
    device: torch.device
    storage: Storage = "arena"

    @property
    def numel(self) -> Expr:
        return product(self.shape)

    @property
    def nbytes(self) -> Expr:
        """Bytes of the distinct elements: an expanded dimension (stride 0) counts once."""
        distinct = [s for s, d in zip(self.shape, self.stride, strict=True) if not (d.is_const and d.value == 0)]
        return product(distinct) * dtypes.itemsize(self.dtype)

    @property
    def extent(self) -> Expr:
        """Elements from the first to one past the last: what an allocation must hold."""
        return linearize([s - 1 for s in self.shape], self.stride) + 1

    @property
    def is_contiguous(self) -> bool:
        return self.stride == contiguous_strides(self.shape)

    def as_param(self, name: str | None = None) -> Param:
        return Param(name or self.name, self.dtype, self.shape, self.stride)


@dataclass(frozen=True)
class TensorRef:
    """A strided view of a buffer, as an extern argument or an output sees it."""

    buffer: str
    shape: tuple[Expr, ...]
    stride: tuple[Expr, ...]
    offset: Expr


@dataclass(frozen=True)
class Opaque:
    """What kernels never see: an input that is no tensor and no size (a generator), or a result
    (`item` of several) of the extern whose origin is `name`."""

    name: str
    item: int | None = None


@dataclass(frozen=True)
class Launch:
    """A kernel with the buffers that its parameters stand for, in order of `kernel.params`."""

    kernel: Kernel
    binding: tuple[str, ...]
    schedule: Schedule | None = None
    name: str = "kernel"

    def buffers(self, params: Iterable[str]) -> tuple[str, ...]:
        at = {p.name: b for p, b in zip(self.kernel.params, self.binding, strict=True)}
        return tuple(at[p] for p in params)

    @property
    def reads(self) -> tuple[str, ...]:
        return self.buffers(self.kernel.reads)

    @property
    def writes(self) -> tuple[str, ...]:
        return self.buffers(self.kernel.writes)


@dataclass(frozen=True)
class Extern:
    """A call of something that minifuse does not generate, with the reason why.

    `args` and `kwargs` hold `TensorRef`, `Expr` (sizes), `Opaque`, and plain values, nested as the operator
    takes them. `results` names the buffers of its tensor results, by position; None is dropped.
    A result given in `sizes` is a number that defines that symbol.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    results: tuple[str | None, ...]
    reason: str
    single: bool = True
    out: bool = False
    effect: bool = False
    sizes: tuple[tuple[int, str], ...] = ()
    dims: tuple[tuple[int, int, str], ...] = ()
    origin: str = ""

    @property
    def refs(self) -> Iterator[TensorRef]:
        return _refs((self.args, tuple(v for _, v in self.kwargs)))

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(r.buffer for r in self.refs))

    @property
    def writes(self) -> tuple[str, ...]:
        return tuple(r for r in self.results if r is not None)

    @property
    def defines(self) -> tuple[str, ...]:
        """The names of what is no tensor: the opaque result, and sizes that are known from here on."""
        return (self.origin, *(name for _, name in self.sizes), *(name for _, _, name in self.dims))

    @property
    def mentions(self) -> frozenset[str]:
        """The names of the sizes and of the opaque values among the arguments."""
        found: set[str] = set()
        stack: list[Any] = [self.args, [v for _, v in self.kwargs]]
        while stack:
            x = stack.pop()
            if isinstance(x, Opaque):
                found.add(x.name)
            elif isinstance(x, Expr):
                found |= {s.name for s in x.symbols()}
            elif isinstance(x, TensorRef):
                stack += [*x.shape, *x.stride, x.offset]
            elif isinstance(x, slice):
                stack += [x.start, x.stop, x.step]
            elif isinstance(x, dict):
                stack += x.values()
            elif isinstance(x, (tuple, list)):
                stack += x
        return frozenset(found)


def _refs(tree: Any) -> Iterator[TensorRef]:
    if isinstance(tree, TensorRef):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _refs(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _refs(item)


@dataclass(frozen=True)
class Free:
    """The last reader of these buffers has run."""

    buffers: tuple[str, ...]


Step = Launch | Extern | Free
Output = TensorRef | Expr | Opaque | int | float | bool | str | None


@dataclass(frozen=True)
class Symbol:
    """What is known of a dynamic size: a value to plan with, and where a call finds it.

    `source` is `INPUT.size(D)`, `INPUT.stride(D)`, the name of an int input, or empty where the
    symbol's own name is that of an int input or an extern defines it.
    """

    name: str
    hint: int
    source: str = ""

    def mentions(self, names: Iterable[str]) -> frozenset[str]:
        """Those of `names` that the source is computed from."""
        return frozenset(re.findall(r"[A-Za-z_]\w*", self.source)) & frozenset(names)


@dataclass(frozen=True)
class Plan:
    """Everything that a program does, in order. Frozen; passes make new ones."""

    name: str
    inputs: tuple[str, ...]
    buffers: Mapping[str, Buffer]
    steps: tuple[Step, ...]
    outputs: tuple[Output, ...]
    symbols: Mapping[str, Symbol] = field(default_factory=dict)
    mutated: frozenset[str] = frozenset()
    origins: Mapping[str, str] = field(default_factory=dict)

    @property
    def launches(self) -> tuple[Launch, ...]:
        return tuple(s for s in self.steps if isinstance(s, Launch))

    @property
    def externs(self) -> tuple[Extern, ...]:
        return tuple(s for s in self.steps if isinstance(s, Extern))

    def hint(self, size: Expr) -> int:
        """A size with every symbol at its hint."""
        if size.is_const:
            return size.value
        return size.evaluate({name: s.hint for name, s in self.symbols.items()})

    def with_steps(self, steps: Iterable[Step]) -> Plan:
        return replace(self, steps=tuple(steps))


@dataclass(frozen=True)
class Traffic:
    """Bytes that a step moves: `read` and `written` once a buffer, `bound` the least possible."""

    read: int
    written: int

    @property
    def total(self) -> int:
        return self.read + self.written


def traffic(reads: Iterable[Buffer], writes: Iterable[Buffer], hint: Callable[[Expr], int]) -> Traffic:
    """Bytes of a launch: each distinct buffer read once and written once.

    This is the one accounting that fusion, rematerialisation, the report and the benchmarks use.
    Sizes that are symbols count at their hint.
    """
    return Traffic(sum(hint(b.nbytes) for b in reads), sum(hint(b.nbytes) for b in writes))


def launch_traffic(plan: Plan, step: Launch | Extern) -> Traffic:
    """Bytes that one step of a plan moves.

    A kernel that reads or writes a part of a buffer, by a slice or a gather, is counted with the
    elements that its accesses run over, at most the buffer's own.
    """
    if isinstance(step, Extern):
        return traffic((plan.buffers[b] for b in step.reads), (plan.buffers[b] for b in step.writes), plan.hint)
    kernel = step.kernel
    whole = {p.name: plan.hint(plan.buffers[b].nbytes) for p, b in zip(kernel.params, step.binding, strict=True)}
    read: dict[str, int] = {}
    written: dict[str, int] = {}
    for load in dict.fromkeys((v.param, v.index, v.dtype, v.axes) for v in kernel.loads):
        name, index, dtype, _ = load
        elements = plan.hint(product(a.size for a in _index_axes(index)))
        read[name] = min(whole[name], read.get(name, 0) + elements * dtypes.itemsize(dtype))
    for store in kernel.stores:
        elements = plan.hint(product(a.size for a in _index_axes(store.index)))
        nbytes = elements * dtypes.itemsize(store.value.dtype)
        written[store.param] = min(whole[store.param], written.get(store.param, 0) + nbytes)
    return Traffic(sum(read.values()), sum(written.values()))


def at_values(e: Expr, env: Mapping[Any, Expr], values: Mapping[Axis, Value]) -> Index | None:
    """An index expression with axes replaced by expressions and some of them by computed integers.

    None where a computed axis stands in a division or a product of axes.
    """
    used = [a for a in values if a in e.atoms()]
    rest = e.substitute({**env, **{a: as_expr(0) for a in used}})
    if not used:
        return rest
    total: Value | None = None
    for a in used:
        c = e.coefficient(a)
        if c is None or c.axes():
            return None
        term = values[a] if c is as_expr(1) else Op.of("mul", values[a], IndexOf.of(c))
        total = term if total is None else Op.of("add", total, term)
    assert total is not None
    return total if rest is as_expr(0) else Op.of("add", total, IndexOf.of(rest))


def content_hash(text: str) -> str:
    """The name of a kernel or a source by its content: 16 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
