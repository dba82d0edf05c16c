"""Integer expressions: sizes (polynomials in symbols) and indices (the same, over axes too).

An `Expr` is a sum of integer multiples of products of atoms. An atom is a symbol (a dynamic size),
an axis (a loop variable with its extent), a floor division or a remainder. Every expression is
interned, so equality is identity and a dictionary lookup is one hash of an address. Simplification
happens when an expression is built: `(768*i + j) // 768` is `i` when `j < 768`, and no later pass
has to look for it.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Mapping
from math import gcd
from typing import Any, ClassVar, Union

Atom = Union["Sym", "Axis", "FloorDiv", "Mod"]
Monomial = tuple[Atom, ...]
IntLike = Union["Expr", int]

_exprs: weakref.WeakValueDictionary[tuple, Expr] = weakref.WeakValueDictionary()
_atoms: weakref.WeakValueDictionary[tuple, Atom] = weakref.WeakValueDictionary()
_serial = itertools.count()

# Layers repeat: of what a compile asks of expressions, some fiftieth is asked for the first time.
_remembered = functools.lru_cache(maxsize=1 << 14)


class _Atom:
    """What the four kinds of atoms share: a sort key, and arithmetic through `Expr`."""

    __slots__ = ("__weakref__", "_expr", "key", "serial")
    key: str
    serial: int
    _expr: Expr

    @property
    def expr(self) -> Expr:
        try:
            return self._expr
        except AttributeError:
            self._expr = Expr.of({(self,): 1})  # type: ignore[dict-item]
            return self._expr

    def __repr__(self) -> str:
        return self.key


class Sym(_Atom):
    """A dynamic size or other integer of a call: a name, and the range `lo..hi` (inclusive; `hi` None is unbounded)."""

    __slots__ = ("hi", "lo", "name")
    name: str
    lo: int
    hi: int | None

    def __new__(cls, name: str, lo: int = 0, hi: int | None = None) -> Sym:
        found = _atoms.get((cls, name, lo, hi))
        if found is None:
            found = super().__new__(cls)
            found.name, found.lo, found.hi = name, lo, hi
            found.key, found.serial = name, next(_serial)
            _atoms[(cls, name, lo, hi)] = found
        return found  # type: ignore[return-value]

    def __reduce__(self) -> tuple:
        return Sym, (self.name, self.lo, self.hi)


class Axis(_Atom):
    """A loop variable `0 <= name < size`. Two axes of one name and different sizes are two axes."""

    __slots__ = ("name", "size")
    name: str
    size: Expr

    def __new__(cls, name: str, size: IntLike) -> Axis:
        size = as_expr(size)
        found = _atoms.get((cls, name, size))
        if found is None:
            found = super().__new__(cls)
            found.name, found.size = name, size
            found.key, found.serial = name, next(_serial)
            _atoms[(cls, name, size)] = found
        return found  # type: ignore[return-value]

    def __reduce__(self) -> tuple:
        return Axis, (self.name, self.size)


class _Division(_Atom):
    """A result of dividing `num` by `den`, built only where it does not simplify."""

    __slots__ = ("den", "num")
    num: Expr
    den: Expr
    sign: ClassVar[str]

    def __new__(cls, num: Expr, den: Expr) -> Any:
        found: Any = _atoms.get((cls, num, den))
        if found is None:
            found = super().__new__(cls)
            found.num, found.den = num, den
            found.key, found.serial = f"({num}) {cls.sign} ({den})", next(_serial)
            _atoms[(cls, num, den)] = found
        return found

    def __reduce__(self) -> tuple:
        return type(self), (self.num, self.den)


class FloorDiv(_Division):
    """`num // den`, rounded towards minus infinity."""

    __slots__ = ()
    sign = "//"


class Mod(_Division):
    """`num % den` with the sign of `den`."""

    __slots__ = ()
    sign = "%"


def _order(atom: Atom) -> tuple[int, str]:
    return (0 if isinstance(atom, Sym) else 1, atom.key)


class Expr:
    """A sum of `coefficient * product of atoms`; `terms` is in canonical order and never changes."""

    __slots__ = ("__weakref__", "_atoms", "_axes", "terms")
    terms: tuple[tuple[Monomial, int], ...]
    _atoms: frozenset[Atom] | None
    _axes: frozenset[Axis] | None

    @staticmethod
    def of(terms: Mapping[Monomial, int]) -> Expr:
        live = [(mono, coef) for mono, coef in terms.items() if coef]
        if len(live) > 1:
            live.sort(key=lambda t: (-len(t[0]), [_order(a) for a in t[0]]))
            live = _fold_remainders(live)
        key = tuple(live)
        found = _exprs.get(key)
        if found is None:
            found = object.__new__(Expr)
            found.terms, found._atoms, found._axes = key, None, None
            _exprs[key] = found
        return found

    def __reduce__(self) -> tuple:
        return Expr.of, (dict(self.terms),)

    # -- queries ---------------------------------------------------------------------------------
    @property
    def is_const(self) -> bool:
        return not self.terms or (len(self.terms) == 1 and not self.terms[0][0])

    @property
    def value(self) -> int:
        """The integer this is. Raises ValueError when it depends on a symbol or an axis."""
        if not self.is_const:
            raise ValueError(f"expected a constant size, found {self}")
        return self.terms[0][1] if self.terms else 0

    @property
    def atom(self) -> Atom | None:
        """The single atom this is, with coefficient one, or None."""
        if len(self.terms) == 1 and self.terms[0][1] == 1 and len(self.terms[0][0]) == 1:
            return self.terms[0][0][0]
        return None

    def atoms(self) -> frozenset[Atom]:
        """All symbols and axes, those inside divisions too."""
        if self._atoms is None:
            found: set[Atom] = set()
            for mono, _ in self.terms:
                for a in mono:
                    if isinstance(a, (FloorDiv, Mod)):
                        found |= a.num.atoms() | a.den.atoms()
                    else:
                        found.add(a)
            self._atoms = frozenset(found)
        return self._atoms

    def axes(self) -> frozenset[Axis]:
        if self._axes is None:
            self._axes = frozenset([a for a in self.atoms() if isinstance(a, Axis)])
        return self._axes

    def symbols(self) -> frozenset[Sym]:
        return frozenset(a for a in self.atoms() if isinstance(a, Sym))

    def coefficient(self, axis: Axis) -> Expr | None:
        """c in `c*axis + rest` with rest free of the axis, or None when it is not of that form."""
        if self.atom is axis:
            return ONE
        out: dict[Monomial, int] = {}
        for mono, coef in self.terms:
            if axis in mono:
                rest = list(mono)
                rest.remove(axis)
                if axis in rest:
                    return None
                out[mono := tuple(rest)] = coef
            for a in mono:
                if isinstance(a, (FloorDiv, Mod)) and axis in a.num.atoms() | a.den.atoms():
                    return None
        return Expr.of(out)

    # -- arithmetic ------------------------------------------------------------------------------
    @_remembered
    def __add__(self, other: IntLike) -> Expr:
        terms = dict(self.terms)
        for mono, coef in as_expr(other).terms:
            terms[mono] = terms.get(mono, 0) + coef
        return Expr.of(terms)

    __radd__ = __add__

    def __neg__(self) -> Expr:
        return self * -1

    def __sub__(self, other: IntLike) -> Expr:
        return self + as_expr(other) * -1

    def __rsub__(self, other: IntLike) -> Expr:
        return as_expr(other) - self

    @_remembered
    def __mul__(self, other: IntLike) -> Expr:
        terms: dict[Monomial, int] = {}
        for m1, c1 in self.terms:
            for m2, c2 in as_expr(other).terms:
                mono = tuple(sorted(m1 + m2, key=_order)) if m1 and m2 else m1 + m2
                terms[mono] = terms.get(mono, 0) + c1 * c2
        return Expr.of(terms)

    __rmul__ = __mul__

    def __floordiv__(self, other: IntLike) -> Expr:
        return divmod_expr(self, as_expr(other))[0]

    def __mod__(self, other: IntLike) -> Expr:
        return divmod_expr(self, as_expr(other))[1]

    def substitute(self, env: Mapping[Atom, Expr]) -> Expr:
        """Replace symbols and axes; the result is simplified anew."""
        return self if not env or self.atoms().isdisjoint(env) else _substitute(self, tuple(env.items()))

    def evaluate(self, env: Mapping[str, int]) -> int:
        """The value with symbols and axes given by name. Raises KeyError naming a missing one."""
        total = 0
        for mono, coef in self.terms:
            for a in mono:
                if isinstance(a, FloorDiv):
                    coef *= a.num.evaluate(env) // a.den.evaluate(env)
                elif isinstance(a, Mod):
                    coef *= a.num.evaluate(env) % a.den.evaluate(env)
                else:
                    coef *= env[a.name]
            total += coef
        return total

    def render(self, leaf: Callable[[Sym | Axis], str], div: str = "//", mod: str = "%") -> str:
        """Text with `leaf` naming symbols and axes and the target's own division and remainder.

        `div` and `mod` are an operator, or a function name ending in "(" for a call.
        """
        if not self.terms:
            return "0"

        def binary(how: str, a: Expr, b: Expr) -> str:
            left, right = a.render(leaf, div, mod), b.render(leaf, div, mod)
            return f"{how}{left}, {right})" if how.endswith("(") else f"(({left}) {how} ({right}))"

        parts = []
        for mono, coef in self.terms:
            factors = [
                binary(div, a.num, a.den)
                if isinstance(a, FloorDiv)
                else binary(mod, a.num, a.den)
                if isinstance(a, Mod)
                else leaf(a)
                for a in mono
            ]
            if abs(coef) != 1 or not factors:
                factors.insert(0, str(abs(coef)))
            parts.append(("-" if coef < 0 else "+", "*".join(factors)))
        head = ("-" if parts[0][0] == "-" else "") + parts[0][1]
        return head + "".join(f" {sign} {text}" for sign, text in parts[1:])

    def __repr__(self) -> str:
        return self.render(lambda a: a.name)

    # -- bounds ----------------------------------------------------------------------------------
    def lower(self) -> Expr | None:
        """A lower bound free of axes, or None where none is known."""
        return _bound(self, low=True)

    def upper(self) -> Expr | None:
        """An upper bound (inclusive) free of axes, or None where none is known."""
        return _bound(self, low=False)

    def is_nonneg(self) -> bool:
        """True when it is provably >= 0 for every value of its axes and symbols."""
        low = self.lower()
        return low is not None and _min_value(low) >= 0

    def max_value(self) -> int | None:
        """The largest value over all axes and symbols, or None when unbounded."""
        least = _UNBOUNDED if (high := self.upper()) is None else _min_value(-high)
        return None if least <= _UNBOUNDED // 2 else -least  # an infinite end, whatever was added to it


@_remembered
def _substitute(e: Expr, pairs: tuple[tuple[Atom, Expr], ...]) -> Expr:
    env = dict(pairs)
    total = ZERO
    for mono, coef in e.terms:
        product = as_expr(coef)
        for a in mono:
            if isinstance(a, FloorDiv):
                product = product * (a.num.substitute(env) // a.den.substitute(env))
            elif isinstance(a, Mod):
                product = product * (a.num.substitute(env) % a.den.substitute(env))
            else:
                product = product * env.get(a, a.expr)
        total = total + product
    return total


def as_expr(x: IntLike) -> Expr:
    return x if isinstance(x, Expr) else _constant(x)


@functools.lru_cache(maxsize=4096)
def _constant(x: int) -> Expr:
    return Expr.of({(): x} if x else {})


ZERO = as_expr(0)
ONE = as_expr(1)
_UNBOUNDED = -(1 << 62)


def _fold_remainders(live: list[tuple[Monomial, int]]) -> list[tuple[Monomial, int]]:
    """`d*(x // d) + x % d` is `x`, `d*(x % (k*d) // d) + x % d` is `x % (k*d)`: undo a split put together again."""
    if not (mods := [(m, c, a) for m, c in live for a in m if isinstance(a, Mod)]):
        return live
    terms = dict(live)
    for mono, coef, a in mods:
        (rest := list(mono)).remove(a)
        inner = [f.num for m, _ in live for f in m if isinstance(f, FloorDiv) and f.den is a.den and _digits(f.num, a)]
        for number in (a.num, *inner):
            quotient = number // a.den
            wanted = Expr.of({tuple(rest): coef}) * a.den * quotient
            if quotient.terms and all(terms.get(m) == c for m, c in wanted.terms) and mono in terms:
                for m, _ in wanted.terms:
                    del terms[m]
                del terms[mono]
                whole = Expr.of(terms) + Expr.of({tuple(rest): coef}) * number
                return list(whole.terms)
    return live


def _digits(m: Expr, low: Mod) -> bool:
    """Whether a number is a remainder of the same one by a multiple of what the low digit is one by."""
    known = isinstance(m.atom, Mod) and m.atom.num is low.num and m.atom.den.is_const and low.den.is_const
    return known and m.atom.den.value % low.den.value == 0  # type: ignore[union-attr]


def _min_value(e: Expr) -> int:
    """The least value of an expression free of axes, by the ranges of its symbols."""
    total = 0
    for mono, coef in e.terms:
        low, high = 1, 1
        for a in mono:
            ends = _ends(a)
            if ends is None:
                return _UNBOUNDED
            # An infinite end stays one whatever it is multiplied by: the least is then unknown, which is safe.
            corners = [x * y for x in (low, high) for y in ends]
            low, high = max(min(corners), _UNBOUNDED), min(max(corners), -_UNBOUNDED)
        total += coef * (low if coef > 0 else high)
    return max(total, _UNBOUNDED)


def _ends(a: _Atom) -> tuple[int, int] | None:
    """The least and the largest value of a symbol, or of a quotient or remainder that is not negative."""
    if isinstance(a, Sym):
        return a.lo, -_UNBOUNDED if a.hi is None else a.hi
    if isinstance(a, (FloorDiv, Mod)) and a.num.is_nonneg() and (a.den - 1).is_nonneg():
        top = (a.den - 1).max_value() if isinstance(a, Mod) else a.num.max_value()
        return 0, -_UNBOUNDED if top is None else top
    return None


@_remembered
def _bound(e: Expr, low: bool) -> Expr | None:
    total = ZERO
    for mono, coef in e.terms:
        product = as_expr(coef)
        want_small = (coef > 0) == low
        if len(mono) > 1 and any(isinstance(a, Sym) and a.lo < 0 for a in mono):
            return None  # of unknown sign: it turns the bounds of what it multiplies
        for a in mono:
            if isinstance(a, Sym):
                product = product * a.expr
            elif isinstance(a, Axis):
                product = ZERO if want_small else product * (a.size - 1)
            else:
                if not (a.num.is_nonneg() and (a.den - 1).is_nonneg()):
                    return None
                if want_small:
                    product = ZERO
                elif isinstance(a, Mod):
                    product = product * (a.den - 1)
                else:
                    top = a.num.upper()
                    if top is None:
                        return None
                    product = product * (top // a.den)
        total = total + product
    return total


def _below(e: Expr, n: IntLike) -> bool:
    """Whether `0 <= e < n` for every value of its axes and symbols."""
    return e.is_nonneg() and (top := e.upper()) is not None and (n - 1 - top).is_nonneg()


@_remembered
def divmod_expr(num: Expr, den: Expr) -> tuple[Expr, Expr]:
    """Floor division and remainder, simplified by the ranges of axes and symbols.

    Raises ZeroDivisionError when the divisor is the constant zero.
    """
    if den.is_const:
        if den.value == 0:
            raise ZeroDivisionError(f"{num} // 0")
        if den.value == 1:
            return num, ZERO
        if num.is_const:
            return as_expr(num.value // den.value), as_expr(num.value % den.value)
    if len(den.terms) != 1:
        if num is den:
            return ONE, ZERO
        return _opaque_divmod(ZERO, num, den)
    (d_mono, d_coef), *_ = den.terms
    whole: dict[Monomial, int] = {}
    rest: dict[Monomial, int] = {}
    for mono, coef in num.terms:
        left = list(mono)
        try:
            for a in d_mono:
                left.remove(a)
        except ValueError:
            rest[mono] = coef
            continue
        if coef % d_coef == 0:
            whole[tuple(left)] = coef // d_coef
        elif not d_mono and not mono:
            q, r = divmod(coef, d_coef)
            if q:
                whole[()] = q
            rest[()] = r
        else:
            rest[mono] = coef
    return _opaque_divmod(Expr.of(whole), Expr.of(rest), den)


def _opaque_divmod(quotient: Expr, r: Expr, den: Expr) -> tuple[Expr, Expr]:
    """The quotient and remainder of `den*quotient + r`, where r shares no multiple of den."""
    if not r.terms:
        return quotient, ZERO
    if not den.is_nonneg():
        return quotient + FloorDiv(r, den).expr, Mod(r, den).expr
    if _below(r, den):
        return quotient, r
    if _below(r + den, den):
        return quotient - 1, r + den
    scale = abs(den.terms[0][1]) if len(den.terms) == 1 else 1
    for g in sorted({gcd(scale, c) for _, c in r.terms} - {1}, reverse=True):
        # g*A + B with 0 <= B < g: the low part B never carries into the quotient
        high = Expr.of({m: c // g for m, c in r.terms if c % g == 0})
        low = Expr.of({m: c for m, c in r.terms if c % g})
        if _below(low, g):
            q, m = divmod_expr(high, Expr.of({den.terms[0][0]: den.terms[0][1] // g}))
            return quotient + q, m * g + low
    atom = r.atom
    if isinstance(atom, FloorDiv) and r.is_nonneg():
        return quotient + atom.num // (atom.den * den), Mod(r, den).expr
    if isinstance(atom, Mod) and atom.den.is_const and den.is_const and atom.den.value % den.value == 0:
        return quotient + FloorDiv(r, den).expr, atom.num % den
    return quotient + FloorDiv(r, den).expr, Mod(r, den).expr
