"""Running statistics: the formula, dtypes, strides, when they change and when they must not."""

import signal
from ctypes import CDLL
from functools import partial
from operator import methodcaller

import numpy as np
import pytest

import fastbn
from combinations import each_dtype, each_order
from fastbn import _check, _core, reference
from problems import (
    MEMORY_ORDERS,
    assert_same_bits,
    dtype_of,
    make_exact,
    make_hostile,
    make_parameters,
    make_random,
    ulp_distance,
)
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


def test_running_update_of_bfloat16_is_not_rounded_to_float32_before():
    """1 + 2**-8 lies between two of them, and float32 forgets what is above it."""
    bfloat16 = dtype_of("bfloat16")
    mean, var = np.zeros(1, bfloat16), np.ones(1, bfloat16)
    x = np.full((2, 1), 1 + 2**-8 + 2**-40)
    fastbn.batchnorm(x, running_mean=mean, running_var=var, training=True, momentum=1)
    assert float(mean[0]) == 1 + 2**-7


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("exponent", [-150, -155, -160])
def test_running_update_of_bfloat16_is_rounded_once_below_the_normal_numbers(exponent, sign):
    """5 * 2**-134 lies between two of them, and float32 has no digits for what is above it."""
    mean, var = np.zeros(1, dtype_of("bfloat16")), np.ones(1, dtype_of("bfloat16"))
    x = np.full((2, 1), sign * (5 * 2.0**-134 + 2.0**exponent))
    fastbn.batchnorm(x, running_mean=mean, running_var=var, training=True, momentum=1)
    assert float(mean[0]) == sign * 3 * 2.0**-133


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1e300, 0.0, -0.0])
def test_running_update_of_bfloat16_keeps_what_is_no_number(value):
    mean, var = np.zeros(1, dtype_of("bfloat16")), np.ones(1, dtype_of("bfloat16"))
    fastbn.batchnorm(np.full((2, 1), value), running_mean=mean, running_var=var, training=True, momentum=1)
    np.testing.assert_array_equal(mean.astype(np.float64), np.inf if value == 1e300 else value)


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
    np.testing.assert_array_equal(cache.rstd, 1 / np.sqrt((0.0 if training else var) + np.full(channels, 1e-5)))
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


# Batches that are not finite, and calls that do not end well ---------------------------------------------------------

GUARDS = _check.NAN_GUARDS


def not_finite(name, shape, dtype, order):
    return MEMORY_ORDERS[order](make_hostile(name, shape, 1, dtype, channel=1), 1)


@pytest.mark.parametrize("name", ["nan", "nan-first", "inf", "minus-inf-first"])
@each_order
@each_dtype
def test_running_guard_is_that_of_the_reference(dtype, order, name):
    x = not_finite(name, (6, 4, 31), dtype, order)
    for guard in GUARDS:
        results = []
        for module in (fastbn, reference):
            mean, var = np.full(4, 0.5), np.full(4, 2.0)
            options = {"running_mean": mean, "running_var": var, "training": True, "nan_guard": guard}
            error = None
            try:
                module.batchnorm(x, **options)
            except FloatingPointError as raised:
                error = raised
            results.append((mean, var, error))
        ours, theirs = results
        np.testing.assert_allclose(ours[:2], theirs[:2], rtol=1e-12)
        assert (ours[2] is None) == (theirs[2] is None) == (guard != "raise")
        changed = ours[0] != 0.5
        assert changed.any() == (guard == "propagate")
        assert np.isfinite(ours[1][[0, 2, 3]]).all()
    assert str(ours[2]) == (
        "x: expected finite statistics in every channel (nan_guard='raise'), got NaN or Inf in 1 of 4 channels: 1"
    )


def test_running_guard_sees_finite_values_whose_squares_are_not():
    x = np.array([[1e200, 1.0], [-1e200, 2.0]])
    mean, var = np.zeros(2), np.ones(2)
    fastbn.batchnorm(x, running_mean=mean, running_var=var, training=True, nan_guard="skip")
    assert mean.tolist() == [0, 0] and var.tolist() == [1, 1]


@pytest.mark.parametrize("in_place", [False, True], ids=["out", "in-place"])
@pytest.mark.parametrize("shape", [(6, 4, 31), (2, 5, 70, 70), (70, 4), (300, 130)], ids=str)
@each_order
@each_dtype
def test_running_guard_raises_before_anything_is_written(dtype, order, shape, in_place):
    x = not_finite("nan", shape, dtype, order)
    channels = shape[1]
    mean, var = np.full(channels, 0.5), np.full(channels, 2.0)
    out = x if in_place else fastbn.batchnorm(x)
    before = x.copy(), out.copy(), mean.copy(), var.copy()
    for threads in (1, 2, 5):
        with pytest.raises(fastbn.NonFiniteError, match=f"in 1 of {channels} channels: 1"):
            fastbn.batchnorm(
                x,
                running_mean=mean,
                running_var=var,
                training=True,
                nan_guard="raise",
                out=out,
                num_threads=threads,
            )
        for array, value in zip((x, out, mean, var), before, strict=True):
            assert_same_bits(array, value)


@pytest.mark.parametrize("shape", [(6, 4, 31), (70, 4), (2, 5, 70, 70)], ids=str)
@each_order
@each_dtype
def test_running_guard_changes_no_bit_of_a_finite_batch(dtype, order, shape):
    x = MEMORY_ORDERS[order](make_random(shape, 1, dtype), 1)
    results = []
    for guard in GUARDS:
        for out in (None, np.empty_like(x)):
            mean, var = np.zeros(shape[1], np.float32), np.ones(shape[1], np.float32)
            y = fastbn.batchnorm(x, running_mean=mean, running_var=var, training=True, nan_guard=guard, out=out)
            results.append((y, mean, var))
    assert (results[0][1] != 0).all()
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("guard", GUARDS)
def test_running_guard_is_for_running_statistics_only(guard):
    """Without an update there is nothing to guard: y has NaN, and there is no error."""
    x = not_finite("nan", (6, 4, 31), np.float32, "c-order")
    broken = {"running_mean": np.full(4, np.nan), "running_var": np.full(4, np.inf), "training": False}
    assert np.isnan(fastbn.batchnorm(x, nan_guard=guard)[:, 1]).all()
    assert np.isnan(fastbn.batchnorm(x, nan_guard=guard, out=np.zeros_like(x), **broken)).all()


def test_running_guard_names_the_first_channels_only():
    x = np.full((3, 40), np.nan)
    running = {"running_mean": np.zeros(40), "running_var": np.ones(40)}
    with pytest.raises(fastbn.NonFiniteError, match=r"in 40 of 40 channels: 0, 1, 2, 3, 4, 5, 6, 7, \.\.\.$"):
        fastbn.batchnorm(x, **running, training=True, nan_guard="raise")


@pytest.mark.parametrize("dtype", FLOATS)
def test_running_statistics_do_not_take_an_interrupted_batch(monkeypatch, dtype):
    """Ctrl-C while the kernels run: `raise` sets the signal, and no Python code runs until the core looks for it."""
    dtype, real = dtype_of(dtype), _core.forward
    mean, var = np.zeros(3, dtype), np.ones(3, dtype)
    layer = fastbn.BatchNorm1d(3, dtype=dtype)

    def interrupted(*arguments):
        calls = [partial(CDLL(None)["raise"], signal.SIGINT), partial(real, *arguments)]
        return list(map(methodcaller("__call__"), calls))[1]

    before = {name: array.tobytes() for name, array in layer.state_dict().items()}
    with monkeypatch.context() as patch:
        patch.setattr(_core, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fastbn.batchnorm(batch(), running_mean=mean, running_var=var, training=True, device="cpu")
        with pytest.raises(KeyboardInterrupt):
            layer(batch())
    assert (mean == 0).all() and (var == 1).all()
    assert {name: array.tobytes() for name, array in layer.state_dict().items()} == before
    layer(batch())
    assert layer.num_batches_tracked == 1 and (layer.running_mean != 0).all()


def test_running_statistics_are_whole_after_every_interrupt():
    """Ctrl-C at any time in a loop of calls: mean, variance and count are those of the same batches."""
    batches = [make_random((40, 3, 50), 1, np.float32, seed) for seed in range(2)]
    layer = fastbn.BatchNorm1d(3, momentum=1.0)  # the statistics are those of the last batch
    states = []
    for x in batches:
        layer(x)
        states.append((layer.running_mean.tobytes(), layer.running_var.tobytes()))
    usual = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for step in range(200):
            try:
                signal.setitimer(signal.ITIMER_REAL, 2e-4 + step * 1e-5)  # once
                while True:
                    layer(batches[int(layer.num_batches_tracked) % 2])
            except KeyboardInterrupt:
                pass
            last = states[(int(layer.num_batches_tracked) + 1) % 2]
            assert (layer.running_mean.tobytes(), layer.running_var.tobytes()) == last
    finally:
        signal.signal(signal.SIGALRM, usual)
