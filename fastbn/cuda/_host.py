"""NumPy arrays in, NumPy arrays out: what `_core` does on the CPU, with a transfer to the GPU and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import cuda

from fastbn import _core

from . import _functions, _launch
from ._access import FORMATS
from ._arrays import current_stream
from ._launch import Call, address_of
from ._plan import Operand, Triple, contiguous_strides

Array = npt.NDArray[Any]
Placed = tuple[Array, Triple]  # an array and its strides as (outer, channels, inner)

CODES = [code for code, _name in _core.dtypes()]  # by the core's index
STORED = {"f32": "f4", "f64": "f8", "f16": "f2", "bf16": "u2"}


def _seen(placed: Placed, call: Call) -> Array:
    """The array as (outer, channels, inner)."""
    array, strides = placed
    plain = array.view(STORED[call.code])
    return np.lib.stride_tricks.as_strided(plain, call.shape, strides)


def _operand(buffer: Any, call: Call) -> Operand:
    outer, channel, inner = contiguous_strides(call.shape, FORMATS[call.code][0])
    return Operand(address_of(buffer), (outer, channel, inner))


def _upload(placed: Placed, call: Call) -> Any:
    return cuda.to_device(np.ascontiguousarray(_seen(placed, call)), stream=call.stream)


def _download(buffer: Any, placed: Placed, call: Call) -> None:
    target = _seen(placed, call)
    if target.flags.c_contiguous:
        buffer.copy_to_host(target, stream=call.stream)
    else:
        dense = buffer.copy_to_host(stream=call.stream)
        _wait(call)
        target[...] = dense


def _wait(call: Call) -> None:
    """Until the copies have arrived, which on a stream of the caller's they may not have."""
    if call.stream:
        call.stream.synchronize()


def _vector(buffer: Any, row: int, channels: int) -> _launch.Parameter:
    """A row of float64."""
    return address_of(buffer) + 8 * row * channels, _functions.CODES["f64"], 8


def make_call(dtype: int, planar: bool, shape: Triple, activation: tuple[int, float], training: bool) -> Call:
    if CODES[dtype] == "bf16":
        _launch.require_bfloat16()
    return Call(CODES[dtype], planar, shape, activation, training, current_stream(None))


def forward(
    call: Call,
    x: Placed,
    residual: Placed | None,
    y: Placed,
    keep_mask: bool,
    vectors: tuple[Array | None, ...],
    eps: float,
    finite_first: bool,
) -> tuple[Array, Array | None]:
    """Like `_core.forward`; returns the statistics and, if wanted, the mask. The caller updates running statistics.

    `vectors` are gamma, beta, the running mean and the running variance. `finite_first`: y is written only if the
    statistics are finite.
    """
    _, channels, _ = call.shape
    rows = np.zeros((_core.STATISTICS_ROWS, channels))
    if 0 in call.shape:
        return rows, np.zeros(0, np.uint8) if keep_mask else None
    columns = [np.zeros(channels) if v is None else v.astype(np.float64) for v in vectors]
    given = cuda.to_device(np.stack(columns), stream=call.stream)
    parameters = [_launch.NONE if v is None else _vector(given, row, channels) for row, v in enumerate(vectors)]
    source, target = _upload(x, call), cuda.device_array(call.shape, STORED[call.code], stream=call.stream)
    added = None if residual is None else _upload(residual, call)
    x_operand, y_operand = _operand(source, call), _operand(target, call)
    operands = [x_operand, y_operand, *([] if added is None else [_operand(added, call)])]
    mask = None
    if keep_mask:
        mask = cuda.device_array(_launch.mask_nbytes(call, operands), "u1", stream=call.stream)
    statistics = cuda.device_array(rows.shape, "f8", stream=call.stream)
    _launch.forward(
        call,
        x_operand,
        None if added is None else _operand(added, call),
        y_operand,
        0 if mask is None else address_of(mask),
        address_of(statistics),
        parameters,
        update=False,
        eps=eps,
        momentum=0.0,
        unbiased=False,
    )
    statistics.copy_to_host(rows, stream=call.stream)
    bits = None if mask is None else mask.copy_to_host(stream=call.stream)
    _wait(call)
    if not finite_first or moments_are_finite(rows):
        _download(target, y, call)
        _wait(call)
    return rows, bits


def moments_are_finite(statistics: Array) -> bool:
    """Mean and variance of every channel."""
    return bool(np.isfinite(statistics[[_core.STATISTICS_MEAN, _core.STATISTICS_VAR]]).all())


def update_running(
    running_mean: Array, running_var: Array, statistics: Array, count: int, momentum: float, unbiased: bool
) -> None:
    """In place, both or none; in float64, rounded once to the dtype of the running arrays."""
    batch_mean, batch_m2 = statistics[_core.STATISTICS_MEAN], statistics[_core.STATISTICS_M2]
    batch_var = batch_m2 / (count - 1 if unbiased else count)
    with np.errstate(all="ignore"):
        mean, var = (
            ((1 - momentum) * running.astype(np.float64) + momentum * batch).astype(running.dtype)
            for running, batch in ((running_mean, batch_mean), (running_var, batch_var))
        )
    running_mean[...] = mean
    running_var[...] = var


def backward(
    call: Call,
    x: Placed,
    residual: Placed | None,
    dy: Placed,
    dx: Placed,
    dresidual: Placed | None,
    mask: npt.NDArray[np.uint8] | None,
    statistics: Array,
    gamma_dtype: np.dtype[Any] | None,
    beta_dtype: np.dtype[Any] | None,
) -> tuple[Array | None, Array | None]:
    """Like `_core.backward`: writes dx and dresidual, returns dgamma and dbeta."""
    _, channels, _ = call.shape
    sums = np.zeros((2, channels))
    if 0 not in call.shape:
        source, gradient = _upload(x, call), _upload(dy, call)
        added = None if residual is None else _upload(residual, call)
        bits = None if mask is None else cuda.to_device(mask, stream=call.stream)
        rows = cuda.to_device(statistics, stream=call.stream)
        targets = [
            None if placed is None else cuda.device_array(call.shape, STORED[call.code], stream=call.stream)
            for placed in (dx, dresidual)
        ]
        made = cuda.to_device(sums, stream=call.stream)
        _launch.backward(
            call,
            _operand(source, call),
            None if added is None else _operand(added, call),
            _operand(gradient, call),
            _operand(targets[0], call),
            None if targets[1] is None else _operand(targets[1], call),
            0 if bits is None else address_of(bits),
            0 if mask is None else mask.size,
            address_of(rows),
            _launch.NONE if gamma_dtype is None else _vector(made, 0, channels),
            _launch.NONE if beta_dtype is None else _vector(made, 1, channels),
        )
        for buffer, placed in zip(targets, (dx, dresidual), strict=True):
            if placed is not None:
                _download(buffer, placed, call)
        made.copy_to_host(sums, stream=call.stream)
        _wait(call)
    with np.errstate(all="ignore"):
        return (
            None if gamma_dtype is None else sums[0].astype(gamma_dtype),
            None if beta_dtype is None else sums[1].astype(beta_dtype),
        )
