"""The one forward and the one backward behind every public function: check, view, call the core, update."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

from . import _check, _core, _layout, runtime
from .errors import ArgumentError

if TYPE_CHECKING:
    from typing_extensions import Unpack

Array: TypeAlias = npt.NDArray[Any]
Float64Array: TypeAlias = npt.NDArray[np.float64]


class Options(TypedDict, total=False):
    """The keyword arguments of all forward functions; `forward` has their defaults, `batchnorm2d` their meaning."""

    running_mean: Array | None
    running_var: Array | None
    training: bool | None
    momentum: float
    eps: float
    unbiased: bool
    activation: str | None
    residual: npt.ArrayLike | None
    out: Array | None
    device: str
    num_threads: int | None


class BatchNormCache:
    """What backward needs from forward. Leave `x` unchanged until then: it is not copied.

    Attributes
    ----------
    x : ndarray
        The input (or the copy of it, if its memory order had to be changed).
    gamma : ndarray of float64, shape (C,), or None
    mean, rstd : ndarray of float64, shape (C,), read-only
        The statistics that were used: of the batch in training, else the running ones; ``rstd = 1 / sqrt(var + eps)``.
    nbytes : int
        Bytes kept alive, `x` included.
    """

    __slots__ = (
        "_activation",
        "_axis",
        "_beta",
        "_beta_dtype",
        "_dtype",
        "_gamma",
        "_gamma_dtype",
        "_mask",
        "_residual",
        "_statistics",
        "_training",
        "_view",
        "_x",
    )
    _x: Array
    _axis: int
    _view: _layout.View | None  # None: an empty batch
    _dtype: int
    _activation: int
    _training: bool
    _residual: bool
    _statistics: Float64Array
    _mask: npt.NDArray[np.uint8] | None
    _gamma: Float64Array | None
    _gamma_dtype: np.dtype[Any] | None
    _beta: Float64Array | None
    _beta_dtype: np.dtype[Any] | None

    def _row(self, index: int) -> Float64Array:
        row: Float64Array = self._statistics[index]
        row.flags.writeable = False
        return row

    @property
    def x(self) -> Array:
        return self._x

    @property
    def gamma(self) -> Float64Array | None:
        return self._gamma

    @property
    def mean(self) -> Float64Array:
        return self._row(_core.STATISTICS_MEAN)

    @property
    def rstd(self) -> Float64Array:
        return self._row(_core.STATISTICS_RSTD)

    @property
    def nbytes(self) -> int:
        kept = (self._x, self._statistics, self._mask, self._gamma, self._beta)
        return sum(array.nbytes for array in kept if array is not None)

    def __repr__(self) -> str:
        mode = "training" if self._training else "inference"
        return f"BatchNormCache({mode}, x {self._x.dtype} {self._x.shape}, {self.nbytes} bytes)"


@dataclass(frozen=True, eq=False)
class Gradients:
    """Result of `batchnorm_backward`; unpacks as ``dx, dgamma, dbeta``. None stands where forward had None."""

    dx: Array
    dgamma: Array | None
    dbeta: Array | None
    dresidual: Array | None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.dx, self.dgamma, self.dbeta))


def forward(
    x: Array,
    gamma: npt.ArrayLike | None,
    beta: npt.ArrayLike | None,
    axis: int,
    keep: bool,
    /,
    *,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    training: bool | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    unbiased: bool = True,
    activation: str | None = None,
    residual: npt.ArrayLike | None = None,
    out: Array | None = None,
    device: str = "cpu",
    num_threads: int | None = None,
) -> tuple[Array, BatchNormCache | None]:
    """Every forward function; `keep` asks for the cache. Nothing is written before all arguments have been checked."""
    _check.device(device)
    dtype = _check.supported_dtype("x", x.dtype)
    training = _check.training(training, running_mean, running_var)
    update = training and running_mean is not None
    eps = _check.eps(eps, training)
    momentum = _check.momentum(momentum)
    unbiased = _check.boolean("unbiased", unbiased)
    act = _check.activation(activation)
    threads = _check.num_threads(num_threads)
    with _core.DefaultMode():  # for the conversions to and from float64
        channels = x.shape[axis]
        gamma64, gamma_dtype = _check.parameter("gamma", gamma, channels)
        beta64, beta_dtype = _check.parameter("beta", beta, channels)
        running: list[tuple[str, Array]] = []
        if running_mean is not None:
            running = [
                (name, _check.running(name, value, channels, update))
                for name, value in (("running_mean", running_mean), ("running_var", running_var))
            ]
        added = None if residual is None else _check.companion("residual", residual, x)
        buffer = None if out is None else _check.out(out, x)
        count = x.size // channels if channels else 0
        if training:
            _check.several_values(x.shape, count)
        _check.aliases(x, added, buffer, running, update, keep)

        rows: Float64Array = np.zeros((_core.STATISTICS_RSTD + 1, channels))
        mask, view, y, cached = None, None, out, x
        if x.size == 0:
            y = np.empty_like(x, dtype=x.dtype.newbyteorder("=")) if out is None else out
        else:
            data, view = _layout.reduced("x", x, axis)
            cached, planar, shape = data, view.planar, view.shape
            if buffer is None:
                y, y_view = _layout.new_like(data, axis, planar)
                target = (y, y_view.strides)
            else:
                target = (buffer, _check.out_view(buffer, axis, planar).strides)
            addend = None
            if added is not None:
                added, added_view = _layout.reduced("residual", added, axis, planar)
                addend = (added, added_view.strides)
                if keep and act:
                    mask = np.empty(_core.mask_nbytes(planar, shape), np.uint8)
            if not training:
                rows[_core.STATISTICS_MEAN] = running[0][1]
                rows[_core.STATISTICS_VAR] = running[1][1]
            threads = runtime.choose_threads(threads, data.nbytes)
            isa, source = runtime.current_isa(), (data, view.strides)
            _core.forward(
                isa,
                dtype,
                threads,
                planar,
                shape,
                source,
                addend,
                target,
                mask,
                act,
                gamma64,
                beta64,
                eps,
                rows,
                training,
            )
            if update:
                _update_running(running, rows, count, momentum, unbiased)
    assert y is not None
    if not keep:
        return y, None
    cache = BatchNormCache()
    cache._x, cache._axis, cache._view, cache._dtype = cached, axis, view, dtype
    cache._activation, cache._training, cache._residual = act, training, residual is not None
    cache._statistics, cache._mask = rows, mask
    cache._gamma, cache._gamma_dtype, cache._beta, cache._beta_dtype = gamma64, gamma_dtype, beta64, beta_dtype
    return y, cache


def forward_with_cache(
    x: Array, gamma: npt.ArrayLike | None, beta: npt.ArrayLike | None, axis: int, /, **options: Unpack[Options]
) -> tuple[Array, BatchNormCache]:
    """`forward` that keeps what backward needs."""
    y, cache = forward(x, gamma, beta, axis, True, **options)
    assert cache is not None
    return y, cache


def _update_running(
    running: list[tuple[str, Array]], rows: Float64Array, count: int, momentum: float, unbiased: bool
) -> None:
    """Both running statistics, computed in float64 and rounded once to their own dtype."""
    var = rows[_core.STATISTICS_M2] / float(count - 1) if unbiased else rows[_core.STATISTICS_VAR]
    updated: Float64Array = np.empty((2, rows.shape[1]))
    for index, batch in enumerate((rows[_core.STATISTICS_MEAN], var)):
        updated[index] = running[index][1]
        _core.update_running(updated[index], batch, momentum)
    with np.errstate(over="ignore"):  # what a narrow running array cannot hold becomes Inf, without a warning
        for index in (0, 1):
            running[index][1][...] = updated[index]


def backward(dy: npt.ArrayLike, cache: BatchNormCache, out: Array | None, num_threads: int | None) -> Gradients:
    """`functional.batchnorm_backward`. Nothing is written before all arguments have been checked."""
    if not isinstance(cache, BatchNormCache):
        raise ArgumentError(f"cache: expected the cache of a forward function, got {type(cache).__name__}")
    x, axis, view = cache._x, cache._axis, cache._view
    gradient = _check.companion("dy", _check.array("dy", dy), x)
    threads = _check.num_threads(num_threads)
    buffer = None if out is None else _check.out(out, x)
    if buffer is not None:
        _check.apart("out", buffer, "x", x)
        _check.apart_or_same("out", buffer, "dy", gradient)
    with _core.DefaultMode():  # for the conversions of dgamma and dbeta
        dgamma, dbeta = np.zeros(x.shape[axis]), np.zeros(x.shape[axis])
        dresidual = None
        dx: Array
        if view is None:
            dx = np.empty_like(x, dtype=x.dtype.newbyteorder("=")) if out is None else out
            dresidual = np.empty_like(x, dtype=x.dtype.newbyteorder("=")) if cache._residual else None
        else:
            planar = view.planar
            if out is None:
                dx, dx_view = _layout.new_like(x, axis, planar)
                target = (dx, dx_view.strides)
            else:
                assert buffer is not None
                dx, target = out, (buffer, _check.out_view(buffer, axis, planar).strides)
            gradient, dy_view = _layout.reduced("dy", gradient, axis, planar)
            second = None
            if cache._residual:
                dresidual, dresidual_view = _layout.new_like(x, axis, planar)
                second = (dresidual, dresidual_view.strides)
            _core.backward(
                runtime.current_isa(),
                cache._dtype,
                runtime.choose_threads(threads, x.nbytes),
                planar,
                view.shape,
                (x, view.strides),
                (gradient, dy_view.strides),
                target,
                second,
                cache._mask,
                cache._activation,
                cache._gamma,
                cache._beta,
                cache._statistics,
                cache._training,
                dgamma,
                dbeta,
            )
        with np.errstate(over="ignore"):
            return Gradients(
                dx,
                None if cache._gamma_dtype is None else dgamma.astype(cache._gamma_dtype, copy=False),
                None if cache._beta_dtype is None else dbeta.astype(cache._beta_dtype, copy=False),
                dresidual,
            )
