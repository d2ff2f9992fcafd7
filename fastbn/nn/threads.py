"""How the layers share their work among cores.

Work is cut into parts that do not depend on the number of threads, so neither do the results, bit for bit. The parts
run on the OpenMP threads that also compute batch normalization; NumPy's products then have one thread each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastbn
from fastbn.memory import empty
from fastbn.nn import _windows

Array = NDArray[Any]

PARTS = 16  # of the images of a batch: enough for many threads, few enough for each to have something to do
SERIAL = 1 << 19  # operations of a part; fewer are not worth being handed to another thread
MOVE = 16  # operations that take as long as to read and write a value


@contextmanager
def threads(n: int) -> Iterator[None]:
    """`n` threads for fastbn and the layers of `fastbn.nn` within a `with` block."""
    from threadpoolctl import threadpool_limits

    with fastbn.threads(n), threadpool_limits(1, user_api="blas"):
        yield


def for_each(function: Callable[[slice], object], count: int, operations: int) -> None:
    """Call ``function(part)`` for parts of ``range(count)``; as many as `operations` are worth, at most `PARTS`."""
    parts = max(1, min(PARTS, count, operations // SERIAL))
    ends = [count * i // parts for i in range(parts + 1)]
    workers = min(parts, fastbn.get_num_threads())
    errors: Any = np.geterr()  # another thread has its own

    def call(i: int) -> None:
        with np.errstate(**errors):
            function(slice(ends[i], ends[i + 1]))

    if workers == 1:
        for i in range(parts):
            call(i)
    else:
        _windows.for_each(call, parts, workers)


def product(a: Array, b: Array) -> Array:
    """``a @ b`` of two matrices, cut along the longer side of the result."""
    rows, columns = len(a), b.shape[1]
    y = empty((rows, columns), np.result_type(a, b))

    def part(which: slice) -> None:
        if rows >= columns:
            np.matmul(a[which], b, out=y[which])
        else:
            np.matmul(a, b[:, which], out=y[:, which])

    for_each(part, max(rows, columns), 2 * rows * columns * a.shape[1])
    return y
