# SPDX-License-Identifier: MIT
# Blocks: a part of a job as a kernel takes it, packed first where its arrays are strided.

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
    b.in_order = job.in_order
    b.tiled = measured.tiled
    b.row_by_row = job.row_by_row
    b.short_strips = measured.short_strips
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
