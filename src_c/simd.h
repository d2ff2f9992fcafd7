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
typedef uint16_t value_f16, value_bf16;

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

/* a + b, and what its rounding has lost: exact, if finite (Knuth) */
INLINE vec_f64 two_sum_f64(vec_f64 a, vec_f64 b, vec_f64 *lost)
{
    const vec_f64 sum = a + b, second = sum - a;
    *lost = (a - (sum - second)) + (b - second);
    return sum;
}

/* a * b, and what its rounding has lost: exact, unless a factor exceeds 2^996 or the product 2^-969 (Dekker) */
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

/* ---- half precision: 16 bits in memory, float32 in registers ---- */

typedef uint16_t bits16 __attribute__((vector_size(SIMD_BYTES / 2)));
typedef uint32_t bits32 __attribute__((vector_size(SIMD_BYTES)));

INLINE bits16 load_bits16(const uint16_t *p)
{
    bits16 v;
    memcpy(&v, p, sizeof v);
    return v;
}

#if !defined(__AVX512F__)
/* n < 4 values, the first the lowest */
INLINE uint64_t load_few_bits16(const uint16_t *p, int n)
{
    uint32_t two = 0;
    if (n & 2) memcpy(&two, p, sizeof two);
    return n & 1 ? two | (uint64_t)p[n - 1] << 16 * (n - 1) : two;
}

INLINE bits16 bits16_of(const uint64_t *words)
{
#if defined(__AVX2__)
    return (bits16)_mm_set_epi64x((int64_t)words[1], (int64_t)words[0]);
#else
    bits16 v;
    memcpy(&v, words, sizeof v);
    return v;
#endif
}
#endif

INLINE bits16 load_head_bits16(const uint16_t *p, int n)
{
    if (WHOLE(n, WIDTH_f32)) return load_bits16(p);
#if defined(__AVX512F__)
    return (bits16)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
#else
    uint64_t words[2] = {0};
    if (n < 4) {
        words[0] = load_few_bits16(p, n);
    } else {
        memcpy(&words[0], p, 8);
        memcpy(&words[1], p + n - 4, 8);
        words[1] = n > 4 ? words[1] >> 16 * (8 - n) : 0;
    }
    return bits16_of(words);
#endif
}

INLINE void store_bits16(uint16_t *p, bits16 v)
{
    memcpy(p, &v, sizeof v);
}

INLINE void store_head_bits16(uint16_t *p, bits16 v, int n)
{
    if (WHOLE(n, WIDTH_f32)) {
        store_bits16(p, v);
        return;
    }
#if defined(__AVX512F__)
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)v);
#else
    uint64_t words[2] = {0};
    memcpy(words, &v, sizeof v);
    if (n >= 4) {
        memcpy(p, &words[0], 8);
        words[0] = words[1];
        p += 4;
    }
    if (n == 8) memcpy(p, &words[0], 8);
    if (n & 2) {
        memcpy(p, &words[0], 4);
        words[0] >>= 32;
        p += 2;
    }
    if (n & 1) *p = (uint16_t)words[0];
#endif
}

/* p is aligned to the vector */
INLINE void stream_bits16(uint16_t *p, bits16 v)
{
#if defined(__AVX512F__)
    _mm256_stream_si256((__m256i *)p, (__m256i)v);
#elif defined(__AVX2__)
    _mm_stream_si128((__m128i *)p, (__m128i)v);
#else
    store_bits16(p, v);
#endif
}

INLINE bits32 extend(bits16 v)
{
#if defined(__AVX512F__)
    return (bits32)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
    return (bits32)_mm256_cvtepu16_epi32((__m128i)v);
#else
    return __builtin_convertvector(v, bits32);
#endif
}

/* the low halves; the high ones are 0 */
INLINE bits16 narrow(bits32 v)
{
#if defined(__AVX512F__)
    return (bits16)_mm512_cvtepi32_epi16((__m512i)v);
#elif defined(__AVX2__)
    return (bits16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)v, (__m256i)v), 0x08));
#else
    return __builtin_convertvector(v, bits16);
#endif
}

INLINE bits32 select_bits(mask_f32 condition, bits32 yes, bits32 no)
{
    return ((bits32)condition & yes) | (~(bits32)condition & no);
}

/* bfloat16 is the high half of float32: exact one way, rounded to nearest even the other. In integers, for the
 * instruction of AVX512_BF16 takes denormals for zeros. The lower half of a NaN is 0, as in what comes from bfloat16,
 * of the arithmetic and of round_coefficients: rounding it up could make it -0. */
INLINE vec_f32 from_bf16(bits16 v)
{
    return (vec_f32)(extend(v) << 16);
}

/* in the high halves; what is in the low ones does not matter */
INLINE bits32 round_bf16(vec_f32 v)
{
    const bits32 u = (bits32)v;
#if defined(__AVX512F__) /* one of two additions, instead of three operations that make what is added */
    const __mmask16 odd = _mm512_test_epi32_mask((__m512i)u, _mm512_set1_epi32(0x10000));
    return (bits32)_mm512_mask_add_epi32((__m512i)(u + 0x7fff), odd, (__m512i)u, _mm512_set1_epi32(0x8000));
#else
    return u + 0x7fff + (u >> 16 & 1);
#endif
}

INLINE bits16 to_bf16(vec_f32 v)
{
    return narrow(round_bf16(v) >> 16);
}

/* float16: the instructions of F16C round to nearest even and keep denormals, whatever the control register says; the
 * arithmetic below gives the same bits. */
INLINE vec_f32 from_f16(bits16 v)
{
#if defined(__AVX512F__)
    return (vec_f32)_mm512_cvtph_ps((__m256i)v);
#elif defined(__F16C__)
    return (vec_f32)_mm256_cvtph_ps((__m128i)v);
#else
    const bits32 h = extend(v), magnitude = (h & 0x7fff) << 13;
    const vec_f32 finite = (vec_f32)magnitude * 0x1p112f; /* the exponents differ by 112; exact for denormals too */
    const bits32 special = magnitude | 0x7f800000;
    return (vec_f32)(select_bits((mask_f32)(magnitude >= 0x7c00u << 13), special, (bits32)finite) | (h & 0x8000) << 16);
#endif
}

INLINE bits16 to_f16(vec_f32 v)
{
#if defined(__AVX512F__)
    return (bits16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
    return (bits16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
    const bits32 u = (bits32)v & 0x7fffffff, sign = (bits32)v >> 16 & 0x8000;
    const bits32 half = (bits32){0} + 0x3f000000; /* 0.5: its last bit is the smallest float16 */
    const bits32 normal = (u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13;
    const bits32 tiny = (bits32)((vec_f32)u + (vec_f32)half) - half;
    bits32 h = select_bits((mask_f32)(u < 0x38800000), tiny, normal);      /* 2^-14 */
    h = select_bits((mask_f32)(u >= 0x47800000), (bits32){0} + 0x7c00, h); /* 2^16 */
    h = select_bits((mask_f32)(u > 0x7f800000), (bits32){0} + 0x7e00, h);
    return narrow(h | sign);
#endif
}

/* WIDTH_f64 values from memory as float64; no more are read */
#if defined(__AVX512F__)
INLINE vec_f64 widen_f16(const uint16_t *p)
{
    return (vec_f64)_mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)));
}

/* The load puts the same 8 values into both halves of a register; one shuffle spreads four of each to high halves. */
INLINE vec_f64 widen_bf16(const uint16_t *p)
{
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
    const __m256i high = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7, -1, -1, 8, 9, -1, -1,
                                          10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
    return (vec_f64)_mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_shuffle_epi8(twice, high)));
}
#elif defined(__AVX2__)
INLINE vec_f64 widen_f16(const uint16_t *p)
{
    return (vec_f64)_mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)p)));
}

INLINE vec_f64 widen_bf16(const uint16_t *p)
{
    const __m128i high = _mm_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7);
    return (vec_f64)_mm256_cvtps_pd(_mm_castsi128_ps(_mm_shuffle_epi8(_mm_loadl_epi64((const __m128i *)p), high)));
}
#else
INLINE vec_f64 widen_f16(const uint16_t *p)
{
    bits16 v = {0};
    memcpy(&v, p, WIDTH_f64 * sizeof *p);
    return widen_part_f32(from_f16(v), 0);
}

INLINE vec_f64 widen_bf16(const uint16_t *p)
{
    bits16 v = {0};
    memcpy(&v, p, WIDTH_f64 * sizeof *p);
    return widen_part_f32(from_bf16(v), 0);
}
#endif

/* the other operations of a dtype in memory, from its two conversions */
#define HALF_PRECISION(dtype)                                     \
    INLINE vec_f32 load_##dtype(const uint16_t *p)                \
    {                                                             \
        return from_##dtype(load_bits16(p));                      \
    }                                                             \
    INLINE vec_f32 load_head_##dtype(const uint16_t *p, int n)    \
    {                                                             \
        return from_##dtype(load_head_bits16(p, n));              \
    }                                                             \
    INLINE void store_##dtype(uint16_t *p, vec_f32 v)             \
    {                                                             \
        store_bits16(p, to_##dtype(v));                           \
    }                                                             \
    INLINE void store_head_##dtype(uint16_t *p, vec_f32 v, int n) \
    {                                                             \
        store_head_bits16(p, to_##dtype(v), n);                   \
    }                                                             \
    INLINE void stream_##dtype(uint16_t *p, vec_f32 v)            \
    {                                                             \
        stream_bits16(p, to_##dtype(v));                          \
    }                                                             \
    INLINE vec_f64 widen_head_##dtype(const uint16_t *p, int n)   \
    {                                                             \
        return widen_part_f32(load_head_##dtype(p, n), 0);        \
    }

HALF_PRECISION(f16)
HALF_PRECISION(bf16)

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
VECTORS(f16, f32)

/* bfloat16 in pairs of vectors. In any order, one has the even values and the other the odd ones. In order, AVX2 and
 * AVX-512 unpack and pack within 128 bits and move runs of four to their places; other ISAs take vector by vector. */
INLINE void load_pair_bf16(const uint16_t *p, int any_order, vec_f32 *v)
{
    bits32 pair;
    memcpy(&pair, p, sizeof pair);
    if (any_order) {
        v[0] = (vec_f32)(pair << 16);
        v[1] = (vec_f32)(pair & 0xffff0000);
        return;
    }
#if defined(__AVX512F__)
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), zero = _mm512_setzero_si512();
    const __m512i ordered = _mm512_permutexvar_epi64(order, (__m512i)pair);
    v[0] = (vec_f32)_mm512_unpacklo_epi16(zero, ordered);
    v[1] = (vec_f32)_mm512_unpackhi_epi16(zero, ordered);
#elif defined(__AVX2__)
    const __m256i ordered = _mm256_permute4x64_epi64((__m256i)pair, 0xd8), zero = _mm256_setzero_si256();
    v[0] = (vec_f32)_mm256_unpacklo_epi16(zero, ordered);
    v[1] = (vec_f32)_mm256_unpackhi_epi16(zero, ordered);
#else
    EACH(k, 2) v[k] = load_bf16(p + k * WIDTH_f32);
#endif
}

INLINE void store_pair_bf16(uint16_t *p, int any_order, int stream, const vec_f32 *v)
{
#if !defined(__AVX2__)
    if (!any_order) {
        EACH(k, 2) store_bf16(p + k * WIDTH_f32, v[k]);
        return;
    }
#endif
    const bits32 first = round_bf16(v[0]), second = round_bf16(v[1]);
    bits32 pair = first >> 16 | (second & 0xffff0000);
#if defined(__AVX512F__)
    if (!any_order) {
        const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
        const __m512i packed = _mm512_packus_epi32((__m512i)(first >> 16), (__m512i)(second >> 16));
        pair = (bits32)_mm512_permutexvar_epi64(order, packed);
    }
#elif defined(__AVX2__)
    if (!any_order) {
        const __m256i packed = _mm256_packus_epi32((__m256i)(first >> 16), (__m256i)(second >> 16));
        pair = (bits32)_mm256_permute4x64_epi64(packed, 0xd8);
    }
#endif
    if (stream) {
        bits16 halves[2];
        memcpy(halves, &pair, sizeof pair);
        EACH(k, 2) stream_bits16(p + k * WIDTH_f32, halves[k]);
    } else {
        memcpy(p, &pair, sizeof pair);
    }
}

INLINE void load_vectors_bf16(const uint16_t *p, int vectors, int any_order, vec_f32 *v)
{
    EACH(k, vectors / 2) load_pair_bf16(p + 2 * k * WIDTH_f32, any_order, v + 2 * k);
    if (vectors % 2) v[vectors - 1] = load_bf16(p + (vectors - 1) * WIDTH_f32);
}

INLINE void store_vectors_bf16(uint16_t *p, int vectors, int any_order, const vec_f32 *v)
{
    EACH(k, vectors / 2) store_pair_bf16(p + 2 * k * WIDTH_f32, any_order, 0, v + 2 * k);
    if (vectors % 2) store_bf16(p + (vectors - 1) * WIDTH_f32, v[vectors - 1]);
}

INLINE void stream_vectors_bf16(uint16_t *p, int vectors, int any_order, const vec_f32 *v)
{
    EACH(k, vectors / 2) store_pair_bf16(p + 2 * k * WIDTH_f32, any_order, 1, v + 2 * k);
    if (vectors % 2) stream_bf16(p + (vectors - 1) * WIDTH_f32, v[vectors - 1]);
}

#endif
