// SPDX-License-Identifier: MIT
// Prints a checksum of what each kernel makes of the same data, one line for each ISA of this machine, dtype, family,
// kernel and activation. tests/emulated.py compares the lines of different machines.
//
// Data are random bits of moderate exponents; "hostile" data have denormals, infinities and NaN too.
#include "fastbn.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_VALUES = 1 << 15, MAX_ROWS = 9, MAX_CHANNELS = 35, NEIGHBOUR = 2 };

// tails of every vector, whole groups, and more than one and two pieces that a map and sums take in turns
static const int widths[] = {1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,  16,   17, 18,
                             19, 23, 24, 25, 31, 32, 33, 47, 48, 49, 63, 64, 65, 66, 271, 1100, 144};

typedef struct format {
    int bytes, mantissa, bias;
} format;

static format format_of(const char *code)
{
    if (!strcmp(code, "f32")) return (format){4, 23, 127};
    if (!strcmp(code, "f64")) return (format){8, 52, 1023};
    if (!strcmp(code, "f16")) return (format){2, 10, 15};
    if (!strcmp(code, "bf16")) return (format){2, 7, 127};
    fprintf(stderr, "checksums.c: no format of dtype %s\n", code);
    exit(1);
}

static uint64_t next_random(uint64_t *state)  // splitmix64
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static void fill(char *p, int64_t count, format f, int hostile, uint64_t seed)
{
    for (int64_t i = 0; i < count; i++) {
        const uint64_t r = next_random(&seed), sign = r >> 63 << (8 * f.bytes - 1);
        uint64_t mantissa = r & ((1ull << f.mantissa) - 1), exponent = f.bias + (r >> 56) % 9 - 4;
        const uint64_t kind = hostile ? (r >> 40) % 97 : 97;
        if (kind < 4) exponent = kind < 2 ? 0 : 2ull * f.bias + 1;  // denormal or zero; infinity or NaN
        if (kind == 1 || kind == 3) mantissa = 0;
        const uint64_t bits = sign | exponent << f.mantissa | mantissa;
        memcpy(p + i * f.bytes, &bits, f.bytes);
    }
}

// FNV-1a; the payload of a NaN does not count
static uint64_t hash(uint64_t h, const void *p, int64_t count, format f)
{
    for (int64_t i = 0; i < count; i++) {
        uint64_t bits = 0;
        memcpy(&bits, (const char *)p + i * f.bytes, f.bytes);
        const uint64_t infinity = (2ull * f.bias + 1) << f.mantissa, magnitude = bits & ~(1ull << (8 * f.bytes - 1));
        if (magnitude > infinity) bits = infinity + 1;
        h = (h ^ bits) * 0x100000001b3u;
    }
    return h;
}

static void *room(int64_t bytes)
{
    const int64_t pages = (bytes + 4095) / 4096 * 4096;
    void *p = aligned_alloc(FASTBN_ALIGNMENT, pages);
    if (!p) exit(1);
    return memset(p, 0, pages);
}

enum {
    STATS,
    APPLY,
    BACKWARD_STATS,
    BACKWARD_APPLY,
    BESIDE,
    BACKWARD_BESIDE,
    ADJOINING,
    BACKWARD_ADJOINING,
    ADJOINING_BESIDE,
    COEFFICIENTS,
    FINISH,
    BACKWARD_FINISH,
    COPY,
    FIRST_VALUES,
    FIRST_GRADIENTS,
    KERNELS
};
static const char *const kernel_names[KERNELS] = {"stats",
                                                  "apply",
                                                  "backward_stats",
                                                  "backward_apply",
                                                  "apply_beside_stats",
                                                  "backward_apply_beside_stats",
                                                  "apply_adjoining",
                                                  "backward_apply_adjoining",
                                                  "apply_adjoining_beside_stats",
                                                  "coefficients",
                                                  "finish_forward",
                                                  "finish_backward",
                                                  "copy2d",
                                                  "first_values",
                                                  "first_gradients"};

// The arrays of a block, for values of the largest dtype.
static char *x, *residual, *dy, *y, *dx, *dresidual, *mask, *copied;
static double *sums, *x_shift, *no_shift, *coefficients, *statistics, *found, *gradients;

static fastbn_operand operand(char *data, const fastbn_block *b, int planar, int64_t row_bytes)
{
    return (fastbn_operand){data, planar ? b->channels * row_bytes : row_bytes, row_bytes};
}

// All kernels on one block; h has a checksum for each.
static void run(const fastbn_kernels *k, format f, int planar, int width, int rows, int channels, int activation,
                int with_residual, int hostile, uint64_t h[KERNELS])
{
    const format wide = format_of("f64"), arithmetic = format_of(k->coefficient_size == 8 ? "f64" : "f32");
    const int64_t per_channel = planar ? channels : width, count = (int64_t)rows * width * (planar ? channels : 1);
    // bits of planes adjoin
    const int64_t mask_bytes = fastbn_mask_stride((int64_t)width * (planar ? channels : 1)), masks = rows * mask_bytes;
    const int masked = with_residual && !fastbn_activation_of_v(activation);
    uint64_t seed = 1 + width;
    fastbn_block b = {.rows = rows, .columns = width, .channels = channels};
    if (count > MAX_VALUES) exit(1);
    fill(x, count, f, hostile, 2 + width);
    fill(residual, count, f, hostile, 3 + width);
    fill(dy, count, f, hostile, 4 + width);
    for (int64_t i = 0; i < per_channel; i++) {
        double drawn[7];
        for (int j = 0; j < 7; j++) drawn[j] = (double)(next_random(&seed) % 4001) / 1536 - 1.25;
        // some are not subtracted: sums of other kernels, of two channels at a time
        const int shifted = width % 4 >= 2 && (i % 5 == 2 || i % 5 == 4);
        const fastbn_coefficients exact = {.center = {shifted ? drawn[0] : 0},
                                           .off_center = {drawn[1] * 0x1p-30},
                                           .scale = {drawn[2]},
                                           .beta = {drawn[3]},
                                           .level = {drawn[4]},
                                           .off_level = {drawn[5] * 0x1p-30},
                                           .slope = {drawn[6]}};
        k->round_coefficients(&exact, 1, 1, (char *)coefficients + i * k->coefficient_size, per_channel);
        x_shift[i] = exact.center[0];
    }
    h[COEFFICIENTS] = hash(h[COEFFICIENTS], coefficients, FASTBN_PLANES * per_channel, arithmetic);

    b.x = operand(x, &b, planar, (int64_t)width * f.bytes);
    b.coefficients = coefficients;
    b.x_shift = x_shift;
    b.sums = sums;
    b.plane = b.coefficient_plane = per_channel;
    b.activation = activation;
    b.negative_slope = 0.2;
    b.training = 1;
    b.stream = width % 2;
    b.ask_ahead = rows > 2;
    b.row_by_row = b.short_strips = channels > 3;
    memset(sums, 0, k->sums * per_channel * sizeof *sums);
    k->stats[planar](&b);
    h[STATS] = hash(h[STATS], sums, k->sums * per_channel, wide);

    // with columns of a second row, as of one that begins where a line of the cache does
    const fastbn_channels channels_of = {.channels = per_channel,
                                         .count = (double)(planar ? rows * width : rows),
                                         .eps = 1e-5,
                                         .statistics = statistics,
                                         .keep = 1,
                                         .gamma = {with_residual ? statistics + FASTBN_GAMMA * per_channel : NULL, 0},
                                         .dgamma = gradients,
                                         .dbeta = gradients + per_channel,
                                         .sums = sums,
                                         .x_shift = x_shift,
                                         .plane = per_channel,
                                         .positions = 1,
                                         .dy_first = x_shift,
                                         .redo = copied,
                                         .coefficients = found,
                                         .coefficient_plane = 2 * per_channel,
                                         .across = per_channel,
                                         .columns = per_channel + per_channel / 2};
    memcpy(statistics + FASTBN_GAMMA * per_channel, x_shift, per_channel * sizeof *x_shift);
    memset(found, 0, FASTBN_PLANES * 2 * per_channel * sizeof *found);
    k->finish_forward(&channels_of, 0, per_channel);
    h[FINISH] = hash(h[FINISH], statistics, FASTBN_GAMMA * per_channel, wide);
    h[FINISH] = hash(h[FINISH], found, 3 * 2 * per_channel, arithmetic);
    h[FINISH] = hash(h[FINISH], copied, per_channel, (format){1, 7, 0});

    if (with_residual) b.residual = operand(residual, &b, planar, b.x.channel);
    b.y = operand(y, &b, planar, b.x.channel);
    if (masked) b.mask = (fastbn_operand){mask, mask_bytes, planar ? width : 0};
    memset(mask, 0, masks);
    k->apply[planar](&b);
    h[APPLY] = hash(h[APPLY], y, count, f);
    h[APPLY] = hash(h[APPLY], mask, masks, (format){1, 7, 0});

    b.dy = operand(dy, &b, planar, b.x.channel);
    b.dx = operand(dx, &b, planar, b.x.channel);
    if (with_residual) b.dresidual = operand(dresidual, &b, planar, b.x.channel);
    if (masked) b.residual = (fastbn_operand){0};
    memset(sums, 0, k->sums * per_channel * sizeof *sums);
    k->backward_stats[planar](&b);
    h[BACKWARD_STATS] = hash(h[BACKWARD_STATS], sums, k->sums * per_channel, wide);
    if (planar) {
        k->first_gradients(&b, found);
        h[FIRST_GRADIENTS] = hash(h[FIRST_GRADIENTS], found, channels, wide);
        k->first_values(&b.dy, channels, found);
        h[FIRST_VALUES] = hash(h[FIRST_VALUES], found, channels, wide);
        memset(found, 0, FASTBN_PLANES * 2 * per_channel * sizeof *found);
    }
    k->finish_backward(&channels_of, 0, per_channel);
    h[BACKWARD_FINISH] = hash(h[BACKWARD_FINISH], gradients, 2 * per_channel, wide);
    h[BACKWARD_FINISH] = hash(h[BACKWARD_FINISH], found, FASTBN_PLANES * 2 * per_channel, arithmetic);
    for (b.training = 0; b.training < 2; b.training++) {
        b.next_too = !b.training;
        k->backward_apply[planar](&b);
        h[BACKWARD_APPLY] = hash(h[BACKWARD_APPLY], dx, count, f);
        if (with_residual) h[BACKWARD_APPLY] = hash(h[BACKWARD_APPLY], dresidual, count, f);
    }
    if (planar) {
        fastbn_block other = b;  // as the next group of channels: other data, fewer of them
        other.x.data = dy;
        other.dy.data = x;
        other.channels = channels > NEIGHBOUR ? channels - NEIGHBOUR : channels;
        other.next_too = rows > 2;
        k->backward_apply_beside_stats(&b, &other);
        h[BACKWARD_BESIDE] = hash(hash(h[BACKWARD_BESIDE], dx, count, f), sums, k->sums * per_channel, wide);
        if (masked) b.residual = operand(residual, &b, planar, b.x.channel);
        if (k->sums == 2) other.x_shift = no_shift;  // beside forward's map, sums have none
        k->apply_beside_stats(&b, &other);
        other.x_shift = x_shift;
        h[BESIDE] = hash(hash(h[BESIDE], y, count, f), sums, k->sums * per_channel, wide);
        for (int with_mask = masked; with_mask >= 0; with_mask--) {
            if (!with_mask) b.mask = (fastbn_operand){0};
            const int both_orders = !with_mask && FASTBN_LANES <= width && width <= FASTBN_MOST_NUMBERED;
            for (b.in_order = 0; b.in_order <= both_orders; b.in_order++) {
                memset(mask, 0, masks);
                k->apply_adjoining(&b);
                h[ADJOINING] = hash(hash(h[ADJOINING], y, count, f), mask, masks, (format){1, 7, 0});
                if (b.in_order && with_residual) continue;
                k->backward_apply_adjoining(&b);
                h[BACKWARD_ADJOINING] = hash(h[BACKWARD_ADJOINING], dx, count, f);
                if (with_residual) h[BACKWARD_ADJOINING] = hash(h[BACKWARD_ADJOINING], dresidual, count, f);
            }
            b.in_order = 0;
            memset(mask, 0, masks);
            if (width >= FASTBN_LANES) {
                k->apply_adjoining_beside_stats(&b, &other);
                h[ADJOINING_BESIDE] = hash(hash(h[ADJOINING_BESIDE], y, count, f), sums, k->sums * per_channel, wide);
                h[ADJOINING_BESIDE] = hash(h[ADJOINING_BESIDE], mask, masks, (format){1, 7, 0});
            }
        }
    }
    const fastbn_copy2d copy = {rows, width / 2, x, b.x.row, 2 * f.bytes, copied, width / 2 * f.bytes, f.bytes};
    k->copy2d(&copy);
    h[COPY] = hash(h[COPY], copied, (int64_t)rows * (width / 2), f);
}

int main(void)
{
    const int64_t bytes = MAX_VALUES * sizeof(double);
    char **const arrays[] = {&x, &residual, &dy, &y, &dx, &dresidual, &mask, &copied};
    for (size_t i = 0; i < sizeof arrays / sizeof arrays[0]; i++) *arrays[i] = room(bytes);
    sums = room(bytes);
    x_shift = room(bytes);
    no_shift = room(bytes);
    coefficients = room(bytes);
    statistics = room(bytes);
    found = room(bytes);
    gradients = room(bytes);
    for (int isa = 0; isa < fastbn_isa_count(); isa++) {
        if (!fastbn_isa_available(isa)) continue;
        for (int dtype = 0; dtype < fastbn_dtype_count(); dtype++) {
            const format f = format_of(fastbn_dtype_code(dtype));
            for (int planar = 0; planar < 2; planar++) {
                for (int activation = 0; activation < fastbn_activation_count(); activation++) {
                    uint64_t h[KERNELS];
                    const uint64_t saved = fastbn_enter();
                    for (int i = 0; i < KERNELS; i++) h[i] = 0xcbf29ce484222325u;
                    for (size_t i = 0; i < sizeof widths / sizeof widths[0]; i++) {
                        for (int variant = 0; variant < 4; variant++) {
                            const int rows = variant % 2 ? MAX_ROWS : 2, channels = i % 5 ? 3 : MAX_CHANNELS;
                            run(fastbn_get_isa(isa)->kernels[dtype], f, planar, widths[i], rows, channels, activation,
                                variant / 2, i % 4 == 3, h);
                        }
                    }
                    fastbn_leave(saved);
                    for (int i = 0; i < KERNELS; i++) {
                        if (i >= BESIDE && i <= ADJOINING_BESIDE && !planar) continue;
                        printf("%s %s %s %s %s %016llx\n", fastbn_get_isa(isa)->name, fastbn_dtype_code(dtype),
                               planar ? "planar" : "interleaved", kernel_names[i], fastbn_activation_name(activation),
                               (unsigned long long)h[i]);
                    }
                }
            }
        }
    }
    return 0;
}
