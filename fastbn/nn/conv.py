"""Convolutions of images and sequences: windows gathered into the rows of a matrix, and a product."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import DTypeLike

from fastbn.nn.layers import Array, Layer, Rng, channel_axis, initial
from fastbn.nn.pooling import windows

Pair = tuple[int, int]
Padding = int | Literal["same"]


def zeros_beside(padding: Padding, size: int, kernel: int, stride: int) -> Pair:
    """Zeros before and behind an axis. "same" makes ``ceil(size / stride)`` outputs, with the odd zero behind."""
    if padding != "same":
        return padding, padding
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class Conv2d(Layer):
    """Convolution of images with square kernels.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride : int
    padding : int or "same"
        Zeros on each side of height and width. "same" is as many as give ``ceil(size / stride)`` outputs (Keras).
    bias : bool
    layout : {"NCHW", "NHWC"}
        Order of the axes of x.
    rng : numpy.random.Generator, int or None
        Source of the initial weights.
    dtype : dtype of the parameters

    Attributes
    ----------
    weight, weight_grad : ndarray of shape (out_channels, in_channels, kernel_size, kernel_size)
        In both layouts.
    bias, bias_grad : ndarray of shape (out_channels,), or None
    """

    dimensions = 2
    layouts = ("NCHW", "NHWC")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: Padding = 0,
        bias: bool = True,
        *,
        layout: str = "NCHW",
        rng: Rng = None,
        dtype: DTypeLike = np.float32,
    ) -> None:
        rng = np.random.default_rng(rng)
        # The two axes of an image; a sequence is an image of height 1.
        self.kernel: Pair = (kernel_size if self.dimensions == 2 else 1, kernel_size)
        self.stride: Pair = (stride if self.dimensions == 2 else 1, stride)
        self.padding: tuple[Padding, Padding] = (padding if self.dimensions == 2 else 0, padding)
        self.axis = channel_axis(layout, *self.layouts)
        fan_in = in_channels * kernel_size**self.dimensions
        self.weight = initial(rng, (out_channels, in_channels, *self.kernel[-self.dimensions :]), fan_in, dtype)
        self.bias = initial(rng, (out_channels,), fan_in, dtype) if bias else None

    def forward(self, x: Array, /) -> Array:
        """(N, C, H, W) to (N, F, OH, OW), with ``OH = (H + 2 * padding - kernel_size) // stride + 1``."""
        x = np.moveaxis(x, self.axis, -1)
        self.pads = [*map(zeros_beside, self.padding, x.shape[1:3], self.kernel, self.stride)]
        padded = np.pad(x, ((0, 0), *self.pads, (0, 0)))
        self.padded_shape = padded.shape
        columns = np.stack(list(windows(padded, self.kernel, self.stride)), axis=3)  # (N, OH, OW, K*K, C)
        self.shape = columns.shape
        self.columns = columns.reshape(-1, columns.shape[3] * columns.shape[4])
        y: Array = self.columns @ self._matrix()
        if self.bias is not None:
            y += self.bias
        return np.moveaxis(y.reshape(*self.shape[:3], -1), -1, self.axis)

    def backward(self, dy: Array, /) -> Array:
        """(N, F, OH, OW) to (N, C, H, W)."""
        F, C = self.weight.shape[:2]
        dy = np.moveaxis(dy, self.axis, -1).reshape(-1, F)
        dmatrix = self.columns.T @ dy
        self.weight_grad = np.ascontiguousarray(dmatrix.reshape(-1, C, F).transpose(2, 1, 0)).reshape(self.weight.shape)
        self.bias_grad = dy.sum(axis=0)
        dcolumns = (dy @ self._matrix().T).reshape(self.shape)
        dx = np.zeros(self.padded_shape, dcolumns.dtype)
        for place, view in enumerate(windows(dx, self.kernel, self.stride)):
            view += dcolumns[:, :, :, place]
        (top, bottom), (left, right) = self.pads
        dx = dx[:, top : dx.shape[1] - bottom, left : dx.shape[2] - right]
        return np.moveaxis(dx, -1, self.axis)

    def _matrix(self) -> Array:
        """The weights as (K * K * C, F)."""
        F, C = self.weight.shape[:2]
        return self.weight.reshape(F, C, -1).transpose(2, 1, 0).reshape(-1, F)


class Conv1d(Conv2d):
    """Convolution of sequences (N, C, L), or (N, L, C) with ``layout="NLC"``; all else as `Conv2d`.

    Attributes
    ----------
    weight, weight_grad : ndarray of shape (out_channels, in_channels, kernel_size)
    bias, bias_grad : ndarray of shape (out_channels,), or None
    """

    dimensions = 1
    layouts = ("NCL", "NLC")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: Padding = 0,
        bias: bool = True,
        *,
        layout: str = "NCL",
        rng: Rng = None,
        dtype: DTypeLike = np.float32,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, bias, layout=layout, rng=rng, dtype=dtype
        )
        self.height = 2 if self.axis == 1 else 1  # the axis that an image has and a sequence has not

    def forward(self, x: Array, /) -> Array:
        """(N, C, L) to (N, F, OL), with ``OL = (L + 2 * padding - kernel_size) // stride + 1``."""
        return super().forward(np.expand_dims(x, self.height)).squeeze(self.height)

    def backward(self, dy: Array, /) -> Array:
        """(N, F, OL) to (N, C, L)."""
        return super().backward(np.expand_dims(dy, self.height)).squeeze(self.height)
