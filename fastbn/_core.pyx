# SPDX-License-Identifier: MIT
# cython: language_level=3, cdivision=True
"""The bridge to the compiled kernels: buffers in, GIL released, status out, tables listed. See _core.pyi.

Callers have checked every argument; nothing here does.
"""

cimport numpy as cnp
from cpython.exc cimport PyErr_CheckSignals
from cpython.ref cimport Py_INCREF
from cython.parallel cimport prange
from libc.stdint cimport int64_t, uint64_t

import numpy

cnp.import_array()


cdef extern from "fastbn.h" nogil:
    enum:
        FASTBN_LANES
        FASTBN_PLANAR_BLOCK
        FASTBN_INTERLEAVED_BLOCK
        FASTBN_FOLD_BELOW
        FASTBN_MOST_NUMBERED
        FASTBN_LONG_RUN_BYTES
        FASTBN_ALIGNMENT
        FASTBN_PLANES

    enum:
        FASTBN_MEAN
        FASTBN_MEAN_LO
        FASTBN_M2
        FASTBN_VAR
        FASTBN_RSTD
        FASTBN_RSTD_LO
        FASTBN_GAMMA
        FASTBN_BETA
        FASTBN_ROWS

    ctypedef struct fastbn_vector:
        const void *data
        int is_float

    ctypedef struct fastbn_channels:
        int64_t channels
        double count, eps
        int statistics_only
        double *statistics
        int keep
        fastbn_vector mean, var, gamma, beta
        double *dgamma
        double *dbeta
        const double *sums
        double *x_shift
        int64_t plane, positions
        double *dy_first
        char *redo
        void *coefficients
        int64_t coefficient_plane, across, columns

    ctypedef struct fastbn_operand:
        char *data
        int64_t row, channel

    ctypedef struct fastbn_block:
        int64_t rows, columns, channels
        fastbn_operand x, residual, dy, y, dx, dresidual, mask
        int mask_bit
        const void *coefficients
        const double *x_shift
        double *sums
        int64_t plane, coefficient_plane
        int activation
        double negative_slope
        int training, stream
        int ask_ahead, next_too, in_order, tiled, row_by_row, short_strips
        int64_t far, rows_ahead, then_row, short_row

    ctypedef struct fastbn_copy2d:
        int64_t rows, columns
        const char *source
        int64_t source_row, source_column
        char *destination
        int64_t destination_row, destination_column

    ctypedef void fastbn_pair(const fastbn_block *map, const fastbn_block *reduce) noexcept nogil
    ctypedef void fastbn_kernel(const fastbn_block *) noexcept nogil
    ctypedef void fastbn_finish(const fastbn_channels *, int64_t first, int64_t last) noexcept nogil

    ctypedef struct fastbn_kernels:
        int64_t itemsize, coefficient_size, sums
        int picks, picks_cheaply
        fastbn_kernel *stats[2]
        fastbn_kernel *apply[2]
        fastbn_kernel *backward_stats[2]
        fastbn_kernel *backward_apply[2]
        fastbn_kernel *apply_adjoining
        fastbn_kernel *backward_apply_adjoining
        fastbn_pair *apply_beside_stats
        fastbn_pair *backward_apply_beside_stats
        fastbn_pair *apply_adjoining_beside_stats
        fastbn_finish *finish_forward
        fastbn_finish *begin_backward
        fastbn_finish *finish_backward
        void (*copy2d)(const fastbn_copy2d *) noexcept nogil
        void (*first_values)(const fastbn_operand *x, int64_t channels, double *values) noexcept nogil
        void (*first_gradients)(const fastbn_block *, double *values) noexcept nogil

    ctypedef struct fastbn_isa:
        const char *name
        const fastbn_kernels *const *kernels
        void (*copy)(char *destination, const char *source, int64_t bytes, int stream) noexcept nogil
        void (*widen)(double *to, const float *from_, int64_t count) noexcept nogil
        void (*narrow)(float *to, const double *from_, int64_t count) noexcept nogil
        void (*update)(double *running, const double *batch, double divisor, double momentum,
                       int64_t count) noexcept nogil

    int fastbn_isa_count()
    ctypedef struct fastbn_sizes:
        const char *processor
        int64_t stream, stream_by_channel, stream_given, ask_ahead, most_beside, far, far_beside
        int next_too, tiled, in_order, row_by_row, short_strips

    int fastbn_sizes_count()
    const fastbn_sizes *fastbn_get_sizes(int index)
    int fastbn_sizes_here()
    const fastbn_isa *fastbn_get_isa(int index)
    int fastbn_isa_available(int index)
    int fastbn_dtype_count()
    const char *fastbn_dtype_code(int index)
    const char *fastbn_dtype_name(int index)
    int fastbn_activation_count()
    const char *fastbn_activation_name(int index)
    int fastbn_activation_of_v(int index)
    const int FASTBN_FORMULAS
    const char *fastbn_activation_formula(int index, int formula)
    int64_t fastbn_mask_stride(int64_t columns)
    uint64_t fastbn_enter()
    void fastbn_leave(uint64_t saved)


cdef extern from *:
    """
    #if defined(_OPENMP)
    #include <omp.h>
    #define FASTBN_OPENMP 1
    #else
    #define FASTBN_OPENMP 0
    static int omp_get_max_threads(void) { return 1; }
    static int omp_get_num_threads(void) { return 1; }
    static int omp_in_parallel(void) { return 0; }
    #endif

    #if defined(__clang__)
    #define FASTBN_COMPILER "clang " __clang_version__
    #else
    #define FASTBN_COMPILER "gcc " __VERSION__
    #endif

    #if defined(FASTBN_DEBUG)
    #define FASTBN_IS_DEBUG 1
    #else
    #define FASTBN_IS_DEBUG 0
    #endif

    /* GNU's OpenMP hangs in a child that forks from a process whose threads it has started, unless its pool is released
     * before the fork (LLVM's handles forks itself). The pool comes back with the next parallel region. */
    #if defined(_OPENMP) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 9
    #include <pthread.h>
    static void fastbn_before_fork(void) { if (!omp_in_parallel()) omp_pause_resource_all(omp_pause_soft); }
    static void fastbn_register_fork(void) { pthread_atfork(fastbn_before_fork, NULL, NULL); }
    #else
    static void fastbn_register_fork(void) { }
    #endif
    """
    const int FASTBN_OPENMP
    const int FASTBN_IS_DEBUG
    const char *FASTBN_COMPILER
    int omp_get_max_threads() nogil
    int omp_get_num_threads() nogil
    int omp_in_parallel() nogil
    void fastbn_register_fork()


fastbn_register_fork()

# rows of `statistics`
cpdef enum:
    STATISTICS_MEAN = FASTBN_MEAN
    STATISTICS_MEAN_LO = FASTBN_MEAN_LO
    STATISTICS_M2 = FASTBN_M2
    STATISTICS_VAR = FASTBN_VAR
    STATISTICS_RSTD = FASTBN_RSTD
    STATISTICS_RSTD_LO = FASTBN_RSTD_LO
    STATISTICS_GAMMA = FASTBN_GAMMA
    STATISTICS_BETA = FASTBN_BETA
    STATISTICS_ROWS = FASTBN_ROWS

OPENMP = bool(FASTBN_OPENMP)
DEBUG = bool(FASTBN_IS_DEBUG)
COMPILER = FASTBN_COMPILER.decode()
# Asked once: CPUID leaves a virtual machine for its host, which takes microseconds.
cdef int processor_here = fastbn_sizes_here()
cdef const fastbn_sizes *measured = fastbn_get_sizes(processor_here)

MEASURED_STREAM_BYTES = measured.stream

cdef int64_t least_streamed = measured.stream
cdef cnp.dtype FLOAT64 = cnp.PyArray_DescrFromType(cnp.NPY_DOUBLE)

include "_job.pxi"
include "_blocks.pxi"
include "_finish.pxi"
include "_schedule.pxi"
include "_vectors.pxi"
include "_memory.pxi"
include "_arguments.pxi"


def isas():
    return tuple([(fastbn_get_isa(i).name.decode(), bool(fastbn_isa_available(i))) for i in range(fastbn_isa_count())])


def processors():
    return tuple([(fastbn_get_sizes(i).processor.decode(), i == processor_here) for i in range(fastbn_sizes_count())])


def set_processor(int index):
    global measured
    measured = fastbn_get_sizes(index)


def dtypes():
    return tuple([(fastbn_dtype_code(i).decode(), fastbn_dtype_name(i).decode()) for i in range(fastbn_dtype_count())])


def activations():
    return tuple([(fastbn_activation_name(i).decode(), bool(fastbn_activation_of_v(i)))
                  for i in range(fastbn_activation_count())])


cdef int IDENTITY = [name for name, _of_v in activations()].index("identity")


def activation_formulas():
    return tuple([tuple([fastbn_activation_formula(i, k).decode() for k in range(FASTBN_FORMULAS)])
                  for i in range(fastbn_activation_count())])


def openmp_limit():
    return 0 if omp_in_parallel() else omp_get_max_threads()


def stream_bytes():
    return least_streamed


def set_stream_bytes(int64_t nbytes):
    global least_streamed
    least_streamed = nbytes


def mask_nbytes(bint planar, tuple shape, int64_t itemsize):
    cdef int64_t outer = shape[0], channels = shape[1], inner = shape[2], positions = positions_of(planar, outer, inner)
    cdef int64_t across = channels * positions, fold
    if planar and positions == 1:  # kernels read four bytes at once
        return outer * fastbn_mask_stride(channels * mask_plane(outer, inner, itemsize)) + 4
    fold = fold_of(False, across)
    return ceil_div(outer, fold) * fastbn_mask_stride(fold * across)


cdef Array operand(tuple pair):
    cdef Array array
    cdef tuple strides
    array.data = NULL
    array.outer = array.channel = array.inner = 0
    if pair is not None:
        strides = pair[1]
        array.data = <char *>cnp.PyArray_DATA(<cnp.ndarray>pair[0])
        array.outer, array.channel, array.inner = strides[0], strides[1], strides[2]
    return array


cdef Job new_job(int isa, int dtype, int threads, bint planar, tuple shape, tuple x):
    cdef Job job
    memset(&job, 0, sizeof(job))
    job.kernels = fastbn_get_isa(isa).kernels[dtype]
    job.threads = threads
    job.outer, job.channels, job.inner = shape[0], shape[1], shape[2]
    job.positions = positions_of(planar, job.outer, job.inner)
    job.planar = planar and job.positions == 1
    job.x = operand(x)
    job.stream_bytes = least_streamed
    return job


cdef void carry_out(Job *job) except *:
    cdef bint done
    if job.outer * job.channels * job.inner == 0:
        return
    with nogil:
        done = run(job)
    if not done:
        raise MemoryError("fastbn: no memory for the scratch of a call")


# ----------------------------------------------------------------------------------------------------
# calls

def statistics(int isa, int dtype, int threads, bint planar, tuple shape, tuple x, cnp.ndarray statistics):
    cdef Job job = new_job(isa, dtype, threads, planar, shape, x)
    job.known.statistics = <double *>cnp.PyArray_DATA(statistics)
    job.known.statistics_only = True
    job.finish = job.kernels.finish_forward
    job.reduce = job.kernels.stats[job.planar]
    carry_out(&job)


def forward(int isa, int dtype, int threads, bint planar, tuple shape, tuple x, tuple residual, tuple y, mask,
            tuple activation, gamma, beta, running_mean, running_var, double eps, bint training,
            momentum, bint unbiased, counter, bint finite_only, bint finite_first, bint keep):
    cdef Job job = new_job(isa, dtype, threads, planar, shape, x)
    cdef cnp.npy_intp *extents = [STATISTICS_ROWS, job.channels]
    cdef cnp.ndarray statistics = cnp.PyArray_EMPTY(2, extents, cnp.NPY_DOUBLE, 0), new_mean, new_var
    cdef double *rows = <double *>cnp.PyArray_DATA(statistics)
    cdef const double *batch_mean = rows + STATISTICS_MEAN * job.channels
    cdef const double *batch_var = rows + (STATISTICS_M2 if unbiased else STATISTICS_VAR) * job.channels
    cdef int64_t count = job.outer * job.inner
    cdef double divisor = count - 1 if unbiased else 1
    cdef const fastbn_isa *table = fastbn_get_isa(isa)
    cdef uint64_t saved = fastbn_enter()
    try:
        job.residual = operand(residual)
        job.y = operand(y)
        job.mask = NULL if mask is None else <char *>cnp.PyArray_DATA(mask)
        job.activation, job.negative_slope = activation
        if count == 0:
            memset(rows, 0, STATISTICS_ROWS * job.channels * sizeof(double))
        give(table, &job.known.gamma, gamma, rows + STATISTICS_GAMMA * job.channels, keep, training)
        give(table, &job.known.beta, beta, rows + STATISTICS_BETA * job.channels, keep, training)
        job.known.keep = keep
        job.known.eps = eps
        job.known.statistics = rows
        job.training = training
        job.finite_first = finite_first
        job.finish = job.kernels.finish_forward
        job.map = job.kernels.apply[job.planar]
        job.map_beside_reduce = job.kernels.apply_beside_stats
        job.map_adjoining = job.kernels.apply_adjoining
        job.map_adjoining_beside_reduce = job.kernels.apply_adjoining_beside_stats
        if training:
            job.reduce = job.kernels.stats[job.planar]
        else:
            give(table, &job.known.mean, running_mean, rows + STATISTICS_MEAN * job.channels, keep, training)
            give(table, &job.known.var, running_var, rows + STATISTICS_VAR * job.channels, keep, training)
        carry_out(&job)
        if training and running_mean is not None and count > 0 and not (finite_only and not all_finite(&job)):
            new_mean = prepared_update(table, running_mean, batch_mean, 1, momentum)
            new_var = prepared_update(table, running_var, batch_var, divisor, momentum)
            # All that can fail or be interrupted comes before the first of them is written.
            PyErr_CheckSignals()
            if counter is not None:
                counter += 1
            update(table, running_mean, new_mean, batch_mean, 1, momentum)
            update(table, running_var, new_var, batch_var, divisor, momentum)
    finally:
        fastbn_leave(saved)
    return statistics


def backward(int isa, int dtype, int threads, bint planar, tuple shape, tuple x, tuple residual, tuple dy, tuple dx,
             tuple dresidual, mask, tuple activation, cnp.ndarray statistics, bint training,
             gamma_dtype, beta_dtype):
    cdef Job job = new_job(isa, dtype, threads, planar, shape, x)
    cdef double *rows = <double *>cnp.PyArray_DATA(statistics)
    cdef cnp.ndarray dgamma = new_vector(job.channels, FLOAT64), dbeta = new_vector(job.channels, FLOAT64)
    cdef const fastbn_isa *table = fastbn_get_isa(isa)
    cdef uint64_t saved = fastbn_enter()
    try:
        job.residual = operand(residual)
        job.dy = operand(dy)
        job.dx = operand(dx)
        job.dresidual = operand(dresidual)
        job.mask = NULL if mask is None else <char *>cnp.PyArray_DATA(mask)
        job.activation, job.negative_slope = activation
        job.known.gamma.data = NULL if gamma_dtype is None else rows + STATISTICS_GAMMA * job.channels
        job.known.beta.data = NULL if beta_dtype is None else rows + STATISTICS_BETA * job.channels
        job.known.statistics = rows
        job.training = training
        job.known.dgamma = <double *>cnp.PyArray_DATA(dgamma)
        job.known.dbeta = <double *>cnp.PyArray_DATA(dbeta)
        job.finish = job.kernels.finish_backward
        if job.outer * job.inner > 0 and (training or job.known.gamma.data != NULL or job.known.beta.data != NULL):
            job.reduce = job.kernels.backward_stats[job.planar]
        else:
            memset(job.known.dgamma, 0, job.channels * sizeof(double))
            memset(job.known.dbeta, 0, job.channels * sizeof(double))
        job.map = job.kernels.backward_apply[job.planar]
        job.map_beside_reduce = job.kernels.backward_apply_beside_stats
        job.map_adjoining = job.kernels.backward_apply_adjoining
        carry_out(&job)
        return rounded(table, dgamma, gamma_dtype), rounded(table, dbeta, beta_dtype)
    finally:
        fastbn_leave(saved)


def copy(int isa, int threads, destination, source, bint stream):
    cdef const fastbn_isa *table = fastbn_get_isa(isa)
    cdef char *to = <char *>cnp.PyArray_DATA(destination)
    cdef char *from_ = <char *>cnp.PyArray_DATA(source)
    # parts end at multiples of the alignment
    cdef int64_t part, first, last, bytes = cnp.PyArray_SIZE(source), lines = bytes // FASTBN_ALIGNMENT
    with nogil:
        for part in prange(threads, num_threads=threads, schedule="static"):
            first = part * lines // threads * FASTBN_ALIGNMENT
            last = bytes if part == threads - 1 else (part + 1) * lines // threads * FASTBN_ALIGNMENT
            table.copy(to + first, from_ + first, last - first, stream)
