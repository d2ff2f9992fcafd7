# SPDX-License-Identifier: MIT
# The schedule: how channels and blocks are shared among threads, and in which order partial sums are added.
#
# Forward and backward are the same three steps, each a phase over all threads:
#     reduce   sums of every block                               stats or backward_stats kernels
#     finish   sums -> moments and coefficients of channels      float64: blocks are added here, finish kernels
#     map      every value                                       apply or backward_apply kernels
# Where there are channels enough for all threads (planar), one phase does the three steps channel by channel, so that
# the second reading of a channel finds it in the cache.
#
# Bits: blocks are cut by shape alone (constants of fastbn.h) and finish adds their sums in block order. Threads, tasks,
# packing and the order of units only decide who calls a kernel, and when.

from cython.parallel cimport prange, threadid
from libc.stdlib cimport free
from libc.string cimport memchr, memcpy, memset
from posix.stdlib cimport posix_memalign


cdef struct Array:  # strides in bytes; data is NULL where an optional array is absent
    char *data
    int64_t outer, channel, inner

cdef struct Job
ctypedef void (*Worker)(Job *, int, int64_t, int64_t) noexcept nogil

cdef struct Job:
    # what to do
    const fastbn_kernels *kernels
    bint planar
    int64_t outer, channels, inner
    int64_t positions  # interleaved: adjacent columns of a channel; more than one are the plane of an image
    int threads
    int activation
    double negative_slope
    bint training
    bint finite_first  # no map unless all statistics are finite
    fastbn_finish *finish
    fastbn_channels known  # what finish is told of the channels, and where it writes
    fastbn_kernel *reduce  # NULL: the statistics are given
    fastbn_kernel *map     # NULL: only the statistics are wanted
    fastbn_pair *map_beside_reduce  # planar: both at once, for different channels
    # planar: the same for short runs that adjoin, taken as one; `cut` puts them in place of the two
    fastbn_kernel *map_adjoining
    fastbn_pair *map_adjoining_beside_reduce
    # arrays
    Array x, residual, dy, y, dx, dresidual
    char *mask
    # how it is cut: blocks of a channel (planar) or of rows (interleaved), in groups of channels; a unit is one block
    # of one group
    int64_t blocks
    int64_t rows_per_block
    int64_t segment   # planar: values of a run in a block, at most
    int64_t segments  # blocks of a run, where it is longer
    int64_t across    # interleaved: columns of a row of the array, channels * positions
    int64_t fold      # interleaved: rows taken as one, to fill whole vectors
    int64_t width     # sums and shifts: fold * across
    int64_t map_fold, map_width  # the same of map, whose rows may be longer: whole lines of the cache
    int64_t lead      # columns before the first of these lines, if map's rows begin there: coefficients go on so far
    int64_t group     # columns (interleaved) or channels (planar) of a group, at most
    int64_t groups
    int64_t grain     # planar: groups begin at multiples of so many channels
    int64_t shares    # parts of all groups that have as many groups each
    int64_t units
    int64_t map_rows  # interleaved: map goes over whole rows, so many a unit
    int64_t map_units
    int64_t finished  # channels that are finished together, in phases
    bint by_channel   # planar: all three steps for a group before the next
    bint staggered    # and the map of a group beside the reduce of the next
    bint map_asks     # forward without sums: map reads memory, and asks for it ahead
    bint reduce_asks  # planar: reduce reads what the caches may not have any more, and asks for it ahead
    bint next_too     # what the reduce of the next group will read is asked for: it is small, and this processor gains
    # scratch, one allocation
    char *taken  # tasks of each thread's part that have been taken, a line of the cache each
    char *waiting  # staggered: the group of a thread that has yet to be mapped, or -1, likewise
    double *sums
    bint again        # reduce does only those
    bint packed       # some array is strided: blocks pass through `packing`
    char *packing     # a part for each thread
    int64_t packing_size
    int64_t stream_bytes  # of all arrays: so large, results are stored past the caches
    bint stream


cdef enum:
    # Values that a thread packs at once: no block of a channel and no folded row is larger.
    PACKED_VALUES = FASTBN_PLANAR_BLOCK
    # Columns of a group where interleaved rows are wide; at most PACKED_VALUES. Fewer where there are few blocks, but
    # as many as are whole lines of the cache.
    GROUP_COLUMNS = 1024
    LEAST_COLUMNS = 128
    # Values of a plane, at most, that are columns of an interleaved block, and images for each of them, at least; more
    # where planes are whole vectors.
    SHORT_PLANE = 200
    IMAGES_PER_POSITION = 10
    IMAGES_OF_VECTORS = 16
    # Columns of a map's row that consists of several rows of the array, at most.
    MAP_COLUMNS = 8 << 10
    # Bytes of x in a unit of planar channels, and of an interleaved map. All three steps: with y (or dy and dx) it fits
    # an L2 cache of a megabyte; from memory a little less pays. One step: long pieces of memory, enough units for all
    # threads.
    UNIT_BYTES = 224 << 10
    LARGE_UNIT_BYTES = 192 << 10
    PHASE_UNIT_BYTES = 512 << 10
    # Bytes of rows that are mapped before another thread is awake.
    LEAST_UNIT_BYTES = 32 << 10
    # Units that a thread gets on average, at least where they can be cut so small; and ranges of units, at most: enough
    # to even out, few enough to cost nothing.
    UNITS_PER_THREAD = 4
    TASKS_PER_THREAD = 16
    # Sums and channels that one thread finishes while others would still wake up; and channels, if the statistics are
    # given, until another has sent what it knows of them to the core that needs it next.
    SERIAL_SUMS = 3 << 10
    SERIAL_CHANNELS = 8 << 10
    # The map takes shorter runs as one, if they adjoin.
    LONG_RUN_BYTES = 2 << 10
    # Rows of adjoining planes for which spreading their coefficients pays. So few that the kernel does not (MAP_ROWS of
    # apply.inc; with a mask it always does) are better mapped plane by plane in the caches; past them, planes of some
    # vectors are taken that few rows at a time.
    SPREAD_ROWS = 16
    UNSPREAD_COLUMNS = 8 * FASTBN_LANES
    UNSPREAD_ROWS = 3
    # Values of a plane, a whole number of vectors, that is better mapped by itself in the caches if it has a mask.
    MASKED_COLUMNS = 4 * FASTBN_LANES
    # What reduce reads of a group from which on map does not find it in an L2 cache of half a megabyte; and up to which
    # sums beside forward's map may ask a whole group ahead.
    STAGGERED_BYTES = 300 << 10
    # Up to which the next group's x and dy fit such a cache too. Of large arrays, backward's map then asks for them
    # instead of going beside their sums, on processors where that pays. Of small arrays it does neither.
    NEXT_BYTES = 500 << 10
    # Bytes of scratch that are kept for the next call.
    SPARE_BYTES = 16 << 20


cdef inline int64_t ceil_div(int64_t a, int64_t b) noexcept nogil:
    return (a + b - 1) // b


# ----------------------------------------------------------------------------------------------------
# phases

cdef void perform(Job *job, Worker worker, int thread, int64_t first, int64_t last) noexcept nogil:
    cdef uint64_t saved = fastbn_enter()
    worker(job, thread, first, last)
    fastbn_leave(saved)


cdef extern from * nogil:
    """
    #if defined(FASTBN_DEBUG)
    __attribute__((visibility("default"))) /* tests/openmp.c takes its place */
    int64_t fastbn_take_next(char *counter);
    #else
    static
    #endif
    int64_t fastbn_take_next(char *counter)
    {
        return __atomic_fetch_add((int64_t *)counter, 1, __ATOMIC_RELAXED);
    }
    """
    int64_t fastbn_take_next(char *counter)


cdef void perform_part(Job *job, Worker worker, int64_t units, int64_t tasks, int64_t parts, int64_t part, int thread,
                       bint backwards) noexcept nogil:
    """The tasks of one part of several, and then what is left of the others."""
    cdef int64_t k, other, first, count, taken, task
    for k in range(parts):
        other = (part + k) % parts
        first = other * tasks // parts
        count = (other + 1) * tasks // parts - first
        taken = fastbn_take_next(job.taken + other * FASTBN_ALIGNMENT)
        while taken < count:
            task = first + (count - 1 - taken if backwards else taken)
            perform(job, worker, thread, task * units // tasks, (task + 1) * units // tasks)
            taken = fastbn_take_next(job.taken + other * FASTBN_ALIGNMENT)
    if job.staggered:  # a map still waits
        perform(job, worker, thread, units, units)


cdef void phase(Job *job, Worker worker, int64_t units, int threads, bint backwards) noexcept nogil:
    """Share the units 0 .. units-1 among the threads, in tasks of some that follow one another.

    Each thread begins with a part of its own, the same in every phase and call: its core has some of that in its
    caches, and does not fetch ahead what another one is writing. If there are as many units for each thread, no task
    has units of two parts.
    """
    cdef int64_t part, tasks = min(units, TASKS_PER_THREAD * threads), parts = min(threads, tasks)
    if parts <= 1:
        perform(job, worker, 0, 0, units)
        if job.staggered:
            perform(job, worker, 0, units, units)
        return
    memset(job.taken, 0, parts * FASTBN_ALIGNMENT)
    for part in prange(parts, num_threads=<int>parts, schedule="static", chunksize=1):
        perform_part(job, worker, units, tasks, parts, part, threadid(), backwards)


# ----------------------------------------------------------------------------------------------------
# blocks

cdef inline int64_t positions_of(bint planar, int64_t outer, int64_t inner) noexcept nogil:
    """Columns of a channel of an interleaved block. A planar array may be one, too, a row of which is an image: where
    planes are short and images many, that is faster than to go from plane to plane. Bits depend on it: so it is for the
    shape to say, and not for the number of channels."""
    cdef int64_t images = IMAGES_PER_POSITION if inner % FASTBN_LANES else IMAGES_OF_VECTORS
    return inner if planar and inner <= SHORT_PLANE and outer >= images * inner else 1


cdef inline int64_t mask_plane(int64_t outer, int64_t inner, int64_t itemsize) noexcept nogil:
    """Bits from a plane of the mask to the next: those that a map may take as one adjoin, others begin with a group."""
    return inner if outer >= SPREAD_ROWS and inner * itemsize < LONG_RUN_BYTES else 8 * fastbn_mask_stride(inner)


cdef inline fastbn_operand locate(const Array *array, int64_t row, int64_t channel, int64_t inner,
                                  int64_t rows) noexcept nogil:
    """The operand at (row, channel, inner), whose rows are `rows` rows of the array apart."""
    cdef fastbn_operand operand
    operand.data = NULL
    operand.row = operand.channel = 0
    if array.data != NULL:
        operand.data = array.data + row * array.outer + channel * array.channel + inner * array.inner
        operand.row = rows * array.outer
        operand.channel = array.channel
    return operand


cdef void place(Job *job, fastbn_block *b, int64_t row, int64_t channel, int64_t inner, bint mapping) noexcept nogil:
    """Point the operands of a block at the arrays; its rows, columns and channels are set. Interleaved, `channel` is a
    column."""
    cdef int64_t fold = job.map_fold if mapping else job.fold, bit
    cdef fastbn_operand none
    none.data = NULL
    none.row = none.channel = 0
    cdef int64_t column = channel
    if not job.planar:
        channel, inner = column // job.positions, column % job.positions
    b.x = locate(&job.x, row, channel, inner, fold)
    b.dy = locate(&job.dy, row, channel, inner, fold)
    b.residual = b.y = b.dx = b.dresidual = none
    if mapping or job.dy.data != NULL:
        b.residual = locate(&job.residual, row, channel, inner, fold)
    if mapping:
        b.y = locate(&job.y, row, channel, inner, fold)
        b.dx = locate(&job.dx, row, channel, inner, fold)
        b.dresidual = locate(&job.dresidual, row, channel, inner, fold)
    b.mask = none
    b.mask_bit = 0
    if job.mask != NULL:
        if job.planar:
            b.mask.channel = mask_plane(job.outer, job.inner, job.kernels.itemsize)
            bit = channel * b.mask.channel + inner
            b.mask.row = fastbn_mask_stride(job.channels * b.mask.channel)
            b.mask_bit = bit % 8
        else:
            bit = column
            b.mask.row = fastbn_mask_stride(job.width)
        b.mask.data = job.mask + row // fold * b.mask.row + bit // 8
    b.activation = job.activation
    b.negative_slope = job.negative_slope
    b.training = job.training
    b.stream = job.stream
    b.ask_ahead = job.map_asks if mapping else job.reduce_asks
    b.far = b.short_row = measured.far
    b.next_too = mapping and job.next_too
    b.plane = job.width
    b.coefficient_plane = job.known.coefficient_plane
    b.coefficients = <char *>job.known.coefficients + column * job.kernels.coefficient_size
    b.x_shift = job.known.x_shift + column


cdef inline void redirect(fastbn_operand *operand, char **buffer, const fastbn_block *b, int64_t row) noexcept nogil:
    """Let an operand be the next part of the buffer, as dense rows of `row` bytes."""
    if operand.data != NULL:
        operand.data = buffer[0]
        operand.row = row
        buffer[0] += b.rows * row


cdef void move(Job *job, const Array *array, const fastbn_operand *strided, const fastbn_operand *dense,
               const fastbn_block *b, int64_t column, bint back) noexcept nogil:
    """Copy a block of an array to its dense rows, or back. Interleaved, the block begins with `column`, and where a
    channel has several columns of a row, they are copied channel by channel."""
    cdef fastbn_copy2d copy
    cdef int64_t size = job.kernels.itemsize, columns = b.columns, rows = b.rows, stride = array.inner, at = 0, here
    if strided.data == NULL:
        return
    if not job.planar:  # `fold` rows of the array are one row of the block
        columns = min(b.columns, job.across)
        rows = b.rows * (b.columns // columns)
        if job.positions == 1:
            stride = array.channel
    while at < columns:
        copy.rows, copy.columns = rows, columns
        here = column + at
        if job.positions > 1:
            copy.columns = min(job.positions - here % job.positions, columns - at)
        copy.source_row, copy.source_column = array.outer, stride
        copy.destination_row, copy.destination_column = columns * size, size
        copy.source = (strided.data + (here // job.positions - column // job.positions) * array.channel
                       + (here % job.positions - column % job.positions) * array.inner)
        copy.destination = dense.data + at * size
        at += copy.columns
        if back:
            copy.source, copy.destination = copy.destination, <char *>copy.source
            copy.source_row, copy.destination_row = copy.destination_row, copy.source_row
            copy.source_column, copy.destination_column = copy.destination_column, copy.source_column
        job.kernels.copy2d(&copy)


cdef void run_packed(Job *job, fastbn_kernel *kernel, const fastbn_block *strided, int64_t column,
                     int thread) noexcept nogil:
    """A kernel over a block (of one planar channel, or from `column` on) of strided arrays: packed, computed,
    unpacked."""
    cdef fastbn_block dense = strided[0]
    cdef char *buffer = job.packing + thread * job.packing_size
    cdef int64_t row = strided.columns * job.kernels.itemsize
    dense.stream = dense.ask_ahead = False
    redirect(&dense.x, &buffer, strided, row)
    redirect(&dense.residual, &buffer, strided, row)
    redirect(&dense.dy, &buffer, strided, row)
    redirect(&dense.y, &buffer, strided, row)
    redirect(&dense.dx, &buffer, strided, row)
    redirect(&dense.dresidual, &buffer, strided, row)
    move(job, &job.x, &strided.x, &dense.x, strided, column, False)
    move(job, &job.residual, &strided.residual, &dense.residual, strided, column, False)
    move(job, &job.dy, &strided.dy, &dense.dy, strided, column, False)
    kernel(&dense)
    move(job, &job.y, &strided.y, &dense.y, strided, column, True)
    move(job, &job.dx, &strided.dx, &dense.dx, strided, column, True)
    move(job, &job.dresidual, &strided.dresidual, &dense.dresidual, strided, column, True)


cdef void place_planar(Job *job, fastbn_block *b, int64_t channel, int64_t channels, int64_t block,
                       bint mapping) noexcept nogil:
    """One block of each of some channels."""
    cdef int64_t row = block // job.segments * job.rows_per_block
    cdef int64_t inner = block % job.segments * job.segment
    b.rows = min(job.rows_per_block, job.outer - row)
    b.columns = min(job.inner - inner, job.segment) if job.segments > 1 else job.inner
    b.channels = channels
    b.rows_ahead, b.then_row = job.outer - row, -row
    place(job, b, row, channel, inner, mapping)
    b.sums = job.sums + block * job.kernels.sums * job.width + channel


cdef void run_planar(Job *job, fastbn_kernel *kernel, int thread, int64_t channel, int64_t channels, int64_t block,
                     bint mapping) noexcept nogil:
    """A kernel over one block of each of some channels."""
    cdef fastbn_block b
    cdef int64_t i
    if not job.packed:
        place_planar(job, &b, channel, channels, block, mapping)
        kernel(&b)
        return
    for i in range(channel, channel + channels):
        place_planar(job, &b, i, 1, block, mapping)
        run_packed(job, kernel, &b, 0, thread)


cdef void run_interleaved(Job *job, fastbn_kernel *kernel, int thread, int64_t block, int64_t row, int64_t last,
                          int64_t column, int64_t columns, bint mapping) noexcept nogil:
    """A kernel over some columns of the rows row .. last-1 of a block. What is left of the rows of the array after the
    last whole `fold` of them is a shorter row of its own."""
    cdef fastbn_block b
    cdef int64_t step, fold = job.map_fold if mapping else job.fold
    if row == job.outer // fold:
        columns = (job.outer - row * fold) * job.across
    b.columns = columns
    step = max(1, PACKED_VALUES // columns) if job.packed else last - row
    while row < last:
        b.rows = min(step, last - row)
        place(job, &b, row * fold, column, 0, mapping)
        b.sums = job.sums + block * job.kernels.sums * job.width + column
        if job.packed:
            run_packed(job, kernel, &b, column, thread)
        else:
            kernel(&b)
        row += step


cdef int64_t next_redo(Job *job, int64_t first, int64_t last) noexcept nogil:
    """The first of some channels whose sums must be made again; `last` if there is none."""
    cdef const void *found = memchr(job.known.redo + first, True, last - first)
    return last if found == NULL else <const char *>found - job.known.redo


cdef inline bint any_redo(Job *job, int64_t first, int64_t last) noexcept nogil:
    return next_redo(job, first, last) < last


include "_finish.pxi"


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
    interleaved."""
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
    if job.planar and (job.dy.data == NULL or job.activation == IDENTITY):
        values = locate(&job.x if job.dy.data == NULL else &job.dy, 0, first, 0, 1)
        job.kernels.first_values(&values, last - first, job.sums + first)
    elif job.planar:
        b.rows = b.columns = b.rows_ahead = 1
        b.then_row = 0
        b.channels = last - first
        place(job, &b, 0, first, 0, False)
        b.sums = job.sums + first
        job.reduce(&b)
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
    """The first channel (or column) of a group. Planar groups are as equal as their grain permits, the larger ones of a
    share first: within a share, which no task leaves (see `phase`), no group has more channels than the one before it,
    whose map goes beside its reduce."""
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
    first, last = first * job.finished, min(last * job.finished, job.channels)
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

cdef bint is_dense(Job *job, const Array *array) noexcept nogil:
    """Whether the planes of neighbouring channels adjoin."""
    return array.data == NULL or (array.inner == job.kernels.itemsize and array.channel == job.inner * array.inner)


cdef bint is_strided(Job *job, const Array *array) noexcept nogil:
    """Whether rows of the array are not rows of a block: adjacent values."""
    cdef int64_t size = job.kernels.itemsize
    if array.data == NULL:
        return False
    if job.planar:
        return job.inner > 1 and array.inner != size
    return (not is_dense(job, array) if job.positions > 1 else array.channel != size) or (
        job.fold > 1 and job.outer > 1 and array.outer != job.across * size)


cdef int64_t gcd(int64_t a, int64_t b) noexcept nogil:
    while b:
        a, b = b, a % b
    return a


cdef inline int64_t aligned(int64_t size) noexcept nogil:
    return ceil_div(size, FASTBN_ALIGNMENT) * FASTBN_ALIGNMENT


cdef inline bint is_aligned(int64_t address) noexcept nogil:
    return address % FASTBN_ALIGNMENT == 0


cdef bint has_whole_lines(Job *job, const Array *array) noexcept nogil:
    """Whether interleaved rows begin and end with a line of the cache."""
    return array.data == NULL or is_aligned(<int64_t>array.data | job.fold * array.outer
                                            | job.width * job.kernels.itemsize)


cdef inline bint has_no_gaps(Job *job, const Array *array) noexcept nogil:
    """Whether interleaved rows adjoin."""
    return array.data == NULL or array.outer == job.across * job.kernels.itemsize


cdef bint align_rows(Job *job, const char *written) noexcept nogil:
    """Let all rows of an interleaved map be whole lines of the cache in what it writes: if those of the array are not,
    but adjoin, longer ones that begin where a line does. False if it cannot be; a mask has no address for them."""
    cdef int64_t row = job.width * job.kernels.itemsize, rows = FASTBN_ALIGNMENT // gcd(row, FASTBN_ALIGNMENT)
    if (job.mask == NULL and not job.packed and rows * job.fold <= job.outer
            and (rows == 1 or (row < LONG_RUN_BYTES and rows * job.width <= MAP_COLUMNS))
            and (job.dresidual.data == NULL or is_aligned(job.dresidual.data - written))
            and has_no_gaps(job, &job.x) and has_no_gaps(job, &job.residual) and has_no_gaps(job, &job.dy)
            and has_no_gaps(job, &job.y) and has_no_gaps(job, &job.dx) and has_no_gaps(job, &job.dresidual)):
        job.map_fold, job.map_width = rows * job.fold, rows * job.width
        job.lead = (aligned(<int64_t>written) - <int64_t>written) // job.kernels.itemsize
        return True
    return has_whole_lines(job, &job.y) and has_whole_lines(job, &job.dx) and has_whole_lines(job, &job.dresidual)


cdef int64_t fold_of(bint planar, int64_t columns) noexcept nogil:
    """Short interleaved rows that make whole vectors together."""
    return 1 if planar or columns >= FASTBN_FOLD_BELOW else FASTBN_LANES // gcd(columns, FASTBN_LANES)


cdef bint balanced(int64_t channels, int threads) noexcept nogil:
    """Whether whole channels keep all threads busy: at most a quarter of the time lost to the last round."""
    return 4 * ceil_div(channels, threads) * threads <= 5 * channels


cdef bint spreading_pays(Job *job, bint large, bint shared_bytes) noexcept nogil:
    """Whether map takes planes that adjoin as one row: from memory, for the sake of whole lines of the cache; in the
    caches, those for which spreading coefficients was measured to cost less than their tails."""
    if not large and job.outer <= UNSPREAD_ROWS:
        return False
    if job.mask != NULL and not shared_bytes:
        return job.outer >= SPREAD_ROWS and (large or job.inner < MASKED_COLUMNS)
    if large or shared_bytes or job.inner < UNSPREAD_COLUMNS:
        return True
    if job.dy.data == NULL:
        return job.reduce != NULL
    return job.reduce == NULL or job.inner % FASTBN_LANES != 0


cdef void cut(Job *job) noexcept nogil:
    """Fix blocks and units. Nothing that cuts a sum depends on anything but the shape."""
    cdef int64_t rows, values, unit, piece, whole, arrays, all_bytes
    cdef int64_t run = job.inner * job.kernels.itemsize, total = job.outer * job.channels * run, together
    cdef bint adjoining, large, one_by_one, shared_bytes
    cdef const char *written
    cdef double least_large
    job.across = job.channels * job.positions
    job.fold = fold_of(job.planar, job.across)
    job.width = job.fold * job.across
    job.packed = (is_strided(job, &job.x) or is_strided(job, &job.residual) or is_strided(job, &job.dy)
                  or is_strided(job, &job.y) or is_strided(job, &job.dx) or is_strided(job, &job.dresidual))
    adjoining = (job.planar and not job.packed and run < LONG_RUN_BYTES
                 and is_dense(job, &job.x) and is_dense(job, &job.residual) and is_dense(job, &job.dy)
                 and is_dense(job, &job.y) and is_dense(job, &job.dx) and is_dense(job, &job.dresidual))
    job.segments = 1
    job.segment = FASTBN_PLANAR_BLOCK
    piece = min(PHASE_UNIT_BYTES, total // (job.threads * UNITS_PER_THREAD))  # without sums to cut
    if job.reduce == NULL and not job.packed:
        job.segment = max(1, piece // job.kernels.itemsize // FASTBN_PLANAR_BLOCK) * FASTBN_PLANAR_BLOCK
    whole = FASTBN_LANES // gcd(job.inner, FASTBN_LANES)  # so many channels are whole lines of the cache
    # Planes may have bytes of the mask in common: but not with those of another group.
    shared_bytes = (job.planar and job.mask != NULL
                    and mask_plane(job.outer, job.inner, job.kernels.itemsize) % FASTBN_LANES != 0)
    job.by_channel = (job.planar and job.reduce != NULL and not job.finite_first
                      and balanced(ceil_div(job.channels, whole) if shared_bytes else job.channels, job.threads))
    arrays = (1 + (job.residual.data != NULL) + (job.dy.data != NULL) + (job.y.data != NULL) + (job.dx.data != NULL)
              + (job.dresidual.data != NULL))
    all_bytes = total * arrays
    # Too large for the caches together.
    least_large = job.stream_bytes
    if job.by_channel:
        least_large *= <double>measured.stream_by_channel / measured.stream
    large = all_bytes >= least_large
    adjoining = adjoining and spreading_pays(job, large, shared_bytes)
    if job.planar:
        if job.inner > job.segment:
            job.segments = ceil_div(job.inner, job.segment)
        if job.segments > 1 or (job.reduce == NULL and not job.packed):  # without sums, in the order of memory
            job.rows_per_block = 1
        else:
            job.rows_per_block = min(job.outer, max(1, FASTBN_PLANAR_BLOCK // job.inner))
        job.blocks = job.segments * ceil_div(job.outer, job.rows_per_block)
        values = job.outer * job.inner if job.by_channel else job.rows_per_block * min(job.inner, job.segment)
        unit = (LARGE_UNIT_BYTES if large else UNIT_BYTES) if job.by_channel else PHASE_UNIT_BYTES
        job.group = max(1, min(unit // (values * job.kernels.itemsize), job.channels // job.threads))
        if adjoining and job.reduce == NULL:
            rows = max(1, piece // (job.channels * run))
            if job.dy.data == NULL and job.mask == NULL and job.inner >= UNSPREAD_COLUMNS:
                rows = min(rows, UNSPREAD_ROWS)
            else:
                rows = max(rows, SPREAD_ROWS)
            job.rows_per_block = min(rows, job.outer)
            job.blocks = ceil_div(job.outer, job.rows_per_block)
            job.group = min(max(1, piece // (job.rows_per_block * run)), job.channels)
        # Whole lines (and bytes), or pairs, which sums take in turns.
        job.grain = whole if shared_bytes else min(job.group, whole if adjoining else 2)
        job.group = max(job.group - job.group % job.grain, job.grain)
        job.groups = ceil_div(job.channels, job.group)
        job.shares = 1
        if job.by_channel:  # as many for each thread
            job.groups = min(ceil_div(job.groups, job.threads) * job.threads, ceil_div(job.channels, job.grain))
            if job.groups % job.threads == 0:
                job.shares = job.threads
    else:
        rows = job.outer // job.fold
        job.blocks = ceil_div(rows, FASTBN_INTERLEAVED_BLOCK) + (rows * job.fold < job.outer)
        job.group = GROUP_COLUMNS if job.fold == 1 else job.width
        while (job.fold == 1 and job.group > LEAST_COLUMNS
               and job.blocks * ceil_div(job.width, job.group) < job.threads * UNITS_PER_THREAD):
            job.group //= 2
        job.groups = ceil_div(job.width, job.group)
    job.units = job.map_units = job.groups * job.blocks
    # Streaming pays where the arrays are large; and where rows consist of whole lines of the cache, or are so long that
    # the lines at their ends do not matter.
    written = job.y.data if job.dy.data == NULL else job.dx.data
    job.stream = (large and written != NULL and written != job.x.data and written != job.residual.data
                  and written != job.dy.data)
    job.map_fold, job.map_width, job.lead = job.fold, job.width, 0
    if job.planar:
        job.stream = job.stream and (adjoining or run >= LONG_RUN_BYTES)
    else:
        job.stream = job.stream and (align_rows(job, written)
                                     or job.width * job.kernels.itemsize >= LONG_RUN_BYTES)
        rows = job.outer // job.map_fold
        piece = max(LEAST_UNIT_BYTES, min(UNIT_BYTES, total // job.threads))
        job.map_rows = max(1, piece // (job.map_width * job.kernels.itemsize))
        unit = ceil_div(rows, job.map_rows)
        if unit > job.threads:  # as many for each thread
            job.map_rows = ceil_div(rows, ceil_div(unit, job.threads) * job.threads)
        job.map_units = ceil_div(rows, job.map_rows) + (rows * job.map_fold < job.outer)
    job.known.coefficient_plane = job.map_width
    if job.lead > 0:  # by a whole line, as all planes begin with one
        job.known.coefficient_plane += FASTBN_ALIGNMENT // job.kernels.itemsize
    job.known.channels, job.known.count = job.channels, <double>(job.outer * job.inner)
    job.known.plane, job.known.positions, job.known.across = job.width, job.positions, job.across
    job.known.columns = job.map_width + job.lead
    if adjoining:
        job.map, job.map_beside_reduce = job.map_adjoining, job.map_adjoining_beside_reduce
    one_by_one = job.by_channel and job.map != NULL and not job.packed
    together = job.group * job.outer * run  # what reduce reads of a group
    if job.dy.data == NULL:
        job.staggered = (one_by_one and (large or together >= STAGGERED_BYTES)
                         and (run >= LONG_RUN_BYTES or (adjoining and job.inner >= FASTBN_LANES)))
        job.next_too = measured.next_too and job.staggered and together < STAGGERED_BYTES
    else:
        job.next_too = measured.next_too and one_by_one and large and 2 * together < NEXT_BYTES
        job.staggered = (one_by_one and run >= LONG_RUN_BYTES and not job.next_too
                         and (large or 2 * together >= NEXT_BYTES))
    job.map_asks = large and job.reduce == NULL and job.dy.data == NULL
    job.reduce_asks = all_bytes >= measured.ask_ahead


cdef char *take(char **cursor, int64_t size) noexcept nogil:
    cdef char *part = cursor[0]
    cursor[0] += aligned(size)
    return part


cdef int64_t lay_out(Job *job, char *memory) noexcept nogil:
    """Divide the scratch; returns its size. Called twice: to measure and to place."""
    cdef char *cursor = memory
    job.taken = take(&cursor, job.threads * FASTBN_ALIGNMENT)
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


cdef int64_t sums_size(Job *job) noexcept nogil:
    """Bytes: planes of `width` sums for each block."""
    return job.kernels.sums * job.blocks * job.width * sizeof(double)


cdef void run_in_phases(Job *job) noexcept nogil:
    cdef int64_t units
    cdef bint few = (job.channels < SERIAL_CHANNELS if job.reduce == NULL
                     else job.blocks * job.width + job.channels < SERIAL_SUMS)
    cdef int finishers = 1 if few else job.threads
    job.again = False
    job.finished = max(1, min(FASTBN_ALIGNMENT // sizeof(double), ceil_div(job.channels, finishers)))
    units = ceil_div(job.channels, job.finished)
    if job.reduce != NULL:
        phase(job, shift_channels, job.channels, finishers if job.planar and shifts_by_first(job) else 1, False)
        phase(job, reduce_units, job.units, job.threads, False)
    phase(job, finish_units, units, finishers, False)
    if job.reduce != NULL and any_redo(job, 0, job.channels):
        job.again = True
        phase(job, reduce_units, job.units, job.threads, False)
        phase(job, finish_units, units, finishers, False)
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
