"""Pooling of images: the largest or the mean value of each window, or of the whole image."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fastbn.nn.layers import Array, Layer, channel_axis


def windows(x: Array, kernel: tuple[int, int], stride: tuple[int, int]) -> Iterator[Array]:
    """Views of `x` (N, H, W, C), one for each place in a window, each of shape (N, OH, OW, C).

    The view of place (i, j) holds ``x[:, i + stride * oh, j + stride * ow]``: what all windows see at that place.
    Reading the views gathers the windows; adding to them scatters gradients back.
    """
    span_h, span_w = x.shape[1] - kernel[0] + 1, x.shape[2] - kernel[1] + 1
    if span_h < 1 or span_w < 1:
        raise ValueError(f"x: expected height and width of at least {kernel}, got {x.shape[1:3]}")
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            yield x[:, i : i + span_h : stride[0], j : j + span_w : stride[1]]


class Pool2d(Layer):
    """What both poolings of windows share.

    Parameters
    ----------
    kernel_size : int
        Windows are square, and may overlap.
    stride : int, optional
        `kernel_size` unless given.
    padding : int
        On each side of height and width.
    layout : {"NCHW", "NHWC"}
    """

    filling = 0.0

    def __init__(self, kernel_size: int, stride: int | None = None, padding: int = 0, *, layout: str = "NCHW") -> None:
        self.kernel_size, self.stride, self.padding = kernel_size, stride or kernel_size, padding
        self.axis = channel_axis(layout)

    def padded(self, x: Array) -> Array:
        """x as (N, H, W, C), with its padding."""
        p = self.padding
        return np.pad(np.moveaxis(x, self.axis, -1), ((0, 0), (p, p), (p, p), (0, 0)), constant_values=self.filling)

    def views(self, padded: Array) -> Iterator[Array]:
        return windows(padded, (self.kernel_size,) * 2, (self.stride,) * 2)

    def unpadded(self, dx: Array) -> Array:
        p = self.padding
        return np.moveaxis(dx[:, p : dx.shape[1] - p, p : dx.shape[2] - p], -1, self.axis)


class MaxPool2d(Pool2d):
    __doc__ = f"""Maximum of each window; (N, C, H, W) to (N, C, OH, OW), ``OH = (H + 2p - kernel_size) // stride + 1``.

    {(Pool2d.__doc__ or "").partition(chr(10))[2].strip()}
    """

    filling = -np.inf

    def forward(self, x: Array, /) -> Array:
        self.x = self.padded(x)
        first, *others = self.views(self.x)
        self.y = first.copy()
        for view in others:
            np.maximum(self.y, view, out=self.y)
        return np.moveaxis(self.y, -1, self.axis)

    def backward(self, dy: Array, /) -> Array:
        """The gradient goes to the maximum of each window: the first one if several are equal."""
        dy = np.moveaxis(dy, self.axis, -1)
        dx = np.zeros_like(self.x)
        unclaimed = np.ones(dy.shape, bool)
        for x_view, dx_view in zip(self.views(self.x), self.views(dx), strict=True):
            here = unclaimed & (x_view == self.y)
            dx_view += dy * here
            unclaimed &= ~here
        return self.unpadded(dx)


class AvgPool2d(Pool2d):
    __doc__ = f"""Mean of each window, its padding zeros included; shapes as `MaxPool2d`.

    {(Pool2d.__doc__ or "").partition(chr(10))[2].strip()}
    """

    def forward(self, x: Array, /) -> Array:
        padded = self.padded(x)
        self.shape = padded.shape
        first, *others = self.views(padded)
        y = first.copy()
        for view in others:
            y += view
        y /= self.kernel_size**2
        return np.moveaxis(y, -1, self.axis)

    def backward(self, dy: Array, /) -> Array:
        share = np.moveaxis(dy, self.axis, -1) / self.kernel_size**2
        dx = np.zeros(self.shape, dy.dtype)
        for view in self.views(dx):
            view += share
        return self.unpadded(dx)


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
