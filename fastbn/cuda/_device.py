"""Arrays on the GPU in, arrays on the GPU out: no transfer, and no waiting for the GPU.

The rules for arguments are those of the CPU, and so are the messages; what the GPU cannot do without a hidden copy
(memory that does not reduce to (outer, channels, inner)) is an error.
"""

from __future__ import annotations

from typing import Any

from fastbn import _check, _core, _layout, runtime
from fastbn._engine import NEED_ARGUMENT, BatchNormCache, Gradients
from fastbn.errors import AliasError, ArgumentError, DTypeError, ReadOnlyError, ShapeError

from . import _arrays, _functions, _launch
from ._arrays import NAMES, DeviceArray
from ._plan import Operand

_IDENTITY = runtime.ACTIVATION_INDEX["identity"]


class DeviceCache(BatchNormCache):
    """What backward needs from a forward on the GPU; see `BatchNormCache`. All arrays are on the GPU.

    Attributes
    ----------
    x : array
        The input.
    mean, rstd : array of float64, shape (C,)
        The statistics that were used.
    """

    __slots__ = ("_array", "_call", "_kept", "_mask_nbytes", "_operand", "_parameters", "_rows", "_vectors")
    _array: DeviceArray  # x
    _call: _launch.Call
    _operand: Operand  # x
    _kept: tuple[DeviceArray, Operand] | None  # the residual, where the gradient needs it
    _mask_nbytes: int
    _parameters: tuple[DeviceArray | None, DeviceArray | None]  # gamma, beta
    _vectors: Any  # the statistics, and after them the mask, as an array of x's library
    _rows: DeviceArray  # the same

    @property
    def x(self) -> Any:
        return self._array.owner

    def _row(self, index: int) -> Any:  # of x's library
        channels = self._call.shape[1]
        return self._vectors[index * channels : (index + 1) * channels]

    @property
    def gamma(self) -> Any:
        return None if self._parameters[0] is None else self._row(_core.STATISTICS_GAMMA)

    @property
    def nbytes(self) -> int:
        return int(self._array.size * self._array.itemsize + self._rows.size * 8)

    def __repr__(self) -> str:
        mode = "training" if self._call.training else "inference"
        name = NAMES[self._array.code]
        return f"BatchNormCache({mode}, x {name} {self._array.shape} on the GPU, {self.nbytes} bytes)"


def given(name: str, value: Any) -> DeviceArray:
    """An argument beside an x on the GPU."""
    seen = _arrays.view(name, value)
    if seen is None:
        raise ArgumentError(
            f"{name}: expected an array on the GPU as x, got {type(value).__name__}; move it there, or pass all arrays "
            "as NumPy arrays"
        )
    return seen


def _parameter(name: str, value: Any, channels: int, update: bool = False) -> DeviceArray | None:
    if value is None:
        return None
    seen = given(name, value)
    if seen.shape != (channels,):
        raise ShapeError(f"{name}: expected shape ({channels},) for the {channels} channels of x, got {seen.shape}")
    if any(place % seen.itemsize for place in (seen.address, seen.strides[0])):
        raise ArgumentError(f"{name}: expected aligned memory on the GPU, got strides {seen.strides}; copy it first")
    if update and seen.readonly:
        raise ReadOnlyError(f"{name}: expected a writable array, which training updates in place, got a read-only one")
    return seen


def _companion(name: str, value: Any, x: DeviceArray) -> DeviceArray:
    seen = given(name, value)
    if seen.shape != x.shape:
        raise ShapeError(f"{name}: expected shape {x.shape} as x, got {seen.shape}")
    if seen.code != x.code:
        raise DTypeError(f"{name}: expected dtype {NAMES[x.code]} as x, got {NAMES[seen.code]}")
    return seen


def _out(value: Any, x: DeviceArray) -> DeviceArray:
    seen = _companion("out", value, x)
    if seen.readonly:
        raise ReadOnlyError("out: expected a writable array, got a read-only one")
    return seen


def _view(name: str, x: DeviceArray, axis: int, planar: bool | None = None) -> _layout.View:
    seen = None
    if x.address % x.itemsize == 0:
        seen = _layout.view(x.shape, x.strides, axis, x.itemsize, planar)
    if seen is None:
        order = "" if planar is None else " and the memory order of x"
        raise ArgumentError(
            f"{name}: expected aligned memory that reduces to (outer, channels, inner){order}, got strides "
            f"{x.strides}; copy it to such memory first: on the GPU nothing is copied unasked"
        )
    return seen


def _written(name: str, x: DeviceArray, axis: int, planar: bool) -> Operand:
    seen = _view(name, x, axis, planar)
    if not _layout.separate(seen.strides, seen.shape, x.itemsize):
        raise AliasError(f"{name}: expected elements that do not overlap, got strides {seen.strides}")
    return Operand(x.address, seen.strides)


def _vector(x: DeviceArray | None) -> _launch.Parameter:
    return _launch.NONE if x is None else (x.address, _functions.CODES[x.code], x.strides[0])


def forward(
    x: DeviceArray,
    gamma: Any,
    beta: Any,
    axis: int,
    keep: bool,
    options: dict[str, Any],
    counter: Any,
) -> tuple[Any, DeviceCache | None]:
    """`fastbn._engine.forward` of arrays on the GPU. Nothing is written before all arguments have been checked."""
    mean, var = options["running_mean"], options["running_var"]
    training, update, momentum, eps, unbiased, nan_guard, act = _check.options(
        mean is not None,
        var is not None,
        options["training"],
        options["momentum"],
        options["eps"],
        options["unbiased"],
        options["nan_guard"],
        options["activation"],
    )
    if nan_guard != "propagate":
        raise ArgumentError(
            f"nan_guard: expected 'propagate' for arrays on the GPU, got {nan_guard!r}, which would have to wait for it"
        )
    _check.num_threads(options["num_threads"])
    if x.code == "bf16":
        _launch.require_bfloat16()
    channels = x.shape[axis]
    per_channel = x.size // channels if channels else 0
    if training:
        _check.several_values(x.shape, per_channel)
    weight, bias = _parameter("gamma", gamma, channels), _parameter("beta", beta, channels)
    moments = _parameter("running_mean", mean, channels, update), _parameter("running_var", var, channels, update)
    added = None if options["residual"] is None else _companion("residual", options["residual"], x)
    keep_added = keep and added is not None and act[0] in NEED_ARGUMENT
    x_places = x.shadow
    added_places, mean_places, var_places = (None if a is None else a.shadow for a in (added, *moments))
    written = []
    if update:
        assert mean_places is not None and var_places is not None
        _check.updated_apart(mean_places, var_places, x_places, added_places)
        written += [("running_mean", mean_places), ("running_var", var_places)]
    target = None
    if options["out"] is not None:
        target = _out(options["out"], x)
        _check.out_apart(target.shadow, keep, keep_added, x_places, added_places, mean_places, var_places)
        written.append(("out", target.shadow))
    for name, places in written:  # other blocks may still read gamma and beta
        for other, vector in (("gamma", weight), ("beta", bias)):
            if vector is not None:
                _check.apart(name, places, other, vector.shadow)

    planar, shape, strides, _dense = _view("x", x, axis)
    source = Operand(x.address, strides)
    second = None if added is None else Operand(added.address, _view("residual", added, axis, planar).strides)
    y = options["out"]
    if target is None:
        y, target = _arrays.empty_like(x)
    destination = _written("out", target, axis, planar)
    stream = _arrays.current_stream(x)
    call = _launch.Call(x.code, planar, shape, act, training, stream)
    operands = [operand for operand in (source, second, destination) if operand is not None]
    with_mask = keep and added is not None and not keep_added and act[0] != _IDENTITY and x.size > 0
    mask_nbytes = _launch.mask_nbytes(call, operands) if with_mask else 0
    rows = _core.STATISTICS_ROWS * channels
    made = statistics = None
    if keep:
        made, statistics = _arrays.empty(x, rows + -(-mask_nbytes // 8), "f64", zeros=x.size == 0)
    if x.size:
        _arrays.wait_for(stream, [a for a in (x, weight, bias, *moments, added, target) if a is not None])
        _launch.forward(
            call,
            source,
            second,
            destination,
            statistics.address + 8 * rows if statistics is not None and with_mask else 0,
            0 if statistics is None else statistics.address,
            [_vector(a) for a in (weight, bias, *moments)],
            update=update,
            eps=eps,
            momentum=momentum,
            unbiased=unbiased,
        )
        if update and counter is not None:
            counter += 1
    if not keep:
        return y, None
    cache = DeviceCache()
    cache._array, cache._axis, cache._call, cache._operand = x, axis, call, source
    assert statistics is not None
    cache._vectors, cache._rows, cache._mask_nbytes = made, statistics, mask_nbytes
    cache._parameters = (weight, bias)
    cache._residual = added is not None
    cache._kept = (added, second) if keep_added and added is not None and second is not None else None
    return y, cache


def backward(dy: Any, cache: Any, out: Any, num_threads: Any) -> Gradients:
    """`fastbn._engine.backward` of arrays on the GPU."""
    x, axis, call = cache._array, cache._axis, cache._call
    gradient = _companion("dy", dy, x)
    _check.num_threads(num_threads)
    target = None
    if out is not None:
        target = _out(out, x)
        _check.apart("out", target.shadow, "x", x.shadow)
        _check.apart_or_same("out", target.shadow, "dy", gradient.shadow)
        if cache._kept is not None:
            _check.apart("out", target.shadow, "residual", cache._kept[0].shadow)
    arriving = Operand(gradient.address, _view("dy", gradient, axis, call.planar).strides)
    dx, dresidual, second = out, None, None
    if target is None:
        dx, target = _arrays.empty_like(x)
    written = _written("out", target, axis, call.planar)
    if cache._residual:
        dresidual, made = _arrays.empty_like(x)
        second = _written("dresidual", made, axis, call.planar)
    channels = call.shape[1]
    sums = [
        (None, None) if p is None else _arrays.empty(x, channels, p.code, zeros=x.size == 0) for p in cache._parameters
    ]
    if x.size:
        call = call._replace(stream=_arrays.current_stream(x))
        _arrays.wait_for(call.stream, [a for a in (x, gradient, target) if a is not None])
        rows = 8 * _core.STATISTICS_ROWS * channels
        _launch.backward(
            call,
            cache._operand,
            None if cache._kept is None else cache._kept[1],
            arriving,
            written,
            second,
            cache._rows.address + rows if cache._mask_nbytes else 0,
            cache._mask_nbytes,
            cache._rows.address,
            _vector(sums[0][1]),
            _vector(sums[1][1]),
        )
    return Gradients(dx, sums[0][0], sums[1][0], dresidual)
