"""Images to train on: the digits of scikit-learn, files in the format of MNIST, those of CIFAR-10."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastbn.nn.layers import Array, channel_axis

# Where Debian and Ubuntu put their package dataset-fashion-mnist.
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


class DataError(ValueError):
    """A file that is missing, damaged, or no images."""


class Dataset(NamedTuple):
    """Images of shape (N, channels, height, width), float32 in [0, 1], with labels of shape (N,), in two parts; or of
    shape (N, height, width, channels) if the layout is "NHWC"."""

    x_train: Array
    y_train: Array
    x_test: Array
    y_test: Array
    layout: str = "NCHW"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(channels, height, width): what the networks of `fastbn.nn.models` take."""
        shape = self.x_train.shape[1:]
        return shape if channel_axis(self.layout) == 1 else (shape[-1], *shape[:-1])

    @property
    def classes(self) -> int:
        return int(self.y_train.max()) + 1

    def in_layout(self, layout: str) -> Dataset:
        """What to train a model of this layout on."""
        axis = channel_axis(layout)
        if layout == self.layout:
            return self
        x_train, x_test = (np.ascontiguousarray(np.moveaxis(x, -axis, axis)) for x in (self.x_train, self.x_test))
        return self._replace(x_train=x_train, x_test=x_test, layout=layout)


def load(name: str | os.PathLike[str] = "digits") -> Dataset:
    """The data set called "digits" or "fashion-mnist", or what is in a folder: files of MNIST's format or of CIFAR-10.

    Raises
    ------
    DataError
        In one line, with the file and the reason.
    """
    if name == "digits":
        return load_digits()
    folder = FASHION_MNIST if name == "fashion-mnist" else Path(name)
    if not folder.is_dir():
        if name == "fashion-mnist":
            raise DataError(f"{folder}: no such folder (Debian, Ubuntu: apt install dataset-fashion-mnist)")
        raise DataError(f"{folder}: no such folder, and neither 'digits' nor 'fashion-mnist'")
    return load_cifar10(folder) if (folder / "test_batch.bin").exists() else load_idx(folder)


def load_digits() -> Dataset:
    """1,797 handwritten digits of 8 x 8 pixels; 360 of them are for testing.

    They come with scikit-learn (extra ``fastbn[train]``) and are those of UCI's "Optical recognition of handwritten
    digits". The split is always the same and keeps the share of each digit.
    """
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    pixels, labels = load(return_X_y=True)  # (N, 64), whole numbers from 0 to 16
    images = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    x_train, x_test, y_train, y_test = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    return Dataset(x_train, y_train, x_test, y_test)


def load_idx(folder: str | os.PathLike[str], classes: int = 10) -> Dataset:
    """Gray images and labels in the four files of MNIST, ``train-images-idx3-ubyte`` and so on, plain or as ``.gz``.

    The format: http://yann.lecun.com/exdb/mnist. Labels must be below `classes`.
    """
    parts = []
    for part in ("train", "t10k"):
        images = read_idx(Path(folder, f"{part}-images-idx3-ubyte"), 3)
        labels = read_idx(Path(folder, f"{part}-labels-idx1-ubyte"), 1)
        if len(images) != len(labels):
            raise DataError(f"{folder}: {len(images)} images but {len(labels)} labels ({part})")
        parts += [scaled(images[:, None]), checked(Path(folder, f"{part}-labels-idx1-ubyte"), labels, classes)]
    x_train, y_train, x_test, y_test = parts
    if x_train.shape[1:] != x_test.shape[1:]:
        raise DataError(f"{folder}: images of {x_train.shape[2:]} pixels to train on, of {x_test.shape[2:]} to test")
    return Dataset(x_train, y_train, x_test, y_test)


def load_cifar10(folder: str | os.PathLike[str]) -> Dataset:
    """60,000 colour images of 32 x 32 pixels, in the binary version of CIFAR-10: ``data_batch_1.bin`` and so on.

    The format: https://www.cs.toronto.edu/~kriz/cifar.html. A record is the label and the red, green and blue plane.
    """
    parts: list[Array] = []
    for names in ([f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]):
        images, labels = [], []
        for path in (Path(folder, name) for name in names):
            content = read_bytes(path)
            if not content or len(content) % 3073:
                raise DataError(f"{path}: expected records of 3073 bytes, got {len(content)} bytes")
            records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
            labels.append(checked(path, records[:, 0], 10))
            images.append(records[:, 1:].reshape(-1, 3, 32, 32))
        parts += [scaled(np.concatenate(images)), np.concatenate(labels)]
    x_train, y_train, x_test, y_test = parts
    return Dataset(x_train, y_train, x_test, y_test)


def read_bytes(path: Path) -> bytes:
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                return file.read()
        return path.read_bytes()
    except EOFError as error:
        raise DataError(f"{path}: truncated") from error
    except (OSError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def read_idx(path: Path, dimensions: int) -> Array:
    """The bytes in an IDX file, in as many dimensions; the file may be there as ``.gz`` instead."""
    packed = path.with_name(path.name + ".gz")
    path = packed if packed.exists() and not path.exists() else path
    content = read_bytes(path)
    header = 4 + 4 * dimensions
    magic, expected = content[:4], bytes([0, 0, 8, dimensions])  # 8: unsigned bytes
    if magic != expected:
        raise DataError(f"{path}: expected magic number 0x{expected.hex()}, got 0x{magic.hex()}")
    if len(content) < header:
        raise DataError(f"{path}: truncated in its header")
    shape = tuple(int(size) for size in np.frombuffer(content[4:header], ">u4"))
    size = int(np.prod(shape, dtype=object))
    if len(content) != header + size:
        problem = "truncated" if len(content) < header + size else "too long"
        raise DataError(f"{path}: {problem}: shape {shape} needs {header + size} bytes, got {len(content)}")
    if not size:
        raise DataError(f"{path}: empty, shape {shape}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def scaled(pixels: Array) -> Array:
    return pixels.astype(np.float32) / np.float32(255)


def checked(path: Path, labels: Array, classes: int) -> Array:
    if labels.max() >= classes:
        place = int(np.argmax(labels >= classes))
        raise DataError(f"{path}: expected labels from 0 to {classes - 1}, got {labels[place]} for image {place}")
    return labels.astype(np.int64)


def batches(x: Array, batch_size: int) -> list[Array]:
    """x in parts of nearly equal size, none larger than `batch_size`. If that is 2, one may have 3 images: one alone
    could have no variance."""
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    parts = len(x) // 2 if batch_size == 2 else -(-len(x) // batch_size)
    return np.array_split(x, max(1, parts))


def augment(
    images: Array, rng: np.random.Generator, *, shift: int = 0, flip: bool = False, layout: str = "NCHW"
) -> Array:
    """Each image moved by up to `shift` pixels in each direction, zeros coming in, and mirrored or not, at random."""
    planar = np.moveaxis(images, channel_axis(layout), 1)
    N, _, H, W = planar.shape
    padded = np.pad(planar, ((0, 0), (0, 0), (shift, shift), (shift, shift)))
    places = np.lib.stride_tricks.sliding_window_view(padded, (H, W), axis=(2, 3))  # (N, C, 2s + 1, 2s + 1, H, W)
    down, right = rng.integers(0, 2 * shift + 1, (2, N))
    moved = places[np.arange(N), :, down, right]
    if flip:
        mirrored = rng.random(N) < 0.5
        moved[mirrored] = moved[mirrored, :, :, ::-1]
    return moved if layout == "NCHW" else np.ascontiguousarray(moved.transpose(0, 2, 3, 1))
