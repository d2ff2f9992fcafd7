"""Compiles kernels of the GPU for compute capability 9.0, which needs no GPU, and prints their PTX as JSON.

A program of its own, because Numba is either a compiler or a simulator for the life of a process.
"""

import json
import sys
from types import SimpleNamespace

import numba.cuda.dispatcher
from numba import cuda
from numba.cuda import types

from fastbn import runtime
from fastbn.cuda import _kernels, _launch

CAPABILITY = (9, 0)
# The compiler asks the current device what to compile functions for.
numba.cuda.dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=CAPABILITY)

INTEGER, REAL = types.int64, types.float64
WALK, PARAMETER = types.UniTuple(INTEGER, 5), types.UniTuple(INTEGER, 3)
GEOMETRY = types.UniTuple(INTEGER, 13)
SIGNATURES = {
    "forward": types.void(
        INTEGER, INTEGER, GEOMETRY, *[WALK] * 3, INTEGER, INTEGER, types.UniTuple(PARAMETER, 4),
        types.UniTuple(INTEGER, 4), types.UniTuple(REAL, 3),
    ),
    "backward": types.void(
        INTEGER, INTEGER, GEOMETRY, *[WALK] * 5, types.UniTuple(INTEGER, 2), INTEGER, types.UniTuple(PARAMETER, 2),
        types.UniTuple(INTEGER, 3), REAL,
    ),
}  # fmt: skip


def ptx(direction, code, width, planar, activation):
    """The kernel that `_launch` would use."""
    threads = _launch.PLANAR_THREADS if planar else _launch.INTERLEAVED_THREADS
    loads = _launch.loads(code, width, planar, 1 if direction == "forward" else 2)
    kernel = getattr(_kernels, direction)(code, width, planar, threads, loads, runtime.ACTIVATION_INDEX[activation])
    text, _ = cuda.compile_ptx(kernel.py_func, SIGNATURES[direction], cc=CAPABILITY)
    return {"ptx": text, "loads": loads}


if __name__ == "__main__":
    json.dump([ptx(*variant) for variant in json.load(sys.stdin)], sys.stdout)
