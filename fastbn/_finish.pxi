# SPDX-License-Identifier: MIT
# Finish: from the sums of the blocks of a channel to its moments, gradients and coefficients, in float64.

from libc.math cimport fabs, sqrt


cdef inline double usable_shift(double first) noexcept nogil:
    """A shift must be finite, else it would turn an infinite sum into NaN."""
    return first if first - first == 0 else 0


cdef inline void two_sum(double a, double b, double *hi, double *lo) noexcept nogil:
    """hi + lo = a + b exactly, hi rounded (Knuth). lo is 0 where hi is not finite."""
    cdef double s = a + b, t = s - a
    cdef double rest = (a - (s - t)) + (b - t)
    hi[0] = s
    lo[0] = rest if rest - rest == 0 else 0


cdef void add_blocks(Job *job, int64_t channel, double *first, double *second) noexcept nogil:
    """The two sums of a channel over its blocks, in block order, compensated (Neumaier 1974): the error does not grow
    with the number of blocks."""
    cdef int64_t block, k
    cdef double total[2]
    cdef double lost[2]
    cdef double value, t
    cdef int p
    total[0] = total[1] = lost[0] = lost[1] = 0
    for block in range(job.blocks):
        for k in range(job.fold):
            for p in range(2):
                value = job.sums[(block * 2 + p) * job.width + channel + k * job.channels]
                t = total[p] + value
                lost[p] += (total[p] - t) + value if fabs(total[p]) >= fabs(value) else (value - t) + total[p]
                total[p] = t
    # an infinite total has lost NaN
    first[0] = total[0] + usable_shift(lost[0])
    second[0] = total[1] + usable_shift(lost[1])


cdef void write_coefficients(Job *job, int64_t channel, const fastbn_coefficients *exact) noexcept nogil:
    cdef int64_t k
    for k in range(job.fold):
        job.kernels.round_coefficients(
            exact, job.coefficients + (channel + k * job.channels) * job.kernels.coefficient_size, job.width)


cdef fastbn_coefficients normalizer(Job *job, int64_t channel) noexcept nogil:
    """The coefficients of forward, which backward needs to find where the gradient passes."""
    cdef fastbn_coefficients exact
    exact.mean = job.statistics[STATISTICS_MEAN * job.channels + channel]
    exact.mean_lo = job.statistics[STATISTICS_MEAN_LO * job.channels + channel]
    exact.scale = job.statistics[STATISTICS_RSTD * job.channels + channel]
    if job.gamma != NULL:
        exact.scale *= job.gamma[channel]
    exact.beta = job.beta[channel] if job.beta != NULL else 0
    exact.gradient = exact.gradient_lo = exact.slope = 0
    return exact


cdef bint finish_forward(Job *job, int64_t channel, bint again) noexcept nogil:
    """Mean, variance and coefficients. True if the sums must be redone with the mean as shift: the first value was too
    far from it for sum(d^2) - sum(d)^2 / n to keep its digits (Chan, Golub and LeVeque 1983)."""
    cdef double count = <double>(job.outer * job.inner), shift, delta, m2, square
    cdef fastbn_coefficients exact
    cdef double *mean = job.statistics + STATISTICS_MEAN * job.channels + channel
    cdef double *mean_lo = job.statistics + STATISTICS_MEAN_LO * job.channels + channel
    cdef double *var = job.statistics + STATISTICS_VAR * job.channels + channel
    cdef int64_t k
    if job.reduce != NULL:
        add_blocks(job, channel, &delta, &square)
        shift = job.x_shift[channel]
        m2 = square - delta * (delta / count)
        delta /= count
        if m2 < 0:
            m2 = 0
        two_sum(shift, delta, mean, mean_lo)
        var[0] = m2 / count
        job.statistics[STATISTICS_M2 * job.channels + channel] = m2
        if not again and delta * delta > job.kernels.shift_limit * var[0]:
            for k in range(job.fold):
                job.x_shift[channel + k * job.channels] = mean[0]
            return True
    if not job.statistics_only:
        job.statistics[STATISTICS_RSTD * job.channels + channel] = 1 / sqrt(var[0] + job.eps)
        exact = normalizer(job, channel)
        write_coefficients(job, channel, &exact)
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
    """dgamma, dbeta and the coefficients of dx. The sums are of e = g - shift and of e * (x - mean_hi); as the
    deviations x - mean add to zero, sum(e * (x - mean)) is sum(g * (x - mean)), and an offset of g costs no digits."""
    cdef double count = <double>(job.outer * job.inner), sum_e, sum_ed, rstd
    cdef fastbn_coefficients exact = normalizer(job, channel)
    if job.reduce == NULL:  # with given statistics, dx needs no sums
        write_coefficients(job, channel, &exact)
        return False
    add_blocks(job, channel, &sum_e, &sum_ed)
    rstd = job.statistics[STATISTICS_RSTD * job.channels + channel]
    sum_ed -= exact.mean_lo * sum_e
    job.dbeta[channel] = count * job.dy_shift[channel] + sum_e
    job.dgamma[channel] = rstd * sum_ed
    two_sum(job.dy_shift[channel], sum_e / count, &exact.gradient, &exact.gradient_lo)
    exact.slope = rstd * rstd * (sum_ed / count)
    write_coefficients(job, channel, &exact)
    return False
