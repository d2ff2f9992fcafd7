"""The functions. Each translates its layout into the channel axis; `_engine` does the rest for all of them.

Source: Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
Shift", 2015, arXiv:1502.03167: Algorithm 1 (training), Algorithm 2 (inference), and the gradients of section 3.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy.typing as npt

from . import _check, _engine
from ._engine import Array, BatchNormCache, Gradients

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._engine import Options

__all__ = [
    "BatchNormCache",
    "Gradients",
    "batchnorm",
    "batchnorm1d",
    "batchnorm1d_forward",
    "batchnorm2d",
    "batchnorm2d_forward",
    "batchnorm3d",
    "batchnorm3d_forward",
    "batchnorm_backward",
    "batchnorm_forward",
]

Function = TypeVar("Function", bound=Callable[..., Any])


def _full_signature(function: Function) -> Function:
    """Show the shared options, which Python receives as **options, in `help` and in `inspect.signature`."""
    own = inspect.signature(function)
    parameters = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    types = {name: getattr(hint, "__forward_arg__", hint) for name, hint in _engine.Options.__annotations__.items()}
    parameters[3:3] = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=types[name])
        for name, default in _engine.DEFAULTS.items()
    ]
    function.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": own.return_annotation}
    return function


@_full_signature
def batchnorm(
    x: npt.ArrayLike,
    gamma: npt.ArrayLike | None = None,
    beta: npt.ArrayLike | None = None,
    *,
    axis: int = 1,
    **options: Unpack[Options],
) -> Array:
    """Normalize each channel of an array of any rank; `axis` is the channel axis.

    All other parameters, results and errors are those of `batchnorm2d`.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.batchnorm([[1.0, 5.0], [3.0, 5.0]], eps=1e-12)
    array([[-1.,  0.],
           [ 1.,  0.]])
    """
    values = _engine.source(x, options)
    return _engine.forward(values, gamma, beta, _check.axis(axis, values.ndim), False, options)[0]


@_full_signature
def batchnorm1d(
    x: npt.ArrayLike,
    gamma: npt.ArrayLike | None = None,
    beta: npt.ArrayLike | None = None,
    *,
    layout: str | None = None,
    **options: Unpack[Options],
) -> Array:
    """Normalize each channel of a batch of vectors or sequences; see `batchnorm2d`.

    The layout is "NC" (rank 2), "NCL" or "NLC" (rank 3); None means "NC" for rank 2 and "NCL" for rank 3.
    """
    values = _engine.source(x, options)
    return _engine.forward(values, gamma, beta, _check.axis_of_layout(values.ndim, 1, layout), False, options)[0]


@_full_signature
def batchnorm2d(
    x: npt.ArrayLike,
    gamma: npt.ArrayLike | None = None,
    beta: npt.ArrayLike | None = None,
    *,
    layout: str = "NCHW",
    **options: Unpack[Options],
) -> Array:
    """Normalize each channel of a batch of images, then scale, shift, add and activate.

    ``y = act((x - mean) / sqrt(var + eps) * gamma + beta + residual)``, with the mean and the population variance of
    every channel: in training those of the batch over N, H and W, in inference the running ones.

    Parameters
    ----------
    x : array_like of shape (N, C, H, W), or (N, H, W, C) if ``layout="NHWC"``
        Its dtype is one of ``fastbn.runtime.dtypes()``. The layout is the meaning of the axes; how the array lies in
        memory is free and only decides which kernels are used.
    gamma, beta : array_like of shape (C,), optional
        Scale and shift, of any float dtype. None is 1 and 0.
    running_mean, running_var : ndarray of shape (C,), optional
        Both or none, of any float dtype. In training they are updated in place: ``r = (1 - momentum) * r + momentum *
        batch``, computed in float64 and rounded once. In inference they are used.
    training : bool, optional
        True: use the statistics of the batch. False: use the running ones. Must be given if running arrays are given;
        without them the batch is used.
    momentum : float
        The weight of the new batch, 0 to 1 (as in PyTorch and cuDNN; Keras, Flax and ONNX give the weight of the old
        value).
    eps : float
        Added to the variance; > 0 in training, >= 0 in inference.
    layout : {"NCHW", "NHWC"}
        Order of the axes of `x`.
    unbiased : bool
        Whether `running_var` gets the variance times ``n / (n - 1)`` (the paper, PyTorch) or as it is (Keras, Flax,
        ONNX).
    nan_guard : {"propagate", "skip", "raise"}
        What running statistics do with a batch whose mean or variance is NaN or Inf in some channel. "propagate": take
        it (as PyTorch), so that these channels are lost from then on. "skip": take nothing from such a batch, in any
        channel, as if it had been empty; y is what it always is. "raise": `NonFiniteError`; with `out`, which is not
        written then either, `x` is read from memory once more.
    activation : str or (str, float), optional
        One of ``fastbn.runtime.activations()``: "relu", "leaky_relu" (slope 0.01; another one as ``("leaky_relu",
        slope)``), "relu6", "hardsigmoid", "hardswish". None is "identity".
    residual : array_like of the shape and dtype of `x`, optional
        Added before the activation.
    out : ndarray of the shape, dtype and memory order of `x`, optional
        Where to write y. ``out is x`` and ``out is residual`` are legal, partial overlap is not. The functions
        `batchnorm*_forward` refuse an `out` that overlaps what backward still needs: `x`, and the `residual` of
        hardswish.
    device : {"cpu", "cuda"}
        Where to compute. With "cuda" NumPy arrays are transferred to the GPU and back, and arrays on the GPU (all or
        none of them) stay there; see docs/cuda.md. `DeviceError` where there is no usable GPU.
    num_threads : int, optional
        Exactly so many threads; see `fastbn.runtime` for the default.

    Returns
    -------
    y : ndarray
        Of the shape and dtype of `x`, in its memory order (if `x` had to be copied, in that of the copy), in native
        byte order; or `out`. Its bits depend on values, shape and dtype and on whether channels are adjacent in memory,
        not on threads, instruction set or alignment.

    Raises
    ------
    ShapeError, ArgumentError, SingleValueError, ReadOnlyError, AliasError
        All are also `ValueError`. After an error nothing has been written.
    DTypeError, DeviceError, NonFiniteError
        Also `TypeError`, `RuntimeError` and `FloatingPointError`.

    Notes
    -----
    Reads `x` twice and writes `y` once. Statistics are float64 and exact to the last bits of float32 for offsets up
    to a million standard deviations. NaN and Inf stay in their channel. An empty batch gives an empty result and
    changes no state. Running statistics are written last, all or none: not by a call that fails, nor by one that an
    interrupt (Ctrl-C) has reached before that.

    References
    ----------
    Ioffe and Szegedy 2015, arXiv:1502.03167, Algorithms 1 and 2.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.arange(8, dtype=np.float32).reshape(2, 1, 2, 2)
    >>> y = fastbn.batchnorm2d(x, np.ones(1), np.full(1, 0.5))
    >>> y.shape, y.dtype, round(float(y.mean()), 6)
    ((2, 1, 2, 2), dtype('float32'), 0.5)
    """
    values = _engine.source(x, options)
    return _engine.forward(values, gamma, beta, _check.axis_of_layout(values.ndim, 2, layout), False, options)[0]


@_full_signature
def batchnorm3d(
    x: npt.ArrayLike,
    gamma: npt.ArrayLike | None = None,
    beta: npt.ArrayLike | None = None,
    *,
    layout: str = "NCDHW",
    **options: Unpack[Options],
) -> Array:
    """Normalize each channel of a batch of volumes; the layout is "NCDHW" or "NDHWC". See `batchnorm2d`."""
    values = _engine.source(x, options)
    return _engine.forward(values, gamma, beta, _check.axis_of_layout(values.ndim, 3, layout), False, options)[0]


@_full_signature
def batchnorm_forward(
    x: npt.ArrayLike,
    gamma: npt.ArrayLike | None = None,
    beta: npt.ArrayLike | None = None,
    *,
    axis: int = 1,
    **options: Unpack[Options],
) -> tuple[Array, BatchNormCache]:
    """`batchnorm` for training: returns y and the cache for `batchnorm_backward`.

    The cache keeps `x` by reference: leave it unchanged until backward. `out` must not overlap it.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.arange(12.0).reshape(6, 2)
    >>> y, cache = fastbn.batchnorm_forward(x, np.ones(2), np.zeros(2), activation="relu")
    >>> dx, dgamma, dbeta = fastbn.batchnorm_backward(np.ones_like(y), cache)
    >>> dbeta
    array([3., 3.])
    """
    values = _engine.source(x, options)
    return _engine.forward_with_cache(values, gamma, beta, _check.axis(axis, values.ndim), options)


@_full_signature
def batchnorm1d_forward(
    x: npt.ArrayLike,
    gamma: npt.ArrayLike | None = None,
    beta: npt.ArrayLike | None = None,
    *,
    layout: str | None = None,
    **options: Unpack[Options],
) -> tuple[Array, BatchNormCache]:
    """`batchnorm1d` that also returns the cache for `batchnorm_backward`; see `batchnorm_forward`."""
    values = _engine.source(x, options)
    axis = _check.axis_of_layout(values.ndim, 1, layout)
    return _engine.forward_with_cache(values, gamma, beta, axis, options)


@_full_signature
def batchnorm2d_forward(
    x: npt.ArrayLike,
    gamma: npt.ArrayLike | None = None,
    beta: npt.ArrayLike | None = None,
    *,
    layout: str = "NCHW",
    **options: Unpack[Options],
) -> tuple[Array, BatchNormCache]:
    """`batchnorm2d` that also returns the cache for `batchnorm_backward`; see `batchnorm_forward`."""
    values = _engine.source(x, options)
    axis = _check.axis_of_layout(values.ndim, 2, layout)
    return _engine.forward_with_cache(values, gamma, beta, axis, options)


@_full_signature
def batchnorm3d_forward(
    x: npt.ArrayLike,
    gamma: npt.ArrayLike | None = None,
    beta: npt.ArrayLike | None = None,
    *,
    layout: str = "NCDHW",
    **options: Unpack[Options],
) -> tuple[Array, BatchNormCache]:
    """`batchnorm3d` that also returns the cache for `batchnorm_backward`; see `batchnorm_forward`."""
    values = _engine.source(x, options)
    axis = _check.axis_of_layout(values.ndim, 3, layout)
    return _engine.forward_with_cache(values, gamma, beta, axis, options)


def batchnorm_backward(
    dy: npt.ArrayLike, cache: BatchNormCache, *, out: Array | None = None, num_threads: int | None = None
) -> Gradients:
    """Gradients with respect to x, gamma, beta and residual.

    With ``g`` the gradient before the activation (for relu 0 where y <= 0, else dy) and the statistics of the
    batch: ``dbeta = sum(g)``, ``dgamma = rstd * sum(g * (x - mean))`` and ``dx = gamma * rstd * (g - mean(g) - (x -
    mean) * rstd**2 * mean(g * (x - mean)))``. With running statistics, which do not depend on x, ``dx = gamma * rstd *
    g``. ``dresidual = g``.

    Parameters
    ----------
    dy : array_like of the shape and dtype of x
    cache : BatchNormCache
        From a `batchnorm*_forward` function. It may be used again.
    out : ndarray of the shape, dtype and memory order of x, optional
        Where to write dx. ``out is dy`` is legal, an overlap with x is not.
    num_threads : int, optional
        As in `batchnorm2d`.

    Returns
    -------
    Gradients
        Unpacks as ``dx, dgamma, dbeta`` and also has `dresidual`. dgamma and dbeta have the dtypes of gamma and beta.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, ReadOnlyError, AliasError
        Naming cache, dy or out. Nothing has been written then.

    References
    ----------
    Ioffe and Szegedy 2015, arXiv:1502.03167, section 3.
    """
    return _engine.backward(dy, cache, out, num_threads)
