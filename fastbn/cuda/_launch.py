"""From operands in device memory to launches of the kernels."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any, NamedTuple

from numba import cuda

from . import _kernels, _plan
from ._access import FORMATS, SIMULATOR
from ._plan import Operand, Plan, Triple

# Threads of a block. The simulator has a thread of Python for each.
PLANAR_THREADS, INTERLEAVED_THREADS = (16, 32) if SIMULATOR else (256, 512)
# Bytes that a thread reads before it waits: with the threads that fit on a multiprocessor more than 24 KB, the bytes
# on their way at full speed (4.3 TB/s x 750 ns / 132 processors on an H200).
PLANAR_BYTES, INTERLEAVED_BYTES = 32, 64
MAX_LOADS, MAX_VALUES = 8, 16

Parameter = tuple[int, int, int]  # address, code of the dtype, stride
NONE: Parameter = (0, 0, 0)
ABSENT = Operand(0, (0, 0, 0))


class Call(NamedTuple):
    """What forward and backward of a batch have in common."""

    code: str  # of the dtype
    planar: bool
    shape: Triple
    activation: tuple[int, float]
    training: bool
    stream: Any

    @property
    def per_channel(self) -> int:
        return self.shape[0] * self.shape[2]


@lru_cache
def _processors(_device: int) -> int:
    return 2 if SIMULATOR else int(cuda.get_current_device().MULTIPROCESSOR_COUNT)


def processors() -> int:
    """Multiprocessors of the current device."""
    return _processors(0 if SIMULATOR else cuda.get_current_device().id)


# Sums of the splits, for each stream: launches of a stream follow each other, so the next call may overwrite them.
_scratch: dict[tuple[int, Any], Any] = {}


def _scratch_address(nbytes: int, stream: Any) -> int:
    device = 0 if SIMULATOR else cuda.get_current_device().id
    key = (device, int(stream))
    block = _scratch.get(key)
    if block is None or block.nbytes < nbytes:
        block = _scratch[key] = cuda.device_array(max(nbytes, 1 << 16), "u1", stream=stream)
    return address_of(block)


def address_of(array: Any) -> int:
    """Of a Numba array."""
    return int(array._ary.ctypes.data if SIMULATOR else array.device_ctypes_pointer.value or 0)


# Between reduce and map no other thread may launch what overwrites the sums.
_lock = threading.Lock()


def _launch(kernel: Any, plan: Plan, channels: int, stream: Any, reduced: bool, arguments: tuple[Any, ...]) -> None:
    configured = kernel[plan.blocks, plan.threads, stream]
    with _lock:
        scratch = _scratch_address(8 * (channels + plan.sums), stream)
        if not reduced:
            configured(_kernels.MAP, scratch, *arguments)
        elif plan.single:
            configured(_kernels.REDUCE | _kernels.MAP, scratch, *arguments)
        else:
            configured(_kernels.REDUCE, scratch, *arguments)
            configured(_kernels.MAP, scratch, *arguments)


def _make_plan(call: Call, operands: list[Operand], limit: int = _plan.MAX_WIDTH) -> Plan:
    threads = PLANAR_THREADS if call.planar else INTERLEAVED_THREADS
    itemsize = FORMATS[call.code][0]
    return _plan.make(call.shape, operands, itemsize, call.planar, processors(), threads, limit)


def loads(code: str, width: int, planar: bool, streams: int) -> int:
    """Vectors that a thread reads before it waits, if it reads so many arrays."""
    if width == _plan.MAX_WIDTH:  # more would not stay in registers, which a test of the machine code checks
        return 1
    room = (PLANAR_BYTES if planar else INTERLEAVED_BYTES) // (width * FORMATS[code][0] * streams)
    return max(1, min(room, MAX_VALUES // width, MAX_LOADS))


def mask_nbytes(call: Call, operands: list[Operand]) -> int:
    """Of the mask that `forward` writes for these operands: a byte for each vector."""
    outer, channels, inner = call.shape
    return outer * channels * inner // _make_plan(call, operands).width


def forward(
    call: Call,
    x: Operand,
    residual: Operand | None,
    y: Operand,
    mask: int,
    statistics: int,
    parameters: list[Parameter],
    *,
    update: bool,
    eps: float,
    momentum: float,
    unbiased: bool,
) -> None:
    """Launch forward. `mask` and `statistics` are addresses: 0 for no mask; STATISTICS_ROWS rows of float64.
    `parameters` are gamma, beta, the running mean and the running variance."""
    plan = _make_plan(call, [x, y] if residual is None else [x, residual, y])
    activation, slope = call.activation
    ahead = loads(call.code, plan.width, call.planar, 1)
    kernel = _kernels.forward(call.code, plan.width, call.planar, plan.threads, ahead, activation)
    _, channels, _ = call.shape
    count = call.per_channel
    arguments = (
        _plan.geometry(plan, channels),
        _plan.walk(plan, x),
        _plan.walk(plan, residual or ABSENT),
        _plan.walk(plan, y),
        mask,
        statistics,
        tuple(parameters),
        (int(call.training), int(update), count, count - 1 if unbiased else count),
        (eps, momentum, slope),
    )
    _launch(kernel, plan, channels, call.stream, call.training, arguments)


def backward(
    call: Call,
    x: Operand,
    residual: Operand | None,
    dy: Operand,
    dx: Operand,
    dresidual: Operand | None,
    mask: int,
    mask_nbytes: int,
    statistics: int,
    dgamma: Parameter,
    dbeta: Parameter,
) -> None:
    """Launch backward; `mask` is the address of what forward has written, or 0."""
    operands = [o for o in (x, residual, dy, dx, dresidual) if o is not None]
    outer, channels, inner = call.shape
    # A vector must not be wider than those of forward, whose bits are in one byte.
    mask_width = outer * channels * inner // mask_nbytes if mask else _plan.MAX_WIDTH
    plan = _make_plan(call, operands, mask_width)
    activation, slope = call.activation
    ahead = loads(call.code, plan.width, call.planar, 2)
    kernel = _kernels.backward(call.code, plan.width, call.planar, plan.threads, ahead, activation)
    reduced = call.training or dgamma[0] != 0 or dbeta[0] != 0
    arguments = (
        _plan.geometry(plan, channels),
        _plan.walk(plan, x),
        _plan.walk(plan, residual or ABSENT),
        _plan.walk(plan, dy),
        _plan.walk(plan, dx),
        _plan.walk(plan, dresidual or ABSENT),
        (mask, mask_width.bit_length() - 1),
        statistics,
        (dgamma, dbeta),
        (int(call.training), int(reduced), call.per_channel),
        slope,
    )
    _launch(kernel, plan, channels, call.stream, reduced, arguments)
