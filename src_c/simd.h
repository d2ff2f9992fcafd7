/* SPDX-License-Identifier: MIT */
/* Vectors of the width that the compiler's flags allow: GNU vector types, so that + - * < & are written as such, and
 * the few operations that they lack. Each has a plain version; intrinsics stand where a compiler gets it wrong.
 *
 * "head" operations touch the first n values only, 0 <= n <= WIDTH: they never read or write beyond a buffer. */
#ifndef FASTBN_SIMD_H
#define FASTBN_SIMD_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define SIMD_BYTES 64
#elif defined(__AVX2__)
#include <immintrin.h>
#define SIMD_BYTES 32
#elif defined(__SSE2__)
#include <emmintrin.h>
#define SIMD_BYTES 16
#else
#define SIMD_BYTES 16
#endif
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline, unused))

/* for each k in 0 .. count-1, unrolled: count is a small constant */
#define EACH(k, count) _Pragma("GCC unroll 16") for (int k = 0; k < (count); k++)

enum { WIDTH_f32 = SIMD_BYTES / 4, WIDTH_f64 = SIMD_BYTES / 8 };

/* a value in memory */
typedef float value_f32;
typedef double value_f64;

typedef float vec_f32 __attribute__((vector_size(SIMD_BYTES)));
typedef int32_t mask_f32 __attribute__((vector_size(SIMD_BYTES))); /* what a comparison gives: 0 or -1 */
typedef double vec_f64 __attribute__((vector_size(SIMD_BYTES)));
typedef int64_t mask_f64 __attribute__((vector_size(SIMD_BYTES)));

INLINE int clamp(int64_t n, int width)
{
    return n < 0 ? 0 : n < width ? (int)n : width;
}

/* x - 0 and not 0 + x: the sign of -0 stays */
INLINE vec_f32 splat_f32(float x)
{
    return x - (vec_f32){0};
}

INLINE vec_f64 splat_f64(double x)
{
    return x - (vec_f64){0};
}

INLINE vec_f32 select_f32(mask_f32 condition, vec_f32 yes, vec_f32 no)
{
    return (vec_f32)(((mask_f32)yes & condition) | ((mask_f32)no & ~condition));
}

INLINE vec_f64 select_f64(mask_f64 condition, vec_f64 yes, vec_f64 no)
{
    return (vec_f64)(((mask_f64)yes & condition) | ((mask_f64)no & ~condition));
}

INLINE vec_f32 load_f32(const float *p)
{
    vec_f32 v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE vec_f64 load_f64(const double *p)
{
    vec_f64 v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store_f32(float *p, vec_f32 v)
{
    memcpy(p, &v, sizeof v);
}

INLINE void store_f64(double *p, vec_f64 v)
{
    memcpy(p, &v, sizeof v);
}

/* p is aligned to SIMD_BYTES; finish with fence(), kernels with fastbn_leave() */
INLINE void stream_f32(float *p, vec_f32 v)
{
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
    _mm256_stream_ps(p, (__m256)v);
#elif defined(__SSE2__)
    _mm_stream_ps(p, (__m128)v);
#else
    store_f32(p, v);
#endif
}

INLINE void stream_f64(double *p, vec_f64 v)
{
    stream_f32((float *)p, (vec_f32)v);
}

INLINE void fence(void)
{
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

/* the lanes below n */
INLINE mask_f32 head_f32(int n)
{
    mask_f32 lane;
    EACH(k, WIDTH_f32) lane[k] = k;
    return lane < n;
}

INLINE mask_f64 head_f64(int n)
{
    mask_f64 lane;
    EACH(k, WIDTH_f64) lane[k] = k;
    return lane < (int64_t)n;
}

INLINE vec_f64 keep_head_f64(vec_f64 v, int n)
{
    return (vec_f64)((mask_f64)v & head_f64(n));
}

/* Some lanes of a and b, those of b counted on from a's. */
#if defined(__clang__)
#define SHUFFLE_F64(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE_F64(a, b, ...) __builtin_shuffle(a, b, (mask_f64){__VA_ARGS__})
#endif

/* The first halves of the groups of 2 * half lanes, of a and of b in turn. */
INLINE vec_f64 first_halves_f64(vec_f64 a, vec_f64 b, int half)
{
#if SIMD_BYTES == 64
    if (half == 4) return SHUFFLE_F64(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
    if (half == 2) return SHUFFLE_F64(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
    return SHUFFLE_F64(a, b, 0, 8, 2, 10, 4, 12, 6, 14);
#elif SIMD_BYTES == 32
    if (half == 2) return SHUFFLE_F64(a, b, 0, 1, 4, 5);
    return SHUFFLE_F64(a, b, 0, 4, 2, 6);
#else
    (void)half;
    return SHUFFLE_F64(a, b, 0, 2);
#endif
}

/* Likewise the second ones. */
INLINE vec_f64 second_halves_f64(vec_f64 a, vec_f64 b, int half)
{
#if SIMD_BYTES == 64
    if (half == 4) return SHUFFLE_F64(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    if (half == 2) return SHUFFLE_F64(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    return SHUFFLE_F64(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
#elif SIMD_BYTES == 32
    if (half == 2) return SHUFFLE_F64(a, b, 2, 3, 6, 7);
    return SHUFFLE_F64(a, b, 1, 5, 3, 7);
#else
    (void)half;
    return SHUFFLE_F64(a, b, 1, 3);
#endif
}

INLINE vec_f64 add_halves_f64(vec_f64 a, vec_f64 b, int half)
{
    return first_halves_f64(a, b, half) + second_halves_f64(a, b, half);
}

/* lane k is lane index[k] of v */
INLINE vec_f32 pick_f32(vec_f32 v, mask_f32 index)
{
#if defined(__AVX512F__)
    return (vec_f32)_mm512_permutexvar_ps((__m512i)index, (__m512)v);
#elif defined(__AVX2__)
    return (vec_f32)_mm256_permutevar8x32_ps((__m256)v, (__m256i)index);
#else
    vec_f32 picked;
    EACH(k, WIDTH_f32) picked[k] = v[index[k]];
    return picked;
#endif
}

INLINE vec_f64 pick_f64(vec_f64 v, mask_f64 index)
{
#if defined(__AVX512F__)
    return (vec_f64)_mm512_permutexvar_pd((__m512i)index, (__m512d)v);
#else
    vec_f64 picked;
    EACH(k, WIDTH_f64) picked[k] = v[index[k]];
    return picked;
#endif
}

/* n known to be a whole vector when compiled */
#define WHOLE(n, width) (__builtin_constant_p(n) && (n) == (width))

/* Tails without masked instructions: out of line, for they are rare and many. */
static __attribute__((noinline, unused)) void copy_some(void *destination, const void *source, size_t bytes)
{
    const char *const s = source;
    char *const d = destination;
    for (size_t i = 0; i < bytes; i++) d[i] = s[i];
}

/* lanes from n on are 0 */
INLINE vec_f32 load_head_f32(const float *p, int n)
{
    if (WHOLE(n, WIDTH_f32)) return load_f32(p);
#if defined(__AVX512F__)
    return (vec_f32)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#elif defined(__AVX2__)
    return (vec_f32)_mm256_maskload_ps(p, (__m256i)head_f32(n));
#else
    float lanes[WIDTH_f32] = {0};
    copy_some(lanes, p, n * sizeof lanes[0]);
    return load_f32(lanes);
#endif
}

INLINE vec_f64 load_head_f64(const double *p, int n)
{
    if (WHOLE(n, WIDTH_f64)) return load_f64(p);
#if defined(__AVX512F__)
    return (vec_f64)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
#elif defined(__AVX2__)
    return (vec_f64)_mm256_maskload_pd(p, (__m256i)head_f64(n));
#else
    double lanes[WIDTH_f64] = {0};
    copy_some(lanes, p, n * sizeof lanes[0]);
    return load_f64(lanes);
#endif
}

INLINE void store_head_f32(float *p, vec_f32 v, int n)
{
    if (WHOLE(n, WIDTH_f32)) {
        store_f32(p, v);
        return;
    }
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#elif defined(__AVX2__)
    _mm256_maskstore_ps(p, (__m256i)head_f32(n), (__m256)v);
#else
    copy_some(p, &v, n * sizeof *p);
#endif
}

INLINE void store_head_f64(double *p, vec_f64 v, int n)
{
    if (WHOLE(n, WIDTH_f64)) {
        store_f64(p, v);
        return;
    }
#if defined(__AVX512F__)
    _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v);
#elif defined(__AVX2__)
    _mm256_maskstore_pd(p, (__m256i)head_f64(n), (__m256d)v);
#else
    copy_some(p, &v, n * sizeof *p);
#endif
}

/* a comparison's result as bits, lane 0 the lowest, and back */
INLINE unsigned to_bits_f32(mask_f32 m)
{
#if defined(__AVX512F__)
    return (unsigned)_mm512_movepi32_mask((__m512i)m);
#elif defined(__AVX2__)
    return (unsigned)_mm256_movemask_ps((__m256)m);
#elif defined(__SSE2__)
    return (unsigned)_mm_movemask_ps((__m128)m);
#else
    unsigned bits = 0;
    EACH(k, WIDTH_f32) bits |= (unsigned)(m[k] & 1) << k;
    return bits;
#endif
}

INLINE unsigned to_bits_f64(mask_f64 m)
{
#if defined(__AVX512F__)
    return (unsigned)_mm512_movepi64_mask((__m512i)m);
#elif defined(__AVX2__)
    return (unsigned)_mm256_movemask_pd((__m256d)m);
#elif defined(__SSE2__)
    return (unsigned)_mm_movemask_pd((__m128d)m);
#else
    unsigned bits = 0;
    EACH(k, WIDTH_f64) bits |= (unsigned)(m[k] & 1) << k;
    return bits;
#endif
}

INLINE mask_f32 from_bits_f32(unsigned bits)
{
#if defined(__AVX512F__)
    return (mask_f32)_mm512_movm_epi32((__mmask16)bits);
#else
    mask_f32 one;
    EACH(k, WIDTH_f32) one[k] = (int32_t)1 << k;
    return ((int32_t)bits & one) != 0;
#endif
}

INLINE mask_f64 from_bits_f64(unsigned bits)
{
#if defined(__AVX512F__)
    return (mask_f64)_mm512_movm_epi64((__mmask8)bits);
#else
    mask_f64 one;
    EACH(k, WIDTH_f64) one[k] = (int64_t)1 << k;
    return ((int64_t)bits & one) != 0;
#endif
}

/* WIDTH_f64 values from memory, as float64 */
INLINE vec_f64 widen_f32(const float *p)
{
#if defined(__AVX512F__)
    return (vec_f64)_mm512_cvtps_pd(_mm256_loadu_ps(p));
#elif defined(__AVX2__)
    return (vec_f64)_mm256_cvtps_pd(_mm_loadu_ps(p));
#else
    vec_f64 v;
    EACH(k, WIDTH_f64) v[k] = p[k];
    return v;
#endif
}

INLINE vec_f64 widen_f64(const double *p)
{
    return load_f64(p);
}

INLINE vec_f64 widen_head_f32(const float *p, int n)
{
    if (WHOLE(n, WIDTH_f64)) return widen_f32(p);
#if defined(__AVX512F__)
    return (vec_f64)_mm512_cvtps_pd(_mm256_maskz_loadu_ps((__mmask8)((1u << n) - 1), p));
#elif defined(__AVX2__)
    return (vec_f64)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)load_head_f32(p, n)));
#else
    float lanes[WIDTH_f64] = {0};
    copy_some(lanes, p, n * sizeof lanes[0]);
    return widen_f32(lanes);
#endif
}

INLINE vec_f64 widen_head_f64(const double *p, int n)
{
    return load_head_f64(p, n);
}

/* the half of a vector that is its part-th run of WIDTH_f64 lanes, as float64 */
INLINE vec_f64 widen_part_f32(vec_f32 v, int part)
{
#if defined(__AVX512F__)
    const __m512 w = (__m512)v;
    return (vec_f64)_mm512_cvtps_pd(part ? _mm512_extractf32x8_ps(w, 1) : _mm512_castps512_ps256(w));
#elif defined(__AVX2__)
    const __m256 w = (__m256)v;
    return (vec_f64)_mm256_cvtps_pd(part ? _mm256_extractf128_ps(w, 1) : _mm256_castps256_ps128(w));
#else
    vec_f64 wide;
    EACH(k, WIDTH_f64) wide[k] = v[part * WIDTH_f64 + k];
    return wide;
#endif
}

INLINE vec_f64 widen_part_f64(vec_f64 v, int part)
{
    (void)part;
    return v;
}

INLINE vec_f64 sqrt_f64(vec_f64 v)
{
#if defined(__AVX512F__)
    return (vec_f64)_mm512_sqrt_pd((__m512d)v);
#elif defined(__AVX2__)
    return (vec_f64)_mm256_sqrt_pd((__m256d)v);
#elif defined(__SSE2__)
    return (vec_f64)_mm_sqrt_pd((__m128d)v);
#else
    EACH(k, WIDTH_f64) v[k] = __builtin_sqrt(v[k]); /* an instruction, with -fno-math-errno */
    return v;
#endif
}

/* a + b, and what its rounding has lost: exact, if finite (Knuth) */
INLINE vec_f64 two_sum_f64(vec_f64 a, vec_f64 b, vec_f64 *lost)
{
    const vec_f64 sum = a + b, second = sum - a;
    *lost = (a - (sum - second)) + (b - second);
    return sum;
}

/* a * b, and what its rounding has lost: exact, unless a factor is above 2^996 or the product below 2^-969 (Dekker) */
INLINE vec_f64 two_product_f64(vec_f64 a, vec_f64 b, vec_f64 *lost)
{
    const vec_f64 product = a * b, a_wide = a * 0x8000001p0, b_wide = b * 0x8000001p0;
    const vec_f64 a_high = a_wide - (a_wide - a), a_low = a - a_high;
    const vec_f64 b_high = b_wide - (b_wide - b), b_low = b - b_high;
    *lost = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low;
    return product;
}

#if defined(__SSE2__) && !defined(__FMA__) && !defined(__AVX512F__)
/* a + b, rounded to odd: of the two numbers beside an inexact sum the one whose last bit is set. Rounding that to
 * float32 is rounding the exact sum (Boldo and Melquiond, IEEE Trans. Computers 57 (2008), 462). */
static __attribute__((noinline, unused)) vec_f64 add_to_odd_f64(vec_f64 a, vec_f64 b)
{
    vec_f64 lost;
    const vec_f64 sum = two_sum_f64(a, b, &lost);
    const mask_f64 inexact = (lost < 0) | (lost > 0), away = ~((lost > 0) ^ (sum > 0));
    const mask_f64 bits = (mask_f64)sum, even = (bits & 1) - 1;
    return (vec_f64)(bits + (((away & 2) - 1) & inexact & even));
}

/* Lanes of the upper and the lower half of each sum, set where rounding it to float32 may not be rounding what it was
 * rounded from: in the middle of two float32, and for denormal ones. */
INLINE mask_f32 is_rounded_twice(vec_f64 sum)
{
    const mask_f32 halves = (mask_f32)sum & (mask_f32){0x1fffffff, 0x7fffffff, 0x1fffffff, 0x7fffffff};
    const mask_f32 middle = halves == (mask_f32){0x10000000, -1, 0x10000000, -1};
    const mask_f32 above_zero = halves > (mask_f32){0x7fffffff, 0, 0x7fffffff, 0};
    return middle | (above_zero & (halves < (mask_f32){0, 0x38100000, 0, 0x38100000}));
}
#endif

/* a * b + c. float32: rounded once, as all processors since 2013 can; without the instruction, in float64, where the
 * product is exact. float64: rounded twice, for there is nothing wider. */
INLINE vec_f32 multiply_add_f32(vec_f32 a, vec_f32 b, vec_f32 c)
{
#if defined(__AVX512F__)
    return (vec_f32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vec_f32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vec_f32)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    vec_f64 product[2], addend[2], sum[2];
    EACH(part, 2) {
        product[part] = widen_part_f32(a, part) * widen_part_f32(b, part);
        addend[part] = widen_part_f32(c, part);
        sum[part] = product[part] + addend[part];
    }
    if (to_bits_f32(is_rounded_twice(sum[0]) | is_rounded_twice(sum[1]))) {
        EACH(part, 2) sum[part] = add_to_odd_f64(product[part], addend[part]);
    }
    /* not as conversions of lanes: from those, and back to float64, gcc 12 removes the rounding */
    return (vec_f32)_mm_movelh_ps(_mm_cvtpd_ps((__m128d)sum[0]), _mm_cvtpd_ps((__m128d)sum[1]));
#endif
}

INLINE vec_f64 multiply_add_f64(vec_f64 a, vec_f64 b, vec_f64 c)
{
    return a * b + c;
}

/* c + a * b, where a * b needs no rounding: fused or not is the same */
INLINE vec_f64 add_exact_product_f64(vec_f64 a, vec_f64 b, vec_f64 c)
{
#if defined(__AVX512F__)
    return (vec_f64)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
    return (vec_f64)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
    return (vec_f64)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
    return c + a * b;
#endif
}

/* a + b, as 1 * a + b: the bits of an addition, in the units for products. AMD's processors have two of them beside two
 * for additions, which are what sums wait for. */
INLINE vec_f64 add_as_product_f64(vec_f64 a, vec_f64 b)
{
#if defined(__AVX512F__) || defined(__FMA__)
    return add_exact_product_f64(splat_f64(1), a, b);
#else
    return a + b;
#endif
}

/* ---- several whole vectors of adjoining values: in the order of memory, or in any that load and store share ---- */

#define VECTORS(dtype, arithmetic)                                                                              \
    INLINE void load_vectors_##dtype(const value_##dtype *p, int vectors, int any_order, vec_##arithmetic *v)   \
    {                                                                                                           \
        (void)any_order;                                                                                        \
        EACH(k, vectors) v[k] = load_##dtype(p + k * WIDTH_##arithmetic);                                       \
    }                                                                                                           \
    INLINE void store_vectors_##dtype(value_##dtype *p, int vectors, int any_order, const vec_##arithmetic *v)  \
    {                                                                                                           \
        (void)any_order;                                                                                        \
        EACH(k, vectors) store_##dtype(p + k * WIDTH_##arithmetic, v[k]);                                       \
    }                                                                                                           \
    INLINE void stream_vectors_##dtype(value_##dtype *p, int vectors, int any_order, const vec_##arithmetic *v) \
    {                                                                                                           \
        (void)any_order;                                                                                        \
        EACH(k, vectors) stream_##dtype(p + k * WIDTH_##arithmetic, v[k]);                                      \
    }

VECTORS(f32, f32)
VECTORS(f64, f64)

#endif
