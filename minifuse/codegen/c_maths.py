"""Functions of float that generated C computes itself, in line, within 3 ulp.

A call of a vector library keeps no register, hides the arithmetic around it from the compiler, and (libmvec's erf,
cos) takes longer than these. Each is one lane's arithmetic with fused multiply-adds: argument reduction in
several parts (Cody and Waite, Software Manual for the Elementary Functions, 1980), then a polynomial, summed in
pairs (Estrin 1960) because a chain of dependent multiply-adds, not their number, is what a core waits for.
`docs/fit_maths.py` computes the coefficients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

# Lowest power first. sin: (sin r / r - 1) / r^2 in r^2, |r| < pi/2. exp2: (2^r - 1) / r, |r| < 1/2.
# erf: erf x / x - 1 in x^2, |x| < 0.9. erfc: log2 erfc x, 0.9 < x < 4.
COEFFICIENTS = {
    "sin": (-0.166666597, 0.00833307859, -0.000198103517, 2.60710658e-06),
    "exp2": (0.693147182, 0.240226507, 0.055503279, 0.00961800385, 0.00134002697, 0.000154762965),
    "erf": (0.128379151, -0.376125246, 0.112821408, -0.0267789084, 0.00501196273, -0.000609036011),
    "erfc": (-0.000240132489, -1.62706745, -0.91896224, -0.150204301, 0.0321940519, -0.00442256872, 0.000285970629),
}


@dataclass(frozen=True)
class Inline:
    """`lane`: C statements from `x` that end in a return. `limit`: the largest |x| for which they hold; beyond it, and
    for NaN, a lane takes the library's result. `scaled`: statements from `x` to `p` and `n`, of which p * 2^n is the
    result: AVX-512 has that in one instruction, equal in every bit."""

    lane: str
    limit: str = ""
    scaled: str = ""


def _polynomial(name: str, x: str) -> str:
    """C text of the sum of c[k] x^k; uses the variables `x`, and `x2`, `x4` as far as they are needed."""
    terms, power = [float32(c) for c in COEFFICIENTS[name]], 1
    while len(terms) > 1:
        variable = x if power == 1 else f"{x}{power}"
        pairs = [terms[k : k + 2] for k in range(0, len(terms), 2)]
        terms = [f"__builtin_fmaf({p[1]}, {variable}, {p[0]})" if len(p) == 2 else p[0] for p in pairs]
        power *= 2
    return terms[0]


def float32(c: float | np.float32) -> str:
    """A C literal of the nearest float."""
    return f"{float(np.float32(c)).hex()}f"


def _parts(value: str, count: int) -> list[str]:
    """A positive decimal number as a sum of floats, each what those before it leave, cut off: none is negative, so
    that -0 minus 0 times each stays -0."""
    rest, parts = Fraction(value), []
    for _ in range(count):
        part = np.float32(float(rest))
        part = np.nextafter(part, np.float32(0)) if Fraction(float(part)) > rest else part
        parts.append(float32(part))
        rest -= Fraction(float(part))
    return parts


# Added to a float far smaller than it, 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
_PI = _parts("3.14159265358979323846264338327950288419716939937510", 3)
_LOG2E = _parts("1.44269504088896340735992468100189213742664595415299", 2)
# 2^r of |r| <= 1/2 as p, in terms of r.
_EXP2 = f"float r2 = r * r, r4 = r2 * r2, p = __builtin_fmaf({_polynomial('exp2', 'r')}, r, 1.0f);"
# e^x as p * 2^n.
_EXP = f"""
  x = x > 89.0f ? 89.0f : x; x = x < -104.0f ? -104.0f : x;
  float n = __builtin_fmaf(x, {_LOG2E[0]}, 0x1.8p23f) - 0x1.8p23f;
  float r = __builtin_fmaf(x, {_LOG2E[1]}, __builtin_fmaf(x, {_LOG2E[0]}, -n));
  {_EXP2}"""
# The sine of r, within pi/2. It takes r's magnitude, as the polynomial loses the sign of -0; a cosine never has that r,
# and its sign may go into r before.
_REST = f"float s = r * r, s2 = s * s; r = __builtin_fmaf(-h, {_PI[2]}, r); uint32_t u; __builtin_memcpy(&u, &r, 4);"
_SINE = f"r = __builtin_fmaf(r * s, {_polynomial('sin', 's')}, r);"

INLINE = {
    "sin": Inline(f"""
  float h = __builtin_fmaf(x, {float32(1 / math.pi)}, 0x1.8p23f);
  uint32_t flip; __builtin_memcpy(&flip, &h, 4); flip <<= 31; h -= 0x1.8p23f;
  float r = __builtin_fmaf(-h, {_PI[1]}, __builtin_fmaf(-h, {_PI[0]}, x));
  {_REST} u = (u ^ flip) & 0x80000000u; r = __builtin_fabsf(r);
  {_SINE} __builtin_memcpy(&flip, &r, 4); u ^= flip; __builtin_memcpy(&r, &u, 4);
  return r;""", "0x1p16f"),
    # From the nearest odd multiple h of pi/2, where the cosine is a sine: its relative error is small near a zero.
    "cos": Inline(f"""
  float h = __builtin_fmaf(x, {float32(1 / math.pi)}, -0.25f) + 0x1.8p22f;
  uint32_t flip; __builtin_memcpy(&flip, &h, 4); flip |= 1; __builtin_memcpy(&h, &flip, 4);
  h -= 0x1.8p22f; flip = ~flip << 30;
  float r = __builtin_fmaf(-h, {_PI[1]}, __builtin_fmaf(-h, {_PI[0]}, x));
  {_REST} u ^= flip; __builtin_memcpy(&r, &u, 4);
  {_SINE}
  return r;""", "0x1p16f"),
    # 2^n in two factors: a result may be denormal, and 2^128 is no float.
    "exp": Inline(f"""{_EXP}
  uint32_t u, v; n += 0x1.8p23f; __builtin_memcpy(&u, &n, 4);
  v = u >> 1; u = ((u - v) << 23) + 0x3f800000u; v = (v << 23) + 0x3f800000u;
  float a, b; __builtin_memcpy(&a, &u, 4); __builtin_memcpy(&b, &v, 4);
  return p * a * b;""", scaled=_EXP),
    # 1 - 2^(log2 erfc |x|) away from 0: what is subtracted is small, and so are its errors.
    "erf": Inline(f"""
  float y = __builtin_fabsf(x); y = y > 4.0f ? 4.0f : y;
  float y2 = y * y, y4 = y2 * y2, t = {_polynomial("erfc", "y")}, n = t + 0x1.8p23f;
  uint32_t u; __builtin_memcpy(&u, &n, 4); float r = t - (n - 0x1.8p23f);
  {_EXP2}
  u = (u << 23) + 0x3f800000u; __builtin_memcpy(&n, &u, 4);
  float far = __builtin_copysignf(__builtin_fmaf(-p, n, 1.0f), x);
  float s = x * x, s2 = s * s, s4 = s2 * s2, near = __builtin_fmaf({_polynomial("erf", "s")}, x, x);
  return y < 0.9f ? near : far;"""),
}  # fmt: skip


def definition(op: str) -> str:
    """The C helper `mf_<op>_f32` over 16 lanes."""
    row = INLINE[op]
    lane = f"MF float mf_lane_{op}(float x) {{{row.lane}\n}}\n"
    if not row.limit:
        plain = f"MF v_f32 mf_{op}_f32(v_f32 x) {{ v_f32 r; MF_LANES r[l] = mf_lane_{op}(x[l]); return r; }}"
        if not row.scaled:
            return lane + plain
        return f"""#if defined(__AVX512F__)
MF v_f32 mf_{op}_f32(v_f32 a) {{
  v_f32 b, c; MF_LANES {{ float x = a[l];{row.scaled} b[l] = p; c[l] = n; }}
  return (v_f32)__builtin_ia32_scalefps512_mask(b, c, b, -1, 4);
}}
#else
{lane}{plain}
#endif"""
    # Out of line and cold, so that the common path keeps its registers.
    return f"""{lane}MF_ONCE v_f32 mf_wide_{op}(v_f32 x, v_f32 r) {{
  v_f32 far = mf_library_{op}(x);
  MF_LANES r[l] = __builtin_fabsf(x[l]) <= {row.limit} ? r[l] : far[l];
  return r;
}}
MF v_f32 mf_{op}_f32(v_f32 x) {{
  v_f32 r; MF_LANES r[l] = mf_lane_{op}(x[l]);
  return __builtin_expect(mf_beyond(x, {row.limit}), 0) ? mf_wide_{op}(x, r) : r;
}}"""
