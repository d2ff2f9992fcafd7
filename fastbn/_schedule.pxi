# SPDX-License-Identifier: MIT
# The schedule: how channels and blocks are shared among threads, and in which order partial sums are added.
#
# Forward and backward are the same three steps, each over all threads:
#     reduce   sums of every block                               stats or backward_stats kernels
#     finish   sums -> moments and coefficients of channels      float64: blocks are added here, finish kernels
#     map      every value                                       apply or backward_apply kernels
# Where there are channels enough for all threads (planar), each does the three steps channel by channel, so that the
# second reading of a channel finds it in the cache.
#
# Bits: blocks are cut by shape alone (constants of fastbn.h, and positions_of) and finish adds their sums in block
# order. Threads, tasks, packing and the order of units only decide who calls a kernel, and when.

from cython.parallel cimport parallel, threadid
from libc.stdlib cimport free
from libc.string cimport memcpy, memset
from posix.stdlib cimport posix_memalign

ctypedef void (*Worker)(Job *, int, int64_t, int64_t) noexcept nogil


# ----------------------------------------------------------------------------------------------------
# phases

cdef void perform(Job *job, Worker worker, int thread, int64_t first, int64_t last) noexcept nogil:
    cdef uint64_t saved = fastbn_enter()
    worker(job, thread, first, last)
    fastbn_leave(saved)


cdef extern from * nogil:
    """
    #if defined(FASTBN_DEBUG)
    #define FASTBN_REPLACEABLE __attribute__((visibility("default"))) /* by tests/openmp.c */
    #else
    #define FASTBN_REPLACEABLE static
    #endif
    FASTBN_REPLACEABLE int64_t fastbn_take_next(char *counter)
    {
        return __atomic_fetch_add((int64_t *)counter, 1, __ATOMIC_RELAXED);
    }
    /* How many threads have come here, with the caller, who sees what those before it have written. */
    FASTBN_REPLACEABLE int64_t fastbn_arrive(char *counter)
    {
        return __atomic_add_fetch((int64_t *)counter, 1, __ATOMIC_ACQ_REL);
    }
    static void fastbn_barrier(void)
    {
    #if defined(_OPENMP)
        _Pragma("omp barrier")
    #endif
    }
    """
    int64_t fastbn_take_next(char *counter)
    int64_t fastbn_arrive(char *counter)
    void fastbn_barrier()


cdef void take_part(Job *job, Worker worker, int64_t units, int threads, char *taken, int part,
                    bint backwards) noexcept nogil:
    """What one thread of a team does of the units 0 .. units-1, which are shared in tasks of some that follow one
    another.

    Each thread begins with a part of its own, the same in every step and call: its core has some of that in its caches,
    and does not fetch ahead what another one is writing. Then it takes what is left of the others. If there are as many
    units for each thread, no task has units of two parts.
    """
    cdef int64_t tasks = min(units, TASKS_PER_THREAD * threads), parts = min(threads, tasks)
    cdef int64_t k, other, first, count, next, task
    if parts <= 1:
        if part == 0:
            perform(job, worker, 0, 0, units)
    else:
        for k in range(parts):
            other = (part + k) % parts
            first = other * tasks // parts
            count = (other + 1) * tasks // parts - first
            next = fastbn_take_next(taken + other * FASTBN_ALIGNMENT)
            while next < count:
                task = first + (count - 1 - next if backwards else next)
                perform(job, worker, part, task * units // tasks, (task + 1) * units // tasks)
                next = fastbn_take_next(taken + other * FASTBN_ALIGNMENT)
    if job.staggered:  # a map still waits
        perform(job, worker, part, units, units)


cdef void phase(Job *job, Worker worker, int64_t units, int threads, bint backwards) noexcept nogil:
    """All units, by a team that ends with them."""
    cdef int team = <int>max(1, min(threads, units))
    if team == 1:
        take_part(job, worker, units, 1, job.taken, 0, backwards)
        return
    memset(job.taken, 0, team * FASTBN_ALIGNMENT)
    with parallel(num_threads=team):
        take_part(job, worker, units, team, job.taken, threadid(), backwards)


# ----------------------------------------------------------------------------------------------------
# workers: what a thread does with a range of units

cdef inline bint shifts_by_first(Job *job) noexcept nogil:
    """Whether sums have shifts, or know something, of the first value of a channel."""
    return job.dy.data != NULL or is_exact(job)


cdef void clear_sums(Job *job, int64_t block, int64_t column, int64_t columns) noexcept nogil:
    """Before a kernel that adds to them."""
    cdef int64_t plane
    for plane in range(job.kernels.sums):
        memset(job.sums + (block * job.kernels.sums + plane) * job.width + column, 0, columns * sizeof(double))


cdef void shift_channels(Job *job, int thread, int64_t first, int64_t last) noexcept nogil:
    """The shifts of a range of channels: 0, or the first x (float64, which has no digits to spare), or (backward) what
    forward has found. And the first g, which as the first x is the sum over one value where an activation has a say, or
    a channel has several columns."""
    cdef fastbn_block b
    cdef fastbn_channels known
    cdef fastbn_operand values
    cdef int64_t channel, column, k
    for k in range(job.fold):
        memset(job.known.x_shift + k * job.across + first * job.positions, 0,
               (last - first) * job.positions * sizeof(double))
    if not shifts_by_first(job):
        return
    if job.dy.data != NULL:
        known = job.known
        if job.mask != NULL or job.activation == IDENTITY:  # the gate is not found from x
            known.coefficients = NULL
        job.kernels.begin_backward(&known, first, last)
    if job.positions == 1 and (job.dy.data == NULL or job.activation == IDENTITY):
        values = locate(&job.x if job.dy.data == NULL else &job.dy, 0, first, 0, 1)
        job.kernels.first_values(&values, last - first, job.sums + first)
    elif job.planar:
        b.channels = last - first
        place(job, &b, 0, first, 0, False)
        job.kernels.first_gradients(&b, job.sums + first)
    else:
        clear_sums(job, 0, 0, job.width)
        column = 0
        while column < job.across:  # whole groups: a mask has no address for a single column
            b.rows = 1
            b.columns = min(GROUP_COLUMNS, job.across - column)
            place(job, &b, 0, column, 0, False)
            b.sums = job.sums + column
            if job.packed:
                run_packed(job, job.reduce, &b, column, thread)
            else:
                job.reduce(&b)
            column += b.columns
    if job.dy.data == NULL:
        for channel in range(first, last):
            write_shift(job, channel, finite(job.sums[channel * job.positions]))
    elif job.positions == 1:
        memcpy(job.known.dy_first + first, job.sums + first, (last - first) * sizeof(double))
    else:
        for channel in range(first, last):
            job.known.dy_first[channel] = job.sums[channel * job.positions]


cdef inline int64_t first_of(Job *job, int64_t group) noexcept nogil:
    """The first channel (or column) of a group. Planar groups are as equal as their grain permits, the larger ones of
    a share first: within a share, which no task leaves (see `take_part`), no group has more channels than the one
    before it, whose map goes beside its reduce."""
    cdef int64_t grains, each, share, i, first, here
    if not job.planar:
        return min(group * job.group, job.width)
    grains, each = ceil_div(job.channels, job.grain), job.groups // job.shares
    share, i = group // each, group % each
    first = share * grains // job.shares
    here = (share + 1) * grains // job.shares - first
    return min((first + i * (here // each) + min(i, here % each)) * job.grain, job.channels)


cdef inline int64_t planar_group(Job *job, int64_t unit) noexcept nogil:
    """All blocks of a group follow one another; without sums, units do in the order of memory: a part of them is some
    images, as for whoever has written x or will read y."""
    return unit // job.blocks if job.reduce != NULL else unit // job.segments % job.groups


cdef inline int64_t planar_block_of(Job *job, int64_t unit) noexcept nogil:
    if job.reduce != NULL:
        return unit % job.blocks
    return unit // (job.segments * job.groups) * job.segments + unit % job.segments


cdef void reduce_units(Job *job, int thread, int64_t first, int64_t last) noexcept nogil:
    """A unit is one block of one group."""
    cdef int64_t unit, group, block, row, channel, end, rows = job.outer // job.fold
    for unit in range(first, last):
        group = planar_group(job, unit) if job.planar else unit % job.groups
        channel, end = first_of(job, group), first_of(job, group + 1)
        if job.again and not any_redo(job, channel // job.positions,
                                      ceil_div(min(end, job.across), job.positions)):
            continue
        if job.planar:
            run_planar(job, job.reduce, thread, channel, end - channel, planar_block_of(job, unit), False)
        else:
            block = unit // job.groups
            row = block * FASTBN_INTERLEAVED_BLOCK
            clear_sums(job, block, channel, end - channel)
            if row >= rows:
                run_interleaved(job, job.reduce, thread, block, rows, rows + 1, 0, 0, False)
            else:
                run_interleaved(job, job.reduce, thread, block, row, min(row + FASTBN_INTERLEAVED_BLOCK, rows),
                                channel, end - channel, False)


cdef void map_by_lines(Job *job, int thread, int64_t row, int64_t last) noexcept nogil:
    """Rows that begin with a line of the cache and end in the next row of the array, whose first columns lie before the
    line: but for those of the first row, and the end of the last."""
    cdef int64_t rows = job.outer // job.map_fold, whole = min(last, rows - 1)
    if row == 0:
        run_interleaved(job, job.map, thread, 0, 0, 1, 0, job.lead, True)
    if row < whole:
        run_interleaved(job, job.map, thread, 0, row, whole, job.lead, job.map_width, True)
    if last == rows:
        run_interleaved(job, job.map, thread, 0, rows - 1, rows, job.lead, job.map_width - job.lead, True)


cdef void map_units(Job *job, int thread, int64_t first, int64_t last) noexcept nogil:
    """From the last unit to the first: what reduce has read last is still in the cache. A unit is one block of one
    group (planar), or some rows, whole ones unless they are packed."""
    cdef int64_t unit, group, channel, end, row, column, rows = job.outer // job.map_fold
    cdef int64_t columns = job.group if job.packed else job.map_width
    for unit in range(last - 1, first - 1, -1):
        if job.planar:
            group = planar_group(job, unit)
            channel, end = first_of(job, group), first_of(job, group + 1)
            run_planar(job, job.map, thread, channel, end - channel, planar_block_of(job, unit), True)
        else:
            row = unit * job.map_rows
            if row >= rows:
                run_interleaved(job, job.map, thread, 0, rows, rows + 1, 0, 0, True)
            elif job.lead > 0:
                map_by_lines(job, thread, row, min(row + job.map_rows, rows))
            else:
                column = 0
                while column < job.map_width:
                    run_interleaved(job, job.map, thread, 0, row, min(row + job.map_rows, rows), column,
                                    min(columns, job.map_width - column), True)
                    column += columns


cdef void finish_units(Job *job, int thread, int64_t first, int64_t last) noexcept nogil:
    """A unit is some channels, whole lines of the cache where there are enough of them for all threads."""
    first, last = first * job.channels_per_finish, min(last * job.channels_per_finish, job.channels)
    if job.again:
        finish_redone(job, first, last)
    else:
        finish_channels(job, first, last)


cdef void reduce_group(Job *job, int thread, int64_t channel, int64_t channels) noexcept nogil:
    cdef int64_t block
    for block in range(job.blocks):
        run_planar(job, job.reduce, thread, channel, channels, block, False)


cdef void finish_group(Job *job, int thread, int64_t channel, int64_t channels) noexcept nogil:
    finish_channels(job, channel, channel + channels)
    if any_redo(job, channel, channel + channels):
        reduce_group(job, thread, channel, channels)
        finish_redone(job, channel, channel + channels)


cdef void map_group(Job *job, int thread, int64_t channel, int64_t channels) noexcept nogil:
    """From the last row to the first: what reduce has read last is still in the cache."""
    cdef int64_t block
    cdef fastbn_block b
    if job.packed:
        for block in range(job.blocks - 1, -1, -1):
            run_planar(job, job.map, thread, channel, channels, block, True)
        return
    b.rows, b.columns, b.channels = job.outer, job.inner, channels
    place(job, &b, job.outer - 1, channel, 0, True)
    b.x.row, b.dy.row, b.residual.row = -b.x.row, -b.dy.row, -b.residual.row
    b.y.row, b.dx.row, b.dresidual.row, b.mask.row = -b.y.row, -b.dx.row, -b.dresidual.row, -b.mask.row
    job.map(&b)


cdef void whole_groups(Job *job, int thread, int64_t first, int64_t last) noexcept nogil:
    """All three steps for a range of groups of planar channels, group by group: map finds in a cache what reduce has
    read."""
    cdef int64_t group, channel, channels
    for group in range(first, last):
        channel = first_of(job, group)
        channels = first_of(job, group + 1) - channel
        shift_channels(job, thread, channel, channel + channels)
        reduce_group(job, thread, channel, channels)
        finish_group(job, thread, channel, channels)
        if job.map != NULL:
            map_group(job, thread, channel, channels)


cdef inline int64_t turned(Job *job, int64_t group, int64_t i) noexcept nogil:
    """The i-th block in a group's reduce: there and back, so that its map, beside the reduce of the next group, begins
    with what has been read last."""
    return job.blocks - 1 - i if group % 2 else i


cdef void map_waiting(Job *job, int thread, int64_t group) noexcept nogil:
    """The map of a group by itself."""
    cdef int64_t channel = first_of(job, group), channels = first_of(job, group + 1) - channel, i
    for i in range(job.blocks):
        run_planar(job, job.map, thread, channel, channels, turned(job, group + 1, i), True)


cdef void staggered_groups(Job *job, int thread, int64_t first, int64_t last) noexcept nogil:
    """The same, with the map of a group beside the reduce of the next: that is read while this one is written. The map
    of the last waits for the thread's next groups, which mostly follow. An empty range is for what still waits."""
    cdef int64_t *waiting = <int64_t *>(job.waiting + thread * FASTBN_ALIGNMENT)
    cdef int64_t group, channel, channels, before, i, block
    cdef fastbn_block mapped, reduced
    cdef bint follows = waiting[0] + 1 == first and first % (job.groups // job.shares) != 0  # in the same share
    if waiting[0] >= 0 and (first == last or not follows):
        map_waiting(job, thread, waiting[0])
        waiting[0] = -1
    for group in range(first, last):
        channel = first_of(job, group)
        channels = first_of(job, group + 1) - channel
        before = first_of(job, waiting[0]) if waiting[0] >= 0 else channel
        shift_channels(job, thread, channel, channel + channels)
        for i in range(job.blocks):
            block = turned(job, group, i)
            if waiting[0] < 0:
                run_planar(job, job.reduce, thread, channel, channels, block, False)
            else:
                place_planar(job, &reduced, channel, channels, block, False)
                reduced.far = measured.far_beside
                # Between the stores of map, asking for the same rows of the next channels may pay more than for the
                # next rows.
                reduced.next_too = job.next_too
                reduced.rows_ahead, reduced.then_row = reduced.rows, 0
                place_planar(job, &mapped, before, channel - before, block, True)
                job.map_beside_reduce(&mapped, &reduced)
        finish_group(job, thread, channel, channels)
        waiting[0] = group


# ----------------------------------------------------------------------------------------------------
# the job as a whole

cdef char *take(char **cursor, int64_t size) noexcept nogil:
    cdef char *part = cursor[0]
    cursor[0] += aligned(size)
    return part


cdef int64_t lay_out(Job *job, char *memory) noexcept nogil:
    """Divide the scratch; returns its size. Called twice: to measure and to place."""
    cdef char *cursor = memory
    job.taken = take(&cursor, counters_size(job.threads))
    job.waiting = take(&cursor, job.threads * FASTBN_ALIGNMENT)
    job.known.x_shift = <double *>take(&cursor, job.width * sizeof(double))
    job.known.dy_first = <double *>take(&cursor, job.channels * sizeof(double))
    job.known.coefficients = take(&cursor, FASTBN_PLANES * job.known.coefficient_plane * job.kernels.coefficient_size)
    job.known.redo = take(&cursor, job.channels)
    job.sums = <double *>take(&cursor, sums_size(job) if job.reduce != NULL else 0)
    job.packing = cursor
    job.packing_size = 0
    if job.packed:  # x, dy and residual, dx and dresidual
        job.packing_size = 5 * aligned(PACKED_VALUES * job.kernels.itemsize)
    cursor += job.packing_size * min(job.threads, max(job.units, job.map_units))
    job.known.sums = job.sums if job.reduce != NULL else NULL
    return cursor - memory


cdef int64_t counters_size(int team) noexcept nogil:
    """Bytes: a line of the cache for each thread's part of each of three steps, and one for those who have arrived."""
    return (3 * team + 1) * FASTBN_ALIGNMENT


cdef int64_t sums_size(Job *job) noexcept nogil:
    """Bytes: planes of `width` sums for each block."""
    return job.kernels.sums * job.blocks * job.width * sizeof(double)


cdef inline int64_t finish_tasks(Job *job) noexcept nogil:
    return ceil_div(job.channels, job.channels_per_finish)


cdef void make_statistics(Job *job, int finishers) noexcept nogil:
    """Reduce, unless statistics are given, and finish."""
    if job.reduce != NULL:
        phase(job, reduce_units, job.units, job.threads, False)
    phase(job, finish_units, finish_tasks(job), finishers, False)


cdef void take_steps(Job *job, bint few, int team, int thread, int present) noexcept nogil:
    """What a thread of a team does of all three steps. In between it waits for the others, which takes less than half
    of what it takes to start another team. No map if sums have to be made again."""
    cdef int64_t lines = team * FASTBN_ALIGNMENT
    take_part(job, reduce_units, job.units, team, job.taken, thread, False)
    if few:
        if fastbn_arrive(job.taken + 3 * lines) == present:
            perform(job, finish_units, thread, 0, finish_tasks(job))
    else:
        fastbn_barrier()
        take_part(job, finish_units, finish_tasks(job), team, job.taken + lines, thread, False)
    fastbn_barrier()
    if not any_redo(job, 0, job.channels):
        take_part(job, map_units, job.map_units, team, job.taken + 2 * lines, thread, True)


cdef void run_in_phases(Job *job) noexcept nogil:
    cdef bint few = (job.channels < SERIAL_CHANNELS if job.reduce == NULL
                     else job.blocks * job.width + job.channels < SERIAL_SUMS)
    cdef int finishers = 1 if few else job.threads
    cdef int team = <int>min(job.threads, max(job.units, job.map_units))
    job.again = False
    job.channels_per_finish = max(1, min(FASTBN_ALIGNMENT // sizeof(double), ceil_div(job.channels, finishers)))
    if job.reduce != NULL:
        phase(job, shift_channels, job.channels, finishers if job.planar and shifts_by_first(job) else 1, False)
    if job.reduce != NULL and job.map != NULL and job.threads > 1 and job.units > 1 and not job.finite_first:
        memset(job.taken, 0, counters_size(team))
        with parallel(num_threads=team):
            take_steps(job, few, team, threadid(), omp_get_num_threads())
        if not any_redo(job, 0, job.channels):
            return
    else:
        make_statistics(job, finishers)
    if job.reduce != NULL and any_redo(job, 0, job.channels):
        job.again = True
        make_statistics(job, finishers)
    if job.map != NULL and not (job.finite_first and not all_finite(job)):
        phase(job, map_units, job.map_units, job.threads, True)


cdef extern from * nogil:
    """
    /* The scratch of the call before, for the next: one that takes it owns it. Its size stands at its start. */
    static char *fastbn_spare;
    static char *fastbn_swap_spare(char *scratch)
    {
        return __atomic_exchange_n(&fastbn_spare, scratch, __ATOMIC_ACQ_REL);
    }
    """
    char *fastbn_swap_spare(char *scratch)


cdef char *take_scratch(int64_t size) noexcept nogil:
    """At least so many bytes; NULL if there is no memory. A call like the one before allocates nothing."""
    cdef char *scratch = fastbn_swap_spare(NULL)
    cdef void *memory = NULL
    if scratch == NULL or (<int64_t *>scratch)[0] < size:
        free(scratch)
        if posix_memalign(&memory, FASTBN_ALIGNMENT, FASTBN_ALIGNMENT + size) != 0:
            return NULL
        scratch = <char *>memory
        (<int64_t *>scratch)[0] = size
    return scratch + FASTBN_ALIGNMENT


cdef void leave_scratch(char *scratch) noexcept nogil:
    scratch -= FASTBN_ALIGNMENT
    if (<int64_t *>scratch)[0] <= SPARE_BYTES:
        scratch = fastbn_swap_spare(scratch)
    free(scratch)


cdef bint run(Job *job) noexcept nogil:
    """Carry the job out. False if there was no memory for the scratch: then nothing has been written."""
    cdef char *scratch
    cut(job)
    scratch = take_scratch(lay_out(job, NULL))
    if scratch == NULL:
        return False
    lay_out(job, scratch)
    if job.staggered:
        memset(job.waiting, 0xff, job.threads * FASTBN_ALIGNMENT)
    if job.by_channel:
        phase(job, staggered_groups if job.staggered else whole_groups, job.groups, job.threads, False)
    else:
        run_in_phases(job)
    leave_scratch(scratch)
    return True
