# SPDX-License-Identifier: MIT
# Questions about its arguments that every call asks; here, since small calls would wait for Python: what is known of
# such options, what a plan of x follows from, and whether arrays need a closer look.

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.dict cimport PyDict_GetItem
from cpython.ref cimport PyObject


cdef enum:
    OPTIONS = 12
    # As many combinations of options as a program may have in a loop; looked through one by one.
    MOST_CALLS = 16


cdef class Accepted:
    cdef dict defaults
    cdef tuple names
    cdef bint is_array[OPTIONS]
    cdef list calls  # of (values, result)

    def __init__(self, dict defaults, tuple arrays):
        self.defaults, self.names = defaults, tuple(defaults)
        if len(self.names) != OPTIONS:
            raise ValueError(f"expected {OPTIONS} options, got {len(self.names)}")
        for i in range(OPTIONS):
            self.is_array[i] = self.names[i] in arrays
        self.calls = []

    cdef bint find(self, dict given, PyObject **values, list arrays):
        """The values of all options, borrowed, of arrays whether there is one; False if there are others."""
        cdef Py_ssize_t known = 0
        cdef object there_is
        cdef int i
        for i in range(OPTIONS):
            values[i] = PyDict_GetItem(given, self.names[i])
            if values[i] == NULL:
                values[i] = PyDict_GetItem(self.defaults, self.names[i])
            else:
                known += 1
            if self.is_array[i]:
                arrays.append(<object>values[i])
                there_is = values[i] != <PyObject *>None
                values[i] = <PyObject *>there_is
        return known == len(given)

    def recall(self, dict given):
        cdef PyObject *values[OPTIONS]
        cdef list arrays = []
        cdef tuple call, before
        cdef int i
        if not self.find(given, values, arrays):
            return None
        for call in self.calls:
            before = call[0]
            i = 0
            while i < OPTIONS and values[i] == <PyObject *>before[i]:
                i += 1
            if i == OPTIONS:
                return call[1], arrays
        return None

    def remember(self, dict given, result):
        cdef PyObject *values[OPTIONS]
        cdef int i
        self.find(given, values, [])
        if len(self.calls) >= MOST_CALLS:
            self.calls.clear()
        self.calls.append((tuple([<object>values[i] for i in range(OPTIONS)]), result))


def description(cnp.ndarray array, int axis):
    cdef int64_t words[2 * cnp.NPY_MAXDIMS + 2]
    cdef int i, rank = cnp.PyArray_NDIM(array)
    words[0] = cnp.PyArray_TYPE(array) << 8 | axis
    words[1] = cnp.PyArray_ITEMSIZE(array) << 8 | (cnp.PyArray_ISALIGNED(array) << 1) | cnp.PyArray_ISNOTSWAPPED(array)
    for i in range(rank):
        words[2 + i] = cnp.PyArray_DIM(array, i)
        words[2 + rank + i] = cnp.PyArray_STRIDE(array, i)
    return PyBytes_FromStringAndSize(<const char *>words, (2 + 2 * rank) * sizeof(int64_t))


cdef (uint64_t, uint64_t) span(cnp.ndarray array):
    """The first byte and the one behind the last; the same for an empty array."""
    cdef uint64_t first = <uint64_t>cnp.PyArray_DATA(array), last = first
    cdef int64_t extent, stride
    cdef int axis
    for axis in range(cnp.PyArray_NDIM(array)):
        extent, stride = cnp.PyArray_DIM(array, axis), cnp.PyArray_STRIDE(array, axis)
        if extent == 0:
            return first, first
        if stride < 0:
            first += (extent - 1) * stride
        else:
            last += (extent - 1) * stride
    return first, last + cnp.PyArray_ITEMSIZE(array)


cpdef bint spans_overlap(cnp.ndarray a, cnp.ndarray b):
    cdef uint64_t first_a, last_a, first_b, last_b
    if b is None:
        return False
    first_a, last_a = span(a)
    first_b, last_b = span(b)
    return first_a < last_b and first_b < last_a and first_a < last_a and first_b < last_b


cdef bint is_like(cnp.ndarray x, other, bint written):
    """Whether it is a plain array with the dtype, shape and strides of x."""
    cdef int axis
    if not cnp.PyArray_CheckExact(other):
        return False
    cdef cnp.ndarray array = <cnp.ndarray>other
    if (cnp.PyArray_TYPE(array) != cnp.PyArray_TYPE(x) or cnp.PyArray_NDIM(array) != cnp.PyArray_NDIM(x)
            or not cnp.PyArray_ISBEHAVED_RO(array) or (written and not cnp.PyArray_ISWRITEABLE(array))):
        return False
    for axis in range(cnp.PyArray_NDIM(x)):
        if (cnp.PyArray_DIM(array, axis) != cnp.PyArray_DIM(x, axis)
                or cnp.PyArray_STRIDE(array, axis) != cnp.PyArray_STRIDE(x, axis)):
            return False
    return True


cdef bint is_plain_vector(vector, int64_t channels, bint written):
    """Or None."""
    if vector is None:
        return True
    return (cnp.PyArray_CheckExact(vector) and cnp.PyArray_NDIM(vector) == 1
            and cnp.PyArray_DIM(vector, 0) == channels and is_direct(vector)
            and (not written or (cnp.PyArray_ISWRITEABLE(vector) and cnp.PyArray_STRIDE(vector, 0) != 0)))


cdef bint is_ordinary_out(cnp.ndarray x, companion, out, bint over_x, bint over_companion):
    return (is_like(x, out, True)
            and ((over_x and out is x) or not spans_overlap(out, x))
            and ((over_companion and out is companion) or not spans_overlap(out, companion)))


def are_ordinary(cnp.ndarray x, residual, out, bint over_x, bint over_residual, int64_t channels, gamma, beta,
                 running_mean, running_var, bint update):
    if not (is_plain_vector(gamma, channels, False) and is_plain_vector(beta, channels, False)
            and is_plain_vector(running_mean, channels, update) and is_plain_vector(running_var, channels, update)):
        return False
    if residual is not None and not is_like(x, residual, False):
        return False
    if update and (spans_overlap(running_mean, running_var)
                   or spans_overlap(running_mean, x) or spans_overlap(running_mean, residual)
                   or spans_overlap(running_var, x) or spans_overlap(running_var, residual)):
        return False
    return out is None or (is_ordinary_out(x, residual, out, over_x, over_residual)
                           and not spans_overlap(out, running_mean) and not spans_overlap(out, running_var))


def is_ordinary_gradient(cnp.ndarray x, dy, out):
    return is_like(x, dy, False) and (out is None or is_ordinary_out(x, dy, out, False, True))
