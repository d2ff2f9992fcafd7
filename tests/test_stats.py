"""batchnorm_stats and Stats: exact data, rational arithmetic, merging, limits."""

import dataclasses

import numpy as np
import pytest

import fastbn
from problems import (
    SHAPES,
    dtype_of,
    exact_statistics,
    finfo,
    make_exact,
    make_hostile,
    make_random,
    shape_id,
    ulp_distance,
)
from problems import ulp_error as error_in_ulp
from tolerances import EXACT_ULP_F32, STATISTICS_RELATIVE_F64, STATISTICS_ULP, U64, exact_ulp_f64

DTYPES = fastbn.runtime.dtypes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [1, -1], ids=["channels-first", "channels-last"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_stats_are_exact_on_exact_data(shape, axis, dtype):
    if axis == -1:
        shape = (shape[0], *shape[2:], shape[1])
    exact = make_exact(shape, axis, dtype_of(dtype))
    stats = fastbn.batchnorm_stats(exact.x, axis=axis)
    assert stats.count == exact.count
    for actual, expected in ((stats.mean, exact.mean), (stats.var(), exact.var)):
        single = ulp_distance(actual.astype(np.float32), expected.astype(np.float32))
        assert single.max() <= EXACT_ULP_F32
        # An exact mean of 0 has no ulp of its own: differences count in those of the data.
        assert np.abs(actual - expected).max() <= exact_ulp_f64(exact.count) * np.spacing(np.abs(exact.x).max() ** 2.0)


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e6], ids="offset{:g}".format)
@pytest.mark.parametrize("dtype", DTYPES)
def test_stats_keep_the_promised_digits(dtype, offset):
    largest = float(finfo(dtype_of(dtype)).max) / 16  # float16 ends at 65504
    x = make_random((37, 3, 50), 1, dtype_of(dtype), offset=float(np.clip(offset, -largest, largest)))
    stats = fastbn.batchnorm_stats(x)
    for channel, exact in enumerate(exact_statistics(x, 1)):
        size = max(abs(float(exact.mean)), exact.std)
        mean, var = float(stats.mean[channel]), float(stats.var()[channel])
        if x.dtype == np.float64:
            assert abs(mean - float(exact.mean)) <= STATISTICS_RELATIVE_F64 * size
            assert abs(var - float(exact.var)) <= STATISTICS_RELATIVE_F64 * float(exact.var)
        else:
            assert error_in_ulp(np.float32(mean), exact.mean, np.float32, size) <= STATISTICS_ULP
            assert error_in_ulp(np.float32(var), exact.var, np.float32) <= STATISTICS_ULP


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["constant", "constant-large", "zeros", "negative-zeros"])
def test_stats_of_a_constant_have_variance_zero(name, dtype):
    x = make_hostile(name, (9, 3, 70), 1, dtype_of(dtype))
    stats = fastbn.batchnorm_stats(x)
    assert stats.m2.tolist() == [0.0, 0.0, 0.0]
    np.testing.assert_array_equal(stats.mean, x[0, :, 0].astype(np.float64))


@pytest.mark.parametrize("name", ["nan", "nan-first", "inf", "minus-inf-first"])
def test_stats_keep_nan_and_inf_in_their_channel(name):
    x = make_hostile(name, (8, 5, 9), 1, np.float32, channel=2)
    clean = make_random((8, 5, 9), 1, np.float64).astype(np.float32)
    others = [0, 1, 3, 4]
    stats, expected = fastbn.batchnorm_stats(x), fastbn.batchnorm_stats(clean)
    assert np.isnan(stats.m2[2])
    np.testing.assert_array_equal(stats.mean[others], expected.mean[others])
    np.testing.assert_array_equal(stats.m2[others], expected.m2[others])


@pytest.mark.parametrize("parts", [1, 2, 7, 64], ids="parts-{}".format)
def test_stats_merge_of_parts_is_the_whole(parts):
    x = make_random((64, 5, 3), 1, np.float64, offset=100.0)
    whole = fastbn.batchnorm_stats(x)
    merged = fastbn.batchnorm_stats(x[:0])
    for part in np.array_split(x, parts):
        merged = merged.merge(fastbn.batchnorm_stats(part))
    assert merged.count == whole.count == 192
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=4 * 64 * U64)
    np.testing.assert_allclose(merged.var(), whole.var(), rtol=4 * 64 * 100 * U64)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_stats_merge_of_a_mean_that_is_not_finite_is_the_same_from_either_side(value):
    a, b = fastbn.batchnorm_stats([[value], [1.0]]), fastbn.batchnorm_stats([[1.0], [1.0]])
    for merged in (a.merge(b), b.merge(a)):
        np.testing.assert_array_equal(merged.mean, [value])
        assert np.isnan(merged.m2).all()


def test_stats_merge_with_nothing_is_the_same_from_either_side():
    some = fastbn.batchnorm_stats(make_random((4, 2), 1, np.float32))
    none = fastbn.batchnorm_stats(np.zeros((0, 2), np.float32))
    assert (none.count, none.mean.tolist(), none.m2.tolist()) == (0, [0.0, 0.0], [0.0, 0.0])
    for merged in (some.merge(none), none.merge(some)):
        assert merged.count == 4
        np.testing.assert_array_equal(merged.mean, some.mean)
        np.testing.assert_array_equal(merged.m2, some.m2)
    assert none.merge(none).count == 0


def test_stats_merge_exact_data_exactly():
    exact = make_exact((64, 3), 1, np.float64)
    merged = fastbn.batchnorm_stats(exact.x[:32]).merge(fastbn.batchnorm_stats(exact.x[32:]))
    np.testing.assert_array_equal(merged.mean, exact.mean)
    np.testing.assert_array_equal(merged.m2, exact.m2)


def test_stats_variance_is_population_or_unbiased():
    stats = fastbn.batchnorm_stats([[1.0], [2.0], [6.0]])
    assert stats.var().tolist() == [14 / 3]
    assert stats.var(unbiased=True).tolist() == [7.0]


def test_stats_of_one_value_have_no_unbiased_variance():
    stats = fastbn.batchnorm_stats([[5.0, 6.0]])
    assert (stats.count, stats.mean.tolist(), stats.var().tolist()) == (1, [5.0, 6.0], [0.0, 0.0])
    with pytest.raises(fastbn.SingleValueError, match="at least 2 per channel, got 1"):
        stats.var(unbiased=True)
    with pytest.raises(fastbn.SingleValueError, match="at least 1 per channel, got 0"):
        fastbn.batchnorm_stats(np.zeros((0, 2))).var()


def test_stats_are_copies_of_what_they_are_made_from():
    mean, m2 = np.zeros(3), np.ones(3)
    stats = fastbn.Stats(4, mean, m2)
    mean += 1
    m2 += 1
    assert np.all(stats.mean == 0) and np.all(stats.m2 == 1)


def test_stats_cannot_be_changed():
    stats = fastbn.batchnorm_stats([[5.0, 6.0]])
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.count = 3


def test_stats_without_channels_are_empty():
    stats = fastbn.batchnorm_stats(np.zeros((3, 0), np.float32))
    assert (stats.count, stats.mean.shape) == (0, (0,))
