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
/* Rounding down, by a positive divisor; on scalars and vectors. */
#define MF_FLOORDIV(a, b) (((a) / (b)) + (((a) % (b)) >> 63))
#define MF_MOD(a, b) (((a) % (b)) + ((((a) % (b)) >> 63) & (b)))
typedef float v_f32 __attribute__((vector_size(16 * sizeof(float))));
typedef float part_f32 __attribute__((vector_size(64)));
part_f32 _ZGVeN16v_cosf(part_f32);
MF v_f32 mf_library_cos(v_f32 a) { return _ZGVeN16v_cosf(a); }
MF v_f32 mf_splat_f32(float x) { return (v_f32){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

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
}
MF float mf_lane_cos(float x) {
  float h = __builtin_fmaf(x, 0x1.45f3060000000p-2f, -0.25f) + 0x1.8p22f;
  uint32_t flip; __builtin_memcpy(&flip, &h, 4); flip |= 1; __builtin_memcpy(&h, &flip, 4);
  h -= 0x1.8p22f; flip = ~flip << 30;
  float r = __builtin_fmaf(-h, 0x1.4442d00000000p-23f, __builtin_fmaf(-h, 0x1.921fb40000000p+1f, x));
  float s = r * r, s2 = s * s; r = __builtin_fmaf(-h, 0x1.8469880000000p-47f, r); uint32_t u; __builtin_memcpy(&u, &r, 4); u ^= flip; __builtin_memcpy(&r, &u, 4);
  r = __builtin_fmaf(r * s, __builtin_fmaf(__builtin_fmaf(0x1.5deb800000000p-19f, s, -0x1.9f74040000000p-13f), s2, __builtin_fmaf(0x1.110eee0000000p-7f, s, -0x1.55554c0000000p-3f)), r);
  return r;
}
MF_ONCE v_f32 mf_wide_cos(v_f32 x, v_f32 r) {
  v_f32 far = mf_library_cos(x);
  MF_LANES r[l] = __builtin_fabsf(x[l]) <= 0x1p16f ? r[l] : far[l];
  return r;
}
MF v_f32 mf_cos_f32(v_f32 x) {
  v_f32 r; MF_LANES r[l] = mf_lane_cos(x[l]);
  return __builtin_expect(mf_beyond(x, 0x1p16f), 0) ? mf_wide_cos(x, r) : r;
}
typedef float u_f32 __attribute__((vector_size(16 * sizeof(float)), aligned(sizeof(float)), may_alias));
MF float mf_lane_exp(float x) {
  x = x > 89.0f ? 89.0f : x; x = x < -104.0f ? -104.0f : x;
  float n = __builtin_fmaf(x, 0x1.7154760000000p+0f, 0x1.8p23f);
  uint32_t u, v; __builtin_memcpy(&u, &n, 4); n -= 0x1.8p23f;
  float r = __builtin_fmaf(x, 0x1.4ae0be0000000p-26f, __builtin_fmaf(x, 0x1.7154760000000p+0f, -n));
  float r2 = r * r, r4 = r2 * r2, p = __builtin_fmaf(__builtin_fmaf(__builtin_fmaf(0x1.448fbc0000000p-13f, r, 0x1.5f47b00000000p-10f), r4, __builtin_fmaf(__builtin_fmaf(0x1.3b29aa0000000p-7f, r, 0x1.c6aed00000000p-5f), r2, __builtin_fmaf(0x1.ebfbe00000000p-3f, r, 0x1.62e4300000000p-1f))), r, 1.0f);
  v = u >> 1; u = ((u - v) << 23) + 0x3f800000u; v = (v << 23) + 0x3f800000u;
  float a, b; __builtin_memcpy(&a, &u, 4); __builtin_memcpy(&b, &v, 4);
  return p * a * b;
}
MF v_f32 mf_exp_f32(v_f32 x) { v_f32 r; MF_LANES r[l] = mf_lane_exp(x[l]); return r; }
typedef float part_f32 __attribute__((vector_size(64)));
part_f32 _ZGVeN16v_tanhf(part_f32);
MF v_f32 mf_tanh_f32(v_f32 a) { return _ZGVeN16v_tanhf(a); }
MF float mf_lane_erf(float x) {
  float y = __builtin_fabsf(x); y = y > 4.0f ? 4.0f : y;
  float y2 = y * y, y4 = y2 * y2, t = __builtin_fmaf(__builtin_fmaf(0x1.2bdca80000000p-12f, y2, __builtin_fmaf(-0x1.21d6640000000p-8f, y, 0x1.07bbd20000000p-5f)), y4, __builtin_fmaf(__builtin_fmaf(-0x1.339e500000000p-3f, y, -0x1.d682380000000p-1f), y2, __builtin_fmaf(-0x1.a0877e0000000p+0f, y, -0x1.f798260000000p-13f))), n = t + 0x1.8p23f;
  uint32_t u; __builtin_memcpy(&u, &n, 4); float r = t - (n - 0x1.8p23f);
  float r2 = r * r, r4 = r2 * r2, p = __builtin_fmaf(__builtin_fmaf(__builtin_fmaf(0x1.448fbc0000000p-13f, r, 0x1.5f47b00000000p-10f), r4, __builtin_fmaf(__builtin_fmaf(0x1.3b29aa0000000p-7f, r, 0x1.c6aed00000000p-5f), r2, __builtin_fmaf(0x1.ebfbe00000000p-3f, r, 0x1.62e4300000000p-1f))), r, 1.0f);
  u = (u << 23) + 0x3f800000u; __builtin_memcpy(&n, &u, 4);
  float far = __builtin_copysignf(__builtin_fmaf(-p, n, 1.0f), x);
  float s = x * x, s2 = s * s, s4 = s2 * s2, near = __builtin_fmaf(__builtin_fmaf(__builtin_fmaf(-0x1.3f4f6e0000000p-11f, s, 0x1.4876c80000000p-8f), s4, __builtin_fmaf(__builtin_fmaf(-0x1.b6bee20000000p-6f, s, 0x1.ce1dd20000000p-4f), s2, __builtin_fmaf(-0x1.8126fa0000000p-2f, s, 0x1.06eba60000000p-3f))), x, x);
  return y < 0.9f ? near : far;
}
MF v_f32 mf_erf_f32(v_f32 x) { v_f32 r; MF_LANES r[l] = mf_lane_erf(x[l]); return r; }

MF float lane_cos(float x) {
  float m = __builtin_fmaf(x, 0x1.45f306p-2f, -0.25f) + 0x1.8p22f;
  uint32_t u; __builtin_memcpy(&u, &m, 4); u |= 1; float h; __builtin_memcpy(&h, &u, 4);
  h = h - 0x1.8p22f;
  float r = __builtin_fmaf(-h, 0x1.921fb60000000p+1f, x); r = __builtin_fmaf(-h, -0x1.777a5c0000000p-24f, r);
  float s = r * r, s2 = s * s;
  r = __builtin_fmaf(-h, -0x1.ee59da0000000p-49f, r);
  uint32_t v; __builtin_memcpy(&v, &r, 4); v ^= ~u << 30; __builtin_memcpy(&r, &v, 4);
  float p = __builtin_fmaf(s, 0x1.6171ecp-19f, -0x1.9fb442p-13f);
  float q = __builtin_fmaf(s, 0x1.111046p-7f, -0x1.555554p-3f);
  return __builtin_fmaf(r * s, __builtin_fmaf(p, s2, q), r);
}
MF_ONCE v_f32 wide(v_f32 a, v_f32 r) { v_f32 q = mf_cos_f32(a); MF_LANES r[l] = !(__builtin_fabsf(a[l]) <= 0x1p16f) ? q[l] : r[l]; return r; }
MF v_f32 my_cos(v_f32 a) {
  v_f32 r; MF_LANES r[l] = lane_cos(a[l]);
  typedef float z __attribute__((vector_size(64))); z ab; MF_LANES ab[l] = __builtin_fabsf(a[l]); z lim = {0x1p16f,0x1p16f,0x1p16f,0x1p16f,0x1p16f,0x1p16f,0x1p16f,0x1p16f,0x1p16f,0x1p16f,0x1p16f,0x1p16f,0x1p16f,0x1p16f,0x1p16f,0x1p16f};if (__builtin_expect(__builtin_ia32_cmpps512_mask(ab, lim, 6, -1, 4), 0)) return wide(a, r);
  return r;
}
typedef float z __attribute__((vector_size(64)));
struct A{const float*x;float*y;long n;};
int omp_get_thread_num(void);
static void part(void*p){ struct A*a_=p; const float*x=a_->x;float*y=a_->y; long n=a_->n, t=omp_get_thread_num(); for(long i=t*n/2;i+16<=(t+1)*n/2;i+=16){ v_f32 a0=*(u_f32*)(x+i+0);__builtin_prefetch(x+i+1024,0,3);a0=my_cos(my_cos(a0));*(u_f32*)(y+i+0)=a0; } }
void GOMP_parallel(void(*)(void*),void*,unsigned,unsigned);
__attribute__((visibility("default"))) void k(const float*x,float*y,long n){ struct A a={x,y,n}; GOMP_parallel(part,&a,2,0); }