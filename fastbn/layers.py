"""Batch normalization as layers with state, as in PyTorch: same arguments, state keys, shapes and dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from . import _check, _engine
from .errors import ArgumentError, DTypeError, ReadOnlyError, ShapeError

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "IncompatibleKeys"]

Array: TypeAlias = npt.NDArray[Any]
Layer = TypeVar("Layer", bound="_BatchNorm")


class IncompatibleKeys(NamedTuple):
    """What `load_state_dict` has passed over: keys of the layer that were not given, and given ones that it lacks."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class _BatchNorm:
    """What BatchNorm1d, 2d and 3d share: all but the layout.

    A layer keeps the x of its last `forward` for `backward`, in evaluation too; the functions with ``training=False``
    keep nothing. Copies and pickles of a layer are without it.

    Parameters
    ----------
    num_features : int
        Channels.
    eps : float
        Added to the variance; positive if the layer is trained.
    momentum : float or None
        Weight of the new batch in the running statistics; None: their plain average over all batches so far.
    affine : bool
        Whether there are `weight` (gamma) and `bias` (beta).
    track_running_stats : bool
        Whether there are running statistics. Without them evaluation uses the statistics of the batch too.
    layout : str, optional
        Meaning of the axes of x; None is the channels-first layout.
    unbiased, nan_guard, activation, device, num_threads
        As in `fastbn.batchnorm2d`.
    dtype : dtype, optional
        Any float dtype, of parameters and running statistics; None is float32. x may have another one.

    Attributes
    ----------
    weight, bias : ndarray of shape (num_features,), or None if not affine
    running_mean, running_var : ndarray of shape (num_features,), or None if not tracked
    num_batches_tracked : ndarray of int64, shape (), or None if not tracked
        Batches that the running statistics have taken; empty and skipped ones do not count.
    weight_grad, bias_grad : ndarray or None
        Set (not added to) by each `backward`.
    training : bool
        True at first; set by `train` and `eval`.
    """

    _dimensions: ClassVar[int]
    num_batches_tracked: npt.NDArray[np.int64] | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        layout: str | None = None,
        unbiased: bool = True,
        nan_guard: str = "propagate",
        activation: str | tuple[str, float] | None = None,
        dtype: npt.DTypeLike | None = np.float32,
        device: str = "cpu",
        num_threads: int | None = None,
    ) -> None:
        self.num_features = _check.num_features(num_features)
        self.eps = _check.eps(eps, training=True)
        self.momentum = None if momentum is None else _check.momentum(momentum)
        self.affine = _check.boolean("affine", affine)
        self.track_running_stats = _check.boolean("track_running_stats", track_running_stats)
        _check.layout(self._dimensions, layout)
        self.layout = layout
        self.unbiased = _check.boolean("unbiased", unbiased)
        self.nan_guard = _check.nan_guard(nan_guard)
        _check.activation(activation)
        self.activation = activation
        self.dtype = _check.parameter_dtype(np.float32 if dtype is None else dtype)
        _check.device(device)
        self.device = device
        self.num_threads = _check.num_threads(num_threads)
        self.training = True
        self.weight: Array | None = np.ones(self.num_features, self.dtype) if affine else None
        self.bias: Array | None = np.zeros(self.num_features, self.dtype) if affine else None
        self.weight_grad: Array | None = None
        self.bias_grad: Array | None = None
        self.running_mean: Array | None = None
        self.running_var: Array | None = None
        self.num_batches_tracked = None
        if track_running_stats:
            self.running_mean = np.zeros(self.num_features, self.dtype)
            self.running_var = np.ones(self.num_features, self.dtype)
            self.num_batches_tracked = np.zeros((), np.int64)
        self._cache: _engine.BatchNormCache | None = None
        self._had_residual = False

    def forward(self, x: npt.ArrayLike, residual: npt.ArrayLike | None = None) -> Array:
        """Normalize x with the statistics of the batch (training) or the running ones (evaluation).

        Keeps what `backward` needs, in both modes; x itself by reference, so leave it unchanged until then.
        """
        values = _engine.source(x, {"device": self.device})
        axis = _check.axis_of_layout(values.ndim, self._dimensions, self.layout)
        _check.channels(values.shape, axis, self.num_features)
        tracked = self.num_batches_tracked
        if tracked is not None:
            _check.attribute("num_batches_tracked", tracked)
        momentum = self.momentum
        if momentum is None:  # the average so far weighs as many batches as have been seen
            momentum = 1.0 if tracked is None else 1.0 / (int(tracked) + 1)
        options: _engine.Options = {
            "running_mean": self.running_mean,
            "running_var": self.running_var,
            "training": self.training or tracked is None,
            "momentum": momentum,
            "eps": self.eps,
            "unbiased": self.unbiased,
            "nan_guard": self.nan_guard,
            "activation": self.activation,
            "residual": residual,
            "device": self.device,
            "num_threads": self.num_threads,
        }
        y, self._cache = _engine.forward_with_cache(values, self.weight, self.bias, axis, options, tracked)
        self._had_residual = residual is not None
        return y

    def __call__(self, x: npt.ArrayLike, residual: npt.ArrayLike | None = None) -> Array:
        """`forward`, also that of a subclass."""
        return self.forward(x, residual)

    def backward(self, dy: npt.ArrayLike, *, out: Array | None = None) -> Any:
        """Gradients of the last `forward`: returns dx, or (dx, dresidual) if that was given a residual.

        Sets `weight_grad` and `bias_grad`. `out` is a buffer for dx, as in `fastbn.batchnorm_backward`.
        """
        if self._cache is None:
            raise ArgumentError(f"backward: expected a call of {type(self).__name__}.forward before, got none")
        gradients = _engine.backward(dy, self._cache, out, self.num_threads)
        self.weight_grad, self.bias_grad = gradients.dgamma, gradients.dbeta
        return (gradients.dx, gradients.dresidual) if self._had_residual else gradients.dx

    def train(self: Layer, mode: bool = True) -> Layer:
        """Switch to training (or to evaluation, if `mode` is False); returns the layer."""
        self.training = _check.boolean("mode", mode)
        return self

    def eval(self: Layer) -> Layer:
        """Switch to evaluation; returns the layer."""
        return self.train(False)

    def reset_running_stats(self) -> None:
        """Mean 0, variance 1, no batches: as at the start. Nothing to do if they are not tracked."""
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.running_mean[...] = 0
            self.running_var[...] = 1
            self.num_batches_tracked[...] = 0

    def _state(self) -> dict[str, Array]:
        names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        found = {name: getattr(self, name) for name in names}
        return {name: _check.attribute(name, value) for name, value in found.items() if value is not None}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": None}  # which is as large as the batch

    def state_dict(self) -> dict[str, Array]:
        """Copies of parameters and running statistics, with the keys, shapes and dtypes of PyTorch.

        Its `load_state_dict` wants tensors: ``{name: torch.from_numpy(value) for name, value in state.items()}``.
        """
        return {name: array.copy() for name, array in self._state().items()}

    def load_state_dict(self, state: Mapping[str, npt.ArrayLike], strict: bool = True) -> IncompatibleKeys:
        """Copy values into this layer; all of them, or none if there is an error.

        Parameters
        ----------
        state : mapping of str to array_like
            From `state_dict`, of a layer here or in PyTorch. `num_batches_tracked` may be absent (old checkpoints).
        strict : bool
            Whether missing and unexpected keys are errors; else they are returned.

        Raises
        ------
        ArgumentError, ShapeError, DTypeError, ReadOnlyError
            Naming the keys.
        """
        _check.boolean("strict", strict)
        if not isinstance(state, Mapping):
            raise ArgumentError(f"state: expected a mapping of names to arrays, got {type(state).__name__}")
        own = self._state()
        missing = [name for name in own if name not in state]
        unexpected = [name for name in state if name not in own]
        required = [name for name in missing if name != "num_batches_tracked"]
        if strict and (required or unexpected):
            found = [f"{kind} {names}" for kind, names in (("missing", required), ("unexpected", unexpected)) if names]
            raise ArgumentError(f"state: expected the keys {list(own)}, got {' and '.join(found)}")
        new = {}
        for name, target in own.items():
            if name not in state:
                continue
            values = _check.array(name, state[name])
            if values.shape != target.shape:
                raise ShapeError(f"{name}: expected shape {target.shape}, got {values.shape}")
            if not np.can_cast(values.dtype, target.dtype, "same_kind"):
                raise DTypeError(f"{name}: expected a dtype that converts to {target.dtype}, got {values.dtype}")
            if not target.flags.writeable:
                raise ReadOnlyError(f"{name}: expected a writable array in the layer, got a read-only one")
            with np.errstate(all="ignore"):  # what is too large for the layer's dtype becomes Inf
                new[name] = values.astype(target.dtype)
            if name == "num_batches_tracked" and new[name] < 0:
                raise ArgumentError(f"{name}: expected a number of batches, got {new[name]}")
        for name, values in new.items():
            own[name][...] = values
        return IncompatibleKeys(missing, unexpected)

    def __repr__(self) -> str:
        options = [str(self.num_features), f"eps={self.eps}", f"momentum={self.momentum}", f"affine={self.affine}"]
        options.append(f"track_running_stats={self.track_running_stats}")
        if self.layout is not None:
            options.append(f"layout={self.layout!r}")
        if self.nan_guard != "propagate":
            options.append(f"nan_guard={self.nan_guard!r}")
        if self.activation is not None:
            options.append(f"activation={self.activation!r}")
        if not self.unbiased:
            options.append("unbiased=False")
        if self.dtype != np.float32:
            options.append(f"dtype={self.dtype.name!r}")
        if self.device != "cpu":
            options.append(f"device={self.device!r}")
        if self.num_threads is not None:
            options.append(f"num_threads={self.num_threads}")
        return f"{type(self).__name__}({', '.join(options)})"


class BatchNorm1d(_BatchNorm):
    __doc__ = f"""Batches of vectors (N, C) or sequences (N, C, L); ``layout="NLC"`` for (N, L, C).

    {(_BatchNorm.__doc__ or "").partition(chr(10))[2].strip()}
    """

    _dimensions = 1


class BatchNorm2d(_BatchNorm):
    __doc__ = f"""Batches of images (N, C, H, W); ``layout="NHWC"`` for (N, H, W, C).

    {(_BatchNorm.__doc__ or "").partition(chr(10))[2].strip()}

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> layer = fastbn.BatchNorm2d(2, activation="relu")
    >>> y = layer(np.arange(16, dtype=np.float32).reshape(2, 2, 2, 2))
    >>> dx = layer.backward(np.ones_like(y))
    >>> layer.bias_grad, layer.running_mean
    (array([4., 4.], dtype=float32), array([0.55, 0.95], dtype=float32))
    """

    _dimensions = 2


class BatchNorm3d(_BatchNorm):
    __doc__ = f"""Batches of volumes (N, C, D, H, W); ``layout="NDHWC"`` for (N, D, H, W, C).

    {(_BatchNorm.__doc__ or "").partition(chr(10))[2].strip()}
    """

    _dimensions = 3
