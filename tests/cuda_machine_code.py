"""Compiles and links kernels of the GPU for compute capability 9.0, which needs no GPU; prints as JSON what came out.

A program of its own, because Numba is either a compiler or a simulator for the life of a process.
"""

import json
import re
import sys
from types import SimpleNamespace

import numba.cuda.dispatcher
from cuda.bindings import nvjitlink
from numba import cuda
from numba.cuda import types

from fastbn import runtime
from fastbn.cuda import _kernels, _launch, _plan

CAPABILITY = (9, 0)
# The compiler asks the current device what to compile functions for.
numba.cuda.dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=CAPABILITY)

INTEGER, REAL = types.int64, types.float64
WALK, PARAMETER = types.UniTuple(INTEGER, 5), types.UniTuple(INTEGER, 3)
GEOMETRY = types.UniTuple(INTEGER, 13)
SIGNATURES = {
    "forward": types.void(
        INTEGER, GEOMETRY, *[WALK] * 3, INTEGER, INTEGER, types.UniTuple(PARAMETER, 4), types.UniTuple(INTEGER, 3),
        types.UniTuple(REAL, 3),
    ),
    "backward": types.void(
        INTEGER, GEOMETRY, *[WALK] * 5, types.UniTuple(INTEGER, 2), INTEGER, types.UniTuple(PARAMETER, 2),
        types.UniTuple(INTEGER, 2), REAL,
    ),
}  # fmt: skip


def link(ptx):
    """What the assembler says of a kernel: registers of a thread, bytes that it spills."""
    options = [f"-arch=sm_{CAPABILITY[0]}{CAPABILITY[1]}", "-verbose", "-Xptxas=-v"]
    handle = nvjitlink.create(len(options), options)
    nvjitlink.add_data(handle, nvjitlink.InputType.PTX, ptx, len(ptx), "kernel")
    nvjitlink.complete(handle)
    log = bytearray(nvjitlink.get_info_log_size(handle))
    nvjitlink.get_info_log(handle, log)
    text = log.decode()
    (registers,) = re.findall(r"Used (\d+) registers", text)
    spilled = re.findall(r"(\d+) bytes spill stores", text)
    return int(registers), sum(map(int, spilled))


def compiled(direction, code, width, planar, phases, residual):
    """The kernel that `_launch` would use, of an activation with a mask where there is a residual."""
    backward = direction == "backward"
    threads = _launch.threads(planar, backward)
    loads = _plan.loads(_plan.FORMATS[code][0], width, planar, 2 if backward else 1)
    relu = runtime.ACTIVATION_INDEX["relu"]
    variant = _kernels.Variant(
        code,
        width,
        planar,
        threads,
        loads,
        relu,
        phases,
        True,
        residual and not backward,
        residual,
        residual and backward,
    )
    kernel = getattr(_kernels, direction)(variant)
    text, _ = cuda.compile_ptx(
        kernel.py_func, SIGNATURES[direction], cc=CAPABILITY, launch_bounds=kernel.targetoptions["launch_bounds"]
    )
    registers, spilled = link(text.encode())
    return {"ptx": text, "loads": loads, "threads": threads, "registers": registers, "spilled": spilled}


if __name__ == "__main__":
    json.dump([compiled(*variant) for variant in json.load(sys.stdin)], sys.stdout)
