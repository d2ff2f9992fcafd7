"""The memory of large results: blocks that arrays have freed are kept for the next results, and from which size on
results are stored past the caches.

The system hands out new memory page by page, and that takes longer than to fill it: a new result of 100 MB costs more
than to compute it. So the memory of a result of 64 KiB or more, once no array uses it any longer, is kept for the next
one, up to a limit. `FASTBN_CACHE_LIMIT` (bytes) sets it when fastbn is imported, `set_cache_limit` at any time; the
default is the smaller of 1 GiB and an eighth of the memory that this process may use.

A store past the caches (a streaming store) does not read the line that it replaces. It pays where the arrays of a
call, those that it reads and those that it writes, are too large for the caches together; `FASTBN_STREAM_BYTES` or
`set_stream_bytes` says from how many bytes on. On x86-64 only; no bit depends on it.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from . import _cgroup, _core
from .errors import ArgumentError

__all__ = ["CacheInfo", "cache_info", "empty", "empty_cache", "set_cache_limit", "set_stream_bytes", "stream_bytes"]

# The default: at most this, and at most this part of what the process may use.
MOST = 1 << 30
SHARE = 8

# More than any memory: what is below fits the core's integers.
LARGEST = 1 << 62


class CacheInfo(NamedTuple):
    """Result of `cache_info`; sizes in bytes."""

    limit: int
    idle_bytes: int
    idle_blocks: int
    hits: int
    misses: int


def usable_memory(proc: Path = _cgroup.PROC, cgroups: Path = _cgroup.CGROUPS) -> int:
    """Bytes that this process may use: the smallest of the machine's memory, cgroup limits and RLIMIT_AS."""

    def limits() -> Iterator[int]:
        yield os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        soft, _hard = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            yield soft
        for group in _cgroup.groups("memory", proc, cgroups):
            for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):  # version 2, version 1
                try:
                    yield int((group / name).read_text())
                except (OSError, ValueError):  # no such file, or "max"
                    continue

    return min(limit for limit in limits() if limit > 0)


def nbytes_of_environment(variable: str, environment: Mapping[str, str]) -> int | None:
    """The number of bytes in a variable, None if it is not set; what cannot be meant is an ImportError."""
    text = environment.get(variable, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit()):
        raise ImportError(f"{variable}: expected a number of bytes, got {text!r}")
    return int(text)


_environment_limit = nbytes_of_environment("FASTBN_CACHE_LIMIT", os.environ)
_environment_stream = nbytes_of_environment("FASTBN_STREAM_BYTES", os.environ)


def _check_nbytes(nbytes: Any) -> int:
    if isinstance(nbytes, bool) or not isinstance(nbytes, (int, np.integer)) or nbytes < 0:
        raise ArgumentError(f"nbytes: expected a number of bytes from 0, or None, got {nbytes!r}")
    return min(int(nbytes), LARGEST)


def set_cache_limit(nbytes: int | None) -> None:
    """Keep at most `nbytes` of freed results.

    Parameters
    ----------
    nbytes : int or None
        0 keeps nothing, and leaves the memory of results below 32 MiB to NumPy; None goes back to the environment or
        the default. What is over the limit is returned to the system at once, the oldest first.

    Raises
    ------
    ArgumentError

    Examples
    --------
    >>> import fastbn
    >>> fastbn.set_cache_limit(256 << 20)
    >>> fastbn.cache_info().limit
    268435456
    >>> fastbn.set_cache_limit(None)
    """
    if nbytes is None:
        nbytes = min(MOST, usable_memory() // SHARE) if _environment_limit is None else _environment_limit
    _core.set_cache_limit(_check_nbytes(nbytes))


def empty(shape: tuple[int, ...], dtype: npt.DTypeLike = np.float64) -> npt.NDArray[Any]:
    """An array like `numpy.empty`'s, whose memory is recycled as that of fastbn's results is: for your own buffers.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.memory.empty((2, 3), "float32").shape
    (2, 3)
    """
    result: npt.NDArray[Any] = _core.empty(tuple(shape), np.dtype(dtype))
    return result


def empty_cache() -> None:
    """Return the memory of all freed results to the system."""
    _core.empty_cache()


def cache_info() -> CacheInfo:
    """The limit; how many bytes, in how many blocks, are kept now; how many results got a kept block, how many not."""
    return CacheInfo(*_core.cache_info())


def set_stream_bytes(nbytes: int | None) -> None:
    """Store results past the caches, where their rows allow it, if the arrays of a call have so many bytes together.

    Those are the arrays of the size of x, read or written: x, y and a residual forward; x, dy, dx and what a residual
    adds backward. Where channels are taken one after the other (NCHW, training and backward, with channels enough for
    all threads), and for inference, the number is another, in the proportion to the default that was measured on the
    kind of processor: docs/memory.md.

    Parameters
    ----------
    nbytes : int or None
        0: all results; a huge number: none. None goes back to the environment or the default.

    Raises
    ------
    ArgumentError

    Examples
    --------
    >>> import fastbn
    >>> fastbn.memory.set_stream_bytes(64 << 20)
    >>> fastbn.memory.stream_bytes()
    67108864
    >>> fastbn.memory.set_stream_bytes(None)
    """
    if nbytes is None:
        nbytes = _core.MEASURED_STREAM_BYTES if _environment_stream is None else _environment_stream
    _core.set_stream_bytes(_check_nbytes(nbytes))


def stream_bytes() -> int:
    """What `set_stream_bytes` has set, or the default."""
    return _core.stream_bytes()


set_cache_limit(None)
set_stream_bytes(None)
