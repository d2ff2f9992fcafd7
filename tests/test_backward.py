"""Backward against finite differences (the reference) and against the reference (the kernels)."""

from fractions import Fraction

import numpy as np
import pytest

import fastbn
from combinations import (
    ACTIVATIONS,
    activation_slope,
    each_activation_and_shape,
    each_dtype,
    each_isa,
    each_mode,
    each_order,
    each_shape,
    make_problem,
    streaming,
    with_or_without_residual,
)
from problems import MEMORY_ORDERS, SHAPES, TAIL_SHAPES, exact_statistics, finfo, make_random
from tolerances import (
    EXACT_ACTIVATIONS,
    U64,
    central_difference_atol,
    central_difference_step,
    dx_addends,
    dx_atol,
    gradient_rounding,
    storing,
    sum_atol,
)

SEVERAL_VALUES = [shape for shape in SHAPES if np.prod(shape) > shape[1]]


def check(problem, activation, cache, gradients):
    """All gradients against the reference, which is told the slope of the activation."""
    dtype, shape = problem.x.dtype, problem.x.shape
    slope = activation_slope(problem, activation)
    _, reference = problem.reference(activation)
    expected = fastbn.reference.batchnorm_backward(problem.dy, reference, slope=slope)
    dx, dgamma, dbeta = gradients
    dy = problem.dy.astype(np.float64)
    g = dy * slope
    computed = np.float64 if activation in EXACT_ACTIVATIONS else np.promote_types(np.float32, dtype)
    rounding = gradient_rounding(dtype, activation) * np.abs(dy).max()
    centered = problem.x - reference.mean.reshape((1, -1) + (1,) * (len(shape) - 2))
    for channel in range(shape[1]):
        gamma = float(problem.gamma[channel])
        if cache._training:
            largest = dx_addends(problem.x[:, channel], g[:, channel], gamma, 1e-5)
        else:
            largest = float(np.abs(expected.dx[:, channel]).max())
        error = np.abs(dx[:, channel] - expected.dx[:, channel]).max()
        steps = rounding * (2 if cache._training else 1)  # g and its mean
        assert error <= dx_atol(dtype, largest) + steps * abs(gamma) * reference.rstd[channel], (channel, error)
        count = g[:, channel].size
        loudest = float(np.abs(dy[:, channel]).max()) * max(1.0, float(np.abs(slope).max()))
        terms = count * loudest
        assert abs(float(dbeta[channel]) - expected.dbeta[channel]) <= sum_atol(dbeta.dtype, terms, count, computed)
        terms = 2 * loudest * float(np.abs(centered[:, channel]).sum()) * reference.rstd[channel]
        assert abs(float(dgamma[channel]) - expected.dgamma[channel]) <= sum_atol(dgamma.dtype, terms, count, computed)
    if problem.residual is not None:
        atol = rounding + storing(dtype) * np.abs(g) * (activation not in EXACT_ACTIVATIONS)
        assert np.all(np.abs(gradients.dresidual - g) <= atol)


@each_isa
@each_dtype
@each_order
@each_activation_and_shape(SEVERAL_VALUES)
@with_or_without_residual
@each_mode
def test_gradients_match_reference(isa, dtype, order, activation, with_residual, training, shape):
    problem = make_problem(shape, dtype, order=order, with_residual=with_residual, training=training)
    with fastbn.runtime.isa(isa):
        _, cache = problem.forward(activation, num_threads=2)
        gradients = fastbn.batchnorm_backward(problem.dy, cache, num_threads=2)
    check(problem, activation, cache, gradients)


@each_isa
@each_dtype
@each_order
@with_or_without_residual
@each_shape(TAIL_SHAPES)
def test_gradients_of_every_tail(isa, dtype, order, with_residual, shape):
    problem = make_problem(shape, dtype, order=order, with_residual=with_residual)
    with fastbn.runtime.isa(isa):
        _, cache = problem.forward("relu")
        gradients = fastbn.batchnorm_backward(problem.dy, cache)
    check(problem, "relu", cache, gradients)


@each_isa
@each_dtype
@each_order
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("rows", [15, 16, 19])
@pytest.mark.parametrize("plane", [2, 5, 15, 16, 17, 31, 33, 49, 98])
def test_gradient_of_the_residual_is_dy_where_the_activation_is_open(isa, dtype, order, large, rows, plane):
    """Bit for bit: also where short planes are mapped as one row, in parts that end anywhere in a plane, and have bytes
    of the mask in common, of which threads write; and where only the mask has its planes side by side."""
    x, residual, dy = (make_random((rows, 75, 1, plane), 1, dtype, seed) for seed in (1, 2, 3))
    x, residual, moved = (MEMORY_ORDERS[order](array, 1) for array in (x, residual, dy))
    running = {"running_mean": np.zeros(75), "running_var": np.ones(75), "training": False}
    with fastbn.runtime.isa(isa), streaming(large):
        for statistics, given in (({}, dy), (running, moved)):
            y, cache = fastbn.batchnorm_forward(x, residual=residual, activation="relu", num_threads=2, **statistics)
            dresidual = fastbn.batchnorm_backward(given, cache, num_threads=3).dresidual
            assert np.array_equal(dresidual, np.where(y > 0, dy, dy.dtype.type(0)))


@each_isa
@each_dtype
@each_order
@pytest.mark.parametrize("offset", [1e3, 1e6], ids=lambda v: f"offset{v:g}")
def test_offsets_of_x_and_dy_cost_no_digits(isa, dtype, order, offset):
    """Exact integers, so that the offset itself rounds nothing away; the reference gets them without the offset, for a
    constant added to x or dy changes neither dx nor dgamma."""
    rng = np.random.default_rng(5)
    small_x, small_dy = rng.integers(-8, 9, (2, 8, 4, 9, 7)) / 4
    move = MEMORY_ORDERS[order]
    offset = min(offset, 2.0 ** np.floor(np.log2(0.125 / float(finfo(dtype).eps))))  # two bits behind the point
    x, dy = (move((values + offset).astype(dtype), 1) for values in (small_x, small_dy))
    assert np.array_equal(x.astype(np.float64) - offset, small_x)
    _, reference = fastbn.reference.batchnorm_forward(small_x, np.ones(4), np.zeros(4))
    expected = fastbn.reference.batchnorm_backward(small_dy, reference)
    with fastbn.runtime.isa(isa):
        _, cache = fastbn.batchnorm_forward(x, np.ones(4), np.zeros(4))
        dx, dgamma, dbeta = fastbn.batchnorm_backward(dy, cache)
    for channel in range(4):
        largest = float(np.abs(expected.dx[:, channel]).max())
        assert np.abs(dx[:, channel] - expected.dx[:, channel]).max() <= dx_atol(dtype, largest)
    # products of dy and x - mean, rounded to float64 and added there; of float64 values nothing is lost
    terms = float(np.abs(small_x - small_x.mean(axis=(0, 2, 3), keepdims=True)).sum(axis=(0, 2, 3)).max()) * offset
    # and the variance of narrower ones is what is left of squares, if their sums are not made again
    squares = offset**2 / float(small_x.var(axis=(0, 2, 3)).min())
    squares = (squares if squares < 2**14 else 1) * float(np.abs(expected.dgamma).max())
    atol = 1e-9 if dtype == "float64" else 4 * U64 * terms + 16 * U64 * squares
    np.testing.assert_allclose(dgamma, expected.dgamma, rtol=0, atol=atol)
    np.testing.assert_allclose(dbeta, dy.astype(np.float64).sum(axis=(0, 2, 3)), rtol=1e-15)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@each_mode
@pytest.mark.parametrize("axis", [1, -1])
def test_gradients_match_central_differences(activation, training, axis):
    """Of the compiled library in float64: no reference needed."""
    shape = (3, 4, 5) if axis == 1 else (3, 5, 4)
    rng = np.random.default_rng(11)
    x, residual, weights = (make_random(shape, axis, np.float64, seed) for seed in (1, 2, 3))
    gamma, beta = rng.uniform(0.5, 2, 4), rng.uniform(-1, 1, 4)
    running = {} if training else {"running_mean": beta / 2, "running_var": gamma, "training": False}

    def loss(x, residual, gamma, beta):
        y = fastbn.batchnorm(x, gamma, beta, axis=axis, residual=residual, activation=activation, **running)
        return float((y * weights).sum())

    arguments = [x, residual, gamma, beta]
    v, _ = fastbn.batchnorm_forward(x, gamma, beta, axis=axis, residual=residual, **running)
    for kink in (-3, 0, 3, 6):
        assert np.abs(v - kink).min() > 1e-3, "a value too near a kink for a difference to be a derivative"
    _, cache = fastbn.batchnorm_forward(x, gamma, beta, axis=axis, residual=residual, activation=activation, **running)
    gradients = fastbn.batchnorm_backward(weights, cache)
    computed = [gradients.dx, gradients.dresidual, gradients.dgamma, gradients.dbeta]
    step = central_difference_step(1.0)
    for position, gradient in enumerate(computed):
        for index in np.ndindex(gradient.shape):
            values = []
            for sign in (1, -1):
                moved = [array.copy() for array in arguments]
                moved[position][index] += sign * step
                values.append(loss(*moved))
            difference = (values[0] - values[1]) / (2 * step)
            assert abs(difference - gradient[index]) <= central_difference_atol(100.0, step)


@each_isa
@each_dtype
def test_gradient_of_an_outlier_that_the_activation_stops(isa, dtype):
    """A huge dy where relu is shut has no influence at all, not even on the precision of the rest."""
    problem = make_problem((4, 3, 20), dtype)
    with fastbn.runtime.isa(isa):
        y, cache = problem.forward("relu")
        dy = problem.dy.copy()
        loud = dy.copy()
        loud[y <= 0] = min(1e30, float(finfo(dtype).max))
        quiet, heard = (fastbn.batchnorm_backward(values, cache) for values in (dy, loud))
    for a, b in zip(quiet, heard, strict=True):
        assert np.array_equal(a, b)


@each_isa
def test_inference_gradient_is_g_times_scale_even_beside_infinity(isa):
    """dx = g * scale: x does not enter, so an infinite x does not make it NaN."""
    x = np.array([[np.inf, 1.0], [0.0, 2.0]], "f4")
    statistics = {"running_mean": np.zeros(2), "running_var": np.ones(2), "training": False}
    with fastbn.runtime.isa(isa):
        _, cache = fastbn.batchnorm_forward(x, np.full(2, 2.0), eps=0.0, **statistics)
        dx, _, _ = fastbn.batchnorm_backward(np.full_like(x, 3.0), cache)
    np.testing.assert_array_equal(dx, np.full_like(x, 6.0))


@each_isa
@each_order
@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("ratio", [0.0, 50.0])
def test_float64_gradients_keep_what_additions_lose(isa, order, offset, ratio):
    """Of sums whose terms cancel to a millionth: the digits of exact arithmetic. (x is of few bits, as its mean is.)"""
    rng = np.random.default_rng(2)
    small = rng.integers(-8, 9, (3, 2, 40, 41)) / 4
    x = MEMORY_ORDERS[order](small + ratio, 1)
    dy = MEMORY_ORDERS[order](rng.standard_normal(small.shape) + offset, 1)
    with fastbn.runtime.isa(isa):
        _, cache = fastbn.batchnorm_forward(x, np.ones(2), np.zeros(2))
        _, dgamma, dbeta = fastbn.batchnorm_backward(dy, cache)
    for channel, exact in enumerate(exact_statistics(x, 1)):
        deviations = [Fraction(v) - exact.mean for v in x[:, channel].ravel().tolist()]
        gradients = list(map(Fraction, dy[:, channel].ravel().tolist()))
        products = sum(g * d for g, d in zip(gradients, deviations, strict=True))
        expected = np.longdouble(float(products)) / np.sqrt(np.longdouble(float(exact.var + Fraction(1e-5))))
        assert abs(dgamma[channel] - expected) <= 2 * np.spacing(abs(dgamma[channel]))
        assert abs(Fraction(dbeta[channel]) - sum(gradients)) <= np.spacing(abs(dbeta[channel]))
