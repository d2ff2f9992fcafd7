"""The trainer's layers and loss: gradients against central differences, everything against PyTorch, state."""

import inspect
import re

import numpy as np
import pytest

import fastbn
from fastbn import nn
from fastbn.nn.conv import without_input_gradient
from fastbn.nn.models import digits_cnn

STEP = 1e-6  # central differences in float64: truncation STEP^2, rounding 1e-16 / STEP
GRADIENT = {"rtol": 1e-6, "atol": 1e-8}
TORCH64 = {"rtol": 1e-10, "atol": 1e-12}


def numeric_gradient(function, x):
    """Central differences of the scalar `function()` for every element of `x`, which is changed and restored."""
    gradient = np.empty_like(x)
    for index in np.ndindex(x.shape):
        value = x[index]
        x[index] = value + STEP
        above = function()
        x[index] = value - STEP
        gradient[index] = (above - function()) / (2 * STEP)
        x[index] = value
    return gradient


def conv(*args, **kwargs):
    return nn.Conv2d(*args, **kwargs, rng=3, dtype=np.float64)


def norm(channels, **kwargs):
    return fastbn.BatchNorm2d(channels, **kwargs, dtype=np.float64)


class Join(nn.Layer):
    """`AddReLU` with x as its residual, as a layer of one input."""

    def __init__(self):
        self.layers = (nn.AddReLU(),)

    def forward(self, x):
        return self.layers[0].forward(x, 2 * x)

    def backward(self, dy):
        dx, dresidual = self.layers[0].backward(dy)
        return dx + 2 * dresidual


# Images are given as (N, C, H, W); a factory of one argument gets the layout, and is tested in both.
LAYERS = {
    "conv": (lambda layout: conv(2, 3, 3, layout=layout), (2, 2, 5, 6)),
    "conv-padding": (lambda layout: conv(3, 2, 3, padding=1, layout=layout), (2, 3, 4, 5)),
    "conv-same": (lambda layout: conv(2, 3, 4, padding="same", layout=layout), (2, 2, 4, 5)),
    "conv-same-stride": (lambda layout: conv(1, 2, 3, stride=2, padding="same", layout=layout), (1, 1, 6, 7)),
    "conv-stride": (lambda layout: conv(2, 3, 3, stride=2, padding=1, layout=layout), (2, 2, 6, 5)),
    "conv-stride-beyond-kernel": (lambda layout: conv(2, 2, 1, stride=2, layout=layout), (2, 2, 5, 4)),
    "conv-no-bias": (lambda layout: conv(2, 3, 2, bias=False, layout=layout), (1, 2, 3, 3)),
    "conv-wide-padding": (lambda layout: conv(1, 2, 2, padding=3, layout=layout), (2, 1, 2, 3)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, padding=1, rng=3, dtype=np.float64), (2, 2, 5)),
    "conv1d-stride": (lambda: nn.Conv1d(3, 2, 2, stride=2, layout="NLC", rng=3, dtype=np.float64), (2, 6, 3)),
    "linear": (lambda: nn.Linear(5, 4, rng=3, dtype=np.float64), (3, 5)),
    "linear-no-bias": (lambda: nn.Linear(5, 4, bias=False, rng=3, dtype=np.float64), (3, 5)),
    "relu": (nn.ReLU, (3, 4, 2)),
    "sigmoid": (nn.Sigmoid, (3, 4, 2)),
    "pool": (lambda layout: nn.MaxPool2d(2, layout=layout), (2, 3, 4, 6)),
    "pool-rest": (lambda layout: nn.MaxPool2d(2, layout=layout), (2, 3, 5, 7)),
    "pool-overlap": (lambda layout: nn.MaxPool2d(3, 1, layout=layout), (2, 2, 5, 4)),
    "pool-gaps": (lambda layout: nn.MaxPool2d(2, stride=3, layout=layout), (1, 2, 6, 7)),
    "pool-padding": (lambda layout: nn.MaxPool2d(3, 2, 1, layout=layout), (2, 3, 6, 5)),
    "average": (lambda layout: nn.AvgPool2d(2, layout=layout), (2, 3, 5, 4)),
    "average-padding": (lambda layout: nn.AvgPool2d(3, 1, 1, layout=layout), (2, 2, 4, 3)),
    "global-average": (lambda layout: nn.GlobalAvgPool2d(layout=layout), (2, 3, 4, 3)),
    "flatten": (nn.Flatten, (2, 3, 2, 2)),
    "columns": (lambda layout: nn.Columns(layout), (2, 3, 4, 5)),
    "subsample": (lambda layout: nn.Subsample(2, layout), (2, 3, 4, 5)),
    "batchnorm": (lambda layout: norm(3, layout=layout), (4, 3, 2, 3)),
    "add-relu": (Join, (3, 4)),
    "concat": (
        lambda layout: nn.Concat(
            conv(2, 3, 1, layout=layout),
            nn.Sequential(conv(2, 1, 3, padding=1, layout=layout), norm(1, layout=layout)),
            nn.AvgPool2d(3, 1, 1, layout=layout),
            layout=layout,
        ),
        (2, 2, 3, 4),
    ),
    "residual": (
        lambda layout: nn.Residual(
            nn.Sequential(conv(2, 2, 3, padding=1, layout=layout)), norm(2, layout=layout, activation="relu")
        ),
        (2, 2, 3, 4),
    ),
    "residual-shortcut": (
        lambda layout: nn.Residual(
            conv(2, 4, 3, stride=2, padding=1, layout=layout), nn.AddReLU(), nn.Subsample(2, layout)
        ),
        (2, 2, 5, 4),
    ),
    "sequential": (
        lambda layout: nn.Sequential(
            conv(1, 2, 3, padding=1, layout=layout),
            norm(2, layout=layout),
            nn.ReLU(),
            nn.Sequential(nn.MaxPool2d(2, layout=layout), nn.Flatten()),
            nn.Linear(8, 3, rng=3, dtype=np.float64),
        ),
        (3, 1, 4, 4),
    ),
}
CASES = [
    pytest.param(name, layout, id="-".join(filter(None, (name, layout))))
    for name, (make, _) in LAYERS.items()
    for layout in (("NCHW", "NHWC") if [*inspect.signature(make).parameters] == ["layout"] else (None,))
]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_gradients_match_central_differences(name, layout):
    make, shape = LAYERS[name]
    layer = make() if layout is None else make(layout)
    rng = np.random.default_rng(7)
    x = rng.standard_normal(shape)
    if layout == "NHWC":
        x = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    untouched = x.copy()
    layer.train()
    weights = rng.standard_normal(layer.forward(x).shape)  # the scalar is sum(weights * y), so that dy = weights

    def function():
        return float((layer.forward(x) * weights).sum())

    layer.forward(x)
    dx = layer.backward(weights)
    assert dx.shape == x.shape and dx.dtype == x.dtype
    np.testing.assert_array_equal(x, untouched)
    pairs = [(value, gradient.copy()) for value, gradient in nn.parameters(layer)]
    np.testing.assert_allclose(dx, numeric_gradient(function, x), **GRADIENT)
    for value, gradient in pairs:
        assert gradient.shape == value.shape and gradient.dtype == value.dtype
        np.testing.assert_allclose(gradient, numeric_gradient(function, value), **GRADIENT)


def test_loss_gradient_matches_central_differences():
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((5, 4)), np.array([0, 3, 1, 1, 2])
    _, dlogits = nn.softmax_cross_entropy(logits, labels)
    expected = numeric_gradient(lambda: nn.softmax_cross_entropy(logits, labels)[0], logits)
    np.testing.assert_allclose(dlogits, expected, **GRADIENT)


def test_loss_is_stable_for_large_logits():
    loss, dlogits = nn.softmax_cross_entropy(np.array([[1e4, 0.0], [0.0, -1e4]], np.float32), np.array([0, 1]))
    assert loss == 5000
    np.testing.assert_array_equal(dlogits, [[0, 0], [0.5, -0.5]])
    assert dlogits.dtype == np.float32


def test_maxpool_gives_the_gradient_of_equal_values_to_the_first():
    pool = nn.MaxPool2d(2)
    pool.forward(np.ones((1, 1, 2, 2)))
    np.testing.assert_array_equal(pool.backward(np.full((1, 1, 1, 1), 5.0)), [[[[5, 0], [0, 0]]]])


def test_window_larger_than_image_is_an_error():
    for layer in (nn.Conv2d(1, 1, 3), nn.MaxPool2d(3), nn.AvgPool2d(3)):
        with pytest.raises(ValueError, match="expected height and width of at least"):
            layer.forward(np.zeros((1, 1, 5, 2), np.float32))


READ_ONLY = {"conv": nn.Conv2d(2, 2, 3, padding=1, rng=0), "max": nn.MaxPool2d(2), "average": nn.AvgPool2d(2)}


@pytest.mark.parametrize("name", READ_ONLY)
def test_arrays_may_be_read_only_or_strided(name):
    layer = READ_ONLY[name]
    x = np.random.default_rng(0).random((2, 2, 4, 4), np.float32)
    expected = layer(x)
    dx = layer.backward(np.ones_like(expected))
    x.flags.writeable = False
    for same in (x, np.asfortranarray(x)):
        np.testing.assert_array_equal(layer(same), expected)
        np.testing.assert_array_equal(layer.backward(np.broadcast_to(np.float32(1), expected.shape)), dx)


def test_wrong_channels_are_an_error():
    for layer, shape in ((nn.Conv2d(3, 1, 1), (2, 4, 5, 5)), (nn.Conv1d(3, 1, 1), (2, 4, 5))):
        with pytest.raises(ValueError, match="x: expected 3 channels"):
            layer.forward(np.zeros(shape, np.float32))


def test_no_images_and_other_ranks_are_an_error():
    for layer, shape in ((nn.Conv2d(3, 1, 1), (0, 3, 5, 5)), (nn.Conv1d(3, 1, 1), (0, 3, 5))):
        with pytest.raises(ValueError, match=f"x: expected at least one image, got shape {re.escape(str(shape))}"):
            layer.forward(np.zeros(shape, np.float32))
        with pytest.raises(ValueError, match=f"x: expected {len(shape)} dimensions, got shape"):
            layer.forward(np.zeros(shape[1:], np.float32))


def test_gradient_of_images_is_left_out_on_request():
    x, dy = np.random.default_rng(0).random((2, 3, 2, 6, 6))
    layers = [nn.Conv2d(2, 2, 3, padding=1, rng=0, dtype=np.float64) for _ in range(2)]
    model = nn.Sequential(nn.Sequential(layers[0], nn.ReLU()))
    with without_input_gradient(model):
        for layer in layers:
            layer.forward(x)
        assert np.isnan(layers[0].backward(dy)).all()
        assert not np.isnan(layers[1].backward(dy)).any()
    for name in ("weight_grad", "bias_grad"):
        np.testing.assert_array_equal(getattr(layers[0], name), getattr(layers[1], name))
    assert not np.isnan(layers[0].backward(dy)).any()
    with without_input_gradient(nn.Sequential(nn.ReLU(), layers[0])):
        assert not np.isnan(layers[0].backward(dy)).any()


def test_what_asks_for_no_gradient_of_images_keeps_its_setting():
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    for setting in (False, True):
        model.layers[0].input_gradient = setting
        with without_input_gradient(model):
            assert not model.layers[0].input_gradient
        assert model.layers[0].input_gradient is setting


def test_relu_lets_nothing_through_where_it_is_shut():
    """As the fused one: also of an infinite gradient nothing, not NaN."""
    x, dy = np.array([[-1, 0, 1, np.nan]], "f4"), np.array([[np.inf, np.nan, 2, 3]], "f4")
    relu, join = nn.ReLU(), nn.AddReLU()
    relu(x), join(x, np.zeros_like(x))
    np.testing.assert_array_equal(relu.backward(dy), [[0, 0, 2, 3]])
    for dx in join.backward(dy):
        np.testing.assert_array_equal(dx, [[0, 0, 2, 3]])
        assert dx.dtype == np.float32


def test_dtype_of_a_convolution_that_has_no_loops_is_an_error():
    with pytest.raises(ValueError, match="dtype: expected float32 or float64, got float16"):
        nn.MODELS["cnn_bn"](dtype=np.float16)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_no_images_pass_through_what_has_no_parameters(layout):
    x = np.zeros((0, 3, 6, 8) if layout == "NCHW" else (0, 6, 8, 3), np.float32)
    for pool in (nn.MaxPool2d(2, layout=layout), nn.AvgPool2d(2, layout=layout)):
        y = pool(x)
        assert y.shape == ((0, 3, 3, 4) if layout == "NCHW" else (0, 3, 4, 3))
        assert pool.backward(y).shape == x.shape
        assert nn.Flatten()(y).shape == (0, 36)
    assert nn.predict(nn.Sequential(nn.Flatten()), x).shape == (0,)


def test_wide_padding_of_a_pool_is_an_error():
    with pytest.raises(ValueError, match="padding: expected 0 to half of kernel_size 3, got 2"):
        nn.MaxPool2d(3, padding=2)


def test_initial_weights_follow_pytorch():
    layer = nn.Conv2d(8, 64, 3, rng=0)
    for parameter in (layer.weight, layer.bias):
        assert parameter.dtype == np.float32
        assert 0.95 / 72**0.5 < np.abs(parameter).max() <= 1 / 72**0.5
    np.testing.assert_array_equal(layer.weight, nn.Conv2d(8, 64, 3, rng=0).weight)


def test_train_and_eval_reach_every_layer():
    model = nn.Sequential(nn.Sequential(fastbn.BatchNorm2d(1), nn.ReLU()))
    batchnorm, relu = model.layers[0].layers
    assert model.eval() is model
    assert not batchnorm.training and not relu.training
    assert model.train() is model
    assert batchnorm.training and relu.training
    model.train(False)
    assert not batchnorm.training and not relu.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 0}, "kernel_size: expected an integer of at least 1, got 0"),
        ({"kernel_size": (3, 3)}, r"kernel_size: expected an integer of at least 1, got \(3, 3\)"),
        ({"kernel_size": 3, "stride": 0}, "stride: expected an integer of at least 1, got 0"),
        ({"kernel_size": 3, "padding": -1}, "padding: expected an integer of at least 0"),
        ({"kernel_size": 3, "padding": "valid"}, 'padding: expected an integer of at least 0 or "same", got .valid.'),
    ],
    ids=str,
)
def test_conv_refuses_sizes_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        nn.Conv2d(1, 1, **options)
    if "padding" not in options:
        with pytest.raises(ValueError, match=message):
            nn.MaxPool2d(**options)


def test_load_state_dict_copies_and_refuses_what_does_not_fit():
    source, target = digits_cnn(rng=0), digits_cnn(rng=1)
    target.load_state_dict(source.state_dict())
    for name, value in target.state_dict().items():
        np.testing.assert_array_equal(value, source.state_dict()[name])
    target.layers[0].weight += 1  # copied: the source does not follow
    assert not np.array_equal(target.layers[0].weight, source.layers[0].weight)
    with pytest.raises(ValueError, match="expected"):
        target.load_state_dict(digits_cnn(False).state_dict())
    with pytest.raises(ValueError, match="weight: expected shape"):
        target.load_state_dict(source.state_dict() | {"0.weight": np.zeros((16, 1, 5, 5), np.float32)})
    last = max(name for name in target.state_dict() if name.endswith(".weight"))
    before = target.state_dict()
    with pytest.raises(ValueError, match="weight: expected shape"):  # a layer behind others, which stay as they are
        target.load_state_dict(digits_cnn(rng=2).state_dict() | {last: np.zeros(1, np.float32)})
    for name, value in target.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


# ---- PyTorch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "shape"),
    [(1, 1, 0, (2, 3, 4, 4)), (3, 2, 1, (2, 4, 9, 7)), (5, 3, 2, (1, 2, 11, 8)), (2, 3, 0, (3, 1, 7, 9))],
)
def test_conv_and_pool_match_pytorch(kernel, stride, padding, shape):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape)
    layer = nn.Conv2d(shape[1], 5, kernel, stride, padding, rng=0, dtype=np.float64)
    twin = torch.nn.Conv2d(shape[1], 5, kernel, stride, padding).double()
    twin.load_state_dict({name: torch.from_numpy(value) for name, value in layer.state_dict().items()})
    for ours, theirs in ((layer, twin), (nn.MaxPool2d(kernel, stride), torch.nn.MaxPool2d(kernel, stride))):
        their_x = torch.from_numpy(x).requires_grad_()
        their_y = theirs(their_x)
        y = ours.forward(x)
        np.testing.assert_allclose(y, their_y.detach().numpy(), **TORCH64)
        dy = rng.standard_normal(y.shape)
        their_y.backward(torch.from_numpy(dy))
        np.testing.assert_allclose(ours.backward(dy), their_x.grad.numpy(), **TORCH64)
    np.testing.assert_allclose(layer.weight_grad, twin.weight.grad.numpy(), **TORCH64)
    np.testing.assert_allclose(layer.bias_grad, twin.bias.grad.numpy(), **TORCH64)
