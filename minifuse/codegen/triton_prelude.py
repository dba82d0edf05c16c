"""What Triton kernels call: `mf_…` functions as source, of which a module holds those that it uses.

Every function is short and stands in the generated file beside the kernels, so that the file can be
read, run and changed on its own. Types follow the arguments; float16 and bfloat16 values are float32
already rounded to their format.
"""

from __future__ import annotations

import re

from minifuse.ir.dtypes import BYTE_FLOATS

HEAD = """import triton
import triton.language as tl
from triton.language.extra import libdevice
"""

_INTEGERS = '''
@triton.jit
def mf_wrap(a, b):
    """The remainder of an index, with the sign of b, which is not 0."""
    return (a % b + b) % b

@triton.jit
def mf_floor(a, b):
    """An index divided by b, rounded down."""
    return (a - (a % b + b) % b) // b

@triton.jit
def mf_truncdiv(a, b):
    """a / b towards zero; 0 where b is 0, and the wrapped -a where b is -1."""
    safe = tl.where((b == 0) | (b + 1 == 0), b * 0 + 1, b)
    if a.dtype.is_int_unsigned():
        return tl.where(b == 0, a * 0, a // tl.where(b == 0, b * 0 + 1, b))
    else:
        return tl.where(b == 0, a * 0, tl.where(b + 1 == 0, 0 - a, a // safe))

@triton.jit
def mf_rem(a, b):
    """The remainder of mf_truncdiv, with the sign of a."""
    if a.dtype.is_int_unsigned():
        return tl.where(b == 0, a * 0, a % tl.where(b == 0, b * 0 + 1, b))
    else:
        bad = (b == 0) | (b + 1 == 0)
        return tl.where(bad, a * 0, a % tl.where(bad, b * 0 + 1, b))

@triton.jit
def mf_floordiv(a, b):
    """a / b towards minus infinity; 0 where b is 0."""
    q = mf_truncdiv(a, b)
    if a.dtype.is_int_unsigned():
        return q
    else:
        r = mf_rem(a, b)
        return tl.where((r != 0) & ((r < 0) != (b < 0)), q - 1, q)

@triton.jit
def mf_mod(a, b):
    """The remainder of mf_floordiv, with the sign of b."""
    r = mf_rem(a, b)
    if a.dtype.is_int_unsigned():
        return r
    else:
        return tl.where((r != 0) & ((r < 0) != (b < 0)), r + b, r)
'''
_ELEMENTS = '''
@triton.jit
def mf_logaddexp(a, b):
    """log(exp(a) + exp(b)); infinities that are equal have no difference."""
    return mf_maximum(a, b) + libdevice.log1p(libdevice.exp(tl.where(a == b, 0.0, -tl.abs(a - b))))

@triton.jit
def mf_invert(a):
    """Every bit turned; the other truth of a bool."""
    if a.dtype.is_int1():
        return a == 0
    else:
        return a ^ (a * 0 - 1)

@triton.jit
def mf_shl(a, b):
    """a * 2**b modulo the width; 0 where b is no bit of it."""
    bad = (b < 0) | (b >= a.dtype.primitive_bitwidth)
    return tl.where(bad, a * 0, a << tl.where(bad, b * 0, b))

@triton.jit
def mf_shr(a, b):
    """a / 2**b rounded down; the sign alone where b is no bit of the width."""
    bad = (b < 0) | (b >= a.dtype.primitive_bitwidth)
    sign = tl.where(a < 0, a * 0 - 1, a * 0)
    return tl.where(bad, sign, a >> tl.where(bad, b * 0, b))

@triton.jit
def mf_bf16(x):
    """Round float32 to bfloat16, to nearest even."""
    return x.to(tl.bfloat16).to(tl.float32)

@triton.jit
def mf_f16(x):
    """Round float32 to float16, to nearest even."""
    return x.to(tl.float16).to(tl.float32)

@triton.jit
def mf_philox(seed, offset, i):
    """The words of Philox4x32-10: key `seed`, counter (i, offset), each 64 bits as two halves."""
    o = tl.full([], offset, tl.int64)
    return tl.philox(
        seed, i.to(tl.uint32), (i >> 32).to(tl.uint32), (i * 0 + o).to(tl.uint32), (i * 0 + (o >> 32)).to(tl.uint32)
    )

@triton.jit
def mf_uniform(seed, offset, index):
    """A float32 in [0, 1) of 24 random bits, of the word that is its own of a block for four numbers."""
    i = index.to(tl.int64)
    w0, w1, w2, w3 = mf_philox(seed, offset, i >> 2)
    w = tl.where((i & 2) == 0, tl.where((i & 1) == 0, w0, w1), tl.where((i & 1) == 0, w2, w3))
    return (w >> 8).to(tl.float32) * 5.9604644775390625e-08

@triton.jit
def mf_uniform_run(seed, offset, index):
    """mf_uniform where each four neighbours, from a multiple of four on, are of one block."""
    fours = tl.reshape(index, [index.numel // 4, 2, 2])
    first, _ = tl.split(fours)
    first, _ = tl.split(first)
    w0, w1, w2, w3 = mf_philox(seed, offset, first.to(tl.int64) >> 2)
    w = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), index.shape)
    return (w >> 8).to(tl.float32) * 5.9604644775390625e-08

@triton.jit
def mf_pair(seed, offset, index):
    """The two words that are a number's own of a block for two numbers."""
    i = index.to(tl.int64)
    w0, w1, w2, w3 = mf_philox(seed, offset, i >> 1)
    return tl.where((i & 1) == 0, w0, w2), tl.where((i & 1) == 0, w1, w3)

@triton.jit
def mf_normal(seed, offset, index):
    """A float32 of the normal distribution, by Box and Muller."""
    w0, w1 = mf_pair(seed, offset, index)
    u1 = ((w0 >> 8) + 1).to(tl.float32) * 5.9604644775390625e-08
    u2 = (w1 >> 8).to(tl.float32) * 5.9604644775390625e-08
    return tl.sqrt_rn(-2.0 * libdevice.log(u1)) * libdevice.cos(6.2831854820251465 * u2)

@triton.jit
def mf_bits(seed, offset, index):
    """64 random bits as an int64."""
    w0, w1 = mf_pair(seed, offset, index)
    return w0.to(tl.int64) | (w1.to(tl.int64) << 32)
'''
_ROWS = '''
@triton.jit
def mf_last(x, A: tl.constexpr, C: tl.constexpr):
    """What is left of [A, N, C] once N is 1: a number, or the A * C of them."""
    if A * C == 1:
        return tl.sum(tl.reshape(x, [1]), 0)
    else:
        return tl.reshape(x, [A * C])

@triton.jit
def mf_at(x, p, at):
    """Of [A, M, N, C] the [A, M, C] at one place `at` of `p`, exactly: nothing changes what -0.0 is added to."""
    none = -0.0 if x.dtype.is_floating() else 0
    return tl.sum(tl.where(p == at, x, none), 2).to(x.dtype)

@triton.jit
def mf_scan(x, A: tl.constexpr, N: tl.constexpr, C: tl.constexpr, join: tl.constexpr):
    """Running results over the middle of [A, N, C], and the last of them. The order is fixed, whichever thread holds
    what: in pairs, then in fours and so on, the result of a first half joins what its second half has so far
    (Sklansky, "Conditional-Sum Addition Logic", 1960)."""
    for k in tl.static_range(N.bit_length() - 1):
        x = tl.reshape(x, [A, N >> (k + 1), 2 << k, C])
        p = tl.reshape(tl.arange(0, 2 << k), [1, 1, 2 << k, 1])
        x = tl.where(p >> k == 1, join(mf_at(x, p, (1 << k) - 1)[:, :, None, :], x), x)
    x = tl.reshape(x, [A, 1, N, C])
    return x, mf_last(mf_at(x, tl.reshape(tl.arange(0, N), [1, 1, N, 1]), N - 1), A, C)
'''
_EXTREMUM = """
@triton.jit
def mf_{name}(a, b):
    \"\"\"The {what}; NaN where either is NaN.\"\"\"
    if a.dtype.is_floating():
        return tl.{name}(a, b, propagate_nan=tl.PropagateNan.ALL)
    else:
        if a.dtype.is_int1():
            return a {of_bools} b
        else:
            return tl.where(a {sign} b, a, b)
"""
_JOIN = """
@triton.jit
def mf_{name}(a, b):
    return a {sign} b
"""
_TREE = """
@triton.jit
def mf_{name}(x, A: tl.constexpr, N: tl.constexpr, C: tl.constexpr):
    \"\"\"{what}\"\"\"
    x = tl.reshape(x, [A, N, C])
    for _ in tl.static_range(N.bit_length() - 1):
        if x.shape[1] > 2048 and x.shape[1] * 4 > N:
            x = {reduce}(tl.reshape(x, [A, 2, x.shape[1] // 2, C]), 1{join})
        else:
            x = {reduce}(tl.reshape(x, [A, x.shape[1] // 2, 2, C]), 2{join})
    return mf_last(x, A, C)
"""

_SUMS = '''
@triton.jit
def mf_addboth(x, y, v, w):
    return x + v, y + w

@triton.jit
def mf_sums(x, y, A: tl.constexpr, N: tl.constexpr, C: tl.constexpr):
    """mf_sum of two at once: threads wait for each other once."""
    x = tl.reshape(x, [A, N, C])
    y = tl.reshape(y, [A, N, C])
    for _ in tl.static_range(N.bit_length() - 1):
        if x.shape[1] > 2048 and x.shape[1] * 4 > N:
            both = tl.reshape(x, [A, 2, x.shape[1] // 2, C]), tl.reshape(y, [A, 2, x.shape[1] // 2, C])
            x, y = tl.reduce(both, 1, mf_addboth)
        else:
            both = tl.reshape(x, [A, x.shape[1] // 2, 2, C]), tl.reshape(y, [A, x.shape[1] // 2, 2, C])
            x, y = tl.reduce(both, 2, mf_addboth)
    return mf_last(x, A, C), mf_last(y, A, C)
'''

# An argument reduction, and a reduction whose order is all the same.
_PAIR = """
@triton.jit
def mf_{name}(v, i, w, j):
    \"\"\"The pair (value, index) of the {better} value, the first index among equals; NaN is the {best}.\"\"\"
    wins = (w {sign} v) | ((w != w) & (v == v))
    ties = (w == v) | ((w != w) & (v != v))
    take = wins | (ties & (j < i))
    return tl.where(take, w, v), tl.where(take, j, i)

@triton.jit
def mf_row{name}(x, i, A: tl.constexpr, N: tl.constexpr, C: tl.constexpr):
    \"\"\"mf_{name} over the middle of [A, N, C].\"\"\"
    if A * C == 1:
        return tl.reduce((tl.reshape(x, [N]), tl.reshape(i, [N])), 0, mf_{name})
    else:
        v, j = tl.reduce((tl.reshape(x, [A, N, C]), tl.reshape(i, [A, N, C])), 1, mf_{name})
        return tl.reshape(v, [A * C]), tl.reshape(j, [A * C])
"""
_JOINED = '''
@triton.jit
def mf_beside(x, A: tl.constexpr, C: tl.constexpr):
    """What `mf_last` left, so that it meets each element of its row in [A, N, C]."""
    if A * C == 1:
        return x
    else:
        return tl.reshape(x, [A, 1, C])

@triton.jit
def mf_divide(a, b):
    """a / b rounded correctly: tl.div_rn is float32's, float64's own is."""
    if a.dtype.is_fp64():
        return a / b
    else:
        return tl.div_rn(a, b)

@triton.jit
def mf_softmax(m, s, w, t):
    """Two maxima with their sums of exponentials, joined; infinities that are equal have no difference."""
    e = libdevice.exp(tl.where(m == w, 0.0, -tl.abs(m - w)))
    return mf_maximum(m, w), tl.where(w > m, s * e + t, s + t * e)

@triton.jit
def mf_rowsoftmax(x, s, A: tl.constexpr, N: tl.constexpr, C: tl.constexpr):
    """mf_softmax over the middle of [A, N, C], in two passes: nothing of a row of -inf is over it."""
    m = mf_max(x, A, N, C)
    low = mf_beside(tl.where(m == float("-inf"), 0.0, m), A, C)
    e = libdevice.exp(tl.reshape(x, [A, N, C]) - low) * tl.reshape(s, [A, N, C])
    return m, mf_sum(e, A, N, C)

@triton.jit
def mf_welford(n, m, q, k, w, r):
    """Counts, means and squares about these, joined (Chan, Golub and LeVeque, 1983)."""
    total = n + k
    away = w - m
    part = mf_divide(k, tl.where(total > 1.0, total, 1.0))
    return total, m + away * part, q + r + away * (away * (n * part))

@triton.jit
def mf_rowwelford(n, m, q, A: tl.constexpr, N: tl.constexpr, C: tl.constexpr):
    """mf_welford over the middle of [A, N, C]."""
    return mf_moments(n, m, q, mf_sum(n, A, N, C), A, N, C)

@triton.jit
def mf_rowelements(n, m, q, COUNT: tl.constexpr, A: tl.constexpr, N: tl.constexpr, C: tl.constexpr):
    """mf_rowwelford of COUNT elements, which need not be counted."""
    if A * C == 1:
        return mf_moments(n, m, q, tl.full([], COUNT, m.dtype), A, N, C)
    else:
        return mf_moments(n, m, q, tl.full([A * C], COUNT, m.dtype), A, N, C)

@triton.jit
def mf_moments(n, m, q, total, A: tl.constexpr, N: tl.constexpr, C: tl.constexpr):
    """Count, mean and squares of a row, in two passes, the second corrected by how far off the first one is."""
    many = tl.where(total > 1.0, total, 1.0)
    n = tl.reshape(n, [A, N, C])
    first = mf_divide(mf_sum(n * tl.reshape(m, [A, N, C]), A, N, C), many)
    away = tl.reshape(m, [A, N, C]) - mf_beside(first, A, C)
    sum, squares = mf_sums(n * away, tl.reshape(q, [A, N, C]) + n * (away * away), A, N, C)
    off = mf_divide(sum, many)
    left = squares - off * off * total
    return total, first + off, tl.where(left < 0.0, 0.0, left)
'''
_ROW = """
@triton.jit
def mf_{name}(x, A: tl.constexpr, N: tl.constexpr, C: tl.constexpr):
    \"\"\"{what} over the middle of [A, N, C].\"\"\"
    if A * C == 1:
        return tl.reduce(tl.reshape(x, [N]), 0, mf_{join})
    else:
        return tl.reshape(tl.reduce(tl.reshape(x, [A, N, C]), 1, mf_{join}), [A * C])
"""
_BYTE_FLOAT = """
@triton.jit
def mf_widen_{name}(x):
    \"\"\"float32 of the bits of {name}.\"\"\"
    m = x.to(tl.int32) & 0x7F
    big = ((m << {cut}) + {lift}).to(tl.float32, bitcast=True)
    r = tl.where(m < {first}, m.to(tl.float32) * {least}, big)
    r = tl.where(m {special}, float("nan"), r){infinity}
    return tl.where((x.to(tl.int32) & 0x80) != 0, -r, r)

@triton.jit
def mf_narrow_{name}(x):
    \"\"\"The bits of {name} of a float32 that is rounded to it.\"\"\"
    b = x.to(tl.int32, bitcast=True)
    m = b & 0x7FFFFFFF
    r = tl.where(m < {normal}, (tl.abs(x) / {least}).to(tl.int32), (m - {lift}) >> {cut})
    r = tl.where(m >= 0x7F800000, tl.where(m > 0x7F800000, 0x7F, 0x7C), r)
    return (r | ((b >> 24) & 0x80)).to(tl.uint8)

@triton.jit
def mf_{name}(x):
    \"\"\"Round float32 to {name}, to nearest even.\"\"\"
    b = x.to(tl.int32, bitcast=True)
    m = b & 0x7FFFFFFF
    n = (m + {below} + ((m >> {cut}) & 1)) & {kept}
    small = (tl.abs(x) + {unit}) - {unit}
    n = tl.where(m < {normal}, small.to(tl.int32, bitcast=True), tl.where(n >= {over}, {beyond}, n))
    n = tl.where(m > 0x7F800000, 0x7FC00000, n)
    return (n | (b & -0x80000000)).to(tl.float32, bitcast=True)
"""


def _byte_float(name: str) -> str:
    f = BYTE_FLOATS[name]
    return _BYTE_FLOAT.format(
        name=name, cut=f.cut, lift=f"{f.away << 23:#x}", first=1 << 23 - f.cut, least=2.0 ** (f.unit - 23),
        special="== 0x7F" if name == "e4m3" else "> 0x7C",
        infinity="" if name == "e4m3" else '\n    r = tl.where(m == 0x7C, float("inf"), r)',
        normal=f"{(f.away + 1) << 23:#x}", below=f"{(1 << f.cut - 1) - 1:#x}", kept=-(1 << f.cut),
        unit=2.0**f.unit, over=f"{f.over:#x}", beyond=f"{f.beyond:#x}",
    )  # fmt: skip


_SUM = """Sum over the middle of [A, N, C]. The order is fixed, whichever thread holds what: halves are
    added down to a quarter of a long row (at least 2048), then neighbours: each step adds two numbers."""
_SOURCES = "".join(
    [_INTEGERS,
     _EXTREMUM.format(name="maximum", what="greater", of_bools="|", sign=">"),
     _EXTREMUM.format(name="minimum", what="lesser", of_bools="&", sign="<"),
     _ELEMENTS,
     *(_JOIN.format(name=name, sign=sign) for name, sign in (("add", "+"), ("mul", "*"), ("or", "|"), ("and", "&"))),
     _ROWS,
     _TREE.format(name="sum", what=_SUM, reduce="tl.sum", join=""),
     _SUMS,
     _TREE.format(name="prod", what="Product over the middle of [A, N, C], in the order of mf_sum.", reduce="tl.reduce",
                  join=", mf_mul"),
     _PAIR.format(name="argmax", better="greater", best="greatest", sign=">"),
     _PAIR.format(name="argmin", better="lesser", best="least", sign="<"),
     _ROW.format(name="max", join="maximum", what="The greatest, NaN where there is one,"),
     _ROW.format(name="min", join="minimum", what="The least, NaN where there is one,"),
     _ROW.format(name="any", join="or", what="Whether any is true"),
     _ROW.format(name="all", join="and", what="Whether all are true"),
     _JOINED,
     _byte_float("e4m3"), _byte_float("e5m2")]
)  # fmt: skip
_NAME = re.compile(r"\bmf_\w+")
SOURCES: dict[str, str] = {
    re.search(r"def (mf_\w+)", text)[1]: f"@triton.jit{text}".rstrip()  # type: ignore[index]
    for text in _SOURCES.split("@triton.jit")[1:]
}


def helpers(text: str) -> list[str]:
    """The sources of the helpers that a text calls, and of those that these call, in a fixed order."""
    wanted = set(_NAME.findall(text))
    while True:
        more = {n for name in wanted if name in SOURCES for n in _NAME.findall(SOURCES[name])} | wanted
        if more == wanted:
            return [SOURCES[name] for name in SOURCES if name in wanted]
        wanted = more
