"""More than 2^31 elements, and addresses more than 2^32 bytes apart, without the memory that they would need."""

import numpy as np
import pytest

import fastbn


def test_statistics_of_more_than_two_to_the_31_values():
    """A stride of 0 repeats one value: its statistics are known, and every index up to the last is used."""
    count = 2**31 + 7
    stats = fastbn.batchnorm_stats(np.broadcast_to(np.float32(0.1), (count, 1)))
    assert stats.count == count
    assert stats.mean[0] == np.float32(0.1) and stats.m2[0] == 0


def test_statistics_of_more_than_two_to_the_31_values_in_rows():
    """The same for interleaved channels: one row of 64 channels, over and over."""
    rows = 2**25 + 7
    row = np.arange(64, dtype="f4") / 7
    stats = fastbn.batchnorm_stats(np.broadcast_to(row, (rows, 64)))
    assert stats.count == rows
    np.testing.assert_array_equal(stats.mean, row)
    assert not stats.m2.any()


@pytest.mark.parametrize("shape", [(3, 5, 70), (3, 70)], ids=["planar", "interleaved"])
def test_offsets_beyond_four_gigabytes(shape):
    """Rows 2.5 GiB apart in a sparse array: only the pages that hold values exist."""
    apart = 5 << 29
    room = np.empty(apart * 2 + (1 << 20), np.uint8)

    def sparse(start):
        dense = np.empty(shape[1:], "f4").strides
        return np.lib.stride_tricks.as_strided(room[start : start + 8192].view("f4"), shape, (apart, *dense))

    values = np.random.default_rng(0).standard_normal(shape).astype("f4")
    x, out = sparse(0), sparse(1 << 19)
    x[...] = values
    y, cache = fastbn.batchnorm_forward(x)
    expected, other = fastbn.batchnorm_forward(values)
    assert np.array_equal(y, expected)
    assert np.array_equal(fastbn.batchnorm(x, out=out), expected)
    assert fastbn.batchnorm_backward(values, cache, out=out).dx is out
    assert np.array_equal(out, fastbn.batchnorm_backward(values, other).dx)
