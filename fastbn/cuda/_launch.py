"""From operands in device memory to launches of the kernels."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any, NamedTuple

from numba import cuda

from fastbn import _core
from fastbn.errors import DeviceError

from . import _kernels, _plan
from ._access import FORMATS, SIMULATOR
from ._kernels import MAP, REDUCE, Variant
from ._plan import Operand, Plan, Triple

# Threads of a block; interleaved, fewer for backward, which needs more registers. The simulator has a thread of Python
# for each.
PLANAR_THREADS, INTERLEAVED_THREADS, INTERLEAVED_BACKWARD_THREADS = (16, 32, 32) if SIMULATOR else (256, 512, 256)
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
    return 1 if SIMULATOR else int(cuda.get_current_device().MULTIPROCESSOR_COUNT)


def processors() -> int:
    """Multiprocessors of the current device."""
    return _processors(0 if SIMULATOR else cuda.get_current_device().id)


def require_bfloat16() -> None:
    """DeviceError unless the current device has the instruction that rounds to bfloat16."""
    if not SIMULATOR and cuda.get_current_device().compute_capability < (8, 0):
        raise DeviceError("x: bfloat16 needs a GPU of compute capability 8.0 or later")


# Sums of the splits, for each device and stream: launches of a stream follow each other, so the next call may overwrite
# them. Each thread of the host has its own, since between reduce and map another one may launch.
_scratch = threading.local()


def _scratch_address(nbytes: int, stream: Any) -> int:
    blocks: dict[tuple[int, int], Any] = _scratch.__dict__.setdefault("blocks", {})
    key = (0 if SIMULATOR else cuda.get_current_device().id, int(stream))
    block = blocks.get(key)
    if block is None or block.nbytes < nbytes:
        block = blocks[key] = cuda.device_array(max(nbytes, 1 << 16), "u1", stream=stream)
    return address_of(block)


def address_of(array: Any) -> int:
    """Of a Numba array."""
    return int(array._ary.ctypes.data if SIMULATOR else array.device_ctypes_pointer.value or 0)


def _launch(build: Any, variant: Variant, plan: Plan, stream: Any, reduced: bool, arguments: tuple[Any, ...]) -> None:
    """Launch the phases: one after the other, or both at once, or the map alone."""
    if not reduced:
        phases = [MAP]
    elif plan.single:
        phases = [REDUCE | MAP]
    else:
        phases = [REDUCE, MAP]
    for phase in phases:
        build(variant._replace(phases=phase))[plan.blocks, plan.threads, stream](*arguments)


def threads(planar: bool, backward: bool) -> int:
    """Of a block."""
    if planar:
        return PLANAR_THREADS
    return INTERLEAVED_BACKWARD_THREADS if backward else INTERLEAVED_THREADS


def _make_plan(call: Call, operands: list[Operand], backward: bool = False, limit: int = _plan.MAX_WIDTH) -> Plan:
    itemsize = FORMATS[call.code][0]
    return _plan.make(
        call.shape,
        operands,
        itemsize,
        call.planar,
        processors(),
        threads(call.planar, backward),
        2 if backward else 1,
        limit,
    )


def mask_nbytes(call: Call, operands: list[Operand]) -> int:
    """Of the mask that `forward` writes for these operands: a byte for each vector."""
    outer, channels, inner = call.shape
    return outer * channels * inner // _make_plan(call, operands).width


def _scratch_of(call: Call, plan: Plan, rows: int = 0) -> tuple[int, int]:
    """Addresses of the scratch of a call, and of so many rows of float64 after it."""
    _, channels, _ = call.shape
    sums = channels + plan.sums
    address = _scratch_address(8 * (sums + rows * channels), call.stream)
    return address, address + 8 * sums


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
    """Launch forward.

    `mask` and `statistics` (STATISTICS_ROWS rows of float64) are addresses, 0 where nobody wants them. `parameters` are
    gamma, beta, the running mean and the running variance.
    """
    plan = _make_plan(call, [x, y] if residual is None else [x, residual, y])
    activation, slope = call.activation
    variant = Variant(
        call.code,
        plan.width,
        call.planar,
        plan.threads,
        plan.loads,
        activation,
        0,
        call.training,
        residual is not None,
        mask != 0,
    )
    scratch, rows = _scratch_of(call, plan, 0 if statistics else _core.STATISTICS_ROWS)
    arguments = (
        scratch,
        _plan.geometry(plan, call.shape[1]),
        _plan.walk(plan, x),
        _plan.walk(plan, residual or ABSENT),
        _plan.walk(plan, y),
        mask,
        statistics or rows,
        tuple(parameters),
        (int(update), call.per_channel, call.per_channel - 1 if unbiased else call.per_channel),
        (eps, momentum, slope),
    )
    _launch(_kernels.forward, variant, plan, call.stream, call.training, arguments)


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
    plan = _make_plan(call, operands, True, mask_width)
    activation, slope = call.activation
    variant = Variant(
        call.code, plan.width, call.planar, plan.threads, plan.loads, activation, 0, call.training,
        residual is not None, mask != 0, dresidual is not None,
    )  # fmt: skip
    reduced = call.training or dgamma[0] != 0 or dbeta[0] != 0
    arguments = (
        _scratch_of(call, plan)[0],
        _plan.geometry(plan, channels),
        _plan.walk(plan, x),
        _plan.walk(plan, residual or ABSENT),
        _plan.walk(plan, dy),
        _plan.walk(plan, dx),
        _plan.walk(plan, dresidual or ABSENT),
        (mask, mask_width.bit_length() - 1),
        statistics,
        (dgamma, dbeta),
        (int(reduced), call.per_channel),
        slope,
    )
    _launch(_kernels.backward, variant, plan, call.stream, reduced, arguments)
