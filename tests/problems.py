"""Test data: awkward shapes, data with exactly known statistics, random data, hostile data, exact arithmetic.

Nothing here calls fastbn, so that a mistake in the library cannot hide in the data that tests it. Every generator
takes a seed and depends on nothing else. The rank and the channel axis are free: `shape` is the nominal shape, `axis`
the channel axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

# ---------------------------------------------------------------------------------------------------------------------
# Shapes (N, C, spatial...): one, primes, powers of two and their neighbours, many or few channels, tiny and large
# planes.

SHAPES: tuple[Shape, ...] = (
    (2, 1),
    (1, 1, 2),
    (3, 5),
    (64, 16),
    (33, 17),
    (257, 3),
    (5, 130),
    (4, 7, 1),
    (2, 3, 13),
    (1, 4, 31),
    (9, 2, 64, 1),
    (2, 8, 4, 4),
    (3, 5, 7, 11),
    (1, 3, 33, 65),
    (8, 13, 17, 19),
    (2, 70, 7, 7),
    (16, 1, 5, 5),
    (2, 3, 2, 3, 5),
    (1, 2, 3, 16, 17),
    (70, 3, 2, 3),  # short planes, which are columns: folded rows and a rest
    (520, 33, 2),  # the same: more than one block
    (1, 2, 128, 129),  # more than one block of a planar sum
    (4099, 3),  # more than one block of an interleaved sum
)

# Every tail length of a 16-lane kernel and of a second vector, in the innermost run.
TAIL_SHAPES: tuple[Shape, ...] = tuple((2, 3, inner) for inner in range(1, 67))


def shape_id(shape: Shape) -> str:
    """Readable test id: 2x3x5."""
    return "x".join(map(str, shape))


def channel_axis(layout: str) -> int:
    """Where a layout string has its channels."""
    return layout.index("C")


def to_axis(shape: Shape, axis: int) -> Shape:
    """Shape (N, C, spatial...) with the channels moved to `axis`; axis -1 gives (N, spatial..., C)."""
    rest = list(shape[:1] + shape[2:])
    rest.insert(axis % len(shape), shape[1])
    return tuple(rest)


def dtype_of(name: str) -> np.dtype[Any]:
    """The dtype of this NumPy name; bfloat16 needs ml_dtypes, which only the tests use."""
    try:
        return np.dtype(name)
    except TypeError:
        import pytest

        return np.dtype(getattr(pytest.importorskip("ml_dtypes"), name))


# How an array can lie in memory. Each takes a C-ordered array and returns an equal one, nominal shape unchanged.


def _channels_last(x: Array, axis: int) -> Array:
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, axis, -1)), -1, axis)


def _padded(x: Array, axis: int) -> Array:
    """Every axis is a slice of a longer one: no two axes merge."""
    room = np.zeros([extent + 2 for extent in x.shape], x.dtype)
    view = room[tuple(slice(1, extent + 1) for extent in x.shape)]
    view[...] = x
    return view


def _every_other(x: Array, axis: int) -> Array:
    """The channels are every other one of a longer axis."""
    shape = list(x.shape)
    shape[axis] *= 2
    room = np.zeros(shape, x.dtype)
    view = room[(slice(None),) * axis + (slice(None, None, 2),)]
    view[...] = x
    return view


def _every_other_value(x: Array, axis: int) -> Array:
    """The values of the last axis are every other one of a longer axis: a run is no row of adjacent values."""
    room = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    view = room[..., ::2]
    view[...] = x
    return view


def _reversed(x: Array, axis: int) -> Array:
    """The first axis runs backwards in memory."""
    return x[::-1].copy()[::-1]


def _unaligned(x: Array, axis: int) -> Array:
    buffer = np.zeros(x.nbytes + 1, np.uint8)
    view = buffer[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def _swapped(x: Array, axis: int) -> Array:
    return x.astype(x.dtype.newbyteorder("S"))


MEMORY_ORDERS: dict[str, Callable[[Array, int], Array]] = {
    "c-order": lambda x, axis: x.copy(order="C"),
    "fortran": lambda x, axis: x.copy(order="F"),
    "channels-last": _channels_last,
    "channels-last-crop": lambda x, axis: np.moveaxis(_padded(np.moveaxis(x, axis, -1), -1), -1, axis),
    "padded": _padded,
    "every-other-channel": _every_other,
    "every-other-value": _every_other_value,
    "reversed": _reversed,
    "unaligned": _unaligned,
    "byte-swapped": _swapped,
}

# ---------------------------------------------------------------------------------------------------------------------
# Values


class Exact(NamedTuple):
    """Data whose statistics are known without rounding; `var` is `m2 / count`, rounded once."""

    x: Array
    count: int
    mean: npt.NDArray[np.float64]
    m2: npt.NDArray[np.float64]

    @property
    def var(self) -> npt.NDArray[np.float64]:
        return self.m2 / self.count


def make_exact(shape: Shape, axis: int, dtype: npt.DTypeLike, seed: int = 0, offset: float = 0.0) -> Exact:
    """Data whose mean and sum of squared deviations are exact in any order of summation.

    Values come in pairs mean + d and mean - d (and one mean itself if the count is odd), shuffled. The mean is a
    multiple of 1/2 of at most 4, d a multiple of 1/4 of at most 2: five bits, which every supported dtype has. Sums
    and sums of squares of such values need 8 bits and those of the count: they are exact in float64 for any array
    that fits in memory, and in float32 up to 2^16 values. (The idea is oneDNN's, tests/benchdnn/bnorm.) `offset`, a
    multiple of 1/2, is added to every value; the caller sees to it that dtype can hold the sum.
    """
    rng = np.random.default_rng(seed)
    channels = shape[axis]
    count = math.prod(shape) // channels if channels else 0
    mean = rng.integers(-8, 9, channels) / 2 + offset
    d = rng.integers(1, 9, (channels, count // 2)) / 4
    deviations = np.concatenate([d, -d, np.zeros((channels, count % 2))], axis=1)
    deviations = rng.permuted(deviations, axis=1)
    rest = list(shape)
    del rest[axis]
    exact = np.moveaxis((mean[:, None] + deviations).reshape((channels, *rest)), 0, axis)
    x = np.ascontiguousarray(exact).astype(dtype)
    assert np.array_equal(x.astype(np.float64), exact), "offset needs more bits than dtype has"
    return Exact(x, count, mean, (deviations * deviations).sum(axis=1))


def make_random(
    shape: Shape, axis: int, dtype: npt.DTypeLike, seed: int = 0, offset: float = 0.0, scale: float = 1.0
) -> Array:
    """Normal values; each channel has its own mean (within two scales of `offset`) and its own scale (1/2 to 2)."""
    rng = np.random.default_rng(seed)
    channels = shape[axis]
    along = [1] * len(shape)
    along[axis] = channels
    means = offset + scale * rng.uniform(-2, 2, channels).reshape(along)
    scales = scale * 2.0 ** rng.uniform(-1, 1, channels).reshape(along)
    return (rng.standard_normal(shape) * scales + means).astype(dtype)


def make_parameters(channels: int, dtype: npt.DTypeLike = np.float32, seed: int = 0) -> tuple[Array, Array]:
    """gamma (both signs, one zero if there is room) and beta."""
    rng = np.random.default_rng(seed)
    gamma = rng.uniform(0.25, 2.0, channels) * rng.choice([-1.0, 1.0], channels)
    if channels > 2:
        gamma[channels // 2] = 0.0
    return gamma.astype(dtype), rng.uniform(-1, 1, channels).astype(dtype)


def _first(channel: Array, value: float) -> Array:
    channel[0] = value
    return channel


def _middle(channel: Array, value: float) -> Array:
    channel[channel.size // 2] = value
    return channel


# Each entry makes one channel out of standard normal values z; `info` is the finfo of the dtype: a
# narrow dtype gets the most that it can hold.
HOSTILE: dict[str, Callable[[Array, Any], Array]] = {
    "offset-1e6": lambda z, info: z + min(1e6, float(info.max) / 16),
    "offset-minus-1e6": lambda z, info: z - min(1e6, float(info.max) / 16),
    "constant": lambda z, info: np.full_like(z, 0.1),
    "constant-large": lambda z, info: np.full_like(z, min(1e8, float(info.max) / 2)),
    "zeros": lambda z, info: np.zeros_like(z),
    "negative-zeros": lambda z, info: np.copysign(np.zeros_like(z), -1.0),
    "nan": lambda z, info: _middle(z, np.nan),
    "nan-first": lambda z, info: _first(z, np.nan),
    "inf": lambda z, info: _middle(z, np.inf),
    "minus-inf-first": lambda z, info: _first(z, -np.inf),
    "outlier-first": lambda z, info: _first(z, min(1e6, float(info.max) / 16)),
    "huge-1e37": lambda z, info: np.clip(z, -1, 1) * min(1e37, float(info.max) / 4),
    "denormal": lambda z, info: np.round(np.clip(z, -4, 4) * 16) * float(info.smallest_subnormal),
    "tiny-variance": lambda z, info: 1.0 + np.round(np.clip(z, -3, 3)) * float(info.eps),
}


def finfo(dtype: npt.DTypeLike) -> Any:
    """numpy.finfo, also for bfloat16."""
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        return np.finfo(dtype)
    import ml_dtypes

    return ml_dtypes.finfo(dtype)


def make_hostile(
    name: str, shape: Shape, axis: int, dtype: npt.DTypeLike, seed: int = 0, channel: int | None = None
) -> Array:
    """Random data with `HOSTILE[name]` in one channel (the others must not notice), or in all if it is None."""
    x = make_random(shape, axis, np.float64, seed)
    rng = np.random.default_rng(seed + 1)
    rows = np.moveaxis(x, axis, 0)
    for index in range(shape[axis]) if channel is None else (channel,):
        z = rng.standard_normal(rows[index].size)
        rows[index] = HOSTILE[name](z, finfo(dtype)).reshape(rows[index].shape)
    return x.astype(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Exact arithmetic and distances


class ExactStatistics(NamedTuple):
    """Of one channel, without rounding."""

    count: int
    mean: Fraction
    m2: Fraction

    @property
    def var(self) -> Fraction:
        return self.m2 / self.count

    @property
    def std(self) -> float:
        return math.sqrt(self.var)


def exact_statistics(x: Array, axis: int) -> list[ExactStatistics]:
    """Mean and sum of squared deviations of every channel in rational arithmetic; finite values only."""

    def channels() -> Iterator[ExactStatistics]:
        for row in np.moveaxis(x, axis, 0):
            total = squares = Fraction(0)
            values = row.ravel()
            for start in range(0, values.size, 1 << 20):  # a Python integer for each value needs memory
                # A float is an integer times a power of two: with one common power the sums are sums of integers.
                fraction, exponent = np.frexp(values[start : start + (1 << 20)].astype(np.float64))
                lowest = int(exponent.min()) - 53
                integers = [
                    int(f) << (int(e) - 53 - lowest)
                    for f, e in zip(np.ldexp(fraction, 53).tolist(), exponent.tolist(), strict=True)
                ]
                unit = Fraction(2) ** lowest
                total += sum(integers) * unit
                squares += sum(value * value for value in integers) * unit * unit
            yield ExactStatistics(values.size, total / values.size, squares - total * total / values.size)

    return list(channels())


def ulp(value: float, dtype: npt.DTypeLike) -> float:
    """The distance from |value| to the next larger number of dtype."""
    info = finfo(dtype)
    magnitude = max(abs(float(value)), float(info.smallest_normal))
    return math.ldexp(float(info.eps), math.frexp(magnitude)[1] - 1)


def ulp_error(value: float, exact: Fraction | float, dtype: npt.DTypeLike, scale: float | None = None) -> float:
    """|value - exact| in ulp of dtype at `scale` (at the exact value where None)."""
    error = abs(Fraction(float(value)) - Fraction(exact))
    return float(error / Fraction(ulp(float(exact) if scale is None else scale, dtype)))


def _ordered(a: Array) -> npt.NDArray[np.int64]:
    """Integers in the order of the floats, so that neighbours differ by one; both zeros are 0."""
    a = np.ascontiguousarray(a)
    bits = a.view(f"i{a.dtype.itemsize}").astype(np.int64)
    lowest = -(1 << (8 * a.dtype.itemsize - 1))
    return np.where(bits < 0, lowest - bits, bits)


def ulp_distance(a: Array, b: Array) -> npt.NDArray[np.uint64]:
    """How many numbers of their common dtype apart two arrays are, element by element; two NaN are equal."""
    assert a.dtype == b.dtype and a.shape == b.shape, (a.dtype, b.dtype, a.shape, b.shape)
    a, b = np.atleast_1d(a), np.atleast_1d(b)
    nan_a, nan_b = a != a, b != b
    first, second = _ordered(a), _ordered(b)
    # In two's complement the difference of the larger and the smaller is right modulo 2^64, which unsigned integers
    # show.
    distance = np.maximum(first, second).astype(np.uint64) - np.minimum(first, second).astype(np.uint64)
    distance[nan_a & nan_b] = 0
    distance[nan_a ^ nan_b] = np.iinfo(np.uint64).max
    return distance


def assert_same_bits(actual: Array, expected: Array) -> None:
    """Equal bit by bit, except that every NaN equals every NaN (payloads are not promised)."""
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    unsigned = f"u{actual.dtype.itemsize}"
    a, b = np.ascontiguousarray(actual), np.ascontiguousarray(expected)
    different = (a.view(unsigned) != b.view(unsigned)) & ~((a != a) & (b != b))
    if different.any():
        where = tuple(int(i) for i in np.argwhere(np.atleast_1d(different))[0])
        a, b = np.atleast_1d(a), np.atleast_1d(b)
        raise AssertionError(f"{int(different.sum())} values differ, first at {where}: {a[where]!r} != {b[where]!r}")
