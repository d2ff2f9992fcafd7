"""`_access` in Numba's simulator, whose device memory is host memory."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numba.cuda.simulator import kernelapi

from ._plan import FORMATS


class _Shared(kernelapi.FakeCUDAShared):  # type: ignore[misc]  # of a module without types
    """Shared arrays, which are known by the line that asks for them. Numba's simulator looks whether there is one and
    then makes it, so that two threads may have one each."""

    def array(self, shape: Any, dtype: Any, alignment: Any = None) -> Any:
        caller = sys._getframe(1)
        return self._allocations.setdefault((caller.f_code.co_filename, caller.f_lineno), np.empty(shape, dtype))


kernelapi.FakeCUDAShared = _Shared


def _memory(address: int, nbytes: int) -> Any:
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(int(address)))


def _widened(code: str, memory: Any) -> Any:
    if code == "bf16":
        return (memory.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    stored = np.float16 if code == "f16" else FORMATS[code][1]
    return memory.view(stored).astype(FORMATS[code][1])


def _narrowed(code: str, values: Any) -> Any:
    if code == "bf16":
        bits = values.view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
        return np.where(values != values, np.uint32(0x7FC0), rounded).astype(np.uint16).view(np.uint8)
    with np.errstate(over="ignore"):
        return (values.astype(np.float16) if code == "f16" else values).view(np.uint8)


def vector(code: str, width: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    nbytes = width * FORMATS[code][0]

    def load(address: int, values: Any, offset: int) -> None:
        assert address % nbytes == 0, "a vector must be aligned to its size"
        values[offset : offset + width] = _widened(code, _memory(address, nbytes))

    def store(address: int, values: Any, offset: int) -> None:
        assert address % nbytes == 0, "a vector must be aligned to its size"
        _memory(address, nbytes)[...] = _narrowed(code, np.ascontiguousarray(values[offset : offset + width]))

    return load, store


def scalar(code: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    size, real = FORMATS[code]

    def peek(address: int) -> Any:
        return np.float64(_widened(code, _memory(address, size))[0])

    def poke(address: int, value: Any) -> None:
        with np.errstate(over="ignore"):
            _memory(address, size)[...] = _narrowed(code, np.array([value]).astype(real))

    return peek, poke


def peek_byte(address: int) -> int:
    return int(_memory(address, 1)[0])


def poke_byte(address: int, value: int) -> None:
    _memory(address, 1)[0] = value
