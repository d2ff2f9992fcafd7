# SPDX-License-Identifier: MIT
# Finish: from the sums of the blocks of a channel to its moments, gradients and coefficients. The sums of blocks are
# added here; what follows from them is in src_c/kernels/finish.inc.

from libc.string cimport memchr, memset


cdef int64_t next_redo(Job *job, int64_t first, int64_t last) noexcept nogil:
    """The first of some channels whose sums must be made again; `last` if there is none."""
    cdef const void *found = memchr(job.known.redo + first, True, last - first)
    return last if found == NULL else <const char *>found - job.known.redo


cdef inline bint any_redo(Job *job, int64_t first, int64_t last) noexcept nogil:
    return next_redo(job, first, last) < last


cdef inline double finite(double value) noexcept nogil:
    """0 for what is not: a shift, or what a rounding has lost, would turn an infinite sum into NaN."""
    return value if value - value == 0 else 0


cdef inline bint is_exact(Job *job) noexcept nogil:
    """Whether sums come with what their additions have lost."""
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
        value = finite(lost[i])  # an infinite total has lost NaN
        added = total[i] + value
        if exact:
            second = added - total[i]
            sums[2 * job.width + i * positions] = finite((total[i] - (added - second)) + (value - second))
        sums[i * positions] = added


cdef void add_blocks(Job *job, int64_t first, int64_t last) noexcept nogil:
    """The sums of some channels over their blocks, in block order, in place of those of the first block. They are
    compensated (Neumaier 1974): the error does not grow with the number of blocks."""
    cdef int64_t plane, channel
    cdef int channels
    cdef double *sums
    if job.blocks * job.fold * job.positions == 1 and not is_exact(job):  # there is one part, and nothing to add
        return
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


cdef inline void write_shift(Job *job, int64_t channel, double shift) noexcept nogil:
    cdef int64_t k, i
    for k in range(job.fold):
        for i in range(job.positions):
            job.known.x_shift[k * job.across + channel * job.positions + i] = shift


cdef void finish_channels(Job *job, int64_t first, int64_t last) noexcept nogil:
    cdef int64_t channel
    cdef double mean
    memset(job.known.redo + first, 0, last - first)
    if job.reduce != NULL:
        add_blocks(job, first, last)
    job.finish(&job.known, first, last)
    channel = next_redo(job, first, last)
    while channel < last:
        # From a float32, a float32 near it is subtracted exactly: constants have no variance.
        mean = job.known.statistics[STATISTICS_MEAN * job.channels + channel]
        write_shift(job, channel, mean if is_exact(job) else <float>mean)
        channel = next_redo(job, channel + 1, last)


cdef void finish_redone(Job *job, int64_t first, int64_t last) noexcept nogil:
    cdef int64_t channel = next_redo(job, first, last), end
    cdef fastbn_channels known = job.known
    known.redo = NULL
    while channel < last:
        end = channel
        while end < last and job.known.redo[end]:
            end += 1
        add_blocks(job, channel, end)
        job.finish(&known, channel, end)
        channel = next_redo(job, end, last)


cdef bint all_finite(Job *job) noexcept nogil:
    """Whether the mean and the variance of every channel are."""
    cdef int64_t channel
    cdef double mean, var
    for channel in range(job.channels):
        mean = job.known.statistics[STATISTICS_MEAN * job.channels + channel]
        var = job.known.statistics[STATISTICS_VAR * job.channels + channel]
        if mean - mean != 0 or var - var != 0:
            return False
    return True
