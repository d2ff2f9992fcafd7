# SPDX-License-Identifier: MIT
# What the trainer cannot say in NumPy: windows of images gathered into a matrix (im2col) and scattered back (col2im),
# the largest value of windows, and a loop on the threads that compute batch normalization. The definitions in NumPy are
# in tests/test_nn_windows.py.

from cython cimport floating
from cython.parallel cimport prange
from libc.stdint cimport int32_t


def for_each(function, int count, int num_threads):
    """Call ``function(i)`` for i from 0 to `count` - 1, on OpenMP's threads.

    They are the same that compute batch normalization. OpenMP's threads spin for a while after their work, and threads
    of another kind would have to share the cores with them.
    """
    cdef int i
    for i in prange(count, nogil=True, num_threads=num_threads, schedule="dynamic", chunksize=1):
        with gil:
            function(i)


# The windows of an image, in this order: its channels, height and width; height and width of a window, of a stride;
# zeros above the image and to its left; windows from top to bottom and from left to right.
cdef struct Geometry:
    Py_ssize_t channels, height, width, kernel_h, kernel_w, stride_h, stride_w, top, left, out_h, out_w


cdef Geometry unpack(tuple numbers) except *:
    cdef Geometry g
    (g.channels, g.height, g.width, g.kernel_h, g.kernel_w, g.stride_h, g.stride_w, g.top, g.left,
     g.out_h, g.out_w) = numbers
    return g


cdef inline void run(floating *columns, floating *x, Py_ssize_t count, Py_ssize_t step, bint back) noexcept nogil:
    """Every `step`-th value of x into the matrix; or back, and then added, because windows overlap."""
    cdef Py_ssize_t i
    if back:
        if step == 1:
            for i in range(count):
                x[i] += columns[i]
        else:
            for i in range(count):
                x[i * step] += columns[i]
    elif step == 1:
        for i in range(count):
            columns[i] = x[i]
    else:
        for i in range(count):
            columns[i] = x[i * step]


cdef inline void zeros(floating *columns, Py_ssize_t count, bint back) noexcept nogil:
    """Where windows see the padding."""
    cdef Py_ssize_t i
    if not back:
        for i in range(count):
            columns[i] = 0


cdef void exchange_nhwc(floating *x, floating *columns, Py_ssize_t line, Py_ssize_t lines, Geometry g,
                        bint back) noexcept nogil:
    """Rows of the matrix are windows, their values in the order (kernel_h, kernel_w, channels)."""
    cdef Py_ssize_t row, ow, i, ih, iw, before, behind, length = g.kernel_w * g.channels
    cdef floating *image
    for row in range(line, line + lines):
        image = x + row // g.out_h * g.height * g.width * g.channels
        for ow in range(g.out_w):
            iw = ow * g.stride_w - g.left
            before = min(max(-iw, 0), g.kernel_w) * g.channels
            behind = min(max(iw + g.kernel_w - g.width, 0), g.kernel_w) * g.channels
            for i in range(g.kernel_h):
                ih = row % g.out_h * g.stride_h - g.top + i
                if ih < 0 or ih >= g.height or before + behind >= length:
                    zeros(columns, length, back)
                else:
                    zeros(columns, before, back)
                    run(columns + before, image + (ih * g.width + iw) * g.channels + before,
                        length - before - behind, 1, back)
                    zeros(columns + length - behind, behind, back)
                columns += length


cdef inline void seeing(Py_ssize_t j, Geometry g, Py_ssize_t *first, Py_ssize_t *last) noexcept nogil:
    """The windows of a line, from `first` to before `last`, that see the image in their column j."""
    first[0] = min(max((g.left - j + g.stride_w - 1) // g.stride_w, 0), g.out_w)
    last[0] = max(min((g.width - 1 + g.left - j) // g.stride_w + 1, g.out_w), first[0])


cdef void exchange_nchw(floating *x, floating *columns, Py_ssize_t line, Py_ssize_t lines, Geometry g,
                        bint back) noexcept nogil:
    """Columns of the matrix are windows, its rows in the order (channels, kernel_h, kernel_w). Lines of one image."""
    cdef Py_ssize_t _channel, i, j, row, ih, first, last
    x += line // g.out_h * g.channels * g.height * g.width
    for _channel in range(g.channels):
        for i in range(g.kernel_h):
            for j in range(g.kernel_w):
                seeing(j, g, &first, &last)
                for row in range(line % g.out_h, line % g.out_h + lines):
                    ih = row * g.stride_h - g.top + i
                    if ih < 0 or ih >= g.height:
                        zeros(columns, g.out_w, back)
                    else:
                        zeros(columns, first, back)
                        run(columns + first, x + ih * g.width + first * g.stride_w - g.left + j,
                            last - first, g.stride_w, back)
                        zeros(columns + last, g.out_w - last, back)
                    columns += g.out_w
        x += g.height * g.width


def exchange(floating[:, :, :, ::1] x, floating[::1] columns, Py_ssize_t line, Py_ssize_t lines, tuple geometry,
             bint channels_last, bint back):
    """Gather `lines` lines of windows, counted through all images, into `columns`; or add them back to `x`. One matrix
    for all lines, or in NCHW one after the other for each image."""
    cdef Geometry g = unpack(geometry)
    cdef Py_ssize_t count, place = 0, last = line + lines
    with nogil:
        if channels_last:
            exchange_nhwc(&x[0, 0, 0, 0], &columns[0], line, lines, g, back)
        else:
            while line < last:
                count = min(last - line, g.out_h - line % g.out_h)
                exchange_nchw(&x[0, 0, 0, 0], &columns[place], line, count, g, back)
                place += count * g.out_w * g.channels * g.kernel_h * g.kernel_w
                line += count


cdef extern from * nogil:
    """
    /* The larger of best[i] and x[i * step], and its place: at + i * along. A NaN is larger than everything: it must
       not get lost. With `restrict`, for which Cython has no word and which gcc forgets when it inlines, without
       branches and with steps that it knows, compilers use vectors. */
    #define LARGER(name, real) \\
        __attribute__((always_inline)) static inline void \\
        name##_by(real *restrict best, int *restrict place, const real *restrict x, int at, Py_ssize_t count, \\
                  Py_ssize_t step, int along) \\
        { \\
            for (Py_ssize_t i = 0; i < count; i++) { \\
                real old = best[i], value = x[i * step]; \\
                int before = place[i], here = at + (int)i * along; \\
                _Bool keep = (old >= value) | (old != old); \\
                best[i] = keep ? old : value; \\
                place[i] = keep ? before : here; \\
            } \\
        } \\
        __attribute__((noinline)) static void \\
        name(real *restrict best, int *restrict place, const real *restrict x, int at, Py_ssize_t count, \\
             Py_ssize_t step, int along) \\
        { \\
            if (along == 0) name##_by(best, place, x, at, count, 1, 0); \\
            else if (step == 1) name##_by(best, place, x, at, count, 1, 1); \\
            else if (step == 2) name##_by(best, place, x, at, count, 2, 2); \\
            else name##_by(best, place, x, at, count, step, (int)step); \\
        }
    LARGER(larger_float, float)
    LARGER(larger_double, double)
    """
    void larger_float(float *best, int32_t *place, const float *x, int32_t at, Py_ssize_t count, Py_ssize_t step,
                      int along)
    void larger_double(double *best, int32_t *place, const double *x, int32_t at, Py_ssize_t count, Py_ssize_t step,
                       int along)


cdef inline void larger(floating *best, int32_t *place, floating *x, int32_t at, Py_ssize_t count, Py_ssize_t step,
                        int along) noexcept nogil:
    if floating is float:
        larger_float(best, place, x, at, count, step, along)
    else:
        larger_double(best, place, x, at, count, step, along)


cdef void pool_pixels(floating *image, floating *best, int32_t *place, Geometry g) noexcept nogil:
    """Window after window of one image, its channels side by side."""
    cdef Py_ssize_t oh, ow, ih, iw, c, top, left
    cdef int32_t at
    for oh in range(g.out_h):
        top = oh * g.stride_h - g.top
        for ow in range(g.out_w):
            left = ow * g.stride_w - g.left
            at = <int32_t>(max(top, 0) * g.width + max(left, 0))
            for c in range(g.channels):
                best[c] = image[at * g.channels + c]
                place[c] = at
            for ih in range(max(top, 0), min(top + g.kernel_h, g.height)):
                for iw in range(max(left, 0), min(left + g.kernel_w, g.width)):
                    at = <int32_t>(ih * g.width + iw)
                    larger(best, place, image + at * g.channels, at, g.channels, 1, 0)
            best += g.channels
            place += g.channels


cdef void pool_lines(floating *image, floating *best, int32_t *place, Geometry g) noexcept nogil:
    """One channel: line after line of windows, place after place of all windows of a line."""
    cdef Py_ssize_t oh, ow, ih, j, top, first, last
    cdef int32_t at
    for oh in range(g.out_h):
        top = oh * g.stride_h - g.top
        for ow in range(g.out_w):
            at = <int32_t>(max(top, 0) * g.width + max(ow * g.stride_w - g.left, 0))
            best[ow] = image[at]
            place[ow] = at
        for ih in range(max(top, 0), min(top + g.kernel_h, g.height)):
            for j in range(g.kernel_w):
                seeing(j, g, &first, &last)
                at = <int32_t>(ih * g.width + first * g.stride_w - g.left + j)
                larger(best + first, place + first, image + at, at, last - first, g.stride_w, <int>g.stride_w)
        best += g.out_w
        place += g.out_w


def max_pool(floating[:, :, :, ::1] x, floating[:, :, :, ::1] y, int32_t[:, :, :, ::1] places, tuple geometry):
    """Maximum of each window of x (N, H, W, C), and its place in x's image; the padding takes no part."""
    cdef Geometry g = unpack(geometry)
    cdef Py_ssize_t n
    with nogil:
        for n in range(x.shape[0]):
            if g.channels == 1:
                pool_lines(&x[n, 0, 0, 0], &y[n, 0, 0, 0], &places[n, 0, 0, 0], g)
            else:
                pool_pixels(&x[n, 0, 0, 0], &y[n, 0, 0, 0], &places[n, 0, 0, 0], g)


def max_unpool(floating[:, :, :, ::1] dy, int32_t[:, :, :, ::1] places, floating[:, :, :, ::1] dx):
    """Add the gradient of each window to the place of its maximum."""
    cdef Py_ssize_t n, i, c, _window, channels = dy.shape[3], windows = dy.shape[1] * dy.shape[2]
    cdef floating *image
    cdef floating *gradient
    cdef int32_t *place
    with nogil:
        for n in range(dy.shape[0]):
            image, gradient, place = &dx[n, 0, 0, 0], &dy[n, 0, 0, 0], &places[n, 0, 0, 0]
            if channels == 1:
                for i in range(windows):
                    image[place[i]] += gradient[i]
            else:
                for _window in range(windows):
                    for c in range(channels):
                        image[place[c] * channels + c] += gradient[c]
                    gradient += channels
                    place += channels
