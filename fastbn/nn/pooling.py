"""Pooling of images: the largest or the mean value of each window, or of the whole image."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fastbn.memory import empty
from fastbn.nn import _windows
from fastbn.nn.layers import Array, Layer, at_least, channel_axis
from fastbn.nn.threads import MOVE, for_each


class Pool2d(Layer):
    """What both poolings of windows share.

    Parameters
    ----------
    kernel_size : int
        Windows are square, and may overlap.
    stride : int, optional
        `kernel_size` unless given.
    padding : int
        On each side of height and width; at most half of `kernel_size`.
    layout : {"NCHW", "NHWC"}
    """

    def __init__(self, kernel_size: int, stride: int | None = None, padding: int = 0, *, layout: str = "NCHW") -> None:
        at_least("kernel_size", kernel_size, 1)
        stride = kernel_size if stride is None else stride
        at_least("stride", stride, 1)
        if not 0 <= 2 * padding <= kernel_size:
            raise ValueError(f"padding: expected 0 to half of kernel_size {kernel_size}, got {padding}")
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.axis = channel_axis(layout)

    def outputs(self, size: int) -> int:
        """Windows along an axis of so many pixels."""
        if size + 2 * self.padding < self.kernel_size:
            raise ValueError(f"x: expected height and width of at least {self.kernel_size}, got {size}")
        return (size + 2 * self.padding - self.kernel_size) // self.stride + 1

    def planes(self, x: Array) -> Array:
        """x in NHWC. In NCHW each plane is an image of one channel: (N * C, H, W, 1)."""
        x = np.require(x, requirements=["C", "W"])
        self.channels = x.shape[self.axis]
        return x if self.axis == -1 else x.reshape(-1, *x.shape[2:], 1)

    def unplanes(self, y: Array, N: int) -> Array:
        """The inverse of `planes`, for a batch of N images."""
        return y if self.axis == -1 else y.reshape(N, self.channels, *y.shape[1:3])


class MaxPool2d(Pool2d):
    __doc__ = f"""Maximum of each window; (N, C, H, W) to (N, C, OH, OW), ``OH = (H + 2p - kernel_size) // stride + 1``.

    {(Pool2d.__doc__ or "").partition(chr(10))[2].strip()}
    """

    def forward(self, x: Array, /) -> Array:
        planes = self.planes(x)
        N, H, W, C = planes.shape
        OH, OW = self.outputs(H), self.outputs(W)
        geometry = (C, H, W, *(self.kernel_size,) * 2, *(self.stride,) * 2, *(self.padding,) * 2, OH, OW)
        y = empty((N, OH, OW, C), x.dtype)
        self.places, self.shape = empty(y.shape, np.int32), planes.shape

        def part(images: slice) -> None:
            _windows.max_pool(planes[images], y[images], self.places[images], geometry)

        for_each(part, N, MOVE * y.size)
        return self.unplanes(y, len(x))

    def backward(self, dy: Array, /) -> Array:
        """The gradient goes to the maximum of each window: the first one if several are equal."""
        planes, dx = self.planes(dy), empty(self.shape, dy.dtype)

        def part(images: slice) -> None:
            dx[images] = 0
            _windows.max_unpool(planes[images], self.places[images], dx[images])

        for_each(part, len(dx), MOVE * dx.size)
        return self.unplanes(dx, len(dy))


class AvgPool2d(Pool2d):
    __doc__ = f"""Mean of each window, its padding zeros included; shapes as `MaxPool2d`.

    {(Pool2d.__doc__ or "").partition(chr(10))[2].strip()}
    """

    def forward(self, x: Array, /) -> Array:
        planes = self.planes(x)
        N, H, W, C = planes.shape
        y = empty((N, self.outputs(H), self.outputs(W), C), x.dtype)
        self.shape, p = planes.shape, self.padding

        def part(images: slice) -> None:
            y[images] = 0
            for view in self.views(np.pad(planes[images], ((0, 0), (p, p), (p, p), (0, 0)))):
                y[images] += view
            y[images] /= self.kernel_size**2

        for_each(part, N, MOVE * y.size)
        return self.unplanes(y, len(x))

    def backward(self, dy: Array, /) -> Array:
        share = self.planes(dy) / self.kernel_size**2
        dx, p = empty(self.shape, dy.dtype), self.padding
        N, H, W, C = self.shape

        def part(images: slice) -> None:
            padded = np.zeros((images.stop - images.start, H + 2 * p, W + 2 * p, C), dy.dtype)
            for view in self.views(padded):
                view += share[images]
            dx[images] = padded[:, p : p + H, p : p + W]

        for_each(part, N, MOVE * dx.size)
        return self.unplanes(dx, len(dy))

    def views(self, x: Array) -> Iterator[Array]:
        """Views of (N, H, W, C), one for each place in a window: what all windows see there."""
        k, s = self.kernel_size, self.stride
        for i in range(k):
            for j in range(k):
                yield x[:, i : i + x.shape[1] - k + 1 : s, j : j + x.shape[2] - k + 1 : s]


class GlobalAvgPool2d(Layer):
    """Mean of each channel of an image: (N, C, H, W) to (N, C)."""

    def __init__(self, *, layout: str = "NCHW") -> None:
        self.plane = (2, 3) if channel_axis(layout) == 1 else (1, 2)

    def forward(self, x: Array, /) -> Array:
        self.shape = x.shape
        y: Array = x.mean(axis=self.plane)
        return y

    def backward(self, dy: Array, /) -> Array:
        H, W = (self.shape[axis] for axis in self.plane)
        return np.broadcast_to(np.expand_dims(dy / (H * W), self.plane), self.shape)
