# SPDX-License-Identifier: MIT
# Finish: from the sums of the blocks of a channel to its moments, gradients and coefficients, in float64.

from libc.math cimport fabs, sqrt


cdef inline double finite(double value) noexcept nogil:
    """0 for what is not: a shift, or what a rounding has lost, would turn an infinite sum into NaN."""
    return value if value - value == 0 else 0


# ----------------------------------------------------------------------------------------------------
# Unevaluated sums of two float64 numbers, the second below half an ulp of the first. Sums of float64 values are made in
# nothing wider: what a rounding loses is kept, if `exact`. Those of others have digits to spare: there only a mean,
# which is subtracted, has a second part. (Dekker, Numerische Mathematik 18 (1971), 224)

cdef struct Pair:
    double hi, lo


cdef inline Pair single(double a) noexcept nogil:
    cdef Pair pair
    pair.hi, pair.lo = a, 0
    return pair


cdef inline Pair two_sum(double a, double b) noexcept nogil:
    """a + b exactly (Knuth). lo is 0 where hi is not finite."""
    cdef Pair sum
    cdef double second
    sum.hi = a + b
    second = sum.hi - a
    sum.lo = finite((a - (sum.hi - second)) + (b - second))
    return sum


cdef inline Pair two_product(double a, double b) noexcept nogil:
    """a * b exactly, but for a factor beyond 2^996 or a product below 2^-969: there lo may be 0."""
    cdef Pair product
    cdef double a_wide = a * 0x8000001, b_wide = b * 0x8000001
    cdef double a_high = a_wide - (a_wide - a), b_high = b_wide - (b_wide - b)
    cdef double a_low = a - a_high, b_low = b - b_high
    product.hi = a * b
    product.lo = finite(((a_high * b_high - product.hi) + a_high * b_low + a_low * b_high) + a_low * b_low)
    return product


cdef inline Pair add(Pair a, Pair b, bint exact) noexcept nogil:
    cdef Pair sum
    if not exact:
        return single(a.hi + b.hi)
    sum = two_sum(a.hi, b.hi)
    return two_sum(sum.hi, sum.lo + finite(a.lo + b.lo))


cdef inline Pair multiply(Pair a, Pair b, bint exact) noexcept nogil:
    cdef Pair product
    if not exact:
        return single(a.hi * b.hi)
    product = two_product(a.hi, b.hi)
    return two_sum(product.hi, product.lo + finite(a.hi * b.lo + a.lo * b.hi))


cdef inline Pair negative(Pair a) noexcept nogil:
    a.hi, a.lo = -a.hi, -a.lo
    return a


cdef inline Pair divide(Pair a, double b, bint exact) noexcept nogil:
    cdef double quotient = a.hi / b
    cdef Pair product
    if not exact:
        return single(quotient)
    product = two_product(quotient, b)
    return two_sum(quotient, finite(((a.hi - product.hi) - product.lo + a.lo) / b))


cdef inline Pair reciprocal_square_root(Pair a, bint exact) noexcept nogil:
    """A step of Newton's from the rounded one."""
    cdef double root = 1 / sqrt(a.hi)
    cdef Pair one
    if not exact:
        return single(root)
    one = multiply(a, two_product(root, root), exact)
    return two_sum(root, finite(root * ((1 - one.hi) - one.lo) / 2))


# ----------------------------------------------------------------------------------------------------
# sums

cdef inline bint is_exact(Job *job) noexcept nogil:
    return job.kernels.sums == 4


cdef enum:
    # Channels whose blocks are added side by side.
    SIDE_BY_SIDE = 64


cdef inline void add_some(Job *job, double *sums, int channels, int64_t positions) noexcept nogil:
    """Neighbouring channels, one plane: block by block, in the order of memory but for the positions of a channel."""
    cdef bint exact = is_exact(job)
    cdef double total[SIDE_BY_SIDE]
    cdef double lost[SIDE_BY_SIDE]
    cdef double added, second, value
    cdef const double *values = sums
    cdef int64_t block, k, position
    cdef int i
    cdef Pair sum
    for i in range(channels):
        total[i] = lost[i] = 0
    for block in range(job.blocks):
        for k in range(job.fold):
            for position in range(positions):
                for i in range(channels):  # `two_sum`, so that compilers take several at once
                    value = values[i * positions + position]
                    added = total[i] + value
                    second = added - total[i]
                    lost[i] += (total[i] - (added - second)) + (value - second)
                    total[i] = added
                if exact:
                    for i in range(channels):
                        lost[i] += values[2 * job.width + i * positions + position]
            values += job.across
        values += job.kernels.sums * job.width - job.fold * job.across
    for i in range(channels):
        # an infinite total has lost NaN
        sum = two_sum(total[i], finite(lost[i])) if exact else single(total[i] + finite(lost[i]))
        sums[i * positions] = sum.hi
        if exact:
            sums[2 * job.width + i * positions] = sum.lo


cdef void add_blocks(Job *job, int64_t first, int64_t last) noexcept nogil:
    """The sums of some channels over their blocks, in block order, in place of those of the first block. They are
    compensated (Neumaier 1974): the error does not grow with the number of blocks."""
    cdef int64_t plane, channel
    cdef int channels
    cdef double *sums
    for plane in range(2):
        channel = first
        while channel < last:
            sums = job.sums + plane * job.width + channel * job.positions
            channels = <int>min(SIDE_BY_SIDE, last - channel)
            if job.positions == 1:  # known to the compiler
                add_some(job, sums, channels, 1)
            else:
                add_some(job, sums, channels, job.positions)
            channel += SIDE_BY_SIDE


cdef inline Pair sum_of(Job *job, int64_t channel, int plane) noexcept nogil:
    """What `add_blocks` has found."""
    cdef const double *sum = job.sums + plane * job.width + channel * job.positions
    cdef Pair pair = single(sum[0])
    if is_exact(job):
        pair.lo = sum[2 * job.width]
    return pair


# ----------------------------------------------------------------------------------------------------
# channels

cdef inline void write_shift(Job *job, int64_t channel, double shift) noexcept nogil:
    cdef int64_t k, i
    for k in range(job.fold):
        for i in range(job.positions):
            job.x_shift[k * job.across + channel * job.positions + i] = shift


cdef inline void write_coefficients(Job *job, int64_t channel, const fastbn_coefficients *exact,
                                    bint backward) noexcept nogil:
    cdef int64_t row = 0, first, column
    while row < job.map_width + job.lead:  # a row of the array after the other
        first = row + channel * job.positions
        for column in range(first, min(first + job.positions, job.map_width + job.lead)):
            job.kernels.round_coefficients(exact, backward, job.coefficients + column * job.kernels.coefficient_size,
                                           job.coefficient_plane)
        row += job.across


cdef inline Pair statistic(Job *job, int64_t channel, int high, int low) noexcept nogil:
    cdef Pair value
    value.hi = job.statistics[high * job.channels + channel]
    value.lo = job.statistics[low * job.channels + channel]
    return value


cdef inline void set_statistic(Job *job, int64_t channel, int high, int low, Pair value) noexcept nogil:
    job.statistics[high * job.channels + channel] = value.hi
    job.statistics[low * job.channels + channel] = value.lo


cdef inline double center_of(Job *job, int64_t channel) noexcept nogil:
    """What is subtracted from x before all else. Near the mean of data that are far from 0, the difference is exact,
    and nothing else would do. Where x scatters around 0, subtracting the mean rounds, and adding its share with beta
    loses nothing: no two large numbers cancel."""
    cdef double mean = job.statistics[STATISTICS_MEAN * job.channels + channel]
    cdef double var = job.statistics[STATISTICS_VAR * job.channels + channel]
    return 0 if 0 < var and mean * mean <= 4 * var else mean


cdef inline fastbn_coefficients normalizer(Job *job, int64_t channel, Pair mean, Pair rstd) noexcept nogil:
    """The coefficients of forward, which backward needs to find where the gradient passes."""
    cdef fastbn_coefficients exact
    exact.center = center_of(job, channel)
    exact.off_center = mean.lo if exact.center == mean.hi else mean.hi
    exact.scale = rstd.hi
    if job.gamma != NULL:
        exact.scale = multiply(single(job.gamma[channel]), rstd, is_exact(job)).hi
    exact.beta = job.beta[channel] if job.beta != NULL else 0
    exact.level = exact.off_level = exact.slope = 0
    return exact


cdef inline fastbn_coefficients kept_normalizer(Job *job, int64_t channel) noexcept nogil:
    return normalizer(job, channel, statistic(job, channel, STATISTICS_MEAN, STATISTICS_MEAN_LO),
                      statistic(job, channel, STATISTICS_RSTD, STATISTICS_RSTD_LO))


cdef bint finish_forward(Job *job, int64_t channel, bint again) noexcept nogil:
    """Mean, variance and coefficients. True if the sums must be redone with the mean as shift: 0, or the first value,
    was too far from it for sum(d^2) - sum(d)^2 / n to keep its digits (Chan, Golub and LeVeque 1983)."""
    cdef double count = <double>(job.outer * job.inner)
    cdef bint exact_sums = is_exact(job)
    cdef Pair total, squares, delta, mean, m2, var, rstd
    cdef fastbn_coefficients exact
    cdef double shift
    cdef int64_t k
    if job.reduce != NULL:
        total, squares = sum_of(job, channel, 0), sum_of(job, channel, 1)
        delta = divide(total, count, exact_sums)
        mean = two_sum(job.x_shift[channel * job.positions], delta.hi)
        mean.lo += delta.lo
        m2 = add(squares, negative(multiply(total, delta, exact_sums)), exact_sums)
        if m2.hi < 0:
            m2.hi = m2.lo = 0
        var = divide(m2, count, exact_sums)
        set_statistic(job, channel, STATISTICS_MEAN, STATISTICS_MEAN_LO, mean)
        job.statistics[STATISTICS_M2 * job.channels + channel] = m2.hi
        job.statistics[STATISTICS_VAR * job.channels + channel] = var.hi
        if not again and delta.hi * delta.hi > job.kernels.shift_limit * var.hi:
            # From a float32, a float32 near it is subtracted exactly: constants have no variance.
            shift = mean.hi if exact_sums else <float>mean.hi
            write_shift(job, channel, shift)
            return True
    else:
        mean = single(job.statistics[STATISTICS_MEAN * job.channels + channel])
        var = single(job.statistics[STATISTICS_VAR * job.channels + channel])
    if not job.statistics_only:
        rstd = reciprocal_square_root(add(var, single(job.eps), exact_sums), exact_sums)
        set_statistic(job, channel, STATISTICS_RSTD, STATISTICS_RSTD_LO, rstd)
        exact = normalizer(job, channel, mean, rstd)
        write_coefficients(job, channel, &exact, False)
    return False


cdef bint all_finite(Job *job) noexcept nogil:
    """Whether the mean and the variance of every channel are."""
    cdef int64_t channel
    cdef double mean, var
    for channel in range(job.channels):
        mean = job.statistics[STATISTICS_MEAN * job.channels + channel]
        var = job.statistics[STATISTICS_VAR * job.channels + channel]
        if mean - mean != 0 or var - var != 0:
            return False
    return True


cdef bint finish_backward(Job *job, int64_t channel, bint again) noexcept nogil:
    """dgamma, dbeta and the coefficients of dx, from the sums of g and of g * (x - center)."""
    cdef double count = <double>(job.outer * job.inner)
    cdef bint exact_sums = is_exact(job)
    cdef Pair sum_g, sum_gd, mean_g, mean, rstd
    cdef fastbn_coefficients exact = kept_normalizer(job, channel)
    if job.reduce == NULL:  # with given statistics, dx needs no sums
        write_coefficients(job, channel, &exact, True)
        return False
    sum_g, sum_gd = sum_of(job, channel, 0), sum_of(job, channel, 1)
    mean = statistic(job, channel, STATISTICS_MEAN, STATISTICS_MEAN_LO)
    rstd = statistic(job, channel, STATISTICS_RSTD, STATISTICS_RSTD_LO)
    if exact.center == mean.hi:  # else it is 0
        mean = single(mean.lo)
    sum_gd = add(sum_gd, negative(multiply(mean, sum_g, exact_sums)), exact_sums)
    job.dbeta[channel] = sum_g.hi
    job.dgamma[channel] = multiply(rstd, sum_gd, exact_sums).hi
    mean_g = divide(sum_g, count, exact_sums)
    # As center_of: nothing is subtracted from g before all else if its first value is as far from the mean as the mean
    # is from 0, so that the largest dx is as large as the offset.
    exact.level = 0 if fabs(mean_g.hi) <= 2 * fabs(job.dy_first[channel] - mean_g.hi) else mean_g.hi
    exact.off_level = mean_g.lo if exact.level == mean_g.hi else mean_g.hi
    exact.slope = rstd.hi * rstd.hi * (sum_gd.hi / count)
    write_coefficients(job, channel, &exact, True)
    return False
