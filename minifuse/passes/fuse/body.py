"""The bodies of merged kernels: loads of what the kernel itself stores become the values stored."""

from __future__ import annotations

from collections.abc import Container, Mapping

from minifuse.ir.index import Axis, Expr
from minifuse.ir.kernel import Root, Store, with_values
from minifuse.ir.value import Cast, Const, Index, IndexOf, Load, Op, Value, at_values, topological

from .unify import Substitution


def forward(body: tuple[Root, ...], inlined: Mapping[str, Store], overwritten: Container[str] = ()) -> tuple[Root, ...]:
    """Replace each load of something that the group computes by the value itself.

    Loads of an `overwritten` input mean what it held before.

    A load at another index than the store's is the store's value at that index (inlining); its
    loads are then masked as the load was.
    """
    apart = {r.param for r in body if isinstance(r, Store) and (r.mode or r.param in overwritten)}
    stores = {r.param: r for r in body if isinstance(r, Store) and r.param not in apart} | dict(inlined)
    out: dict[Value, Value] = {}
    stack = [v for r in body for v in r.values]
    while stack:
        v = stack[-1]
        if v in out:
            stack.pop()
            continue
        store = stores.get(v.param) if isinstance(v, Load) else None
        waiting = [a for a in (v.args if store is None else (*v.args, store.value)) if a not in out]
        if waiting:
            stack.extend(waiting)
            continue
        args = tuple([out[a] for a in v.args])
        new = v if args == v.args else v.rebuild(args, lambda e: e)
        out[v] = new if store is None else read_through(new, store.index, out[store.value])  # type: ignore[arg-type]
    return tuple(with_values(r, out) for r in body)


def read_through(load: Load, index: tuple[Index, ...], value: Value) -> Value:
    """What a load of a value that is stored at an index reads: the value at the load's own index."""
    moved = load.index != index
    value = at_index(value, index, load.index) if moved else value
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


def shifted(index: tuple[Index, ...], env: Substitution) -> tuple[Index, ...]:
    """An index with axes substituted, in its computed coordinates too."""
    out: dict[Value, Value] = {}
    for v in topological(i for i in index if isinstance(i, Value)):
        out[v] = v.rebuild(tuple(out[a] for a in v.args), lambda e: e.substitute(env))  # type: ignore[arg-type]
    return tuple(i.substitute(env) if isinstance(i, Expr) else out[i] for i in index)  # type: ignore[arg-type]


def compose(inner: Substitution, outer: Substitution) -> Substitution:
    """The substitution that does `inner`, then `outer`."""
    if not inner or not outer:
        return inner or outer
    both = {a: e.substitute(outer) for a, e in inner.items()}  # type: ignore[arg-type]
    return {**{a: e for a, e in outer.items() if a not in inner}, **both}
