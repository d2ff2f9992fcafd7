"""Images to train on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastbn.nn.layers import Array


class Dataset(NamedTuple):
    """Images of shape (N, channels, height, width) with labels of shape (N,), in two parts."""

    x_train: Array
    y_train: Array
    x_test: Array
    y_test: Array


def load_digits() -> Dataset:
    """1,797 handwritten digits of 8 x 8 pixels, float32 in [0, 1]; 360 of them are for testing.

    They come with scikit-learn (extra ``fastbn[train]``) and are those of UCI's "Optical recognition of handwritten
    digits". The split is always the same and keeps the share of each digit.
    """
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    pixels, labels = load(return_X_y=True)  # (N, 64), whole numbers from 0 to 16
    images = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    x_train, x_test, y_train, y_test = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    return Dataset(x_train, y_train, x_test, y_test)
