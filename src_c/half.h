/* SPDX-License-Identifier: MIT */
/* Half precision: 16 bits in memory, float32 in registers. For such dtypes what simd.h has for wider ones. */
#ifndef FASTBN_HALF_H
#define FASTBN_HALF_H

#include "simd.h"

typedef uint16_t value_f16, value_bf16;

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
