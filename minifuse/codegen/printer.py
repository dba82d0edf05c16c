"""The one printer: it walks a kernel's loop tree and asks a dialect for the text of each thing.

A value is written where it is first needed, in the outermost open loop that it varies over, so that
what does not change in a loop is computed once in front of it. A dialect supplies text and declares
nothing about structure; targets differ in a table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from minifuse.ir import dtypes
from minifuse.ir.index import Axis, Expr, FloorDiv, Mod, Sym
from minifuse.ir.kernel import Check, Kernel, Param, Schedule, Store
from minifuse.ir.value import Cast, Const, IndexOf, Load, Op, Pick, Random, Reduce, Scan, Value, topological

from .looptree import Fold, Hold, LoopTree, Node, with_held


class CodegenError(Exception):
    """A kernel that a target cannot express; it runs by the interpreter and the report says so."""


@dataclass
class Scope:
    """An open loop, its text so far, and the values that have a name in it."""

    loop: int | None
    lines: list[str] = field(default_factory=list)
    names: dict[Value, tuple[str, ...]] = field(default_factory=dict)


class Dialect(Protocol):
    """What a target supplies. Text arguments are names; `lanes` says whether a result varies over the lane."""

    def begin(self, p: Printer) -> None: ...
    def open_loop(self, p: Printer, k: int) -> None: ...
    def close_loop(self, p: Printer, k: int, inner: Scope) -> None: ...
    def declare(self, p: Printer, scope: Scope, name: str, dtype: torch.dtype, text: str, lanes: bool) -> None: ...
    def const(self, p: Printer, value: object, dtype: torch.dtype) -> str: ...
    def index(self, p: Printer, expr: Expr, dtype: torch.dtype, lanes: bool) -> str: ...
    def op(self, p: Printer, v: Op, lanes: bool) -> str: ...
    def cast(self, p: Printer, v: Cast, lanes: bool) -> str: ...
    def load(self, p: Printer, v: Load, lanes: bool) -> str: ...
    def random(self, p: Printer, v: Random, lanes: bool) -> str: ...
    def scan(self, p: Printer, v: Scan, around: Scope, scope: Scope, lanes: bool) -> str: ...
    def store(self, p: Printer, root: Store) -> None: ...
    def check(self, p: Printer, root: Check) -> None: ...
    def fold_begin(self, p: Printer, fold: Fold) -> None: ...
    def fold_step(self, p: Printer, fold: Fold) -> None: ...
    def fold_end(self, p: Printer, fold: Fold) -> tuple[str, ...]: ...
    def fold_read(self, p: Printer, r: Reduce) -> tuple[str, ...] | None: ...
    def hold(self, p: Printer, v: Value) -> None: ...
    def hold_begin(self, p: Printer, v: Value) -> None: ...
    def held(self, p: Printer, v: Value) -> str: ...
    def finish(self, p: Printer, name: str) -> str: ...


class Printer:
    """Writes one kernel in one dialect."""

    def __init__(self, kernel: Kernel, schedule: Schedule, dialect: Dialect, tree: LoopTree | None = None) -> None:
        self.kernel = kernel
        self.tree: LoopTree = tree or with_held(kernel, schedule)
        self.loops = self.tree.loops
        self.schedule = self.tree.schedule
        self.dialect = dialect
        self.params = {p.name: p for p in kernel.params}
        self.scopes: list[Scope] = [Scope(None)]
        self.lane = self.schedule.lane
        self.serial = 0
        self.holding: set[Value] = set()
        self.filled: set[Value] = set()
        self.now: set[Value] = set()
        self.messages: dict[Value, str] = {}
        self.texts: dict[type, Callable[..., str]] = {
            Op: dialect.op, Cast: dialect.cast, Load: dialect.load, Random: dialect.random,
        }  # fmt: skip
        self.symbols: tuple[Sym, ...] = tuple(sorted(kernel.symbols(), key=lambda s: s.name))

    def write(self, name: str) -> str:
        """The text of the kernel as a function called `name`. Raises CodegenError."""
        self.dialect.begin(self)
        self.walk(self.tree.root)
        return self.dialect.finish(self, name)

    # -- structure -------------------------------------------------------------------------------
    def walk(self, node: Node) -> None:
        for item in node.items:
            if isinstance(item, Node):
                self.walk_loop(item)
            elif isinstance(item, Store):
                for load in self.tree.late.get(item, ()):
                    self.name(load)
                self.dialect.store(self, self.joining(item) if item.mode else item)
            elif isinstance(item, Check):
                self.dialect.check(self, item)
            elif isinstance(item, Hold):
                self.dialect.hold(self, item.value)
                self.filled.add(item.value)
            else:
                self.dialect.fold_step(self, item)

    def joining(self, s: Store) -> Store:
        """A scatter as a store of what is there and what comes, joined here and now: the next point may find more."""
        if s.mode == "last":
            return s
        there, compute = Load.of(s.param, s.index, s.value.dtype), dtypes.row(s.value.dtype).compute
        value = Op.of(s.mode, Cast.of(compute, there), Cast.of(compute, s.value))
        joined = replace(s, value=Cast.of(s.value.dtype, value))
        self.now = set(topological([joined.value])) - set(topological([s.value]))
        return joined

    def walk_loop(self, node: Node) -> None:
        k = node.loop
        assert k is not None
        items = [item for item, _ in node.walk()]
        folds = [f for f in items if isinstance(f, Fold) and f.loop == k]
        for h in items:
            if isinstance(h, Hold) and h.value not in self.holding and self.outside_of_hold(h.value, k):
                self.holding.add(h.value)
                self.dialect.hold_begin(self, h.value)
        for f in folds:
            self.dialect.fold_begin(self, f)
        self.scopes.append(Scope(k))
        self.dialect.open_loop(self, k)
        self.walk(node)
        inner = self.scopes.pop()
        self.dialect.close_loop(self, k, inner)
        for f in folds:
            names = self.dialect.fold_end(self, f)
            if names and f is self.tree.folds[f.value][-1]:
                self.scope_of(self.tree.loops_of(f.value.axes)).names[f.value] = names

    def outside_of_hold(self, v: Value, k: int) -> bool:
        """Whether loop k is the first below the grid that a held value varies over."""
        below = [j for j in self.tree.loops_of(v.axes) if self.loops[j].kind != "grid"]
        return bool(below) and below[0] == k

    # -- values ----------------------------------------------------------------------------------
    @property
    def here(self) -> Scope:
        return self.scopes[-1]

    def scope_of(self, loops: Sequence[int]) -> Scope:
        """The outermost open scope in which a value over these loops can be written."""
        deepest = max(loops, default=None)
        if deepest is None:
            return self.scopes[0]
        for scope in self.scopes:
            if scope.loop == deepest:
                return scope
        raise CodegenError(f"loop {self.loops[deepest]} is not open here")

    def lanes(self, v: Value) -> bool:
        return self.lane is not None and self.lane in v.axes

    def fresh(self, prefix: str = "v") -> str:
        self.serial += 1
        return f"{prefix}{self.serial}"

    def name(self, root: Value) -> str:
        """The name of a value, written now if it has none; iterative in the depth of the graph."""
        stack = [root]
        while stack:
            v = stack[-1]
            if self.find(v) is not None:
                stack.pop()
                continue
            missing = [a for a in self.uses(v) if self.find(a) is None]
            if missing:
                stack.extend(reversed(missing))
                continue
            stack.pop()
            self.emit(v)
        found = self.find(root)
        assert found is not None
        return found[0]

    def uses(self, v: Value) -> tuple[Value, ...]:
        """Values whose names the text of v mentions. A finished reduction and a held row need none."""
        return () if isinstance(v, (Reduce, Pick)) or v in self.filled else v.args

    def find(self, v: Value) -> tuple[str, ...] | None:
        for scope in reversed(self.scopes):
            if v in scope.names:
                return scope.names[v]
        return None

    def emit(self, v: Value) -> None:
        scope = self.here if v in self.now else self.scope_of(self.tree.loops_of(v.axes))
        lanes = self.lanes(v)
        d = self.dialect
        if isinstance(v, Reduce) and v not in self.filled:
            names = d.fold_read(self, v)
            if names is None:
                raise CodegenError(f"{v.kind} over {v.over} is read before it is finished")
            scope.names[v] = names
            return
        if isinstance(v, Pick) and v not in self.filled:
            if self.find(v.value) is None:
                self.emit(v.value)
            names = self.find(v.value) or ()
            scope.names[v] = (names[v.i],)
            return
        if isinstance(v, Const):
            self.scopes[0].names[v] = (d.const(self, v.value, v.dtype),)
            return
        if v in self.filled:
            text = d.held(self, v)
        elif isinstance(v, IndexOf):
            text = d.index(self, v.expr, v.dtype, lanes)
        elif isinstance(v, Scan):
            text = d.scan(self, v, self.around(v.over), scope, lanes)
        elif type(v) in self.texts:
            text = self.texts[type(v)](self, v, lanes)
        else:
            raise CodegenError(f"no text for {type(v).__name__}")
        name = self.fresh()
        d.declare(self, scope, name, v.dtype, text, lanes)
        scope.names[v] = (name,)

    def around(self, axis: Axis) -> Scope:
        """The scope in front of an axis' loops below the grid, where it has some: what is declared there lives through
        all of them."""
        loops = [k for k, loop in enumerate(self.loops) if loop.axis is axis and loop.kind != "grid"]
        return self.scopes[next((i for i, scope in enumerate(self.scopes) if scope.loop in loops), 0) - 1]

    # -- help for dialects -----------------------------------------------------------------------
    def line(self, text: str) -> None:
        self.here.lines.append(text)

    def param(self, name: str) -> Param:
        return self.params[name]

    def error_code(self, root: Check) -> int:
        """The number of a check's message, one more than its place among `messages`: by what is checked, since a
        kernel's text is the same whatever its messages say."""
        self.messages.setdefault(root.condition, root.message)
        return list(self.messages).index(root.condition) + 1

    def start(self, axis: Axis) -> int | None:
        """The tiled grid loop of an axis, which says where its tile begins."""
        for k, loop in enumerate(self.loops):
            if loop.axis is axis and loop.kind == "grid" and loop.step > 1:
                return k
        return None

    def previous(self, k: int) -> int | None:
        """The loop that tiles loop k, if one does."""
        return max((j for j in range(k) if self.loops[j].axis is self.loops[k].axis), default=None)

    def last_loop(self, axis: Axis) -> int:
        return max(k for k, loop in enumerate(self.loops) if loop.axis is axis)


def floors(expr: Expr) -> bool:
    """Whether a division in an expression may have a negative side, where a target's own division and remainder
    would round towards zero."""
    parts = [a for mono, _ in expr.terms for a in mono if isinstance(a, (FloorDiv, Mod))]
    return any(not (a.num.is_nonneg() and a.den.is_nonneg()) or floors(a.num) or floors(a.den) for a in parts)
