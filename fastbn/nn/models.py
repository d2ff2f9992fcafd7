"""The networks of the articles and papers about batch normalization; `MODELS` names them.

Convolutions keep their bias under batch normalization, where it has no effect, if the articles have it so: with and
without, a seed then gives the same initial weights. `resnet110` and `bn_inception` have it without BN only.
Where relu follows BN, fastbn computes both in one pass over memory: ``BatchNorm2d(..., activation="relu")``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

import fastbn
from fastbn.nn.conv import Conv1d, Conv2d
from fastbn.nn.layers import (
    AddReLU,
    Columns,
    Concat,
    Flatten,
    LayerLike,
    Linear,
    ReLU,
    Residual,
    Rng,
    Sequential,
    Sigmoid,
    Subsample,
)
from fastbn.nn.pooling import AvgPool2d, GlobalAvgPool2d, MaxPool2d

Shape = tuple[int, int, int]  # channels, height and width, in this order in both layouts

MODELS: dict[str, Callable[..., Sequential]] = {}


@dataclass
class Builder:
    """The options that all networks share, and the layers made with them."""

    batch_norm: bool
    input_shape: Shape
    classes: int
    layout: str
    rng: np.random.Generator
    dtype: DTypeLike

    def conv(self, inputs: int, filters: int, kernel: int, **options: Any) -> Conv2d:
        return Conv2d(inputs, filters, kernel, **options, layout=self.layout, rng=self.rng, dtype=self.dtype)

    def linear(self, inputs: int, outputs: int | None = None) -> Linear:
        """The last layer unless `outputs` is given."""
        return Linear(inputs, self.classes if outputs is None else outputs, rng=self.rng, dtype=self.dtype)

    def norm(self, channels: int, **options: Any) -> list[LayerLike]:
        if not self.batch_norm:
            return []
        return [fastbn.BatchNorm2d(channels, layout=self.layout, dtype=self.dtype, **options)]

    def norm_relu(self, channels: int) -> LayerLike:
        return self.norm(channels, activation="relu")[0] if self.batch_norm else ReLU()

    def block(self, inputs: int, filters: int, kernel: int, **options: Any) -> list[LayerLike]:
        """Convolution, BN, relu."""
        return [self.conv(inputs, filters, kernel, **options), self.norm_relu(filters)]

    def max_pool(self, kernel: int, stride: int | None = None, padding: int = 0) -> MaxPool2d:
        return MaxPool2d(kernel, stride, padding, layout=self.layout)

    def avg_pool(self, kernel: int, stride: int | None = None, padding: int = 0) -> AvgPool2d:
        return AvgPool2d(kernel, stride, padding, layout=self.layout)


def network(
    *shape: int, classes: int = 10, layout: str = "NCHW"
) -> Callable[[Callable[..., Sequential]], Callable[..., Sequential]]:
    """Put ``name(builder, ...)`` into `MODELS`, with the signature that all networks share and these defaults."""

    def decorate(function: Callable[..., Sequential]) -> Callable[..., Sequential]:
        def make(
            batch_norm: bool = True,
            *,
            input_shape: Any = shape,
            classes: int = classes,
            layout: str = layout,
            rng: Rng = None,
            dtype: DTypeLike = np.float32,
            **options: Any,
        ) -> Sequential:
            rng = np.random.default_rng(rng)
            return function(Builder(batch_norm, tuple(input_shape), classes, layout, rng, dtype), **options)

        make.__name__ = make.__qualname__ = function.__name__
        make.__doc__ = f"""{(function.__doc__ or "").strip()}

    Parameters
    ----------
    batch_norm : bool
        False leaves the normalization out.
    input_shape : (int, int, int)
        Channels, height and width of an image, in this order in both layouts.
    classes : int
        Outputs.
    layout : {{"NCHW", "NHWC"}}
        Of the batches of images.
    rng : numpy.random.Generator, int or None
        Source of the initial weights.
    dtype : float32 or float64
        Of the parameters.
    """
        MODELS[function.__name__] = make
        return make

    return decorate


@network(3, 32, 32)
def cnn_bn(build: Builder) -> Sequential:
    """Twice convolution, BN, relu and 2 x 2 max-pooling, then a linear layer: 25,674 parameters.

    As printed, without the pooling, it does not run on its article's (4, 3, 32, 32) example: the linear layer expects
    32 * 8 * 8 values and 32 * 32 * 32 arrive. Two poolings make it fit.
    """
    C, H, W = build.input_shape
    return Sequential(
        *build.block(C, 16, 3, padding=1),
        build.max_pool(2),
        *build.block(16, 32, 3, padding=1),
        build.max_pool(2),
        Flatten(),
        build.linear(32 * (H // 4) * (W // 4)),
    )


def digits_cnn(batch_norm: bool = True, **options: Any) -> Sequential:
    """`cnn_bn` for the digits, gray images of 8 x 8 pixels."""
    return cnn_bn(batch_norm, **{"input_shape": (1, 8, 8)} | options)


@network(3, 32, 32, layout="NHWC")
def keras_cnn(build: Builder) -> Sequential:
    """Twice convolution, relu and then BN, with Keras's defaults, and a dense layer: 521,354 parameters.

    The article's 521,546 count the 192 running statistics too, as Keras does.
    """
    C, H, W = build.input_shape
    keras = {"eps": 1e-3, "momentum": 0.01, "unbiased": False}  # Keras's momentum 0.99 is the weight of the old value
    return Sequential(
        build.conv(C, 32, 3),
        ReLU(),
        *build.norm(32, **keras),
        build.conv(32, 64, 3),
        ReLU(),
        *build.norm(64, **keras),
        Flatten(),
        build.linear(64 * (H - 4) * (W - 4)),
    )


@network(3, 32, 32, layout="NHWC")
def keras_blocks(build: Builder) -> Sequential:
    """Twice convolution, BN, relu and 2 x 2 max-pooling, then 64 dense units with relu, and the dense outputs.

    The article does not give its numbers of filters: 32 and 64 are ours.
    """
    C, H, W = build.input_shape
    return Sequential(
        *build.block(C, 32, 3, padding="same"),
        build.max_pool(2),
        *build.block(32, 64, 3, padding="same"),
        build.max_pool(2),
        Flatten(),
        build.linear(64 * (H // 4) * (W // 4), 64),
        ReLU(),
        build.linear(64),
    )


@network(1, 28, 28)
def cnn1d(build: Builder) -> Sequential:
    """Images as sequences of their columns: convolution, BN, relu, and a linear layer."""
    C, H, W = build.input_shape
    layout = "NLC" if build.layout == "NHWC" else "NCL"
    norm = fastbn.BatchNorm1d(32, layout=layout, dtype=build.dtype, activation="relu") if build.batch_norm else ReLU()
    return Sequential(
        Columns(layout=build.layout),
        Conv1d(C * H, 32, 3, padding=1, layout=layout, rng=build.rng, dtype=build.dtype),
        norm,
        Flatten(),
        build.linear(32 * W),
    )


@network(1, 28, 28)
def cnn2d(build: Builder) -> Sequential:
    """Convolution, BN, relu, and a linear layer on all 32 x 28 x 28 values."""
    C, H, W = build.input_shape
    return Sequential(*build.block(C, 32, 3, padding=1), Flatten(), build.linear(32 * H * W))


def mlp(build: Builder, activation: Callable[[], LayerLike], std: float, depth: int) -> Sequential:
    """`depth` hidden layers of 100 units; weights from a normal distribution of standard deviation `std`, no biases at
    first."""
    layers: list[LayerLike] = [Flatten()]
    inputs = int(np.prod(build.input_shape))
    for _ in range(depth):
        layers.append(build.linear(inputs, 100))
        layers += [fastbn.BatchNorm1d(100, dtype=build.dtype)] if build.batch_norm else []
        layers.append(activation())
        inputs = 100
    layers.append(build.linear(inputs))
    for layer in layers:
        if isinstance(layer, Linear):
            layer.weight[...] = build.rng.normal(0, std, layer.weight.shape)
            layer.bias = np.zeros(len(layer.weight), layer.weight.dtype)
    return Sequential(*layers)


@network(1, 28, 28)
def mlp_sigmoid(build: Builder, std: float = 0.1, depth: int = 3) -> Sequential:
    """Hidden layers of 100 sigmoid units, 3 by default: Ioffe and Szegedy 2015, section 4.1 (figure 1).

    Its weights are "small random Gaussian values"; their standard deviation `std` is ours.
    """
    return mlp(build, Sigmoid, std, depth)


@network(1, 28, 28)
def mlp_relu(build: Builder, std: float = 0.1, depth: int = 3) -> Sequential:
    """`mlp_sigmoid` with relu."""
    return mlp(build, ReLU, std, depth)


@network(3, 32, 32)
def resnet110(build: Builder, skips: bool = True, depth: int = 110) -> Sequential:
    """Residual network of `depth` layers, 6n + 2: He et al. 2015, arXiv:1512.03385, section 4.2, as in Bjorck et al.
    2018, arXiv:1806.02375. Shortcuts have no parameters (option A); without `skips` it is a plain network.
    """
    if (depth - 2) % 6:
        raise ValueError(f"depth: expected 6n + 2, got {depth}")
    bias = not build.batch_norm

    def pair(inputs: int, filters: int) -> list[LayerLike]:
        stride = 1 if inputs == filters else 2
        first = build.block(inputs, filters, 3, stride=stride, padding=1, bias=bias)
        second = build.conv(filters, filters, 3, padding=1, bias=bias)
        if not skips:
            return [*first, second, build.norm_relu(filters)]
        join = build.norm_relu(filters) if build.batch_norm else AddReLU()
        shortcut = None if stride == 1 else Subsample(filters - inputs, layout=build.layout)
        return [Residual(Sequential(*first, second), join, shortcut)]

    layers = build.block(build.input_shape[0], 16, 3, padding=1, bias=bias)
    inputs = 16
    for filters in (16, 32, 64):
        for _ in range((depth - 2) // 6):
            layers += pair(inputs, filters)
            inputs = filters
    return Sequential(*layers, GlobalAvgPool2d(layout=build.layout), build.linear(inputs))


# Ioffe and Szegedy 2015, figure 5. Filters: 1x1; 3x3 reduce, 3x3; double 3x3 reduce, double 3x3; after the pooling.
# Modules without 1x1 have stride 2, and the pooling passes its input through. The figure prints 128 after the pooling
# of 4c and 4d, too, but then their outputs had 608 channels; with 96 they have the 576 that it prints.
INCEPTION = {
    "3a": (64, 64, 64, 64, 96, "avg", 32),
    "3b": (64, 64, 96, 64, 96, "avg", 64),
    "3c": (0, 128, 160, 64, 96, "max", 0),
    "4a": (224, 64, 96, 96, 128, "avg", 128),
    "4b": (192, 96, 128, 96, 128, "avg", 128),
    "4c": (160, 128, 160, 128, 160, "avg", 96),
    "4d": (96, 128, 192, 160, 192, "avg", 96),
    "4e": (0, 128, 192, 192, 256, "max", 0),
    "5a": (352, 192, 320, 160, 224, "avg", 128),
    "5b": (352, 192, 320, 192, 224, "max", 128),
}


def inception(build: Builder, inputs: int, name: str, width: int = 1) -> tuple[Concat, int]:
    """A module and its number of output channels; all numbers of filters are divided by `width`."""
    *filters, pooling, projection = INCEPTION[name]
    one, reduce3, three, reduce33, double = (int(number) // width for number in filters)
    projected = int(projection) // width
    stride = 1 if one else 2
    options = {"bias": not build.batch_norm}

    def block(inputs: int, filters: int, kernel: int, stride: int = 1) -> list[LayerLike]:
        return build.block(inputs, filters, kernel, stride=stride, padding=kernel // 2, **options)

    pool = (build.avg_pool if pooling == "avg" else build.max_pool)(3, stride, 1)
    branches = [
        Sequential(*block(inputs, reduce3, 1), *block(reduce3, three, 3, stride)),
        Sequential(*block(inputs, reduce33, 1), *block(reduce33, double, 3), *block(double, double, 3, stride)),
        Sequential(pool, *(block(inputs, projected, 1) if projected else [])),
    ]
    if one:
        branches.insert(0, Sequential(*block(inputs, one, 1)))
    return Concat(*branches, layout=build.layout), one + three + double + (projected or inputs)


def inceptions(build: Builder, inputs: int, names: tuple[str, ...], width: int = 1) -> list[LayerLike]:
    """Modules, the mean of each channel, and the output layer."""
    layers: list[LayerLike] = []
    for name in names:
        module, inputs = inception(build, inputs, name, width)
        layers.append(module)
    return [*layers, GlobalAvgPool2d(layout=build.layout), build.linear(inputs)]


@network(3, 224, 224, classes=1000)
def bn_inception(build: Builder) -> Sequential:
    """The network of Ioffe and Szegedy 2015, arXiv:1502.03167, figure 5.

    Its first convolution is a full one here; the paper's is a product of a depthwise and a 1 x 1 convolution.
    """
    options = {"bias": not build.batch_norm}
    return Sequential(
        *build.block(build.input_shape[0], 64, 7, stride=2, padding=3, **options),
        build.max_pool(3, 2, 1),
        *build.block(64, 64, 1, **options),
        *build.block(64, 192, 3, padding=1, **options),
        build.max_pool(3, 2, 1),
        *inceptions(build, 192, tuple(INCEPTION)),
    )


@network(1, 28, 28)
def bn_inception_small(build: Builder) -> Sequential:
    """`bn_inception` for images of about 28 x 28: five of its modules, with a quarter of the filters."""
    return Sequential(
        *build.block(build.input_shape[0], 48, 3, padding=1, bias=not build.batch_norm),
        build.max_pool(3, 2, 1),
        *inceptions(build, 48, ("3a", "3b", "3c", "5a", "5b"), width=4),
    )
