"""The one forward and the one backward behind every public function: check, view, call the core, update."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

from . import _check, _core, _layout, runtime
from .errors import ArgumentError

Array: TypeAlias = npt.NDArray[Any]
Float64Array: TypeAlias = npt.NDArray[np.float64]
Operand: TypeAlias = tuple[Array, tuple[int, int, int]]  # an array and its strides as the kernels see it

_UINT8 = np.dtype(np.uint8)
_IDENTITY = runtime.ACTIVATION_INDEX["identity"]
# Activations whose gradient a bit a value does not tell.
NEED_ARGUMENT = {index for index, (_name, needed) in enumerate(_core.activations()) if needed}


class Options(TypedDict, total=False):
    """The keyword arguments of all forward functions; `batchnorm2d` says what they mean."""

    running_mean: Array | None
    running_var: Array | None
    training: bool | None
    momentum: float
    eps: float
    unbiased: bool
    nan_guard: str
    activation: str | tuple[str, float] | None
    residual: npt.ArrayLike | None
    out: Array | None
    device: str
    num_threads: int | None


# In the order of Options, which is that in which `_accept` unpacks them.
DEFAULTS: Options = {
    "running_mean": None,
    "running_var": None,
    "training": None,
    "momentum": 0.1,
    "eps": 1e-5,
    "unbiased": True,
    "nan_guard": "propagate",
    "activation": None,
    "residual": None,
    "out": None,
    "device": "cpu",
    "num_threads": None,
}


_accepted = _core.Accepted(DEFAULTS, ("running_mean", "running_var", "residual", "out"))


class BatchNormCache:
    """What backward needs from forward. Leave `x` unchanged until then: it is not copied. Nor is the residual that
    comes before an activation whose gradient is more than open or shut (hardswish).

    Attributes
    ----------
    x : ndarray
        The input (or the copy of it, if its memory order had to be changed).
    gamma : ndarray of float64, shape (C,), read-only, or None
        A copy.
    mean, rstd : ndarray of float64, shape (C,), read-only
        The statistics that were used: of the batch in training, else the running ones; ``rstd = 1 / sqrt(var + eps)``.
    nbytes : int
        Bytes kept alive, `x` included.
    """

    __slots__ = (
        "_activation",
        "_added",
        "_axis",
        "_beta_dtype",
        "_dtype",
        "_gamma_dtype",
        "_mask",
        "_on_gpu",
        "_residual",
        "_statistics",
        "_training",
        "_view",
        "_x",
    )
    _x: Array
    _axis: int
    _view: _layout.View
    _dtype: int
    _activation: tuple[int, float]
    _training: bool
    _on_gpu: bool
    _residual: bool
    _added: tuple[Array, tuple[int, int, int]] | None
    _statistics: Float64Array
    _mask: npt.NDArray[np.uint8] | None
    _gamma_dtype: np.dtype[Any] | None
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
        return None if self._gamma_dtype is None else self._row(_core.STATISTICS_GAMMA)

    @property
    def mean(self) -> Float64Array:
        return self._row(_core.STATISTICS_MEAN)

    @property
    def rstd(self) -> Float64Array:
        return self._row(_core.STATISTICS_RSTD)

    @property
    def nbytes(self) -> int:
        added = None if self._added is None else self._added[0]
        kept = (self._x, self._statistics, self._mask, added)
        return sum(array.nbytes for array in kept if array is not None)

    def __repr__(self) -> str:
        mode = "training" if self._training else "inference"
        return f"BatchNormCache({mode}, x {self._x.dtype} {self._x.shape}, {self.nbytes} bytes)"


@dataclass(slots=True, eq=False)  # frozen, it would take four times as long to make
class Gradients:
    """Result of `batchnorm_backward`; unpacks as ``dx, dgamma, dbeta``, but has no indices. None stands where forward
    had None."""

    dx: Array
    dgamma: Array | None
    dbeta: Array | None
    dresidual: Array | None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.dx, self.dgamma, self.dbeta))


def source(x: Any, options: Options) -> Any:
    """x as the functions go on with it: an ndarray, or an array on the GPU where ``device="cuda"`` asks for that."""
    device = options.get("device")
    if type(x) is not np.ndarray and isinstance(device, str) and device == "cuda":
        _check.device("cuda")
        from .cuda import _arrays

        seen = _arrays.view("x", x)
        if seen is not None:
            return seen
    return _check.array("x", x)


def forward(
    x: Any,
    gamma: Any,
    beta: Any,
    axis: int,
    keep: bool,
    given: Options,
    counter: npt.NDArray[np.int64] | None = None,
) -> tuple[Array, BatchNormCache | None]:
    """Every forward function; `keep` asks for the cache, `counter` counts the batches that running statistics have
    taken. Nothing is written before all arguments have been checked."""
    if type(x) is not np.ndarray:
        from .cuda import _device

        return _device.forward(x, gamma, beta, axis, keep, _merged(given), counter)
    (options, threads, on_gpu), (mean, var, residual, out) = _accepted.recall(given) or _accept(given)
    training, update, momentum, eps, unbiased, nan_guard, act = options
    dtype, channels, per_channel, view = _layout.plan(x, axis)
    if dtype is None:
        dtype = _check.supported_dtype("x", x.dtype)
    if training:
        _check.several_values(x.shape, per_channel)
    keep_added = keep and residual is not None and act[0] in NEED_ARGUMENT
    if (
        view is not None
        and view.dense
        and _core.are_ordinary(x, residual, out, not keep, not keep_added, channels, gamma, beta, mean, var, update)
    ):
        data, strides = x, view.strides
        addend = None if residual is None else (residual, strides)
        target = (_core.empty_like(x) if out is None else out, strides)
    else:
        (gamma, beta, mean, var), (data, strides), view, addend, target = _examined(
            x, axis, channels, view, residual, out, keep, keep_added, (gamma, beta, mean, var), update
        )
    y = target[0] if out is None else out
    planar, shape = view.planar, view.shape
    mask = None
    keep_mask = keep and addend is not None and act[0] != _IDENTITY and not keep_added
    finite_first = update and nan_guard == "raise" and out is not None  # else nobody sees what has been written
    if on_gpu:
        from .cuda import _host

        call = _host.make_call(dtype, planar, shape, act, training)
        vectors = (gamma, beta, mean, var)
        statistics, mask = _host.forward(call, (data, strides), addend, target, keep_mask, vectors, eps, finite_first)
        if update and x.size and (nan_guard == "propagate" or _host.moments_are_finite(statistics)):
            if counter is not None:
                counter += 1
            _host.update_running(mean, var, statistics, per_channel, momentum, unbiased)
    else:
        if keep_mask:
            mask = _core.empty((_core.mask_nbytes(planar, shape, x.itemsize),), _UINT8)
        statistics = _core.forward(
            runtime.current_isa(),
            dtype,
            view.threads(threads, x.nbytes, training),
            planar,
            shape,
            (data, strides),
            addend,
            target,
            mask,
            act,
            gamma,
            beta,
            mean,
            var,
            eps,
            training,
            momentum,
            unbiased,
            counter,
            nan_guard != "propagate",
            finite_first,
            keep,
        )
    if keep and not x.size:  # no channel has been finished
        with np.errstate(divide="ignore", invalid="ignore"):
            statistics[_core.STATISTICS_RSTD] = 1 / np.sqrt(statistics[_core.STATISTICS_VAR] + eps)
    if update and nan_guard == "raise":
        _check.finite_statistics(statistics[_core.STATISTICS_MEAN], statistics[_core.STATISTICS_VAR])
    if not keep:
        return y, None
    cache = BatchNormCache()
    cache._x, cache._axis, cache._view, cache._dtype = data, axis, view, dtype
    cache._activation, cache._training, cache._residual = act, training, addend is not None
    cache._on_gpu = on_gpu
    cache._statistics, cache._mask, cache._added = statistics, mask, addend if keep_added else None
    cache._gamma_dtype = None if gamma is None else gamma.dtype
    cache._beta_dtype = None if beta is None else beta.dtype
    return y, cache


def _merged(given: Any) -> dict[str, Any]:
    """All options."""
    merged: dict[str, Any] = {**DEFAULTS, **given}
    if len(merged) != len(DEFAULTS):
        unknown = next(name for name in merged if name not in DEFAULTS)
        raise TypeError(f"got an unexpected keyword argument {unknown!r}; the options are {', '.join(DEFAULTS)}")
    return merged


def _accept(given: Any) -> tuple[tuple[_check.Options, int | None, bool], list[Any]]:
    """What every check has made of the options, and the arrays among them."""
    mean, var, training, momentum, eps, unbiased, nan_guard, activation, residual, out, device, num_threads = _merged(
        given
    ).values()
    on_gpu = _check.device(device)
    options = _check.options(
        mean is not None, var is not None, training, momentum, eps, unbiased, nan_guard, activation
    )
    accepted = (options, _check.num_threads(num_threads), on_gpu)
    if not on_gpu:  # whether there is one is asked each time
        _accepted.remember(given, accepted)
    return accepted, [mean, var, residual, out]


def _examined(
    x: Array,
    axis: int,
    channels: int,
    view: _layout.View | None,
    residual: Any,
    out: Any,
    keep: bool,
    keep_added: bool,
    vectors: tuple[Any, Any, Any, Any],
    update: bool,
) -> tuple[_check.Vectors, Operand, _layout.View, Operand | None, Operand]:
    """The arrays of a call of forward that is not an ordinary one, after every check: the vectors, x and its view,
    residual and y. What the kernels cannot use in place is copied."""
    gamma, beta, mean, var = _check.vectors(*vectors, channels, update)
    added = None if residual is None else _check.companion("residual", residual, x)
    if update:
        assert mean is not None and var is not None
        _check.updated_apart(mean, var, x, added)
    buffer = None
    if out is not None:
        buffer = _check.out(out, x)
        _check.out_apart(buffer, keep, keep_added, x, added, mean, var)
    data = x
    if view is None:
        data, view = _layout.reduced("x", x, axis)
    if buffer is None:
        target = _layout.new_like(data, axis, view)
    else:
        target = buffer, _check.out_view(buffer, axis, view.planar).strides
    addend = None
    if added is not None:
        added, added_view = _layout.reduced("residual", added, axis, view.planar)
        addend = (added, added_view.strides)
    return (gamma, beta, mean, var), (data, view.strides), view, addend, target


def forward_with_cache(
    x: Array,
    gamma: npt.ArrayLike | None,
    beta: npt.ArrayLike | None,
    axis: int,
    given: Options,
    counter: npt.NDArray[np.int64] | None = None,
) -> tuple[Array, BatchNormCache]:
    """`forward` that keeps what backward needs."""
    y, cache = forward(x, gamma, beta, axis, True, given, counter)
    assert cache is not None
    return y, cache


def backward(dy: Any, cache: BatchNormCache, out: Array | None, num_threads: int | None) -> Gradients:
    """`functional.batchnorm_backward`. Nothing is written before all arguments have been checked."""
    if not isinstance(cache, BatchNormCache):
        raise ArgumentError(f"cache: expected the cache of a forward function, got {type(cache).__name__}")
    if type(cache) is not BatchNormCache:
        from .cuda import _device

        return _device.backward(dy, cache, out, num_threads)
    x, axis, view = cache._x, cache._axis, cache._view
    threads = _check.num_threads(num_threads)
    if view.dense and cache._added is None and _core.is_ordinary_gradient(x, dy, out):
        given = (dy, view.strides)
        target = (_core.empty_like(x) if out is None else out, view.strides)
    else:
        given, target = _examined_gradient(dy, cache, out)
    dx = target[0] if out is None else out
    dresidual = second = None
    if cache._residual:
        second = dresidual, _ = _layout.new_like(x, axis, view)
    operands = ((x, view.strides), cache._added, given, target, second, cache._mask)
    if cache._on_gpu:
        from .cuda import _host

        dgamma, dbeta = _host.backward(
            _host.make_call(cache._dtype, view.planar, view.shape, cache._activation, cache._training),
            *operands,
            cache._statistics,
            cache._gamma_dtype,
            cache._beta_dtype,
        )
    else:
        dgamma, dbeta = _core.backward(
            runtime.current_isa(),
            cache._dtype,
            view.threads(threads, x.nbytes, True),
            view.planar,
            view.shape,
            *operands,
            cache._activation,
            cache._statistics,
            cache._training,
            cache._gamma_dtype,
            cache._beta_dtype,
        )
    return Gradients(dx, dgamma, dbeta, dresidual)


def _examined_gradient(dy: Any, cache: BatchNormCache, out: Array | None) -> tuple[Operand, Operand]:
    """dy and dx of a call of backward that is not an ordinary one, after every check."""
    x, axis, view = cache._x, cache._axis, cache._view
    gradient = _check.companion("dy", dy, x)
    if out is None:
        target = _layout.new_like(x, axis, view)
    else:
        buffer = _check.out(out, x)
        _check.apart("out", buffer, "x", x)
        _check.apart_or_same("out", buffer, "dy", gradient)
        if cache._added is not None:
            _check.apart("out", buffer, "residual", cache._added[0])
        target = buffer, _check.out_view(buffer, axis, view.planar).strides
    gradient, seen = _layout.reduced("dy", gradient, axis, view.planar)
    return (gradient, seen.strides), target
