"""Convolutions of images and sequences: windows gathered into a matrix (im2col), tile by tile, and a product."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike

from fastbn.memory import empty
from fastbn.nn import _windows
from fastbn.nn.layers import Array, Layer, Rng, Sequential, at_least, channel_axis, initial
from fastbn.nn.threads import for_each

TILE_BYTES = 1 << 21  # of gathered windows: in the L3 cache; with smaller tiles threads wait more often for the GIL

Pair = tuple[int, int]
Padding = int | Literal["same"]


def zeros_beside(padding: Padding, size: int, kernel: int, stride: int) -> Pair:
    """Zeros before and behind an axis. "same" makes ``ceil(size / stride)`` outputs, with the odd zero behind."""
    if padding != "same":
        return padding, padding
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class Windows:
    """The windows of a batch of images: where they lie, and how they are cut into tiles."""

    def __init__(
        self, shape: tuple[int, ...], axis: int, kernel: Pair, stride: Pair, padding: tuple[Padding, Padding]
    ) -> None:
        self.axis = axis
        self.N, C, *size = shape if axis == 1 else (shape[0], shape[3], *shape[1:3])
        zeros = [*map(zeros_beside, padding, size, kernel, stride)]
        spans = [length + sum(beside) - width for length, beside, width in zip(size, zeros, kernel, strict=True)]
        if min(spans) < 0:
            raise ValueError(f"x: expected height and width of at least {kernel}, got {tuple(size)}")
        self.OH, self.OW = (span // step + 1 for span, step in zip(spans, stride, strict=True))
        self.values = C * kernel[0] * kernel[1]
        starts = [before for before, _ in zeros]
        self.geometry = (C, *size, *kernel, *stride, *starts, self.OH, self.OW)
        # The windows of a 1 x 1 convolution are the pixels, as they lie there.
        self.trivial = kernel == stride == (1, 1) and not any(map(sum, zeros))

    def output_shape(self, F: int) -> tuple[int, ...]:
        return (self.N, F, self.OH, self.OW) if self.axis == 1 else (self.N, self.OH, self.OW, F)

    def tiles(self, images: slice, dtype: np.dtype[Any]) -> Iterator[Tile]:
        """The windows of these images, some lines at a time; in NCHW whole images, or lines of one."""
        most = max(1, TILE_BYTES // (self.OW * self.values * dtype.itemsize))
        block = self.OH * (images.stop - images.start)
        if self.axis == 1 and most < self.OH:
            block = self.OH
        elif self.axis == 1:
            most -= most % self.OH
        scratch = np.empty(min(most, block) * self.OW * self.values, dtype)
        for start in range(images.start * self.OH, images.stop * self.OH, block):
            for line in range(start, start + block, most):
                yield Tile(self, line, min(most, start + block - line), scratch)


@dataclass
class Tile:
    """Some lines of windows, as a matrix. In NHWC it has a row for each window; in NCHW a column, and there is one such
    matrix for each image."""

    windows: Windows
    line: int  # counted through all images
    lines: int
    scratch: Array

    def pixels(self, array: Array) -> Array:
        """This tile of (N, F, OH, OW) as (images, F, windows), or of (N, OH, OW, F) as (windows, F): a view."""
        OH, OW, lines = self.windows.OH, self.windows.OW, self.lines
        if self.windows.axis == -1:
            return array.reshape(-1, array.shape[-1])[self.line * OW : (self.line + lines) * OW]
        image, line = divmod(self.line, OH)
        images = array[image : image + -(-lines // OH)].reshape(-1, array.shape[1], OH * OW)
        return images[:, :, line * OW : line * OW + min(lines, OH) * OW]

    def room(self) -> Array:
        """For the values of all windows, as (images, values, windows) or (windows, values)."""
        W = self.windows
        columns: Array = self.scratch[: self.lines * W.OW * W.values]
        if W.axis == -1:
            return columns.reshape(-1, W.values)
        return columns.reshape(-1, W.values, min(self.lines, W.OH) * W.OW)

    def gather(self, x: Array) -> Array:
        """The values of the windows of x, as `room`."""
        if self.windows.trivial:
            return self.pixels(x)
        columns = self.room()
        self._exchange(x, columns, back=False)
        return columns

    def scatter(self, gradients: Array, matrix: Array, dx: Array) -> None:
        """Add ``gradients @ matrix.T``, those of the values of windows, to the pixels of dx."""
        if self.windows.trivial:
            self.multiply(gradients, matrix.T, self.pixels(dx))
            return
        columns = self.room()
        self.multiply(gradients, matrix.T, columns)
        self._exchange(dx, columns, back=True)

    def _exchange(self, x: Array, columns: Array, *, back: bool) -> None:
        channels_last = self.windows.axis == -1
        _windows.exchange(x, columns.reshape(-1), self.line, self.lines, self.windows.geometry, channels_last, back)

    def multiply(self, windows: Array, matrix: Array, out: Array) -> None:
        """``windows @ matrix``, where windows are rows."""
        if self.windows.axis == -1:
            np.matmul(windows, matrix, out=out)
        else:
            np.matmul(matrix.T, windows, out=out)

    def add(self, y: Array, bias: Array) -> None:
        """The bias to each window."""
        y += bias if self.windows.axis == -1 else bias[:, np.newaxis]

    def sums(self, windows: Array, gradients: Array) -> tuple[Array, Array]:
        """``windows.T @ gradients`` and the sum of the gradients, over all windows."""
        if self.windows.axis == -1:
            ones = np.ones(len(gradients), gradients.dtype)
            return windows.T @ gradients, ones @ gradients  # a product is faster than a sum
        return (windows @ gradients.transpose(0, 2, 1)).sum(axis=0), gradients.sum(axis=(0, 2))


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
    input_gradient : bool
        False where nobody needs dx: `backward` then returns NaN and saves a third of its work.
    """

    dimensions = 2
    layouts = ("NCHW", "NHWC")
    input_gradient = True

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
        for name, value in (("kernel_size", kernel_size), ("stride", stride)):
            at_least(name, value, 1)
        if padding != "same":
            at_least("padding", padding, 0, ' or "same"')
        rng = np.random.default_rng(rng)
        # The two axes of an image; a sequence is an image of height 1.
        self.kernel: Pair = (kernel_size if self.dimensions == 2 else 1, kernel_size)
        self.stride: Pair = (stride if self.dimensions == 2 else 1, stride)
        self.padding: tuple[Padding, Padding] = (padding if self.dimensions == 2 else 0, padding)
        self.axis = channel_axis(layout, *self.layouts)
        if np.dtype(dtype) not in (np.float32, np.float64):
            raise ValueError(f"dtype: expected float32 or float64, got {np.dtype(dtype)}")
        fan_in = in_channels * kernel_size**self.dimensions
        self.weight = initial(rng, (out_channels, in_channels, *self.kernel[-self.dimensions :]), fan_in, dtype)
        self.bias = initial(rng, (out_channels,), fan_in, dtype) if bias else None

    def forward(self, x: Array, /) -> Array:
        """(N, C, H, W) to (N, F, OH, OW), with ``OH = (H + 2 * padding - kernel_size) // stride + 1``."""
        self._check(x)
        return self._convolve(x)

    def _check(self, x: Array) -> None:
        rank = 2 + self.dimensions
        if x.ndim != rank:
            raise ValueError(f"x: expected {rank} dimensions, got shape {x.shape}")
        if x.shape[self.axis] != self.weight.shape[1]:
            raise ValueError(f"x: expected {self.weight.shape[1]} channels on axis {self.axis}, got shape {x.shape}")
        if len(x) == 0:
            raise ValueError(f"x: expected at least one image, got shape {x.shape}")

    def _convolve(self, x: Array) -> Array:
        self.windows = windows = Windows(x.shape, self.axis, self.kernel, self.stride, self.padding)
        self.x = x = np.require(x, self.weight.dtype, ["C", "W"])
        matrix = self._matrix()
        y = empty(windows.output_shape(len(self.weight)), x.dtype)

        def part(images: slice) -> None:
            for tile in windows.tiles(images, x.dtype):
                pixels = tile.pixels(y)
                tile.multiply(tile.gather(x), matrix, pixels)
                if self.bias is not None:
                    tile.add(pixels, self.bias)

        for_each(part, len(x), y.size * len(matrix))
        return y

    def backward(self, dy: Array, /) -> Array:
        """(N, F, OH, OW) to (N, C, H, W)."""
        windows, x, matrix = self.windows, self.x, self._matrix()
        dy = np.ascontiguousarray(dy, x.dtype)
        dx = empty(x.shape, x.dtype) if self.input_gradient else np.broadcast_to(x.dtype.type(np.nan), x.shape)
        sums = {}  # of each part, by its first image: they are added in order

        def part(images: slice) -> None:
            dmatrix, dbias = np.zeros(matrix.shape, x.dtype), np.zeros(len(self.weight), x.dtype)
            if self.input_gradient:
                dx[images] = 0
            for tile in windows.tiles(images, x.dtype):
                gradients = tile.pixels(dy)
                tile_dmatrix, tile_dbias = tile.sums(tile.gather(x), gradients)
                dmatrix += tile_dmatrix
                dbias += tile_dbias
                if self.input_gradient:
                    tile.scatter(gradients, matrix, dx)
            sums[images.start] = dmatrix, dbias

        for_each(part, len(x), 2 * dy.size * len(matrix))
        dmatrix, dbias = (sum(parts) for parts in zip(*(sums[start] for start in sorted(sums)), strict=True))
        self.weight_grad = self._from_matrix(dmatrix)
        self.bias_grad = None if self.bias is None else dbias
        return dx

    def _matrix(self) -> Array:
        """The weights as (values of a window, F), in the order in which windows are gathered."""
        F = len(self.weight)
        by_place: Array = self.weight if self.axis == 1 else np.moveaxis(self.weight, 1, -1)
        return by_place.reshape(F, -1).T

    def _from_matrix(self, matrix: Array) -> Array:
        """The inverse of `_matrix`."""
        F, C, *kernel = self.weight.shape
        if self.axis == 1:
            return np.ascontiguousarray(matrix.T.reshape(F, C, *kernel))
        return np.ascontiguousarray(np.moveaxis(matrix.T.reshape(F, *kernel, C), -1, 1))


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
        self._check(x)
        return self._convolve(np.expand_dims(x, self.height)).squeeze(self.height)

    def backward(self, dy: Array, /) -> Array:
        """(N, F, OL) to (N, C, L)."""
        return super().backward(np.expand_dims(dy, self.height)).squeeze(self.height)


@contextmanager
def without_input_gradient(model: Any) -> Iterator[None]:
    """Within a `with` block, a convolution that is the first layer of the model computes no gradient of the images."""
    first = model
    while isinstance(first, Sequential):
        first = first.layers[0]
    if not isinstance(first, Conv2d):
        yield
        return
    before, first.input_gradient = first.input_gradient, False
    try:
        yield
    finally:
        first.input_gradient = before
