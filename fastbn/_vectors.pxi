# SPDX-License-Identifier: MIT
# Vectors of a value for each channel: float64 inside, any float dtype and stride outside.

cdef extern from "numpy/arrayobject.h":
    # `dtype` is taken over: it needs a reference of its own.
    object PyArray_Empty(int rank, cnp.npy_intp *shape, cnp.dtype dtype, int fortran)


cdef cnp.ndarray new_vector(int64_t channels, cnp.dtype dtype):
    cdef cnp.npy_intp extent = channels
    Py_INCREF(dtype)
    return PyArray_Empty(1, &extent, dtype, 0)


cdef bint is_direct(cnp.ndarray vector):
    """Whether `read` and `write` can take it; NumPy converts the others."""
    cdef int number = cnp.PyArray_TYPE(vector)
    return (number == cnp.NPY_FLOAT or number == cnp.NPY_DOUBLE) and cnp.PyArray_ISBEHAVED_RO(vector)


cdef void read(const fastbn_isa *isa, double *to, cnp.ndarray vector, int64_t first, int64_t count) noexcept:
    """Some values of a direct vector as adjacent float64."""
    cdef int64_t i, stride = cnp.PyArray_STRIDE(vector, 0)
    cdef const char *place = <const char *>cnp.PyArray_DATA(vector) + first * stride
    if cnp.PyArray_TYPE(vector) == cnp.NPY_DOUBLE and stride == sizeof(double):
        memcpy(to, place, count * sizeof(double))
    elif cnp.PyArray_TYPE(vector) == cnp.NPY_DOUBLE:
        for i in range(count):
            to[i] = (<const double *>(place + i * stride))[0]
    elif stride == sizeof(float):
        isa.widen(to, <const float *>place, count)
    else:
        for i in range(count):
            to[i] = (<const float *>(place + i * stride))[0]


cdef void write(const fastbn_isa *isa, cnp.ndarray vector, int64_t first, const double *values,
                int64_t count) noexcept:
    """Adjacent float64 into some values of a direct vector, rounded."""
    cdef int64_t i, stride = cnp.PyArray_STRIDE(vector, 0)
    cdef char *place = <char *>cnp.PyArray_DATA(vector) + first * stride
    if cnp.PyArray_TYPE(vector) == cnp.NPY_DOUBLE and stride == sizeof(double):
        memcpy(place, values, count * sizeof(double))
    elif cnp.PyArray_TYPE(vector) == cnp.NPY_DOUBLE:
        for i in range(count):
            (<double *>(place + i * stride))[0] = values[i]
    elif stride == sizeof(float):
        isa.narrow(<float *>place, values, count)
    else:
        for i in range(count):
            (<float *>(place + i * stride))[0] = <float>values[i]


cdef double *load(const fastbn_isa *isa, double *to, cnp.ndarray vector) except NULL:
    """Copy a vector to adjacent float64."""
    if not is_direct(vector):
        vector = vector.astype("f8")
    read(isa, to, vector, 0, cnp.PyArray_DIM(vector, 0))
    return to


cdef int give(const fastbn_isa *isa, fastbn_vector *given, object vector, double *row, bint keep,
              bint training) except -1:
    """An optional vector as finish reads it: its copy in a row of the statistics, float64 if that is kept. In inference
    it need not be one: y, which may overlap it, is written after all channels have been finished."""
    if vector is None:
        return 0
    given.data = row
    cdef bint as_it_is = (not keep and is_direct(vector)
                          and cnp.PyArray_STRIDE(vector, 0) == cnp.PyArray_ITEMSIZE(vector))
    given.is_float = as_it_is and cnp.PyArray_TYPE(vector) == cnp.NPY_FLOAT
    if not as_it_is:
        load(isa, row, vector)
    elif training:
        memcpy(row, cnp.PyArray_DATA(vector), cnp.PyArray_NBYTES(vector))
    else:
        given.data = cnp.PyArray_DATA(vector)
    return 0


cdef rounded(const fastbn_isa *isa, cnp.ndarray values, dtype):
    """The values in this dtype, None for None. What is too large for it becomes Inf, without a warning."""
    if dtype is None:
        return None
    if dtype is FLOAT64:
        return values
    cdef int64_t channels = cnp.PyArray_DIM(values, 0)
    cdef cnp.ndarray vector = new_vector(channels, dtype)
    if is_direct(vector):
        write(isa, vector, 0, <const double *>cnp.PyArray_DATA(values), channels)
        return vector
    # What ml_dtypes adds to NumPy is converted by way of float32: rounded to odd there, it is rounded once.
    with numpy.errstate(all="ignore"):
        if vector.dtype.kind == "V":
            near = values.astype("f4")
            bits = near.view("i4")
            inexact = (near != values) & (bits & 1 == 0) & (values == values)
            bits += numpy.where(inexact, numpy.where(abs(values) > abs(near), 1, -1), 0).astype("i4")
            values = near
        vector[...] = values
    return vector


cdef enum:
    UPDATED_TOGETHER = 256  # values, in the L1 cache


cdef int update(const fastbn_isa *isa, cnp.ndarray running, cnp.ndarray prepared, const double *batch, double divisor,
                double momentum) except -1:
    """running = (1 - momentum) * running + momentum * batch / divisor: what was prepared, or of a direct vector."""
    cdef double values[UPDATED_TOGETHER]
    cdef int64_t channels = cnp.PyArray_DIM(running, 0), first, count
    if prepared is not None:
        return cnp.PyArray_CopyInto(running, prepared)
    for first in range(0, channels, UPDATED_TOGETHER):
        count = min(UPDATED_TOGETHER, channels - first)
        read(isa, values, running, first, count)
        isa.update(values, batch + first, divisor, momentum, count)
        write(isa, running, first, values, count)
    return 0


cdef cnp.ndarray prepared_update(const fastbn_isa *isa, cnp.ndarray running, const double *batch, double divisor,
                                 double momentum):
    """The same in a new vector, if that can fail: None for a direct one."""
    if is_direct(running):
        return None
    cdef cnp.ndarray values = new_vector(cnp.PyArray_DIM(running, 0), FLOAT64)
    load(isa, <double *>cnp.PyArray_DATA(values), running)
    update(isa, values, None, batch, divisor, momentum)
    return rounded(isa, values, running.dtype)
