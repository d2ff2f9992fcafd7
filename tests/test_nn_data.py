"""Reading images: MNIST's and CIFAR-10's formats, what is wrong with damaged files, augmentation."""

import gzip
import itertools

import numpy as np
import pytest

from fastbn import cli, nn
from fastbn.nn import data


def idx(array, kind=8):
    return bytes([0, 0, kind, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    """A folder with 20 and 6 images of 5 x 4 pixels."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 20), ("t10k", 6)):
        images = rng.integers(0, 256, (count, 5, 4), np.uint8)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8) % 10))
    return tmp_path


@pytest.fixture
def cifar(tmp_path):
    """A folder with batches of 4 images."""
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        records = rng.integers(0, 256, (4, 3073), np.uint8)
        records[:, 0] %= 10
        (tmp_path / name).write_bytes(records.tobytes())
    return tmp_path


def test_idx_files_are_read(mnist):
    found = nn.load(mnist)
    assert found.x_train.shape == (20, 1, 5, 4) and found.x_test.shape == (6, 1, 5, 4)
    assert found.x_train.dtype == np.float32 and found.input_shape == (1, 5, 4) and found.classes == 10
    pixels = np.frombuffer((mnist / "t10k-images-idx3-ubyte").read_bytes()[16:], np.uint8)
    np.testing.assert_array_equal(np.round(found.x_test * 255).ravel(), pixels)
    assert found.x_train.min() >= 0 and found.x_train.max() <= 1
    np.testing.assert_array_equal(found.y_test, np.arange(6))


def test_packed_files_are_the_same(mnist):
    plain = nn.load(mnist)
    for path in mnist.iterdir():
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    for found, expected in zip(nn.load(mnist), plain, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_cifar_files_are_read(cifar):
    found = nn.load(cifar)
    assert found.x_train.shape == (20, 3, 32, 32) and found.x_test.shape == (4, 3, 32, 32)
    record = (cifar / "data_batch_2.bin").read_bytes()[:3073]
    assert found.y_train[4] == record[0]
    np.testing.assert_array_equal(np.round(found.x_train[4] * 255).ravel(), list(record[1:]))


def test_layout_moves_the_channels(cifar):
    found = nn.load(cifar)
    np.testing.assert_array_equal(found.in_layout("NHWC").x_train[3, 5, 7], found.x_train[3, :, 5, 7])
    assert found.in_layout("NCHW") is found


def test_fashion_mnist_is_found_where_its_package_puts_it(mnist, monkeypatch):
    monkeypatch.setattr(data, "FASHION_MNIST", mnist)
    assert nn.load("fashion-mnist").x_train.shape == (20, 1, 5, 4)
    monkeypatch.setattr(data, "FASHION_MNIST", mnist / "missing")
    with pytest.raises(nn.DataError, match="apt install dataset-fashion-mnist"):
        nn.load("fashion-mnist")


@pytest.mark.skipif(not data.FASHION_MNIST.exists(), reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist():
    found = nn.load("fashion-mnist")
    assert found.x_train.shape == (60_000, 1, 28, 28) and found.x_test.shape == (10_000, 1, 28, 28)
    assert (np.bincount(found.y_train) == 6000).all() and (np.bincount(found.y_test) == 1000).all()


def change(name, function):
    def damage(folder):
        path = folder / name
        path.write_bytes(function(path.read_bytes()))

    return damage


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
DAMAGES = {
    "labels-as-images": (
        change(IMAGES, lambda c: idx(np.zeros(4, np.uint8))),
        "number 0x00000803, got 0x00000801",
    ),
    "floats": (change(LABELS, lambda c: idx(np.zeros(4, np.uint8), 13)), "magic number 0x00000801, got 0x00000d01"),
    "not-idx": (change(IMAGES, lambda c: b"<html>"), "expected magic number 0x00000803, got 0x3c68746d"),
    "empty-file": (change(IMAGES, lambda c: b""), "expected magic number 0x00000803, got 0x"),
    "no-shape": (change(IMAGES, lambda c: c[:9]), "truncated in its header"),
    "cut": (change(IMAGES, lambda c: c[:-1]), r"truncated: shape \(20, 5, 4\) needs 416 bytes, got 415"),
    "too-long": (change(LABELS, lambda c: c + b"\0"), "too long"),
    "huge": (change(IMAGES, lambda c: c[:4] + b"\xff" * 12 + c[16:]), "truncated: shape"),
    "no-images": (change(IMAGES, lambda c: idx(np.zeros((0, 5, 4), np.uint8))), "empty"),
    "label": (change(LABELS, lambda c: c[:-1] + b"\x0a"), "expected labels from 0 to 9, got 10 for image 19"),
    "counts": (change(LABELS, lambda c: idx(np.zeros(4, np.uint8))), "20 images but 4 labels"),
    "missing": (lambda folder: (folder / LABELS).unlink(), "cannot be read: No such file"),
    "cut-gz": (
        lambda folder: (
            (folder / f"{IMAGES}.gz").write_bytes(gzip.compress((folder / IMAGES).read_bytes())[:-12]),
            (folder / IMAGES).unlink(),
        ),
        "truncated",
    ),
    "no-gz": (
        lambda folder: ((folder / f"{IMAGES}.gz").write_bytes(b"text"), (folder / IMAGES).unlink()),
        "cannot be read: Not a gzipped file",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_idx_file_is_a_clear_error(mnist, name):
    damage, message = DAMAGES[name]
    damage(mnist)
    with pytest.raises(nn.DataError, match=message):
        nn.load(mnist)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda c: c[:-1], "expected records of 3073 bytes, got 12291 bytes"),
        (lambda c: b"", "expected records of 3073 bytes, got 0 bytes"),
        (lambda c: b"\xff" + c[1:], "expected labels from 0 to 9, got 255 for image 0"),
    ],
)
def test_damaged_cifar_file_is_a_clear_error(cifar, function, message):
    change("data_batch_3.bin", function)(cifar)
    with pytest.raises(nn.DataError, match=rf"data_batch_3\.bin: {message}"):
        nn.load(cifar)


def test_command_reports_bad_data_in_one_line_before_training(mnist, capsys):
    pytest.importorskip("sklearn")
    DAMAGES["cut"][0](mnist)
    assert cli.main(["train", "--data", str(mnist)]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and "truncated" in output.err


# ---- augmentation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_augmentation_shifts_and_flips_whole_images(layout):
    rng = np.random.default_rng(0)
    images = rng.random((200, 2, 5, 6), np.float32) + 1
    given = images if layout == "NCHW" else np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    found = nn.augment(given, rng, shift=1, flip=True, layout=layout)
    assert found.dtype == np.float32 and found.shape == given.shape and found.flags.c_contiguous
    found = found if layout == "NCHW" else found.transpose(0, 3, 1, 2)
    seen = set()
    for image, result in zip(images, found, strict=True):
        padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
        candidates = {
            (i, j, step): padded[:, i : i + 5, j : j + 6][:, :, ::step]
            for i, j, step in itertools.product(range(3), range(3), (1, -1))
        }
        matching = [key for key, candidate in candidates.items() if np.array_equal(candidate, result)]
        assert len(matching) == 1
        seen.add(matching[0])
    assert len(seen) == 18  # every shift, mirrored or not


def test_layout_is_known_and_changed_once(cifar):
    found = nn.load(cifar)
    moved = found.in_layout("NHWC")
    assert moved.in_layout("NHWC") is moved and moved.input_shape == found.input_shape == (3, 32, 32)
    np.testing.assert_array_equal(moved.in_layout("NCHW").x_train, found.x_train)
    for function in (found.in_layout, lambda layout: nn.augment(found.x_test, np.random.default_rng(0), layout=layout)):
        with pytest.raises(ValueError, match="layout: expected 'NCHW' or 'NHWC', got 'nhwc'"):
            function("nhwc")


def test_images_of_two_sizes_are_an_error(mnist):
    (mnist / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((6, 4, 4), np.uint8)))
    with pytest.raises(nn.DataError, match=r"images of \(5, 4\) pixels to train on, of \(4, 4\) to test"):
        nn.load(mnist)


def test_augmentation_by_nothing_is_a_copy():
    images = np.random.default_rng(0).random((3, 1, 4, 4), np.float32)
    found = nn.augment(images, np.random.default_rng(0))
    np.testing.assert_array_equal(found, images)
    assert not np.shares_memory(found, images)
