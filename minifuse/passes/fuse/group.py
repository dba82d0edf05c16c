"""Groups: kernels in the making. A group's body keeps its loads of what it stores itself until it is built."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace

from minifuse.ir import ops
from minifuse.ir.index import ONE, Axis, Expr
from minifuse.ir.kernel import Check, Kernel, Param, Root, Store, rewrite
from minifuse.ir.plan import Buffer, Launch
from minifuse.ir.value import Cast, Const, Index, IndexOf, Load, Op, Random, Reduce, Scan, Value, at_values, topological

from .unify import Substitution


@dataclass
class Group:
    """Operators that will be one kernel. `inlined` stores are read inside the group and never written; a `chunked`
    group sums columns of what it also walks row by row."""

    id: int
    name: str
    body: tuple[Root, ...]
    nodes: tuple[str, ...]
    first: int
    last: int
    inlined: dict[str, Store] = field(default_factory=dict)
    preds: set[int] = field(default_factory=set)
    succs: set[int] = field(default_factory=set)
    version: int = 0
    chunked: bool = False
    fixed: bool = False

    def __post_init__(self) -> None:
        self.refresh()

    def refresh(self) -> None:
        """Derive what legality asks for from the body."""
        self.writes: dict[str, tuple[Index, ...]] = {r.param: r.index for r in self.body if isinstance(r, Store)}
        self.reads: dict[str, dict[tuple[Index, ...], None]] = {}
        self.reduced: frozenset[Axis] = frozenset()
        self.trees: frozenset[tuple[Axis, int]] = frozenset()
        self.scanned: frozenset[Axis] = frozenset()
        self.scattered = frozenset(r.param for r in self.body if isinstance(r, Store) and r.mode)
        self.spaces: list[frozenset[Axis]] = [r.space for r in self.body]
        self.folds: list[tuple[frozenset[Axis], int]] = []
        self.summed: frozenset[str] = frozenset()
        self.cost = 0.0
        self.pure = True
        axes: dict[Axis, None] = {}
        reductions: list[Reduce] = []
        self.size = 0
        for v in topological(v for r in (*self.body, *self.inlined.values()) for v in r.values):
            self.size += 1
            if isinstance(v, Load):
                if v.param not in self.inlined:
                    self.reads.setdefault(v.param, {})[v.index] = None
            elif isinstance(v, Reduce):
                self.reduced |= {v.over}
                reductions.append(v)
                self.trees |= {(v.over, v.lanes)}
                self.folds.append((v.axes | {v.over}, v.lanes))
                self.spaces.append(v.axes | {v.over})
                self.pure = False
            elif isinstance(v, Scan):
                # Its axis keeps its order, as a reduced one does.
                self.reduced |= {v.over}
                self.trees |= {(v.over, v.lanes)}
                self.scanned |= {v.over}
                self.pure = False
            elif isinstance(v, Op):
                self.cost += ops.TABLE[v.name].cost
            elif isinstance(v, Random):
                self.cost += 40
        begun = {r.param for r in self.body if isinstance(r, Store) and not r.mode}
        for r in self.body:
            if isinstance(r, Store) and r.mode:
                self.pure = False
                if r.param not in begun:
                    self.reads.setdefault(r.param, {})[r.index] = None
                if r.over is not None:
                    self.reduced |= {r.over}
                    self.trees |= {(r.over, 1)}
                    self.scanned |= {r.over}
        for space in self.spaces:
            for a in sorted(space, key=lambda a: (a.name, a.serial)):
                axes[a] = None
        self.axes = tuple(axes)
        self.checks = any(isinstance(r, Check) for r in self.body)
        columns = [v for v in reductions if v.lanes == 1]
        if columns:
            self.summed = self._summed()
        whole = not self.scanned  # a chunk of a scan does not stand alone
        self.splits = whole and all(len(v.args) == 1 and not reaches_column(v.args, self.summed) for v in columns)

    def _summed(self) -> frozenset[str]:
        """What is stored that needs a column's sum; of stores within the group too."""
        found: set[str] = set()
        stores = [r for r in (*self.inlined.values(), *self.body) if isinstance(r, Store)]
        more = True
        while more:
            new = {s.param for s in stores if s.param not in found and reaches_column([s.value], found)}
            found |= new
            more = bool(new)
        return frozenset(found)

    @property
    def mixed(self) -> bool:
        """Whether it sums columns, and does something else than that."""
        rows = any(lanes > 1 for _, lanes in self.folds)
        return bool(self.summed) and (
            rows or any(isinstance(r, Check) or r.param not in self.summed for r in self.body)
        )

    @property
    def external(self) -> list[str]:
        """Buffers that the group reads from memory."""
        return [b for b in self.reads if b not in self.writes]

    def substitute(self, env: Substitution) -> tuple[tuple[Root, ...], dict[str, Store]]:
        if not env:
            return self.body, self.inlined
        names = list(self.inlined)
        made = rewrite([*self.body, *(self.inlined[n] for n in names)], env)
        body, rest = made[: len(self.body)], made[len(self.body) :]
        return body, {n: s for n, s in zip(names, rest, strict=True) if isinstance(s, Store)}

    def replace_loads(self, stores: Mapping[str, Store]) -> None:
        """Compute what is stored in these at each place where the group loads it."""
        names = list(self.inlined)

        def resolve(v: Value) -> Value | None:
            return read_through(v, stores[v.param]) if isinstance(v, Load) and v.param in stores else None

        made = rewrite([*self.body, *(self.inlined[n] for n in names)], None, resolve)
        self.body = made[: len(self.body)]
        rest = made[len(self.body) :]
        self.inlined = {n: s for n, s in zip(names, rest, strict=True) if isinstance(s, Store)}
        self.refresh()


def reaches_column(values: Iterable[Value], stored: Container[str]) -> bool:
    """Whether values are computed from a column's sum, or from a load of what these stores hold."""
    found = topological(values)
    return any(v.lanes == 1 if isinstance(v, Reduce) else isinstance(v, Load) and v.param in stored for v in found)


def grid_axes(spaces: Iterable[frozenset[Axis]], reduced: frozenset[Axis]) -> frozenset[Axis]:
    """Axes that can be parallel: every root runs over them and none reduces over them."""
    common: frozenset[Axis] | None = None
    for space in spaces:
        common = space if common is None else common & space
    return (common or frozenset()) - reduced


def innermost(group: Group, buffers: Mapping[str, Buffer]) -> Axis | None:
    """The axis with unit stride in the group's largest access."""
    for name, index in [*group.writes.items(), *((b, next(iter(i))) for b, i in group.reads.items())]:
        buffer = buffers[name]
        for i, stride in zip(index, buffer.stride, strict=True):
            if isinstance(i, Expr) and stride is ONE:
                found = next((a for a in i.axes() if i.coefficient(a) is ONE), None)
                if found is not None:
                    return found
    return None


def forward(body: tuple[Root, ...], inlined: Mapping[str, Store], overwritten: Container[str] = ()) -> tuple[Root, ...]:
    """Replace each load of something that the group computes by the value itself.

    Loads of an `overwritten` input mean what it held before.

    A load at another index than the store's is the store's value at that index (inlining); its
    loads are then masked as the load was.
    """
    apart = {r.param for r in body if isinstance(r, Store) and (r.mode or r.param in overwritten)}
    stores = {r.param: r for r in body if isinstance(r, Store) and r.param not in apart}
    stores.update(inlined)
    done: dict[str, Value] = {}

    def resolve(v: Value) -> Value | None:
        if not isinstance(v, Load) or v.param not in stores:
            return None
        store = stores[v.param]
        if store.param not in done:
            done[store.param] = value_of(store)
        return read_through(v, Store(store.param, store.index, done[store.param]))

    def value_of(store: Store) -> Value:
        """The store's value with its own loads resolved; producers come first, so depth is bounded by
        the longest chain of inlined stores that was not resolved yet."""
        order, seen, stack = [], set(), [store]
        while stack:
            s = stack.pop()
            if s.param in seen or s.param in done:
                continue
            seen.add(s.param)
            order.append(s)
            stack.extend(
                stores[v.param]
                for v in topological([s.value])
                if isinstance(v, Load) and v.param in stores and v.param != s.param
            )
        made: Value = store.value
        for s in _by_dependency(order, stores):
            (r,) = rewrite([s], None, resolve)
            done[s.param] = r.value
            made = r.value
        return done.get(store.param, made)

    out: list[Root] = []
    for root in body:
        if isinstance(root, Store):
            if root.param in apart:
                out.extend(rewrite([root], None, resolve))
                continue
            if root.param not in done:
                done[root.param] = value_of(root)
            out.append(replace(root, value=done[root.param]))
        else:
            (made,) = rewrite([root], None, resolve)
            out.append(made)
    return tuple(out)


def _by_dependency(some: list[Store], stores: Mapping[str, Store]) -> list[Store]:
    """Stores of a group ordered so that each comes after those that it reads."""
    names = {s.param for s in some}
    needs = {
        s.param: {
            v.param for v in topological([s.value]) if isinstance(v, Load) and v.param in names and v.param != s.param
        }
        for s in some
    }
    out: list[Store] = []
    placed: set[str] = set()
    by_name = {s.param: s for s in some}
    stack = [s.param for s in some]
    while stack:
        name = stack[-1]
        if name in placed:
            stack.pop()
            continue
        waiting = [n for n in needs[name] if n not in placed]
        if waiting:
            stack.extend(waiting)
            continue
        placed.add(name)
        out.append(by_name[name])
        stack.pop()
    return out


def read_through(load: Load, store: Store) -> Value:
    """What a load of a stored value reads: the value at the load's index."""
    moved = load.index != store.index
    value = at_index(store.value, store.index, load.index) if moved else store.value
    if load.mask is not None and load.other is not None:
        # at the store's own index every point is in range, and only the choice is left
        value = Op.of("where", load.mask, masked(value, load.mask) if moved else value, load.other)
    return value


class NotInvertible(Exception):  # noqa: N818 - an answer, not a fault
    """A stored value cannot be written at the index that is asked for."""


def at_index(value: Value, index: tuple[Index, ...], wanted: tuple[Index, ...]) -> Value:
    """A stored value at another index than the one it was stored at; coordinates may be computed.

    Raises NotInvertible where the store's index is no axis, or where a reduction or a random number would have to be
    taken at a computed coordinate.
    """
    env: Substitution = {}
    computed: dict[Axis, Value] = {}
    for i, w in zip(index, wanted, strict=True):
        axis = i.atom if isinstance(i, Expr) else None
        if isinstance(axis, Axis) and isinstance(w, Expr):
            env[axis] = w
        elif isinstance(axis, Axis) and isinstance(w, Value):
            computed[axis] = w
        elif i is not w and not (isinstance(i, Expr) and i.is_const):
            raise NotInvertible(f"cannot invert the index {i}")
    out: dict[Value, Value] = {}

    def moved(e: Expr) -> Expr:
        if not computed.keys().isdisjoint(e.atoms()):
            raise NotInvertible(f"{e} has a computed coordinate")
        return e.substitute(env)  # type: ignore[arg-type]

    for v in topological([value]):
        args = tuple(out[a] for a in v.args)
        if computed and isinstance(v, Load):
            rest = iter(args)
            at = [next(rest) if isinstance(i, Value) else at_values(i, env, computed) for i in v.index]
            out[v] = Load.of(v.param, at, v.dtype, *rest)
        elif computed and isinstance(v, IndexOf):
            made = at_values(v.expr, env, computed)
            out[v] = IndexOf.of(made, v.dtype) if isinstance(made, Expr) else Cast.of(v.dtype, made)
        else:
            out[v] = v.rebuild(args, moved)
    return out[value]


def masked(value: Value, mask: Value) -> Value:
    """The value with each of its loads done only where the mask holds."""
    out: dict[Value, Value] = {}
    for v in topological([value]):
        new = v.rebuild(tuple(out[a] for a in v.args), lambda e: e)
        if isinstance(new, Load):
            if new.mask is None:
                new = Load.of(new.param, new.index, new.dtype, mask, Const.of(0, new.dtype))
            elif new.mask is not mask and new.other is not None:
                both = Op.of("and", new.mask, mask)
                new = Load.of(new.param, new.index, new.dtype, both, new.other)
        out[v] = new
    return out[value]


def build(
    group: Group, keep: Callable[[str], bool], buffers: Mapping[str, Buffer], overwritten: Container[str]
) -> Launch:
    """The kernel of a group: loads of its own stores forwarded, stores that nobody needs dropped."""
    made = forward(group.body, group.inlined, overwritten)
    body = tuple(r for r in made if not isinstance(r, Store) or keep(r.param))
    axes: dict[Axis, None] = {}
    params: dict[str, Param] = {}
    values = topological(v for r in body for v in r.values)
    for root in body:
        for a in sorted(root.space, key=lambda a: (a.name, a.serial)):
            axes[a] = None
    for v in values:
        if isinstance(v, Load):
            params.setdefault(v.param, buffers[v.param].as_param())
        elif isinstance(v, (Reduce, Scan)):
            axes[v.over] = None
    for root in body:
        if isinstance(root, Store):
            params.setdefault(root.param, buffers[root.param].as_param())
    kernel = Kernel(tuple(axes), tuple(params.values()), body, group.nodes)
    return Launch(kernel, tuple(params), None, group.name)
