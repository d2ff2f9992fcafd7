"""The experiments: how they are judged, resumed and reported, and a quick run of all of them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import fastbn
from fastbn import cli, nn
from fastbn.nn.experiments import (
    EXPERIMENTS,
    Criterion,
    Experiment,
    Panel,
    RecordError,
    Result,
    draw,
    judge,
    line,
    page,
    read,
    run,
)
from fastbn.nn.experiments.common import Grouped, halved, learn, steps_to, training
from fastbn.nn.plain import PlainBatchNorm2d

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "docs" / "experiments"
published = pytest.mark.skipif(not PUBLISHED.exists(), reason="not a source tree")


@pytest.fixture(scope="module")
def digits():
    return nn.load_digits()


# ---- judging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("comparison", "values", "holds"),
    [
        (">=", [5.0, 9.0, 1.0], True),  # the median is the threshold
        (">=", [4.9, 9.0, 1.0], False),
        ("<=", [5.0, 9.0, 1.0], True),
        ("<=", [5.1, 9.0, 1.0], False),
        (">=", [4.0, 7.0], True),  # between the two in the middle
        (">=", [math.nan, 9.0, 9.0], False),  # what could not be measured is no success
        ("<=", [math.nan, 1.0, 1.0], False),
        (">=", [math.inf, math.inf, 1.0], True),
    ],
)
def test_verdict_compares_the_median_with_the_threshold(comparison, values, holds):
    criterion = Criterion("value", "what it is", comparison, 5)
    [verdict] = judge([criterion], [{"value": value, "other": 0.0} for value in values])
    assert verdict.holds is holds


def test_verdict_has_the_spread():
    [verdict] = judge([Criterion("value", "what it is", ">=", 5)], [{"value": value} for value in (3.0, 8.0, 4.0)])
    assert (verdict.median, verdict.lowest, verdict.highest) == (4, 3, 8)


def synthetic(measure, threshold=5.0, setting=None):
    return Experiment(
        title="Synthetic",
        claim="Seeds grow.",
        source="no paper",
        measure=measure,
        criteria=[Criterion("ten", "ten times the seed", ">=", threshold), Criterion("seed", "the seed", "<=", 0)],
        panels=[Panel("Panel", "x", "y", log="xy")],
        setting={"images": 7, "test_images": 3, **(setting or {})},
        quick={"images": 2, "test_images": 3},
    )


class Measure:
    """Notes the seeds it was called with; `fails_at` raises as Ctrl-C does."""

    __name__ = "synthetic"

    def __init__(self, fails_at=None):
        self.seeds, self.fails_at = [], fails_at

    def __call__(self, data, seed, **options):
        assert len(data.x_test) == 3
        if seed == self.fails_at:
            raise KeyboardInterrupt
        self.seeds.append(seed)
        self.images = data.x_train
        return Result({"ten": 10.0 * seed, "seed": seed}, [{"label": ([1, 2], [1.0, math.nan if seed else 3.0])}])


def run_synthetic(experiment, seeds, path, digits, **options):
    return run(experiment, seeds, path, lambda: digits, "digits", log=lambda text: None, **options)


def test_run_continues_where_it_was_interrupted(tmp_path, digits):
    path = tmp_path / "synthetic.json"
    first = Measure(fails_at=2)
    with pytest.raises(KeyboardInterrupt):
        run_synthetic(synthetic(first), range(4), path, digits)
    before = read(path)["runs"]
    assert first.seeds == [0, 1] and list(before) == ["0", "1"]

    second = Measure()
    record = run_synthetic(synthetic(second), range(4), path, digits)
    assert second.seeds == [2, 3] and list(record["runs"]) == ["0", "1", "2", "3"]
    assert record == read(path) and {seed: record["runs"][seed] for seed in before} == before

    third = Measure()
    assert run_synthetic(synthetic(third), range(2), path, digits) == record  # fewer seeds: nothing is lost
    assert third.seeds == []


def test_run_with_another_setting_destroys_nothing(tmp_path, digits):
    path = tmp_path / "synthetic.json"
    run_synthetic(synthetic(Measure()), [0], path, digits)
    before = path.read_bytes()
    for experiment, options in (
        (synthetic(Measure(), setting={"steps": 5}), {}),
        (synthetic(Measure()), {"quick": True}),
    ):
        with pytest.raises(RecordError, match="measured with another setting"):
            run_synthetic(experiment, [0, 1], path, digits, **options)
    assert path.read_bytes() == before
    for text in ("{", "{}", "[]"):
        path.write_text(text)
        with pytest.raises(RecordError, match="no record of an experiment"):
            run_synthetic(synthetic(Measure()), [0], path, digits)


def test_run_is_not_continued_on_another_machine(tmp_path, digits, monkeypatch):
    """It may still be read: whoever asks for the seeds that it has gets them."""
    path = tmp_path / "synthetic.json"
    record = run_synthetic(synthetic(Measure()), [0], path, digits)
    monkeypatch.setattr(np, "__version__", "0.1")
    assert run_synthetic(synthetic(Measure()), [0], path, digits) == record
    with pytest.raises(RecordError, match=rf"begun with numpy {record['machine']['numpy']}, isa \w+; remove it"):
        run_synthetic(synthetic(Measure()), [0, 1], path, digits)
    assert read(path) == record


def test_too_few_images_are_an_error(tmp_path, digits):
    for many in ({"images": 10_000}, {"test_images": 10_000}):
        with pytest.raises(nn.DataError, match="data: expected at least"):
            run_synthetic(synthetic(Measure(), setting=many), [0], tmp_path / "record.json", digits)


def test_seed_decides_the_images(tmp_path, digits):
    chosen = []
    for number, seed in enumerate((0, 0, 1)):
        measure = Measure()
        run_synthetic(synthetic(measure), [seed], tmp_path / f"{number}.json", digits)
        chosen.append(measure.images)
    assert len(chosen[0]) == 7
    np.testing.assert_array_equal(chosen[0], chosen[1])
    assert not np.array_equal(chosen[0], chosen[2])


# ---- reporting -------------------------------------------------------------------------------------------------------


def test_line_and_page_say_which_criteria_hold(tmp_path, digits):
    experiment = synthetic(Measure())
    record = run_synthetic(experiment, range(3), tmp_path / "a.json", digits)
    text = line(experiment, record)
    assert text.startswith("synthetic: 1 of 2 criteria hold: ten times the seed: 10 (0 to 20), at least 5; ")
    assert text.endswith("[3 seeds]") and "\n" not in text
    content = page([(experiment, record)], "folder")
    assert content.count("| ten times the seed | at least 5 | 10 (0 to 20) | holds |") == 2  # above and in its section
    assert content.count("| the seed | at most 0 | 1 (0 to 2) | **fails** |") == 2
    assert "![Synthetic](folder/synthetic.png)" in content and "images 7" in content and "no paper" in content

    draw(experiment, record, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_line_of_a_quick_run_is_no_verdict(tmp_path, digits):
    experiment = synthetic(Measure())
    record = run_synthetic(experiment, [1], tmp_path / "a.json", digits, quick=True)
    assert record["setting"]["images"] == 2
    assert line(experiment, record).startswith("synthetic: quick, no verdict: ten times the seed: 10 (10 to 10), ")


def test_page_has_no_quick_runs(quick, tmp_path, monkeypatch):
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "order.json").write_bytes((quick / "order.json").read_bytes())
    record = read(quick / "cost.json")
    (folder / "cost.json").write_text(json.dumps(record | {"quick": False, "setting": {"data": "x", "images": 1}}))
    monkeypatch.setattr("fastbn.cli.experiment.experiments.run", lambda *args, **options: read(folder / "cost.json"))
    monkeypatch.chdir(folder)
    assert cli.main(["experiment", "cost", "--data", "digits", "--output", "."]) == 0
    page = (tmp_path / "mixed.md").read_text()
    assert EXPERIMENTS["cost"].title in page and EXPERIMENTS["order"].title not in page


@published
def test_published_page_is_what_the_records_say():
    records = [(experiment, read(PUBLISHED / f"{name}.json")) for name, experiment in EXPERIMENTS.items()]
    assert (ROOT / "docs" / "experiments.md").read_text() == page(records, "experiments")


@published
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_published_run_is_of_this_version_with_five_seeds(name):
    record = read(PUBLISHED / f"{name}.json")
    expected = {"data": "fashion-mnist", **EXPERIMENTS[name].setting}
    assert record["setting"] == json.loads(json.dumps(expected)) and not record["quick"]
    assert list(record["runs"]) == ["0", "1", "2", "3", "4"]
    assert (PUBLISHED / f"{name}.png").stat().st_size < 80_000


# ---- measuring -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The folder of a quick run of all experiments."""
    folder = tmp_path_factory.mktemp("runs") / "quick"
    assert cli.main(["experiment", "all", "--quick", "--output", str(folder)]) == 0
    return folder


def value_of(folder, name):
    return read(folder / f"{name}.json")["runs"]["0"]["values"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_quick_run_measures_and_draws(quick, name):
    experiment, record = EXPERIMENTS[name], read(quick / f"{name}.json")
    run = record["runs"]["0"]
    assert record["quick"] and list(record["runs"]) == ["0"]
    assert all(math.isfinite(run["values"][criterion.value]) for criterion in experiment.criteria)
    assert len(run["curves"]) == len(experiment.panels)
    assert all(len(x) == len(y) > 0 for panel in run["curves"] for x, y in panel.values())
    assert (quick / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_quick_run_writes_no_page(quick):
    assert [path.name for path in quick.parent.iterdir()] == [quick.name]


def test_quick_run_shows_what_holds_at_any_size(quick):
    """What is so large, or so exact, that digits and one seed show it."""
    assert value_of(quick, "fewer_steps")["equal"] >= 5
    assert value_of(quick, "sigmoid")["deep"] >= 50
    assert value_of(quick, "initial_weights")["failures"] >= 3
    assert value_of(quick, "gradients")["plain"] >= 1e4  # without skips gradients grow on the way back
    assert value_of(quick, "inference")["folded"] <= 1e-5
    assert value_of(quick, "inference")["lag"] <= 0.05
    assert value_of(quick, "inference")["alone"] == 0


def test_same_seed_gives_the_same_numbers(digits):
    experiment = EXPERIMENTS["distribution"]
    options = {"steps": 40, "points": 4, "lr": 0.5, "batch_size": 60}
    first, again, other = (experiment.measure(digits, seed, **options).values for seed in (0, 0, 1))
    assert first == again != other


def test_diverged_network_answers_at_chance(digits):
    model = nn.MODELS["mlp_relu"](False, input_shape=digits.input_shape, rng=0, std=5)
    with np.errstate(all="ignore"):
        steps, accuracy = learn(model, digits, 0, lr=1e30, steps=20, points=4, batch_size=60)
    assert steps == [5, 10, 15, 20] and accuracy[-2:] == [0.1, 0.1]


def test_training_learns_and_counts_steps(digits):
    model = nn.MODELS["mlp_relu"](input_shape=digits.input_shape, rng=0)
    run = training(model, digits, 0, lr=0.1, batch_size=100)
    losses = [next(run) for _ in range(60)]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert nn.evaluate(model, digits.x_test, digits.y_test) > 0.8


def test_steps_to_an_accuracy_that_is_never_reached_are_all_steps():
    curve = ([10, 20, 30], [0.5, 0.9, 0.8])
    assert [steps_to(target, curve) for target in (0.4, 0.9, 0.95)] == [10, 20, 30]


def test_halved_images_are_means_of_four_pixels(digits):
    small = halved(digits)
    assert small.x_train.shape == (1437, 1, 4, 4) and small.x_train.dtype == np.float32
    assert small.x_test[3, 0, 1, 2] == digits.x_test[3, 0, 2:4, 4:6].mean()


def test_grouped_normalizes_each_group_by_itself():
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 6, 3, 4, 4)).astype(np.float32)
    layer, reference = Grouped(fastbn.BatchNorm2d(3), 4), fastbn.BatchNorm2d(3)
    y, dx = layer.forward(x), layer.backward(dy)
    weight_grad, bias_grad = np.zeros(3), np.zeros(3)
    for part in (slice(0, 4), slice(4, 6)):
        np.testing.assert_array_equal(y[part], reference.forward(x[part]))
        np.testing.assert_array_equal(dx[part], reference.backward(dy[part]))
        weight_grad += reference.weight_grad
        bias_grad += reference.bias_grad
    np.testing.assert_allclose(layer.norm.weight_grad, weight_grad, rtol=1e-6)
    np.testing.assert_allclose(layer.norm.bias_grad, bias_grad, rtol=1e-6)
    np.testing.assert_array_equal(layer.norm.running_mean, reference.running_mean)
    layer.eval()
    np.testing.assert_array_equal(layer.forward(x), reference.eval().forward(x))


def test_plain_numpy_normalizes_as_fastbn_does():
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 6, 3, 4, 4)).astype(np.float32)
    plain, ours = PlainBatchNorm2d(3), fastbn.BatchNorm2d(3)
    for layer in (plain, ours):
        layer.weight[...], layer.bias[...] = [1, 2, 3], [4, 5, 6]
    np.testing.assert_allclose(plain.forward(x), ours.forward(x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(plain.backward(dy), ours.backward(dy), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(plain.weight_grad, ours.weight_grad, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(plain.bias_grad, ours.bias_grad, rtol=1e-4, atol=1e-5)
