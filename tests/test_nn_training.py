"""The training loop: accuracy on real images, reproducibility, evaluation, divergence, imports."""

import math
import subprocess
import sys

import numpy as np
import pytest

import fastbn
from fastbn import cli, nn
from fastbn.cli.train import DEFAULTS
from fastbn.nn.models import digits_cnn

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

TIMING = "images_per_second"


@pytest.fixture(scope="module")
def digits():
    return nn.load_digits()


def silent(line):
    pass


def train(data, *, epochs=2, batch_norm=True, lr=0.07, seed=0, **options):
    """(model, history) of a new network."""
    rng = np.random.default_rng(seed)
    model = digits_cnn(batch_norm, rng=rng)
    optimizer = nn.SGD(model, lr, 0.9)
    return model, nn.fit(model, optimizer, data, epochs=epochs, batch_size=64, rng=rng, log=silent, **options)


def numbers(history):
    return [{name: value for name, value in epoch.items() if name != TIMING} for epoch in history]


@pytest.mark.parametrize(("count", "size"), [(5, 2), (1, 2), (6, 2), (7, 3), (9, 4), (3, 64), (4, 1), (0, 8)])
def test_batches_are_equal_and_none_has_one_image(count, size):
    sizes = [len(part) for part in nn.data.batches(np.arange(count), size)]
    assert sum(sizes) == count and max(sizes) - min(sizes) <= 1
    assert max(sizes) <= size + (size == 2)
    assert min(sizes) > 1 or size == 1 or count < 2


def test_training_with_two_images_a_batch(digits):
    few = nn.Dataset(digits.x_train[:5], digits.y_train[:5], digits.x_test[:5], digits.y_test[:5])
    model = nn.MODELS["mlp_relu"](input_shape=few.input_shape, rng=0)
    history = nn.fit(model, nn.SGD(model, 0.1), few, epochs=1, batch_size=2, rng=0, log=silent)
    assert math.isfinite(history[0]["train_loss"])
    nn.recalibrate(model, few.x_train, 2)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        nn.recalibrate(model, few.x_train, 0)


def test_labels_are_one_class_for_each_image():
    logits, labels = np.zeros((3, 2), np.float32), np.array([0, 1, 1])
    assert nn.softmax_cross_entropy(logits, labels)[0] == pytest.approx(math.log(2))
    for wrong in (labels[:, np.newaxis], labels[:2]):
        with pytest.raises(ValueError, match=r"labels: expected shape \(3,\)"):
            nn.softmax_cross_entropy(logits, wrong)
        with pytest.raises(ValueError, match=r"labels: expected shape \(3,\)"):
            nn.evaluate(nn.Sequential(nn.Flatten()), logits, wrong)
    for wrong in (labels - 1, labels + 1):
        with pytest.raises(ValueError, match="labels: expected 0 to 1 "):
            nn.softmax_cross_entropy(logits, wrong)
    with pytest.raises(TypeError, match="labels: expected integers, got float64"):
        nn.softmax_cross_entropy(logits, labels / 2)


@pytest.mark.parametrize("optimizer", [nn.SGD, nn.Adam])
def test_optimizers_want_a_model_and_its_gradients(optimizer):
    model = nn.Linear(2, 2, rng=0)
    with pytest.raises(TypeError, match="layer: expected a layer or model, got list"):
        optimizer(nn.parameters(model), 0.1)
    with pytest.raises(ValueError, match="step: expected a backward of the model before"):
        optimizer(model, 0.1).step()


def test_digits_are_split_the_same_way_and_by_class(digits):
    assert digits.x_train.shape == (1437, 1, 8, 8) and digits.x_test.shape == (360, 1, 8, 8)
    assert digits.x_train.dtype == np.float32 and digits.x_train.min() == 0 and digits.x_train.max() == 1
    shares = np.bincount(digits.y_test) / np.bincount(np.concatenate([digits.y_train, digits.y_test]))
    assert np.abs(shares - 0.2).max() < 0.01
    np.testing.assert_array_equal(nn.load_digits().y_test, digits.y_test)


def test_default_run_reaches_97_percent(capsys):
    assert cli.main(["train"]) == 0
    output = capsys.readouterr()
    last = [line.split() for line in output.out.splitlines() if line.startswith(" ")][-1]
    assert last[0] == str(DEFAULTS["epochs"])
    assert float(last[3].rstrip("%")) >= 97
    assert output.err == ""  # no progress bar where there is no terminal


def test_same_seed_gives_the_same_numbers(digits):
    (model, history), (again, history_again) = train(digits), train(digits)
    assert numbers(history) == numbers(history_again)
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name], value)
    _, other = train(digits, seed=1)
    assert numbers(other) != numbers(history)


def test_threads_of_fastbn_do_not_change_the_numbers(digits):
    histories = []
    for threads in (1, 3):
        with fastbn.threads(threads):
            histories.append(numbers(train(digits, epochs=1)[1]))
    assert histories[0] == histories[1]


def test_history_describes_the_epochs(digits):
    lines = []
    rng = np.random.default_rng(0)
    model = digits_cnn(rng=rng)
    history = nn.fit(model, nn.SGD(model, 0.07), digits, epochs=2, batch_size=100, rng=rng, log=lines.append)
    assert [epoch["epoch"] for epoch in history] == [1, 2]
    assert history[1]["train_loss"] < history[0]["train_loss"] < math.log(10)
    assert history[1][TIMING] > 0
    assert history[1]["test_accuracy"] == nn.evaluate(model, digits.x_test, digits.y_test)
    assert len(lines) == 3 and lines[0].split()[0] == "epoch"
    assert lines[2].split()[:2] == ["2", f"{history[1]['train_loss']:.4f}"]


def test_evaluation_changes_nothing_and_does_not_depend_on_batches(digits):
    model, _ = train(digits, epochs=1)
    before = model.state_dict()
    accuracies = {nn.evaluate(model, digits.x_test, digits.y_test, batch_size=size) for size in (1, 7, 360, 1000)}
    assert len(accuracies) == 1
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_no_batch_is_left_with_one_image():
    """17 images in batches of 16 would leave one, and one value per channel has no variance."""
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((17, 4)).astype(np.float32), rng.integers(0, 2, 17)
    model = nn.Sequential(nn.Linear(4, 3, rng=rng), fastbn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2, rng=rng))
    data = nn.Dataset(x, labels, x, labels)
    assert len(nn.fit(model, nn.SGD(model, 0.1), data, epochs=1, batch_size=16, rng=rng, log=silent)) == 1


def test_divergence_ends_the_training(digits, tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "state"
    _, history = train(digits, epochs=5, batch_norm=False, lr=1e30, save_to=path)
    assert len(history) == 1 and not math.isfinite(history[0]["train_loss"])
    assert nn.checkpoint.load(path).history == []  # the last state that was sound


def test_schedules():
    assert nn.constant(7.5) == 1
    half = nn.cosine(10)
    assert [half(0), half(5), half(10), half(12)] == pytest.approx([1, 0.5, 0, 0])
    step = nn.step_decay(3)
    assert [step(0), step(2.9), step(3), step(6.5)] == pytest.approx([1, 1, 0.1, 0.01])


def test_schedule_sets_the_rate_of_every_step_and_gives_it_back(digits):
    rng = np.random.default_rng(0)
    model = digits_cnn(rng=rng)
    optimizer = nn.SGD(model, 0.5)
    rates, step = [], optimizer.step
    optimizer.step = lambda: (rates.append(optimizer.lr), step())
    data = nn.Dataset(digits.x_train[:100], digits.y_train[:100], digits.x_test, digits.y_test)
    options = {"epochs": 2, "batch_size": 50, "rng": rng, "log": silent}
    nn.fit(model, optimizer, data, schedule=lambda epochs: 1 / (1 + epochs), **options)
    assert rates == pytest.approx([0.5, 0.5 / 1.5, 0.5 / 2, 0.5 / 2.5])
    assert optimizer.lr == 0.5


def test_interrupted_training_gives_the_rate_back(digits):
    optimizer = nn.SGD(digits_cnn(), 0.5)

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nn.fit(
            optimizer.model,
            optimizer,
            digits,
            epochs=1,
            batch_size=64,
            rng=np.random.default_rng(0),
            schedule=lambda epochs: 0.1,
            augment=interrupt,
            log=lambda line: None,
        )
    assert optimizer.lr == 0.5


def test_interrupted_recalibration_changes_nothing(digits):
    model = digits_cnn(rng=0)
    model.forward(digits.x_train[:64])
    before = model.state_dict()
    model.layers[-1].forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        nn.recalibrate(model, digits.x_train[64:256])
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_states_of_optimizers_are_copies(digits):
    for kind in (nn.SGD, nn.Adam):
        model = digits_cnn(rng=0)
        optimizer = kind(model, 0.1)
        before = optimizer.state_dict()
        model.forward(digits.x_train[:64])
        model.backward(np.ones((64, 10), np.float32))
        optimizer.step()
        assert any((value != before[name]).any() for name, value in optimizer.state_dict().items() if "0" in name)
        optimizer.load_state_dict(before)
        for name, value in optimizer.state_dict().items():
            np.testing.assert_array_equal(value, before[name])


def test_augmentation_sees_training_images_only(digits):
    seen = []

    def augment(images, rng):
        seen.append(len(images))
        return images

    train(digits, epochs=1, augment=augment)
    assert sum(seen) == len(digits.x_train)


def test_dropout_keeps_the_mean_and_is_off_in_evaluation():
    layer = nn.Dropout(0.3, rng=0)
    x = np.ones((200, 500), np.float32)
    y = layer(x)
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.7)} and y.dtype == np.float32
    assert y.mean() == pytest.approx(1, abs=0.01)
    np.testing.assert_array_equal(layer.backward(x), y)
    layer.eval()
    np.testing.assert_array_equal(layer(x), x)
    np.testing.assert_array_equal(layer.backward(y), y)
    with pytest.raises(ValueError, match="p: expected a number of at least 0 and below 1, got 1"):
        nn.Dropout(1)


@pytest.mark.parametrize("size", [7, 50, 300])
def test_recalibration_gives_the_statistics_of_all_images(digits, size):
    """The first normalization sees the same in every batch size: there the result must be that of one large batch."""
    model, _ = train(digits, epochs=1)
    norms = [part for part in nn.walk(model) if hasattr(part, "running_mean")]
    options = [(norm.momentum, norm.unbiased) for norm in norms]
    x = digits.x_train[:300]
    nn.recalibrate(model, x, batch_size=size)
    stats = fastbn.batchnorm_stats(model.layers[0].forward(x))
    np.testing.assert_allclose(norms[0].running_mean, stats.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(norms[0].running_var, stats.var(), rtol=1e-5)
    assert [(norm.momentum, norm.unbiased) for norm in norms] == options
    assert not any(part.training for part in nn.walk(model))


def test_recalibration_leaves_dropout_alone_and_repairs_stale_statistics(digits):
    model, history = train(digits, epochs=3)
    dropout = nn.Dropout(0.9, rng=0)
    model = nn.Sequential(*model.layers[:-1], dropout, model.layers[-1])
    for part in nn.walk(model):
        if hasattr(part, "running_mean"):
            part.running_mean += 3
    assert nn.evaluate(model, digits.x_test, digits.y_test) < 0.9
    state = dropout.rng.bit_generator.state
    nn.recalibrate(model, digits.x_train)
    assert dropout.rng.bit_generator.state == state
    assert nn.evaluate(model, digits.x_test, digits.y_test) >= history[-1]["test_accuracy"] - 0.01


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_recalibration_replaces_whatever_was_there(dtype):
    """NaN, which has a share in every average. What is averaged are copies, also of float64."""
    x = np.random.default_rng(0).standard_normal((30, 3, 4, 5)).astype(dtype)
    x += np.arange(30, dtype=dtype).reshape(-1, 1, 1, 1)
    norm = fastbn.BatchNorm2d(3, dtype=dtype)
    norm.running_mean[...], norm.running_var[...] = np.nan, np.inf
    nn.recalibrate(nn.Sequential(norm), x, batch_size=10)
    stats = fastbn.batchnorm_stats(x)
    np.testing.assert_allclose(norm.running_mean, stats.mean, rtol=1e-5)
    np.testing.assert_allclose(norm.running_var, stats.var(), rtol=1e-5)
    assert norm.num_batches_tracked == 3


def test_recalibration_leaves_out_what_nan_guard_does():
    x = np.random.default_rng(0).standard_normal((40, 3, 4, 5)).astype("f4")
    x[25, 1] = np.nan
    norm = fastbn.BatchNorm2d(3, nan_guard="skip")
    nn.recalibrate(nn.Sequential(norm), x, batch_size=10)
    stats = fastbn.batchnorm_stats(np.delete(x, slice(20, 30), axis=0))
    np.testing.assert_allclose(norm.running_mean, stats.mean, rtol=1e-4, atol=1e-6)
    assert norm.num_batches_tracked == 3
    before = norm.state_dict()
    nn.recalibrate(nn.Sequential(norm), x[20:30])
    for name, value in norm.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_import_needs_numpy_only():
    extras = ["sklearn", "matplotlib", "safetensors", "tqdm", "threadpoolctl", "torch"]
    code = f"import sys, fastbn.cli, fastbn.nn; print(*set({extras}) & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "", "")
