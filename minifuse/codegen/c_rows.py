"""Rows that C keeps: reductions that join several values pass twice over a chunk while it lies in the nearest cache.

An element is stored in a row buffer where another reduction would fold it. When the chunk is complete one helper passes
over it, first for the maximum or the mean and then for what is summed about it, so that an exponential is taken once an
element. The chunks' results are joined in order, as all are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from minifuse.ir.index import ONE, Expr, as_expr
from minifuse.ir.shape import cdiv, product

from .c_text import SCALAR, identities, register
from .looptree import Fold

if TYPE_CHECKING:
    from .c import CDialect
    from .printer import Printer

STEP = 64
"""Elements that a helper takes at a time, in four sums that do not wait for one another."""


@dataclass(frozen=True)
class Kept:
    """The buffers of a chunk: one an argument, of `length` rows of `size` elements."""

    names: tuple[str, ...]
    length: int
    size: Expr


def keeps(fold: Fold) -> bool:
    """Whether a level of a reduction keeps what it folds: the innermost one of a row that joins several values."""
    r = fold.value
    return fold.level == 0 and r.lanes > 1 and len(r.parts) > 1 and all(a.dtype is r.dtype for a in r.parts)


def begin(d: CDialect, p: Printer, fold: Fold) -> tuple[str, ...]:
    """Declare the buffers and what the chunk's results are stored in, whose names it gives."""
    r = fold.value
    deeper = d.deeper(p, fold)
    size = product(d.padded(p, a) for a in d.axes_below(p, deeper)) if deeper else ONE
    most = min(r.over.size.value, r.chunk) if r.over.size.is_const else r.chunk
    length = -(-most // STEP) * STEP
    name = p.fresh("a")
    d.kept[fold] = Kept(tuple(f"{name}_x{k}" for k in range(len(r.args))), length, size)
    for buffer in d.kept[fold].names:
        d.make_local(p, buffer, r.dtype, size * length)
    names = tuple(f"{name}_{k}" for k in range(r.results))
    for n, start in zip(names, identities(r), strict=True):
        if deeper:
            d.make_local(p, n, r.dtype, size)
        else:
            p.line(f"{SCALAR[register(r.dtype)]} {n} = {start};")
    return names


def step(d: CDialect, p: Printer, fold: Fold) -> None:
    """Put an element into its place in the buffers."""
    r, kept = fold.value, d.kept[fold]
    below = d.axes_below(p, d.deeper(p, fold))
    lanes = p.lane is r.over or p.lane in below
    at = f"{d.axis(r.over)} - {start(d, p, fold)}"
    if below:
        at = f"({at}) * ({d.expr(kept.size)}) + {d.place(p, below)}"
    t = register(r.dtype)
    for buffer, a in zip(kept.names, r.args, strict=True):
        value = d.vector(p, a) if lanes else p.name(a)
        p.line(f"*(u_{t}*)({buffer} + {at}) = {value};" if lanes else f"{buffer}[{at}] = {value};")


def end(d: CDialect, p: Printer, fold: Fold, names: tuple[str, ...]) -> None:
    """Reduce what is kept, row by row where there are several."""
    r, kept = fold.value, d.kept[fold]
    t, count = register(r.dtype), f"{d.end(p, fold.loop)} - {start(d, p, fold)}"

    def reduced(buffers: list[str], results: list[str]) -> str:
        given = iter(buffers)
        args = [next(given) if a in r.args else "0" for a in r.parts]
        return f"mf_row{r.kind}_{t}({', '.join([*args, count, *results])});"

    if not d.deeper(p, fold):
        p.line(reduced(list(kept.names), [f"&{n}" for n in names]))
        return
    size = d.expr(kept.size)
    p.line(f"for (int64_t c = 0; c < {size}; ++c) {{")
    for n in kept.names:
        p.line(f"  {SCALAR[t]} {n}r[{kept.length}] __attribute__((aligned(64)));")
        p.line(f"  for (int64_t k = 0; k < {count}; ++k) {n}r[k] = {n}[k * ({size}) + c];")
    p.line("  " + reduced([f"{n}r" for n in kept.names], [f"&{n}[c]" for n in names]))
    p.line("}")


def start(d: CDialect, p: Printer, fold: Fold) -> str:
    """Where the chunk begins along its axis."""
    outer = p.previous(fold.loop)
    return "0" if outer is None else d.var(p, outer)


# -- the helpers --------------------------------------------------------------------------------------
# An array that is 0 holds what an element is by itself: a weight of 1 in a softmax's sum, a count of 1 and no squares in
# a norm. Arrays reach to the next multiple of 64 elements and are filled up there with what changes nothing.
_FOUR = """
#define MF_FOUR _Pragma("GCC unroll 4") for (int u = 0; u < 4; u++)
#define MF_AT(x) (*(u_$T*)((x) + k + 16 * u))
#define MF_SUM(a) mf_hreduce_add_$T(((a)[0] + (a)[1]) + ((a)[2] + (a)[3]))"""
HELPERS = {
    "rowsoftmax": _FOUR + """
MF void mf_rowsoftmax_$T($R* x, $R* w, int64_t n, $R* most, $R* sum) {
  const $R least = -($R)__builtin_inf();
  const int64_t end = (n + 63) / 64 * 64;
  for (int64_t k = n; k < end; k++) { x[k] = least; if (w) w[k] = 0; }
  $V a[4]; MF_FOUR a[u] = mf_splat_$T(least);
  for (int64_t k = 0; k < end; k += 64) MF_FOUR a[u] = mf_maximum_$T(a[u], MF_AT(x));
  *most = mf_hreduce_maximum_$T(mf_maximum_$T(mf_maximum_$T(a[0], a[1]), mf_maximum_$T(a[2], a[3])));
  const $V low = mf_splat_$T(*most == least ? 0 : *most);
  MF_FOUR a[u] = mf_splat_$T(0);
  for (int64_t k = 0; k < end; k += 64)
    MF_FOUR { $V e = mf_exp_$T(MF_AT(x) - low); a[u] += w ? e * MF_AT(w) : e; }
  *sum = MF_SUM(a);
}""",
    "softmax": """
/* Joins maxima and sums; infinities that are equal have no difference. */
MF void mf_softmax_$T($V* m, $V* s, $V w, $V t) {
  $V a = *m, b = *s, e, r;
  MF_LANES e[l] = a[l] == w[l] ? 0 : -__builtin_fabs$f(a[l] - w[l]);
  e = mf_exp_$T(e);
  MF_LANES r[l] = w[l] > a[l] ? b[l] * e[l] + t[l] : b[l] + t[l] * e[l];
  *m = mf_maximum_$T(a, w); *s = r;
}""",
    "softmax_s": """
MF void mf_softmax_${T}_s($R* m, $R* s, $R w, $R t) {
  $R e = mf_exp_${T}_s(*m == w ? 0 : -__builtin_fabs$f(*m - w));
  *s = w > *m ? *s * e + t : *s + t * e;
  *m = mf_maximum_${T}_s(*m, w);
}""",
    "rowwelford": _FOUR + """
MF void mf_rowwelford_$T($R* c, $R* x, $R* q, int64_t n, $R* count, $R* mean, $R* squares) {
  const int64_t end = (n + 63) / 64 * 64;
  for (int64_t k = n; k < end; k++) { x[k] = 0; if (c) c[k] = 0; if (q) q[k] = 0; }
  $V a[4], b[4]; MF_FOUR a[u] = b[u] = mf_splat_$T(0);
  for (int64_t k = 0; k < end; k += 64)
    MF_FOUR { a[u] += c ? MF_AT(c) * MF_AT(x) : MF_AT(x); if (c) b[u] += MF_AT(c); }
  *count = c ? MF_SUM(b) : n;
  const $R all = *count > 1 ? *count : 1, first = MF_SUM(a) / all;
  const $V centre = mf_splat_$T(first);
  for (int64_t k = n; k < end; k++) x[k] = first;
  MF_FOUR a[u] = b[u] = mf_splat_$T(0);
  for (int64_t k = 0; k < end; k += 64)
    MF_FOUR {
      $V away = MF_AT(x) - centre, square = away * away;
      a[u] += c ? MF_AT(c) * away : away; b[u] += c ? MF_AT(c) * square : square; if (q) b[u] += MF_AT(q);
    }
  const $R off = MF_SUM(a) / all, left = MF_SUM(b) - off * off * *count;
  *mean = first + off; *squares = left < 0 ? 0 : left;
}""",
    "welford": """
/* Joins counts, means and squares about these (Chan, Golub and LeVeque, 1983). */
MF void mf_welford_$T($V* n, $V* m, $V* q, $V k, $V w, $V r) {
  $V a = *n, b = *m, c = *q;
  MF_LANES {
    $R all = a[l] + k[l], away = w[l] - b[l], part = k[l] / (all > 1 ? all : 1);
    c[l] = c[l] + r[l] + away * (away * (a[l] * part)); b[l] = b[l] + away * part; a[l] = all;
  }
  *n = a; *m = b; *q = c;
}""",
    "welford_s": """
MF void mf_welford_${T}_s($R* n, $R* m, $R* q, $R k, $R w, $R r) {
  $R all = *n + k, away = w - *m, part = k / (all > 1 ? all : 1);
  *q = *q + r + away * (away * (*n * part)); *m = *m + away * part; *n = all;
}""",
}
