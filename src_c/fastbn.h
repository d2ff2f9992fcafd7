/* SPDX-License-Identifier: MIT */
/* The contract between the kernels (src_c) and their schedule (fastbn/_schedule.pxi).
 *
 * A kernel is what one core does to one block of memory. It allocates nothing, knows nothing of threads and checks
 * nothing but by assert. A block is a matrix:
 *
 *   planar       for each of some channels, rows that are runs of adjacent values of that channel
 *   interleaved  one matrix for many channels: a column belongs to one channel
 *
 * The values of a row are adjacent in memory; rows, and channels, are any number of bytes apart. */
#ifndef FASTBN_H
#define FASTBN_H

#include <stdint.h>

/* What cuts a partial sum is fixed here, and which short planes are rows of an interleaved block in positions_of of
 * _job.pxi; nowhere else: changing one of these changes the bits of results. A sum in one variable takes block / lanes
 * additions, or one for each of a block's rows that are shorter than the lanes. */
enum {
    FASTBN_LANES = 16,              /* planar: column j of a row adds to lane j % 16 */
    FASTBN_PLANAR_BLOCK = 16384,    /* planar: at most this many values before the lanes are closed */
    FASTBN_INTERLEAVED_BLOCK = 512, /* interleaved: rows before the sums of a column are closed */
    FASTBN_FOLD_BELOW = 64,         /* interleaved: rows of fewer columns are folded to whole vectors of lanes */
};

/* Alignment of our own buffers: a cache line, and the widest register. */
enum { FASTBN_ALIGNMENT = 64 };

/* Vectors whose lanes a map of adjoining planes in the order of memory has numbers for: they fit an L1 cache. */
enum { FASTBN_MOST_NUMBERED = 512 };

/* A map takes shorter runs as one if they adjoin, and several shorter rows together if the caches hold them. */
enum { FASTBN_LONG_RUN_BYTES = 2 << 10 };

/* Channels that finish takes at once. */
enum { FASTBN_AT_ONCE = 64 };

/* What forward and backward know of some channels. */
typedef struct fastbn_coefficients {
    double center[FASTBN_AT_ONCE], off_center[FASTBN_AT_ONCE]; /* subtracted from x before all else; mean - center */
    double scale[FASTBN_AT_ONCE];                              /* gamma * rstd */
    double beta[FASTBN_AT_ONCE];
    double level[FASTBN_AT_ONCE], off_level[FASTBN_AT_ONCE]; /* subtracted from g before all else; mean of g - level */
    double slope[FASTBN_AT_ONCE];                            /* rstd^2 * mean(g * (x - mean)) */
} fastbn_coefficients;

/* The same as kernels use it: planes in the dtype of the arithmetic, of which the first three serve forward. What is
 * not subtracted from x or g before, and what the rounding of center and level has lost, comes with what is added. */
enum {
    FASTBN_CENTER,
    FASTBN_SCALE,
    FASTBN_OFFSET, /* beta - off_center * scale */
    FASTBN_LEVEL,
    FASTBN_SLOPE, /* -slope */
    FASTBN_REST,  /* (off_center * slope - off_level) * scale */
    FASTBN_PLANES
};

/* One array of a block. data is NULL where an optional array is absent. */
typedef struct fastbn_operand {
    char *data;
    int64_t row, channel; /* bytes from a row to the next; planar: and from a channel to the next */
} fastbn_operand;

/* Arguments of every kernel; each uses the fields that its description names. In place (y is x, y is residual, dx is
 * dy) is legal: a kernel loads before it stores. */
typedef struct fastbn_block {
    int64_t rows, columns, channels; /* channels: planar only */
    fastbn_operand x, residual, dy;  /* read; residual in backward: if v is asked for and has one */
    fastbn_operand y, dx, dresidual; /* written */
    /* A bit a value, set where the activation is open. A row begins with some bit of its first byte, an interleaved one
     * with bit 0. Planar channels are so many bits apart, not bytes; if that is no multiple of 16, planes may have
     * bytes in common, of which each keeps the others' bits. */
    fastbn_operand mask;
    int mask_bit;
    /* One value for each channel (planar) or column (interleaved); planes of sums are `plane` elements apart. */
    const void *coefficients; /* FASTBN_PLANES planes, coefficient_plane elements apart */
    const double *x_shift;    /* subtracted before summing */
    double *sums;             /* planes of sums: written (planar) or added to (interleaved) */
    int64_t plane, coefficient_plane;
    int activation; /* row of activations.def */
    double negative_slope;
    int training;  /* backward_apply: whether mean and variance depend on x */
    int stream;    /* apply and backward_apply: store past the caches */
    int ask_ahead; /* apply, and sums but for those beside a map's rows: x (dy) comes from afar, ask (further) ahead */
    /* planar: backward_apply, and sums beside an apply, ask for the same rows of as many channels that follow */
    int next_too;
    int in_order;     /* adjoining planes, no mask: row by row, with coefficients picked for each vector, not spread */
    int tiled;        /* apply, interleaved, past the caches: tiles of columns go down some rows before the next, also
                       * of rows that are longer than a tile */
    int row_by_row;   /* apply, interleaved: else some rows together, which share the loads of coefficients */
    int short_strips; /* sums of two interleaved arrays whose rows are whole pages apart: strips of half as many rows */
    int64_t far;      /* bytes that apply and forward's planar sums ask ahead */
    /* Planar sums ask for what is read next: so many rows from the first of this block on, then those of the next
     * channels, from then_row on, counted from the same row. If all channels of a row are no more bytes than short_row,
     * the same place in the rows that are next. */
    int64_t rows_ahead, then_row, short_row;
} fastbn_block;

/* Rows of what is known of all channels. */
enum {
    FASTBN_MEAN,    /* rounded */
    FASTBN_MEAN_LO, /* what that has lost */
    FASTBN_M2,      /* the sum of (x - mean)^2 */
    FASTBN_VAR,
    FASTBN_RSTD, /* rounded */
    FASTBN_RSTD_LO,
    FASTBN_GAMMA,
    FASTBN_BETA,
    FASTBN_ROWS
};

/* A value for each channel, adjacent in memory. data is NULL where an optional vector is absent. */
typedef struct fastbn_vector {
    const void *data;
    int is_float; /* or double */
} fastbn_vector;

/* What finish knows of the channels of a call, and finds: one value for each where nothing else is said. */
typedef struct fastbn_channels {
    int64_t channels;
    double count; /* values of a channel */
    double eps;
    int statistics_only;
    double *statistics; /* FASTBN_ROWS rows: the mean and the variance of a batch, and if `keep`, what backward needs */
    int keep;
    fastbn_vector mean, var;   /* if the statistics are given */
    fastbn_vector gamma, beta; /* absent: 1, 0 */
    double *dgamma, *dbeta;
    /* Planes of sums, `plane` apart, and shifts: of each channel its first of so many columns, which are positions in a
     * plane. No sums: the statistics are given, or no gradients are asked for. */
    const double *sums;
    double *x_shift;
    int64_t plane, positions;
    double *dy_first; /* the first g */
    char *redo;       /* written: whether sums must be made again, with the mean as shift; NULL if they have been */
    /* Planes of coefficients, a value for each column. `columns` of them are written, though a row of the array has
     * only `across`, and then begins anew. */
    void *coefficients;
    int64_t coefficient_plane, across, columns;
} fastbn_channels;

/* A strided copy of a matrix. Strides in bytes. */
typedef struct fastbn_copy2d {
    int64_t rows, columns;
    const char *source;
    int64_t source_row, source_column;
    char *destination;
    int64_t destination_row, destination_column;
} fastbn_copy2d;

typedef void fastbn_kernel(const fastbn_block *);
typedef void fastbn_pair(const fastbn_block *map, const fastbn_block *reduce);
typedef void fastbn_finish(const fastbn_channels *, int64_t first, int64_t last);

/* What an ISA offers for a dtype. */
typedef struct fastbn_kernels {
    int64_t itemsize;         /* bytes of a value of x */
    int64_t coefficient_size; /* bytes of a coefficient */
    /* Planes of sums: the two, and of float64 values what the additions to them have lost: they have no bits to spare
     * for roundings. */
    int64_t sums;
    int picks;         /* whether coefficients are picked for a vector by one instruction: fastbn_block.in_order */
    int picks_cheaply; /* and in fewer than it takes to spread them, in the caches */
    fastbn_kernel *stats[2];          /* sums of d and d^2, d = x - x_shift;  [0] interleaved, [1] planar */
    fastbn_kernel *apply[2];          /* y (and mask) from x, residual, coefficients */
    fastbn_kernel *backward_stats[2]; /* sums of g and g*d, d = x - x_shift */
    fastbn_kernel *backward_apply[2]; /* dx (and dresidual) from x, dy, coefficients, mask */
    /* Planar, where the runs of neighbouring channels adjoin. */
    fastbn_kernel *apply_adjoining, *backward_apply_adjoining;
    /* Planar, both for the same rows and columns: the first kernel's work on one block, the second's on another, of no
     * more channels. */
    fastbn_pair *apply_beside_stats, *backward_apply_beside_stats;
    /* Likewise where the runs adjoin: at least 16 columns, so that a part of a row has its share of at most 32 channels
     * to sum. */
    fastbn_pair *apply_adjoining_beside_stats;
    /* Of a range of channels. Before backward's sums: what is subtracted from x, and unless they are NULL, the
     * coefficients of forward. */
    fastbn_finish *finish_forward, *begin_backward, *finish_backward;
    /* For tests: round the coefficients of some channels into their planes, all or those of forward. */
    void (*round_coefficients)(const fastbn_coefficients *exact, int channels, int backward, void *coefficients,
                               int64_t plane);
    void (*copy2d)(const fastbn_copy2d *);
    /* The first value of each of so many channels. */
    void (*first_values)(const fastbn_operand *x, int64_t channels, double *values);
    /* The gradient before the activation (g) at the first value of each channel of a planar block. */
    void (*first_gradients)(const fastbn_block *, double *values);
} fastbn_kernels;

typedef struct fastbn_isa {
    const char *name;
    const fastbn_kernels *const *kernels; /* one a row of dtypes.def */
    /* memcpy, with streaming stores if asked. */
    void (*copy)(char *destination, const char *source, int64_t bytes, int stream);
    /* Vectors of parameters and statistics: converted, and running = (1 - momentum) * running + momentum * batch /
     * divisor. */
    void (*widen)(double *to, const float *from, int64_t count);
    void (*narrow)(float *to, const double *from, int64_t count);
    void (*update)(double *running, const double *batch, double divisor, double momentum, int64_t count);
} fastbn_isa;

/* dispatch.c: the tables. Rows of isa.def that do not belong to this architecture are not counted. */
int fastbn_isa_count(void);
const fastbn_isa *fastbn_get_isa(int index);
int fastbn_isa_available(int index); /* on this CPU and operating system */

/* What pays on a kind of processor, as measured on one: sizes are bytes of all arrays of a call together, from which
 * on. */
typedef struct fastbn_sizes {
    const char *processor;
    int64_t stream;            /* stores past the caches, with somebody who reads y next */
    int64_t stream_by_channel; /* the same where channels are taken one after the other, in short pieces of memory */
    int64_t stream_given;      /* the same where the statistics are given */
    int64_t ask_ahead;         /* fastbn_block.ask_ahead of planar sums; and row_by_row of shorter rows */
    int64_t most_beside;     /* x and dy of a group of channels, at most, for backward's map to have turns with sums */
    int64_t far, far_beside; /* fastbn_block.far and short_row; far of forward's sums beside a map */
    int next_too;            /* whether fastbn_block.next_too does, where stores go past the caches */
    int tiled;               /* whether fastbn_block.tiled does */
    int in_order;            /* whether fastbn_block.in_order does in training, in the caches */
    int row_by_row;          /* whether fastbn_block.row_by_row does where rows are long, or far away */
    int short_strips;        /* whether fastbn_block.short_strips does, and ask_ahead of interleaved sums from afar */
} fastbn_sizes;
int fastbn_sizes_count(void);
const fastbn_sizes *fastbn_get_sizes(int index);
int fastbn_sizes_here(void); /* those of this processor */

int fastbn_dtype_count(void);
const char *fastbn_dtype_code(int index);
const char *fastbn_dtype_name(int index);
int fastbn_activation_count(void);
const char *fastbn_activation_name(int index);
int fastbn_activation_of_v(int index); /* whether its gradient is a function of v, not only of where it is open */
/* Its formulas as text, in the order of activations.def: y, open, and the gradients where open and where shut. */
enum { FASTBN_FORMULAS = 4 };
const char *fastbn_activation_formula(int index, int formula);

/* Bytes of a row of the mask: whole groups of 16 bits. */
static inline int64_t fastbn_mask_stride(int64_t columns)
{
    return (columns + FASTBN_LANES - 1) / FASTBN_LANES * (FASTBN_LANES / 8);
}

/* Around kernels. Enter sets the floating-point control register to the default (round to nearest, denormals kept, no
 * traps) and returns what it was: another library may have set flush-to-zero in this thread. Leave restores that, and
 * finishes the stores past the caches. */
uint64_t fastbn_enter(void);
void fastbn_leave(uint64_t saved);

#endif
