"""Groups: kernels in the making. Merging two joins what is known of them; bodies are written when kernels are built."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import InitVar, dataclass, field
from functools import lru_cache
from operator import itemgetter
from typing import NamedTuple

from minifuse.ir import ops
from minifuse.ir.index import ONE, Axis, Expr, Mod
from minifuse.ir.kernel import Check, Kernel, Param, Root, Store, rewrite
from minifuse.ir.plan import Buffer, Launch
from minifuse.ir.value import Index, Load, Op, Pick, Random, Reduce, Scan, Value, topological

from .body import compose, forward, read_through, shifted
from .unify import Substitution, Unified, image

NONE: frozenset[str] = frozenset()


class Stored(NamedTuple):
    """A store of a group: where, over which axes; the parameters that its value loads, and whether it needs a column's
    sum that is taken in the same piece."""

    at: tuple[Index, ...]
    space: frozenset[Axis]
    needs: frozenset[str]
    sums: bool

    def moved(self, env: Substitution) -> Stored:
        return Stored(shifted(self.at, env), image(self.space, env), self.needs, self.sums)


class Fold(NamedTuple):
    """A reduction of a group: over an axis of a space of loops, with so many lanes. A column's sum has one; `needs`
    holds what its argument loads, and `nested` whether it reaches another column's sum."""

    over: Axis
    space: frozenset[Axis]
    lanes: int
    needs: frozenset[str] = frozenset()
    nested: bool = False

    def moved(self, env: Substitution) -> Fold:
        (over,) = image([self.over], env)
        return self._replace(over=over, space=image(self.space, env))


class Tree:
    """The pieces of a group with the substitutions that its merges made: a leaf's roots with their places in the
    captured graph, or two trees."""

    __slots__ = ("first", "places", "roots", "second")

    def __init__(
        self,
        roots: tuple[Root, ...] = (),
        places: Sequence[int] = (),
        first: tuple[Tree, Substitution] | None = None,
        second: tuple[Tree, Substitution] | None = None,
    ) -> None:
        self.roots, self.places, self.first, self.second = roots, places, first, second

    def flatten(self) -> list[tuple[int, Root]]:
        """The roots in the group's axes and their places, as they stand in the captured graph: layers that repeat give
        one kernel, whichever of its pieces came together first."""
        if self.first is None:
            return [*zip(self.places, self.roots, strict=True)]
        found: list[tuple[int, Root]] = []
        stack: list[tuple[Tree, Substitution]] = [(self, {})]
        while stack:
            tree, env = stack.pop()
            parts = [part for part in (tree.second, tree.first) if part is not None]
            stack.extend((part, compose(inner, env)) for part, inner in parts)
            if tree.roots:
                found.extend(zip(tree.places, rewrite(tree.roots, env) if env else tree.roots, strict=True))
        return sorted(found, key=itemgetter(0))


@dataclass
class Group:
    """Operators that will be one kernel.

    `inlined` names what is stored, read inside and never written; a `chunked` group sums columns of what it also walks
    row by row; one with `copies` computes what others may compute too. `first` and `last` are its places in the
    captured graph; `extent` gives the points of a space.
    `cost` is instructions a point, `instructions` those of a run; `moving` the seconds that its bytes take and `alone`
    those of its kernel, -1 where nobody asked; `inner` holds what `innermost` found, once somebody did.
    """

    id: int
    name: str
    nodes: tuple[str, ...]
    first: int
    last: int
    extent: Callable[[frozenset[Axis]], int]
    tree: Tree = field(default_factory=Tree)
    fixed: bool = False
    inlined: set[str] = field(default_factory=set)
    preds: set[int] = field(default_factory=set)
    succs: set[int] = field(default_factory=set)
    version: int = 0
    chunked: bool = False
    copies: bool = False
    inner: tuple[Axis | None] | None = None
    values: InitVar[Iterable[Value] | None] = None

    def __post_init__(self, values: Iterable[Value] | None) -> None:
        self.survey(values)

    # -- what is known of it -----------------------------------------------------------------------
    def survey(self, values: Iterable[Value] | None = None) -> None:
        """Find in the body what the rules ask for; `values` are its own, arguments first, where they are known."""
        body = self.tree.roots or tuple(r for _, r in self.tree.flatten())
        self.stored: dict[str, Stored] = {}
        self.scattered: frozenset[str] = frozenset(r.param for r in body if isinstance(r, Store) and r.mode)
        self.reads: dict[str, dict[tuple[Index, ...], None]] = {}
        self.folds: dict[Fold, None] = {}
        self.ordered: dict[tuple[Axis, int], None] = {}
        self.scanned: frozenset[Axis] = frozenset()
        self.checks: list[frozenset[Axis]] = [r.space for r in body if isinstance(r, Check)]
        self.begun: list[frozenset[Axis]] = []
        self.cost, self.instructions, self.size, self.pure, self.whole = 0.0, 0.0, 0, True, True
        extent, reads, inlined = self.extent, self.reads, self.inlined
        for v in topological(v for r in body for v in r.values) if values is None else values:
            self.size += 1
            if isinstance(v, Op):
                cost = ops.TABLE[v.name].cost
                self.cost += cost
                self.instructions += cost * extent(v.axes)
            elif isinstance(v, Load):
                if v.param not in inlined:
                    reads.setdefault(v.param, {})[v.index] = None
                if v.mask is not None:
                    self.cost += ops.MASKED_COST
                    self.instructions += ops.MASKED_COST * extent(v.axes)
            elif isinstance(v, Reduce):
                self.add_fold(v)
            elif isinstance(v, Scan):
                # Its axis keeps its order, as a reduced one does.
                self.order(v.over, v.lanes)
            elif isinstance(v, Random):
                self.cost += ops.RANDOM_COST
                self.instructions += ops.RANDOM_COST * self.extent(v.axes)
        begun = {r.param for r in body if isinstance(r, Store) and not r.mode}
        columns = bool(self.folds) and any(f.lanes == 1 for f in self.folds)
        for r in body:
            if not isinstance(r, Store):
                continue
            needs, sums = reach(r.values) if columns or len(body) > 1 else (frozenset(self.reads), False)
            if r.param in self.stored:  # what a scatter is to find there
                self.begun.append(self.stored[r.param].space)
            self.stored[r.param] = Stored(r.index, r.space, needs, sums)
            if r.mode:
                self.pure = False
                if r.param not in begun:
                    self.reads.setdefault(r.param, {})[r.index] = None
                if r.over is not None:
                    self.order(r.over, 1)
        for name in [n for n in self.stored if n in inlined]:
            self.drop(name)
        self.derive()

    def add_fold(self, v: Reduce) -> None:
        space = v.axes | {v.over}
        needs, nested = reach(v.args) if v.lanes == 1 else (frozenset(), False)
        self.whole = self.whole and (v.lanes != 1 or v.results == 1)
        self.folds[Fold(v.over, space, v.lanes, needs, nested)] = None
        self.instructions += ops.REDUCTIONS[v.kind].cost * self.extent(space)
        self.ordered[v.over, v.lanes] = None
        self.pure = False

    def order(self, axis: Axis, lanes: int) -> None:
        self.ordered[axis, lanes] = None
        self.scanned |= {axis}
        self.pure = False

    def derive(self) -> None:
        """What follows from stores, reads and reductions together."""
        self.writes = {n: s.at for n, s in self.stored.items()}
        self.moving = self.alone = -1.0
        self.inner = None
        self.reduced = frozenset([a for a, _ in self.ordered])
        roots = [*[s.space for s in self.stored.values()], *self.checks, *self.begun]
        self.spaces = tuple(dict.fromkeys([*roots, *[f.space for f in self.folds]]))
        self.axes = axes_of(self.spaces)
        self.summed = self.needing_columns()
        self.splits = (
            self.whole
            and not self.scanned  # a chunk of a scan does not stand alone
            and not any(f.lanes == 1 and (f.nested or not f.needs.isdisjoint(self.summed)) for f in self.folds)
        )

    def needing_columns(self) -> frozenset[str]:
        """What is stored that needs a column's sum."""
        more = found = {n for n, s in self.stored.items() if s.sums}
        if not found:
            return NONE
        while more:
            new = {n for n, s in self.stored.items() if n not in found and not s.needs.isdisjoint(found)}
            found |= new
            more = new
        return frozenset(found)

    @property
    def mixed(self) -> bool:
        """Whether it sums columns, and does something else than that."""
        if not self.summed:
            return False
        return (
            bool(self.checks) or any(f.lanes > 1 for f in self.folds) or any(n not in self.summed for n in self.writes)
        )

    @property
    def external(self) -> list[str]:
        """Buffers that the group reads from memory."""
        return [b for b in self.reads if b not in self.writes]

    # -- merging -------------------------------------------------------------------------------------
    def join(self, other: Group, how: Unified) -> None:
        """Take in another group: its tree, and what is known of it, in the axes of both."""
        self.tree = Tree((), (), (self.tree, how.first), (other.tree, how.second))
        if how.first:
            self.move(how.first)
        moved = how.second
        for name, index in other.reads.items():
            mine = self.reads.setdefault(name, {})
            mine.update((shifted(i, moved), None) for i in index) if moved else mine.update(index)
        for n, s in other.stored.items():
            self.stored[n] = s.moved(moved) if moved else s
        self.folds.update((f.moved(moved) if moved else f, None) for f in other.folds)
        self.ordered.update(((axis_of(a, moved), lanes), None) for a, lanes in other.ordered)
        self.checks = self.checks + [image(s, moved) for s in other.checks]
        self.begun = self.begun + [image(s, moved) for s in other.begun]
        self.scanned |= image(other.scanned, moved)
        self.scattered |= other.scattered
        self.inlined |= other.inlined
        self.cost, self.size = self.cost + other.cost, self.size + other.size
        self.instructions += other.instructions
        self.pure, self.whole = self.pure and other.pure, self.whole and other.whole
        self.copies = self.copies or other.copies
        if self.copies and not set(self.nodes).isdisjoint(other.nodes):
            self.nodes = tuple(dict.fromkeys(self.nodes + other.nodes))
            self.survey()  # a value is computed once in a kernel, whoever brought it
        else:
            self.nodes = self.nodes + other.nodes
        if other.last > self.last:
            self.name = other.name
        self.first, self.last = min(self.first, other.first), max(self.last, other.last)

    def copy(self) -> Group:
        """A group whose merges leave this one as it is."""
        made = copy(self)
        made.preds, made.succs, made.inlined = set(self.preds), set(self.succs), set(self.inlined)
        made.stored, made.folds, made.ordered = dict(self.stored), dict(self.folds), dict(self.ordered)
        made.reads = {n: dict(index) for n, index in self.reads.items()}
        return made

    def move(self, env: Substitution) -> None:
        """Rename the axes of what is known."""
        self.reads = {n: {shifted(i, env): None for i in index} for n, index in self.reads.items()}
        self.stored = {n: s.moved(env) for n, s in self.stored.items()}
        self.folds = dict.fromkeys(f.moved(env) for f in self.folds)
        self.ordered = {(axis_of(a, env), lanes): None for a, lanes in self.ordered}
        self.checks = [image(s, env) for s in self.checks]
        self.begun = [image(s, env) for s in self.begun]
        self.scanned = image(self.scanned, env)

    def drop(self, name: str) -> None:
        """A store that is read inside alone: its value travels in registers, and what it needs its readers need."""
        gone = self.stored.pop(name)
        self.inlined.add(name)
        self.reads.pop(name, None)
        for n, s in self.stored.items():
            if name in s.needs:
                self.stored[n] = s._replace(needs=s.needs - {name} | gone.needs, sums=s.sums or gone.sums)
        if any(name in f.needs for f in self.folds):
            self.folds = dict.fromkeys(
                f._replace(needs=f.needs - {name} | gone.needs, nested=f.nested or gone.sums) if name in f.needs else f
                for f in self.folds
            )

    def passes(self) -> int:
        """How often a row is walked that is not held: once a reduction that needs another one, and once for what is
        stored along it behind the last."""
        depth: dict[Value | str, int] = {}
        most = 1
        for _, root in self.tree.flatten():
            for v in topological(root.values):
                below = max((depth[a] for a in v.args), default=0)
                if isinstance(v, Load):
                    below = max(below, depth.get(v.param, 0))
                depth[v] = below + (isinstance(v, Reduce) and not isinstance(v.args[0], (Pick, Reduce)))
            found = max((depth[v] for v in root.values), default=0)
            if isinstance(root, Store):
                depth[root.param] = found
            most = max(most, found + (not root.space.isdisjoint(self.reduced)))
        return most

    # -- its body ------------------------------------------------------------------------------------
    def body(self) -> tuple[tuple[Root, ...], dict[str, Store]]:
        """Stores and checks, and the stores that are read inside alone."""
        roots = [r for _, r in self.tree.flatten()]
        inside = {r.param: r for r in roots if isinstance(r, Store) and r.param in self.inlined}
        return tuple(r for r in roots if not isinstance(r, Store) or r.param not in self.inlined), inside

    def replace_loads(self, stores: Mapping[str, Store]) -> None:
        """Compute what is stored in these at each place where the group loads it."""

        def resolve(v: Value) -> Value | None:
            store = stores.get(v.param) if isinstance(v, Load) else None
            return None if store is None else read_through(v, store.index, store.value)  # type: ignore[arg-type]

        found = self.tree.flatten()
        self.tree = Tree(rewrite(tuple(r for _, r in found), None, resolve), [place for place, _ in found])
        self.survey()

    def build(self, keep: Callable[[str], bool], buffers: Mapping[str, Buffer], overwritten: Container[str]) -> Launch:
        """The kernel: loads of its own stores forwarded, stores that nobody needs dropped."""
        made = forward(*self.body(), overwritten)
        body = tuple(r for r in made if not isinstance(r, Store) or keep(r.param))
        axes: dict[Axis, None] = {}
        params: dict[str, Param] = {}
        for root in body:
            axes.update(dict.fromkeys(by_name(root.space)))
        for v in topological(v for r in body for v in r.values):
            if isinstance(v, Load):
                if v.param not in params:
                    params[v.param] = buffers[v.param].as_param()
            elif isinstance(v, (Reduce, Scan)):
                axes[v.over] = None
        for root in body:
            if isinstance(root, Store):
                params.setdefault(root.param, buffers[root.param].as_param())
        kernel = Kernel(tuple(axes), tuple(params.values()), body, self.nodes)
        return Launch(kernel, tuple(params), None, self.name)


@lru_cache(4096)
def by_name(space: frozenset[Axis]) -> tuple[Axis, ...]:
    """The axes of a space in an order that does not depend on where they lie."""
    return tuple(sorted(space, key=lambda a: (a.name, a.serial)))


@lru_cache(4096)
def axes_of(spaces: tuple[frozenset[Axis], ...]) -> tuple[Axis, ...]:
    """The axes of some spaces, those of the first before those of the next."""
    return tuple(dict.fromkeys(a for s in spaces for a in by_name(s)))


def axis_of(a: Axis, env: Substitution) -> Axis:
    """What an axis with an order becomes: an axis, as the rules make sure."""
    if a not in env:
        return a
    (found,) = env[a].axes()
    return found


def reach(values: Iterable[Value]) -> tuple[frozenset[str], bool]:
    """The parameters that values load, and whether they are computed from a column's sum."""
    found = topological(values)
    needs = frozenset(v.param for v in found if isinstance(v, Load))
    return needs, any(isinstance(v, Reduce) and v.lanes == 1 for v in found)


def grid_axes(spaces: Iterable[frozenset[Axis]], reduced: frozenset[Axis]) -> frozenset[Axis]:
    """Axes that can be parallel: every root runs over them and none reduces over them."""
    common: frozenset[Axis] | None = None
    for space in spaces:
        common = space if common is None else common & space
    return (common or frozenset()) - reduced


def innermost(group: Group, buffers: Mapping[str, Buffer], nbytes: Mapping[str, int]) -> Axis | None:
    """The axis with unit stride in the group's largest access that has one."""
    accesses = [*group.writes.items(), *((b, next(iter(i))) for b, i in group.reads.items())]
    for name, index in sorted(accesses, key=lambda access: -nbytes[access[0]]):
        for i, stride in zip(index, buffers[name].stride, strict=True):
            if isinstance(i, Expr) and stride is ONE and (found := _fastest(i)) is not None:
                return found
    return None


def _fastest(index: Expr) -> Axis | None:
    """The axis whose every step is one of the index."""
    atom = index.atom
    if isinstance(atom, Mod):
        return _fastest(atom.num)
    return next((a for a in index.axes() if index.coefficient(a) is ONE), None)
