"""Checkpoints: exact resume, interruption, atomic writing, damaged files."""

import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from combinations import LONG
from fastbn import cli, nn
from fastbn.cli.train import DEFAULTS, no_interrupt_lost
from fastbn.nn import checkpoint
from fastbn.nn.models import digits_cnn

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

TIMING = "images_per_second"
KILLS = 200 if LONG else 20


@pytest.fixture(scope="module")
def digits():
    """A part of the images: these tests are not about accuracy."""
    data = nn.load_digits()
    return nn.Dataset(data.x_train[:300], data.y_train[:300], data.x_test[:100], data.y_test[:100])


def start(seed=0, batch_norm=True):
    """A new (model, optimizer, rng)."""
    rng = np.random.default_rng(seed)
    model = digits_cnn(batch_norm, rng=rng)
    return model, nn.SGD(model, 0.07, 0.9, 1e-4), rng


def fit(state, data, epochs, **options):
    model, optimizer, rng = state
    return nn.fit(model, optimizer, data, epochs=epochs, batch_size=64, rng=rng, log=lambda line: None, **options)


def resume(path, data, epochs):
    """The (state, history) of continuing from a file, in a process that knows nothing but the file."""
    state = start(seed=99)
    saved = checkpoint.load(path)
    saved.restore(*state)
    return state, fit(state, data, epochs, history=saved.history, save_to=path)


def numbers(history):
    return [{name: value for name, value in epoch.items() if name != TIMING} for epoch in history]


def assert_same_state(one, other):
    for ours, theirs in zip(one[:2], other[:2], strict=True):  # model, optimizer
        state, expected = ours.state_dict(), theirs.state_dict()
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            assert state[name].dtype == value.dtype
            np.testing.assert_array_equal(state[name], value)
    assert one[2].bit_generator.state == other[2].bit_generator.state


def test_resuming_gives_the_numbers_of_not_stopping(digits, tmp_path):
    whole = start()
    expected = fit(whole, digits, 4)
    path = tmp_path / "state.safetensors"
    fit(start(), digits, 2, save_to=path, config={"lr": 0.07})
    assert checkpoint.load(path).config == {"lr": 0.07}
    resumed, history = resume(path, digits, 4)
    assert numbers(history) == numbers(expected)
    assert_same_state(resumed, whole)


def dropout_and_adam(seed):
    """A network whose training depends on every kind of state: Adam's averages, and a generator of dropout's own."""
    rng = np.random.default_rng(seed)
    layers = digits_cnn(rng=rng, layout="NHWC").layers
    model = nn.Sequential(*layers[:-1], nn.Sequential(nn.Dropout(0.2, rng=seed + 1)), layers[-1])
    return model, nn.Adam(model, 0.01), rng


def test_resuming_restores_adam_dropout_augmentation_and_schedule(digits, tmp_path):
    path = tmp_path / "state.safetensors"
    options = {
        "schedule": nn.cosine(4),
        "augment": functools.partial(nn.augment, shift=1, flip=True, layout="NHWC"),
    }
    images = digits.in_layout("NHWC")
    whole = dropout_and_adam(0)
    expected = fit(whole, images, 4, **options)
    fit(dropout_and_adam(0), images, 2, save_to=path, **options)

    state = dropout_and_adam(99)
    saved = checkpoint.load(path)
    saved.restore(*state)
    history = fit(state, images, 4, history=saved.history, **options)
    assert numbers(history) == numbers(expected)
    assert_same_state(state, whole)
    dropouts = [next(part for part in nn.walk(model) if hasattr(part, "rng")) for model, _, _ in (state, whole)]
    assert dropouts[0].rng.bit_generator.state == dropouts[1].rng.bit_generator.state


@pytest.mark.parametrize("at_step", [1, 4, 7, 11])  # five steps are an epoch
def test_interruption_leaves_the_last_finished_epoch(digits, tmp_path, monkeypatch, at_step):
    whole = start()
    expected = fit(whole, digits, 3)
    path = tmp_path / "state.safetensors"
    state = start()
    step, steps = state[1].step, iter(range(1, 100))

    def interrupted_step():
        step()
        if next(steps) == at_step:
            raise KeyboardInterrupt

    monkeypatch.setattr(state[1], "step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        fit(state, digits, 3, save_to=path)
    assert len(checkpoint.load(path).history) == (at_step - 1) // 5
    resumed, history = resume(path, digits, 3)
    assert numbers(history) == numbers(expected)
    assert_same_state(resumed, whole)


def test_ctrl_c_exits_with_130_and_can_be_resumed(tmp_path, capsys):
    path = tmp_path / "state.safetensors"
    command = [sys.executable, "-m", "fastbn", "train", "--epochs", "9999", "--checkpoint", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1) as process:
        for line in process.stdout:
            if line.split()[:1] == ["2"]:  # the row of the second epoch
                process.send_signal(signal.SIGINT)
                break
        process.stdout.read()
        errors = process.stderr.read()
        assert process.wait(timeout=60) == 130
    assert errors.strip().splitlines() == [f"fastbn train: interrupted; continue with: fastbn train --resume {path}"]
    assert os.listdir(tmp_path) == [path.name]
    history = checkpoint.load(path).history
    assert len(history) >= 1

    epochs = len(history) + 1
    assert cli.main(["train", "--resume", str(path), "--epochs", str(epochs)]) == 0
    resumed = checkpoint.load(path).history
    assert len(resumed) == epochs and resumed[:-1] == history
    assert cli.main(["train", "--checkpoint", str(tmp_path / "whole"), "--epochs", str(epochs)]) == 0
    assert numbers(checkpoint.load(tmp_path / "whole").history) == numbers(resumed)
    capsys.readouterr()


def test_ctrl_c_that_python_drops_ends_the_training_with_the_next_line(monkeypatch):
    class Dying:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    dropped = []
    monkeypatch.setattr(sys, "unraisablehook", lambda event: dropped.append(event.exc_type))
    with no_interrupt_lost() as log:
        log("before")
        Dying()
        assert dropped == [KeyboardInterrupt]
        with pytest.raises(KeyboardInterrupt):
            log("after")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_without_checkpoint_says_that_nothing_was_saved(monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(nn, "fit", interrupt)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "fastbn train: interrupted; nothing was saved (--checkpoint FILE does)\n"
    assert cli.main(["train", "--compare"]) == 130  # which has no checkpoints
    assert capsys.readouterr().err == "fastbn train: interrupted; nothing was saved\n"


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_while_writing_keeps_the_old_file(tmp_path, monkeypatch, function, error):
    path = tmp_path / "state.safetensors"
    checkpoint.save(path, *start(seed=1), [])
    old = path.read_bytes()

    def fail(*args):
        raise error

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(type(error)):
        checkpoint.save(path, *start(seed=2), [])
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == [path.name]


def save_until_killed(path, pipe):
    """Epoch after epoch, each parameter its number."""
    state = start()
    parameters = state[0].state_dict()
    for epoch in itertools.count(1):
        state[0].load_state_dict({name: np.full_like(x, epoch) for name, x in parameters.items()})
        checkpoint.save(path, *state, [{"epoch": epoch}])
        pipe.send(epoch)


def test_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, record_property):
    """SIGKILL, which nothing can catch. What the killed left is removed by the next to save."""
    path = tmp_path / "state"
    rng = np.random.default_rng()
    left = 0
    for _ in range(KILLS):
        receiver, sender = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.get_context("fork").Process(target=save_until_killed, args=(path, sender))
        child.start()
        sender.close()
        assert receiver.poll(120), "nothing saved"
        time.sleep(rng.uniform(0, 0.03))
        child.kill()
        child.join()
        saved = 0
        with contextlib.suppress(EOFError):
            while True:
                saved = receiver.recv()
        content = checkpoint.load(path)
        (epoch,) = content.history
        assert epoch["epoch"] in (saved, saved + 1)  # killed after the file was there and before it was reported
        assert all((x == epoch["epoch"]).all() for name, x in content.tensors.items() if name.startswith("model."))
        content.restore(*start())
        left += len(os.listdir(tmp_path)) == 2
        assert len(os.listdir(tmp_path)) <= 2
    checkpoint.save(path, *start(), [])
    assert os.listdir(tmp_path) == [path.name]
    record_property("kills", KILLS)
    record_property("kills in the middle of a save", left)
    assert left > KILLS // 20, "no save was interrupted: nothing has been tested"


def test_writing_removes_what_the_dead_left_and_nothing_else(tmp_path):
    with subprocess.Popen(["true"]) as dead:
        pass
    kept = [f".state.{os.getppid()}.tmp", ".state.txt.tmp", f".other.{dead.pid}.tmp", f".state.{10**30}.tmp"]
    for name in (*kept, f".state.{dead.pid}.tmp"):
        (tmp_path / name).touch()
    checkpoint.write_atomically(tmp_path / "state", b"content")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "state"])


@pytest.mark.parametrize("content", [False, True], ids=("empty", "full"))
def test_writing_does_not_replace_a_folder(tmp_path, content):
    path = tmp_path / "state"
    path.mkdir()
    if content:
        (path / "file").touch()
    with pytest.raises(OSError):
        checkpoint.save(path, *start(), [])
    assert os.listdir(tmp_path) == [path.name] and os.listdir(path) == ["file"] * content


def test_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    assert cli.main(["train", "--checkpoint", str(tmp_path / "state")]) == 1
    assert capsys.readouterr().err == "fastbn train: [Errno 28] No space left on device\n"


def test_writing_follows_a_link_and_keeps_the_usual_permissions(tmp_path):
    target, link, usual = tmp_path / "target", tmp_path / "link", tmp_path / "usual"
    link.symlink_to(target)
    usual.touch()
    checkpoint.write_atomically(link, b"content")
    assert link.is_symlink() and target.read_bytes() == b"content"
    assert target.stat().st_mode == usual.stat().st_mode


def flipped(content, position):
    changed = bytearray(content)
    changed[position] ^= 1
    return bytes(changed)


def without_metadata(content):
    return safetensors_numpy.save(safetensors_numpy.load(content))


def forged(content, change=lambda parts: None, text=None, tensors=()):
    """A file with a right checksum: its parts changed, or other text in their place, and other tensors."""
    tensors = {**safetensors_numpy.load(content), **dict(tensors)}
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    parts = json.loads(header["__metadata__"]["fastbn"])
    change(parts)
    text = text or json.dumps(parts)
    return safetensors_numpy.save(tensors, metadata={"fastbn": text, "crc32": str(checkpoint.checksum(tensors, text))})


def declared(dtype, shape, size):
    """A file with nothing but one tensor."""
    header = json.dumps({"model.x": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size)


class Bomb:
    """Pickled, it creates a file where it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


FOREIGN = "not a checkpoint of fastbn"
DAMAGES = {
    "empty": (lambda content: b"", "damaged, or not a safetensors file"),
    "text": (lambda content: b"epoch 1\nepoch 2\n" * 100, "damaged, or not a safetensors file"),
    "cut-in-size": (lambda content: content[:5], "damaged, or not a safetensors file"),
    "cut-in-header": (lambda content: content[:100], "damaged, or not a safetensors file"),
    "cut-in-tensors": (lambda content: content[:-100], "damaged, or not a safetensors file"),
    "too-long": (lambda content: content + b"\0", "damaged, or not a safetensors file"),
    "header-size": (lambda content: b"\xff" * 8 + content[8:], "damaged, or not a safetensors file"),
    "flipped-tensor-bit": (lambda content: flipped(content, -1000), "damaged (wrong checksum)"),
    "flipped-loss": (lambda content: flipped(content, content.index(b"1.5")), "damaged (wrong checksum)"),
    "foreign": (without_metadata, FOREIGN),
    "later-version": (
        lambda content: forged(content, lambda parts: parts.update(version=3)),
        "written by another version of fastbn",
    ),
    "pickle": (lambda content: pickle.dumps([Bomb(), content]), "damaged, or not a safetensors file"),
    "pickle-in-parts": (lambda content: forged(content, text=pickle.dumps(Bomb(), 0).decode()), FOREIGN),
    "tensor-of-a-terabyte": (lambda content: declared("F32", [1 << 38], 4), "damaged, or not a safetensors file"),
    "tensor-past-64-bits": (lambda content: declared("F32", [1 << 32, 1 << 32], 0), "damaged, or not a safetensors"),
    "negative-extent": (lambda content: declared("F32", [-1], 4), "damaged, or not a safetensors file"),
    "dtype-unknown-to-numpy": (lambda content: declared("F8_E4M3", [4], 4), FOREIGN),
    "no-json": (lambda content: forged(content, text="nonsense"), FOREIGN),
    "json-too-deep": (lambda content: forged(content, text="[" * 100_000), FOREIGN),
    "no-object": (lambda content: forged(content, text="[1, 2]"), FOREIGN),
    "no-version": (lambda content: forged(content, text="{}"), FOREIGN),
    "part-missing": (lambda content: forged(content, lambda parts: parts.pop("history")), FOREIGN),
    "part-too-many": (lambda content: forged(content, lambda parts: parts.update(path="/etc/passwd")), FOREIGN),
    "no-list": (lambda content: forged(content, lambda parts: parts.update(history=3)), FOREIGN),
    "no-epochs": (lambda content: forged(content, lambda parts: parts.update(history=["one"])), FOREIGN),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The content of a checkpoint after one epoch."""
    path = tmp_path_factory.mktemp("sound") / "state"
    epoch = {"epoch": 1, "train_loss": 1.5, "train_accuracy": 0.5, "test_accuracy": 0.5, TIMING: 1000.0}
    checkpoint.save(path, *start(), [epoch], DEFAULTS)
    return path.read_bytes()


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_file_is_one_clear_line(sound, tmp_path, capsys, name):
    damage, message = DAMAGES[name]
    path = tmp_path / "state"
    path.write_bytes(damage(sound))
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.load(path)
    assert message in str(caught.value)
    assert cli.main(["train", "--resume", str(path)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1 and output.err.startswith(f"fastbn train: {path}: ")
    assert not Path("exploded").exists()


STATE = {"state": -1, "inc": 1 << 200}
UNFIT = {
    "shape": lambda content: forged(content, tensors={"model.0.weight": np.ones((3, 3), "f4")}),
    "shape-of-the-optimizer": lambda content: forged(content, tensors={"optimizer.velocity.0": np.ones((3, 3), "f4")}),
    "name-with-a-path": lambda content: forged(content, tensors={"model.../../../x": np.ones(3, "f4")}),
    "no-generator": lambda content: forged(content, lambda parts: parts.update(rng_states=[])),
    "numbers-of-a-generator": lambda content: forged(content, lambda parts: parts["rng_states"][0].update(state=STATE)),
    "another-generator": lambda content: forged(
        content, lambda parts: parts["rng_states"][0].update(bit_generator="x")
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_checkpoint_that_does_not_fit_is_one_clear_line(sound, tmp_path, capsys, name):
    path = tmp_path / "state"
    path.write_bytes(UNFIT[name](sound))
    model, optimizer, rng = start(seed=5)

    def state():
        return model.state_dict() | optimizer.state_dict() | rng.bit_generator.state

    before = state()
    with pytest.raises(checkpoint.CheckpointError, match="does not fit this model: "):
        checkpoint.load(path).restore(model, optimizer, rng)
    np.testing.assert_equal(state(), before)
    assert cli.main(["train", "--resume", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"fastbn train: {path}: does not fit this model: ")


@pytest.mark.parametrize("change", [{"model": "x"}, {"lr": "fast"}, {"epochs": None}, {"checkpoint": "/etc/passwd"}])
def test_checkpoint_with_a_configuration_of_others_is_one_clear_line(sound, tmp_path, capsys, change):
    path = tmp_path / "state"
    path.write_bytes(forged(sound, lambda parts: parts["config"].update(change)))
    assert cli.main(["train", "--resume", str(path)]) == 2
    ((name, value),) = change.items()
    assert capsys.readouterr().err == f"fastbn train: {path}: not of this command: {name} = {value!r}\n"


def test_checkpoint_without_a_configuration_is_one_clear_line(sound, tmp_path, capsys):
    """As `fit` saves it: of which layout the weights are is not known."""
    path = tmp_path / "state"
    path.write_bytes(forged(sound, lambda parts: parts["config"].clear()))
    assert cli.main(["train", "--resume", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"fastbn train: {path}: not of this command: without model, data, layout")


@pytest.mark.parametrize("kind", ["MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"])
def test_checkpoint_of_every_random_generator(tmp_path, kind):
    path, rng = tmp_path / "state", np.random.Generator(getattr(np.random, kind)(3))
    model, optimizer, _ = start()
    checkpoint.save(path, model, optimizer, rng, [])
    drawn = rng.random(5)
    other = np.random.Generator(getattr(np.random, kind)(4))
    checkpoint.load(path).restore(model, optimizer, other)
    np.testing.assert_array_equal(other.random(5), drawn)


def test_every_cut_and_every_flipped_byte_is_found(sound, tmp_path):
    path = tmp_path / "state"
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(sound), 60):
        for damaged in (sound[:position], flipped(sound, position)):
            path.write_bytes(damaged)
            with pytest.raises(checkpoint.CheckpointError):
                checkpoint.load(path)


def test_unreadable_paths_are_one_clear_line(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "missing", tmp_path, tmp_path / "missing" / "state", tmp_path / "pipe"):
        with pytest.raises(checkpoint.CheckpointError, match="cannot be read: "):
            checkpoint.load(path)


def test_checkpoint_of_another_model_is_refused(tmp_path):
    path = tmp_path / "state"
    checkpoint.save(path, *start(batch_norm=False), [])
    with pytest.raises(checkpoint.CheckpointError, match="does not fit this model"):
        checkpoint.load(path).restore(*start(batch_norm=True))


def test_file_holds_pytorch_keys(sound):
    tensors = safetensors_numpy.load(sound)
    names = {name.removeprefix("model.") for name in tensors if name.startswith("model.")}
    assert names == set(digits_cnn().state_dict())
    assert (
        tensors["model.1.num_batches_tracked"].shape == () and tensors["model.1.num_batches_tracked"].dtype == np.int64
    )
