"""Layouts and memory orders: the same numbers, the promised order of the result, no copy that is not reported."""

import numpy as np
import pytest

import fastbn
from fastbn import _layout, reference
from problems import MEMORY_ORDERS, SHAPES, assert_same_bits, dtype_of, make_parameters, make_random, shape_id
from tolerances import dx_addends, dx_atol, forward_atol

IN_PLACE = {"c-order", "channels-last", "every-other-channel", "every-other-value", "reversed"}


def stride_view(array, axis, planar=None):
    return _layout.view(array.shape, array.strides, axis, array.itemsize, planar)


# The families ---------------------------------------------------------------------------------------------------------

F4 = 4
FAMILIES = {
    # name: (shape, strides in elements, axis) -> (planar, triple, strides in elements) or None
    "nchw": ((2, 3, 4, 5), (60, 20, 5, 1), 1, (True, (2, 3, 20), (60, 20, 1))),
    "nhwc": ((2, 4, 5, 3), (60, 15, 3, 1), 3, (False, (40, 3, 1), (3, 1, 1))),
    "nchw in channels-last memory": ((2, 3, 4, 5), (60, 1, 15, 3), 1, (False, (40, 3, 1), (3, 1, 1))),
    "nc": ((7, 3), (3, 1), 1, (False, (7, 3, 1), (3, 1, 1))),
    "nc, sliced channels": ((7, 3), (12, 2), 1, (False, (7, 3, 1), (12, 2, 1))),
    "nc, fortran": ((7, 3), (1, 7), 1, (True, (1, 3, 7), (1, 7, 1))),
    "nc, one channel": ((7, 1), (1, 1), 1, (True, (1, 1, 7), (1, 1, 1))),
    "nchw, one channel, of a new axis": ((6, 1, 4, 5), (20, 0, 5, 1), 1, (True, (6, 1, 20), (20, 20, 1))),
    "nhwc, one channel": ((2, 4, 5, 1), (20, 5, 1, 1), 3, (True, (1, 1, 40), (1, 1, 1))),
    "nc, one row": ((1, 3), (3, 1), 1, (False, (1, 3, 1), (1, 1, 1))),
    "nc, one row of spread channels": ((1, 3), (30, 2), 1, (True, (1, 3, 1), (1, 2, 1))),
    "chw, one image": ((1, 3, 4, 5), (999, 20, 5, 1), 1, (True, (1, 3, 20), (1, 20, 1))),
    "ncl, one pixel": ((7, 3, 1), (3, 1, 1), 1, (False, (7, 3, 1), (3, 1, 1))),
    "nchw, crop of rows": ((2, 3, 2, 5), (60, 20, 5, 1), 1, (True, (2, 3, 10), (60, 20, 1))),
    "nchw, crop of columns": ((2, 3, 4, 4), (60, 20, 5, 1), 1, None),
    "nhwc, crop of columns": ((2, 4, 4, 3), (60, 15, 3, 1), 3, None),
    "nchw, fortran": ((2, 3, 4, 5), (1, 2, 6, 24), 1, None),
    "nchw, backwards": ((2, 3, 4, 5), (-60, 20, 5, 1), 1, (True, (2, 3, 20), (-60, 20, 1))),
    "broadcast over batch and space": ((2, 3, 4, 5), (0, 1, 0, 0), 1, (True, (2, 3, 20), (0, 1, 0))),
    "channels first": ((3, 4, 5), (20, 5, 1), 0, (True, (1, 3, 20), (1, 20, 1))),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_layout_family_and_triple(name):
    shape, strides, axis, expected = FAMILIES[name]
    seen = _layout.view(shape, tuple(F4 * stride for stride in strides), axis, F4)
    if expected is None:
        assert seen is None
        return
    planar, triple, elements = expected
    assert (seen.planar, seen.shape) == (planar, triple)
    assert seen.strides == tuple(F4 * stride for stride in elements)


def test_layout_triple_visits_the_elements_in_nominal_order():
    for order, arrange in MEMORY_ORDERS.items():
        for shape in SHAPES:
            x = arrange(np.arange(np.prod(shape), dtype=np.float64).reshape(shape), 1)
            seen = stride_view(x, 1) if x.flags.aligned else None
            if seen is None:
                continue
            walked = np.lib.stride_tricks.as_strided(x, seen.shape, seen.strides, writeable=False)
            nominal = np.moveaxis(x, 1, 0).reshape(shape[1], -1)
            np.testing.assert_array_equal(walked.transpose(1, 0, 2).reshape(shape[1], -1), nominal, err_msg=order)


def test_layout_strides_between_elements_do_not_reduce():
    room = np.zeros(64, np.uint8)
    odd = np.ndarray((3, 2), np.float32, room, 0, (10, 4))
    assert stride_view(odd, 1) is None


@pytest.mark.parametrize("planar", [True, False], ids=["planar", "interleaved"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_layout_allocated_arrays_reduce_in_their_family(shape, planar):
    if not planar and shape[1] == 1:
        pytest.skip("one channel is always planar")
    array = _layout.allocate(shape, 1, np.dtype(np.float32), planar)
    seen = stride_view(array, 1, planar)
    assert array.shape == shape and seen.planar == planar
    assert _layout.separate(seen.strides, seen.shape, array.itemsize)


@pytest.mark.parametrize(
    ("shape", "strides", "expected"),
    [
        ((2, 3, 4), (48, 16, 4), True),
        ((2, 3, 4), (-48, 16, -4), True),
        ((2, 3, 4), (4, 8, 24), True),
        ((2, 3, 4), (0, 16, 4), False),
        ((2, 3, 4), (16, 16, 4), False),
        ((1, 3, 4), (0, 16, 4), True),
        ((4, 3, 1), (4, 4, 4), False),
    ],
)
def test_layout_tells_overlapping_elements(shape, strides, expected):
    assert _layout.separate(strides, shape, 4) is expected


# The results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", MEMORY_ORDERS)
@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 7), (3, 5, 4, 6), (2, 3, 2, 4, 3)], ids=shape_id)
def test_layout_memory_order_does_not_change_the_numbers(shape, order):
    values = make_random(shape, 1, np.float32, seed=1)
    x = MEMORY_ORDERS[order](values, 1)
    gamma, beta = make_parameters(shape[1])
    added, dy = make_random(shape, 1, np.float32, seed=2), make_random(shape, 1, np.float32, seed=3)
    before = x.copy()
    y, cache = fastbn.batchnorm_forward(x, gamma, beta, residual=added, activation="relu")
    wanted, wanted_cache = reference.batchnorm_forward(values, gamma, beta, residual=added, activation="relu")
    scaled = reference.batchnorm(values, gamma)
    bound = forward_atol(np.float32, scaled, np.abs(beta).max(), added, offset_ratio=8.0, gamma=np.abs(gamma).max())
    assert (np.abs(y - wanted) <= bound).all()
    gradients = fastbn.batchnorm_backward(dy, cache)
    passes = ~(y <= 0)
    expected = reference.batchnorm_backward(dy, wanted_cache, slope=passes)
    for channel in range(shape[1]):
        largest = dx_addends(values[:, channel], (dy * passes)[:, channel], gamma[channel], 1e-5)
        bound = dx_atol(np.float32, largest)
        assert np.abs(gradients.dx[:, channel] - expected.dx[:, channel]).max() <= bound
    np.testing.assert_array_equal(gradients.dresidual, np.where(passes, dy, 0))
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("order", sorted(IN_PLACE | {"fortran"}))
def test_layout_results_have_the_memory_order_of_x(order):
    x = MEMORY_ORDERS[order](make_random((5, 4), 1, np.float32), 1)
    y, cache = fastbn.batchnorm_forward(x, residual=x)
    gradients = fastbn.batchnorm_backward(np.ascontiguousarray(y), cache)
    for result in (y, gradients.dx, gradients.dresidual):
        assert result.strides == np.empty_like(x).strides


def test_layout_channels_last_memory_gives_channels_last_results():
    x = MEMORY_ORDERS["channels-last"](make_random((2, 3, 4, 5), 1, np.float32), 1)
    assert fastbn.batchnorm2d(x).strides == x.strides


def test_layout_bits_are_those_of_the_family():
    values = make_random((4, 5, 6, 7), 1, np.float32, seed=4)
    nhwc = np.ascontiguousarray(np.moveaxis(values, 1, -1))
    gamma, beta = make_parameters(5)
    expected = fastbn.batchnorm2d(nhwc, gamma, beta, layout="NHWC")
    channels_last = fastbn.batchnorm2d(np.moveaxis(nhwc, -1, 1), gamma, beta)
    assert_same_bits(np.moveaxis(channels_last, 1, -1), expected)
    assert_same_bits(fastbn.batchnorm(nhwc.reshape(-1, 5), gamma, beta).reshape(nhwc.shape), expected)
    planar = fastbn.batchnorm2d(values, gamma, beta)
    assert_same_bits(fastbn.batchnorm(values.reshape(4, 5, 42), gamma, beta).reshape(values.shape), planar)
    assert_same_bits(fastbn.batchnorm2d(MEMORY_ORDERS["padded"](values, 1), gamma, beta), planar)
    crop = MEMORY_ORDERS["channels-last-crop"](values, 1)
    assert_same_bits(np.moveaxis(fastbn.batchnorm2d(crop, gamma, beta), 1, -1), expected)


@pytest.mark.parametrize(
    ("function", "layout", "shape", "axis"),
    [
        (fastbn.batchnorm1d, "NC", (6, 4), 1),
        (fastbn.batchnorm1d, "NCL", (6, 4, 3), 1),
        (fastbn.batchnorm1d, "NLC", (6, 3, 4), 2),
        (fastbn.batchnorm1d, None, (6, 4), 1),
        (fastbn.batchnorm1d, None, (6, 4, 3), 1),
        (fastbn.batchnorm2d, "NCHW", (2, 4, 3, 5), 1),
        (fastbn.batchnorm2d, "NHWC", (2, 3, 5, 4), 3),
        (fastbn.batchnorm3d, "NCDHW", (2, 4, 3, 5, 2), 1),
        (fastbn.batchnorm3d, "NDHWC", (2, 3, 5, 2, 4), 4),
    ],
)
def test_layout_names_the_channel_axis(function, layout, shape, axis):
    x = make_random(shape, axis, np.float32)
    gamma, beta = make_parameters(4)
    assert_same_bits(function(x, gamma, beta, layout=layout), fastbn.batchnorm(x, gamma, beta, axis=axis))
    assert_same_bits(function(x, gamma, beta, layout=layout), fastbn.batchnorm(x, gamma, beta, axis=axis - x.ndim))
    forward = getattr(fastbn, f"{function.__name__}_forward")
    assert_same_bits(forward(x, gamma, beta, layout=layout)[0], function(x, gamma, beta, layout=layout))


# Copies ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", MEMORY_ORDERS)
def test_layout_copies_are_reported_and_only_copies(order, monkeypatch, capsys):
    monkeypatch.setenv("FASTBN_VERBOSE", "1")
    x = MEMORY_ORDERS[order](make_random((3, 4, 5, 6), 1, np.float32), 1)
    fastbn.batchnorm(x)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (0 if order in IN_PLACE else 1)
    assert all(line.startswith("fastbn: x: copied 1440 bytes") for line in lines)


def test_layout_companions_in_another_order_are_copied_and_reported(monkeypatch, capsys):
    x = make_random((3, 4, 5, 6), 1, np.float32)
    other = MEMORY_ORDERS["channels-last"](x, 1)
    expected, cache = fastbn.batchnorm_forward(x, residual=x)
    monkeypatch.setenv("FASTBN_VERBOSE", "1")
    y = fastbn.batchnorm(x, residual=other)
    dx = fastbn.batchnorm_backward(other, cache).dx
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == ["residual", "dy"]
    assert_same_bits(y, expected)
    assert_same_bits(dx, fastbn.batchnorm_backward(x, cache).dx)


def test_layout_copies_are_silent_by_default(monkeypatch, capsys):
    monkeypatch.delenv("FASTBN_VERBOSE", raising=False)
    fastbn.batchnorm(MEMORY_ORDERS["padded"](make_random((3, 4, 5, 6), 1, np.float32), 1))
    assert capsys.readouterr().err == ""


def test_layout_broadcast_residual_is_used_in_place(monkeypatch, capsys):
    monkeypatch.setenv("FASTBN_VERBOSE", "1")
    x = make_random((3, 4, 5, 6), 1, np.float32)
    residual = np.broadcast_to(np.arange(4, dtype=np.float32).reshape(4, 1, 1), x.shape)
    for arranged in (x, MEMORY_ORDERS["channels-last"](x, 1)):
        y = fastbn.batchnorm(arranged, residual=residual)
        assert capsys.readouterr().err == ""
        assert_same_bits(y, fastbn.batchnorm(arranged, residual=np.copy(np.broadcast_to(residual, x.shape), order="K")))
    assert "residual: copied" in capsys.readouterr().err  # of the dense twin, beside channels-last


def test_layout_broadcast_input_is_used_in_place(monkeypatch, capsys):
    monkeypatch.setenv("FASTBN_VERBOSE", "1")
    x = np.broadcast_to(make_random((1, 4, 5), 1, np.float32), (3, 4, 5))
    assert_same_bits(fastbn.batchnorm(x), fastbn.batchnorm(x.copy()))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("dtype", fastbn.runtime.dtypes())
@pytest.mark.parametrize("channels", [3, 4, 6, 8, 12, 20, 70])
def test_layout_windows_that_slide_are_used_in_place(dtype, channels, monkeypatch, capsys):
    """Rows that overlap, whatever they have in common with dense ones."""
    monkeypatch.setenv("FASTBN_VERBOSE", "1")
    values = make_random((channels + 90, 1), 1, dtype_of(dtype)).ravel()
    for step in range(2, channels):  # with 1 they are planar: channel c is what begins at c
        windows = np.lib.stride_tricks.sliding_window_view(values, channels)[::step]
        assert_same_bits(fastbn.batchnorm(windows), fastbn.batchnorm(windows.copy()))
        assert_same_bits(fastbn.batchnorm_stats(windows).m2, fastbn.batchnorm_stats(windows.copy()).m2)
    assert capsys.readouterr().err == ""


def test_layout_subclasses_become_plain_arrays(tmp_path):
    memmap = np.memmap(tmp_path / "x", np.float32, "w+", shape=(4, 3))
    memmap[...] = make_random((4, 3), 1, np.float32)
    y = fastbn.batchnorm(memmap)
    assert type(y) is np.ndarray
    assert_same_bits(y, fastbn.batchnorm(np.array(memmap)))
    lists = fastbn.batchnorm([[1.0, 2.0], [3.0, 5.0]])
    assert lists.dtype == np.float64
