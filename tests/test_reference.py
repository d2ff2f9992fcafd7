"""The definition itself: against closed forms, exact arithmetic, central differences and, if installed, PyTorch."""

import math

import numpy as np
import pytest

import fastbn
from fastbn import _core, reference
from problems import exact_statistics, make_exact, make_parameters, make_random, shape_id
from tolerances import U64, central_difference_atol, central_difference_step, torch_rtol

SMALL = ((6, 3), (2, 3, 5), (3, 2, 4, 5), (2, 2, 2, 3, 2))


def test_reference_defines_every_public_function_and_activation():
    functions = {name for name in fastbn.__all__ if name.startswith("batchnorm")}
    assert functions <= set(dir(reference))
    assert set(reference.ACTIVATIONS) == set(fastbn.runtime.activations())


@pytest.mark.parametrize("name", fastbn.runtime.activations())
def test_reference_activations_are_those_of_the_kernels(name):
    """The formulas of src_c/activations.def are Python too."""
    slope, v, g = 0.25, np.array([-np.inf, -7, -3, -1.5, -0.0, 0, 2, 3, 4.5, 6, 8, np.inf, np.nan]), 2.0
    names = {
        "v": v,
        "g": g,
        "NEGATIVE_SLOPE": slope,
        "NUMBER": float,
        "SELECT": np.where,
        "CLIP": np.clip,
        "EVERYWHERE": v.size * [True],
    }
    with np.errstate(invalid="ignore"):
        formulas = _core.activation_formulas()[fastbn.runtime.ACTIVATION_INDEX[name]]
        y, is_open, where_open, where_shut = (eval(formula, names) for formula in formulas)
        expected_y, expected_slope = (function(v, slope) for function in reference.ACTIVATIONS[name])
    np.testing.assert_allclose(y, expected_y, rtol=2 * U64)
    np.testing.assert_allclose(np.where(is_open, where_open, where_shut), g * expected_slope, rtol=4 * U64)


def test_reference_of_two_values_is_plus_and_minus_one():
    y = reference.batchnorm([[1.0], [3.0]], eps=0.0, training=True)
    assert y.tolist() == [[-1.0], [1.0]]


def test_reference_normalizes_to_beta_and_gamma():
    x = make_random((50, 3, 7), 1, np.float64)
    y = reference.batchnorm(x, [2.0, -1.0, 0.5], [1.0, 2.0, 3.0], eps=0.0, training=True)
    bound = 4 * x[:, 0].size * U64
    assert np.abs(y.mean(axis=(0, 2)) - [1, 2, 3]).max() <= bound
    assert np.abs(y.std(axis=(0, 2)) - [2, 1, 0.5]).max() <= bound


@pytest.mark.parametrize("shape", SMALL, ids=shape_id)
def test_reference_statistics_are_exact_on_exact_data(shape):
    exact = make_exact(shape, 1, np.float64)
    stats = reference.batchnorm_stats(exact.x, axis=1)
    assert stats.count == exact.count
    np.testing.assert_array_equal(stats.mean, exact.mean)
    np.testing.assert_array_equal(stats.m2, exact.m2)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6], ids="offset-{:g}".format)
def test_reference_statistics_agree_with_rational_arithmetic(offset):
    x = make_random((16, 3, 8), 1, np.float32, offset=offset)
    stats = reference.batchnorm_stats(x, axis=1)
    for channel, exact in enumerate(exact_statistics(x, 1)):
        bound = exact.count * U64
        assert abs(stats.mean[channel] - float(exact.mean)) <= bound * max(abs(float(exact.mean)), exact.std)
        assert abs(stats.m2[channel] - float(exact.m2)) <= 4 * bound * float(exact.m2)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_reference_backward_agrees_with_central_differences(activation, residual, training):
    shape, axis = (3, 2, 2, 2), 1
    x = make_random(shape, axis, np.float64, seed=1)
    gamma, beta = make_parameters(2, np.float64, seed=2)
    added = make_random(shape, axis, np.float64, seed=3) if residual else None
    dy = make_random(shape, axis, np.float64, seed=4)
    inputs = {"dx": x, "dgamma": gamma, "dbeta": beta} | ({"dresidual": added} if residual else {})

    def forward():
        # Batch statistics, or fixed ones that must not be updated.
        fixed = {} if training else {"running_mean": np.array([0.1, -0.2]), "running_var": np.array([0.5, 2.0])}
        return reference.batchnorm_forward(
            x, gamma, beta, axis=axis, training=training, activation=activation, residual=added, **fixed
        )

    _y, cache = forward()
    # A kink within a step would spoil the difference, not the gradient.
    step = central_difference_step(1.0)
    assert np.abs(cache.v).min() > 16 * step
    gradients = reference.batchnorm_backward(dy, cache)
    for name, values in inputs.items():
        analytic = getattr(gradients, name)
        for index in np.ndindex(values.shape):
            saved = values[index]
            values[index] = saved + step
            above = float((forward()[0] * dy).sum())
            values[index] = saved - step
            below = float((forward()[0] * dy).sum())
            values[index] = saved
            atol = central_difference_atol(float(np.abs(dy).sum()) * 4, step)
            assert abs(analytic[index] - (above - below) / (2 * step)) <= atol, (name, index)


def test_reference_relu_keeps_nan_and_passes_its_gradient():
    v = np.array([-math.inf, -1.0, -0.0, 0.0, 1.0, math.inf, math.nan])
    forward, slope = reference.ACTIVATIONS["relu"]
    np.testing.assert_array_equal(forward(v, 0.01), [0, 0, 0, 0, 1, math.inf, math.nan])
    np.testing.assert_array_equal(slope(v, 0.01), [0, 0, 0, 0, 1, 1, 1])


def test_reference_merge_equals_statistics_of_both():
    x = make_exact((32, 3), 1, np.float64).x
    merged = reference.merge(reference.batchnorm_stats(x[:16]), reference.batchnorm_stats(x[16:]))
    whole = reference.batchnorm_stats(x)
    assert merged.count == whole.count
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=0, atol=x.size * U64 * np.abs(x).max())
    np.testing.assert_allclose(merged.m2, whole.m2, rtol=x.size * U64)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_reference_agrees_with_torch(training):
    torch = pytest.importorskip("torch")
    x = make_random((4, 3, 5, 6), 1, np.float64)
    gamma, beta = make_parameters(3, np.float64)
    mean, var = np.array([0.5, -1.0, 2.0]), np.array([1.5, 0.25, 3.0])
    t_mean, t_var = torch.tensor(mean), torch.tensor(var)
    t = [torch.tensor(values, requires_grad=True) for values in (x, gamma, beta)]
    t_y = torch.nn.functional.batch_norm(t[0], t_mean, t_var, t[1], t[2], training=training)
    dy = make_random(x.shape, 1, np.float64, seed=5)
    t_y.backward(torch.tensor(dy))
    y, cache = reference.batchnorm_forward(x, gamma, beta, running_mean=mean, running_var=var, training=training)
    gradients = reference.batchnorm_backward(dy, cache)
    pairs = [(y, t_y.detach()), (mean, t_mean), (var, t_var)]
    pairs += [(gradients.dx, t[0].grad), (gradients.dgamma, t[1].grad), (gradients.dbeta, t[2].grad)]
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=torch_rtol(np.float64, 120) * np.abs(ours).max())
