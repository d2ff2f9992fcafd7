"""The networks."""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike

import fastbn
from fastbn.nn.layers import Conv2d, Flatten, LayerLike, Linear, MaxPool2d, ReLU, Rng, Sequential


def digits_cnn(batch_norm: bool = True, *, rng: Rng = None, dtype: DTypeLike = np.float32) -> Sequential:
    """A small CNN for 8 x 8 gray images and 10 classes.

    The convolutions keep their bias under batch normalization, where it has no effect: with and without, a seed then
    gives the same initial weights. ReLU is a layer of its own, so that the list is also the one to write in PyTorch
    (``BatchNorm2d(..., activation="relu")`` would do both in one pass over memory).

    Parameters
    ----------
    batch_norm : bool
        False leaves the normalization out.
    rng : numpy.random.Generator, int or None
        Source of the initial weights.
    """
    rng = np.random.default_rng(rng)

    def block(in_channels: int, out_channels: int) -> list[LayerLike]:
        convolution = Conv2d(in_channels, out_channels, 3, padding=1, rng=rng, dtype=dtype)
        normalization = [fastbn.BatchNorm2d(out_channels, dtype=dtype)] if batch_norm else []
        return [convolution, *normalization, ReLU(), MaxPool2d(2)]

    return Sequential(*block(1, 16), *block(16, 32), Flatten(), Linear(32 * 2 * 2, 10, rng=rng, dtype=dtype))
