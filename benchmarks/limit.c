// The limit itself: flat passes over equal, aligned buffers, with plain or streaming stores. Compiled by limit.py for
// the machine it runs on. Every thread has one piece; sizes are multiples of 64 bytes (callers round up).
#include <stdint.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

typedef uint64_t line __attribute__((vector_size(64), may_alias));  // one cache line, whatever the width of registers
enum { READ, READ2, COPY, READ2_WRITE1, READ2_WRITE2 };

uint64_t fastbn_limit_sink;  // what was read is used, so that no compiler leaves it out

static inline void store(line *to, line value, int stream)
{
    if (!stream) {
        *to = value;
        return;
    }
#if defined(__AVX512F__)
    _mm512_stream_si512((void *)to, (__m512i)value);
#elif defined(__AVX__)
    for (int i = 0; i < 2; i++) _mm256_stream_si256((__m256i *)to + i, ((__m256i *)&value)[i]);
#elif defined(__SSE2__)
    for (int i = 0; i < 4; i++) _mm_stream_si128((__m128i *)to + i, ((__m128i *)&value)[i]);
#else
    *to = value;
#endif
}

static inline __attribute__((always_inline)) line pass(int kind, int stream, int64_t lines, const line *a,
                                                       const line *b, line *c, line *d)
{
    line sum[4] = {{0}, {0}, {0}, {0}};
    int64_t i = 0;
    for (; i + 4 <= lines; i += 4)
        for (int k = 0; k < 4; k++) {  // unrolled
            switch (kind) {
            case READ: sum[k] ^= a[i + k]; break;
            case READ2: sum[k] ^= a[i + k] + b[i + k]; break;
            case COPY: store(c + i + k, a[i + k], stream); break;
            case READ2_WRITE1: store(c + i + k, a[i + k] ^ b[i + k], stream); break;
            default: {
                line u = a[i + k], v = b[i + k];
                store(c + i + k, u ^ v, stream);
                store(d + i + k, u + v, stream);
            }
            }
        }
    for (; i < lines; i++) {
        line u = a[i], v = kind == READ || kind == COPY ? u : b[i];
        sum[0] ^= u + v;
        if (kind >= COPY) store(c + i, kind == COPY ? u : (line)(u ^ v), stream);
        if (kind == READ2_WRITE2) store(d + i, u + v, stream);
    }
    return sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
}

#define PASS(KIND, STREAM) sum = pass(KIND, STREAM, lines, a, b, c, d)

void fastbn_limit(int kind, int stream, int threads, int64_t bytes, const char *x, const char *dy, char *y, char *z)
{
    const int64_t all = bytes / 64;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int t = 0; t < threads; t++) {
        const int64_t first = all * t / threads, lines = all * (t + 1) / threads - first;
        const line *a = (const line *)x + first, *b = (const line *)dy + first;
        line *c = (line *)y + first, *d = (line *)z + first, sum = {0};
        switch (2 * kind + (stream != 0)) {
        case 2 * READ:
        case 2 * READ + 1: PASS(READ, 0); break;
        case 2 * READ2:
        case 2 * READ2 + 1: PASS(READ2, 0); break;
        case 2 * COPY: PASS(COPY, 0); break;
        case 2 * COPY + 1: PASS(COPY, 1); break;
        case 2 * READ2_WRITE1: PASS(READ2_WRITE1, 0); break;
        case 2 * READ2_WRITE1 + 1: PASS(READ2_WRITE1, 1); break;
        case 2 * READ2_WRITE2: PASS(READ2_WRITE2, 0); break;
        default: PASS(READ2_WRITE2, 1); break;
        }
#if defined(__SSE2__)
        if (stream) _mm_sfence();
#endif
        uint64_t total = 0;
        for (int i = 0; i < 8; i++) total ^= sum[i];
        if (total == 0x5ca1ab1e) fastbn_limit_sink = total;
    }
}
