"""Layers as classes with `forward` and `backward` side by side; no graph, no registry.

A layer is used in turn: ``y = layer.forward(x)`` keeps what ``dx = layer.backward(dy)`` needs. Parameters are the
arrays ``weight`` and ``bias``; `backward` leaves their gradients in ``weight_grad`` and ``bias_grad``. This is also how
`fastbn.BatchNorm1d`, `2d` and `3d` work, so they stand between these layers as they are. In shapes, N is the batch,
C the channels, F the filters (the output's channels), H and W height and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]
State = dict[str, Array]
Rng = np.random.Generator | int | None


class LayerLike(Protocol):
    """What `Sequential` asks of a layer."""

    def forward(self, x: Array, /) -> Array: ...
    def backward(self, dy: Array, /) -> Any: ...
    def train(self) -> Any: ...
    def eval(self) -> Any: ...
    def state_dict(self) -> State: ...
    def load_state_dict(self, state: Any, /) -> Any: ...


def parameters(layer: LayerLike) -> list[tuple[Array, Any]]:
    """Pairs (value, gradient) of a layer and of the ``layers`` it is made of.

    The gradient is that of the last backward, None before the first.
    """
    own = [
        (getattr(layer, name), getattr(layer, f"{name}_grad", None))
        for name in ("weight", "bias")
        if getattr(layer, name, None) is not None
    ]
    return own + [pair for inner in getattr(layer, "layers", ()) for pair in parameters(inner)]


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


def windows(x: Array, size: int, stride: int) -> Iterator[Array]:
    """Views of `x` (N, C, H, W), one for each place in a size x size window, each of shape (N, C, OH, OW).

    The view of place (i, j) holds ``x[:, :, i + stride * oh, j + stride * ow]``: what all windows see at that place.
    Reading the views gathers the windows; adding to them scatters gradients back.
    """
    span_h, span_w = x.shape[2] - size + 1, x.shape[3] - size + 1
    if span_h < 1 or span_w < 1:
        raise ValueError(f"x: expected height and width of at least {size}, got shape {x.shape}")
    for i in range(size):
        for j in range(size):
            yield x[:, :, i : i + span_h : stride, j : j + span_w : stride]


class Layer:
    """Base of the layers below: one without parameters defines `forward` and `backward` only."""

    training = True
    weight: Array
    bias: Array | None = None

    def __call__(self, x: Array) -> Array:
        return self.forward(x)

    def forward(self, x: Array, /) -> Array:
        raise NotImplementedError

    def backward(self, dy: Array, /) -> Array:
        raise NotImplementedError

    def train(self) -> None:
        self.training = True

    def eval(self) -> None:
        self.training = False

    def _state(self) -> State:
        return {name: getattr(self, name) for name in ("weight", "bias") if getattr(self, name, None) is not None}

    def state_dict(self) -> State:
        """Copies of the parameters."""
        return {name: value.copy() for name, value in self._state().items()}

    def load_state_dict(self, state: Mapping[str, Array], /) -> None:
        copy_into(self._state(), state)


class Conv2d(Layer):
    """Convolution of images with square kernels.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding : int
        `padding` zeros are put on each side of height and width.
    bias : bool
    rng : numpy.random.Generator, int or None
        Source of the initial weights.
    dtype : dtype of the parameters

    Attributes
    ----------
    weight, weight_grad : ndarray of shape (out_channels, in_channels, kernel_size, kernel_size)
    bias, bias_grad : ndarray of shape (out_channels,), or None
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
        *,
        rng: Rng = None,
        dtype: DTypeLike = np.float32,
    ) -> None:
        rng = np.random.default_rng(rng)
        self.stride, self.padding = stride, padding
        fan_in = in_channels * kernel_size**2
        self.weight = initial(rng, (out_channels, in_channels, kernel_size, kernel_size), fan_in, dtype)
        self.bias = initial(rng, (out_channels,), fan_in, dtype) if bias else None

    def forward(self, x: Array, /) -> Array:
        """(N, C, H, W) to (N, F, OH, OW), with ``OH = (H + 2 * padding - kernel_size) // stride + 1``."""
        F, C, K, _ = self.weight.shape
        N, p = len(x), self.padding
        padded = np.pad(x, ((0, 0), (0, 0), (p, p), (p, p)))
        columns = np.stack(list(windows(padded, K, self.stride)), axis=2)  # (N, C, K*K, OH, OW)
        OH, OW = columns.shape[3:]
        self.columns = columns.reshape(N, C * K * K, OH * OW)
        self.padded_shape = padded.shape
        y: Array = (self.weight.reshape(F, -1) @ self.columns).reshape(N, F, OH, OW)
        return y if self.bias is None else y + self.bias[:, None, None]

    def backward(self, dy: Array, /) -> Array:
        """(N, F, OH, OW) to (N, C, H, W)."""
        N, F, OH, OW = dy.shape
        _, C, K, _ = self.weight.shape
        dy = dy.reshape(N, F, OH * OW)
        self.weight_grad = (dy @ self.columns.transpose(0, 2, 1)).sum(axis=0).reshape(self.weight.shape)
        self.bias_grad = dy.sum(axis=(0, 2))
        dcolumns = (self.weight.reshape(F, -1).T @ dy).reshape(N, C, K * K, OH, OW)
        dx = np.zeros(self.padded_shape, dcolumns.dtype)
        for place, view in enumerate(windows(dx, K, self.stride)):
            view += dcolumns[:, :, place]
        p = self.padding
        return dx[:, :, p : dx.shape[2] - p, p : dx.shape[3] - p]


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
        rng = np.random.default_rng(rng)
        self.weight = initial(rng, (out_features, in_features), in_features, dtype)
        self.bias = initial(rng, (out_features,), in_features, dtype) if bias else None

    def forward(self, x: Array, /) -> Array:
        """(N, in_features) to (N, out_features)."""
        self.x = x
        y: Array = x @ self.weight.T
        return y if self.bias is None else y + self.bias

    def backward(self, dy: Array, /) -> Array:
        self.weight_grad = dy.T @ self.x
        self.bias_grad = dy.sum(axis=0)
        dx: Array = dy @ self.weight
        return dx


class ReLU(Layer):
    """``max(x, 0)`` of an array of any shape; the gradient at 0 is 0."""

    def forward(self, x: Array, /) -> Array:
        self.y = np.maximum(x, 0)
        return self.y

    def backward(self, dy: Array, /) -> Array:
        dx: Array = dy * (self.y > 0)
        return dx


class MaxPool2d(Layer):
    """Maximum over square windows, which may overlap; `stride` is `kernel_size` unless given."""

    def __init__(self, kernel_size: int, stride: int | None = None) -> None:
        self.kernel_size, self.stride = kernel_size, stride or kernel_size

    def forward(self, x: Array, /) -> Array:
        """(N, C, H, W) to (N, C, OH, OW), with ``OH = (H - kernel_size) // stride + 1``."""
        first, *others = windows(x, self.kernel_size, self.stride)
        y = first.copy()
        for view in others:
            np.maximum(y, view, out=y)
        self.x, self.y = x, y
        return y

    def backward(self, dy: Array, /) -> Array:
        """The gradient goes to the maximum of each window: the first one if several are equal."""
        dx = np.zeros_like(self.x)
        unclaimed = np.ones(dy.shape, bool)
        for x_view, dx_view in zip(
            windows(self.x, self.kernel_size, self.stride),
            windows(dx, self.kernel_size, self.stride),
            strict=True,
        ):
            here = unclaimed & (x_view == self.y)
            dx_view += dy * here
            unclaimed &= ~here
        return dx


class Flatten(Layer):
    """(N, ...) to (N, the product of the rest)."""

    def forward(self, x: Array, /) -> Array:
        self.shape = x.shape
        return x.reshape(len(x), -1)

    def backward(self, dy: Array, /) -> Array:
        return dy.reshape(self.shape)


class Sequential(Layer):
    """Layers one after the other. State keys are PyTorch's: ``"0.weight"`` is the weight of the first layer."""

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

    def train(self) -> None:
        for layer in self.layers:
            layer.train()

    def eval(self) -> None:
        for layer in self.layers:
            layer.eval()

    def state_dict(self) -> State:
        return {
            f"{i}.{name}": value for i, layer in enumerate(self.layers) for name, value in layer.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Array], /) -> None:
        expected = self.state_dict().keys()
        if state.keys() != expected:
            raise ValueError(f"state: expected {sorted(expected)}, got {sorted(state)}")
        for i, layer in enumerate(self.layers):
            prefix = f"{i}."
            layer.load_state_dict(
                {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            )
