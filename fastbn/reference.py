"""What fastbn computes, in plain float64 NumPy: the definition that all tests compare with.

Same names and arguments as `fastbn.functional`, but for `out`, `device` and `num_threads`; nothing is checked, nothing
is fast, results are float64, and those of backward and of statistics are plain named tuples, of four gradients and of
count, mean and m2. Running arrays are updated in place, as there. Source: Ioffe and Szegedy 2015,
arXiv:1502.03167, Algorithms 1 and 2 and section 3.

Activations: `ACTIVATIONS[name]` is the pair (y from v, slope from v); both also take the slope of leaky_relu. NaN and
Inf follow from these lines: relu is ``v < 0 ? 0 : v``, so NaN stays NaN; its gradient passes unless ``v <= 0``, so it
passes at NaN. Sources: Maas et al. 2013 (leaky_relu); Howard et al. 2017, arXiv:1704.04861 (relu6) and 2019,
arXiv:1905.02244, section 5.2 (hardsigmoid, hardswish).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Float64Array: TypeAlias = npt.NDArray[np.float64]


# ---------------------------------------------------------------------------------------------------------------------
# Activations


NEGATIVE_SLOPE = 0.01


def _identity(v: Float64Array, _: float) -> Float64Array:
    return v


def _identity_slope(v: Float64Array, _: float) -> Float64Array:
    return np.ones_like(v)


def _relu(v: Float64Array, _: float) -> Float64Array:
    return np.where(v < 0, 0.0, v)


def _relu_slope(v: Float64Array, _: float) -> Float64Array:
    return np.where(v <= 0, 0.0, 1.0)


def _leaky_relu(v: Float64Array, negative_slope: float) -> Float64Array:
    return np.where(v < 0, v * negative_slope, v)


def _leaky_relu_slope(v: Float64Array, negative_slope: float) -> Float64Array:
    return np.where(v <= 0, negative_slope, 1.0)


def _relu6(v: Float64Array, _: float) -> Float64Array:
    return np.clip(v, 0.0, 6.0)


def _relu6_slope(v: Float64Array, _: float) -> Float64Array:
    return np.where((v <= 0) | (v >= 6), 0.0, 1.0)


def _hardsigmoid(v: Float64Array, _: float) -> Float64Array:
    return np.clip(v + 3, 0.0, 6.0) / 6


def _hardsigmoid_slope(v: Float64Array, _: float) -> Float64Array:
    return np.where((v <= -3) | (v >= 3), 0.0, 1 / 6)


def _hardswish(v: Float64Array, _: float) -> Float64Array:
    return np.where(v <= -3, 0.0, v * (np.clip(v + 3, 0.0, 6.0) / 6))


def _hardswish_slope(v: Float64Array, _: float) -> Float64Array:
    return np.where(v <= -3, 0.0, np.where(v >= 3, 1.0, v / 3 + 0.5))


Activation: TypeAlias = Callable[[Float64Array, float], Float64Array]
ACTIVATIONS: dict[str, tuple[Activation, Activation]] = {
    "identity": (_identity, _identity_slope),
    "relu": (_relu, _relu_slope),
    "leaky_relu": (_leaky_relu, _leaky_relu_slope),
    "relu6": (_relu6, _relu6_slope),
    "hardsigmoid": (_hardsigmoid, _hardsigmoid_slope),
    "hardswish": (_hardswish, _hardswish_slope),
}


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


@dataclass(frozen=True, eq=False)
class Stats:
    """Values per channel, their mean, and the sum of squared deviations from it."""

    count: int
    mean: Float64Array
    m2: Float64Array


def batchnorm_stats(x: npt.ArrayLike, *, axis: int = 1) -> Stats:
    """Two passes: the mean, then the deviations from it."""
    rows = _channels_first(np.asarray(x, np.float64), axis)
    count = rows.shape[1]
    if count == 0:
        return Stats(0, np.zeros(len(rows)), np.zeros(len(rows)))
    with np.errstate(invalid="ignore", over="ignore"):
        mean = rows.mean(axis=1)
        # A mean is off by a rounding of its own size; the mean of what is left over tells by how much.
        rest = (rows - mean[:, None]).mean(axis=1)
        mean = mean + np.where(np.isfinite(rest), rest, 0)
        return Stats(count, mean, ((rows - mean[:, None]) ** 2).sum(axis=1))


def merge(a: Stats, b: Stats) -> Stats:
    """Statistics of the values of both (Chan, Golub and LeVeque 1979)."""
    if a.count == 0 or b.count == 0:
        return a if b.count == 0 else b
    count = a.count + b.count
    delta = b.mean - a.mean
    mean = a.mean * (a.count / count) + b.mean * (b.count / count)
    return Stats(count, mean, a.m2 + b.m2 + delta**2 * a.count * b.count / count)


def update_running(running: Array, batch: Float64Array, momentum: float) -> None:
    """In place: the weight of the new batch is `momentum`."""
    running[...] = (1 - momentum) * running.astype(np.float64) + momentum * batch


# ---------------------------------------------------------------------------------------------------------------------
# Forward


class Cache(NamedTuple):
    """What backward needs; `v` is what the activation was applied to."""

    x: Float64Array
    v: Float64Array
    gamma: Float64Array | None
    beta: Float64Array | None
    mean: Float64Array
    rstd: Float64Array
    axis: int
    training: bool
    activation: str
    negative_slope: float
    has_residual: bool


def batchnorm_forward(
    x: npt.ArrayLike,
    gamma: npt.ArrayLike | None = None,
    beta: npt.ArrayLike | None = None,
    *,
    axis: int = 1,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    training: bool | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    unbiased: bool = True,
    nan_guard: str = "propagate",
    activation: str | tuple[str, float] | None = None,
    residual: npt.ArrayLike | None = None,
) -> tuple[Float64Array, Cache]:
    """``y = act((x - mean) * rstd * gamma + beta + residual)`` with ``rstd = 1 / sqrt(var + eps)``."""
    x = np.asarray(x, np.float64)
    name, negative_slope = activation if isinstance(activation, tuple) else (activation or "identity", NEGATIVE_SLOPE)
    training = running_mean is None if training is None else training
    if training:
        batch = batchnorm_stats(x, axis=axis)
        count, mean, m2 = batch.count, batch.mean, batch.m2
        var = m2 / count if count else m2
        if running_mean is not None and running_var is not None and x.size:
            finite = bool(np.isfinite(mean).all() and np.isfinite(var).all())
            if nan_guard == "raise" and not finite:
                raise FloatingPointError("the statistics of the batch are not finite")
            if nan_guard == "propagate" or finite:
                update_running(running_mean, mean, momentum)
                update_running(running_var, m2 / (count - 1) if unbiased else var, momentum)
    else:
        mean, var = (np.array(values, np.float64) for values in (running_mean, running_var))

    def along(values: npt.ArrayLike) -> Float64Array:
        return _along(values, x.ndim, axis)

    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        rstd = 1 / np.sqrt(var + eps)
        v = (x - along(mean)) * along(rstd)
        v = v if gamma is None else v * along(gamma)
        v = v if beta is None else v + along(beta)
        v = v if residual is None else v + np.asarray(residual, np.float64)
    gamma, beta = (None if values is None else np.array(values, np.float64) for values in (gamma, beta))
    cache = Cache(x, v, gamma, beta, mean, rstd, axis, training, name, negative_slope, residual is not None)
    with np.errstate(invalid="ignore"):
        return ACTIVATIONS[name][0](v, negative_slope), cache


def batchnorm(
    x: npt.ArrayLike, gamma: npt.ArrayLike | None = None, beta: npt.ArrayLike | None = None, **options: Any
) -> Float64Array:
    """The first result of `batchnorm_forward`; the channel axis is `axis`."""
    return batchnorm_forward(x, gamma, beta, **options)[0]


def batchnorm1d_forward(
    x: npt.ArrayLike,
    gamma: npt.ArrayLike | None = None,
    beta: npt.ArrayLike | None = None,
    *,
    layout: str | None = None,
    **options: Any,
) -> tuple[Float64Array, Cache]:
    """Rank 2 or 3; a layout is a string with one letter per axis, C for the channels."""
    return batchnorm_forward(x, gamma, beta, axis=1 if layout is None else layout.index("C"), **options)


def batchnorm2d_forward(
    x: npt.ArrayLike,
    gamma: npt.ArrayLike | None = None,
    beta: npt.ArrayLike | None = None,
    *,
    layout: str = "NCHW",
    **options: Any,
) -> tuple[Float64Array, Cache]:
    """Rank 4."""
    return batchnorm_forward(x, gamma, beta, axis=layout.index("C"), **options)


def batchnorm3d_forward(
    x: npt.ArrayLike,
    gamma: npt.ArrayLike | None = None,
    beta: npt.ArrayLike | None = None,
    *,
    layout: str = "NCDHW",
    **options: Any,
) -> tuple[Float64Array, Cache]:
    """Rank 5."""
    return batchnorm_forward(x, gamma, beta, axis=layout.index("C"), **options)


def batchnorm1d(x: npt.ArrayLike, *parameters: npt.ArrayLike | None, **options: Any) -> Float64Array:
    """The first result of `batchnorm1d_forward`."""
    return batchnorm1d_forward(x, *parameters, **options)[0]


def batchnorm2d(x: npt.ArrayLike, *parameters: npt.ArrayLike | None, **options: Any) -> Float64Array:
    """The first result of `batchnorm2d_forward`."""
    return batchnorm2d_forward(x, *parameters, **options)[0]


def batchnorm3d(x: npt.ArrayLike, *parameters: npt.ArrayLike | None, **options: Any) -> Float64Array:
    """The first result of `batchnorm3d_forward`."""
    return batchnorm3d_forward(x, *parameters, **options)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Backward


class Gradients(NamedTuple):
    """Of the loss; None where forward was given None."""

    dx: Float64Array
    dgamma: Float64Array | None
    dbeta: Float64Array | None
    dresidual: Float64Array | None


def batchnorm_backward(dy: npt.ArrayLike, cache: Cache, *, slope: npt.ArrayLike | None = None) -> Gradients:
    """The gradients of section 3, with the sums over batch and space written out.

    `slope` replaces that of the activation: where v is within a rounding of a kink, only the program that rounded can
    say on which side of it it was.
    """
    if slope is None:
        slope = ACTIVATIONS[cache.activation][1](cache.v, cache.negative_slope)
    slope = np.asarray(slope, np.float64)
    # Not a product: where nothing passes, dy = Inf or NaN does not matter.
    with np.errstate(invalid="ignore"):
        g = np.where(slope == 0, 0.0, np.asarray(dy, np.float64) * slope)
    centered = cache.x - _along(cache.mean, cache.x.ndim, cache.axis)
    rows, deviations = _channels_first(g, cache.axis), _channels_first(centered, cache.axis)
    count = rows.shape[1]
    with np.errstate(invalid="ignore", over="ignore"):
        sum_g, sum_gx = rows.sum(axis=1), (rows * deviations).sum(axis=1)
        scale = cache.rstd if cache.gamma is None else cache.rstd * cache.gamma
        dx = g
        if cache.training and count:
            slope_x = cache.rstd**2 * sum_gx / count
            dx = g - _along(sum_g / count, g.ndim, cache.axis) - centered * _along(slope_x, g.ndim, cache.axis)
        dx = dx * _along(scale, g.ndim, cache.axis)
    return Gradients(
        dx,
        None if cache.gamma is None else cache.rstd * sum_gx,
        None if cache.beta is None else sum_g,
        g if cache.has_residual else None,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Axes


def _along(values: npt.ArrayLike, ndim: int, axis: int) -> Float64Array:
    """One value per channel, shaped to broadcast along the channel axis."""
    shape = [1] * ndim
    shape[axis] = -1
    return np.asarray(values, np.float64).reshape(shape)


def _channels_first(x: Float64Array, axis: int) -> Float64Array:
    """Shape (channels, count)."""
    rows = np.moveaxis(x, axis, 0)
    return np.ascontiguousarray(rows).reshape(rows.shape[0], int(np.prod(rows.shape[1:])))
