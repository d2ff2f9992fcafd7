"""The networks: numbers of parameters, shapes, and each against the same network in PyTorch."""

import re
from pathlib import Path

import numpy as np
import pytest

from fastbn import nn

PAGE = Path(__file__).resolve().parent.parent / "docs" / "trainer.md"

# With and without BN. Running statistics do not count.
PARAMETERS = {
    "cnn_bn": (25_674, 25_578),
    "keras_cnn": (521_354, 521_162),
    "keras_blocks": (282_442, 282_250),
    "cnn1d": (11_754, 11_690),
    "cnn2d": (251_274, 251_210),
    "mlp_sigmoid": (100_310, 99_710),
    "mlp_relu": (100_310, 99_710),
    "resnet110": (1_727_962, 1_723_914),
    "bn_inception": (11_194_984, 11_185_032),
    "bn_inception_small": (314_490, 313_242),
}
# Smaller images than by default, where the shape of the network allows it; and the batch.
SHAPES = {
    "cnn_bn": (6, 3, 9, 12),
    "keras_cnn": (6, 3, 9, 8),
    "keras_blocks": (6, 2, 9, 8),
    "cnn1d": (6, 2, 7, 9),
    "cnn2d": (6, 1, 7, 9),
    "mlp_sigmoid": (12, 1, 6, 5),
    "mlp_relu": (12, 1, 6, 5),
    "resnet110": (4, 3, 12, 16),
    "bn_inception": (3, 3, 64, 80),
    "bn_inception_small": (6, 1, 28, 28),
}


def learned(model):
    return sum(value.size for value, _ in nn.parameters(model))


def test_every_network_is_tested():
    assert set(PARAMETERS) == set(SHAPES) == set(nn.MODELS)


@pytest.mark.parametrize("name", nn.MODELS)
def test_numbers_of_parameters(name):
    with_bn, without = (nn.MODELS[name](batch_norm, rng=0) for batch_norm in (True, False))
    assert (learned(with_bn), learned(without)) == PARAMETERS[name]


@pytest.mark.skipif(not PAGE.exists(), reason="not a source tree")
def test_page_lists_all_networks_with_their_numbers_of_parameters():
    rows = re.findall(r"^\| `(\w+)` \| .* \| ([\d,]+), ([\d,]+) \|$", PAGE.read_text(), re.M)
    assert {name: tuple(int(count.replace(",", "")) for count in counts) for name, *counts in rows} == PARAMETERS


def test_keras_counts_the_running_statistics():
    state = nn.MODELS["keras_cnn"]().state_dict()
    assert sum(value.size for key, value in state.items() if not key.endswith("num_batches_tracked")) == 521_546


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("name", ["cnn_bn", "keras_cnn", "keras_blocks", "cnn1d", "cnn2d", "bn_inception_small"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_output_shape_follows_data_and_classes(name, layout, shape):
    model = nn.MODELS[name](input_shape=shape, classes=7, layout=layout, rng=0)
    x = np.random.default_rng(0).random((4, *shape), np.float32)
    y = model(x if layout == "NCHW" else x.transpose(0, 2, 3, 1))
    assert y.shape == (4, 7) and y.dtype == np.float32


def test_article_example_of_cnn_bn():
    assert nn.MODELS["cnn_bn"]()(np.zeros((4, 3, 32, 32), np.float32)).shape == (4, 10)


def test_same_seed_gives_same_weights_with_and_without_batchnorm():
    for name in ("cnn_bn", "keras_cnn", "keras_blocks", "cnn1d", "cnn2d", "mlp_sigmoid"):
        plain, normalized = (
            [value for part in nn.walk(model) if isinstance(part, nn.Layer) for value in part._state().values()]
            for model in (nn.MODELS[name](False, rng=5), nn.MODELS[name](True, rng=5))
        )
        for value, expected in zip(normalized, plain, strict=True):
            np.testing.assert_array_equal(value, expected)


def test_unknown_layout_and_depth_are_errors():
    with pytest.raises(ValueError, match="layout: expected"):
        nn.MODELS["cnn_bn"](layout="CHWN")
    with pytest.raises(ValueError, match="depth: expected 6n \\+ 2, got 100"):
        nn.MODELS["resnet110"](depth=100)


# ---- PyTorch ---------------------------------------------------------------------------------------------------------


class Twins:
    """A network of ours and PyTorch's, with the same weights."""

    def __init__(self, name, batch_norm, layout, shape, **options):
        networks = pytest.importorskip("torch_networks")
        self.torch, self.layout = networks.torch, layout
        self.ours = nn.MODELS[name](
            batch_norm, input_shape=shape, classes=5, layout=layout, rng=0, dtype=np.float64, **options
        )
        self.theirs = getattr(networks, name)(batch_norm, shape, 5, **options).double()
        self.ours.eval()
        self.ours.forward(self.arranged(np.zeros((1, *shape))))
        self.ours.train()
        self.flattened = [layer.shape[1:] for layer in nn.walk(self.ours) if isinstance(layer, nn.Flatten)]
        state = self.theirs.state_dict()
        values = self.in_their_order(self.ours.state_dict().values())
        self.theirs.load_state_dict(
            {key: self.torch.from_numpy(np.array(value)) for key, value in zip(state, values, strict=True)}
        )

    def arranged(self, images):
        return images if self.layout == "NCHW" else np.ascontiguousarray(images.transpose(0, 2, 3, 1))

    def in_their_order(self, arrays):
        """What is flattened in NHWC reaches the first linear layer in another order."""
        arrays = list(arrays)
        if self.layout == "NHWC" and self.flattened:
            size = self.flattened[0]
            order = np.moveaxis(np.arange(np.prod(size)).reshape(size), -1, 0).ravel()
            first = next(i for i, array in enumerate(arrays) if array.ndim == 2)
            arrays[first] = arrays[first][:, order]
        return arrays

    def step(self, images, labels):
        """Forward and backward of both: losses and gradients must agree."""
        loss, dlogits = nn.softmax_cross_entropy(self.ours.forward(self.arranged(images)), labels)
        dx = self.ours.backward(dlogits)
        x = self.torch.from_numpy(images).requires_grad_()
        expected = self.torch.nn.functional.cross_entropy(self.theirs(x), self.torch.from_numpy(labels))
        self.theirs.zero_grad()
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=1e-10)
        gradients = self.in_their_order([gradient for _, gradient in nn.parameters(self.ours)])
        theirs = [parameter.grad.numpy() for parameter in self.theirs.parameters()]
        # Under BN the gradient of the bias before it is 0 but for rounding; hence the absolute 1e-11.
        pairs = [*zip(gradients, theirs, strict=True), (dx, self.arranged(x.grad.numpy()))]
        for ours, expected in pairs:
            np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-11 + 1e-9 * np.abs(expected).max())

    def compare_states(self, **close):
        states = self.in_their_order(self.ours.state_dict().values()), self.theirs.state_dict().values()
        for value, expected in zip(*states, strict=True):
            np.testing.assert_allclose(value, expected.numpy(), **close)


VARIANTS = [(name, batch_norm, {}) for name in nn.MODELS for batch_norm in (True, False)]
VARIANTS += [("resnet110", batch_norm, {"skips": False, "depth": 14}) for batch_norm in (True, False)]


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(("name", "batch_norm", "options"), VARIANTS)
def test_loss_and_gradients_match_pytorch(name, batch_norm, options, layout):
    batch, *shape = SHAPES[name]
    twins = Twins(name, batch_norm, layout, shape, **options)
    rng = np.random.default_rng(1)
    twins.step(rng.random((batch, *shape)), rng.integers(0, 5, batch))
    if name != "keras_cnn":  # whose running variance is Keras's, not PyTorch's
        twins.compare_states(rtol=1e-9, atol=1e-12)


def test_bn_inception_matches_pytorch_at_full_size():
    rng = np.random.default_rng(1)
    Twins("bn_inception", True, "NCHW", (3, 224, 224)).step(rng.random((2, 3, 224, 224)), np.array([3, 1]))


OPTIMIZERS = {
    "sgd": lambda model: nn.SGD(model, 0.05, 0.9, 1e-3),
    "adam": lambda model: nn.Adam(model, 0.01, weight_decay=1e-3),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_matches_pytorch(optimizer):
    """Parameters and running statistics after four steps, and then inference."""
    twins = Twins("cnn_bn", True, "NHWC", (1, 8, 8))
    torch = twins.torch
    ours = OPTIMIZERS[optimizer](twins.ours)
    theirs = {
        "sgd": lambda p: torch.optim.SGD(p, 0.05, 0.9, weight_decay=1e-3),
        "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=1e-3),
    }[optimizer](twins.theirs.parameters())
    rng = np.random.default_rng(1)
    for _ in range(4):
        twins.step(rng.random((24, 1, 8, 8)), rng.integers(0, 5, 24))
        # Under BN the gradient of the bias before it is 0 but for rounding, and Adam makes steps of full size of that.
        for layer, theirs_layer in ((0, 0), (3, 4)):
            twins.ours.layers[layer].bias_grad[:] = 0
            twins.theirs[theirs_layer].bias.grad.zero_()
        ours.step()
        theirs.step()
    twins.compare_states(rtol=1e-6, atol=1e-8)
    x = rng.random((5, 1, 8, 8))
    twins.ours.eval()
    twins.theirs.eval()
    expected = twins.theirs(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(twins.ours(twins.arranged(x)), expected, rtol=1e-6)


def test_float32_network_matches_pytorch():
    """The precision in which networks are trained."""
    twins = Twins("cnn_bn", True, "NHWC", (3, 16, 16))
    model = nn.MODELS["cnn_bn"](input_shape=(3, 16, 16), classes=5, layout="NHWC", rng=0)
    x, labels = np.random.default_rng(1).random((8, 3, 16, 16)), np.arange(8) % 5
    twins.step(x, labels)
    _, dlogits = nn.softmax_cross_entropy(model.forward(twins.arranged(x).astype(np.float32)), labels)
    model.backward(dlogits)
    assert dlogits.dtype == np.float32
    for (_, gradient), (_, expected) in zip(nn.parameters(model), nn.parameters(twins.ours), strict=True):
        assert gradient.dtype == np.float32
        np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5)
