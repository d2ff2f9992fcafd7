"""The two kernels, forward and backward, for both families and all dtypes.

A kernel has two phases. *Reduce*: every block adds up the values of its split of a tile; *map*: every block adds up
the sums of all splits of its tile in their order, makes of them the coefficients of the tile's channels, and writes its
split, backwards, because what was read last is still in the L2 cache. Each phase is a launch, or both are one where a
tile has a single split. There are no atomics, and every order of summation is fixed: results are the same bits in
every run. What the phases compute is that of the kernels for the CPU (docs/numerics.md), sums in float64 included; of
float64 data they do not keep what the additions lose.

Geometry and operands are those of `_plan`; addresses and strides are bytes. A vector of parameters is (address, code
of its dtype, stride), address 0 where it is None.
"""

# The kernels are Numba's: their types are inferred, so there is nothing to annotate.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from fastbn import _core, runtime

from ._access import FORMATS, SIMULATOR, peek_byte, poke_byte, vector
from ._functions import (
    activation,
    add_splits,
    affine,
    center_of,
    finite,
    leave_sums,
    lost,
    multiply_add,
    parameter,
    peek_f64,
    poke_f64,
    set_parameter,
    sqrt,
    two_sum,
)
from ._plan import MAX_CHANNELS

REDUCE, MAP = 1, 2  # phases

# Rows of the statistics, float64, one value a channel: those of the CPU.
MEAN, MEAN_LO, RSTD = _core.STATISTICS_MEAN, _core.STATISTICS_MEAN_LO, _core.STATISTICS_RSTD
M2, VAR = _core.STATISTICS_M2, _core.STATISTICS_VAR
GAMMA, BETA = _core.STATISTICS_GAMMA, _core.STATISTICS_BETA

IDENTITY = runtime.ACTIVATION_INDEX["identity"]


def limits(threads: int) -> dict[str, int]:
    """Options of the compiler: so many threads must find registers. (The simulator does not know them.)"""
    return {} if SIMULATOR else {"launch_bounds": threads}


class Variant(NamedTuple):
    """What a kernel is compiled for: all that decides about its registers."""

    code: str  # of the dtype
    width: int  # values of a vector
    planar: bool
    threads: int  # of a block
    loads: int  # vectors that are read before the first of them is used: memory is far away
    activation: int
    phases: int
    training: bool
    residual: bool
    mask: bool
    dresidual: bool = False


@lru_cache
def forward(variant: Variant) -> Any:
    """The kernel of training and inference."""
    code, width, planar, threads, loads, row_of_activation, phases, training, has_residual, has_mask, _ = variant
    real: Any = FORMATS[code][1]
    load, store = vector(code, width)
    load_one, _ = vector(code, 1)
    activate, is_open, _passed, _stopped = activation(row_of_activation, real)
    lanes = 1 if planar else width  # channels of a vector
    planes, read = 2 * lanes, loads * width
    table_size = 1 if planar else MAX_CHANNELS

    @cuda.jit(**limits(threads))
    def kernel(scratch, geometry, x, residual, y, mask, statistics, parameters, mode, numbers):
        channels, units, _columns, side, rows, table, count, chunk, splits, runs, _fold, unit_values, row_values = (
            geometry
        )
        x_address, x_channel, x_unit, x_outer, x_inner = x
        r_address, _, r_unit, r_outer, r_inner = residual
        y_address, _, y_unit, y_outer, y_inner = y
        gamma, beta, running_mean, running_var = parameters
        update, per_channel, degrees = mode
        eps, momentum, slope = numbers[0], numbers[1], real(numbers[2])
        shifts, partials = scratch, scratch + 8 * channels

        sums = cuda.shared.array((planes, threads), np.float64)
        coefficients = cuda.shared.array((3, table_size), real)
        values = cuda.local.array(read, real)
        total = cuda.local.array(planes, np.float64)
        shift = cuda.local.array(lanes, np.float64)
        one = cuda.local.array(1, real)

        thread = cuda.threadIdx.x
        block = cuda.blockIdx.x
        if phases == MAP:  # the last blocks of the reduce are those whose values are still in the L2 cache
            block = cuda.gridDim.x - 1 - block
        tile, split = block // splits, block % splits
        tile_start = tile * side * lanes  # column
        row, unit = thread // side, tile * side + thread % side
        active = row < rows and unit < units
        start, stop = split * chunk + row, min(count, (split + 1) * chunk)
        outer_step, inner_step = rows // runs, rows % runs

        if phases & REDUCE:
            for plane in range(planes):
                total[plane] = 0.0
            if active:
                for lane in range(lanes):
                    load_one(x_address + (unit * lanes + lane) % channels * x_channel, one, 0)
                    shift[lane] = finite(np.float64(one[0]))
                base = x_address + unit * x_unit
                i, outer, inner = start, start // runs, start % runs
                while i < stop:
                    for k in range(loads):
                        if i + k * rows < stop:
                            load(base + outer * x_outer + inner * x_inner, values, k * width)
                            outer += outer_step
                            inner += inner_step
                            if inner >= runs:
                                inner -= runs
                                outer += 1
                    for k in range(loads):
                        if i + k * rows < stop:
                            for v in range(width):
                                d = np.float64(values[k * width + v]) - shift[v % lanes]
                                total[v % lanes] += d
                                total[lanes + v % lanes] += d * d
                    i += loads * rows
            for plane in range(planes):
                sums[plane, thread] = total[plane]
            leave_sums(sums, lanes, partials, geometry, unit, split)
            if split == 0 and thread < side and unit < units:
                for lane in range(lanes):
                    if unit * lanes + lane < channels:  # the map may overwrite x
                        poke_f64(shifts + 8 * (unit * lanes + lane), shift[lane])
            cuda.syncthreads()

        if phases & MAP:
            wide = min(table, threads)
            for first in range(0, table, wide):
                a = b = 0.0
                if training:
                    a, b = add_splits(partials, sums, geometry, tile_start, first)
                index = first + thread
                if thread < wide and index < table:
                    channel = (tile_start + index) % channels
                    if training:
                        delta = a / per_channel
                        m2 = b - a * delta
                        if m2 < 0.0:
                            m2 = 0.0
                        mean, mean_lo = two_sum(peek_f64(shifts + 8 * channel), delta)
                        var = m2 / per_channel
                    else:
                        mean, mean_lo, m2 = parameter(running_mean, channel, 0.0), 0.0, 0.0
                        var = parameter(running_var, channel, 1.0)
                    rstd = 1.0 / sqrt(var + eps)
                    weight, bias = parameter(gamma, channel, 1.0), parameter(beta, channel, 0.0)
                    center = center_of(mean, var)
                    coefficients[0, index] = real(center)
                    coefficients[1, index] = real(weight * rstd)
                    coefficients[2, index] = real(bias - finite(lost(real(center), mean, mean_lo) * (weight * rstd)))
                    if split == 0 and tile_start + index < channels:  # each channel once
                        poke_f64(statistics + 8 * (MEAN * channels + channel), mean)
                        poke_f64(statistics + 8 * (MEAN_LO * channels + channel), mean_lo)
                        poke_f64(statistics + 8 * (M2 * channels + channel), m2)
                        poke_f64(statistics + 8 * (VAR * channels + channel), var)
                        poke_f64(statistics + 8 * (RSTD * channels + channel), rstd)
                        poke_f64(statistics + 8 * (GAMMA * channels + channel), weight)
                        poke_f64(statistics + 8 * (BETA * channels + channel), bias)
                        if update:
                            old = parameter(running_mean, channel, 0.0)
                            set_parameter(running_mean, channel, (1.0 - momentum) * old + momentum * mean)
                            old = parameter(running_var, channel, 1.0)
                            set_parameter(running_var, channel, (1.0 - momentum) * old + momentum * (m2 / degrees))
            cuda.syncthreads()

            added = cuda.local.array(read, real)
            outers = cuda.local.array(loads, np.int64)
            inners = cuda.local.array(loads, np.int64)
            terms = cuda.local.array((3, lanes), real)
            if active and start < stop:
                for lane in range(lanes):
                    index = 0 if planar else (unit * lanes + lane - tile_start) % table
                    for term in range(3):
                        terms[term, lane] = coefficients[term, index]
                i = start + (stop - 1 - start) // rows * rows
                outer, inner = i // runs, i % runs
                while i >= start:
                    for k in range(loads):
                        if i - k * rows >= start:
                            outers[k] = outer
                            inners[k] = inner
                            load(x_address + unit * x_unit + outer * x_outer + inner * x_inner, values, k * width)
                            if has_residual:
                                load(r_address + unit * r_unit + outer * r_outer + inner * r_inner, added, k * width)
                            outer -= outer_step
                            inner -= inner_step
                            if inner < 0:
                                inner += runs
                                outer -= 1
                    for k in range(loads):
                        if i - k * rows >= start:
                            bits = 0
                            for v in range(width):
                                lane, at = v % lanes, k * width + v
                                value = affine(values[at], terms[0, lane], terms[1, lane], terms[2, lane])
                                if has_residual:
                                    value += added[at]
                                if has_mask and is_open(value, value, slope):
                                    bits |= 1 << v
                                values[at] = activate(value, value, slope)
                            store(
                                y_address + unit * y_unit + outers[k] * y_outer + inners[k] * y_inner,
                                values,
                                k * width,
                            )
                            if has_mask:
                                place = unit * unit_values + (i - k * rows) * row_values
                                poke_byte(mask + place // width, bits)
                    i -= loads * rows

    return kernel


@lru_cache
def backward(variant: Variant) -> Any:
    """The kernel of the gradients."""
    (
        code,
        width,
        planar,
        threads,
        loads,
        row_of_activation,
        phases,
        training,
        has_residual,
        has_mask,
        writes_residual,
    ) = variant
    real: Any = FORMATS[code][1]
    load, store = vector(code, width)
    load_one, _ = vector(code, 1)
    _activate, is_open, passed, stopped = activation(row_of_activation, real)
    identity = row_of_activation == IDENTITY
    first_phase, last_phase = REDUCE if phases & REDUCE else MAP, MAP if phases & MAP else REDUCE
    lanes = 1 if planar else width
    planes, read = 2 * lanes, loads * width
    table_size = 1 if planar else MAX_CHANNELS

    @cuda.jit(**limits(threads))
    def kernel(scratch, geometry, x, residual, dy, dx, dresidual, mask, statistics, parameters, mode, slope):
        channels, units, _columns, side, rows, table, count, chunk, splits, runs, _fold, unit_values, row_values = (
            geometry
        )
        x_address, _, x_unit, x_outer, x_inner = x
        r_address, _, r_unit, r_outer, r_inner = residual
        dy_address, dy_channel, dy_unit, dy_outer, dy_inner = dy
        dx_address, _, dx_unit, dx_outer, dx_inner = dx
        dr_address, _, dr_unit, dr_outer, dr_inner = dresidual
        mask_address, mask_shift = mask
        dgamma, dbeta = parameters
        reduced, per_channel = mode
        slope = real(slope)
        shifts, partials = scratch, scratch + 8 * channels

        sums = cuda.shared.array((planes, threads), np.float64)
        coefficients = cuda.shared.array((6, table_size), real)
        values = cuda.local.array(read, real)
        gradients = cuda.local.array(read, real)
        added = cuda.local.array(read, real)
        outers = cuda.local.array(loads, np.int64)
        inners = cuda.local.array(loads, np.int64)
        terms = cuda.local.array((6, lanes), real)
        total = cuda.local.array(planes, np.float64)
        shift = cuda.local.array(lanes, np.float64)
        mean = cuda.local.array(lanes, np.float64)
        one = cuda.local.array(1, real)

        thread = cuda.threadIdx.x
        block = cuda.blockIdx.x
        if phases == MAP:  # the last blocks of the reduce are those whose values are still in the L2 cache
            block = cuda.gridDim.x - 1 - block
        tile, split = block // splits, block % splits
        tile_start = tile * side * lanes
        row, unit = thread // side, tile * side + thread % side
        active = row < rows and unit < units
        start, stop = split * chunk + row, min(count, (split + 1) * chunk)
        last = start + (stop - 1 - start) // rows * rows
        outer_step, inner_step = rows // runs, rows % runs

        for index in range(thread, table, threads):
            channel = (tile_start + index) % channels
            center = peek_f64(statistics + 8 * (MEAN * channels + channel))
            mean_lo = peek_f64(statistics + 8 * (MEAN_LO * channels + channel))
            var = peek_f64(statistics + 8 * (VAR * channels + channel))
            rstd = peek_f64(statistics + 8 * (RSTD * channels + channel))
            scale = peek_f64(statistics + 8 * (GAMMA * channels + channel)) * rstd
            bias = peek_f64(statistics + 8 * (BETA * channels + channel))
            rounded = real(center_of(center, var))
            coefficients[0, index] = rounded
            coefficients[1, index] = real(scale)
            coefficients[2, index] = real(bias - finite(lost(rounded, center, mean_lo) * scale))
            for term in range(3, 6):
                coefficients[term, index] = real(0)
        cuda.syncthreads()

        for phase in range(first_phase, last_phase + 1):
            if phase == MAP and reduced:
                wide = min(table, threads)
                for first in range(0, table, wide):
                    a, b = add_splits(partials, sums, geometry, tile_start, first)
                    index = first + thread
                    if thread < wide and index < table:
                        channel = (tile_start + index) % channels
                        rstd = peek_f64(statistics + 8 * (RSTD * channels + channel))
                        mean_lo = peek_f64(statistics + 8 * (MEAN_LO * channels + channel))
                        b -= mean_lo * a
                        first_dy = peek_f64(shifts + 8 * channel)
                        if split == 0 and tile_start + index < channels:
                            set_parameter(dbeta, channel, per_channel * first_dy + a)
                            set_parameter(dgamma, channel, rstd * b)
                        if training:
                            high, low = two_sum(first_dy, a / per_channel)
                            level = 0.0 if abs(high) <= 2.0 * abs(first_dy - high) else high
                            center = peek_f64(statistics + 8 * (MEAN * channels + channel))
                            steepness = rstd * rstd * (b / per_channel)
                            off_center = finite(lost(coefficients[0, index], center, mean_lo) * steepness)
                            scale = peek_f64(statistics + 8 * (GAMMA * channels + channel)) * rstd
                            coefficients[3, index] = real(level)
                            coefficients[4, index] = real(-steepness)
                            coefficients[5, index] = real(
                                finite((off_center - finite(lost(real(level), high, low))) * scale)
                            )
                cuda.syncthreads()

            for plane in range(planes):
                total[plane] = 0.0
            if active:
                for lane in range(lanes):
                    channel = (unit * lanes + lane) % channels
                    index = 0 if planar else (unit * lanes + lane - tile_start) % table
                    for term in range(6):
                        terms[term, lane] = coefficients[term, index]
                    mean[lane] = peek_f64(statistics + 8 * (MEAN * channels + channel))
                    shift[lane] = 0.0
                    if phase == REDUCE and training:  # then the deviations of x add to zero
                        load_one(dy_address + channel * dy_channel, one, 0)
                        shift[lane] = finite(np.float64(one[0]))
                step = rows if phase == REDUCE else -rows  # the map goes back
                i = start if phase == REDUCE else last
                outer, inner = i // runs, i % runs
                while start <= i < stop:
                    for k in range(loads):
                        if start <= i + k * step < stop:
                            outers[k] = outer
                            inners[k] = inner
                            load(x_address + unit * x_unit + outer * x_outer + inner * x_inner, values, k * width)
                            load(
                                dy_address + unit * dy_unit + outer * dy_outer + inner * dy_inner,
                                gradients,
                                k * width,
                            )
                            if has_residual:
                                load(r_address + unit * r_unit + outer * r_outer + inner * r_inner, added, k * width)
                            if phase == REDUCE:
                                outer += outer_step
                                inner += inner_step
                                if inner >= runs:
                                    inner -= runs
                                    outer += 1
                            else:
                                outer -= outer_step
                                inner -= inner_step
                                if inner < 0:
                                    inner += runs
                                    outer -= 1
                    for k in range(loads):
                        if start <= i + k * step < stop:
                            bits = 0
                            if has_mask:
                                place = unit * unit_values + (i + k * step) * row_values
                                bits = peek_byte(mask_address + (place >> mask_shift)) >> (
                                    place & ((1 << mask_shift) - 1)
                                )
                            for v in range(width):
                                lane, at = v % lanes, k * width + v
                                g = gradients[at]
                                if not identity:
                                    value = real(0)
                                    if has_mask:
                                        through = bits >> v & 1 != 0
                                    else:
                                        value = affine(values[at], terms[0, lane], terms[1, lane], terms[2, lane])
                                        if has_residual:
                                            value += added[at]
                                        through = is_open(value, value, slope)
                                    g = passed(value, g, slope) if through else stopped(value, g, slope)
                                if phase == REDUCE:
                                    e = np.float64(g) - shift[lane]
                                    total[lane] += e
                                    total[lanes + lane] += e * (np.float64(values[at]) - mean[lane])
                                else:
                                    gradients[at] = g
                                    if training:
                                        d = values[at] - terms[0, lane]
                                        e = g - terms[3, lane]
                                        rest = multiply_add(d * terms[1, lane], terms[4, lane], terms[5, lane])
                                        values[at] = multiply_add(e, terms[1, lane], rest)
                                    else:
                                        values[at] = g * terms[1, lane]
                            if phase == MAP:
                                place = outers[k] * dx_outer + inners[k] * dx_inner
                                store(dx_address + unit * dx_unit + place, values, k * width)
                                if writes_residual:
                                    place = outers[k] * dr_outer + inners[k] * dr_inner
                                    store(dr_address + unit * dr_unit + place, gradients, k * width)
                    i += loads * step

            if phase == REDUCE:
                for plane in range(planes):
                    sums[plane, thread] = total[plane]
                leave_sums(sums, lanes, partials, geometry, unit, split)
                if split == 0 and thread < side and unit < units:
                    for lane in range(lanes):
                        if unit * lanes + lane < channels:  # the map may overwrite dy
                            poke_f64(shifts + 8 * (unit * lanes + lane), shift[lane])
                cuda.syncthreads()

    return kernel
