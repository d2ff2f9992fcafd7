"""The trainer's compiled loops against their definitions in NumPy, and what they promise about threads."""

import threading

import numpy as np
import pytest

import fastbn
from fastbn import nn
from fastbn.nn import _windows, conv
from fastbn.nn.conv import Windows
from fastbn.nn.threads import for_each, product

# Images (N, C, H, W), kernel, stride, padding.
CASES = [
    ((2, 3, 5, 6), (3, 3), (1, 1), (1, 1)),
    ((2, 1, 4, 4), (3, 3), (1, 1), (0, 0)),
    ((1, 2, 7, 5), (2, 3), (2, 1), (1, 2)),
    ((3, 2, 6, 6), (1, 1), (1, 1), (0, 0)),
    ((3, 2, 6, 7), (1, 1), (2, 3), (0, 0)),
    ((2, 2, 1, 9), (1, 4), (1, 2), (0, 3)),
    ((1, 1, 2, 2), (5, 5), (1, 1), (4, 4)),  # windows that see nothing but padding
    ((2, 3, 5, 4), (2, 2), (3, 3), ("same", "same")),
    ((2, 3, 5, 4), (4, 4), (3, 3), ("same", "same")),
]


def definition(x, windows):
    """Windows of x (N, C, H, W) as (N, OH, OW, C, kernel_h, kernel_w), one value after the other."""
    C, H, W, kh, kw, sh, sw, top, left, OH, OW = windows.geometry
    found = np.zeros((len(x), OH, OW, C, kh, kw))
    for n, oh, ow, c, i, j in np.ndindex(found.shape):
        h, w = oh * sh - top + i, ow * sw - left + j
        if 0 <= h < H and 0 <= w < W:
            found[n, oh, ow, c, i, j] = x[n, c, h, w]
    return found


def matrices(values, axis):
    """The same in the order in which each layout gathers them."""
    order = values if axis == 1 else values.transpose(0, 1, 2, 4, 5, 3)
    return order.reshape(np.prod(values.shape[:3]), -1)


def as_rows(columns, axis):
    """What a tile gathers, with a row for each window."""
    return columns if axis == -1 else columns.transpose(0, 2, 1).reshape(-1, columns.shape[1])


def as_gathered(rows, columns, axis):
    """The inverse of `as_rows`, for rows of any length."""
    return rows if axis == -1 else rows.reshape(len(columns), -1, rows.shape[1]).transpose(0, 2, 1)


@pytest.mark.parametrize("tile_bytes", [1, 600, 2000, 1 << 18])
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gathering_and_scattering_follow_the_definition(case, axis, tile_bytes, monkeypatch):
    monkeypatch.setattr(conv, "TILE_BYTES", tile_bytes)
    shape, kernel, stride, padding = case
    rng = np.random.default_rng(0)
    images = rng.standard_normal(shape)
    x = images if axis == 1 else np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    windows = Windows(x.shape, axis, kernel, stride, padding)
    expected = matrices(definition(images, windows), axis)
    tiles = list(windows.tiles(slice(0, len(x)), x.dtype))
    assert sum(tile.lines for tile in tiles) == len(x) * windows.OH
    gathered = np.concatenate([as_rows(tile.gather(x), axis).copy() for tile in tiles])
    np.testing.assert_array_equal(gathered, expected)

    # Scattering is the transposed map: <gather(x), g> = <x, scatter(g)> for every x.
    gradients = rng.standard_normal(expected.shape)
    dx, start = np.zeros_like(x), 0
    for tile in tiles:
        rows = gradients[start : start + tile.lines * windows.OW]
        tile.scatter(as_gathered(rows, tile.gather(x), axis), np.eye(rows.shape[1]), dx)
        start += len(rows)
    probes = np.eye(x.size).reshape(-1, *x.shape) if x.size <= 40 else rng.standard_normal((5, *x.shape))
    for probe in probes:
        seen = np.concatenate([as_rows(tile.gather(np.ascontiguousarray(probe)), axis).copy() for tile in tiles])
        assert (seen * gradients).sum() == pytest.approx((probe * dx).sum(), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 1, 1), (3, 2, 1), (2, 3, 1), (5, 1, 2)])
def test_max_pool_follows_the_definition(kernel, stride, padding, layout):
    rng = np.random.default_rng(0)
    images = rng.integers(-3, 3, (2, 3, 6, 5)).astype(np.float32)  # many equal values: the first one counts
    images[1, 1, 2, 3] = np.nan
    padded = np.pad(images, ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2), constant_values=-np.inf)
    views = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), (2, 3))[:, :, ::stride, ::stride]
    flat = views.reshape(*views.shape[:4], -1)
    pool = nn.MaxPool2d(kernel, stride, padding, layout=layout)
    y = pool(images if layout == "NCHW" else images.transpose(0, 2, 3, 1))
    y = y if layout == "NCHW" else y.transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(y, flat.max(axis=-1))

    dx = pool.backward(np.ones_like(y if layout == "NCHW" else y.transpose(0, 2, 3, 1)))
    dx = dx if layout == "NCHW" else dx.transpose(0, 3, 1, 2)
    expected = np.zeros_like(padded)
    for n, c, oh, ow in np.ndindex(y.shape):
        i, j = divmod(int(flat[n, c, oh, ow].argmax()), kernel)
        expected[n, c, oh * stride + i, ow * stride + j] += 1
    np.testing.assert_array_equal(dx, expected[:, :, padding : padding + 6, padding : padding + 5])


@pytest.mark.skipif(not fastbn._core.OPENMP, reason="built without OpenMP")
def test_for_each_calls_every_part_once_on_several_threads():
    both = threading.Barrier(2, timeout=60)  # passed only by two threads at the same time
    calls, lock = [], threading.Lock()

    def function(i):
        both.wait()
        with lock:
            calls.append((i, threading.get_ident()))

    _windows.for_each(function, 2, 2)
    assert sorted(i for i, _ in calls) == [0, 1] and len({thread for _, thread in calls}) == 2


def test_for_each_cuts_the_same_parts_for_every_number_of_threads():
    found = {}
    for threads in (1, 2, 5):
        parts = []
        with fastbn.threads(threads):
            for_each(lambda part, parts=parts: parts.append((part.start, part.stop)), 103, 1 << 30)
        found[threads] = sorted(parts)
    assert found[1] == found[2] == found[5]
    assert found[1][0][0] == 0 and found[1][-1][1] == 103
    assert all(stop == start for (_, stop), (start, _) in zip(found[1], found[1][1:], strict=False))


def test_error_of_a_part_reaches_the_caller():
    def function(part):
        raise MemoryError("of a part")

    for threads in (1, 2):
        with fastbn.threads(threads), pytest.raises(MemoryError, match="of a part"):
            for_each(function, 64, 1 << 30)


@pytest.mark.parametrize("shapes", [((70, 30), (30, 9)), ((5, 30), (30, 90)), ((1, 1), (1, 1)), ((300, 64), (64, 300))])
def test_product_is_numpys(shapes):
    a, b = (np.random.default_rng(0).standard_normal(shape) for shape in shapes)
    for threads in (1, 2):
        with fastbn.threads(threads):
            np.testing.assert_allclose(product(a, b), a @ b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_threads_do_not_change_a_bit(layout):
    """Of a step of a network with every kind of part: convolutions, poolings, products, activations."""
    rng = np.random.default_rng(0)
    x, labels = rng.random((37, 1, 28, 28), np.float32), rng.integers(0, 10, 37)
    results = []
    for threads in (1, 2, 3):
        model = nn.MODELS["keras_blocks"](input_shape=(1, 28, 28), layout=layout, rng=0)
        with nn.threads(threads):
            logits = model.forward(x if layout == "NCHW" else x.transpose(0, 2, 3, 1))
            dx = model.backward(nn.softmax_cross_entropy(logits, labels)[1])
        results.append([logits, dx, *(gradient for _, gradient in nn.parameters(model))])
    for other in results[1:]:
        for array, expected in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(array, expected)


def test_recycled_memory_holds_no_result_that_is_still_used():
    layer = nn.Conv2d(1, 4, 3, padding=1, rng=0)
    images = np.random.default_rng(0).random((3, 16, 1, 32, 32), np.float32)
    kept = [layer(x) for x in images]
    for x, y in zip(images, kept, strict=True):
        np.testing.assert_array_equal(y, layer(x))
