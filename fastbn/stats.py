"""Per-channel statistics that can be merged: of micro-batches, files, processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _check, _core, _layout, runtime
from .errors import ArgumentError, ShapeError, SingleValueError

__all__ = ["Stats", "batchnorm_stats"]


@dataclass(frozen=True, eq=False)
class Stats:
    """Number of values, mean and sum of squared deviations from the mean, of every channel.

    Attributes
    ----------
    count : int
        Values per channel.
    mean, m2 : ndarray of float64, shape (C,)
        Mean, and sum of ``(x - mean)**2``. Both 0 if `count` is 0.
    """

    count: int
    mean: npt.NDArray[np.float64]
    m2: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, (int, np.integer)) or self.count < 0:
            raise ArgumentError(f"count: expected an integer >= 0, got {self.count!r}")
        mean, m2 = _check.statistic("mean", self.mean), _check.statistic("m2", self.m2)
        if m2.shape != mean.shape:
            raise ShapeError(f"m2: expected shape {mean.shape} as mean, got {m2.shape}")
        for name, value in (("count", int(self.count)), ("mean", mean), ("m2", m2)):
            object.__setattr__(self, name, value)

    def var(self, unbiased: bool = False) -> npt.NDArray[np.float64]:
        """Variance of every channel: `m2 / count`, or `m2 / (count - 1)` if unbiased.

        Raises
        ------
        SingleValueError
            With fewer values than that needs: one, or two if unbiased.
        """
        degrees = self.count - 1 if _check.boolean("unbiased", unbiased) else self.count
        if degrees < 1:
            least = self.count - degrees + 1
            raise SingleValueError(f"var: expected a count of at least {least} per channel, got {self.count}")
        return np.asarray(self.m2 / degrees)

    def merge(self, other: Stats) -> Stats:
        """Statistics of both sets of values together (Chan, Golub and LeVeque 1979); float64, no cancellation.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> x = np.arange(12.0).reshape(6, 2)
        >>> both = fastbn.batchnorm_stats(x[:2]).merge(fastbn.batchnorm_stats(x[2:]))
        >>> both.count, both.mean, both.var()
        (6, array([5., 6.]), array([11.66666667, 11.66666667]))
        """
        if not isinstance(other, Stats):
            raise ArgumentError(f"other: expected Stats, got {type(other).__name__}")
        if other.mean.shape != self.mean.shape:
            raise ShapeError(f"other: expected {self.mean.size} channels, got {other.mean.size}")
        if self.count == 0 or other.count == 0:
            return self if other.count == 0 else other
        count = self.count + other.count
        with np.errstate(invalid="ignore", over="ignore"):  # a channel with Inf has no variance, without a warning
            delta = other.mean - self.mean
            mean = np.where(np.isfinite(delta), self.mean + delta * (other.count / count), self.mean + other.mean)
            m2 = self.m2 + other.m2 + delta * delta * (self.count * (other.count / count))
        return Stats(count, mean, m2)


def batchnorm_stats(x: npt.ArrayLike, *, axis: int = 1, num_threads: int | None = None) -> Stats:
    """Exact statistics of every channel, in one pass over `x`.

    Parameters
    ----------
    x : array_like
        Any rank; a dtype of ``fastbn.runtime.dtypes()``.
    axis : int
        The channel axis.
    num_threads : int, optional
        See `fastbn.runtime`.

    Returns
    -------
    Stats
        `count`, `mean` and `m2`; the bits do not depend on the number of threads. NaN and Inf stay in their channel; of
        an empty x the count is 0.

    Raises
    ------
    ShapeError, DTypeError, ArgumentError
        Naming the argument.

    Examples
    --------
    >>> import fastbn
    >>> stats = fastbn.batchnorm_stats([[1.0, 10.0], [3.0, 10.0]])
    >>> stats.count, stats.mean, stats.var()
    (2, array([ 2., 10.]), array([1., 0.]))
    """
    values: npt.NDArray[Any] = _check.array("x", x)
    dtype = _check.supported_dtype("x", values.dtype)
    axis = _check.axis(axis, values.ndim)
    threads = _check.num_threads(num_threads)
    channels = values.shape[axis]
    if values.size == 0:
        return Stats(0, np.zeros(channels), np.zeros(channels))
    values, view = _layout.reduced("x", values, axis)
    rows = np.zeros((_core.STATISTICS_ROWS, channels))
    threads = view.threads(threads, values.nbytes, True)
    _core.statistics(runtime.current_isa(), dtype, threads, view.planar, view.shape, (values, view.strides), rows)
    return Stats(values.size // channels, rows[_core.STATISTICS_MEAN].copy(), rows[_core.STATISTICS_M2].copy())
