"""``fastbn bench --device cuda``: the throughput of a GPU."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import fastbn

CALLS = 20
NOTES = """\
float32, arrays that stay on the GPU; medians of {repeats} repeats of {calls} calls. Device time is between two events
on the GPU, wall time is that of the host until all is done. GB/s counts what must move: x read and y written, in
training x read twice; in backward x and dy read twice and dx written. Where a call costs the host more than the GPU,
both times are that of the host."""


def seconds(function: Callable[[], object]) -> tuple[float, float]:
    """Device time and wall time of a call, after as many untimed ones."""
    from numba import cuda

    for _ in range(CALLS):
        function()
    first, last = cuda.event(), cuda.event()
    cuda.synchronize()
    start = time.perf_counter()
    first.record()
    for _ in range(CALLS):
        function()
    last.record()
    cuda.synchronize()
    wall = time.perf_counter() - start
    return first.elapsed_time(last) / 1e3 / CALLS, wall / CALLS


# Tensors of x's size that move: x is read for the statistics and once more, in backward with dy.
TENSORS = {"copy": 2, "forward": 3, "inference": 2, "backward": 5}


def contenders(shape: tuple[int, ...], axis: int) -> dict[str, Callable[[], object]]:
    """Per operation a call; "copy" is a copy of x."""
    from numba import cuda

    rng = np.random.default_rng(0)
    x, dy = (cuda.to_device(rng.standard_normal(shape, np.float32)) for _ in range(2))
    ones, zeros = np.ones(shape[axis], np.float32), np.zeros(shape[axis], np.float32)
    gamma, beta, mean, var = (cuda.to_device(vector) for vector in (ones, zeros, zeros, ones))
    out = cuda.device_array_like(x)
    options: dict[str, Any] = {"axis": axis, "device": "cuda"}
    running = {"running_mean": mean, "running_var": var, "out": out, **options}
    _, cache = fastbn.batchnorm_forward(x, gamma, beta, **options)
    return {
        "copy": lambda: out.copy_to_device(x),
        "forward": lambda: fastbn.batchnorm(x, gamma, beta, training=True, **running),
        "inference": lambda: fastbn.batchnorm(x, gamma, beta, training=False, **running),
        "backward": lambda: fastbn.batchnorm_backward(dy, cache, out=out),
    }


def bench_cuda(shapes: Sequence[tuple[tuple[int, ...], int, str]], repeats: int) -> list[dict[str, Any]]:
    """Print the table and return its rows. DeviceError if there is no GPU."""
    fastbn.cuda.require()
    print(f"fastbn {fastbn.__version__}; {fastbn.cuda.description()}\n")
    print(f"{'operation':<10} {'layout':<6} {'shape':<18} {'device us':>10} {'wall us':>10} {'GB/s':>7} {'of copy':>8}")
    rows = []
    for shape, axis, layout in shapes:
        calls = contenders(shape, axis)
        times: dict[str, list[tuple[float, float]]] = {operation: [] for operation in calls}
        for _ in range(repeats):
            for operation, call in calls.items():
                times[operation].append(seconds(call))
        speeds = {}
        for operation in calls:
            nbytes = TENSORS[operation] * 4 * math.prod(shape)
            device, wall = (statistics.median(column) for column in zip(*times[operation], strict=True))
            speeds[operation] = nbytes / device / 1e9
            rows.append(
                {
                    "operation": operation,
                    "layout": layout,
                    "shape": shape,
                    "device_us": device * 1e6,
                    "wall_us": wall * 1e6,
                    "gb_per_s": speeds[operation],
                    "share_of_copy": speeds[operation] / speeds["copy"],
                }
            )
            print(
                f"{operation:<10} {layout:<6} {'x'.join(map(str, shape)):<18} {device * 1e6:>10.1f} {wall * 1e6:>10.1f}"
                f" {speeds[operation]:>7.1f} {speeds[operation] / speeds['copy']:>8.0%}",
                flush=True,
            )
    print(f"\n{NOTES.format(repeats=repeats, calls=CALLS)}")
    return rows
