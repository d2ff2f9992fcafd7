"""`out`, in place and aliases: same numbers as without, the buffer itself is returned, inputs stay as they are."""

import numpy as np
import pytest

import fastbn
from problems import MEMORY_ORDERS, assert_same_bits, make_parameters, make_random

SHAPE = (3, 4, 5, 6)
ORDERS = ["c-order", "channels-last", "reversed", "every-other-channel"]


@pytest.fixture(params=ORDERS)
def arrays(request):
    arrange = MEMORY_ORDERS[request.param]
    x, residual, dy = (arrange(make_random(SHAPE, 1, np.float32, seed), 1) for seed in (1, 2, 3))
    return x, residual, dy


GAMMA, BETA = make_parameters(4)


@pytest.mark.parametrize("activation", fastbn.runtime.activations())
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_out_gets_the_result_and_is_returned(arrays, with_residual, activation):
    x, residual, _dy = arrays
    options = {"activation": activation, "residual": residual if with_residual else None}
    expected = fastbn.batchnorm(x, GAMMA, BETA, **options)
    out = np.full_like(x, np.nan)
    assert fastbn.batchnorm(x, GAMMA, BETA, out=out, **options) is out
    assert_same_bits(out, expected)
    other = np.full_like(x, np.nan)
    y, _cache = fastbn.batchnorm_forward(x, GAMMA, BETA, out=other, **options)
    assert y is other
    assert_same_bits(other, expected)


def test_out_may_be_x(arrays):
    x, residual, _dy = arrays
    expected = fastbn.batchnorm(x, GAMMA, BETA, residual=residual, activation="relu")
    buffer = x.copy(order="K")
    assert fastbn.batchnorm(buffer, GAMMA, BETA, residual=residual, activation="relu", out=buffer) is buffer
    assert_same_bits(buffer, expected)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_out_may_be_the_only_array_with_strides(with_residual, axis):
    x, residual, dy = (make_random((3, 4, 5, 6), axis, np.float32, seed) for seed in (1, 2, 3))
    options = {"axis": axis, "activation": "relu", "residual": residual if with_residual else None}
    y, cache = fastbn.batchnorm_forward(x, **options)
    gradients = fastbn.batchnorm_backward(dy, cache)
    out = np.zeros((3, 4, 5, 12), np.float32)[..., ::2]
    assert_same_bits(fastbn.batchnorm(x, out=out, **options), y)
    found = fastbn.batchnorm_backward(dy, cache, out=out)
    assert found.dx is out
    assert_same_bits(out, gradients.dx)
    if with_residual:
        assert_same_bits(found.dresidual, gradients.dresidual)


@pytest.mark.parametrize("channels", [1000, 2500])
def test_out_may_be_an_x_that_is_packed(channels):
    """Each value is mapped once, also where a row is packed in parts."""
    buffer = make_random((40, 2 * channels), 1, np.float32, 0)[:, ::2]
    expected = fastbn.batchnorm(buffer.copy())
    assert fastbn.batchnorm(buffer, out=buffer) is buffer
    assert_same_bits(buffer, expected)


def test_out_may_be_another_view_of_the_memory_of_x(arrays):
    x = arrays[0]
    expected = fastbn.batchnorm(x, GAMMA, BETA)
    fastbn.batchnorm(x, GAMMA, BETA, out=x[:])
    assert_same_bits(x, expected)


def test_out_may_be_residual(arrays):
    x, residual, _dy = arrays
    expected = fastbn.batchnorm(x, GAMMA, BETA, residual=residual)
    fastbn.batchnorm(x, GAMMA, BETA, residual=residual, out=residual)
    assert_same_bits(residual, expected)


def test_out_may_be_residual_of_forward_and_backward_still_knows_the_mask(arrays):
    x, residual, dy = arrays
    _y, cache = fastbn.batchnorm_forward(x, GAMMA, BETA, residual=residual, activation="relu")
    expected = fastbn.batchnorm_backward(dy, cache)
    y, cache = fastbn.batchnorm_forward(x, GAMMA, BETA, residual=residual, activation="relu", out=residual)
    assert y is residual
    gradients = fastbn.batchnorm_backward(dy, cache)
    assert_same_bits(gradients.dx, expected.dx)
    assert_same_bits(gradients.dresidual, expected.dresidual)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("axis", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("threads", [1, 3])
def test_out_may_lie_over_gamma_and_beta(dtype, axis, training, keep, threads):
    """They are read before anything is written."""
    x = make_random((5, 70, 6, 70), axis, np.float32, 1)
    running = {"running_mean": np.linspace(-1, 1, 70, dtype=np.float32), "running_var": np.ones(70, np.float32)}
    options = {"training": training, "activation": "relu", "num_threads": threads, **running}
    forward = fastbn.batchnorm_forward if keep else fastbn.batchnorm
    memory = np.zeros(x.nbytes, np.uint8)
    for first in (0, x.nbytes // 2, x.nbytes - 2 * 70 * np.dtype(dtype).itemsize):
        vectors = memory[first:].view(dtype)[: 2 * 70].reshape(2, 70)
        vectors[:] = [np.linspace(1, 2, 70), np.linspace(-2, 3, 70)]
        expected = forward(x, *vectors.copy(), axis=axis, **{**options, **{k: v.copy() for k, v in running.items()}})
        y = forward(x, *vectors, axis=axis, out=memory.view(np.float32).reshape(x.shape), **options)
        assert_same_bits(*(result[0] if keep else result for result in (y, expected)))


def test_out_and_residual_and_x_may_be_one_array(arrays):
    x = arrays[0]
    expected = fastbn.batchnorm(x, GAMMA, BETA, residual=x)
    fastbn.batchnorm(x, GAMMA, BETA, residual=x, out=x)
    assert_same_bits(x, expected)


def test_out_may_interleave_with_x_without_sharing_an_element():
    room = make_random((3, 8, 5), 1, np.float32)
    x, out = room[:, :4], room[:, 4:]
    expected = fastbn.batchnorm(x, GAMMA, BETA)
    fastbn.batchnorm(x, GAMMA, BETA, out=out)
    assert_same_bits(out, np.asarray(expected))


def test_out_may_hold_the_parameters_which_are_read_first():
    x = make_random((6, 4), 1, np.float32)
    out = np.empty_like(x)
    out[0], out[1] = GAMMA, BETA
    expected = fastbn.batchnorm(x, GAMMA, BETA)
    fastbn.batchnorm(x, out[0], out[1], out=out)
    assert_same_bits(out, expected)


def test_out_of_backward_gets_dx_and_is_returned(arrays):
    x, _residual, dy = arrays
    _y, cache = fastbn.batchnorm_forward(x, GAMMA, BETA, activation="relu")
    expected = fastbn.batchnorm_backward(dy, cache)
    out = np.full_like(x, np.nan)
    gradients = fastbn.batchnorm_backward(dy, cache, out=out)
    assert gradients.dx is out
    assert_same_bits(out, expected.dx)
    assert_same_bits(gradients.dgamma, expected.dgamma)


@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_out_of_backward_may_be_dy(arrays, with_residual):
    x, residual, dy = arrays
    options = {"residual": residual if with_residual else None}
    _y, cache = fastbn.batchnorm_forward(x, GAMMA, BETA, activation="relu", **options)
    expected = fastbn.batchnorm_backward(dy, cache)
    gradients = fastbn.batchnorm_backward(dy, cache, out=dy)
    assert gradients.dx is dy
    assert_same_bits(dy, expected.dx)
    if with_residual:
        assert_same_bits(gradients.dresidual, expected.dresidual)
        assert not np.shares_memory(gradients.dresidual, dy)


def test_inputs_are_never_modified(arrays):
    x, residual, dy = arrays
    gamma, beta = GAMMA.copy(), BETA.copy()
    inputs = (x, residual, dy, gamma, beta)
    before = [array.tobytes() for array in inputs]
    for array in inputs:
        array.flags.writeable = False
    _y, cache = fastbn.batchnorm_forward(x, gamma, beta, residual=residual, activation="relu")
    fastbn.batchnorm_backward(dy, cache)
    fastbn.batchnorm_stats(x)
    assert [array.tobytes() for array in inputs] == before


def test_out_must_not_be_a_residual_that_backward_needs(arrays):
    """The gradient of hardswish is a function of x and the residual; that of relu of a bit."""
    x, residual, dy = arrays
    _y, cache = fastbn.batchnorm_forward(x, GAMMA, BETA, residual=residual, activation="hardswish")
    assert cache.nbytes >= x.nbytes + residual.nbytes
    with pytest.raises(fastbn.AliasError, match="out"):
        fastbn.batchnorm_forward(x, GAMMA, BETA, residual=residual, activation="hardswish", out=residual)
    with pytest.raises(fastbn.AliasError, match="out"):
        fastbn.batchnorm_backward(dy, cache, out=residual)
    fastbn.batchnorm(x, GAMMA, BETA, residual=residual, activation="hardswish", out=residual)


def test_out_of_an_empty_batch_is_returned():
    x = np.zeros((0, 4), np.float32)
    out = np.zeros((0, 4), np.float32)
    assert fastbn.batchnorm(x, out=out) is out


def test_cache_keeps_x_by_reference_and_says_how_much():
    x = make_random(SHAPE, 1, np.float32)
    _y, cache = fastbn.batchnorm_forward(x, GAMMA)
    assert cache.x is x
    assert cache.gamma.dtype == cache.mean.dtype == cache.rstd.dtype == np.float64
    plain = cache.nbytes
    assert x.nbytes < plain < x.nbytes + 1000
    # A fused activation costs nothing more; one with a residual one bit per value, rounded up to whole runs.
    assert fastbn.batchnorm_forward(x, GAMMA, activation="relu")[1].nbytes == plain
    mask = fastbn.batchnorm_forward(x, GAMMA, activation="relu", residual=x)[1].nbytes - plain
    assert x.size // 8 <= mask <= x.size // 8 + SHAPE[0] * SHAPE[1] * 64
    with pytest.raises(ValueError, match="read-only"):
        cache.mean[0] = 1.0


def test_gradients_unpack_and_have_the_dtypes_of_the_parameters():
    x = make_random(SHAPE, 1, np.float32)
    _y, cache = fastbn.batchnorm_forward(x, GAMMA.astype(np.float64), None)
    gradients = fastbn.batchnorm_backward(x, cache)
    dx, dgamma, dbeta = gradients
    assert (dx.dtype, dgamma.dtype, dbeta, gradients.dresidual) == (np.float32, np.float64, None, None)
    _y, cache = fastbn.batchnorm_forward(x, None, BETA.astype(np.float16))
    _dx, dgamma, dbeta = fastbn.batchnorm_backward(x, cache)
    assert (dgamma, dbeta.dtype) == (None, np.float16)
