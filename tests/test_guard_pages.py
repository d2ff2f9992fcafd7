"""No kernel reads or writes beyond its arrays: they end, or begin, at a page that may not be touched."""

import ctypes
import mmap

import numpy as np
import pytest

import fastbn
from combinations import PROCESSORS, each_dtype, each_isa, streaming, tuned_for
from problems import assert_same_bits, make_random

PAGE = mmap.PAGESIZE
PROT_NONE, PROT_READ_WRITE = 0, 3
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Guarded:
    """An array right before a forbidden page, or right behind one."""

    def __init__(self, values: np.ndarray, at_end: bool):
        pages = -(-values.nbytes // PAGE)
        self.memory = mmap.mmap(-1, (pages + 2) * PAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        offset = PAGE + (pages * PAGE - values.nbytes if at_end else 0)
        self.array = np.frombuffer(self.memory, values.dtype, values.size, offset).reshape(values.shape)
        self.array[...] = values
        self.protect(PROT_NONE)

    def protect(self, mode: int) -> None:
        last = self.address + len(self.memory) - PAGE
        for page in (self.address, last):
            assert libc.mprotect(page, PAGE, mode) == 0, ctypes.get_errno()


def shapes(tail: int) -> dict[str, tuple[int, ...]]:
    """Planar runs and interleaved rows of this length."""
    return {
        "planar": (3, 3, tail),
        "adjoining": (17, 3, tail),  # also with a mask
        "interleaved": (35, tail),  # whole folded rows, and a rest
    }


@pytest.mark.parametrize("at_end", [True, False], ids=["before-page", "behind-page"])
@pytest.mark.parametrize("family", ["planar", "adjoining", "interleaved"])
@each_isa
@each_dtype
@pytest.mark.parametrize("stream", [False, True], ids=["stored", "streamed"])
def test_nothing_beyond_the_arrays_is_touched(stream, isa, dtype, family, at_end):
    rng = np.random.default_rng(0)
    with fastbn.runtime.isa(isa), streaming(stream):
        for tail in [*range(1, 65), 70, 100, 600]:
            shape = shapes(tail)[family]
            values = [rng.standard_normal(shape).astype(dtype) for _ in range(5)]
            guarded = [Guarded(array, at_end) for array in values]
            x, dy, residual, y, dx = (guard.array for guard in guarded)
            channels = shape[1]
            gamma, beta = np.ones(channels), np.zeros(channels)
            for added in (None, residual):
                _, cache = fastbn.batchnorm_forward(x, gamma, beta, activation="relu", residual=added, out=y)
                expected = fastbn.batchnorm(values[0], gamma, beta, activation="relu", residual=added)
                assert np.array_equal(y, expected)
                fastbn.batchnorm_backward(dy, cache, out=dx)
                fastbn.batchnorm_backward(dy, cache, out=dy)
            fastbn.batchnorm_stats(x)
            fastbn.batchnorm_stats(x[..., ::2])
            fastbn.batchnorm_stats(x[:, ::2])
            statistics = {"running_mean": beta, "running_var": gamma, "training": False}
            _, cache = fastbn.batchnorm_forward(x, gamma, beta, activation="relu", **statistics)
            fastbn.batchnorm_backward(residual, cache, out=dy)
            fastbn.batchnorm(x[:, ::2], out=y[:, ::2])
            fastbn.batchnorm(x, gamma, beta, out=x, **statistics)
            for guard in guarded:
                guard.protect(PROT_READ_WRITE)


@pytest.mark.parametrize("processor", PROCESSORS)
@each_isa
@each_dtype
def test_nothing_beyond_the_last_group_is_touched(isa, dtype, processor):
    """Large groups of unequal size, of which the last has its sums made beside the map of the one before."""
    shape = (2, 100, 2400 // dtype.itemsize)
    guarded = [Guarded(make_random(shape, 1, dtype, seed), True) for seed in range(3)]
    x, dy, out = (guard.array for guard in guarded)
    expected = fastbn.batchnorm(x)
    _, cache = fastbn.batchnorm_forward(x)
    gradient = fastbn.batchnorm_backward(dy, cache).dx
    with fastbn.runtime.isa(isa), streaming(True), tuned_for(processor):
        assert_same_bits(fastbn.batchnorm(x, out=out, num_threads=1), expected)
        assert_same_bits(fastbn.batchnorm_backward(dy, cache, out=out, num_threads=1).dx, gradient)
    for guard in guarded:
        guard.protect(PROT_READ_WRITE)


def test_the_guard_would_notice():
    """Reading the forbidden page ends the process: shown in a child."""
    import multiprocessing

    child = multiprocessing.get_context("fork").Process(target=_touch)
    child.start()
    child.join(60)
    assert child.exitcode is not None and child.exitcode < 0


def _touch() -> None:
    import faulthandler

    faulthandler.disable()
    guarded = Guarded(np.zeros(16, np.float32), at_end=True)
    ctypes.string_at(guarded.array.ctypes.data + 64, 1)
