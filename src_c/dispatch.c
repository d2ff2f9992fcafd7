// SPDX-License-Identifier: MIT
// The tables of ISAs, dtypes and activations as C data, and the floating-point mode. No arithmetic here.
#include "fastbn.h"

#include <assert.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <xmmintrin.h>

// not every compiler's __builtin_cpu_supports knows it; the registers are those of AVX
static int cpu_supports_f16c(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}

// Intel's have it since Sapphire Rapids
static int cpu_supports_avx512fp16(void)
{
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 23 & 1) != 0;
}

#define ON_x86_64(...) __VA_ARGS__
#define ON_aarch64(...)
#elif defined(__aarch64__)
#define ON_x86_64(...)
#define ON_aarch64(...) __VA_ARGS__
#else
#error "fastbn: isa.def has no row for this architecture"
#endif

#define FASTBN_ISA(architecture, name, flags, test) ON_##architecture(extern const fastbn_isa fastbn_isa_##name;)
#include "isa.def"
#undef FASTBN_ISA

static const fastbn_isa *const isas[] = {
#define FASTBN_ISA(architecture, name, flags, test) ON_##architecture(&fastbn_isa_##name, )
#include "isa.def"
#undef FASTBN_ISA
};

enum { ISA_COUNT = sizeof isas / sizeof isas[0] };

int fastbn_isa_count(void)
{
    return ISA_COUNT;
}

enum { MIB = 1 << 20, AMD = 0, INTEL_WITH_FP16, OTHERS, PROCESSORS };

static const fastbn_sizes measured[PROCESSORS] = {
    // Zen 5, and about the same on Zen 3: an L3 cache of 32 MiB for some cores. Asking there costs a fifth of the sums,
    // tiles up to a fifth of inference, and rows together up to two fifths
    [AMD] = {.processor = "amd",
             .stream = 26 * MIB,
             .stream_by_channel = 26 * MIB / 4 * 3,
             .stream_given = 36 * MIB,
             .ask_ahead = 16 * MIB,
             .most_beside = 5 * MIB / 2,
             .far = 8192,
             .far_beside = 8192,
             .next_too = 1,
             .tiled = 0,
             .in_order = 1,
             .row_by_row = 1,
             .short_strips = 1},
    // Emerald Rapids: hundreds of MiB for many cores, nearly as far away as memory. Asking for the next channels
    // between stores past the caches costs up to a fifth of backward, a tenth of forward; and asking further than this
    // up to a tenth of the sums
    [INTEL_WITH_FP16] = {.processor = "intel with fp16",
                         .stream = 48 * MIB,
                         .stream_by_channel = 48 * MIB,
                         .stream_given = 48 * MIB,
                         .ask_ahead = 2 * MIB,
                         .most_beside = INT64_MAX,
                         .far = 4096,
                         .far_beside = 2048,
                         .next_too = 0,
                         .tiled = 1,
                         .in_order = 0,
                         .row_by_row = 0,
                         .short_strips = 0},
    // an older Xeon: y of 32 MiB channel by channel, 42 MiB otherwise; when to ask, and what for, is assumed
    [OTHERS] = {.processor = "other",
                .stream = 84 * MIB,
                .stream_by_channel = 84 * MIB / 4 * 3,
                .stream_given = 84 * MIB,
                .ask_ahead = 16 * MIB,
                .most_beside = INT64_MAX,
                .far = 8192,
                .far_beside = 8192,
                .next_too = 1,
                .tiled = 1,
                .in_order = 0,
                .row_by_row = 0,
                .short_strips = 0},
};

int fastbn_sizes_count(void)
{
    return PROCESSORS;
}

const fastbn_sizes *fastbn_get_sizes(int index)
{
    assert(0 <= index && index < PROCESSORS);
    return &measured[index];
}

int fastbn_sizes_here(void)
{
#if defined(__x86_64__)
    if (__builtin_cpu_is("amd")) return AMD;
    if (__builtin_cpu_is("intel") && cpu_supports_avx512fp16()) return INTEL_WITH_FP16;
#endif
    return OTHERS;
}

const fastbn_isa *fastbn_get_isa(int index)
{
    assert(0 <= index && index < ISA_COUNT);
    return isas[index];
}

int fastbn_isa_available(int index)
{
    const int available[] = {
#define FASTBN_ISA(architecture, name, flags, test) ON_##architecture((test) != 0, )
#include "isa.def"
#undef FASTBN_ISA
    };
    assert(0 <= index && index < ISA_COUNT);
    return available[index];
}

static const char *const dtypes[][2] = {
#define FASTBN_DTYPE(code, name) {#code, name},
#include "dtypes.def"
#undef FASTBN_DTYPE
};

int fastbn_dtype_count(void)
{
    return sizeof dtypes / sizeof dtypes[0];
}

const char *fastbn_dtype_code(int index)
{
    return dtypes[index][0];
}

const char *fastbn_dtype_name(int index)
{
    return dtypes[index][1];
}

static const struct {
    const char *name;
    int of_v;
    const char *formulas[FASTBN_FORMULAS];
} activations[] = {
#define FASTBN_ACTIVATION(name, y, open, where_open, where_shut, of_v) \
    {#name, of_v, {#y, #open, #where_open, #where_shut}},
#include "activations.def"
#undef FASTBN_ACTIVATION
};

int fastbn_activation_count(void)
{
    return sizeof activations / sizeof activations[0];
}

const char *fastbn_activation_name(int index)
{
    return activations[index].name;
}

int fastbn_activation_of_v(int index)
{
    return activations[index].of_v;
}

const char *fastbn_activation_formula(int index, int formula)
{
    return activations[index].formulas[formula];
}

#if defined(__x86_64__)
uint64_t fastbn_enter(void)
{
    const unsigned saved = _mm_getcsr();
    _mm_setcsr(0x1f80);  // every exception masked, round to nearest, denormals are numbers
    return saved;
}

void fastbn_leave(uint64_t saved)
{
    _mm_sfence();
    _mm_setcsr((unsigned)saved);
}
#else
uint64_t fastbn_enter(void)
{
    uint64_t saved;
    const uint64_t standard = 0;
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved));
    __asm__ volatile("msr fpcr, %0" : : "r"(standard));
    return saved;
}

void fastbn_leave(uint64_t saved)
{
    __asm__ volatile("msr fpcr, %0" : : "r"(saved));
}
#endif
