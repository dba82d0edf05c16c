"""Kernels and their schedules: what one launch computes, and how it runs (DESIGN.md, section 3).

A `Kernel` says what is computed: axes, parameters (the buffers that it touches), and a body of stores and
checks whose values form a graph. A `Schedule` says how: which loops, in which order, which of them are
the parallel grid and which one is the vector lane.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import Any, Literal

import torch

from .index import ZERO, Axis, Expr, Sym
from .lazy import lazy
from .shape import linearize
from .value import Index, Load, Reduce, Scan, Value, index_axes, same_axis, topological


@dataclass(frozen=True)
class Store:
    """Write a value into a parameter at a logical index, where `mask` holds. Every element is written once.

    `space` holds the axes that the store runs over: those of the index, all of which it needs.

    With a `mode` it is a scatter: coordinates may be computed, and what is stored joins what is there, by an operator
    ("add", "mul", "maximum", "minimum") or in its place ("last"). It runs after the plain stores of its parameter.
    Points that may meet at one place differ along the axis `over` alone, and come in its order.
    """

    param: str
    index: tuple[Index, ...]
    value: Value
    mask: Value | None = None
    mode: str = ""
    over: Axis | None = None

    @property
    def values(self) -> tuple[Value, ...]:
        """The coordinates that are computed, the mask, the value."""
        mask = () if self.mask is None else (self.mask,)
        return (*(i for i in self.index if isinstance(i, Value)), *mask, self.value)

    @property
    def space(self) -> frozenset[Axis]:
        return index_axes(self.index) | self.value.axes | (frozenset() if self.over is None else {self.over})


@dataclass(frozen=True)
class Check:
    """Raise `message` after the launch if `condition` is false at any point of its axes."""

    condition: Value
    message: str

    @property
    def value(self) -> Value:
        return self.condition

    @property
    def values(self) -> tuple[Value, ...]:
        return (self.condition,)

    @property
    def space(self) -> frozenset[Axis]:
        return self.condition.axes


Root = Store | Check
MODES = ("add", "mul", "maximum", "minimum", "last")


@dataclass(frozen=True)
class Param:
    """A buffer as a kernel sees it: logical shape and strides in elements."""

    name: str
    dtype: torch.dtype
    shape: tuple[Expr, ...]
    stride: tuple[Expr, ...]

    def offset(self, index: Iterable[Index]) -> Expr:
        """The part of an element offset that is an expression; computed coordinates count as zero."""
        return linearize([i if isinstance(i, Expr) else ZERO for i in index], self.stride)


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
                if not all(v.axes <= index_axes(root.index) | {root.over} for v in root.values):
                    raise ValueError(f"store {root.param}: its value varies over more than its index")
                if root.mask is not None and root.mask.dtype is not torch.bool:
                    raise TypeError(f"store {root.param}: a mask is a bool, found {root.mask.dtype}")
                if root.mode not in ("", *MODES):
                    raise ValueError(f"store {root.param}: no mode {root.mode!r}; known: {', '.join(MODES)}")
                if not root.mode and not all(isinstance(i, Expr) for i in root.index):
                    raise ValueError(f"store {root.param}: a computed coordinate needs a mode")
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
            elif isinstance(v, (Reduce, Scan)) and v.over not in axes:
                raise ValueError(f"reduces over {v.over}, which is not an axis of the kernel")

    def values(self) -> tuple[Value, ...]:
        """All values, arguments before users, in an order that depends on the body alone."""
        return self._values

    @lazy
    def _values(self) -> tuple[Value, ...]:
        return tuple(topological(v for root in self.body for v in root.values))

    @property
    def loads(self) -> Iterator[Load]:
        return (v for v in self.values() if isinstance(v, Load))

    @property
    def stores(self) -> Iterator[Store]:
        return (r for r in self.body if isinstance(r, Store))

    @property
    def accesses(self) -> Iterator[Load | Store]:
        return chain(self.loads, self.stores)

    @property
    def reductions(self) -> Iterator[Reduce]:
        return (v for v in self.values() if isinstance(v, Reduce))

    @property
    def scans(self) -> Iterator[Scan]:
        return (v for v in self.values() if isinstance(v, Scan))

    @property
    def spaces(self) -> list[frozenset[Axis]]:
        """The axes that each root and each reduction runs over."""
        return [r.space for r in self.body] + [r.axes | {r.over} for r in self.reductions]

    @lazy
    def ordered(self) -> frozenset[Axis]:
        """The axes whose elements have an order: those that are reduced, scanned or scattered along."""
        scattered = frozenset(s.over for s in self.stores if s.over is not None)
        return frozenset(r.over for r in self.reductions) | frozenset(s.over for s in self.scans) | scattered

    @lazy
    def joins(self) -> tuple[str, ...]:
        """Parameters that hold what was there but for what is scattered into them."""
        begun = {s.param for s in self.stores if not s.mode}
        return tuple(dict.fromkeys(s.param for s in self.stores if s.param not in begun))

    def param(self, name: str) -> Param:
        return next(p for p in self.params if p.name == name)

    @lazy
    def reads(self) -> tuple[str, ...]:
        """Names of parameters whose memory is read, in order of first use."""
        return tuple(dict.fromkeys((*(v.param for v in self.loads), *self.joins)))

    @lazy
    def writes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(s.param for s in self.stores))

    def symbols(self) -> frozenset[Sym]:
        """Every dynamic size in axes, shapes, strides and indices."""
        found: set[Sym] = set()
        exprs = [a.size for a in self.axes]
        for p in self.params:
            exprs += [*p.shape, *p.stride]
        for v in self.values():
            exprs += v.exprs
        for e in exprs:
            for a in e.atoms():
                found |= {a} if isinstance(a, Sym) else a.size.symbols() if isinstance(a, Axis) else set()
        return frozenset(found)


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
    index = lru_cache(None)(lambda e: e.substitute(env))
    out: dict[Value, Value] = {}
    for v in topological(v for r in roots for v in r.values):
        args = tuple([out[a] for a in v.args])
        new = v if not env and args == v.args else v.rebuild(args, index)
        out[v] = new if replace_value is None else replace_value(new) or new
    return tuple(with_values(r, out, index) for r in roots)


def with_values(root: Root, out: Mapping[Value, Value], index: Callable[[Expr], Expr] = lambda e: e) -> Root:
    """A root over the values that its own become, and other indices."""
    if isinstance(root, Check):
        return Check(out[root.condition], root.message)
    at = tuple([index(i) if isinstance(i, Expr) else out[i] for i in root.index])
    mask = None if root.mask is None else out[root.mask]
    over = None if root.over is None else same_axis(index(root.over.expr), "scattered")
    return Store(root.param, at, out[root.value], mask, root.mode, over)


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
    """How a kernel runs: loops from the outermost in, the values kept in a row buffer, the parameters that are
    written past the caches, since nobody reads them while they would still be there, and the warps of a program on a
    GPU (0: as many as the target's rule says)."""

    loops: tuple[Loop, ...]
    held: tuple[Value, ...] = ()
    past: tuple[str, ...] = ()
    warps: int = 0

    @property
    def grid(self) -> tuple[Loop, ...]:
        return tuple(loop for loop in self.loops if loop.kind == "grid")

    @property
    def lane(self) -> Axis | None:
        return next((loop.axis for loop in self.loops if loop.kind == "lane"), None)

    def __str__(self) -> str:
        return ", ".join(map(str, self.loops)) or "scalar"
