"""Batch normalization folded into the convolution before it."""

import numpy as np
import pytest

import fastbn
from fastbn import nn


def vectors(rng, channels, dtype=np.float64):
    mean, var, gamma, beta, bias = rng.random((5, channels)) + 0.5
    return {"running_mean": mean, "running_var": var, "gamma": gamma, "beta": beta}, bias


@pytest.mark.parametrize("missing", [(), ("gamma",), ("beta",), ("gamma", "beta")])
@pytest.mark.parametrize("has_bias", [True, False])
def test_folding_a_matrix_is_batchnorm_of_the_product(missing, has_bias):
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((7, 5)), rng.standard_normal((3, 5))
    options, bias = vectors(rng, 3)
    options = {name: value for name, value in options.items() if name not in missing}
    folded, shift = fastbn.fold_into_conv(weight, bias if has_bias else None, **options, eps=0.1)
    product = x @ weight.T + (bias if has_bias else 0)
    expected = fastbn.batchnorm(product, **options, training=False, eps=0.1)
    np.testing.assert_allclose(x @ folded.T + shift, expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_folding_keeps_the_dtype_and_its_arguments(dtype):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((3, 2, 3, 3)).astype(dtype)
    options, bias = vectors(rng, 3)
    before = weight.copy()
    folded, shift = fastbn.fold_into_conv(weight, bias, **options)
    assert folded.dtype == shift.dtype == dtype and folded.shape == weight.shape and shift.shape == (3,)
    np.testing.assert_array_equal(weight, before)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"running_var": np.ones(2)},
            fastbn.ShapeError,
            r"running_var: .* for the 3 channels of weight, got \(2,\)",
        ),
        ({"bias": 1.0}, fastbn.ShapeError, r"bias: expected shape \(3,\).*got \(\)"),
        ({"gamma": np.ones(3, int)}, fastbn.DTypeError, "gamma: expected a floating-point dtype"),
        ({"weight": np.ones((3, 2), int)}, fastbn.DTypeError, "expected a floating-point dtype"),
        ({"weight": np.float64(1)}, fastbn.ShapeError, r"weight: expected shape \(C, ...\), got \(\)"),
        ({"eps": -1.0}, fastbn.ArgumentError, "eps: expected"),
    ],
)
def test_folding_refuses_what_does_not_fit(change, error, message):
    arguments = {"weight": np.ones((3, 2)), "bias": None, "running_mean": np.zeros(3), "running_var": np.ones(3)}
    with pytest.raises(error, match=message):
        fastbn.fold_into_conv(**arguments | change)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("name", ["cnn_bn", "cnn1d", "mlp_relu", "bn_inception_small"])
def test_folded_model_gives_the_same_logits(name, layout):
    rng = np.random.default_rng(0)
    model = nn.MODELS[name](input_shape=(1, 12, 12), layout=layout, rng=rng)
    x = rng.random((16, 1, 12, 12), np.float32)
    x = x if layout == "NCHW" else x.transpose(0, 2, 3, 1)
    for _ in range(3):
        model.forward(x)
    folded = nn.fold(model)
    model.eval()
    expected = model.forward(x)
    np.testing.assert_allclose(folded.forward(x), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    norms = [[part for part in nn.walk(net) if hasattr(part, "running_mean")] for net in (model, folded)]
    assert norms[0] and not norms[1]


def test_folding_takes_identity_as_none():
    model = nn.Sequential(nn.Linear(3, 2, rng=0), fastbn.BatchNorm1d(2, activation="identity"))
    assert [type(layer) for layer in nn.fold(model).layers] == [nn.Linear]


def test_folding_leaves_batchnorm_behind_an_activation():
    model = nn.MODELS["keras_cnn"](input_shape=(1, 8, 8), rng=0)
    x = np.random.default_rng(0).random((4, 8, 8, 1), np.float32)
    model.forward(x)
    folded = nn.fold(model)
    model.eval()
    np.testing.assert_array_equal(folded.forward(x), model.forward(x))
