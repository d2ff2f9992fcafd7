"""Arrays on the GPU: what is given, what is made, and the stream that a call works on.

An array is whatever has ``__cuda_array_interface__`` (CuPy, PyTorch, Numba, JAX) or speaks DLPack with a CUDA device.
What is made for a PyTorch tensor or a CuPy array is one too, from the pool of its library; else it is a Numba array.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import cuda

from fastbn import _check, _core
from fastbn.errors import ArgumentError, DTypeError

from ._access import SIMULATOR
from ._plan import FORMATS, contiguous_strides

CODES = {name: code for code, name in _core.dtypes()}
NAMES = {code: name for code, name in _core.dtypes()}
ITEMSIZE = {code: itemsize for code, (itemsize, _real) in FORMATS.items()}
TYPESTRINGS = {"<f4": "f32", "<f8": "f64", "<f2": "f16", "<V2": "bf16"}
LEGACY_DEFAULT = 1  # the default stream in `__cuda_array_interface__`

_stream: ContextVar[Any] = ContextVar("fastbn_cuda_stream", default=None)


class DeviceArray(NamedTuple):
    """An array on the GPU as fastbn sees it; strides in bytes."""

    owner: Any
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    code: str  # of its dtype
    readonly: bool
    stream: int | None  # on which its last writer works
    held: Any = None  # what keeps the memory besides the owner

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.code]

    @property
    def shadow(self) -> npt.NDArray[Any]:
        """A NumPy array of the same places, which nobody may read: for the questions of `_check` about overlaps."""
        if self.size == 0:
            return np.empty(self.shape, f"V{self.itemsize}")
        return np.asarray(_Places(self))


class _Places:
    """Where the values of an array on the GPU are, as NumPy wants to hear it."""

    def __init__(self, x: DeviceArray) -> None:
        self.__array_interface__ = {
            "shape": x.shape,
            "strides": x.strides,
            "data": (x.address, x.readonly),
            "typestr": f"|V{x.itemsize}",
            "version": 3,
        }


def _interface(name: str, value: Any) -> Any:
    """`__cuda_array_interface__`, or None. PyTorch refuses it to tensors that record gradients."""
    if SIMULATOR and type(value).__name__ == "FakeCUDAArray":  # device memory is host memory there
        return value._ary.__array_interface__
    try:
        return getattr(value, "__cuda_array_interface__", None)
    except RuntimeError as error:
        raise ArgumentError(f"{name}: expected an array without a gradient of its own, got one: {error}") from None


def view(name: str, value: Any) -> DeviceArray | None:
    """The array, None if it is not on a GPU; DTypeError if its dtype is not one of ``fastbn.runtime.dtypes()``."""
    interface = _interface(name, value)
    if interface is None:
        return _from_dlpack(name, value)
    shape, strides = tuple(interface["shape"]), interface.get("strides")
    code = TYPESTRINGS.get(interface["typestr"])
    if code is None:
        raise DTypeError(f"{name}: expected dtype {' or '.join(CODES)}, got {interface['typestr']}")
    if interface.get("mask") is not None:
        raise ArgumentError(f"{name}: expected an array without a mask, got a masked one; its mask would be ignored")
    address, readonly = interface["data"]
    strides = contiguous_strides(shape, ITEMSIZE[code]) if strides is None else tuple(strides)
    writer = interface.get("stream")
    array = DeviceArray(
        value, address or 0, shape, strides, code, bool(readonly), None if writer == LEGACY_DEFAULT else writer
    )
    _on_current_device(name, value)
    return array


def _on_current_device(name: str, value: Any) -> None:
    """PyTorch and CuPy say on which GPU an array is; a kernel would run on the current one."""
    device = getattr(value, "device", None)
    number = {"torch": "index", "cupy": "id"}.get(_library(value))
    if number is None:
        return
    found, current = getattr(device, number), cuda.get_current_device().id
    if found is not None and found != current:
        raise ArgumentError(
            f"{name}: expected an array on the current GPU, number {current}, got one on number {found}; make it the "
            "current one with the library's own context manager and numba.cuda.gpus"
        )


def _from_dlpack(name: str, value: Any) -> DeviceArray | None:
    if not _check.is_on_gpu(value):
        return None
    from cuda.core.utils import StridedMemoryView

    seen = StridedMemoryView.from_dlpack(value, stream_ptr=stream_handle(None))  # orders its stream before ours
    dtype = np.dtype(seen.dtype)
    if dtype.name not in CODES:
        raise DTypeError(f"{name}: expected dtype {' or '.join(CODES)}, got {dtype}")
    code, shape = CODES[dtype.name], tuple(seen.shape)
    strides = contiguous_strides(shape, 1) if seen.strides is None else tuple(seen.strides)
    strides = tuple(stride * ITEMSIZE[code] for stride in strides)
    return DeviceArray(value, seen.ptr, shape, strides, code, bool(seen.readonly), None, seen)


def _library(owner: Any) -> str:
    """ "torch" or "cupy" if it is an array of theirs, or of a class derived from it; else an empty string."""
    roots = {base.__module__.partition(".")[0] for base in type(owner).__mro__}
    return next((name for name in ("torch", "cupy") if name in roots), "")


@contextmanager
def _pool(x: DeviceArray) -> Iterator[str]:
    """The library of x, made to take memory for the stream that the call works on: pools reuse it in its order."""
    library, handle = _library(x.owner), _stream.get()
    if handle is None or library not in ("torch", "cupy"):
        yield library
    elif library == "torch":
        torch = sys.modules["torch"]
        with torch.cuda.stream(torch.cuda.ExternalStream(handle, device=x.owner.device)):
            yield library
    else:
        with sys.modules["cupy"].cuda.ExternalStream(handle):
            yield library


def empty_like(x: DeviceArray) -> tuple[Any, DeviceArray]:
    """A new array in the memory order of x, without its gaps, of the library that made x."""
    with _pool(x) as library:
        return _empty_like(x, library)


def _empty_like(x: DeviceArray, library: str) -> tuple[Any, DeviceArray]:
    if library in ("torch", "cupy"):
        made = sys.modules[library].empty_like(x.owner)
        seen = view("y", made)
        assert seen is not None
        return made, seen
    order = sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis]))
    dense = contiguous_strides(tuple(x.shape[axis] for axis in order), x.itemsize)
    strides = tuple(dense[order.index(axis)] for axis in range(x.ndim))
    return _new(x, x.shape, strides, x.code)


def empty(like: DeviceArray, size: int, code: str, zeros: bool = False) -> tuple[Any, DeviceArray]:
    """A new vector, of the library that made `like`; of zeros if asked for."""
    with _pool(like) as library:
        return _empty(like, size, code, zeros, library)


def _empty(like: DeviceArray, size: int, code: str, zeros: bool, library: str) -> tuple[Any, DeviceArray]:
    if library == "torch":
        make = like.owner.new_zeros if zeros else like.owner.new_empty
        made = make(size, dtype=getattr(sys.modules["torch"], NAMES[code]))
    elif library == "cupy":
        made = (sys.modules["cupy"].zeros if zeros else sys.modules["cupy"].empty)(size, NAMES[code])
    else:
        made, seen = _new(like, (size,), (ITEMSIZE[code],), code)
        if zeros:
            made.copy_to_device(np.zeros(size, made.dtype))
        return made, seen
    found = view("", made)
    assert found is not None
    return made, found


def _new(like: DeviceArray, shape: tuple[int, ...], strides: tuple[int, ...], code: str) -> tuple[Any, DeviceArray]:
    """An array of Numba, which has no bfloat16: there it is one of uint16."""
    dtype = np.dtype(np.uint16 if code == "bf16" else NAMES[code])
    made = cuda.device_array(shape, dtype, strides=strides, stream=current_stream(like))
    return made, DeviceArray(made, _interface("", made)["data"][0] or 0, shape, strides, code, False, None)


# ---------------------------------------------------------------------------------------------------------------------
# Streams


@contextmanager
def stream(value: Any) -> Iterator[None]:
    """Use this stream within a `with` block, in the current thread (or asyncio task) only.

    Parameters
    ----------
    value : int, or a stream of CuPy, PyTorch, Numba or cuda.core
        Of the current device.
    """
    token = _stream.set(_handle_of(value))
    try:
        yield
    finally:
        _stream.reset(token)


def _handle_of(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if hasattr(value, "__cuda_stream__"):
        return int(value.__cuda_stream__()[1])
    for attribute in ("cuda_stream", "ptr", "handle"):  # PyTorch, CuPy, Numba
        if hasattr(value, attribute):
            handle = getattr(value, attribute)
            return int(getattr(handle, "value", handle) or 0)
    raise ArgumentError(f"stream: expected a CUDA stream or its address, got {value!r}")


def stream_handle(x: DeviceArray | None) -> int:
    """That of `stream`, else the current one of PyTorch or CuPy if x is theirs, else that of x, else the default."""
    given = _stream.get()
    if given is not None:
        return int(given)
    if x is None:
        return 0
    library = _library(x.owner)
    if library == "torch":
        return int(sys.modules["torch"].cuda.current_stream(x.owner.device).cuda_stream)
    if library == "cupy":
        return int(sys.modules["cupy"].cuda.get_current_stream().ptr)
    return x.stream or 0


def current_stream(x: DeviceArray | None) -> Any:
    """The same as a stream of Numba."""
    handle = stream_handle(x)
    return cuda.external_stream(handle) if handle else 0


def wait_for(work: Any, arrays: list[DeviceArray]) -> None:
    """Make the stream `work` wait for the streams that the arrays name as their writers'."""
    own = int(work)
    for other in {array.stream for array in arrays if array.stream} - {own, 0}:
        event = cuda.event(timing=False)
        event.record(cuda.external_stream(other))
        event.wait(work or cuda.default_stream())
