"""The GPU: ``device="cuda"`` of the forward functions and layers, by kernels in Numba-CUDA (extra ``fastbn[cuda]``).

Nothing here is imported before it is asked for. docs/cuda.md shows how to use it with NumPy, CuPy and PyTorch arrays.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from ..errors import DeviceError

__all__ = ["description", "is_available", "require", "stream", "why_not"]


_works = False


def _driver_version() -> tuple[int, int]:
    """The CUDA version that the driver supports; an exception of Numba's if there is no driver or no GPU."""
    from numba import cuda
    from numba.cuda.cudadrv.driver import driver

    major, minor = driver.get_version()
    cuda.get_current_device()
    return major, minor


def _toolkit_version() -> tuple[int, int]:
    """The CUDA version that kernels are compiled with."""
    from numba import cuda

    major, minor = cuda.runtime.get_version()
    return major, minor


def why_not() -> str | None:
    """Why ``device="cuda"`` cannot be used here: one line, None if it can."""
    global _works
    if _works:
        return None
    try:
        from numba import config
        from numba.cuda.extending import intrinsic  # noqa: F401 (numba-cuda has it, the old part of Numba has not)
    except ModuleNotFoundError as error:
        return f"numba-cuda is not installed: pip install 'fastbn[cuda]' ({error})"
    except ImportError as error:
        return f"numba-cuda cannot be imported: {error}"
    if not config.ENABLE_CUDASIM:
        try:
            driver, toolkit = _driver_version(), _toolkit_version()
        except Exception as error:  # Numba's own and those of the driver's bindings
            return "no usable GPU: " + " ".join(str(error).split()).removesuffix(" :")
        if driver[0] < toolkit[0]:
            return (
                f"the driver is too old: it supports CUDA {driver[0]}.{driver[1]}, and CUDA {toolkit[0]}.{toolkit[1]} "
                f"is installed; update the driver, or pip install 'numba-cuda[cu{driver[0]}]'"
            )
    _works = True
    return None


def is_available() -> bool:
    """Whether ``device="cuda"`` can be used here."""
    return why_not() is None


def description() -> str:
    """The GPU in use and the CUDA version of its driver, or why there is none."""
    reason = why_not()
    if reason is not None:
        return f"no ({reason})"
    from numba import config, cuda

    if config.ENABLE_CUDASIM:
        return "Numba's simulator"
    name = cuda.get_current_device().name
    major, minor = _driver_version()
    return f"{name.decode() if isinstance(name, bytes) else name}, CUDA {major}.{minor}"


def require() -> None:
    """DeviceError with the reason if the GPU cannot be used."""
    reason = why_not()
    if reason is not None:
        raise DeviceError(f"device: 'cuda' cannot be used here: {reason}")


def stream(value: Any) -> AbstractContextManager[None]:
    """Work on this stream within a `with` block, in the current thread (or asyncio task) only.

    Without it a call works on the current stream of PyTorch or CuPy if x is an array of theirs, else on the stream that
    x names, else on the default one.

    Parameters
    ----------
    value : int, or a stream of CuPy, PyTorch, Numba or cuda.core
        Of the current device.
    """
    require()
    from . import _arrays

    return _arrays.stream(value)
