"""Unification: whether two kernels can share loops, and how their axes map onto one another.

Two kernels that touch a common buffer give equations between their index expressions. Solving them
by substituting axes says which loop of one is which loop of the other. An axis that no equation
binds is paired with a free one of the same extent, so that a row that was reduced and the row that
is written next are one loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from minifuse.ir.index import ONE, ZERO, Axis, Expr, FloorDiv, Mod

Substitution = dict[Axis, Expr]
Equation = tuple[Expr, Expr]


def image(axes: Iterable[Axis], env: Mapping[Axis, Expr]) -> frozenset[Axis]:
    """The axes that these become."""
    if not env:
        return frozenset(axes)
    return frozenset().union(*(env[x].axes() if x in env else {x} for x in axes))


class Places(NamedTuple):
    """Indices that a refusal is about: shown with the extents of their loops, for two may differ in nothing else."""

    at: Sequence[Expr]

    def __str__(self) -> str:
        words = []
        for e in self.at:
            loops = ", ".join(f"{a} < {a.size}" for a in sorted(e.axes(), key=str))
            words.append(loops if isinstance(e.atom, Axis) else f"{e} ({loops})" if loops else str(e))
        return ", ".join(words)


class Refusal(NamedTuple):
    """Why two kernels stay apart: the rule, a template of words where they are not the rule's, and the values that
    broke it."""

    rule: str
    reason: str
    facts: Mapping[str, Any]


class Unified(NamedTuple):
    """Axes of the first and of the second kernel, in terms of the merged kernel's axes.

    `chunked`: the merged kernel runs by chunks of rows, whose column sums another one joins.
    """

    first: Substitution
    second: Substitution
    chunked: bool = False

    def apart(self, first: Sequence[Axis], second: Sequence[Axis]) -> bool:
        """Whether each of the two has loops that the other has not."""
        mine, theirs = image(first, self.first), image(second, self.second)
        return not mine <= theirs and not theirs <= mine


def mixed_radix(images: Sequence[tuple[Axis, Expr]]) -> bool:
    """Whether the images run over the product of their axes' extents exactly once.

    Each image must stay inside its axis, and the images, linearised by the extents, must be digits of distinct axes:
    each axis' factor is the product of the extents below it. An axis that is walked backwards counts as one walked
    forwards.
    """
    if not all(inside(image, axis) for axis, image in images):
        return False
    total, step = ZERO, ONE
    for axis, image in reversed(images):
        total = total + image * step
        step = step * axis.size
    backwards = [m[0] for m, coef in total.terms if coef < 0 and len(m) == 1 and isinstance(m[0], Axis)]
    if backwards:
        total = total.substitute({a: a.size - 1 - a.expr for a in backwards})
    digits: dict[Expr, Axis] = {}
    for mono, coef in total.terms:
        axes = [a for a in mono if isinstance(a, Axis)]
        if len(axes) != 1 or any(not isinstance(a, Axis) and not hasattr(a, "lo") for a in mono):
            return False
        factor = total.coefficient(axes[0])
        if factor is None or factor in digits:
            return False
        digits[factor] = axes[0]
        if coef <= 0:
            return False
    reach = ONE
    for _ in range(len(digits)):
        axis_at = digits.pop(reach, None)
        if axis_at is None:
            return False
        reach = reach * axis_at.size
    return reach is step


def inside(image: Expr, axis: Axis) -> bool:
    """Whether an image of an axis is provably one of its points, everywhere."""
    atom = image.atom
    if isinstance(atom, Axis) and atom.size is axis.size:
        return True
    if not image.is_nonneg():
        return False
    if isinstance(atom, FloorDiv):
        return (axis.size * atom.den - 1 - atom.num).is_nonneg()
    return (axis.size - 1 - image).is_nonneg()


def _assignable(image: Expr, axis: Axis) -> bool:
    """A bare axis stands for another only with the same extent; compounds are checked together."""
    atom = image.atom
    return not isinstance(atom, Axis) or atom.size is axis.size


def unify(
    hard: Iterable[Equation],
    soft: Iterable[Equation],
    first: Sequence[Axis],
    second: Sequence[Axis],
    reduced: frozenset[Axis],
) -> Unified | Refusal:
    """Solve `hard` (all must hold) and use `soft` as hints; axes left over are paired by extent.

    The two kernels' axes are taken as different variables even where they are one object.
    """
    hard, soft = list(hard), list(soft)
    if all(p is c for p, c in hard) and all(p is c for p, c in soft):
        mine, theirs = set(first), set(second)
        if mine <= theirs or theirs <= mine:
            return Unified({}, {})  # one's loops are among the other's
    to_first: Substitution = {}
    to_second: Substitution = {}
    later: list[Equation] = []
    for p, c in hard:
        axis = p.atom
        if isinstance(axis, Axis) and _assignable(c, axis):
            known = to_first.get(axis)
            if known is None:
                to_first[axis] = c
            elif known is not c:
                return _differ(known, c)
        else:
            later.append((p, c))
    own: dict[Axis, Axis] = {}
    for p, c in later:
        free = [a for a in p.axes() if a not in to_first]
        axis = c.atom
        split = bool(free) or not isinstance(p.atom, Axis)
        if split and isinstance(axis, Axis) and axis not in to_second and not _used(axis, to_first):
            for a in free:
                own.setdefault(a, _fresh(a, (*second, *(b for b in first if b is not a)), own.values()))
                to_first[a] = own[a].expr
            to_second[axis] = p.substitute({a: to_first[a] for a in p.axes()})
            continue
        if free and (pairs := _digit_by_digit(p, c, to_first, to_second)):
            to_first.update(pairs)
        free = [a for a in p.axes() if a not in to_first]
        image = p.substitute({a: to_first.get(a, a.expr) for a in p.axes()})
        target = c.substitute(to_second)  # type: ignore[arg-type]
        if free or image is not target:
            return _differ(p, c)
    if to_second:
        to_first = {a: e.substitute(to_second) for a, e in to_first.items()}  # type: ignore[arg-type]
    for images, axes in ((to_first, first), (to_second, second)):
        placed = [(a, images[a]) for a in axes if a in images]
        if not mixed_radix(placed):
            found = {"images": Places([e for _, e in placed]), "axes": Places([a.expr for a, _ in placed])}
            return Refusal("partial rows", "", found)
    kept = {a for a in second if a not in to_second}
    for axis, e in to_second.items():
        if not kept.isdisjoint(e.axes()):
            return _differ(e, axis.expr)
    taken = {a for e in to_first.values() for a in e.axes()}
    free_second = [a for a in second if a not in taken and a not in to_second]

    def pair(p: Axis, c: Axis) -> None:
        to_first[p] = c.expr
        free_second.remove(c)

    for p, c in soft:
        x, y = p.atom, c.atom
        if isinstance(x, Axis) and isinstance(y, Axis) and x not in to_first and y in free_second and x.size is y.size:
            pair(x, y)
    left = [a for a in first if a not in to_first]
    for a in list(left):
        if a in free_second and (a in reduced) == (a in reduced):
            pair(a, a)
            left.remove(a)
    for a in list(left):
        match = next((b for b in free_second if b.size is a.size), None)
        if match is not None:
            pair(a, match)
            left.remove(a)
    for a in left:
        own[a] = _fresh(a, (*second, *(b for b in first if b is not a)), own.values())
        to_first[a] = own[a].expr
    return Unified(
        {a: e for a, e in to_first.items() if e.atom is not a},
        {a: e for a, e in to_second.items() if e.atom is not a},
    )


def along(
    hard: Sequence[Equation], soft: Sequence[Equation], first: Sequence[Axis], second: Sequence[Axis]
) -> Unified | None:
    """The second kernel by the loops of the first, where what they share says where each of its axes is: a norm over
    groups of channels gives the channels as `8*group + element // 1024`. None where it does not."""
    images: Substitution = {}
    for p, c in (*hard, *soft):
        if isinstance(c.atom, Axis) and c.atom not in images:
            images[c.atom] = p
    if images.keys() != set(second) or not mixed_radix([(a, images[a]) for a in second]):
        return None
    if any(p is not c.substitute(images) for p, c in hard):  # type: ignore[arg-type]
        return None
    if {a for e in images.values() for a in e.axes()} != set(first):
        return None
    return Unified({}, {a: e for a, e in images.items() if e.atom is not a})


def _digit_by_digit(p: Expr, c: Expr, first: Substitution, second: Substitution) -> Substitution | None:
    """Axes of two sums of axes that have the same factors and extents, `128*i + j` twice: equal where each digit is."""
    one, other = p.atom, c.atom
    if isinstance(one, (FloorDiv, Mod)) and type(one) is type(other) and one.den is other.den:
        return _digit_by_digit(one.num, other.num, first, second)  # the same digits of two numbers: the same number
    mine = {p.coefficient(a): a for a in p.axes()}
    theirs = {c.coefficient(a): a for a in c.axes() if a not in second}
    if None in mine or mine.keys() != theirs.keys() or len(mine) < len(p.axes()) or len(theirs) < len(c.axes()):
        return None
    known = {a for a in mine.values() if a in first}
    pairs = {a: theirs[k] for k, a in mine.items()}
    if any(first[a] is not pairs[a].expr for a in known):
        return None
    new = {a: b for a, b in pairs.items() if a not in known}
    if any(a.size is not b.size for a, b in new.items()) or any(_used(b, first) for b in new.values()):
        return None
    return {a: b.expr for a, b in new.items()}


def _differ(left: Expr, right: Expr) -> Refusal:
    return Refusal("different rows", "", {"left": Places([left]), "right": Places([right])})


def _used(axis: Axis, images: Substitution) -> bool:
    return any(axis in e.atoms() for e in images.values())


def _fresh(axis: Axis, avoid: Sequence[Axis], more: Iterable[Axis]) -> Axis:
    """The axis itself, or one of its extent under a name that the others do not use."""
    names = {a.name for a in avoid} | {a.name for a in more}
    if axis.name not in names:
        return axis
    k = 1
    while f"{axis.name}_{k}" in names:
        k += 1
    return Axis(f"{axis.name}_{k}", axis.size)
