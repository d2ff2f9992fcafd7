"""Argument tuples drawn at random from good and bad values: whatever comes, the answer is a result or a documented
error, and after an error nothing has been written. A seed is a chunk of calls; `make test-long` draws a million."""

import inspect
import math
import random

import numpy as np
import pytest

import fastbn
from combinations import ACTIVATIONS, DTYPES, LONG

CALLS = 1000  # of a seed
NORMAL = np.random.default_rng(0).standard_normal(1 << 19)  # drawing them anew would be half of the time
FORMS = [fastbn.batchnorm, fastbn.batchnorm1d, fastbn.batchnorm2d, fastbn.batchnorm3d]
FORMS += [getattr(fastbn, f"{form.__name__}_forward") for form in FORMS]

# Each argument: values that are good in many calls, then values that are good in few or none.
PLAIN = {
    "training": ([True, False], [None, 1, "yes"]),
    "momentum": ([0.1, 0.0, 1.0, 0.5], [None, -1, 2.0, np.nan, "0.1"]),
    "eps": ([1e-5, 1.0, np.float32(1e-3)], [0.0, -1.0, np.inf, np.nan, None, [1e-5]]),
    "unbiased": ([True, False], [0, None, "no"]),
    "nan_guard": (["propagate", "skip", "raise"], [None, "", ["skip"]]),
    "activation": ([None, *ACTIVATIONS, ("leaky_relu", 0.2)], ["tanh", ("relu", 0.1), ("leaky_relu", np.inf), 3]),
    "device": (["cpu"], ["tpu", None, {}]),  # "cuda" has tests of its own
    "num_threads": ([None, 1, 2, 3], [0, -1, 1.5, True, 10**9]),
    "axis": ([1, 0, -1], [2, -3, 7, None, 1.0]),
    "layout": (["NCHW", "NHWC", "NC", "NCL", "NLC", "NCDHW", "NDHWC"], [None, "CHWN", "", 4]),
}


class Draw:
    """One call: arrays that may be strided, shared, read-only, of a wrong shape or dtype, or no arrays at all."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.chance = self.random.choice([0.0, 0.05, 0.3])  # that an argument is odd
        self.arrays = []

    def odd(self):
        return self.random.random() < self.chance

    def plain(self, name):
        good, bad = PLAIN[name]
        return self.random.choice(bad if self.odd() else good)

    def array(self, shape, dtype):
        if self.arrays and self.odd():
            return self.random.choice(self.arrays)
        if self.odd():
            return self.random.choice([None, 1.0, "text", [[1.0], [2.0, 3.0]], {}, np.float32(2), b"bytes"])
        if self.odd():
            dtype = self.random.choice(["f4", "f8", "f2", "i4", "?", "c8", "O", "U2", ">f4", "g"])
        shape = list(shape)
        if shape and self.odd():
            shape[self.random.randrange(len(shape))] = self.random.choice([0, 1, 2, 9])
        room = [2 * extent + 1 for extent in shape]
        size = math.prod(room)
        start = self.random.randrange(len(NORMAL) - size)
        values = NORMAL[start : start + size].reshape(room).copy()
        if self.odd():
            values[values > 1] = self.random.choice([np.nan, np.inf, 1e300, 0])
        with np.errstate(all="ignore"):
            values = np.asarray(values, dtype)
        self.arrays.append(values)
        step = self.random.choice([1, 1, 2, -1])
        view = values[(..., *(slice(None, None, step) for _ in shape))]
        view = view[(..., *(slice(self.random.choice([0, 1]), None) for _ in shape))]
        view = view[(..., *(slice(extent) for extent in shape))]
        if self.random.random() < 0.4:
            view = np.ascontiguousarray(view)
        if self.random.random() < 0.3:
            view = view.T
        if self.odd():
            view = view.view()
            view.flags.writeable = False
        if self.odd():
            view = np.ma.array(view)
        self.arrays.append(view)
        return view

    def arguments(self, function):
        rank = self.random.choice([0, 1, 2, 2, 3, 3, 4, 4, 5])
        if any(digit in function.__name__ for digit in "123") and not self.odd():
            rank = 2 + int(next(filter(str.isdigit, function.__name__)))
        shape = [self.random.choice([1, 2, 3, 5] if rank > 3 else [1, 2, 5, 17]) for _ in range(rank)]
        dtype = self.random.choice(DTYPES)
        chosen = {"x": self.array(shape, dtype)}
        shape = np.shape(chosen["x"]) if isinstance(chosen["x"], np.ndarray) else shape
        names = [name for name in inspect.signature(function).parameters if name != "x"]
        tracked = self.random.random() < 0.5
        for name in names:
            if name in ("axis", "layout") or self.random.random() < 0.4:
                chosen[name] = self.plain(name) if name in PLAIN else None
        layout = chosen.get("layout")
        axis = layout.find("C") if isinstance(layout, str) else chosen.get("axis", 1)
        channels = shape[axis] if isinstance(axis, int) and -len(shape) <= axis < len(shape) else 3
        for name in ("gamma", "beta", "running_mean", "running_var"):
            if name.startswith("running") == tracked or self.odd():
                chosen[name] = self.array([channels], self.random.choice(["f4", "f8", dtype]))
        for name in ("residual", "out"):
            if self.random.random() < 0.3:
                chosen[name] = self.array(shape, dtype)
        if tracked and not self.odd():
            chosen["training"] = self.random.choice([True, False])
        return chosen

    def state(self):
        return [(array.dtype, array.shape, array.tobytes()) for array in self.arrays if array.dtype != object]


def call(draw):
    """One to three calls that follow from each other; the errors of the last one are the caller's."""
    if draw.random.random() < 0.1:
        x = draw.array([draw.random.choice([1, 2, 5]) for _ in range(draw.random.randrange(1, 5))], "f4")
        return lambda: fastbn.batchnorm_stats(x, axis=draw.plain("axis"), num_threads=draw.plain("num_threads"))
    function = draw.random.choice(FORMS)
    arguments = draw.arguments(function)

    def run():
        result = function(**arguments)
        if isinstance(result, tuple) and draw.random.random() < 0.8:
            y, cache = result
            dy = draw.array(y.shape, y.dtype)
            out = draw.array(y.shape, y.dtype) if draw.random.random() < 0.3 else None
            before = draw.state()
            try:
                fastbn.batchnorm_backward(dy, cache if not draw.odd() else y, out=out)
            except fastbn.FastBNError:
                assert draw.state() == before

    return run


@pytest.mark.parametrize("seed", range(1000 if LONG else 4))
def test_random_arguments_end_in_a_result_or_a_documented_error(seed, record_property):
    ends = {"result": 0, "error": 0}
    for number in range(CALLS):
        draw = Draw(seed * CALLS + number)
        run = call(draw)
        before = draw.state()
        try:
            run()
        except fastbn.FastBNError as error:
            ends["error"] += 1
            assert ": expected " in str(error) or "device: " in str(error)
            assert draw.state() == before, error
        except Exception as error:
            error.args = (f"{error} (draw {seed * CALLS + number})",)
            raise
        else:
            ends["result"] += 1
    assert min(ends.values()) > CALLS // 20
    record_property("calls", CALLS)
    record_property("ended in a result", ends["result"])
