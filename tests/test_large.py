"""More than 2^31 elements, and addresses more than 2^32 bytes apart, without the memory that they would need."""

import numpy as np
import pytest

import fastbn

# Mean 2, squared deviations 4, 1, 0 and 9: a loop that ends early changes the sums.
PATTERN = np.array([0, 1, 2, 5], "f4")


def test_statistics_of_more_than_two_to_the_31_values():
    """A stride of 0 repeats one run, over and over."""
    run = np.tile(PATTERN, 1 << 12)
    stats = fastbn.batchnorm_stats(np.broadcast_to(run, ((1 << 17) + 1, 1, run.size)))
    assert stats.count == ((1 << 17) + 1) * run.size > 2**31
    assert stats.mean[0] == 2 and stats.m2[0] == stats.count / 4 * 14


def test_statistics_of_more_than_two_to_the_31_values_in_rows():
    """The same for 64 interleaved channels, as rows that overlap: channel c has the pattern shifted by c // 2."""
    rows = (1 << 25) + 4
    flat = np.tile(np.repeat(PATTERN, 2), rows // 4 + 16)
    stats = fastbn.batchnorm_stats(np.lib.stride_tricks.as_strided(flat, (rows, 64), (8, 4)))
    assert stats.count == rows and rows * 64 > 2**31
    assert np.all(stats.mean == 2) and np.all(stats.m2 == rows / 4 * 14)


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
