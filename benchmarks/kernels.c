// SPDX-License-Identifier: MIT
// Prints what the float32 kernels of each ISA of this machine need for 16 values in the caches of one core: the best of
// many repetitions, in nanoseconds. Not a number: no such kernel. Compiled and run by kernels.py.
#include "fastbn.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { TRIES = 400, LEAST_VALUES = 40000, F32 = 4 };

// planar: rows of `columns` values for each channel; interleaved: a channel a column
typedef struct shape {
    int planar, rows, columns, channels;
} shape;

static const shape shapes[] = {{1, 1, 3136, 1}, {1, 4, 784, 1},  {1, 20, 196, 8}, {1, 32, 49, 32},
                               {0, 64, 64, 1},  {0, 32, 256, 1}, {0, 8, 1024, 1}};

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

static void *room(size_t bytes)
{
    void *p = aligned_alloc(FASTBN_ALIGNMENT, (bytes + FASTBN_ALIGNMENT - 1) / FASTBN_ALIGNMENT * FASTBN_ALIGNMENT);
    if (!p) exit(1);
    return memset(p, 0, bytes);
}

static fastbn_operand operand(shape s, int random)
{
    const int64_t channel = s.planar ? s.columns * F32 : 0, row = s.planar ? s.channels * channel : s.columns * F32;
    float *const p = room(s.rows * row);
    for (int64_t i = 0; random && i < s.rows * row / F32; i++) p[i] = (float)rand() / (float)RAND_MAX - 0.5f;
    return (fastbn_operand){(char *)p, row, channel};
}

static fastbn_block block(shape s, int activation)
{
    const int64_t plane = s.planar ? s.channels : s.columns;
    fastbn_block b = {.rows = s.rows,
                      .columns = s.columns,
                      .channels = s.channels,
                      .plane = plane,
                      .coefficient_plane = plane,
                      .training = 1};
    b.rows_ahead = s.rows;
    b.far = b.short_row = fastbn_get_sizes(fastbn_sizes_here())->far;
    b.activation = activation;
    b.x = operand(s, 1);
    b.dy = operand(s, 1);
    b.y = operand(s, 0);
    b.dx = operand(s, 0);
    float *const coefficients = room(FASTBN_PLANES * plane * sizeof *coefficients);
    for (int64_t i = 0; i < FASTBN_PLANES * plane; i++) coefficients[i] = (float)(i / plane == FASTBN_SCALE);
    b.coefficients = coefficients;
    b.x_shift = room(plane * sizeof(double));
    b.sums = room(4 * plane * sizeof(double));
    return b;
}

static double measured(shape s, fastbn_kernel *kernel, fastbn_pair *pair, const fastbn_block *b,
                       const fastbn_block *next)
{
    const double values = (double)s.rows * s.columns * s.channels;
    const int calls = 1 + (int)(LEAST_VALUES / values);
    double best = INFINITY;
    for (int i = 0; i < TRIES; i++) {
        const double start = now();
        for (int call = 0; call < calls; call++) {
            if (pair) {
                pair(b, next);
            } else {
                kernel(b);
            }
        }
        const double time = now() - start;
        if (time < best) best = time;
    }
    return best / calls / values * FASTBN_LANES;
}

int main(void)
{
    int f32 = 0;
    while (strcmp(fastbn_dtype_code(f32), "f32") != 0) f32++;
    printf("isa activation shape | stats apply beside adjoining | backward_stats backward_apply beside adjoining\n");
    for (int isa = 0; isa < fastbn_isa_count(); isa++) {
        if (!fastbn_isa_available(isa)) continue;
        const fastbn_kernels *const k = fastbn_get_isa(isa)->kernels[f32];
        for (int activation = 0; activation < 2; activation++) {
            for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
                const shape s = shapes[i];
                const int is_long = s.columns * F32 >= FASTBN_LONG_RUN_BYTES;
                fastbn_block b = block(s, activation);
                const fastbn_block next = block(s, activation);
                const fastbn_sizes *const sizes = fastbn_get_sizes(fastbn_sizes_here());
                b.in_order = sizes->in_order && k->picks_cheaply;
                b.row_by_row = sizes->row_by_row && is_long;
                b.short_strips = sizes->short_strips;
                const int adjoins = s.planar && !is_long;
                fastbn_kernel *const alone[] = {k->stats[s.planar], k->apply[s.planar], k->backward_stats[s.planar],
                                                k->backward_apply[s.planar]};
                fastbn_kernel *const adjoining[] = {k->apply_adjoining, k->backward_apply_adjoining};
                fastbn_pair *const beside[] = {k->apply_beside_stats, k->backward_apply_beside_stats};
                printf("%s %s %s %dx%dx%d", fastbn_get_isa(isa)->name, fastbn_activation_name(activation),
                       s.planar ? "planar" : "interleaved", s.rows, s.columns, s.channels);
                for (int backward = 0; backward < 2; backward++) {
                    printf(" | %.2f", measured(s, alone[2 * backward], NULL, &b, NULL));
                    printf(" %.2f", measured(s, alone[2 * backward + 1], NULL, &b, NULL));
                    printf(" %.2f", s.planar ? measured(s, NULL, beside[backward], &b, &next) : NAN);
                    printf(" %.2f", adjoins ? measured(s, adjoining[backward], NULL, &b, NULL) : NAN);
                }
                printf("\n");
            }
        }
    }
    return 0;
}
