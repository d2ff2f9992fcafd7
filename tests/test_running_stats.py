"""Running statistics: the formula, dtypes, strides, when they change and when they must not."""

import numpy as np
import pytest

import fastbn
from fastbn import reference
from problems import dtype_of, make_exact, make_parameters, make_random, ulp_distance
from tolerances import running_ulp

FLOATS = ("float16", "float32", "float64", "longdouble", "bfloat16")


def batch(seed=0):
    return make_random((8, 3, 5), 1, np.float32, seed)


@pytest.mark.parametrize("unbiased", [True, False], ids=["unbiased", "population"])
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 1.0], ids="momentum-{:g}".format)
@pytest.mark.parametrize("dtype", FLOATS)
def test_running_update_is_computed_in_float64_and_rounded_once(dtype, momentum, unbiased):
    # Exact data: the statistics of the batch are known to the last bit.
    exact = make_exact((8, 3, 8), 1, np.float32)
    dtype = dtype_of(dtype)
    mean, var = np.array([1.0, -2.0, 0.5]).astype(dtype), np.array([1.0, 4.0, 0.25]).astype(dtype)
    batch_var = exact.m2 / (exact.count - 1) if unbiased else exact.var
    expected = [
        ((1 - momentum) * old.astype(np.float64) + momentum * new).astype(dtype)
        for old, new in ((mean, exact.mean), (var, batch_var))
    ]
    fastbn.batchnorm(exact.x, running_mean=mean, running_var=var, training=True, momentum=momentum, unbiased=unbiased)
    for actual, wanted in zip((mean, var), expected, strict=True):
        assert actual.dtype == dtype
        if dtype.itemsize <= 8:
            assert ulp_distance(actual, wanted).max() <= running_ulp()
        else:
            np.testing.assert_array_equal(actual, wanted)


def test_running_update_agrees_with_reference_over_batches():
    mean, var = np.zeros(3), np.ones(3)
    wanted_mean, wanted_var = np.zeros(3), np.ones(3)
    for seed in range(5):
        fastbn.batchnorm(batch(seed), running_mean=mean, running_var=var, training=True)
        reference.batchnorm(batch(seed), running_mean=wanted_mean, running_var=wanted_var, training=True)
    np.testing.assert_allclose(mean, wanted_mean, rtol=1e-12)
    np.testing.assert_allclose(var, wanted_var, rtol=1e-12)


def test_running_update_writes_through_strides_and_only_there():
    storage = np.full((3, 4), 7.0, np.float32)
    mean, var = storage[:, 1], storage[::-1, 3]
    wanted_mean, wanted_var = mean.copy(), var.copy()
    fastbn.batchnorm(batch(), running_mean=mean, running_var=var, training=True)
    fastbn.batchnorm(batch(), running_mean=wanted_mean, running_var=wanted_var, training=True)
    np.testing.assert_array_equal(mean, wanted_mean)
    np.testing.assert_array_equal(var, wanted_var)
    assert (storage[:, [0, 2]] == 7).all()
    assert (wanted_mean != 7).all()


def test_running_statistics_are_used_in_inference_and_stay():
    mean, var = np.array([1.0, 2.0, 3.0]), np.array([4.0, 1.0, 0.25])
    mean.flags.writeable = var.flags.writeable = False
    x = np.ones((2, 3), np.float64)
    y = fastbn.batchnorm(x, running_mean=mean, running_var=var, training=False, eps=0.0)
    assert y.tolist() == [[0.0, -1.0, -4.0]] * 2


def test_running_inference_accepts_array_likes():
    y = fastbn.batchnorm([[1.0], [2.0]], running_mean=[1.0], running_var=[1.0], training=False, eps=0.0)
    assert y.tolist() == [[0.0], [1.0]]


def test_running_inference_of_one_sample_equals_its_row_in_a_batch():
    x = batch()
    gamma, beta = make_parameters(3)
    options = {"running_mean": np.zeros(3), "running_var": np.ones(3), "training": False}
    whole = fastbn.batchnorm(x, gamma, beta, **options)
    for row in range(len(x)):
        np.testing.assert_array_equal(fastbn.batchnorm(x[row : row + 1], gamma, beta, **options)[0], whole[row])


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("shape", [(0, 3, 5), (4, 3, 0), (4, 0, 5), (0, 0)], ids=str)
def test_running_statistics_do_not_change_with_an_empty_batch(shape, training):
    channels = shape[1]
    mean, var = np.full(channels, 0.5), np.full(channels, 2.0)
    x, gamma = np.zeros(shape, np.float32), np.ones(channels, np.float32)
    y, cache = fastbn.batchnorm_forward(
        x, gamma, gamma, running_mean=mean, running_var=var, training=training, residual=x, activation="relu"
    )
    assert y.shape == shape and y.dtype == np.float32
    assert (mean == 0.5).all() and (var == 2.0).all()
    gradients = fastbn.batchnorm_backward(x, cache)
    dx, dgamma, dbeta = gradients
    assert dx.shape == gradients.dresidual.shape == shape
    assert dgamma.tolist() == dbeta.tolist() == [0.0] * channels
    assert dgamma.dtype == np.float32


def test_running_statistics_take_nan_in_their_channel_only():
    x = batch()
    x[3, 1, 2] = np.nan
    mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
    y = fastbn.batchnorm(x, running_mean=mean, running_var=var, training=True)
    for values in (mean, var, y.sum(axis=(0, 2))):
        assert np.isnan(values).tolist() == [False, True, False]


def test_running_variance_too_large_for_its_dtype_becomes_inf():
    x = np.array([[-3e4], [3e4]], np.float32) * 2
    mean, var = np.zeros(1, np.float16), np.ones(1, np.float16)
    fastbn.batchnorm(x, running_mean=mean, running_var=var, training=True)
    assert (mean[0], var[0]) == (0.0, np.inf)


def test_running_update_does_not_depend_on_threads():
    x = make_random((64, 3, 40, 40), 1, np.float32)
    results = []
    for threads in (1, 2, 3, 5):
        mean, var = np.zeros(3), np.ones(3)
        fastbn.batchnorm(x, running_mean=mean, running_var=var, training=True, num_threads=threads)
        results.append((mean.tobytes(), var.tobytes()))
    assert len(set(results)) == 1
