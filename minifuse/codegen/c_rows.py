"""Rows that C keeps: reductions that join several values pass twice over a chunk while it lies in the nearest cache.

When the loop over a chunk is done a helper passes over the chunk's elements, first for the maximum or the mean and then
for what is summed about it, so that memory is walked once and an exponential taken once an element. What lies in memory
as it is reduced is read there; what is computed is stored in a row buffer where another reduction would fold it. The
chunks' results are joined in order, as all are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from minifuse.ir.index import ONE, Expr
from minifuse.ir.shape import product
from minifuse.ir.value import LANES, Load, Value

from .c_text import AHEAD, REGISTER, SCALAR, identities, register, streams
from .looptree import Fold

if TYPE_CHECKING:
    from .c import CDialect
    from .printer import Printer


@dataclass(frozen=True)
class Kept:
    """The buffers of a chunk: one an argument, none where memory is read; each of `size` rows that lie `step` apart."""

    names: tuple[str, ...]
    size: Expr
    step: int


def keeps(fold: Fold) -> bool:
    """Whether a level of a reduction keeps what it folds: the innermost one of a row that has two passes to make."""
    return fold.level == 0 and fold.value.lanes > 1 and f"row{fold.value.kind}" in HELPERS


def in_memory(d: CDialect, p: Printer, fold: Fold) -> Load | None:
    """The argument, where it lies in memory one element behind the other."""
    r, (x, *more) = fold.value, fold.value.args
    if more or not isinstance(x, Load) or x.mask is not None or x.dtype in REGISTER or p.lane is not r.over:
        return None
    if d.deeper(p, fold) or any(isinstance(i, Value) for i in x.index):
        return None
    return x if p.param(x.param).offset(x.index).coefficient(r.over) is ONE else None


def begin(d: CDialect, p: Printer, fold: Fold) -> tuple[str, ...]:
    """Declare the buffers and what the chunk's results are stored in, whose names it gives."""
    r = fold.value
    deeper = d.deeper(p, fold)
    size = product(d.padded(p, a) for a in d.axes_below(p, deeper))
    most = min(r.over.size.value, r.chunk) if r.over.size.is_const else r.chunk
    # Rows a power of two apart would meet in one set of the cache.
    step = -(-most // LANES) * LANES + (LANES if deeper else 0)
    name = p.fresh("a")
    buffers = () if in_memory(d, p, fold) else tuple(f"{name}_x{k}" for k in range(len(r.args)))
    d.kept[fold] = Kept(buffers, size, step)
    for buffer in buffers:
        d.make_local(p, buffer, r.dtype, size * step, p.scopes[0])  # once, not for each chunk
    names = tuple(f"{name}_{k}" for k in range(r.results))
    for n, first in zip(names, identities(r), strict=True):
        if deeper:
            d.make_local(p, n, r.dtype, size)
        else:
            p.line(f"{SCALAR[register(r.dtype)]} {n} = {first};")
    return names


def step(d: CDialect, p: Printer, fold: Fold) -> None:
    """Put an element into its place in the buffers."""
    r, kept = fold.value, d.kept[fold]
    below = d.axes_below(p, d.deeper(p, fold))
    at = f"{d.axis(r.over)} - {start(d, p, fold)}"
    if below:
        at = f"({d.place(p, below)}) * {kept.step} + {at}"
    t = register(r.dtype)
    for buffer, a in zip(kept.names, r.args if kept.names else (), strict=True):
        if p.lane is r.over:
            p.line(f"*(u_{t}*)({buffer} + {at}) = {d.vector(p, a)};")
        elif p.lane in below:
            p.line(f"mf_stores_{t}({buffer} + {at}, {d.vector(p, a)}, {kept.step}, {LANES});")
        else:
            p.line(f"{buffer}[{at}] = {p.name(a)};")


def end(d: CDialect, p: Printer, fold: Fold, names: tuple[str, ...]) -> None:
    """Reduce what is kept, row by row where there are several."""
    r, kept = fold.value, d.kept[fold]
    t, count = register(r.dtype), f"{d.end(p, fold.loop)} - {start(d, p, fold)}"

    def reduced(rows: list[str], results: list[str], ahead: int = 0) -> str:
        given = iter(rows)
        args = [next(given) if a in r.args else "0" for a in r.parts]
        return f"mf_row{r.kind}_{t}({', '.join([*args, count, str(ahead), *results])});"

    if x := in_memory(d, p, fold):
        param = p.param(x.param)
        at = d.place_of(p, param, x)
        call = reduced([at.base], [f"&{n}" for n in names], AHEAD * streams(p, param, at.offset, d.streamed))
        p.line(f"{{ const int64_t {d.axis(r.over)} = {start(d, p, fold)}; {call} }}")
        return
    if not d.deeper(p, fold):
        p.line(reduced(list(kept.names), [f"&{n}" for n in names]))
        return
    p.line(f"for (int64_t c = 0; c < {d.expr(kept.size)}; ++c)")
    p.line("  " + reduced([f"{n} + c * {kept.step}" for n in kept.names], [f"&{n}[c]" for n in names]))


def start(d: CDialect, p: Printer, fold: Fold) -> str:
    """Where the chunk begins along its axis."""
    outer = p.previous(fold.loop)
    return "0" if outer is None else d.var(p, outer)


# -- the helpers --------------------------------------------------------------------------------------
# An array that is 0 holds what an element is by itself: a weight of 1 in a softmax's sum, a count of 1 and no squares
# in a norm. Elements are taken 64 at a time, in four sums that do not wait for one another; what is left behind the
# last 64 is copied to where it can be filled up with what changes nothing.
_FOUR = """
#define MF_FOUR _Pragma("GCC unroll 4") for (int u = 0; u < 4; u++)
#define MF_ALL(x) (((x)[0] + (x)[1]) + ((x)[2] + (x)[3]))
#define MF_AHEAD if (ahead) __builtin_prefetch((const char*)(v + 16 * u) + ahead);
#define MF_BLOCKS for (int64_t k = 0; k < n; k += 64)"""
HELPERS = {
    "over": "MF $V mf_over_$T($V a, $V b) { MF_LANES a[l] = b[l] > a[l] ? b[l] : a[l]; return a; }",
    "kept": "MF $V mf_kept_$T(const $R* p, int u) { return *(const u_$T*)(p + 16 * u); }",
    "left": """
MF void mf_left_$T($R* to, const $R* x, int64_t n, $R fill) {
  if (x) for (int l = 0; l < 64; l++) to[l] = l < n % 64 ? x[n / 64 * 64 + l] : fill;
}""",
    "rowsoftmax": _FOUR + """
MF void mf_rowsoftmax_$T(const $R* x, const $R* w, int64_t n, int64_t ahead, $R* most, $R* sum) {
  const $R least = -($R)__builtin_inf();
  const int64_t whole = n / 64 * 64;
  $R tx[64], tw[64]; mf_left_$T(tx, x, n, least); mf_left_$T(tw, w, n, 0);
  $V a[4]; MF_FOUR a[u] = mf_splat_$T(least);
  MF_BLOCKS {
    const $R* v = k < whole ? x + k : tx;
    MF_FOUR { MF_AHEAD a[u] = mf_over_$T(a[u], mf_kept_$T(v, u)); }
  }
  a[0] = mf_over_$T(mf_over_$T(a[0], a[1]), mf_over_$T(a[2], a[3]));
  $R m = a[0][0]; for (int l = 1; l < 16; l++) m = a[0][l] > m ? a[0][l] : m;
  const $V low = mf_splat_$T(m == least ? 0 : m);
  MF_FOUR a[u] = mf_splat_$T(0);
  MF_BLOCKS {
    const $R *v = k < whole ? x + k : tx, *s = k < whole ? w + k : tw;
    MF_FOUR { $V e = mf_exp_$T(mf_kept_$T(v, u) - low); a[u] += w ? e * mf_kept_$T(s, u) : e; }
  }
  *sum = mf_hreduce_add_$T(MF_ALL(a));
  /* Where infinity is not the reason, what is not a number came in and is the maximum too. */
  if (*sum != *sum) for (int64_t k = 0; k < n; k++) m = x[k] != x[k] ? x[k] : m;
  *most = m;
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
MF void mf_rowwelford_$T(const $R* c, const $R* x, const $R* q, int64_t n, int64_t ahead,
                         $R* count, $R* mean, $R* squares) {
  const int64_t whole = n / 64 * 64;
  $R tc[64], tx[64], tq[64]; mf_left_$T(tc, c, n, 0); mf_left_$T(tx, x, n, 0); mf_left_$T(tq, q, n, 0);
  $V a[4], b[4]; MF_FOUR a[u] = b[u] = mf_splat_$T(0);
  MF_BLOCKS {
    const $R *v = k < whole ? x + k : tx, *s = k < whole ? c + k : tc;
    MF_FOUR {
      MF_AHEAD $V y = mf_kept_$T(v, u);
      if (c) { b[u] += mf_kept_$T(s, u); y *= mf_kept_$T(s, u); }
      a[u] += y;
    }
  }
  *count = c ? mf_hreduce_add_$T(MF_ALL(b)) : n;
  const $R all = *count > 1 ? *count : 1, first = mf_hreduce_add_$T(MF_ALL(a)) / all;
  const $V centre = mf_splat_$T(first);
  mf_left_$T(tx, x, n, first);
  MF_FOUR a[u] = b[u] = mf_splat_$T(0);
  MF_BLOCKS {
    const $R *v = k < whole ? x + k : tx, *s = k < whole ? c + k : tc, *t = k < whole ? q + k : tq;
    MF_FOUR {
      $V away = mf_kept_$T(v, u) - centre, square = away * away;
      if (c) { away *= mf_kept_$T(s, u); square *= mf_kept_$T(s, u); }
      a[u] += away; b[u] += square;
      if (q) b[u] += mf_kept_$T(t, u);
    }
  }
  const $R off = mf_hreduce_add_$T(MF_ALL(a)) / all, left = mf_hreduce_add_$T(MF_ALL(b)) - off * off * *count;
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
}  # fmt: skip

# Pairs (value, index): NaN wins, then the better value, then the smaller index, whatever the order of joining.
_BETTER = "(w $better x) | ((w != w) & (x == x)) | (((w == x) | ((w != w) & (x != x))) & (j < k))"
ARG_REDUCTIONS = {
    name: text.replace("BETTER", _BETTER)
    for op in ("argmax", "argmin")
    for name, text in {
        op: """
MF void mf_${op}_$T($V* v, v_i64* i, $V v2, v_i64 i2) {
  $V x0 = *v, xr; v_i64 k0 = *i, kr;
  MF_LANES {
    $R x = x0[l], w = v2[l]; int64_t k = k0[l], j = i2[l];
    int take = BETTER;
    xr[l] = take ? w : x; kr[l] = take ? j : k;
  }
  *v = xr; *i = kr;
}""",
        op + "_s": """
MF void mf_${op}_${T}_s($R* v, int64_t* i, $R v2, int64_t i2) {
  $R x = *v, w = v2; int64_t k = *i, j = i2;
  if (BETTER) { *v = w; *i = j; }
}""",
        "h" + op: """
MF void mf_h${op}_$T($V v, v_i64 i, $R* out_v, int64_t* out_i) {
  $R x = v[0]; int64_t k = i[0];
  for (int l = 1; l < 16; l++) mf_${op}_${T}_s(&x, &k, v[l], i[l]);
  *out_v = x; *out_i = k;
}""",
    }.items()
}
