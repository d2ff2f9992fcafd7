"""What the kernels are made of: functions of a thread, and of the threads of a block together."""

# The code is Numba's: its types are inferred, so there is nothing to annotate.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numba import cuda

from fastbn import _core

from ._access import FORMATS, SIMULATOR, scalar

# Of a negative number math.sqrt of Python makes an exception, that of the GPU NaN.
sqrt = np.sqrt if SIMULATOR else math.sqrt

# Codes of the dtypes of parameters.
CODES = {code: index for index, code in enumerate(FORMATS)}

peek_f32, poke_f32 = scalar("f32")
peek_f64, poke_f64 = scalar("f64")
peek_f16, poke_f16 = scalar("f16")
peek_bf16, poke_bf16 = scalar("bf16")


@cuda.jit(device=True)
def parameter(values, channel, default):
    """A value of gamma, beta or a running statistic as float64."""
    address, code, stride = values
    if address == 0:
        return default
    address += channel * stride
    if code == 0:
        return peek_f32(address)
    if code == 1:
        return peek_f64(address)
    if code == 2:
        return peek_f16(address)
    return peek_bf16(address)


@cuda.jit(device=True)
def set_parameter(values, channel, value):
    """Write a value of a running statistic or a gradient, rounded once (to float32 on the way to half precision)."""
    address, code, stride = values
    if address != 0:
        address += channel * stride
        if code == 0:
            poke_f32(address, value)
        elif code == 1:
            poke_f64(address, value)
        elif code == 2:
            poke_f16(address, value)
        else:
            poke_bf16(address, value)


@cuda.jit(device=True)
def finite(value):
    """A shift, or the low part of a sum: 0 where it is not finite, else it would turn Inf into NaN."""
    if abs(value) < math.inf:
        return value
    return 0.0


@cuda.jit(device=True)
def add_rows(sums, planes, side, rows):
    """Sums over the rows of a block, into its first row: a tree."""
    thread = cuda.threadIdx.x
    step = 1
    while 2 * step < rows:
        step *= 2
    while step > 0:
        cuda.syncthreads()
        if thread < step * side and thread + step * side < rows * side:
            for plane in range(planes):
                sums[plane, thread] += sums[plane, thread + step * side]
        step //= 2
    cuda.syncthreads()


@cuda.jit(device=True)
def leave_sums(sums, lanes, partials, geometry, unit, split):
    """Add up the rows of a block and leave the two sums of each of its columns; `unit` is that of the thread."""
    _channels, units, columns, side, rows = geometry[:5]
    thread = cuda.threadIdx.x
    add_rows(sums, 2 * lanes, side, rows)
    if thread < side and unit < units:
        for lane in range(lanes):
            address = partials + 8 * (2 * split * columns + unit * lanes + lane)
            poke_f64(address, sums[lane, thread])
            poke_f64(address + 8 * columns, sums[lanes + lane, thread])


@cuda.jit(device=True)
def add_splits(partials, sums, geometry, tile_start, first):
    """The two sums of the channels of a tile from number `first` on, one of a thread, over splits and folds.

    The first threads return them; groups of threads share the splits, and are added in their order.
    """
    channels, _units, columns, _side, _rows, table, _count, _chunk, splits, _runs, fold = geometry[:11]
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    wide = min(table, threads)
    groups = min(threads // wide, 32)
    index, group = first + thread % wide, thread // wide
    a = b = 0.0
    if group < groups and index < table:
        channel = (tile_start + index) % channels
        for split in range(group, splits, groups):
            for k in range(fold):
                address = partials + 8 * (2 * split * columns + channel + k * channels)
                a += peek_f64(address)
                b += peek_f64(address + 8 * columns)
    cuda.syncthreads()
    sums[0, thread] = a
    sums[1, thread] = b
    cuda.syncthreads()
    if group == 0:
        for other in range(1, groups):
            a += sums[0, other * wide + thread]
            b += sums[1, other * wide + thread]
    return a, b


@cuda.jit(device=True)
def multiply_add(a, b, c):
    """Rounded once."""
    if SIMULATOR:  # whose own rounds twice
        return type(a)(np.float64(a) * np.float64(b) + np.float64(c))
    return cuda.fma(a, b, c)


@cuda.jit(device=True)
def affine(x, center, scale, offset):
    """What is activated, without the residual; written once, so that backward rounds as forward has."""
    return multiply_add(x - center, scale, offset)


@cuda.jit(device=True)
def center_of(mean, var):
    """What is subtracted from x before all else: see fastbn/_finish.pxi."""
    if var > 0.0 and mean * mean <= 4.0 * var:
        return 0.0
    return mean


@cuda.jit(device=True)
def lost(rounded, high, low):
    """What is missing of high + low."""
    return (high - np.float64(rounded)) + low


@cuda.jit(device=True)
def two_sum(a, b):
    """(rounded sum, what the rounding has lost) (Knuth)."""
    s = a + b
    t = s - a
    return s, finite((a - (s - t)) + (b - t))


@lru_cache
def activation(index: int, real: Any) -> list[Any]:
    """Functions of (v, gradient that arrives, slope) for a row of src_c/activations.def: y, whether v is open, the
    gradient where it is, the gradient where it is not. They are the formulas of that table, which are Python too."""

    @cuda.jit(device=True)
    def number(value):
        return real(value)

    @cuda.jit(device=True)
    def select(condition, yes, no):
        return yes if condition else no

    @cuda.jit(device=True)
    def clip(v, least, greatest):
        v = real(least) if v < real(least) else v
        return real(greatest) if v > real(greatest) else v

    names = {"NUMBER": number, "SELECT": select, "CLIP": clip, "EVERYWHERE": True}
    return [
        cuda.jit(device=True)(eval(f"lambda v, g, NEGATIVE_SLOPE: {formula}", names))
        for formula in _core.activation_formulas()[index]
    ]
