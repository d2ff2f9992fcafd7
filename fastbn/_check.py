"""Every check of an argument, and every message about one.

A message names the argument, what is accepted and what came. Checks return what the caller goes on with (an index, a
float, an array); none of them writes to an argument. Messages are built only when they are raised, for small calls pass
here too; those that give the options of a call before do not (`_core.Accepted`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from . import _core, _layout, runtime
from .errors import (
    AliasError,
    ArgumentError,
    DTypeError,
    NonFiniteError,
    ReadOnlyError,
    ShapeError,
    SingleValueError,
)

Array: TypeAlias = npt.NDArray[Any]
Vectors: TypeAlias = tuple[Array | None, Array | None, Array | None, Array | None]

DEVICES = ("cpu", "cuda")
DLPACK_CUDA = 2  # kDLCUDA, of DLPack
NAN_GUARDS = ("propagate", "skip", "raise")
NEGATIVE_SLOPE = 0.01  # of leaky_relu, as in PyTorch
# For np.shares_memory, whose worst case is exponential; its stub knows two values only.
_MAX_WORK: Any = 10_000
_TooHardError = getattr(np, "exceptions", np).TooHardError  # moved in NumPy 1.25


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


# ---------------------------------------------------------------------------------------------------------------------
# Plain values


def device(value: Any) -> bool:
    """Whether to compute on the GPU, which must be usable."""
    if isinstance(value, str) and value == "cpu":
        return False
    if isinstance(value, str) and value in DEVICES:
        from . import cuda

        cuda.require()
        return True
    raise ArgumentError(f"device: expected one of {_listed(DEVICES)}, got {value!r}")


def boolean(name: str, value: Any) -> bool:
    """True or False; 1 and 0 are likely a mistake in a call with many arguments."""
    if value is True or value is False or isinstance(value, np.bool_):
        return bool(value)
    raise ArgumentError(f"{name}: expected True or False, got {value!r}")


def _real(value: Any) -> float:
    """A real number as a float; NaN for everything else, so that one comparison refuses both."""
    if isinstance(value, (float, int, np.floating, np.integer)) and not isinstance(value, bool):
        with suppress(OverflowError):  # an int may be too large
            return float(value)
    return math.nan


def eps(value: Any, training: bool) -> float:
    """Finite; positive in training, where a constant channel would divide by zero."""
    number = _real(value)
    if (number > 0 or (number == 0 and not training)) and number < math.inf:
        return number
    bound = "> 0 in training" if training else ">= 0 in inference"
    raise ArgumentError(f"eps: expected a finite number {bound}, got {value!r}")


def momentum(value: Any) -> float:
    """The weight of the new batch."""
    number = _real(value)
    if 0 <= number <= 1:
        return number
    hint = "; None (cumulative average) is for layers only" if value is None else ""
    raise ArgumentError(f"momentum: expected a number from 0 to 1 (the weight of the new batch), got {value!r}{hint}")


def activation(value: Any) -> tuple[int, float]:
    """The core's index, and the slope of leaky_relu."""
    name, slope = value, NEGATIVE_SLOPE
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and value[0] == "leaky_relu":
        name, slope = value
        if not math.isfinite(_real(slope)):
            raise ArgumentError(f"activation: expected a finite slope in ('leaky_relu', slope), got {value!r}")
    if name is None:
        name = runtime.activations()[0]
    if isinstance(name, str) and name in runtime.ACTIVATION_INDEX:
        return runtime.ACTIVATION_INDEX[name], float(slope)
    names = _listed(runtime.activations())
    raise ArgumentError(f"activation: expected None, one of {names}, or ('leaky_relu', slope), got {value!r}")


def training(value: Any, has_mean: bool, has_var: bool) -> bool:
    """Whether the batch's own statistics are used. Explicit if running ones are given: no default is safe."""
    if has_mean != has_var:
        missing, given = ("running_var", "running_mean") if has_mean else ("running_mean", "running_var")
        raise ArgumentError(f"{missing}: expected an array, since {given} is given, got None")
    if value is None:
        if not has_mean:
            return True
        raise ArgumentError("training: expected True or False when running statistics are given, got None")
    use_batch = boolean("training", value)
    if not use_batch and not has_mean:
        raise ArgumentError("running_mean: expected running_mean and running_var when training=False, got None")
    return use_batch


def nan_guard(value: Any) -> str:
    """What running statistics do with a batch whose own are not finite."""
    if isinstance(value, str) and value in NAN_GUARDS:
        return value
    raise ArgumentError(f"nan_guard: expected one of {_listed(NAN_GUARDS)}, got {value!r}")


def num_threads(value: Any) -> int | None:
    """None or a number of threads."""
    return None if value is None else runtime.check_count("num_threads", value)


class Options(NamedTuple):
    """The options of forward that are plain values, as `_core` wants them."""

    training: bool
    update: bool
    momentum: float
    eps: float
    unbiased: bool
    nan_guard: str
    activation: tuple[int, float]


def options(
    has_mean: bool, has_var: bool, use_batch: Any, weight: Any, epsilon: Any, corrected: Any, guard: Any, fused: Any
) -> Options:
    """All of them; whether there are running statistics decides what `training` may be."""
    use_batch = training(use_batch, has_mean, has_var)
    return Options(
        training=use_batch,
        update=use_batch and has_mean,
        momentum=momentum(weight),
        eps=eps(epsilon, use_batch),
        unbiased=boolean("unbiased", corrected),
        nan_guard=nan_guard(guard),
        activation=activation(fused),
    )


# ---------------------------------------------------------------------------------------------------------------------
# x and its axes


def is_on_gpu(value: Any) -> bool:
    """Whether a value is an array in the memory of a GPU."""
    try:
        if hasattr(value, "__cuda_array_interface__"):
            return True
    except RuntimeError:  # PyTorch's answer for a tensor that records gradients; one on the CPU has no such attribute
        return True
    device = getattr(value, "__dlpack_device__", None)
    return device is not None and device()[0] == DLPACK_CUDA


def array(name: str, value: Any) -> Array:
    """Any array_like as a plain ndarray, without copying one."""
    if type(value) is np.ndarray:
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise ArgumentError(f"{name}: expected an array without a mask, got a masked array; its mask would be ignored")
    if is_on_gpu(value):
        raise ArgumentError(
            f"{name}: expected a NumPy array or what converts to one, got {type(value).__name__} on the GPU; pass "
            "device='cuda' and all arrays on the GPU, or move it to the host"
        )
    try:
        found = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:  # the last two from PyTorch: of bfloat16, with gradients
        raise ArgumentError(f"{name}: expected an array_like, got {type(value).__name__}: {error}") from None
    if found.ndim == 0 and found.dtype.kind in "OSU":
        raise ArgumentError(f"{name}: expected an array_like, got {type(value).__name__}")
    return found


def supported_dtype(name: str, dtype: np.dtype[Any]) -> int:
    """The core's index."""
    index = runtime.dtype_index(dtype)
    if index is None:
        hint = "; convert it, e.g. with .astype(np.float32)" if dtype.kind in "biu" else ""
        raise DTypeError(f"{name}: expected dtype {' or '.join(runtime.dtypes())}, got {dtype}{hint}")
    return index


def axis(value: Any, ndim: int) -> int:
    """The channel axis, counted from the front."""
    try:
        index = operator.index(value)
    except TypeError:
        index = None
    if index is None or isinstance(value, bool):
        raise ArgumentError(f"axis: expected an integer, got {value!r}")
    if ndim == 0:
        raise ShapeError("x: expected at least 1 dimension, got 0")
    if not -ndim <= index < ndim:
        raise ShapeError(f"axis: expected -{ndim} to {ndim - 1} for an x of {ndim} dimensions, got {value}")
    return index % ndim


def layout(dimensions: int, value: Any) -> None:
    """A layout of batchnorm<dimensions>d, or None for its default."""
    if value is not None and not (isinstance(value, str) and value in _layout.LAYOUTS[dimensions]):
        raise ArgumentError(f"layout: expected one of {_listed(_layout.LAYOUTS[dimensions])}, got {value!r}")


def axis_of_layout(ndim: int, dimensions: int, value: Any) -> int:
    """The channel axis of an x of this rank in a layout (None: the one that is meant for this rank)."""
    try:
        return _layout.CHANNEL_AXES[dimensions][value, ndim]
    except (KeyError, TypeError):  # what is wrong with them follows
        layout(dimensions, value)
    wanted = (
        f"{len(value)} ({value})"
        if value
        else " or ".join(f"{rank} ({name})" for rank, name in sorted(_layout.DEFAULT_LAYOUTS[dimensions].items()))
    )
    raise ShapeError(f"x: expected {wanted} dimensions, got {ndim}")


def several_values(shape: tuple[int, ...], count: int) -> None:
    """Training needs at least two values per channel (or none at all: an empty batch)."""
    if count == 1:
        raise SingleValueError(
            f"x: expected more than 1 value per channel when training, got input size {shape}; "
            "drop an incomplete last batch, or use inference (training=False, eval())"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Arrays that belong to x


def _is_float(dtype: np.dtype[Any]) -> bool:
    """float16 to longdouble, and the floats of ml_dtypes, whose kind is V."""
    return dtype.kind == "f" or (dtype.kind == "V" and dtype.names is None and np.can_cast(dtype, np.float64))


def parameter(name: str, value: Any, channels: int, owner: str = "x") -> Array:
    """A value for each channel of `owner`, of any float dtype."""
    vector = array(name, value)
    if vector.shape != (channels,):
        expected = f"shape ({channels},) for the {channels} channels of {owner}"
        raise ShapeError(f"{name}: expected {expected}, got {vector.shape}")
    if not _is_float(vector.dtype):
        raise DTypeError(f"{name}: expected a floating-point dtype, got {vector.dtype}")
    return vector


def _distinct(name: str, array: Array) -> None:
    """An array that is written has no two elements at the same place."""
    if not _layout.separate(array.strides, array.shape, array.itemsize):
        raise AliasError(f"{name}: expected elements that do not overlap, got strides {array.strides}")


def _running(name: str, value: Any, channels: int, update: bool) -> Array:
    """A running statistic; one that will be updated must be an array that can be written."""
    if update and not isinstance(value, np.ndarray):
        raise ArgumentError(f"{name}: expected an ndarray, which training updates in place, got {type(value).__name__}")
    vector = parameter(name, value, channels)
    if update and not vector.flags.writeable:
        raise ReadOnlyError(f"{name}: expected a writable array, which training updates in place, got a read-only one")
    if update:
        _distinct(name, vector)
    return vector


def vectors(gamma: Any, beta: Any, running_mean: Any, running_var: Any, channels: int, update: bool) -> Vectors:
    """The arrays of a value for each channel, of any float dtype; None stays None."""
    return (
        None if gamma is None else parameter("gamma", gamma, channels),
        None if beta is None else parameter("beta", beta, channels),
        None if running_mean is None else _running("running_mean", running_mean, channels, update),
        None if running_var is None else _running("running_var", running_var, channels, update),
    )


def finite_statistics(mean: Array, var: Array) -> None:
    """Those of the batch; named are the first channels that are not."""
    broken = np.flatnonzero(~(np.isfinite(mean) & np.isfinite(var)))
    if broken.size:
        names = ", ".join(map(str, broken[:8])) + (", ..." if broken.size > 8 else "")
        raise NonFiniteError(
            f"x: expected finite statistics in every channel (nan_guard='raise'), got NaN or Inf in {broken.size} of "
            f"{mean.size} channels: {names}"
        )


def statistic(name: str, value: Any) -> npt.NDArray[np.float64]:
    """A copy of real numbers, one for each channel, as float64."""
    vector = array(name, value)
    if vector.ndim != 1:
        raise ShapeError(f"{name}: expected shape (C,), got {vector.shape}")
    if not np.can_cast(vector.dtype, np.float64, "same_kind"):
        raise DTypeError(f"{name}: expected a dtype that converts to float64, got {vector.dtype}")
    return vector.astype(np.float64)


def companion(name: str, value: Any, x: Array) -> Array:
    """residual or dy: an array of x's shape and dtype."""
    other = array(name, value)
    if other.shape != x.shape:
        raise ShapeError(f"{name}: expected shape {x.shape} as x, got {other.shape}")
    if other.dtype is not x.dtype and runtime.dtype_index(other.dtype) != runtime.dtype_index(x.dtype):
        raise DTypeError(f"{name}: expected dtype {x.dtype.newbyteorder('=')} as x, got {other.dtype}")
    return other


def out(value: Any, x: Array) -> Array:
    """A buffer for a result like x."""
    if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):
        raise ArgumentError(f"out: expected an ndarray, got {type(value).__name__}")
    buffer = np.asarray(value)
    if buffer.shape != x.shape:
        raise ShapeError(f"out: expected shape {x.shape} as x, got {buffer.shape}")
    wanted = x.dtype if x.dtype.isnative else x.dtype.newbyteorder("=")
    if buffer.dtype != wanted:
        raise DTypeError(f"out: expected dtype {wanted.name} in native byte order, got {buffer.dtype}")
    if not buffer.flags.writeable:
        raise ReadOnlyError("out: expected a writable array, got a read-only one")
    return buffer


def out_view(buffer: Array, axis: int, planar: bool) -> _layout.View:
    """The view of `out` in x's family. Results are never written to a hidden copy."""
    view = None
    if buffer.flags.aligned:
        view = _layout.view(buffer.shape, buffer.strides, axis, buffer.itemsize, planar)
    if view is None:
        raise ArgumentError(
            f"out: expected aligned memory in the order of x, got strides {buffer.strides}; pass np.empty_like(x), "
            "or, if x itself has to be copied, an array like what the call returns without out"
        )
    _distinct("out", buffer)
    return view


# ---------------------------------------------------------------------------------------------------------------------
# Shared memory


def _overlap(a: Array, b: Array) -> bool:
    if not _core.spans_overlap(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=_MAX_WORK)
    except _TooHardError:
        return True


def _same_memory(a: Array, b: Array) -> bool:
    """The same elements at the same places."""
    if a is b:
        return True
    places = [
        (array.ctypes.data, [s for s, extent in zip(array.strides, array.shape, strict=True) if extent > 1])
        for array in (a, b)
    ]
    return places[0] == places[1] and a.dtype == b.dtype


def _refuse(name: str, other: str, accepted: str) -> NoReturn:
    raise AliasError(f"{name}: expected {accepted}, got one that overlaps {other}")


def apart(name: str, a: Array, other: str, b: Array) -> None:
    """No common memory at all."""
    if _overlap(a, b):
        _refuse(name, other, f"an array apart from {other}")


def apart_or_same(name: str, a: Array, other: str, b: Array) -> None:
    """In place or apart; never shifted against each other."""
    if _overlap(a, b) and not _same_memory(a, b):
        _refuse(name, other, f"{other} itself or an array apart from it")


def updated_apart(running_mean: Array, running_var: Array, x: Array, residual: Array | None) -> None:
    """The running statistics that training updates, against each other and all that is read with them.

    Nothing has to be known of gamma and beta, here and in `out_apart`: they are copied before anything is written.
    """
    apart("running_mean", running_mean, "running_var", running_var)
    for name, array in (("running_mean", running_mean), ("running_var", running_var)):
        apart(name, array, "x", x)
        if residual is not None:
            apart(name, array, "residual", residual)


def out_apart(
    out: Array,
    keep: bool,
    keep_residual: bool,
    x: Array,
    residual: Array | None,
    running_mean: Array | None,
    running_var: Array | None,
) -> None:
    """The buffer of forward. `keep`: backward will need x, so not even `out is x` is allowed; likewise the residual."""
    (apart if keep else apart_or_same)("out", out, "x", x)
    if residual is not None:
        (apart if keep_residual else apart_or_same)("out", out, "residual", residual)
    if running_mean is not None and running_var is not None:
        apart("out", out, "running_mean", running_mean)
        apart("out", out, "running_var", running_var)


# ---------------------------------------------------------------------------------------------------------------------
# Layers


def num_features(value: Any) -> int:
    """At least one channel."""
    return runtime.check_count("num_features", value, runtime.MAX_BYTES)


def attribute(name: str, value: Any) -> Array:
    """An array of a layer, which somebody may have replaced."""
    if not isinstance(value, np.ndarray):
        raise ArgumentError(f"{name}: expected an ndarray in the layer, got {type(value).__name__}")
    return value


def parameter_dtype(value: Any, name: str = "dtype") -> np.dtype[Any]:
    """The dtype of a layer's parameters and buffers."""
    if isinstance(value, str) and value == "bfloat16":
        with suppress(ImportError):  # of which NumPy learns the name
            import ml_dtypes  # noqa: F401
    try:
        dtype: np.dtype[Any] = np.dtype(value)
    except TypeError:
        raise DTypeError(f"{name}: expected a floating-point dtype, got {value!r}") from None
    if not _is_float(dtype):
        raise DTypeError(f"{name}: expected a floating-point dtype, got {dtype}")
    return dtype


def channels(shape: tuple[int, ...], axis: int, expected: int) -> None:
    """A layer's x has as many channels as the layer."""
    if shape[axis] != expected:
        hint = "; layout= is for other orders of the axes" if expected in shape[1:] else ""
        raise ShapeError(f"x: expected {expected} channels (num_features) on axis {axis}, got shape {shape}{hint}")
