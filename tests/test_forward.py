"""Forward against exact arithmetic, then against the reference, then with hostile data."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

import fastbn
from combinations import (
    each_activation_and_shape,
    each_dtype,
    each_isa,
    each_mode,
    each_order,
    each_shape,
    make_problem,
    with_or_without_residual,
)
from problems import (
    HOSTILE,
    MEMORY_ORDERS,
    SHAPES,
    TAIL_SHAPES,
    assert_same_bits,
    exact_statistics,
    finfo,
    make_exact,
    make_hostile,
    make_random,
    ulp,
    ulp_distance,
    ulp_error,
)
from tolerances import (
    EXACT_ULP_F32,
    STATISTICS_RELATIVE_F64,
    STATISTICS_ULP,
    activation_atol,
    exact_ulp_f64,
    forward_atol,
    storing,
)

SEVERAL_VALUES = [shape for shape in SHAPES if np.prod(shape) > shape[1]]


@each_isa
@each_dtype
@each_order
@each_shape([*SHAPES, *TAIL_SHAPES])
def test_statistics_of_exact_data_are_exact(isa, dtype, order, shape):
    exact = make_exact(shape, 1, dtype)
    x = MEMORY_ORDERS[order](exact.x, 1)
    with fastbn.runtime.isa(isa):
        stats = fastbn.batchnorm_stats(x)
    assert stats.count == exact.count
    for actual, expected in ((stats.mean, exact.mean), (stats.var(), exact.var)):
        assert ulp_distance(actual.astype("f4"), expected.astype("f4")).max() <= EXACT_ULP_F32
        assert ulp_distance(actual, expected).max() <= exact_ulp_f64(exact.count)


@each_isa
@each_dtype
@each_order
@each_activation_and_shape(SEVERAL_VALUES)
@with_or_without_residual
@each_mode
def test_y_matches_reference(isa, dtype, order, activation, with_residual, training, shape):
    problem = make_problem(shape, dtype, order=order, with_residual=with_residual, training=training, offset=2.0)
    with fastbn.runtime.isa(isa):
        y, cache = problem.forward(activation, num_threads=2)
    expected, reference = problem.reference(activation)
    along = (1, -1) + (1,) * (len(shape) - 2)
    beta = problem.beta.reshape(along)
    residual = 0.0 if problem.residual is None else problem.residual
    scaled = reference.v - beta - residual
    assert y.dtype == dtype and y.shape == shape
    gamma = problem.gamma.reshape(along)
    atol = forward_atol(dtype, scaled, beta, residual, offset_ratio=16.0, gamma=gamma)
    assert np.all(np.abs(y - expected) <= activation_atol(dtype, activation, atol, expected))
    np.testing.assert_allclose(cache.mean, reference.mean, rtol=0, atol=1e-12)
    np.testing.assert_allclose(cache.rstd, reference.rstd, rtol=1e-12)


@each_isa
@each_dtype
@each_order
@pytest.mark.parametrize("offset", [0.0, 1.0, 1e2, 127.0, 1e4, 1e6], ids=lambda v: f"offset{v:g}")
@each_shape([(7, 5, 13, 11), (501, 5)])
def test_statistics_are_as_accurate_as_promised(isa, dtype, order, offset, shape):
    offset = min(offset, float(finfo(dtype).max) / 16)  # float16 ends at 65504
    x = MEMORY_ORDERS[order](make_random(shape, 1, dtype, seed=7, offset=offset), 1)
    with fastbn.runtime.isa(isa):
        stats = fastbn.batchnorm_stats(x)
    for channel, exact in enumerate(exact_statistics(x, 1)):
        mean, var = stats.mean[channel], stats.var()[channel]
        largest = max(abs(float(exact.mean)), exact.std)
        if dtype == "float64":
            assert abs(mean - float(exact.mean)) <= STATISTICS_RELATIVE_F64 * largest
            assert abs(var - float(exact.var)) <= STATISTICS_RELATIVE_F64 * float(exact.var)
        else:
            assert ulp_error(np.float32(mean), exact.mean, "f4", largest) <= STATISTICS_ULP
            assert ulp_error(np.float32(var), exact.var, "f4") <= STATISTICS_ULP


@each_isa
@each_dtype
@each_order
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_data_stay_in_their_channel(isa, dtype, order, name):
    """One channel is hostile; the others get the bits that they get without it, and it gets what the reference says."""
    shape, channel = (6, 5, 7, 5), 2
    mild = MEMORY_ORDERS[order](make_random(shape, 1, np.float64, seed=0).astype(dtype), 1)
    x = MEMORY_ORDERS[order](make_hostile(name, shape, 1, dtype, seed=0, channel=channel), 1)
    with fastbn.runtime.isa(isa), np.errstate(all="ignore"):
        y, plain = fastbn.batchnorm(x), fastbn.batchnorm(mild)
        stats, expected = fastbn.batchnorm_stats(x), fastbn.reference.batchnorm_stats(x)
        reference = fastbn.reference.batchnorm(x)
    others = [c for c in range(shape[1]) if c != channel]
    assert np.array_equal(y[:, others], plain[:, others])
    assert np.array_equal(np.isfinite(y), np.isfinite(reference))
    assert np.isnan(stats.mean[channel]) == np.isnan(expected.mean[channel])
    assert np.isinf(stats.mean[channel]) == np.isinf(expected.mean[channel])
    if np.isfinite(reference).all():
        # |mean| / std may exceed what the reference's own float64 can tell apart
        tolerance = 1e-5 + 2 * storing(dtype)
        computed = y[:, channel].astype(np.float64)
        np.testing.assert_allclose(computed, reference[:, channel], rtol=tolerance, atol=tolerance)
    if name.startswith("constant") or name.endswith("zeros"):
        assert stats.m2[channel] == 0 and not y[:, channel].any()


@each_isa
@each_dtype
@pytest.mark.parametrize("threads", [1, 3])
@each_shape([(1, 2, 1 << 16), (1 << 16, 2), (1 << 16, 70)])
def test_a_shift_far_from_the_mean_does_not_spoil_the_variance(isa, dtype, threads, shape):
    """The shift of the sums, in float64 the first value and else 0, is far from the mean: it would cost digits, if the
    sums were not redone; of one channel only. Planar, folded and interleaved; in whole channels and in phases."""
    x = make_random(shape, 1, dtype, seed=3)
    x[(0,) * x.ndim] = min(1e7, float(finfo(dtype).max) / 2)
    x[:, 1] += x.dtype.type(300)
    with fastbn.runtime.isa(isa):
        stats = fastbn.batchnorm_stats(x, num_threads=threads)
    for channel, exact in enumerate(exact_statistics(x[:, :2], 1)):
        assert abs(stats.var()[channel] - float(exact.var)) <= STATISTICS_RELATIVE_F64 * float(exact.var)


@each_isa
@each_order
def test_float64_differences_from_an_outlier_do_not_spoil_the_variance(isa, order):
    """The first value, the shift of the sums, is 88 standard deviations away: what 0.1 - 10 and 0.3 - 10 lose would be
    twenty ulp of the variance, if the sums were not redone."""
    values = np.full(40001, 0.1)
    values[1::2] = 0.3
    values[0] = 10
    x = MEMORY_ORDERS[order](np.stack([values, values, values], 1), 1)
    var = float(exact_statistics(values[:, None], 1)[0].var)
    with fastbn.runtime.isa(isa):
        stats = fastbn.batchnorm_stats(x)
    assert abs(stats.var()[0] - var) <= 4 * np.spacing(var)


@each_isa
@each_order
@pytest.mark.parametrize("period", [5, 17, 65, 257])
def test_roundings_that_do_not_average_out(isa, order, period):
    """Two values, a few standard deviations apart: every addition rounds the same way."""
    values = np.full(1 << 15, 3.3)
    values[::period] = 1.1
    x = MEMORY_ORDERS[order](np.stack([values, values, values], 1), 1)
    exact = exact_statistics(values[:, None], 1)[0]
    with fastbn.runtime.isa(isa):
        stats = fastbn.batchnorm_stats(x)
    assert abs(stats.mean[0] - float(exact.mean)) <= STATISTICS_RELATIVE_F64 * float(exact.mean)
    assert abs(stats.var()[0] - float(exact.var)) <= STATISTICS_RELATIVE_F64 * float(exact.var)


@each_isa
@each_dtype
@each_order
def test_input_is_not_modified(isa, dtype, order):
    problem = make_problem((5, 6, 7, 3), dtype, order=order, with_residual=True)
    before = [array.copy() for array in problem[:5]]
    for array in (problem.x, problem.dy, problem.residual):
        array.flags.writeable = False
    with fastbn.runtime.isa(isa):
        _, cache = problem.forward("relu")
        fastbn.batchnorm_backward(problem.dy, cache)
    for array, copy in zip(problem[:5], before, strict=True):
        assert np.array_equal(array, copy)


@each_isa
@pytest.mark.parametrize("slope", [0.2, -1.0, 0, np.float32(0.5)])
def test_leaky_relu_has_the_slope_that_is_asked_for(isa, slope):
    problem = make_problem((4, 3, 20), "float64", with_residual=True)
    with fastbn.runtime.isa(isa):
        y, cache = problem.forward(("leaky_relu", slope))
        gradients = fastbn.batchnorm_backward(problem.dy, cache)
    expected, reference = problem.reference(("leaky_relu", float(slope)))
    np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-12)
    expected = fastbn.reference.batchnorm_backward(problem.dy, reference)
    np.testing.assert_allclose(gradients.dx, expected.dx, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(gradients.dresidual, expected.dresidual, rtol=1e-15)


@each_isa
@each_dtype
@each_order
@pytest.mark.parametrize("activation", fastbn.runtime.activations())
def test_nan_and_infinity_through_activations(isa, dtype, order, activation):
    """And the kinks: NaN stays NaN, infinity is a number like others."""
    x = np.array([[np.nan, 1.0, -np.inf, 2.0], [1.0, -1.0, 6.0, np.inf], [-3.0, 0.0, 3.0, 1.0]]).astype(dtype)
    x = MEMORY_ORDERS[order](x, 1)
    statistics = {"running_mean": np.zeros(4), "running_var": np.ones(4), "training": False}
    with fastbn.runtime.isa(isa):
        y, cache = fastbn.batchnorm_forward(x, eps=0.0, activation=activation, **statistics)
        dx, _, _ = fastbn.batchnorm_backward(np.ones_like(x), cache)
    expected, reference = fastbn.reference.batchnorm_forward(x, eps=0.0, activation=activation, **statistics)
    expected_dx = fastbn.reference.batchnorm_backward(np.ones(x.shape), reference).dx
    for computed, exact in ((y, expected), (dx, expected_dx)):
        np.testing.assert_allclose(computed.astype(np.float64), exact, rtol=1e-6 + 2 * storing(dtype))


@each_isa
@each_dtype
@pytest.mark.parametrize("axis", [1, -1], ids=["planar", "interleaved"])
def test_results_are_rounded_to_nearest_even(isa, dtype, axis):
    """y is gamma, rounded: float32 on and beside the middle of two neighbours in a half precision, of every size."""
    top = np.arange(0, 1 << 16, 37, dtype=np.uint32)[:, None] << 16
    below = np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    gamma = (top | below).ravel().view(np.float32)
    gamma = gamma[np.isfinite(gamma)]
    ones = np.ones((2, gamma.size, 17) if axis == 1 else (2, gamma.size), dtype)
    statistics = {"running_mean": np.zeros(gamma.size), "running_var": np.ones(gamma.size), "training": False}
    with fastbn.runtime.isa(isa):
        y = fastbn.batchnorm(ones, gamma, axis=axis, eps=0.0, **statistics)
    with np.errstate(over="ignore"):
        expected = gamma.astype(dtype)
    assert np.array_equal(y, np.broadcast_to(expected[:, None] if axis == 1 else expected, y.shape))


def rounded_once(exact):
    """A fraction as float32: the nearest, of two the even one."""
    near = np.float32(float(exact))
    candidates = [np.nextafter(near, np.float32(side)) for side in (-np.inf, np.inf)] + [near]
    return min(candidates, key=lambda c: (abs(Fraction(float(c)) - exact), int(c.view(np.uint32)) & 1))


@each_isa
@pytest.mark.parametrize("axis", [1, -1], ids=["planar", "interleaved"])
def test_product_and_offset_are_rounded_once(isa, axis):
    """y = x * gamma + beta of float32, with statistics that change nothing, where the exact sum lies so near the middle
    of two numbers that float64, on the way, would take it for the middle itself; beside it; and for denormal y."""
    cases = []
    for x_sign, scale_sign, beta_bits in itertools.product((1, -1), (1, -1), range(4)):
        for power in (12, 18, 23):
            for distance in (-24, -25, -23, -24 - 30):
                x, gamma = x_sign * (1 - 2.0**-power), scale_sign * 2.0**distance * (1 + 2.0**-power)
                cases += [(x, gamma, sign * (1 + beta_bits * 2.0**-23)) for sign in (1, -1)]
    cases += [(x, gamma * 2.0**-120, beta * 2.0**-120) for x, gamma, beta in cases]
    cases += [(x, gamma * 2.0**-126, beta * 2.0**-130) for x, gamma, beta in cases[: len(cases) // 2]]
    x, gamma, beta = np.array(cases).astype("f4").T
    assert (np.array(cases) == np.array([x, gamma, beta], np.float64).T)[: len(cases) // 3].all()
    exactly = [[Fraction(float(value)) for value in values] for values in (x, gamma, beta)]
    expected = [rounded_once(a * b + c) for a, b, c in zip(*exactly, strict=True)]
    rows = np.tile(x[:, None], (2, 1, 17)) if axis == 1 else np.tile(x, (2, 1))
    moments = {"running_mean": np.zeros(x.size), "running_var": np.ones(x.size), "training": False}
    with fastbn.runtime.isa(isa):
        y = fastbn.batchnorm(rows, gamma, beta, axis=axis, eps=0.0, **moments)
    wanted = np.broadcast_to(np.array(expected).reshape((-1, 1) if axis == 1 else -1), y.shape)
    assert_same_bits(y, wanted.copy())


@each_isa
@each_order
@pytest.mark.parametrize("ratio", [0, 1, 1.99, 2.01, 30, 1e5])
def test_y_is_within_one_rounding_of_the_largest(isa, order, ratio):
    """Wherever the mean is, subtracted from x or with beta: 1 ulp of the largest |y| of a channel, or little more."""
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((4, 40, 33, 5)) + ratio).astype("f4")
    x[:, :, 0, 0] = ratio  # some values are the mean
    x = MEMORY_ORDERS[order](x, 1)
    gamma, beta = rng.uniform(-2, 2, (2, 40))
    with fastbn.runtime.isa(isa):
        y = fastbn.batchnorm(x, gamma, beta)
    wide, along = x.astype(np.longdouble), (1, -1, 1, 1)
    mean, var = (
        np.array([getattr(s, name) for s in exact_statistics(x, 1)], np.longdouble) for name in ("mean", "var")
    )
    expected = (wide - mean.reshape(along)) * (gamma / np.sqrt(var + 1e-5)).reshape(along) + beta.reshape(along)
    largest = np.abs(expected).max(axis=(0, 2, 3))
    errors = np.abs(y - expected).max(axis=(0, 2, 3))
    assert max(float(e) / ulp(float(at), "f4") for e, at in zip(errors, largest, strict=True)) < 1.5


@each_dtype
@each_isa
@pytest.mark.parametrize("axis", [1, -1])
def test_nan_of_any_bits_stays_nan(dtype, isa, axis):
    """In bfloat16 too, where rounding the lower half of such a number up would make it -0."""
    nan = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)
    x, dy = (make_random((5, 3, 9) if axis == 1 else (5, 9, 3), axis, dtype, seed) for seed in (1, 2))
    one = np.ones(3, np.float32)
    with fastbn.runtime.isa(isa):
        for gamma, beta in ((nan, one), (one, nan)):
            y, cache = fastbn.batchnorm_forward(x, gamma, beta, axis=axis)
            assert np.isnan(y.astype(np.float64)).all()
        _, cache = fastbn.batchnorm_forward(x, nan, one, axis=axis)
        assert np.isnan(fastbn.batchnorm_backward(dy, cache).dx.astype(np.float64)).all()
        wide = np.full(3, 0x7FFFFFFFFFFFFFFF).view(np.float64)
        moments = {"running_mean": wide, "running_var": np.ones(3)}
        assert np.isnan(fastbn.batchnorm(x, one, one, axis=axis, training=False, **moments).astype(np.float64)).all()
