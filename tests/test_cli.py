"""The command line: every mistake of a user is one line and exit code 2; train, bench and info do what they say."""

import importlib.util
import json
import subprocess
import sys

import pytest

from fastbn import cli
from fastbn.cli import bench
from fastbn.nn import checkpoint

HAS_EXTRA = all(importlib.util.find_spec(name) for name in ("sklearn", "matplotlib", "safetensors", "tqdm"))
needs_extra = pytest.mark.skipif(not HAS_EXTRA, reason="needs the extra fastbn[train]")


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of the command in this process."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as exit_:  # argparse
        code = exit_.code
    output = capsys.readouterr()
    return code, output.out, output.err


# (arguments, fragment of the message); {tmp} is an empty folder
BAD = [
    ("", "the following arguments are required"),
    ("fly", "invalid choice: 'fly'"),
    ("--fly", "the following arguments are required"),
    ("info --fly", "unrecognized arguments: --fly"),
    ("train digits", "unrecognized arguments: digits"),
    ("train --epochs 0", "--epochs: expected a whole number of at least 1, got '0'"),
    ("train --epochs -3", "--epochs: expected a whole number of at least 1, got '-3'"),
    ("train --epochs 2.5", "--epochs: expected a whole number of at least 1, got '2.5'"),
    ("train --epochs", "--epochs: expected one argument"),
    ("train --batch-size 0", "--batch-size: expected a whole number of at least 1, got '0'"),
    ("train --batch-size many", "--batch-size: expected a whole number of at least 1, got 'many'"),
    ("train --model alexnet", "--model: invalid choice: 'alexnet'"),
    ("train --layout NCL", "--layout: invalid choice: 'NCL'"),
    ("train --optimizer lbfgs", "--optimizer: invalid choice: 'lbfgs'"),
    ("train --schedule never", "--schedule: invalid choice: 'never'"),
    ("train --shift -1", "--shift: expected a whole number of at least 0, got '-1'"),
    ("train --lr -1", "--lr: expected a number above 0, got '-1'"),
    ("train --lr 0", "--lr: expected a number above 0, got '0'"),
    ("train --lr nan", "--lr: expected a number above 0, got 'nan'"),
    ("train --lr inf", "--lr: expected a number above 0, got 'inf'"),
    ("train --momentum 1", "--momentum: expected a number of at least 0 and below 1, got '1'"),
    ("train --momentum -0.1", "--momentum: expected a number of at least 0 and below 1, got '-0.1'"),
    ("train --weight-decay -1e-4", "--weight-decay: expected"),
    ("train --weight-decay nan", "--weight-decay: expected a number of at least 0, got 'nan'"),
    ("train --seed -1", "--seed: expected a whole number of at least 0, got '-1'"),
    ("train --num-threads 0", "--num-threads: expected a whole number from 1 to "),
    ("train --num-threads 1000000", "--num-threads: expected a whole number from 1 to "),
    ("train --mistakes {tmp}/mistakes.jpg", "--mistakes: expected a name that ends in .png"),
    ("train --plot {tmp}/missing/curves.png", "No such file or directory"),
    ("train --plot {tmp}/curves.jpg", "--plot: expected a name that ends in .png"),
    ("train --plot /proc/curves.png", "--plot: cannot write '/proc/curves.png'"),
    ("train --plot {tmp}/folder.png", "is a directory"),
    ("train --checkpoint {tmp}/missing/state", "--checkpoint: cannot write"),
    ("train --checkpoint {tmp}/file/state", "Not a directory"),
    ("train --checkpoint {tmp}", "is a directory"),
    ("experiment", "the following arguments are required: NAME"),
    ("experiment fly", "invalid choice: 'fly'"),
    ("experiment all --seeds 0", "--seeds: expected a whole number of at least 1, got '0'"),
    ("bench --json {tmp}/missing/bench.json", "--json: cannot write"),
    ("bench --num-threads zero", "--num-threads: expected a whole number from 1 to "),
    ("bench --quick yes", "unrecognized arguments: yes"),
]
BAD_WITH_EXTRA = [
    ("train --compare --no-bn", "--compare trains two networks"),
    ("train --compare --checkpoint {tmp}/state", "--compare trains two networks"),
    ("train --compare --resume {tmp}/state", "--compare trains two networks"),
    ("train --compare --mistakes {tmp}/a.png", "--mistakes shows one network, --compare trains two"),
    ("train --data {tmp}/missing", "missing: no such folder, and neither 'digits' nor 'fashion-mnist'"),
    ("train --data {tmp}", "train-images-idx3-ubyte: cannot be read: No such file or directory"),
    ("train --resume {tmp}/missing", "missing: cannot be read: No such file or directory"),
    ("train --resume {tmp}", "cannot be read: "),
    ("train --resume {tmp}/file", "damaged, or not a safetensors file"),
    ("train --resume ", "cannot be read: "),
    ("experiment cost --output {tmp}/new --data {tmp}/missing", "missing: no such folder"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD + [pytest.param(*bad, marks=needs_extra) for bad in BAD_WITH_EXTRA]
)
def test_wrong_arguments_are_one_line_and_code_2(arguments, message, tmp_path, capsys):
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder.png").mkdir()
    code, out, err = run(capsys, *(word.replace("{tmp}", str(tmp_path)) for word in arguments.split(" ") if arguments))
    assert (code, out) == (2, "")
    assert err.startswith("fastbn") and err.count("\n") == 1 and err.endswith("\n")
    assert message in err


@needs_extra
def test_resume_refuses_options_that_contradict_the_checkpoint(tmp_path, capsys):
    path = tmp_path / "state"
    assert run(capsys, "train", "--epochs", 1, "--no-bn", "--lr", 0.02, "--checkpoint", path)[0] == 0
    before = path.read_bytes()
    for arguments, message in [
        (("--epochs", 1), "has 1 epochs already: --epochs must ask for more"),
        ((), "has 1 epochs already"),  # as many as were asked for at first
        (("--epochs", 2, "--lr", 0.07), "--lr 0.07: "),
        (("--epochs", 2, "--batch-size", 8), "--batch-size 8: "),
        (("--epochs", 2, "--seed", 4), "trained with seed = 0"),
    ]:
        code, out, err = run(capsys, "train", "--resume", path, *arguments)
        assert (code, out) == (2, "") and err.count("\n") == 1 and message in err
    code, out, err = run(capsys, "train", "--checkpoint", path)
    assert (code, out) == (2, "") and f"--checkpoint {path}: exists; --resume {path} continues it" in err
    assert path.read_bytes() == before

    # What is not said is taken from the file.
    code, out, _ = run(capsys, "train", "--resume", path, "--epochs", 2)
    assert code == 0 and out.startswith("cnn_bn on digits, without BN: sgd, lr 0.02,")
    assert [line.split()[0] for line in out.splitlines()[2:4]] == ["1", "2"]

    batchnorm = tmp_path / "with"
    assert run(capsys, "train", "--epochs", 1, "--checkpoint", batchnorm)[0] == 0
    code, _, err = run(capsys, "train", "--epochs", 2, "--no-bn", "--resume", batchnorm)
    assert code == 2 and "--no-bn: " in err and "batch_norm = True" in err

    scheduled = tmp_path / "scheduled"
    assert run(capsys, "train", "--epochs", 1, "--schedule", "cosine", "--checkpoint", scheduled)[0] == 0
    code, _, err = run(capsys, "train", "--resume", scheduled)
    assert code == 2 and "has 1 epochs already: with the schedule cosine they are all" in err


@needs_extra
def test_compare_prints_both_and_plots(tmp_path, capsys):
    picture = tmp_path / "curves.png"
    code, out, err = run(capsys, "train", "--compare", "--epochs", 2, "--plot", picture)
    assert (code, err) == (0, "")
    assert out.count("train loss") == 2
    summary = out[out.index("test accuracy ") :].splitlines()
    assert [line.split("  ")[0] for line in summary[1:3]] == ["with BN", "without BN"]
    assert summary[-1] == f"curves: {picture}"
    assert picture.read_bytes().startswith(b"\x89PNG")


@needs_extra
def test_train_options_reach_the_training(tmp_path, capsys):
    picture, path = tmp_path / "mistakes.png", tmp_path / "state"
    options = "--model mlp_relu --optimizer adam --lr 0.005 --schedule cosine --shift 1 --flip --layout NCHW --epochs 2"
    code, out, err = run(capsys, "train", *options.split(), "--mistakes", picture, "--checkpoint", path)
    assert (code, err) == (0, "")
    assert out.startswith("mlp_relu on digits, with BN: adam, lr 0.005, batch size 64, seed 0\n")
    assert out.endswith(f"mistakes: {picture}\n") and picture.read_bytes().startswith(b"\x89PNG")
    config = checkpoint.load(path).config
    given = {"model": "mlp_relu", "optimizer": "adam", "schedule": "cosine", "shift": 1, "flip": True, "epochs": 2}
    assert given.items() <= config.items()
    # A schedule is made for a number of epochs: more of them would not give the numbers of not stopping.
    code, _, err = run(capsys, "train", "--resume", path, "--epochs", 3)
    assert code == 2 and "--epochs 3: " in err and "was trained with epochs = 2" in err


@needs_extra
def test_divergence_is_one_line_and_code_1(tmp_path, capsys):
    picture = tmp_path / "curves.png"
    code, out, err = run(capsys, "train", "--no-bn", "--lr", "1e30", "--plot", picture)
    assert (code, err) == (1, "fastbn train: diverged without BN: try a smaller --lr\n")
    assert "nan" in out or "inf" in out
    assert picture.exists()


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [
        ("sklearn", ()),
        ("tqdm", ()),
        ("threadpoolctl", ()),
        ("matplotlib", ("--plot", "{tmp}/a.png")),
        ("matplotlib", ("--mistakes", "{tmp}/a.png")),
        ("safetensors", ("--checkpoint", "{tmp}/a")),
    ],
)
def test_missing_extra_is_one_line(missing, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)  # what Python takes for "cannot be imported"
    code, out, err = run(capsys, "train", *(argument.replace("{tmp}", str(tmp_path)) for argument in arguments))
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert missing in err and "pip install 'fastbn[train]'" in err


def test_bench_prints_a_table_and_writes_json(tmp_path, monkeypatch, capsys):
    shapes = (((2, 3, 4, 5), 1, "NCHW"), ((2, 4, 5, 3), -1, "NHWC"), ((6, 8), 1, "NC"))
    monkeypatch.setattr(bench, "QUICK_SHAPES", shapes)
    path = tmp_path / "bench.json"
    code, out, err = run(capsys, "bench", "--quick", "--num-threads", 1, "--json", path)
    assert (code, err) == (0, "")
    assert "threads: 1;" in out
    record = json.loads(path.read_text())
    assert record["copy_gb_per_s"] > 0
    assert [(row["operation"], row["layout"]) for row in record["rows"]] == [
        (operation, layout) for _, _, layout in shapes for operation in ("forward", "inference", "backward")
    ]
    assert all(row["ms"] > 0 and row["numpy_ms"] > 0 for row in record["rows"])
    table = [line for line in out.splitlines() if line.startswith(("operation", "forward", "inference", "backward"))]
    assert len(table) == 10 and len({len(line) for line in table}) == 1  # aligned


def test_bench_formulas_compute_what_fastbn_computes():
    import numpy as np

    import fastbn

    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 4, 3, 5, 6))
    gamma, beta = rng.standard_normal((2, 3))
    axes, vector = (0, 2, 3), (1, 3, 1, 1)
    y, cache = fastbn.batchnorm_forward(x, gamma, beta)
    dx, dgamma, dbeta = fastbn.batchnorm_backward(dy, cache)
    mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    g, b = gamma.reshape(vector), beta.reshape(vector)
    np.testing.assert_allclose(bench.numpy_forward(x, g, b, axes), y, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(bench.numpy_inference(x, g, b, mean, var), y, rtol=1e-12, atol=1e-12)
    ours = bench.numpy_backward(dy, x, g, mean, 1 / np.sqrt(var + 1e-5), axes)
    for actual, expected in zip(ours, (dx, dgamma, dbeta), strict=True):
        np.testing.assert_allclose(actual.squeeze(), expected.squeeze(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("arguments", [("--help",), ("train", "--help"), ("bench", "--help"), ("--version",)])
def test_help_and_version(arguments, capsys):
    code, out, err = run(capsys, *arguments)
    assert (code, err) == (0, "") and "fastbn" in out


def test_module_runs_as_command():
    command = [sys.executable, "-m", "fastbn"]
    result = subprocess.run([*command, "info"], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert "numpy" in result.stdout.lower() and "threads" in result.stdout
    result = subprocess.run([*command, "train", "--epochs", "0"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stderr.count("\n") == 1


def test_reader_that_leaves_is_no_traceback():
    """As in `fastbn info | head -0`."""
    command = [sys.executable, "-m", "fastbn", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 1
