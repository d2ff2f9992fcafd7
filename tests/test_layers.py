"""Layers: PyTorch's meaning, state and keys; backward; empty batches."""

import copy
import pickle

import numpy as np
import pytest

import fastbn
from problems import assert_same_bits, make_random, ulp_distance
from tolerances import running_ulp, torch_rtol

CASES = {
    "1d-nc": (fastbn.BatchNorm1d, (8, 3), "BatchNorm1d"),
    "1d-ncl": (fastbn.BatchNorm1d, (8, 3, 5), "BatchNorm1d"),
    "2d": (fastbn.BatchNorm2d, (4, 3, 5, 6), "BatchNorm2d"),
    "3d": (fastbn.BatchNorm3d, (2, 3, 4, 5, 3), "BatchNorm3d"),
}
KEYS = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def batch(shape, seed=0):
    return make_random(shape, 1, np.float32, seed)


def close(actual, expected, count):
    atol = torch_rtol(np.float32, count) * max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("track", [True, False], ids=["tracked", "untracked"])
@pytest.mark.parametrize("momentum", [0.1, None], ids=["exponential", "cumulative"])
@pytest.mark.parametrize("name", CASES)
def test_layers_agree_with_torch_over_training_and_evaluation(name, momentum, track):
    torch = pytest.importorskip("torch")
    kind, shape, torch_name = CASES[name]
    ours = kind(3, momentum=momentum, track_running_stats=track)
    theirs = getattr(torch.nn, torch_name)(3, momentum=momentum, track_running_stats=track)
    ours.weight[...] = [0.5, -1.0, 2.0]
    ours.bias[...] = [1.0, 0.0, -1.0]
    count = int(np.prod(shape)) // 3
    with torch.no_grad():
        theirs.weight.copy_(torch.from_numpy(ours.weight))
        theirs.bias.copy_(torch.from_numpy(ours.bias))
    for step, training in enumerate([True, True, False, True, False]):
        ours.train(training)
        theirs.train(training)
        x, dy = batch(shape, step), batch(shape, step + 10)
        t_x = torch.tensor(x, requires_grad=True)
        theirs.zero_grad()
        t_y = theirs(t_x)
        t_y.backward(torch.tensor(dy))
        close(ours(x), t_y.detach().numpy(), count)
        close(ours.backward(dy), t_x.grad.numpy(), count)
        close(ours.weight_grad, theirs.weight.grad.numpy(), count)
        close(ours.bias_grad, theirs.bias.grad.numpy(), count)
        state = ours.state_dict()
        wanted = {key: value.numpy() for key, value in theirs.state_dict().items()}
        assert list(state) == list(wanted)
        for key, value in wanted.items():
            assert (state[key].dtype, state[key].shape) == (value.dtype, value.shape)
            close(state[key].astype(np.float64), value.astype(np.float64), count)
        if track:
            assert state["num_batches_tracked"] == wanted["num_batches_tracked"]


def test_layers_state_goes_round_through_torch():
    torch = pytest.importorskip("torch")
    ours = fastbn.BatchNorm2d(3)
    for seed in range(3):
        ours(batch((4, 3, 5, 6), seed))
    ours.weight[...] = [0.5, -1.0, 2.0]
    theirs = torch.nn.BatchNorm2d(3)
    theirs.load_state_dict({key: torch.from_numpy(value) for key, value in ours.state_dict().items()})
    again = fastbn.BatchNorm2d(3)
    assert again.load_state_dict(theirs.state_dict()) == ([], [])
    for key, value in ours.state_dict().items():
        assert_same_bits(again.state_dict()[key], value)
    x = batch((4, 3, 5, 6), 9)
    assert_same_bits(again.eval()(x), ours.eval()(x))
    close(ours(x), theirs.eval()(torch.from_numpy(x)).detach().numpy(), 120)


def test_layers_have_torch_defaults():
    layer = fastbn.BatchNorm2d(3)
    assert list(layer.state_dict()) == KEYS
    assert layer.weight.tolist() == layer.running_var.tolist() == [1, 1, 1]
    assert layer.bias.tolist() == layer.running_mean.tolist() == [0, 0, 0]
    assert (layer.eps, layer.momentum, layer.training) == (1e-5, 0.1, True)
    assert (layer.num_batches_tracked.dtype, layer.num_batches_tracked.shape) == (np.int64, ())
    assert layer.weight_grad is None and layer.bias_grad is None


def test_layers_state_depends_on_the_options():
    assert list(fastbn.BatchNorm1d(2, affine=False).state_dict()) == KEYS[2:]
    assert list(fastbn.BatchNorm1d(2, track_running_stats=False).state_dict()) == KEYS[:2]
    assert {array.dtype.name for array in fastbn.BatchNorm1d(2, dtype=np.float64).state_dict().values()} == {
        "float64",
        "int64",
    }


def test_layers_without_parameters_have_no_gradients_of_them():
    layer = fastbn.BatchNorm1d(3, affine=False)
    x = batch((5, 3))
    layer(x)
    assert layer.backward(x).shape == x.shape
    assert layer.weight_grad is None and layer.bias_grad is None


def test_layers_cumulative_average_weighs_every_batch_alike():
    layer = fastbn.BatchNorm1d(3, momentum=None, dtype=np.float64)
    batches = [batch((8, 3), seed).astype(np.float64) for seed in range(4)]
    for x in batches:
        layer(x)
    np.testing.assert_allclose(layer.running_mean, np.mean([x.mean(axis=0) for x in batches], axis=0), rtol=1e-12)
    np.testing.assert_allclose(layer.running_var, np.mean([x.var(axis=0, ddof=1) for x in batches], axis=0), rtol=1e-12)


@pytest.mark.parametrize("momentum", [0.1, None], ids=["exponential", "cumulative"])
def test_layers_do_not_count_an_empty_batch(momentum):
    layer = fastbn.BatchNorm2d(3, momentum=momentum)
    layer(batch((2, 3, 4, 4)))
    before = layer.state_dict()
    y = layer(np.zeros((0, 3, 4, 4), np.float32))
    assert y.shape == (0, 3, 4, 4)
    assert layer.backward(y).shape == y.shape
    assert layer.weight_grad.tolist() == [0, 0, 0]
    for key, value in layer.state_dict().items():
        assert_same_bits(np.asarray(value), np.asarray(before[key]))


def test_layers_evaluate_with_the_batch_if_nothing_is_tracked():
    x = batch((6, 3))
    layer = fastbn.BatchNorm1d(3, track_running_stats=False)
    assert_same_bits(layer.eval()(x), layer.train()(x))


def test_layers_evaluation_changes_no_state():
    layer = fastbn.BatchNorm1d(3)
    layer(batch((6, 3)))
    before = {key: value.tobytes() for key, value in layer.state_dict().items()}
    layer.eval()
    y = layer(batch((6, 3), 1))
    layer.backward(y)
    assert {key: value.tobytes() for key, value in layer.state_dict().items()} == before


def test_layers_failed_forward_changes_no_state_and_keeps_the_last_cache():
    layer = fastbn.BatchNorm1d(3)
    x = batch((6, 3))
    layer(x)
    expected, before = layer.backward(x), {key: value.tobytes() for key, value in layer.state_dict().items()}
    with pytest.raises(fastbn.SingleValueError):
        layer(x[:1])
    assert {key: value.tobytes() for key, value in layer.state_dict().items()} == before
    assert_same_bits(layer.backward(x), expected)


def test_layers_take_a_residual_and_return_its_gradient():
    x, residual, dy = (batch((4, 3, 5, 6), seed) for seed in range(3))
    layer = fastbn.BatchNorm2d(3, activation="relu")
    y = layer(x, residual=residual)
    expected, cache = fastbn.batchnorm_forward(x, layer.weight, layer.bias, residual=residual, activation="relu")
    assert_same_bits(y, expected)
    dx, dresidual = layer.backward(dy)
    gradients = fastbn.batchnorm_backward(dy, cache)
    assert_same_bits(dx, gradients.dx)
    assert_same_bits(dresidual, gradients.dresidual)
    layer(x)
    assert isinstance(layer.backward(dy), np.ndarray)


def test_layers_gradients_are_set_and_not_added():
    layer = fastbn.BatchNorm1d(3)
    x = batch((6, 3))
    layer(x)
    layer.backward(x)
    first = layer.weight_grad.copy()
    layer.backward(x)
    assert_same_bits(layer.weight_grad, first)
    assert layer.weight_grad.dtype == layer.weight.dtype


@pytest.mark.parametrize(
    ("kind", "layout", "shape", "axis"),
    [
        (fastbn.BatchNorm1d, "NLC", (4, 5, 3), 2),
        (fastbn.BatchNorm2d, "NHWC", (4, 5, 6, 3), 3),
        (fastbn.BatchNorm3d, "NDHWC", (2, 4, 5, 6, 3), 4),
    ],
)
def test_layers_know_channels_last(kind, layout, shape, axis):
    x = make_random(shape, axis, np.float32)
    layer = kind(3, layout=layout)
    assert_same_bits(layer(x), fastbn.batchnorm(x, layer.weight, layer.bias, axis=axis))


def test_layers_reset_running_stats():
    layer = fastbn.BatchNorm1d(3)
    layer(batch((6, 3)))
    layer.reset_running_stats()
    assert layer.running_mean.tolist() == [0, 0, 0] and layer.running_var.tolist() == [1, 1, 1]
    assert layer.num_batches_tracked == 0
    fastbn.BatchNorm1d(3, track_running_stats=False).reset_running_stats()


def test_layers_state_is_a_copy_and_loading_writes_in_place():
    layer = fastbn.BatchNorm1d(3)
    weight = layer.weight
    state = layer.state_dict()
    state["weight"][...] = 5
    assert weight.tolist() == [1, 1, 1]
    layer.load_state_dict(state)
    assert layer.weight is weight and weight.tolist() == [5, 5, 5]


def test_layers_load_all_or_nothing():
    layer = fastbn.BatchNorm1d(3)
    state = layer.state_dict() | {"weight": np.full(3, 9.0), "running_var": np.ones(4)}
    with pytest.raises(fastbn.ShapeError, match="running_var"):
        layer.load_state_dict(state)
    assert layer.weight.tolist() == [1, 1, 1]


def test_layers_load_nothing_into_a_layer_with_a_read_only_array():
    layer, other = fastbn.BatchNorm1d(3), fastbn.BatchNorm1d(3)
    other.weight[...] = 5
    layer.running_var.flags.writeable = False
    with pytest.raises(fastbn.ReadOnlyError, match=r"^running_var: "):
        layer.load_state_dict(other.state_dict())
    assert layer.weight.tolist() == [1, 1, 1]


def test_layers_called_are_the_forward_of_a_subclass():
    class Doubled(fastbn.BatchNorm1d):
        def forward(self, x, residual=None):
            return 2 * super().forward(x, residual)

    x = np.array([[-1.0], [1.0]], np.float32)
    np.testing.assert_array_equal(Doubled(1)(x), 2 * fastbn.BatchNorm1d(1)(x))


def test_layers_load_tolerates_what_strict_forbids_and_old_checkpoints():
    layer = fastbn.BatchNorm1d(3)
    found = layer.load_state_dict({"weight": np.full(3, 9.0), "extra": 1}, strict=False)
    assert found.unexpected_keys == ["extra"] and found.missing_keys == KEYS[1:]
    assert layer.weight.tolist() == [9, 9, 9]
    old = layer.state_dict()
    del old["num_batches_tracked"]
    assert layer.load_state_dict(old).missing_keys == ["num_batches_tracked"]


def test_layers_momentum_and_unbiased_reach_the_update():
    x = batch((6, 3)).astype(np.float64)
    layer = fastbn.BatchNorm1d(3, momentum=1.0, unbiased=False)
    layer(x)
    assert ulp_distance(layer.running_var, x.var(axis=0).astype(np.float32)).max() <= running_ulp()


def test_layers_skip_a_batch_that_is_not_finite():
    """As an empty one: the cumulative average is that of the others, and the count theirs."""
    layer = fastbn.BatchNorm1d(3, momentum=None, nan_guard="skip", dtype=np.float64)
    batches = [batch((8, 3), seed) for seed in range(3)]
    batches[1][4, 1] = np.nan
    for x in batches:
        y = layer(x)
        assert np.isnan(y).any(axis=0).tolist() == [False, bool(np.isnan(x).any()), False]
        assert layer.backward(y).shape == x.shape
    assert layer.num_batches_tracked == 2
    expected = np.mean([x.astype(np.float64).mean(axis=0) for x in batches[::2]], axis=0)
    np.testing.assert_allclose(layer.running_mean, expected, rtol=1e-12)


def test_layers_raise_at_a_batch_that_is_not_finite_and_keep_their_state():
    layer = fastbn.BatchNorm1d(3, nan_guard="raise")
    x = batch((6, 3))
    layer(x)
    expected, before = layer.backward(x), {key: value.tobytes() for key, value in layer.state_dict().items()}
    with pytest.raises(fastbn.NonFiniteError, match="got NaN or Inf in 3 of 3 channels: 0, 1, 2"):
        layer(np.full((6, 3), np.inf, np.float32))
    assert {key: value.tobytes() for key, value in layer.state_dict().items()} == before
    assert_same_bits(layer.backward(x), expected)


def test_layers_count_that_cannot_be_written_leaves_the_statistics():
    layer = fastbn.BatchNorm1d(3)
    layer.num_batches_tracked.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        layer(batch((6, 3)))
    assert layer.running_mean.tolist() == [0, 0, 0] and layer.running_var.tolist() == [1, 1, 1]


def test_layers_print_what_they_are():
    layer = fastbn.BatchNorm2d(3, layout="NHWC", activation="relu")
    assert repr(layer) == (
        "BatchNorm2d(3, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True, "
        "layout='NHWC', activation='relu')"
    )
    assert "nan_guard='skip'" in repr(fastbn.BatchNorm2d(3, nan_guard="skip"))
    other = repr(fastbn.BatchNorm2d(3, dtype="f8", unbiased=False, num_threads=2))
    assert other.endswith("unbiased=False, dtype='float64', num_threads=2)")


def test_layers_dtype_may_be_none_or_a_name():
    assert fastbn.BatchNorm2d(3, dtype=None).dtype == np.float32
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert fastbn.BatchNorm2d(3, dtype="bfloat16").running_mean.dtype == ml_dtypes.bfloat16


def test_layers_are_copied_without_their_last_batch():
    layer = fastbn.BatchNorm1d(3)
    layer(batch((1000, 3)))
    assert len(pickle.dumps(layer)) < 3000
    other = copy.deepcopy(layer)
    assert_same_bits(other(batch((8, 3))), layer(batch((8, 3))))
    with pytest.raises(fastbn.ArgumentError, match="expected a call of BatchNorm1d"):
        pickle.loads(pickle.dumps(layer)).backward(batch((8, 3)))
    layer.backward(batch((8, 3)))


@pytest.mark.parametrize("count", [0, np.int64(5)], ids=["int", "NumPy's int"])
def test_layers_refuse_a_count_that_cannot_be_counted_up(count):
    layer = fastbn.BatchNorm1d(3, momentum=None)
    layer.num_batches_tracked = count
    for use in (lambda: layer(batch((8, 3))), layer.state_dict):
        with pytest.raises(fastbn.ArgumentError, match="num_batches_tracked: expected an ndarray in the layer"):
            use()
    assert layer.running_mean.tolist() == [0, 0, 0]


def test_layers_state_has_arrays_only_and_no_negative_count():
    layer = fastbn.BatchNorm1d(3)
    state = layer.state_dict()
    with pytest.raises(fastbn.ArgumentError, match="num_batches_tracked: expected a number of batches, got -1"):
        layer.load_state_dict(state | {"weight": np.zeros(3), "num_batches_tracked": np.array(-1)})
    assert layer.weight.tolist() == [1, 1, 1]
    layer.weight = [1.0, 1.0, 1.0]
    for use in (layer.state_dict, lambda: layer.load_state_dict(state)):
        with pytest.raises(fastbn.ArgumentError, match="weight: expected an ndarray in the layer, got list"):
            use()


def test_layers_of_an_empty_batch_do_not_warn_of_a_negative_variance():
    layer = fastbn.BatchNorm1d(3).eval()
    layer.running_var[...] = -1
    with np.errstate(all="raise"):
        assert layer(batch((0, 3))).shape == (0, 3)


def test_layers_name_the_key_of_a_tensor_that_numpy_cannot_read():
    torch = pytest.importorskip("torch")
    layer, theirs = fastbn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    for state in (dict(theirs.named_parameters()), theirs.bfloat16().state_dict()):
        with pytest.raises(fastbn.ArgumentError, match=r"weight: expected an array_like, got (Parameter|Tensor): "):
            layer.load_state_dict(state, strict=False)
