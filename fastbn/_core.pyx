# SPDX-License-Identifier: MIT
# cython: language_level=3, cdivision=True
"""The bridge to the compiled kernels: buffers in, GIL released, status out, tables listed. See _core.pyi.

Callers have checked every argument; nothing here does.
"""

cimport numpy as cnp
from libc.stdint cimport int64_t, uint64_t

cnp.import_array()


cdef extern from "fastbn.h" nogil:
    enum:
        FASTBN_LANES
        FASTBN_PLANAR_BLOCK
        FASTBN_INTERLEAVED_BLOCK
        FASTBN_ALIGNMENT
        FASTBN_MEAN_HI
        FASTBN_MEAN_LO
        FASTBN_SCALE
        FASTBN_BETA
        FASTBN_GRADIENT_HI
        FASTBN_GRADIENT_LO
        FASTBN_SLOPE
        FASTBN_PLANES

    ctypedef struct fastbn_operand:
        char *data
        int64_t row, channel

    ctypedef struct fastbn_block:
        int64_t rows, columns, channels
        fastbn_operand x, residual, dy, y, dx, dresidual, mask
        const void *coefficients
        const double *x_shift
        const double *dy_shift
        double *sums
        int64_t plane
        int activation, training, stream

    ctypedef struct fastbn_copy2d:
        int64_t rows, columns
        const char *source
        int64_t source_row, source_column
        char *destination
        int64_t destination_row, destination_column

    ctypedef void fastbn_kernel(const fastbn_block *) noexcept nogil

    ctypedef struct fastbn_kernels:
        int64_t itemsize, coefficient_size
        double shift_limit
        fastbn_kernel *stats[2]
        fastbn_kernel *apply[2]
        fastbn_kernel *backward_stats[2]
        fastbn_kernel *backward_apply[2]
        void (*round_coefficients)(const double *values, void *coefficients, int64_t plane) noexcept nogil
        void (*copy2d)(const fastbn_copy2d *) noexcept nogil

    ctypedef struct fastbn_isa:
        const char *name
        const fastbn_kernels *const *kernels
        void (*copy)(char *destination, const char *source, int64_t bytes, int stream) noexcept nogil

    int fastbn_isa_count()
    const fastbn_isa *fastbn_get_isa(int index)
    int fastbn_isa_available(int index)
    int fastbn_dtype_count()
    const char *fastbn_dtype_code(int index)
    const char *fastbn_dtype_name(int index)
    int fastbn_activation_count()
    const char *fastbn_activation_name(int index)
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
    int omp_in_parallel() nogil
    void fastbn_register_fork()


fastbn_register_fork()

# rows of `statistics`
cpdef enum:
    STATISTICS_MEAN
    STATISTICS_MEAN_LO
    STATISTICS_M2
    STATISTICS_VAR
    STATISTICS_RSTD

OPENMP = bool(FASTBN_OPENMP)
DEBUG = bool(FASTBN_IS_DEBUG)
COMPILER = FASTBN_COMPILER.decode()

include "_schedule.pxi"


def isas():
    return tuple([(fastbn_get_isa(i).name.decode(), bool(fastbn_isa_available(i))) for i in range(fastbn_isa_count())])


def dtypes():
    return tuple([(fastbn_dtype_code(i).decode(), fastbn_dtype_name(i).decode()) for i in range(fastbn_dtype_count())])


def activations():
    return tuple([fastbn_activation_name(i).decode() for i in range(fastbn_activation_count())])


def openmp_max_threads():
    return omp_get_max_threads()


def openmp_in_parallel():
    return bool(omp_in_parallel())


def mask_nbytes(bint planar, tuple shape):
    cdef int64_t outer = shape[0], channels = shape[1], inner = shape[2], fold = fold_of(planar, channels)
    if planar:
        return outer * channels * fastbn_mask_stride(inner)
    return ceil_div(outer, fold) * fastbn_mask_stride(fold * channels)


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


cdef double *doubles(array):
    return NULL if array is None else <double *>cnp.PyArray_DATA(<cnp.ndarray>array)


cdef Job new_job(int isa, int dtype, int threads, bint planar, tuple shape, tuple x):
    cdef Job job
    memset(&job, 0, sizeof(job))
    job.kernels = fastbn_get_isa(isa).kernels[dtype]
    job.threads = threads
    job.planar = planar
    job.outer, job.channels, job.inner = shape[0], shape[1], shape[2]
    job.x = operand(x)
    return job


cdef void carry_out(Job *job) except *:
    cdef bint done
    with nogil:
        done = run(job)
    if not done:
        raise MemoryError("fastbn: no memory for the scratch of a call")


def statistics(int isa, int dtype, int threads, bint planar, tuple shape, tuple x, statistics):
    cdef Job job = new_job(isa, dtype, threads, planar, shape, x)
    job.statistics = doubles(statistics)
    job.statistics_only = True
    job.finish = finish_forward
    job.reduce = job.kernels.stats[planar]
    carry_out(&job)


def forward(int isa, int dtype, int threads, bint planar, tuple shape, tuple x, tuple residual, tuple y, mask,
            int activation, gamma, beta, double eps, statistics, bint training):
    cdef Job job = new_job(isa, dtype, threads, planar, shape, x)
    job.residual = operand(residual)
    job.y = operand(y)
    job.mask = <char *>doubles(mask)
    job.activation = activation
    job.gamma = doubles(gamma)
    job.beta = doubles(beta)
    job.eps = eps
    job.statistics = doubles(statistics)
    job.training = training
    job.finish = finish_forward
    job.reduce = job.kernels.stats[planar] if training else NULL
    job.map = job.kernels.apply[planar]
    carry_out(&job)


def backward(int isa, int dtype, int threads, bint planar, tuple shape, tuple x, tuple dy, tuple dx, tuple dresidual,
             mask, int activation, gamma, beta, statistics, bint training, dgamma, dbeta):
    cdef Job job = new_job(isa, dtype, threads, planar, shape, x)
    job.dy = operand(dy)
    job.dx = operand(dx)
    job.dresidual = operand(dresidual)
    job.mask = <char *>doubles(mask)
    job.activation = activation
    job.gamma = doubles(gamma)
    job.beta = doubles(beta)
    job.statistics = doubles(statistics)
    job.training = training
    job.dgamma = doubles(dgamma)
    job.dbeta = doubles(dbeta)
    job.finish = finish_backward
    job.reduce = job.kernels.backward_stats[planar]
    job.map = job.kernels.backward_apply[planar]
    carry_out(&job)


cdef class DefaultMode:
    """Context manager: the default floating-point mode in this thread, for NumPy's conversions around a call."""
    cdef uint64_t saved

    def __enter__(self):
        self.saved = fastbn_enter()

    def __exit__(self, *exception):
        fastbn_leave(self.saved)


def update_running(running, batch, double momentum):
    cdef double *r = doubles(running)
    cdef double *b = doubles(batch)
    cdef int64_t i, channels = cnp.PyArray_SIZE(running)
    for i in range(channels):
        r[i] = (1 - momentum) * r[i] + momentum * b[i]


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
