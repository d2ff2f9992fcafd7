"""``fastbn bench``: the throughput of this machine."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastbn
from fastbn.cli.arguments import THREADS, UsageError, output
from fastbn.cli.bench_cuda import bench_cuda
from fastbn.nn.plain import numpy_backward, numpy_forward, numpy_inference

Array = NDArray[Any]

SHAPES: tuple[tuple[tuple[int, ...], int, str], ...] = (  # shape, channel axis, layout
    ((32, 64, 56, 56), 1, "NCHW"),
    ((32, 56, 56, 64), -1, "NHWC"),
    ((32, 256, 14, 14), 1, "NCHW"),
    ((32, 2048, 7, 7), 1, "NCHW"),
    ((256, 512), 1, "NC"),
)
QUICK_SHAPES = SHAPES[2:3] + SHAPES[4:]

BENCH_NOTES = """\
float32; medians of {repeats} repeats, fastbn and NumPy taking turns; fastbn writes to a buffer of the caller.
GB/s counts what must move: x read and y written; in the backward pass x and dy read and dx written. Training needs
the statistics first, so it reads its inputs twice unless a cache holds them: about 67 % (forward) and 60 % (backward)
of the copy speed is then the most to expect. Shapes that fit into a cache can exceed the speed of copying in memory."""


def add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what to measure (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="two small shapes")
    parser.add_argument("--json", type=output, metavar="FILE", help="write the results as JSON, too")
    parser.add_argument("--num-threads", type=THREADS, metavar="N", help="threads of fastbn (NumPy uses one)")
    parser.set_defaults(run=bench)


def seconds_a_call(function: Callable[[], object], calls: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def median_seconds(contenders: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median time of a call of each contender. They take turns; a turn starts with a pause, in which the threads of the
    other one go to sleep, and with calls that are not counted: the first ones wake threads, which may take ticks of the
    system's clock."""
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(repeats):
        for contender, results in zip(contenders, times, strict=True):
            time.sleep(0.01)
            first = [seconds_a_call(contender)]
            while len(first) < 8 and sum(first) < 0.02:
                first.append(seconds_a_call(contender))
            results.append(seconds_a_call(contender, max(1, int(0.005 / min(first)))))  # enough for the clock
    return [statistics.median(results) for results in times]


def bench_shape(shape: tuple[int, ...], axis: int, repeats: int) -> dict[str, tuple[int, list[float]]]:
    """Per operation the bytes that must move and the median seconds of fastbn and of NumPy."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(shape, np.float32) for _ in range(2))
    channels = shape[axis]
    gamma, beta = np.ones(channels, np.float32), np.zeros(channels, np.float32)
    running_mean, running_var = np.zeros(channels, np.float32), np.ones(channels, np.float32)
    out = np.empty_like(x)
    batchnorm = functools.partial(
        fastbn.batchnorm, x, gamma, beta, running_mean=running_mean, running_var=running_var, axis=axis, out=out
    )
    _, cache = fastbn.batchnorm_forward(x, gamma, beta, axis=axis)

    axes = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    # NumPy wants vectors that broadcast against x.
    g, b, m, v = (np.expand_dims(vector, axes) for vector in (gamma, beta, running_mean, running_var))
    mean, rstd = x.mean(axes, keepdims=True), 1 / np.sqrt(x.var(axes, keepdims=True) + 1e-5)

    contenders: dict[str, tuple[int, Callable[[], object], Callable[[], object]]] = {
        "forward": (
            2 * x.nbytes,
            functools.partial(batchnorm, training=True),
            lambda: numpy_forward(x, g, b, axes),
        ),
        "inference": (
            2 * x.nbytes,
            functools.partial(batchnorm, training=False),
            lambda: numpy_inference(x, g, b, m, v),
        ),
        "backward": (
            3 * x.nbytes,
            lambda: fastbn.batchnorm_backward(dy, cache, out=out),
            lambda: numpy_backward(dy, x, g, mean, rstd, axes),
        ),
    }
    return {name: (nbytes, median_seconds(pair, repeats)) for name, (nbytes, *pair) in contenders.items()}


def bench(args: argparse.Namespace) -> int:
    repeats = 7
    shapes = QUICK_SHAPES if args.quick else SHAPES
    record: dict[str, Any] = {"repeats": repeats}
    if args.device == "cuda":
        if args.num_threads is not None:
            raise UsageError("--num-threads is of the CPU: it does not go with --device cuda")
        record["rows"] = bench_cuda(shapes, repeats)
    else:
        record["copy_gb_per_s"], record["rows"] = bench_cpu(shapes, repeats, args.num_threads)
    if args.json is not None:
        args.json.write_text(json.dumps({"machine": fastbn.runtime.config(), **record}, indent=1) + "\n")
    return 0


def bench_cpu(
    shapes: Sequence[tuple[tuple[int, ...], int, str]], repeats: int, num_threads: int | None
) -> tuple[float, list[dict[str, Any]]]:
    """Print the table; the copy speed in GB/s and the rows."""
    rows = []
    with fastbn.threads(num_threads) if num_threads is not None else contextlib.nullcontext():
        threads = fastbn.get_num_threads()
        copy_speed = fastbn.runtime.copy_speed()
        print(
            f"fastbn {fastbn.__version__}, NumPy {np.__version__}; threads: {threads}; copying: {copy_speed:.1f} GB/s\n"
        )
        print(f"{'operation':<10} {'layout':<6} {'shape':<18} {'ms':>9} {'GB/s':>7} {'of copy':>8}", end="")
        print(f" {'NumPy ms':>9} {'speed-up':>9}", flush=True)
        for shape, axis, layout in shapes:
            for operation, (nbytes, (ours, numpys)) in bench_shape(shape, axis, repeats).items():
                speed = nbytes / ours / 1e9
                rows.append(
                    {
                        "operation": operation,
                        "layout": layout,
                        "shape": shape,
                        "ms": ours * 1e3,
                        "gb_per_s": speed,
                        "share_of_copy": speed / copy_speed,
                        "numpy_ms": numpys * 1e3,
                        "speed_up": numpys / ours,
                    }
                )
                print(
                    f"{operation:<10} {layout:<6} {'x'.join(map(str, shape)):<18} {ours * 1e3:>9.3f} {speed:>7.1f}"
                    f" {speed / copy_speed:>8.0%} {numpys * 1e3:>9.3f} {numpys / ours:>8.1f}x",
                    flush=True,
                )
    print(f"\n{BENCH_NOTES.format(repeats=repeats)}")
    return copy_speed, rows
