"""Properties that hold for any input: hypothesis looks for one that breaks them.

The first half is about arrays: whatever lies in memory in whatever way, the numbers are those of the definition. The
second is the mathematics: what a shift, a scale, a sign, an order of channels or of samples does to the result; most of
it to the last bit, since powers of two, signs and the order of exact sums cost no rounding.
"""

import numpy as np
import pytest

import fastbn
from combinations import DTYPES, LONG, ORDERS, activation_slope, make_problem, run
from fastbn import reference
from problems import MEMORY_ORDERS, assert_same_bits, finfo, make_exact
from tolerances import forward_atol

hypothesis = pytest.importorskip("hypothesis")
given, st = hypothesis.given, hypothesis.strategies

# The same examples in every run; `make test-long` looks further, and elsewhere each time.
examples = hypothesis.settings(
    max_examples=2000 if LONG else 100, derandomize=not LONG, deadline=None, database=None, print_blob=LONG
)
dtypes = st.sampled_from(DTYPES)
orders = st.sampled_from(ORDERS)
seeds = st.integers(0, 2**32 - 1)
shapes = st.lists(st.sampled_from([2, 3, 4, 7, 16, 33]), min_size=2, max_size=4).map(tuple)


class Subclass(np.ndarray):
    """As a library would make one: results must be plain arrays."""


@st.composite
def arrays(draw):
    """An array that lies in memory in some way, and its channel axis."""
    shape = draw(st.lists(st.sampled_from([0, 1, 1, 2, 3, 5, 9]), min_size=1, max_size=5))
    dtype = draw(dtypes)
    rng = np.random.default_rng(draw(seeds))
    room = rng.standard_normal([3 * extent + 2 for extent in shape])
    for value in draw(st.lists(st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0]), max_size=3)):
        room.ravel()[rng.integers(room.size)] = value
    room = room.astype(dtype)
    steps = [draw(st.sampled_from([1, 1, 2, 3, -1])) for _ in shape]
    starts = [draw(st.integers(0, 1)) for _ in shape]
    view = room[tuple(slice(None, None, step) for step in steps)]
    view = view[tuple(slice(start, start + extent) for start, extent in zip(starts, shape, strict=True))]
    view = view.transpose(draw(st.permutations(range(len(shape)))))
    kind = draw(st.sampled_from(["view", "copy", "swapped", "misaligned", "subclass"]))
    if kind == "copy":
        view = view.copy(order=draw(st.sampled_from("CFK")))
    elif kind == "swapped":
        view = view.astype(dtype.newbyteorder("S"))
    elif kind == "misaligned":
        buffer = np.zeros(view.nbytes + 1, np.uint8)
        buffer[1:] = np.frombuffer(view.tobytes(), np.uint8)
        view = buffer[1:].view(dtype).reshape(view.shape)
    elif kind == "subclass":
        view = view.view(Subclass)
    return view, draw(st.integers(-len(shape), len(shape) - 1))


@examples
@given(arrays(), st.booleans())
def test_property_any_array_is_normalized_as_the_definition_says(array_and_axis, training):
    x, axis = array_and_axis
    channels = x.shape[axis]
    before = np.array(x, copy=True).tobytes()
    options = {"axis": axis}
    if not training:
        options |= {"running_mean": np.linspace(-1, 1, channels), "running_var": np.linspace(0.5, 2, channels)}
        options["training"] = False
    if training and x.size == channels != 0:
        with pytest.raises(fastbn.SingleValueError):
            fastbn.batchnorm(x, **options)
        return
    y = fastbn.batchnorm(x, **options)
    expected = reference.batchnorm(x, **options)
    assert type(y) is np.ndarray and y.dtype == x.dtype.newbyteorder("=") and y.shape == x.shape
    assert (np.isnan(y) == np.isnan(expected)).all()
    finite = np.isfinite(expected)
    # a channel of equal values, or nearly so, is divided by sqrt(eps): |x - mean| / std says nothing then
    atol = forward_atol(y.dtype, np.where(finite, expected, 0), offset_ratio=2e3)
    assert (np.abs(y[finite].astype(np.float64) - expected[finite]) <= atol[finite]).all()
    assert (y[~finite & ~np.isnan(expected)] == expected[~finite & ~np.isnan(expected)]).all()
    assert np.array(x, copy=True).tobytes() == before


@examples
@given(arrays())
def test_property_statistics_of_any_array_are_those_of_the_definition(array_and_axis):
    x, axis = array_and_axis
    actual, expected = fastbn.batchnorm_stats(x, axis=axis), reference.batchnorm_stats(x, axis=axis)
    assert actual.count == (expected.count if x.size else 0)
    for ours, theirs in ((actual.mean, expected.mean), (actual.m2, expected.m2)):
        # a channel with Inf has a mean of NaN or Inf, as the sum meets it
        finite = np.isfinite(theirs)
        assert (np.isfinite(ours) == finite).all()
        np.testing.assert_allclose(ours[finite], theirs[finite], rtol=1e-12, atol=1e-12)


@examples
@given(shapes, dtypes, orders, seeds, st.integers(1, 3), st.sampled_from(["identity", "relu", "leaky_relu"]))
def test_property_scale_by_a_power_of_two_changes_no_bit(shape, dtype, order, seed, power, activation):
    """y of 2^k x with 4^k eps is y of x; dx is 2^-k as large. (k > 0: denormals of float16 have no bits to give.)"""
    problem = make_problem(shape, dtype, order=order, seed=seed)
    scale = dtype.type(2.0**power)
    results = []
    for factor, eps in ((dtype.type(1), 1e-3), (scale, 1e-3 * 4.0**power)):
        y, cache = problem._replace(x=problem.x * factor).forward(activation, eps=eps)
        gradients = fastbn.batchnorm_backward(problem.dy, cache)
        results.append((y, gradients))
    (y, gradients), (scaled_y, scaled) = results
    assert_same_bits(scaled_y, y)
    assert_same_bits(scaled.dgamma, gradients.dgamma)
    assert_same_bits(scaled.dbeta, gradients.dbeta)
    normal = np.abs(gradients.dx.astype(np.float64)) > 64 * float(finfo(dtype).smallest_normal)
    assert_same_bits((scaled.dx * scale)[normal], gradients.dx[normal])


@examples
@given(shapes, dtypes, orders, seeds)
def test_property_sign_of_x_is_the_sign_of_y(shape, dtype, order, seed):
    problem = make_problem(shape, dtype, order=order, seed=seed)._replace(beta=None)
    y, cache = problem.forward("identity")
    opposite, opposite_cache = problem._replace(x=-problem.x).forward("identity")
    assert_same_bits(opposite + y.dtype.type(0), y.dtype.type(0) - y)  # 0 has either sign
    dx, dgamma, _ = fastbn.batchnorm_backward(problem.dy, cache)
    opposite_dx, opposite_dgamma, _ = fastbn.batchnorm_backward(problem.dy, opposite_cache)
    assert_same_bits(opposite_dx + y.dtype.type(0), dx + y.dtype.type(0))
    assert_same_bits(opposite_dgamma + np.float32(0), np.float32(0) - dgamma)


@examples
@given(shapes, dtypes, orders, seeds, st.booleans())
def test_property_channels_know_nothing_of_each_other(shape, dtype, order, seed, training):
    """Channels in another order are the results in that order, to the last bit."""
    problem = make_problem(shape, dtype, seed=seed, training=training)
    moved = np.random.default_rng(seed).permutation(shape[1])
    running = {
        name: value[moved] if isinstance(value, np.ndarray) else value for name, value in problem.running.items()
    }
    there = problem._replace(
        x=MEMORY_ORDERS[order](problem.x[:, moved], 1),
        dy=MEMORY_ORDERS[order](problem.dy[:, moved], 1),
        gamma=problem.gamma[moved],
        beta=problem.beta[moved],
        running=running,
    )
    here = problem._replace(x=MEMORY_ORDERS[order](problem.x, 1), dy=MEMORY_ORDERS[order](problem.dy, 1))
    isa = fastbn.runtime.available_isas()[0]
    actual, expected = run(there, "relu", isa, 1), run(here, "relu", isa, 1)
    for name in ("y", "dx"):
        assert_same_bits(actual[name], expected[name][:, moved])
    for name in ("dgamma", "dbeta", "mean", "rstd"):
        assert_same_bits(actual[name], expected[name][moved])


@examples
@given(st.sampled_from([(8, 3, 4), (64, 2), (16, 5, 8, 2), (128, 17)]), dtypes, orders, seeds, st.integers(-3, 3))
def test_property_order_of_samples_and_exact_shifts_change_no_bit(shape, dtype, order, seed, shift):
    """Of data whose statistics are exact: all sums are, in any order and around any mean. The mean is more than two
    standard deviations from 0: of other channels it is not subtracted before all else."""
    x = make_exact(shape, 1, dtype, seed, offset=16).x
    moved = np.random.default_rng(seed).permutation(shape[0])
    y = fastbn.batchnorm(MEMORY_ORDERS[order](x, 1))
    assert_same_bits(fastbn.batchnorm(MEMORY_ORDERS[order](x[moved], 1)), y[moved])
    assert_same_bits(fastbn.batchnorm(MEMORY_ORDERS[order](x + dtype.type(shift), 1)), y)


@examples
@given(shapes, st.sampled_from([np.dtype("f4"), np.dtype("f8")]), orders, seeds)
def test_property_gradients_are_linear_and_have_no_mean_and_no_slope(shape, dtype, order, seed):
    """Twice dy is twice everything, to the last bit. dx adds to zero, also weighed with x: y does not change if x is
    shifted or scaled (Ioffe and Szegedy 2015, section 3.3; eps is too small to be seen)."""
    problem = make_problem(shape, dtype, order=order, seed=seed)
    _, cache = problem.forward("relu", eps=1e-300)
    dx, dgamma, dbeta = fastbn.batchnorm_backward(problem.dy, cache)
    twice = fastbn.batchnorm_backward(problem.dy * dtype.type(2), cache)
    for actual, expected in zip(twice, (dx, dgamma, dbeta), strict=True):
        assert_same_bits(actual, expected * dtype.type(2))
    slope = activation_slope(problem, "relu", eps=1e-300)
    x, g = (np.moveaxis(np.asarray(a, np.float64), 1, 0).reshape(shape[1], -1) for a in (problem.x, problem.dy * slope))
    centered = (x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True)
    rows = np.moveaxis(np.asarray(dx, np.float64), 1, 0).reshape(shape[1], -1)
    # each dx has an error of a few roundings of its terms, which are no larger than this
    largest = np.abs(problem.gamma) / x.std(axis=1) * np.abs(g).max(axis=1) * np.abs(centered).max(axis=1) ** 2
    atol = 32 * finfo(dtype).eps * x.shape[1] * (largest + np.abs(rows).max(axis=1))
    assert (np.abs(rows.sum(axis=1)) <= atol).all()
    assert (np.abs((rows * centered).sum(axis=1)) <= atol * np.abs(centered).max(axis=1)).all()
