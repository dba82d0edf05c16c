"""Tables of the C prelude: registers, lane expressions, and the few helpers that are not pointwise.

In a lane expression `{a}` and `{b}` are the arguments' lanes; `$name` fields are those of `Register.fields`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from minifuse.ir.dtypes import BYTE_FLOATS

from .c_random import RANDOM

HEADER = """\
typedef __INT8_TYPE__ int8_t; typedef __INT16_TYPE__ int16_t; typedef __INT32_TYPE__ int32_t;
typedef __INT64_TYPE__ int64_t; typedef __UINT8_TYPE__ uint8_t; typedef __UINT16_TYPE__ uint16_t;
typedef __UINT32_TYPE__ uint32_t; typedef __UINT64_TYPE__ uint64_t;
#ifndef __FLT16_MANT_DIG__
#define _Float16 uint16_t
#endif
#define INT64_C(x) x##LL
#define INT64_MAX __INT64_MAX__
#define INT64_MIN (-INT64_MAX - 1)
#define MF static inline __attribute__((always_inline))
#define MF_ONCE static __attribute__((noinline))
#define MF_SIMD _Pragma("omp simd")
#define MF_LANES MF_SIMD for (int l = 0; l < 16; l++)
/* Hides where an address comes from. gcc 12 takes the address of a masked access apart again when it writes code, in
   registers that hold other values by then (`expand_call_mem_ref`): wrong elements, without a word. */
#define MF_ADDRESS(q) __asm__("" : "+r"(q))
/* Rounding down; on scalars and vectors. -1 where a remainder is there and has not the divisor's sign. */
#define MF_OPPOSITE(r, b) ((((r) ^ (b)) & ((r) | -(r))) >> 63)
#define MF_FLOORDIV(a, b) (((a) / (b)) + MF_OPPOSITE((a) % (b), b))
#define MF_MOD(a, b) (((a) % (b)) + (MF_OPPOSITE((a) % (b), b) & (b)))
"""


@dataclass(frozen=True)
class Register:
    """A dtype in C: `scalar` in a register, `raw` in memory; `kind` f, i or b; `suffix` of its maths functions."""

    name: str
    scalar: str
    storage: str
    raw: str
    bits: int
    kind: str
    suffix: str = ""
    half: bool = False

    @cached_property
    def fields(self) -> dict[str, str]:
        """T dtype, R register scalar, V vector, S storage, Q raw storage, P its vector, U unsigned, N bits,
        f maths suffix, widen / narrow: calls between raw and register, on vectors (`_s` on scalars)."""
        converts = self.half or self.kind == "b"
        return {
            "T": self.name, "R": self.scalar, "V": f"v_{self.name}", "S": self.storage, "Q": self.raw,
            "P": {"uint16_t": "v_u16", "uint8_t": "v_u8"}.get(self.raw, f"v_{self.name}"),
            "U": f"uint{self.bits}_t", "N": str(self.bits), "f": self.suffix,
            "widen": f"mf_widen_{self.name}" if converts else "",
            "narrow": f"mf_narrow_{self.name}" if converts else "",
            "widen_s": f"mf_widen_{self.name}_s" if converts else "",
            "narrow_s": f"mf_narrow_{self.name}_s" if converts else "",
        }  # fmt: skip


def _int(name: str, c: str, bits: int) -> Register:
    return Register(name, c, c, c, bits, "i")


REGISTERS = {
    r.name: r
    for r in (
        Register("f64", "double", "double", "double", 64, "f"),
        Register("f32", "float", "float", "float", 32, "f", "f"),
        Register("bf16", "float", "uint16_t", "uint16_t", 32, "f", "f", half=True),
        Register("f16", "float", "_Float16", "uint16_t", 32, "f", "f", half=True),
        Register("e4m3", "float", "uint8_t", "uint8_t", 32, "f", "f", half=True),
        Register("e5m2", "float", "uint8_t", "uint8_t", 32, "f", "f", half=True),
        _int("i64", "int64_t", 64),
        _int("i32", "int32_t", 32),
        _int("i16", "int16_t", 16),
        _int("i8", "int8_t", 8),
        _int("u8", "uint8_t", 8),
        Register("bool", "int32_t", "uint8_t", "uint8_t", 32, "b"),
    )
}


@dataclass(frozen=True)
class Operator:
    """A lane expression for each kind of dtype; `compares`: the result is a bool."""

    arity: int
    by_kind: dict[str, str] = field(default_factory=dict)
    compares: bool = False


def _compare(sign: str) -> Operator:
    plain = f"{{a}} {sign} {{b}} ? -1 : 0"
    return Operator(2, {"f": plain, "i": plain, "b": f"({{a}} & 1) {sign} ({{b}} & 1) ? -1 : 0"}, compares=True)


def _extremum(sign: str, of_bools: str) -> Operator:
    # A comparison with NaN is false, so NaN in b wins by itself; equal values give b, as vmaxps does.
    chosen = f"{{a}} {sign} {{b}} ? {{a}} : {{b}}"
    or_nan = f"({{a}} != {{a}}) | ({{a}} {sign} {{b}}) ? {{a}} : {{b}}"
    return Operator(2, {"f": or_nan, "i": chosen, "b": f"{{a}} {of_bools} {{b}}"})


def _builtin(name: str, arity: int = 1) -> Operator:
    args = ", ".join(("{a}", "{b}")[:arity])
    return Operator(arity, {"f": f"__builtin_{name}$f({args})"})


# A divisor that cannot trap: by zero gives 0 (a Check of the kernel raises), by -1 is a negation.
_QUOTIENT = "({b} == 0 ? 0 : ($R)-1 < 0 && {b} == ($R)-1 ? ($R)-{a} : {a} / {b})"
_REMAINDER = "({b} == 0 || (($R)-1 < 0 && {b} == ($R)-1) ? 0 : {a} % {b})"
_OPPOSITE = f"({_REMAINDER} != 0 && ({_REMAINDER} ^ {{b}}) < 0)"

OPERATORS: dict[str, Operator] = {
    "abs": Operator(1, {"f": "__builtin_fabs$f({a})", "i": "($R)({a} < 0 ? -{a} : {a})"}),
    "truncdiv": Operator(2, {"i": f"($R){_QUOTIENT}"}),
    "rem": Operator(2, {"i": f"($R){_REMAINDER}"}),
    "floordiv": Operator(2, {"i": f"($R)({_QUOTIENT} - {_OPPOSITE})"}),
    "mod": Operator(2, {"i": f"($R)({_REMAINDER} + ({_OPPOSITE} ? {{b}} : 0))"}),
    "fmod": _builtin("fmod", 2),
    "sqrt": _builtin("sqrt"),
    "floor": _builtin("floor"),
    "ceil": _builtin("ceil"),
    "trunc": _builtin("trunc"),
    "round": _builtin("rint"),
    "copysign": _builtin("copysign", 2),
    "maximum": _extremum(">", "|"),
    "minimum": _extremum("<", "&"),
    # where both are infinite or equal, their difference is not to be taken
    "logaddexp": Operator(2, {"f": "({a} > {b} ? {a} : {b}) + __builtin_log1p$f("
                                   "__builtin_exp$f({a} == {b} ? 0 : -__builtin_fabs$f({a} - {b})))"}),
    "eq": _compare("=="),
    "ne": _compare("!="),
    "lt": _compare("<"),
    "le": _compare("<="),
    "gt": _compare(">"),
    "ge": _compare(">="),
    "not": Operator(1, {"i": "($R)~{a}", "b": "~{a}"}),
    "shl": Operator(2, {"i": "{b} < 0 || {b} >= $N ? 0 : ($R)(($U){a} << ({b} & ($N - 1)))"}),
    "shr": Operator(2, {"i": "($R)({b} < 0 || {b} >= $N ? ({a} < 0 ? -1 : 0) : {a} >> ({b} & ($N - 1)))"}),
    "where": Operator(2, dict.fromkeys("fib", "{m} ? {a} : {b}")),
}  # fmt: skip

REDUCTIONS = {"add": "{a} + {b}", "mul": "{a} * {b}", "or": "{a} | {b}", "and": "{a} & {b}"}

# Memory. A tail reads and writes its n lanes only; n == 16 takes the whole-vector path.
MEMORY = {
    "splat": "MF $V mf_splat_$T($R x) { $V r; MF_LANES r[l] = x; return r; }",
    "load": "MF $V mf_load_$T(const $S* p) { $P r; __builtin_memcpy(&r, p, sizeof r); return $widen(r); }",
    "loadn": """
MF $V mf_loadn_$T(const $S* p, int64_t n) {
  if (n >= 16) return mf_load_$T(p);
  const $Q* q = (const void*)p; int m = (int)n; $P r; MF_ADDRESS(q);
  MF_LANES r[l] = l < m ? q[l] : 0;
  return $widen(r);
}""",
    "loads": """
MF $V mf_loads_$T(const $S* p, int64_t stride, int64_t n) {
  const $Q* q = (const void*)p; $P r = {0};
  if (n >= 16) { for (int l = 0; l < 16; l++) r[l] = q[l * stride]; }
  else for (int l = 0; l < n; l++) r[l] = q[l * stride];
  return $widen(r);
}""",
    "gather": """
MF $V mf_gather_$T(const $S* p, v_i64 offsets, int64_t n) {
  const $Q* q = (const void*)p; $P r = {0};
  if (n >= 16) { for (int l = 0; l < 16; l++) r[l] = q[offsets[l]]; }
  else for (int l = 0; l < n; l++) r[l] = q[offsets[l]];
  return $widen(r);
}""",
    "gatherm": """
MF $V mf_gatherm_$T(const $S* p, v_i64 offsets, v_bool mask, $V other, int64_t n) {
  $V r = other;
  for (int l = 0; l < n; l++) if (mask[l]) r[l] = mf_load_${T}_s(p + offsets[l]);
  return r;
}""",
    "loadm": """
MF $V mf_loadm_$T(const $S* p, v_bool mask, $V other, int64_t n) {
  const $Q* q = (const void*)p; int m = (int)n; $P r; MF_ADDRESS(q);
  MF_LANES r[l] = (l < m) & mask[l] ? q[l] : 0;
  $V x = $widen(r); MF_LANES x[l] = mask[l] ? x[l] : other[l];
  return x;
}""",
    "store": "MF void mf_store_$T($S* p, $V v) { $P r = $narrow(v); __builtin_memcpy(p, &r, sizeof r); }",
    "storen": """
MF void mf_storen_$T($S* p, $V v, int64_t n) {
  if (n >= 16) { mf_store_$T(p, v); return; }
  $Q* q = (void*)p; int m = (int)n; $P r = $narrow(v); MF_ADDRESS(q);
  MF_LANES if (l < m) q[l] = r[l];
}""",
    "storep": """
MF void mf_storep_$T($S* p, $V v, int64_t n) {
  if (n < 16 || (__UINTPTR_TYPE__)p % (16 * sizeof($S))) { mf_storen_$T(p, v, n); return; }
  $P r = $narrow(v); mf_past(p, &r, sizeof r);
}""",
    "stores": """
MF void mf_stores_$T($S* p, $V v, int64_t stride, int64_t n) {
  $Q* q = (void*)p; $P r = $narrow(v);
  if (n >= 16) { for (int l = 0; l < 16; l++) q[l * stride] = r[l]; }
  else for (int l = 0; l < n; l++) q[l * stride] = r[l];
}""",
    "scatter": """
MF void mf_scatter_$T($S* p, v_i64 offsets, $V v, int64_t n) {
  $Q* q = (void*)p; $P r = $narrow(v);
  for (int l = 0; l < n; l++) q[offsets[l]] = r[l];
}""",
    "scatterm": """
MF void mf_scatterm_$T($S* p, v_i64 offsets, $V v, v_bool mask, int64_t n) {
  $Q* q = (void*)p; $P r = $narrow(v);
  for (int l = 0; l < n; l++) if (mask[l]) q[offsets[l]] = r[l];
}""",
    "load_s": "MF $R mf_load_${T}_s(const $S* p) { $Q x; __builtin_memcpy(&x, p, sizeof x); return $widen_s(x); }",
    "store_s": "MF void mf_store_${T}_s($S* p, $R x) { $Q r = $narrow_s(x); __builtin_memcpy(p, &r, sizeof r); }",
}


# f16 by bit arithmetic, where the machine has no conversion: exact, and independent of flushed denormals.
_F16_BITS = {
    "widen": """
  v_u32 r; v_f32 small;
  MF_LANES small[l] = (float)(h[l] & 0x7fff) * 0x1p-24f;
  v_u32 s = (v_u32)small;
  MF_LANES {
    uint32_t u = h[l], m = u & 0x7fff;
    r[l] = (m < 0x400 ? s[l] : m >= 0x7c00 ? (m << 13) | 0x7f800000 : (m << 13) + 0x38000000) | (u & 0x8000) << 16;
  }
  return (v_f32)r;""",
    "narrow": """
  v_u16 r; v_u32 b = (v_u32)x;
  v_i32 small; MF_LANES small[l] = (int32_t)(__builtin_fabsf(x[l]) * 0x1p24f);
  MF_LANES {
    uint32_t m = b[l] & 0x7fffffff;
    uint32_t normal = m > 0x7f800000 ? 0x7e00 : m >= 0x477ff000 ? 0x7c00 : (m - 0x38000000) >> 13;
    r[l] = (uint16_t)((m < 0x38800000 ? (uint32_t)small[l] : normal) | (b[l] >> 16 & 0x8000));
  }
  return r;""",
    "rounded": """
  v_u32 r, b = (v_u32)x; v_f32 small;
  MF_LANES small[l] = (__builtin_fabsf(x[l]) + 0.5f) - 0.5f;
  v_u32 s = (v_u32)small;
  MF_LANES {
    uint32_t m = b[l] & 0x7fffffff, n = (m + 0xfff + (m >> 13 & 1)) & ~0x1fffu;
    n = m > 0x7f800000 ? 0x7fc00000 : m >= 0x477ff000 ? 0x7f800000 : n;
    r[l] = (m < 0x38800000 ? s[l] : n) | (b[l] & 0x80000000u);
  }
  return (v_f32)r;""",
}


def _byte_float(name: str) -> dict[str, str]:
    """Widening, narrowing of what is rounded, and rounding."""
    f = BYTE_FLOATS[name]
    cut, away, unit = f.cut, f.away, f.unit
    first = 1 << 23 - cut  # the code of the least normal number
    least = f"{(away + 1) << 23:#x}"
    special = "m == 0x7f ? 0x7fc00000" if name == "e4m3" else "m > 0x7c ? 0x7fc00000 : m == 0x7c ? 0x7f800000"
    return {
        f"mf_widen_{name}": f"""
MF v_f32 mf_widen_{name}(v_u8 x) {{
  v_u32 r; v_f32 small; MF_LANES small[l] = (float)(x[l] & 0x7f) * 0x1p{unit - 23}f;
  v_u32 s = (v_u32)small;
  MF_LANES {{
    uint32_t m = x[l] & 0x7f;
    r[l] = ({special} : m < {first} ? s[l] : (m << {cut}) + {away << 23:#x}) | (x[l] & 0x80u) << 24;
  }}
  return (v_f32)r;
}}""",
        f"mf_narrow_{name}": f"""
MF v_u8 mf_narrow_{name}(v_f32 x) {{
  v_u8 r; v_u32 b = (v_u32)x; v_i32 small; MF_LANES small[l] = (int32_t)(__builtin_fabsf(x[l]) * 0x1p{23 - unit}f);
  MF_LANES {{
    uint32_t m = b[l] & 0x7fffffff, n = m < {least} ? (uint32_t)small[l] : (m - {away << 23:#x}) >> {cut};
    r[l] = (uint8_t)((m > 0x7f800000 ? 0x7f : m == 0x7f800000 ? 0x7c : n) | (b[l] >> 24 & 0x80));
  }}
  return r;
}}""",
        f"mf_rounded_{name}": f"""
MF v_f32 mf_rounded_{name}(v_f32 x) {{
  v_u32 r, b = (v_u32)x; v_f32 small; MF_LANES small[l] = (__builtin_fabsf(x[l]) + 0x1p{unit}f) - 0x1p{unit}f;
  v_u32 s = (v_u32)small;
  MF_LANES {{
    uint32_t m = b[l] & 0x7fffffff, n = (m + {(1 << cut - 1) - 1:#x} + (m >> {cut} & 1)) & ~{(1 << cut) - 1:#x}u;
    n = m > 0x7f800000 ? 0x7fc00000 : n >= {f.over:#x} ? {f.beyond:#x} : n;
    r[l] = (m < {least} ? s[l] : n) | (b[l] & 0x80000000u);
  }}
  return (v_f32)r;
}}""",
        f"mf_widen_{name}_s": (f"MF float mf_widen_{name}_s(uint8_t x) {{ return mf_widen_{name}((v_u8){{x}})[0]; }}"),
        f"mf_narrow_{name}_s": (
            f"MF uint8_t mf_narrow_{name}_s(float x) {{ return mf_narrow_{name}((v_f32){{x}})[0]; }}"
        ),
    }


def _f16_conversion(signature: str, asm: str, portable: str) -> str:
    """The F16C instruction over 16 lanes or two times 8, else bit arithmetic."""
    widens = "v_f32 mf" in signature
    x, result = ("h", "v_f32") if widens else ("x", "v_u16")
    half, single = "uint16_t {} __attribute__((vector_size(16)))", "float {} __attribute__((vector_size(32)))"
    source, target = (half, single) if widens else (single, half)
    return f"""
{signature} {{
#if defined(__AVX512F__)
  {result} r; __asm__("{asm}" : "=v"(r) : "v"({x})); return r;
#elif defined(__F16C__)
  typedef {source.format("from")}; typedef {target.format("to")};
  from a[2]; to b[2]; {result} r; __builtin_memcpy(a, &{x}, sizeof a);
  __asm__("{asm}" : "=x"(b[0]) : "x"(a[0])); __asm__("{asm}" : "=x"(b[1]) : "x"(a[1]));
  __builtin_memcpy(&r, b, sizeof r); return r;
#else{portable}
#endif
}}"""


FIXED = {
    "mf_iota_i64": "MF v_i64 mf_iota_i64(void) { return (v_i64){" + ", ".join(map(str, range(16))) + "}; }",
    "mf_lanes": "MF v_bool mf_lanes(int64_t n) { v_bool r; int m = (int)n; MF_LANES r[l] = l < m ? -1 : 0; return r; }",
    "mf_all": "MF int mf_all(v_bool x) { int32_t r = -1; for (int l = 0; l < 16; l++) r &= x[l]; return r; }",
    "mf_beyond": """
/* Whether any |x| is over the limit or NaN. */
MF int mf_beyond(v_f32 x, float limit) {
  v_f32 y, most = mf_splat_f32(limit); MF_LANES y[l] = __builtin_fabsf(x[l]);
#if defined(__AVX512F__)
  return __builtin_ia32_cmpps512_mask(y, most, 6, -1, 4);
#elif defined(__AVX__)
  typedef float half __attribute__((vector_size(32)));
  half a[2], b; __builtin_memcpy(a, &y, 64); __builtin_memcpy(&b, &most, 32);
  return __builtin_ia32_movmskps256(__builtin_ia32_cmpps256(a[0], b, 6)) |
         __builtin_ia32_movmskps256(__builtin_ia32_cmpps256(a[1], b, 6));
#else
  int32_t r = 0; for (int l = 0; l < 16; l++) r |= -!(y[l] <= limit); return r;
#endif
}""",
    "mf_past": """
/* A whole, aligned vector written past the caches; others see it after an mf_fence. */
MF void mf_past(void* to, const void* from, int n) {
  char* p = to; const char* q = from;
  typedef long long part __attribute__((vector_size(16)));
#if defined(__clang__)
  for (int k = 0; k < n; k += 16) __builtin_nontemporal_store(*(const part*)(q + k), (part*)(p + k));
#elif !defined(__SSE2__)
  __builtin_memcpy(p, q, n);
#else
  int k = 0;
#if defined(__AVX512F__)
  typedef long long whole __attribute__((vector_size(64)));
  for (; k + 64 <= n; k += 64) __builtin_ia32_movntdq512((whole*)(p + k), *(const whole*)(q + k));
#endif
#if defined(__AVX__)
  typedef long long half __attribute__((vector_size(32)));
  for (; k + 32 <= n; k += 32) __builtin_ia32_movntdq256((half*)(p + k), *(const half*)(q + k));
#endif
  for (; k + 16 <= n; k += 16) __builtin_ia32_movntdq((part*)(p + k), *(const part*)(q + k));
#endif
}""",
    "mf_fence": """
MF void mf_fence(void) {
#if defined(__SSE2__)
  __builtin_ia32_sfence();
#endif
}""",
    "mf_widen_bool": "MF v_bool mf_widen_bool(v_u8 x) { v_bool r; MF_LANES r[l] = x[l] ? -1 : 0; return r; }",
    "mf_narrow_bool": "MF v_u8 mf_narrow_bool(v_bool x) { v_u8 r; MF_LANES r[l] = (uint8_t)(x[l] & 1); return r; }",
    "mf_widen_bool_s": "MF int32_t mf_widen_bool_s(uint8_t x) { return x ? -1 : 0; }",
    "mf_narrow_bool_s": "MF uint8_t mf_narrow_bool_s(int32_t x) { return (uint8_t)(x & 1); }",
    "mf_widen_bf16": "MF v_f32 mf_widen_bf16(v_u16 x) { return (v_f32)(__builtin_convertvector(x, v_u32) << 16); }",
    "mf_narrow_bf16": "MF v_u16 mf_narrow_bf16(v_f32 x) { return __builtin_convertvector((v_u32)x >> 16, v_u16); }",
    "mf_widen_bf16_s": """
MF float mf_widen_bf16_s(uint16_t x) {
  uint32_t b = (uint32_t)x << 16; float r; __builtin_memcpy(&r, &b, 4); return r;
}""",
    "mf_narrow_bf16_s": """
MF uint16_t mf_narrow_bf16_s(float x) {
  uint32_t b; __builtin_memcpy(&b, &x, 4); return (uint16_t)(b >> 16);
}""",
    "mf_rounded_bf16": """
MF v_f32 mf_rounded_bf16(v_f32 x) {
  v_u32 b = (v_u32)x, r;
  MF_LANES {
    uint32_t n = (b[l] + 0x7fff + (b[l] >> 16 & 1)) & 0xffff0000u;
    r[l] = (b[l] & 0x7fffffff) > 0x7f800000 ? 0x7fc00000 | (b[l] & 0x80000000u) : n;
  }
  return (v_f32)r;
}""",
    "mf_widen_f16": _f16_conversion("MF v_f32 mf_widen_f16(v_u16 h)", "vcvtph2ps %1, %0", _F16_BITS["widen"]),
    "mf_narrow_f16": _f16_conversion("MF v_u16 mf_narrow_f16(v_f32 x)", "vcvtps2ph $0, %1, %0", _F16_BITS["narrow"]),
    "mf_widen_f16_s": "MF float mf_widen_f16_s(uint16_t x) { return mf_widen_f16((v_u16){x})[0]; }",
    "mf_narrow_f16_s": "MF uint16_t mf_narrow_f16_s(float x) { return mf_narrow_f16((v_f32){x})[0]; }",
    "mf_rounded_f16": f"""
MF v_f32 mf_rounded_f16(v_f32 x) {{
#if defined(__F16C__)
  return mf_widen_f16(mf_narrow_f16(x));
#else{_F16_BITS["rounded"]}
#endif
}}""",
    **_byte_float("e4m3"),
    **_byte_float("e5m2"),
    "mf_scratch": """
extern void* aligned_alloc(__SIZE_TYPE__, __SIZE_TYPE__); extern void free(void*); extern void abort(void);
#define MF_SCRATCH __attribute__((cleanup(mf_release)))
static void mf_release(void* p) { free(*(void**)p); }
MF void* mf_scratch(int64_t bytes) {
  void* p = aligned_alloc(64, (bytes + 64) / 64 * 64); if (!p) abort(); return p;
}""",
    **RANDOM,
}  # fmt: skip
