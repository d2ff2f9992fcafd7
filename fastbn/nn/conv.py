"""Convolutions of images and sequences: windows gathered into the rows of a matrix, and a product."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike

from fastbn.memory import empty
from fastbn.nn import _windows
from fastbn.nn.layers import Array, Layer, Rng, channel_axis, initial
from fastbn.nn.threads import for_each

TILE_BYTES = 1 << 18  # of gathered windows: they and their product fit into the L2 cache

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
        """The windows of these images, some lines at a time; in NCHW a tile is in one image."""
        most = max(1, TILE_BYTES // (self.OW * self.values * dtype.itemsize))
        block = self.OH if self.axis == 1 else self.OH * (images.stop - images.start)
        scratch = np.empty(min(most, block) * self.OW * self.values, dtype)
        for start in range(images.start * self.OH, images.stop * self.OH, block):
            for line in range(start, start + block, most):
                yield Tile(self, line, min(most, start + block - line), scratch)


@dataclass
class Tile:
    """Some lines of windows. Matrices have one row for each window in both layouts, transposed in memory in NCHW."""

    windows: Windows
    line: int  # counted through all images
    lines: int
    scratch: Array

    def columns(self) -> Array:
        """Room for the windows: one row of the matrix for each in NHWC, one column in NCHW."""
        size = (self.lines * self.windows.OW, self.windows.values)
        shape = size if self.windows.axis == -1 else size[::-1]
        columns: Array = self.scratch[: size[0] * size[1]].reshape(shape)
        return columns

    def rows(self, array: Array) -> Array:
        """This tile of (N, F, OH, OW) or (N, OH, OW, F) as (windows, F): a view."""
        OH, OW = self.windows.OH, self.windows.OW
        image, line = (0, self.line) if self.windows.axis == -1 else divmod(self.line, OH)
        places = slice(line * OW, (line + self.lines) * OW)
        rows: Array = array.reshape(-1, array.shape[-1]) if self.windows.axis == -1 else array[image]
        return rows[places] if self.windows.axis == -1 else rows.reshape(len(rows), -1)[:, places].T

    def gather(self, x: Array) -> Array:
        """The windows of x as (windows, values of a window)."""
        if self.windows.trivial:
            return self.rows(x)
        columns = self.columns()
        _windows.exchange(x, columns, self.line, self.lines, self.windows.geometry, self.windows.axis == -1, False)
        return columns if self.windows.axis == -1 else columns.T

    def scatter(self, rows: Array, matrix: Array, dx: Array) -> None:
        """Add ``rows @ matrix.T``, the gradients of windows, to the pixels of dx."""
        if self.windows.trivial:
            np.matmul(rows, matrix.T, out=self.rows(dx))
            return
        columns = self.columns()
        np.matmul(rows, matrix.T, out=columns if self.windows.axis == -1 else columns.T)
        _windows.exchange(dx, columns, self.line, self.lines, self.windows.geometry, self.windows.axis == -1, True)


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
        self.windows = windows = Windows(x.shape, self.axis, self.kernel, self.stride, self.padding)
        self.x = x = np.ascontiguousarray(x, self.weight.dtype)
        matrix = self._matrix()
        y = empty(windows.output_shape(len(self.weight)), x.dtype)

        def part(images: slice) -> None:
            for tile in windows.tiles(images, x.dtype):
                rows = tile.rows(y)
                np.matmul(tile.gather(x), matrix, out=rows)
                if self.bias is not None:
                    rows += self.bias

        for_each(part, len(x), y.size * len(matrix))
        return y

    def backward(self, dy: Array, /) -> Array:
        """(N, F, OH, OW) to (N, C, H, W)."""
        windows, x, matrix = self.windows, self.x, self._matrix()
        dy = np.ascontiguousarray(dy, x.dtype)
        dx = empty(x.shape, x.dtype)
        sums = {}  # of each part, by its first image: they are added in order

        def part(images: slice) -> None:
            dmatrix, dbias = np.zeros(matrix.shape, x.dtype), np.zeros(len(self.weight), x.dtype)
            dx[images] = 0
            for tile in windows.tiles(images, x.dtype):
                rows = tile.rows(dy)
                columns = tile.gather(x)
                dmatrix += columns.T @ rows
                dbias += np.ones(len(rows), x.dtype) @ rows  # the sum; a product is faster
                tile.scatter(rows, matrix, dx)
            sums[images.start] = dmatrix, dbias

        for_each(part, len(x), 2 * dy.size * len(matrix))
        dmatrix, self.bias_grad = (sum(parts) for parts in zip(*(sums[start] for start in sorted(sums)), strict=True))
        self.weight_grad = self._from_matrix(dmatrix)
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
        return super().forward(np.expand_dims(x, self.height)).squeeze(self.height)

    def backward(self, dy: Array, /) -> Array:
        """(N, F, OL) to (N, C, L)."""
        return super().backward(np.expand_dims(dy, self.height)).squeeze(self.height)
