"""Layers as classes with `forward` and `backward` side by side; no graph, no registry.

A layer is used in turn: ``y = layer.forward(x)`` keeps what ``dx = layer.backward(dy)`` needs. Parameters are the
arrays ``weight`` and ``bias``; `backward` leaves their gradients in ``weight_grad`` and ``bias_grad``. This is also how
`fastbn.BatchNorm1d`, `2d` and `3d` work, so they stand between these layers as they are. In shapes, N is the batch,
C the channels, F the filters (the output's channels), H and W height and width; images are (N, C, H, W) or, with
``layout="NHWC"``, (N, H, W, C).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from fastbn.memory import empty
from fastbn.nn.threads import MOVE, for_each, product
from fastbn.nn.threads import Array as Array

State = dict[str, Array]
Self = TypeVar("Self", bound="Layer")
Rng = np.random.Generator | int | None


class LayerLike(Protocol):
    """What a container asks of a layer."""

    training: bool

    def forward(self, x: Array, /) -> Array: ...
    def backward(self, dy: Array, /) -> Any: ...
    def train(self, mode: bool = True) -> Any: ...
    def eval(self) -> Any: ...
    def state_dict(self) -> State: ...
    def load_state_dict(self, state: Any, /) -> Any: ...


def walk(layer: Any) -> Iterator[Any]:
    """The layer and all that it is made of, in the order of its state; TypeError if it is none."""
    if not hasattr(layer, "forward"):
        raise TypeError(f"layer: expected a layer or model, got {type(layer).__name__}")
    yield layer
    for inner in getattr(layer, "layers", ()):
        yield from walk(inner)


def parameters(layer: LayerLike) -> list[tuple[Array, Any]]:
    """Pairs (value, gradient) of a layer and of the ``layers`` it is made of.

    The gradient is that of the last backward, None before the first.
    """
    return [
        (getattr(part, name), getattr(part, f"{name}_grad", None))
        for part in walk(layer)
        for name in ("weight", "bias")
        if getattr(part, name, None) is not None
    ]


def gradients(layer: LayerLike) -> list[tuple[Array, Array]]:
    """`parameters`, for who needs all gradients; ValueError before the first backward."""
    pairs = parameters(layer)
    if any(gradient is None for _, gradient in pairs):
        raise ValueError("step: expected a backward of the model before, which leaves gradients, got none")
    return pairs


def copies(state: State) -> State:
    return {name: value.copy() for name, value in state.items()}


def copy_into(targets: Mapping[str, Array], state: Mapping[str, Array]) -> None:
    """Copy every array of `state` into the target of the same name; ValueError if names or shapes differ."""
    if targets.keys() != state.keys():
        raise ValueError(f"state: expected {sorted(targets)}, got {sorted(state)}")
    for name, target in targets.items():
        if target.shape != state[name].shape:
            raise ValueError(f"{name}: expected shape {target.shape}, got {state[name].shape}")
    for name, target in targets.items():
        target[...] = state[name]


def initial(rng: np.random.Generator, shape: tuple[int, ...], fan_in: int, dtype: DTypeLike) -> Array:
    """Uniform within ``1 / sqrt(fan_in)``: PyTorch's default for weights (Kaiming with a = sqrt(5)) and biases."""
    bound = fan_in**-0.5
    return rng.uniform(-bound, bound, shape).astype(dtype)


def at_least(name: str, value: Any, least: int, other: str = "") -> None:
    """ValueError for an argument that is no such integer."""
    if not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}{other}, got {value!r}")


def channel_axis(layout: str, first: str = "NCHW", last: str = "NHWC") -> int:
    """1 or -1; ValueError for a layout that is neither `first` nor `last`."""
    if layout not in (first, last):
        raise ValueError(f"layout: expected {first!r} or {last!r}, got {layout!r}")
    return 1 if layout == first else -1


class Layer:
    """Base of the layers: one without parameters defines `forward` and `backward` only.

    A layer that is made of others has them in ``layers``. State keys are then PyTorch's: ``"0.weight"`` is the weight
    of the first one.
    """

    training = True
    layers: tuple[LayerLike, ...] = ()
    weight: Array
    bias: Array | None = None

    def __call__(self, x: Array) -> Array:
        return self.forward(x)

    def forward(self, x: Array, /) -> Array:
        """The output; keeps what `backward` needs."""
        raise NotImplementedError

    def backward(self, dy: Array, /) -> Array:
        """The gradient of the x of the last `forward`; leaves those of the parameters in ``weight_grad`` and
        ``bias_grad``."""
        raise NotImplementedError

    def train(self: Self, mode: bool = True) -> Self:
        """Switch to training (or to inference, if `mode` is False), with all layers within; returns the layer."""
        self.training = mode
        for layer in self.layers:
            layer.train(mode)
        return self

    def eval(self: Self) -> Self:
        """Switch to inference, with all layers within; returns the layer."""
        return self.train(False)

    def _state(self) -> State:
        return {name: getattr(self, name) for name in ("weight", "bias") if getattr(self, name, None) is not None}

    def state_dict(self) -> State:
        """Copies of the parameters, and of the running statistics of batch normalization."""
        state = copies(self._state())
        for i, layer in enumerate(self.layers):
            state |= {f"{i}.{name}": value for name, value in layer.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Array], /) -> None:
        """Copy values into the parameters and running statistics; all of them, or none if there is an error.

        ValueError if names or shapes are not those of `state_dict`.
        """
        before = self.state_dict()
        if state.keys() != before.keys():
            raise ValueError(f"state: expected {sorted(before)}, got {sorted(state)}")
        try:
            self._load(state)
        except Exception:  # which layer has found it does not matter
            self._load(before)
            raise

    def _load(self, state: Mapping[str, Array]) -> None:
        own = self._state()
        copy_into(own, {name: state[name] for name in own})
        for i, layer in enumerate(self.layers):
            prefix = f"{i}."
            layer.load_state_dict(
                {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            )


class Linear(Layer):
    """``y = x @ weight.T + bias``, initialized as `Conv2d`.

    Attributes
    ----------
    weight, weight_grad : ndarray of shape (out_features, in_features)
    bias, bias_grad : ndarray of shape (out_features,), or None
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rng: Rng = None,
        dtype: DTypeLike = np.float32,
    ) -> None:
        if in_features < 1:
            raise ValueError(f"in_features: expected at least 1, got {in_features}")
        rng = np.random.default_rng(rng)
        self.weight = initial(rng, (out_features, in_features), in_features, dtype)
        self.bias = initial(rng, (out_features,), in_features, dtype) if bias else None

    def forward(self, x: Array, /) -> Array:
        """(N, in_features) to (N, out_features)."""
        self.x = x
        y = product(x, self.weight.T)
        if self.bias is not None:
            y += self.bias
        return y

    def backward(self, dy: Array, /) -> Array:
        self.weight_grad = product(dy.T, self.x)
        self.bias_grad = None if self.bias is None else dy.sum(axis=0)
        return product(dy, self.weight)


def passed(dy: Array, y: Array, dx: Array) -> Array:
    """The gradient of a relu, in `dx`: 0 where y is, also of dy = Inf or NaN, of which a product would make NaN. These
    bits take a tenth of the time of a choice for each value."""
    bits = np.dtype(f"i{dy.itemsize}")
    np.bitwise_and(dy.view(bits), (y <= 0).view(np.int8) - np.int8(1), out=dx.view(bits))
    return dx


class ReLU(Layer):
    """``max(x, 0)`` of an array of any shape; the gradient at 0 is 0."""

    def forward(self, x: Array, /) -> Array:
        self.y = y = empty(x.shape, x.dtype)
        for_each(lambda part: np.maximum(x[part], 0, out=y[part]), len(x), MOVE * x.size)
        return y

    def backward(self, dy: Array, /) -> Array:
        y, dx = self.y, empty(dy.shape, dy.dtype)
        for_each(lambda part: passed(dy[part], y[part], dx[part]), len(dy), MOVE * dy.size)
        return dx


class Sigmoid(Layer):
    """``1 / (1 + exp(-x))`` of an array of any shape."""

    def forward(self, x: Array, /) -> Array:
        self.y = (1 + np.tanh(x / 2)) / 2  # the same function; exp would overflow
        return self.y

    def backward(self, dy: Array, /) -> Array:
        dx: Array = dy * self.y * (1 - self.y)
        return dx


class Dropout(Layer):
    """In training, each value becomes 0 with probability `p`, and the others are divided by ``1 - p``.

    Srivastava et al., "Dropout", JMLR 15, 2014, section 10 (the scaling is done in training, not in inference).
    """

    def __init__(self, p: float = 0.5, *, rng: Rng = None) -> None:
        if not 0 <= p < 1:
            raise ValueError(f"p: expected a number of at least 0 and below 1, got {p!r}")
        self.p, self.rng = p, np.random.default_rng(rng)

    def forward(self, x: Array, /) -> Array:
        self.scale = np.ones((), x.dtype)
        if self.training:
            self.scale = ((self.rng.random(x.shape, np.float32) >= self.p) / (1 - self.p)).astype(x.dtype)
        y: Array = x * self.scale
        return y

    def backward(self, dy: Array, /) -> Array:
        dx: Array = dy * self.scale
        return dx


class Flatten(Layer):
    """(N, ...) to (N, the product of the rest)."""

    def forward(self, x: Array, /) -> Array:
        self.shape = x.shape
        return x.reshape(len(x), math.prod(x.shape[1:]))

    def backward(self, dy: Array, /) -> Array:
        return dy.reshape(self.shape)


class Sequential(Layer):
    """Layers one after the other."""

    def __init__(self, *layers: LayerLike) -> None:
        self.layers = layers

    def forward(self, x: Array, /) -> Array:
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, dy: Array, /) -> Array:
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        return dy


class Concat(Layer):
    """Branches that all see x; their outputs, one behind the other along the channels."""

    def __init__(self, *branches: LayerLike, layout: str = "NCHW") -> None:
        self.layers, self.axis = branches, channel_axis(layout)

    def forward(self, x: Array, /) -> Array:
        outputs = [branch.forward(x) for branch in self.layers]
        self.ends = np.cumsum([y.shape[self.axis] for y in outputs])
        return np.concatenate(outputs, self.axis)

    def backward(self, dy: Array, /) -> Array:
        parts = np.split(dy, self.ends[:-1], self.axis)
        dx = np.zeros((), dy.dtype)
        for branch, part in zip(self.layers, parts, strict=True):
            dx = dx + branch.backward(part)
        return dx


class AddReLU(Layer):
    """``max(x + residual, 0)``: what joins a residual block without batch normalization."""

    def __call__(self, x: Array, residual: Array | None = None) -> Array:
        return self.forward(x, residual)

    def forward(self, x: Array, residual: Array | None = None, /) -> Array:
        self.had_residual = residual is not None
        self.y = np.maximum(x if residual is None else x + residual, 0)
        return self.y

    def backward(self, dy: Array, /) -> Any:
        """dx, or (dx, dresidual) if there was a residual: as `fastbn.BatchNorm2d`."""
        dx = passed(dy, self.y, np.empty_like(dy))
        return (dx, dx) if self.had_residual else dx


class Residual(Layer):
    """``join(body(x), shortcut(x))``.

    `join` takes the residual as second argument, as ``fastbn.BatchNorm2d(..., activation="relu")`` does: normalization,
    sum and activation are then one pass over memory. Without a `shortcut` the residual is x itself.
    """

    def __init__(self, body: LayerLike, join: Any, shortcut: LayerLike | None = None) -> None:
        self.body, self.join, self.shortcut = body, join, shortcut
        self.layers = (body, join) if shortcut is None else (body, join, shortcut)

    def forward(self, x: Array, /) -> Array:
        residual = x if self.shortcut is None else self.shortcut.forward(x)
        y: Array = self.join.forward(self.body.forward(x), residual)
        return y

    def backward(self, dy: Array, /) -> Array:
        dbody, dresidual = self.join.backward(dy)
        if self.shortcut is not None:
            dresidual = self.shortcut.backward(dresidual)
        dx: Array = self.body.backward(dbody) + dresidual
        return dx


class Subsample(Layer):
    """Every second pixel of each axis, and channels of zeros behind: the shortcut without parameters of He et al.,
    "Deep Residual Learning for Image Recognition", 2015, arXiv:1512.03385, section 3.3 (option A)."""

    def __init__(self, new_channels: int, layout: str = "NCHW") -> None:
        self.new_channels, self.axis = new_channels, channel_axis(layout)
        self.places: list[slice] = [slice(None, None, 2)] * 4
        self.places[0] = self.places[self.axis] = slice(None)

    def forward(self, x: Array, /) -> Array:
        self.shape = x.shape
        widths = [(0, 0)] * 4
        widths[self.axis] = (0, self.new_channels)
        return np.pad(x[tuple(self.places)], widths)

    def backward(self, dy: Array, /) -> Array:
        dx = np.zeros(self.shape, dy.dtype)
        dx[tuple(self.places)] = np.split(dy, [self.shape[self.axis]], self.axis)[0]
        return dx


class Columns(Layer):
    """Images as sequences of their columns: (N, C, H, W) to (N, C * H, W), (N, H, W, C) to (N, W, C * H)."""

    def __init__(self, layout: str = "NCHW") -> None:
        self.last = channel_axis(layout) == -1

    def forward(self, x: Array, /) -> Array:
        self.shape = x.shape
        if not self.last:
            return x.reshape(len(x), -1, x.shape[3])
        return np.ascontiguousarray(x.transpose(0, 2, 3, 1)).reshape(len(x), x.shape[2], -1)

    def backward(self, dy: Array, /) -> Array:
        if not self.last:
            return dy.reshape(self.shape)
        N, H, W, C = self.shape
        return dy.reshape(N, W, C, H).transpose(0, 3, 1, 2)
