"""What the library runs on: instruction sets, data types, threads, and how fast this machine copies memory.

The kernel table is chosen per call. `FASTBN_ISA` sets the default when fastbn is imported, `isa` overrides it for the
current thread (or asyncio task). The number of threads is decided per call as well:

1. `num_threads=` of the call, used as it is;
2. else the first of `threads(n)`, `set_num_threads(n)`, `FASTBN_NUM_THREADS`, `OMP_NUM_THREADS` and
   `min(CPU affinity, cgroup quota rounded up)`, as these two were at the first large call. If the limit of OpenMP is
   lower than its environment explains, somebody has lowered it at run time (threadpoolctl, `torch.set_num_threads`): it
   caps the number. Every thread must have at least `BYTES_PER_THREAD` of x to do, or what is as much work
   (`choose_threads`), so small calls run on one thread. Inside another OpenMP parallel region the number is 1.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _cgroup, _core, memory
from .errors import ArgumentError

__all__ = [
    "activations",
    "available_isas",
    "config",
    "copy_speed",
    "dtypes",
    "get_num_threads",
    "isa",
    "set_num_threads",
    "show_config",
    "threads",
]

# Below this share of x a thread costs more to start and to wait for than it saves.
BYTES_PER_THREAD = 64 * 1024
# A channel of a thread's own, if its sums are asked for, is as much work besides as so many bytes; as x, at most.
WORK_OF_CHANNEL = 160
# Of channels that threads share, what is known of them goes from core to core: for each, up to so many, a thread must
# have so many bytes more. Of more channels, what it takes to find that is shared as well.
BYTES_PER_CHANNEL = 48
MANY_CHANNELS = 4096
# More threads than any machine has; a request for more is a mistake that could exhaust the process limit of the system.
MAX_THREADS = 4096
# Likewise of bytes: what no processor can address.
MAX_BYTES = 1 << 57

ACTIVATION_INDEX = {name: index for index, (name, _needs_argument) in enumerate(_core.activations())}
_DTYPE_INDEX = {name: index for index, (_code, name) in enumerate(_core.dtypes())}
_ISA_INDEX = {name: index for index, (name, available) in enumerate(_core.isas()) if available}


def available_isas() -> tuple[str, ...]:
    """Names of the instruction sets that this machine can run, best first."""
    return tuple(_ISA_INDEX)


def dtypes() -> tuple[str, ...]:
    """NumPy names of the supported data types of x."""
    return tuple(_DTYPE_INDEX)


def activations() -> tuple[str, ...]:
    """Names of the activations that can be fused; the first is "identity", which None means too."""
    return tuple(ACTIVATION_INDEX)


@lru_cache(maxsize=256)
def dtype_index(dtype: np.dtype[Any]) -> int | None:
    """The core's index of a data type (in any byte order), None if it is not supported."""
    return _DTYPE_INDEX.get(dtype.name)


def report(message: str) -> None:
    """One line on stderr if FASTBN_VERBOSE=1."""
    if os.environ.get("FASTBN_VERBOSE", "0") not in ("", "0"):
        print(f"fastbn: {message}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Instruction set


def _initial_isa(environment: Mapping[str, str]) -> int:
    name = environment.get("FASTBN_ISA", "")
    if not name:
        return next(iter(_ISA_INDEX.values()))
    if name not in _ISA_INDEX:
        problem = "is not available on this machine" if name in dict(_core.isas()) else "is unknown"
        raise ImportError(f"FASTBN_ISA={name!r} {problem}; valid names: {', '.join(_ISA_INDEX)}")
    return _ISA_INDEX[name]


_default_isa = _initial_isa(os.environ)
_isa: ContextVar[int] = ContextVar("fastbn_isa", default=_default_isa)


def current_isa() -> int:
    """The core's index of the instruction set in use here."""
    return _isa.get()


@contextmanager
def isa(name: str) -> Iterator[None]:
    """Use another instruction set within a `with` block, in the current thread (or asyncio task) only.

    Examples
    --------
    >>> import fastbn
    >>> with fastbn.runtime.isa(fastbn.runtime.available_isas()[-1]):
    ...     y = fastbn.batchnorm([[1.0, 2.0], [3.0, 5.0]])
    """
    if not (isinstance(name, str) and name in _ISA_INDEX):
        raise ArgumentError(f"isa: expected one of {', '.join(map(repr, _ISA_INDEX))}, got {name!r}")
    token = _isa.set(_ISA_INDEX[name])
    try:
        yield
    finally:
        _isa.reset(token)


# ---------------------------------------------------------------------------------------------------------------------
# Threads


def cgroup_cpus(proc: Path = _cgroup.PROC, cgroups: Path = _cgroup.CGROUPS) -> float | None:
    """CPUs that the control groups of this process grant, None if they set no limit.

    Version 2 has `cpu.max` ("150000 100000" or "max 100000"), version 1 `cpu.cfs_quota_us` (-1: none) and
    `cpu.cfs_period_us`.
    """
    limits = map(_quota, _cgroup.groups("cpu", proc, cgroups))
    return min((limit for limit in limits if limit is not None), default=None)


def _quota(group: Path) -> float | None:
    """CPUs that one group grants, in either version; None if it has no limit, no such file, or something unreadable."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((group / name).read_text() for name in names).split()
            if int(quota) > 0 and int(period) > 0:
                return int(quota) / int(period)
        except (OSError, ValueError):
            continue
    return None


def _affinity() -> int:
    """CPUs on which this process may run."""
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not on every system
        return os.cpu_count() or 1


@lru_cache(maxsize=1)
def _available_cpus() -> tuple[int, int]:
    """(CPU affinity, the same limited by the cgroup quota rounded up)."""
    affinity, quota = _affinity(), cgroup_cpus()
    return affinity, affinity if quota is None else max(1, min(affinity, int(-(-quota // 1))))


def omp_num_threads(environment: Mapping[str, str]) -> int | None:
    """OMP_NUM_THREADS as OpenMP reads it: the first of a comma list; invalid text is as good as none."""
    first = environment.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isascii() and first.isdigit() and int(first) >= 1 else None


def fastbn_num_threads(environment: Mapping[str, str]) -> int | None:
    """FASTBN_NUM_THREADS, None if not set; what cannot be meant is an ImportError."""
    text = environment.get("FASTBN_NUM_THREADS", "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MAX_THREADS):
        raise ImportError(f"FASTBN_NUM_THREADS: expected an integer from 1 to {MAX_THREADS}, got {text!r}")
    return int(text)


_omp_threads = omp_num_threads(os.environ)
_environment_threads = fastbn_num_threads(os.environ)
_set_threads: int | None = None  # set_num_threads: the whole process
_block_threads: ContextVar[int | None] = ContextVar("fastbn_threads", default=None)  # threads(n): this context


@lru_cache(maxsize=1)
def _process_threads() -> tuple[int, str, int]:
    """The number for large work that the environment gives, why, and OpenMP's own limit if nobody has lowered it."""
    affinity, cpus = _available_cpus()
    limit = affinity if _omp_threads is None else _omp_threads
    if _environment_threads is not None:
        return _environment_threads, "FASTBN_NUM_THREADS", limit
    if _omp_threads is not None:
        return min(_omp_threads, MAX_THREADS), "OMP_NUM_THREADS", limit
    return cpus, "CPU affinity" if cpus == affinity else "cgroup quota", limit


# A child may have been moved to other CPUs or to another cgroup; it counts again.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_available_cpus.cache_clear)
    os.register_at_fork(after_in_child=_process_threads.cache_clear)


def _default_threads() -> tuple[int, str]:
    """The number of threads for large work, and why."""
    if not _core.OPENMP:
        return 1, "built without OpenMP"
    limit = _core.openmp_limit()
    if limit == 0:
        return 1, "inside an OpenMP parallel region"
    preferred, source, untouched = _process_threads()
    block = _block_threads.get()
    if block is not None:
        preferred, source = block, "threads() block"
    elif _set_threads is not None:
        preferred, source = _set_threads, "set_num_threads"
    if limit < preferred and limit < untouched:
        return limit, "OpenMP limit lowered at run time"
    return preferred, source


def choose_threads(num_threads: int | None, nbytes: int, own: int = 0, shared: int = 0) -> int:
    """Threads for one call on `nbytes` of x; `num_threads` has been checked, and is used as it is.

    `own` are channels whose sums a thread makes by itself, `shared` are those of which all threads have some rows."""
    if num_threads is not None:
        return num_threads
    work = nbytes + min(WORK_OF_CHANNEL * own, nbytes)
    worthwhile = work // (BYTES_PER_THREAD + BYTES_PER_CHANNEL * min(shared, MANY_CHANNELS))
    return 1 if worthwhile < 2 else min(worthwhile, _default_threads()[0])


def check_count(name: str, value: Any, largest: int = MAX_THREADS) -> int:
    """An integer from 1 to `largest`; True is not meant as 1."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and 1 <= value <= largest:
        return int(value)
    raise ArgumentError(f"{name}: expected an integer from 1 to {largest}, got {value!r}")


def set_num_threads(n: int | None) -> None:
    """Set the default number of threads of the whole process; None goes back to the environment."""
    global _set_threads
    _set_threads = None if n is None else check_count("n", n)


def get_num_threads() -> int:
    """The number of threads that a call on large arrays uses here and now."""
    return _default_threads()[0]


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Use `n` threads by default within a `with` block, in the current Python thread (or asyncio task) only.

    Examples
    --------
    >>> import fastbn
    >>> with fastbn.threads(1):
    ...     fastbn.get_num_threads()
    1
    """
    token = _block_threads.set(check_count("n", n))
    try:
        yield
    finally:
        _block_threads.reset(token)


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def copy_speed(nbytes: int = 1 << 28, num_threads: int | None = None, repeats: int = 7) -> float:
    """How fast this machine copies memory now, in GB/s: the yardstick of every throughput in this project.

    Parameters
    ----------
    nbytes : int
        Size of the copied block; large enough to leave every cache (the default is 256 MiB).
    num_threads : int, optional
        As everywhere.
    repeats : int
        Copies per kind of store. The median counts.

    Returns
    -------
    float
        Bytes read and bytes written per second, in 1e9, by plain or by streaming stores, whichever is faster.
    """
    nbytes, repeats = check_count("nbytes", nbytes, MAX_BYTES), check_count("repeats", repeats, MAX_BYTES)
    count = choose_threads(None if num_threads is None else check_count("num_threads", num_threads), nbytes)
    source: npt.NDArray[np.uint8] = np.ones(nbytes, np.uint8)
    destination: npt.NDArray[np.uint8] = np.full(nbytes, 2, np.uint8)  # written, so it exists before the clock runs
    best = 0.0
    for stream in (False, True):
        seconds = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            _core.copy(current_isa(), count, destination, source, stream)
            seconds.append(time.perf_counter() - start)
        # The first one wakes the threads. A clock too coarse for a tiny block shows zero.
        best = max(best, 2e-9 * nbytes / max(statistics.median(seconds[1:]), 1e-9))
    return best


def config() -> dict[str, str]:
    """What `show_config` prints, as a dictionary."""
    from . import cuda

    count, reason = _default_threads()
    cache = memory.cache_info()
    return {
        "fastbn": version() + (" (debug build)" if _core.DEBUG else ""),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": f"{platform.machine()} {platform.system()}",
        "compiler": _core.COMPILER,
        "openmp": "yes" if _core.OPENMP else "no (every call runs on one thread)",
        "isa": available_isas()[list(_ISA_INDEX.values()).index(current_isa())],
        "isas available": ", ".join(available_isas()),
        "tuned for": next(name for name, here in _core.processors() if here),
        "threads": f"{count} ({reason})",
        "dtypes": ", ".join(dtypes()),
        "activations": ", ".join(activations()),
        "cache": f"{cache.idle_bytes >> 20} of at most {cache.limit >> 20} MiB of freed results kept",
        "cuda": cuda.description(),
    }


def version() -> str:
    """The version of the installed package; "unknown" where it is imported from a plain folder."""
    from importlib import metadata

    try:
        return metadata.version("fastbn")
    except metadata.PackageNotFoundError:
        return "unknown"


def show_config() -> None:
    """Print versions, compiler, OpenMP, instruction sets, threads and why, dtypes, activations, and cuda or why not."""
    entries = config()
    width = max(map(len, entries))
    for key, value in entries.items():
        print(f"{key:<{width}}  {value}")
