# SPDX-License-Identifier: MIT
# A job: what a call asks of the kernels, and how it is cut into blocks, groups and units of work.

cdef struct Array:  # strides in bytes; data is NULL where an optional array is absent
    char *data
    int64_t outer, channel, inner


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
    # what that means
    int64_t run        # bytes of a plane
    bint packed        # some array is strided: blocks pass through `packing`
    bint large         # all arrays together are too large for the caches
    bint adjoining     # planar: the map takes neighbouring planes as one row
    bint shared_bytes  # planes have bytes of the mask in common, but must not with those of another group
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
    int64_t channels_per_finish  # in phases
    bint by_channel   # planar: all three steps for a group before the next
    bint staggered    # and the map of a group beside the reduce of the next
    bint in_order     # planar, adjoining: map goes row by row, with coefficients picked for each vector
    bint map_asks     # forward's map reads memory, and asks for it ahead
    bint reduce_asks  # reduce reads what the caches may not have any more, and asks for it (interleaved: further) ahead
    bint row_by_row   # interleaved: map does not take several rows together
    bint next_too     # what the reduce of the next group will read is asked for: it is small, and this processor gains
    int64_t stream_bytes  # of all arrays: so large, results are stored past the caches
    bint stream
    bint again        # in the course of the job: reduce does only the channels to redo
    # scratch, one allocation
    char *taken  # tasks that have been taken of each thread's part, for each step, a line of the cache each
    char *waiting  # staggered: the group of a thread that has yet to be mapped, or -1, likewise
    double *sums
    char *packing     # a part for each thread
    int64_t packing_size


cdef enum:
    # Values that a thread packs at once: no block of a channel and no folded row is larger.
    PACKED_VALUES = FASTBN_PLANAR_BLOCK
    # Columns of a group where interleaved rows are wide; at most PACKED_VALUES. Fewer where there are few blocks, but
    # as many as are whole lines of the cache.
    GROUP_COLUMNS = 1024
    LEAST_COLUMNS = 128
    # Values of a plane, at most, that are columns of an interleaved block, and images for each of them, at least; more
    # where planes are whole vectors. Bits depend on these.
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
    # Bytes of rows that a map takes together if they are shorter and come from afar.
    LONG_ROW_BYTES = 256
    # Rows of adjoining planes for which spreading their coefficients pays, if they are not taken in order; and rows for
    # which it does not.
    SPREAD_ROWS = 16
    UNSPREAD_ROWS = 3
    # Vectors that a map in order has numbers for, at most, where the L1 cache holds more arrays besides.
    BACKWARD_NUMBERED = 320
    # Values of a plane that inference, in the caches, takes by itself.
    UNSPREAD_COLUMNS = 8 * FASTBN_LANES
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


cdef inline int64_t positions_of(bint planar, int64_t outer, int64_t inner) noexcept nogil:
    """Columns of a channel of an interleaved block. A planar array may be one, too, a row of which is an image: where
    planes are short and images many, that is faster than to go from plane to plane. Bits depend on it: so it is for the
    shape to say, and not for the number of channels."""
    cdef int64_t images = IMAGES_PER_POSITION if inner % FASTBN_LANES else IMAGES_OF_VECTORS
    return inner if planar and inner <= SHORT_PLANE and outer >= images * inner else 1


cdef inline int64_t mask_plane(int64_t outer, int64_t inner, int64_t itemsize) noexcept nogil:
    """Bits from a plane of the mask to the next: those that a map may take as one adjoin, others begin with a group."""
    return inner if outer >= SPREAD_ROWS and inner * itemsize < FASTBN_LONG_RUN_BYTES else 8 * fastbn_mask_stride(inner)


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
            and (rows == 1 or (row < FASTBN_LONG_RUN_BYTES and rows * job.width <= MAP_COLUMNS))
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


cdef bint takes_in_order(Job *job) noexcept nogil:
    """Whether the map of planes that adjoin picks coefficients for each vector, in the order of memory. Where rows are
    many, spreading is dear only for planes that the caches hold, and not of half precision."""
    cdef int64_t numbered = job.inner // gcd(job.inner, FASTBN_LANES)
    return (job.kernels.picks and job.mask == NULL and job.dresidual.data == NULL and job.inner >= FASTBN_LANES
            and numbered <= (FASTBN_MOST_NUMBERED if job.dy.data == NULL else BACKWARD_NUMBERED)
            and (job.reduce == NULL or job.outer <= UNSPREAD_ROWS
                 or (measured.in_order and job.kernels.picks_cheaply)))


cdef bint adjoining_pays(Job *job) noexcept nogil:
    """Whether map takes planes that adjoin as one row: from memory, for the sake of whole lines of the cache; in the
    caches, those for which their coefficients were measured to cost less than their tails."""
    if job.mask != NULL and not job.shared_bytes:
        return job.outer >= SPREAD_ROWS and (job.large or job.inner < MASKED_COLUMNS)
    if job.large or job.shared_bytes:
        return True
    if job.outer <= UNSPREAD_ROWS and not job.in_order:
        return False
    if job.inner < UNSPREAD_COLUMNS:
        return True
    if job.dy.data == NULL:
        return job.reduce != NULL
    return job.reduce == NULL or job.inner % FASTBN_LANES != 0


cdef bint is_adjoining(Job *job) noexcept nogil:
    """Whether the planes of neighbouring channels adjoin in all arrays, and are short."""
    return (job.planar and not job.packed and job.run < FASTBN_LONG_RUN_BYTES
            and is_dense(job, &job.x) and is_dense(job, &job.residual) and is_dense(job, &job.dy)
            and is_dense(job, &job.y) and is_dense(job, &job.dx) and is_dense(job, &job.dresidual))


cdef void cut_planar(Job *job, int64_t piece) noexcept nogil:
    """Blocks of channels, groups and units. Without sums, which want blocks of a fixed size, blocks are pieces of so
    many bytes in the order of memory."""
    cdef bint in_pieces = job.reduce == NULL and not job.packed
    # So many channels are whole lines of the cache (and bytes of a mask).
    cdef int64_t whole = FASTBN_LANES // gcd(job.inner, FASTBN_LANES)
    cdef int64_t values, unit_bytes = PHASE_UNIT_BYTES
    job.segment = FASTBN_PLANAR_BLOCK
    if in_pieces:
        job.segment = max(1, piece // job.kernels.itemsize // FASTBN_PLANAR_BLOCK) * FASTBN_PLANAR_BLOCK
    job.segments = max(1, ceil_div(job.inner, job.segment))
    if job.adjoining and job.reduce == NULL:
        job.rows_per_block = max(1 if job.in_order else SPREAD_ROWS, piece // (job.channels * job.run))
        job.rows_per_block = min(job.rows_per_block, job.outer)
        job.group = min(max(1, piece // (job.rows_per_block * job.run)), job.channels)
    else:
        job.rows_per_block = 1
        if job.segments == 1 and not in_pieces:
            job.rows_per_block = min(job.outer, max(1, FASTBN_PLANAR_BLOCK // job.inner))
        values = job.rows_per_block * min(job.inner, job.segment)
        if job.by_channel:
            values = job.outer * job.inner
            unit_bytes = LARGE_UNIT_BYTES if job.large else UNIT_BYTES
        job.group = max(1, min(unit_bytes // (values * job.kernels.itemsize), job.channels // job.threads))
    job.blocks = job.segments * ceil_div(job.outer, job.rows_per_block)
    # Groups begin with whole lines, or are pairs, which sums take in turns.
    job.grain = whole if job.shared_bytes else min(job.group, whole if job.adjoining else 2)
    job.group = max(job.group - job.group % job.grain, job.grain)
    job.groups = ceil_div(job.channels, job.group)
    job.shares = 1
    if job.by_channel:  # as many for each thread
        job.groups = min(ceil_div(job.groups, job.threads) * job.threads, ceil_div(job.channels, job.grain))
        if job.groups % job.threads == 0:
            job.shares = job.threads


cdef void cut_interleaved(Job *job) noexcept nogil:
    """Blocks of rows, and groups of their columns."""
    cdef int64_t rows = job.outer // job.fold
    job.blocks = ceil_div(rows, FASTBN_INTERLEAVED_BLOCK) + (rows * job.fold < job.outer)
    job.group = GROUP_COLUMNS if job.fold == 1 else job.width
    while (job.fold == 1 and job.group > LEAST_COLUMNS
           and job.blocks * ceil_div(job.width, job.group) < job.threads * UNITS_PER_THREAD):
        job.group //= 2
    job.groups = ceil_div(job.width, job.group)


cdef void cut_interleaved_map(Job *job, const char *written, int64_t x_bytes) noexcept nogil:
    """Units of its rows. Streaming pays where they consist of whole lines of the cache, or are so long that the lines
    at their ends do not matter."""
    cdef int64_t rows, units, unit_bytes = max(LEAST_UNIT_BYTES, min(UNIT_BYTES, x_bytes // job.threads))
    job.stream = job.stream and (align_rows(job, written) or job.width * job.kernels.itemsize >= FASTBN_LONG_RUN_BYTES)
    rows = job.outer // job.map_fold
    job.map_rows = max(1, unit_bytes // (job.map_width * job.kernels.itemsize))
    units = ceil_div(rows, job.map_rows)
    if units > job.threads:  # as many for each thread
        job.map_rows = ceil_div(rows, ceil_div(units, job.threads) * job.threads)
    job.map_units = ceil_div(rows, job.map_rows) + (rows * job.map_fold < job.outer)


cdef void choose_tactics(Job *job, int64_t all_bytes) noexcept nogil:
    """What goes beside what, and who asks for memory ahead, as measured on this kind of processor."""
    cdef bint one_by_one = job.by_channel and job.map != NULL and not job.packed
    cdef int64_t together = job.group * job.outer * job.run  # what reduce reads of a group
    cdef bint far = all_bytes >= measured.ask_ahead
    if job.dy.data == NULL:
        job.staggered = (one_by_one and (job.large or together >= STAGGERED_BYTES)
                         and (job.run >= FASTBN_LONG_RUN_BYTES or (job.adjoining and job.inner >= FASTBN_LANES)))
        job.next_too = measured.next_too and job.staggered and together < STAGGERED_BYTES
    else:
        job.next_too = measured.next_too and one_by_one and job.large and 2 * together < NEXT_BYTES
        job.staggered = (one_by_one and job.run >= FASTBN_LONG_RUN_BYTES and not job.next_too
                         and (job.large or 2 * together >= NEXT_BYTES) and 2 * together <= measured.most_beside)
    # Few rows are not worth turns with sums.
    job.in_order = job.in_order and (not job.staggered or job.outer <= UNSPREAD_ROWS)
    # Where stores go past the caches row by row, they hold up the reading of x also after sums.
    job.map_asks = (job.large and job.dy.data == NULL
                    and (job.reduce == NULL or (not job.planar and not measured.tiled)))
    job.reduce_asks = far if job.planar else job.large and measured.short_strips
    # Rows together share coefficients, but what they store to is not one piece of memory.
    job.row_by_row = (measured.row_by_row and not job.planar
                      and job.width * job.kernels.itemsize >= (LONG_ROW_BYTES if far else FASTBN_LONG_RUN_BYTES))


cdef void tell_finish(Job *job) noexcept nogil:
    job.known.channels, job.known.count = job.channels, <double>(job.outer * job.inner)
    job.known.plane, job.known.positions, job.known.across = job.width, job.positions, job.across
    job.known.columns = job.map_width + job.lead
    job.known.coefficient_plane = job.map_width
    if job.lead > 0:  # by a whole line, as all planes begin with one
        job.known.coefficient_plane += FASTBN_ALIGNMENT // job.kernels.itemsize


cdef void cut(Job *job) noexcept nogil:
    """Fix blocks and units. Nothing that cuts a sum depends on anything but the shape."""
    cdef int64_t x_bytes = job.outer * job.channels * job.inner * job.kernels.itemsize
    cdef int64_t all_bytes = x_bytes * (1 + (job.residual.data != NULL) + (job.dy.data != NULL) + (job.y.data != NULL)
                                        + (job.dx.data != NULL) + (job.dresidual.data != NULL))
    cdef const char *written = job.y.data if job.dy.data == NULL else job.dx.data
    cdef int64_t channels = job.channels
    cdef double least_large = job.stream_bytes
    job.run = job.inner * job.kernels.itemsize
    job.across = job.channels * job.positions
    job.fold = fold_of(job.planar, job.across)
    job.width = job.fold * job.across
    job.packed = (is_strided(job, &job.x) or is_strided(job, &job.residual) or is_strided(job, &job.dy)
                  or is_strided(job, &job.y) or is_strided(job, &job.dx) or is_strided(job, &job.dresidual))
    job.shared_bytes = (job.planar and job.mask != NULL
                        and mask_plane(job.outer, job.inner, job.kernels.itemsize) % FASTBN_LANES != 0)
    if job.shared_bytes:
        channels = ceil_div(job.channels, FASTBN_LANES // gcd(job.inner, FASTBN_LANES))
    job.by_channel = (job.planar and job.reduce != NULL and not job.finite_first and balanced(channels, job.threads))
    if job.by_channel:
        least_large *= <double>measured.stream_by_channel / measured.stream
    elif job.reduce == NULL:
        least_large *= <double>measured.stream_given / measured.stream
    job.large = all_bytes >= least_large
    job.in_order = takes_in_order(job)
    job.adjoining = is_adjoining(job) and adjoining_pays(job)
    if job.planar:
        cut_planar(job, min(PHASE_UNIT_BYTES, x_bytes // (job.threads * UNITS_PER_THREAD)))
    else:
        cut_interleaved(job)
    job.units = job.map_units = job.groups * job.blocks
    job.map_fold, job.map_width, job.lead = job.fold, job.width, 0
    job.stream = (job.large and written != NULL and written != job.x.data and written != job.residual.data
                  and written != job.dy.data)
    if job.planar:
        job.stream = job.stream and (job.adjoining or job.run >= FASTBN_LONG_RUN_BYTES)
    else:
        cut_interleaved_map(job, written, x_bytes)
    if job.adjoining:
        job.map, job.map_beside_reduce = job.map_adjoining, job.map_adjoining_beside_reduce
    choose_tactics(job, all_bytes)
    tell_finish(job)
