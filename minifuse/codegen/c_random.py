"""Random numbers in C: Philox4x32-10 over vectors, and what is made of its words."""

from __future__ import annotations

_PIECES = """
#if defined(__AVX512F__)
#define MF_PIECE 64
#define MF_TURNED 3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12
#define MF_BLOCKS 0, 0, 1, 1, 2, 2, 3, 3
#define MF_PAIRS(a, b) a, b, a, b, a, b, a, b
#elif defined(__AVX2__)
#define MF_PIECE 32
#define MF_TURNED 3, 2, 1, 0, 7, 6, 5, 4
#define MF_BLOCKS 0, 0, 1, 1
#define MF_PAIRS(a, b) a, b, a, b
#else
#define MF_PIECE 16
#define MF_TURNED 3, 2, 1, 0
#define MF_BLOCKS 0, 0
#define MF_PAIRS(a, b) a, b
#endif
/* 32 x 32 -> 64 bits of each lane; gcc would take the slow 64-bit vpmullq. */
#if defined(__AVX2__)
#define MF_MULTIPLY(r, a, b) __asm__("vpmuludq %2, %1, %0" : "=v"(r) : "v"(a), "v"(b))
#elif defined(__SSE2__)
#define MF_MULTIPLY(r, a, b) r = a; __asm__("pmuludq %1, %0" : "+x"(r) : "x"(b))
#else
#define MF_MULTIPLY(r, a, b) r = (a & 0xffffffffu) * b
#endif
#define MF_PIECES (128 / MF_PIECE)
#define MF_EACH _Pragma("GCC unroll 8") for (int k = 0; k < MF_PIECES; k++)
typedef uint64_t mf_pieces __attribute__((vector_size(MF_PIECE)));
typedef uint32_t mf_half __attribute__((vector_size(MF_PIECE)));"""
# Every lane has its 64-bit piece of a register: a counter's words need no packing, and a product's low word may stay
# below a high word that nobody reads. 0.8 times the time of packed words with AVX-512, 0.6 with AVX2.
_PHILOX = """
/* Philox4x32-10 (Salmon et al., SC 2011): the words of the block at counter (index, offset). */
MF void mf_philox(int64_t seed, uint64_t offset, v_u64 index, v_u64* word) {
  mf_pieces m0 = (mf_pieces){} + 0xD2511F53u, m1 = (mf_pieces){} + 0xCD9E8D57u, p0, p1;
  mf_pieces c0[MF_PIECES], c1[MF_PIECES], c2[MF_PIECES], c3[MF_PIECES];
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)((uint64_t)seed >> 32);
  __builtin_memcpy(c0, &index, 128);
  MF_EACH { c1[k] = c0[k] >> 32; c2[k] = (mf_pieces){} + offset; c3[k] = (mf_pieces){} + (offset >> 32); }
  for (int round = 0; round < 10; round++) {
    MF_EACH {
      MF_MULTIPLY(p0, c0[k], m0); MF_MULTIPLY(p1, c2[k], m1);
      c0[k] = (p1 >> 32) ^ c1[k] ^ k0; c1[k] = p1; c2[k] = (p0 >> 32) ^ c3[k] ^ k1; c3[k] = p0;
    }
    k0 += 0x9E3779B9u; k1 += 0xBB67AE85u;
  }
  MF_EACH { c0[k] &= 0xffffffffu; c1[k] &= 0xffffffffu; c2[k] &= 0xffffffffu; c3[k] &= 0xffffffffu; }
  __builtin_memcpy(word, c0, 128); __builtin_memcpy(word + 1, c1, 128);
  __builtin_memcpy(word + 2, c2, 128); __builtin_memcpy(word + 3, c3, 128);
}"""
_WORDS = """
/* The words of four counters from `first` on, one behind the other. A block lies in four neighbouring lanes: one
   multiplication of the lower halves does both of a round. */
MF v_u32 mf_words(int64_t seed, uint64_t offset, uint64_t first) {
  const mf_pieces even = {MF_PAIRS(~0ull, 0)}, block = {MF_BLOCKS}, m = {MF_PAIRS(0xD2511F53u, 0xCD9E8D57u)};
  const mf_pieces next = {MF_PAIRS(0x9E3779B9u, 0xBB67AE85u)};
  mf_pieces key = (even & (uint32_t)seed) | (~even & ((uint64_t)seed >> 32)), c[64 / MF_PIECE], p;
  for (int k = 0; k < 64 / MF_PIECE; k++) c[k] = (even & (block + (first + k * (MF_PIECE / 16)))) | (~even & offset);
  _Pragma("GCC unroll 10") for (int round = 0; round < 10; round++) {
    for (int k = 0; k < 64 / MF_PIECE; k++) {
      MF_MULTIPLY(p, c[k], m);
      mf_half h = (mf_half)p;
      c[k] = (mf_pieces)__builtin_shufflevector(h, h, MF_TURNED) ^ (c[k] >> 32) ^ key;
    }
    key = (mf_pieces)((mf_half)key + (mf_half)next);
  }
  v_u32 r; __builtin_memcpy(&r, c, 64); return r;
}"""

RANDOM: dict[str, str] = {
    "mf_pieces": _PIECES,
    "mf_philox": _PHILOX,
    "mf_words": _WORDS,
    "mf_uniform_of": """
MF v_f32 mf_uniform_of(v_u32 word) { v_f32 r; MF_LANES r[l] = (float)(int32_t)(word[l] >> 8) * 0x1p-24f; return r; }""",
    "mf_uniform": """
MF_ONCE v_f32 mf_uniform(int64_t seed, uint64_t offset, v_i64 index) {
  v_u64 w[4]; v_u32 r; mf_philox(seed, offset, (v_u64)index >> 2, w);
  MF_LANES {
    uint32_t low = (uint32_t)(index[l] & 1 ? w[1][l] : w[0][l]), high = (uint32_t)(index[l] & 1 ? w[3][l] : w[2][l]);
    r[l] = index[l] & 2 ? high : low;
  }
  return mf_uniform_of(r);
}""",
    # In place: a block waits for its own rounds, and a call would keep the next one's from beginning meanwhile.
    "mf_uniform_run": """
MF_ONCE v_f32 mf_uniform_across(int64_t seed, uint64_t offset, int64_t index) {
  return mf_uniform(seed, offset, mf_splat_i64(index) + mf_iota_i64());
}
MF v_f32 mf_uniform_run(int64_t seed, uint64_t offset, int64_t index) {
  if (index & 3) return mf_uniform_across(seed, offset, index);
  return mf_uniform_of(mf_words(seed, offset, (uint64_t)index >> 2));
}""",
    "mf_pair": """
MF void mf_pair(int64_t seed, uint64_t offset, v_i64 index, v_u64* a, v_u64* b) {
  v_u64 w[4]; mf_philox(seed, offset, (v_u64)index >> 1, w);
  MF_LANES { (*a)[l] = index[l] & 1 ? w[2][l] : w[0][l]; (*b)[l] = index[l] & 1 ? w[3][l] : w[1][l]; }
}""",
    "mf_pair_run": """
MF void mf_pair_run(int64_t seed, uint64_t offset, int64_t index, v_u64* a, v_u64* b) {
  if (index & 1) { mf_pair(seed, offset, mf_splat_i64(index) + mf_iota_i64(), a, b); return; }
  v_u32 w[2] = {mf_words(seed, offset, (uint64_t)index >> 1), mf_words(seed, offset, ((uint64_t)index >> 1) + 4)};
  uint64_t both[16]; __builtin_memcpy(both, w, 128);
  MF_LANES { (*a)[l] = (uint32_t)both[l]; (*b)[l] = both[l] >> 32; }
}""",
    "mf_normal_of": """
/* Box and Muller (1958); u1 lies in (0, 1]. */
MF v_f32 mf_normal_of(v_u64 a, v_u64 b) {
  v_f32 u1, u2;
  MF_LANES u1[l] = (float)((int32_t)(a[l] >> 8) + 1) * 0x1p-24f;
  MF_LANES u2[l] = (float)(int32_t)(b[l] >> 8) * 0x1p-24f;
  return mf_sqrt_f32(-2.0f * mf_log_f32(u1)) * mf_cos_f32(6.28318530717958647692f * u2);
}""",
    "mf_normal": """
MF_ONCE v_f32 mf_normal(int64_t seed, uint64_t offset, v_i64 index) {
  v_u64 a, b; mf_pair(seed, offset, index, &a, &b); return mf_normal_of(a, b);
}""",
    "mf_normal_run": """
MF_ONCE v_f32 mf_normal_run(int64_t seed, uint64_t offset, int64_t index) {
  v_u64 a, b; mf_pair_run(seed, offset, index, &a, &b); return mf_normal_of(a, b);
}""",
    "mf_bits": """
MF_ONCE v_i64 mf_bits(int64_t seed, uint64_t offset, v_i64 index) {
  v_u64 a, b; mf_pair(seed, offset, index, &a, &b); return (v_i64)(a | b << 32);
}""",
    "mf_bits_run": """
MF_ONCE v_i64 mf_bits_run(int64_t seed, uint64_t offset, int64_t index) {
  v_u64 a, b; mf_pair_run(seed, offset, index, &a, &b); return (v_i64)(a | b << 32);
}""",
}  # fmt: skip

for _name, _result in (("uniform", "float"), ("normal", "float"), ("bits", "int64_t")):
    RANDOM[f"mf_{_name}_s"] = (
        f"MF {_result} mf_{_name}_s(int64_t seed, uint64_t offset, int64_t index) "
        f"{{ return mf_{_name}(seed, offset, mf_splat_i64(index))[0]; }}"
    )
