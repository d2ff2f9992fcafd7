"""Bad input never crashes and never writes. Each call gets fresh valid arguments in `a` and breaks one rule of one
argument; afterwards every array of `a` must be as it was.

Three tables: `TABLE` has the rules of single arguments, with exception and message; `PLAIN` every argument that is a
plain value against every kind of value, `ARRAYS` every argument that is an array against every kind of array.
"""

import re
import weakref
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

import fastbn
from fastbn import (
    AliasError,
    ArgumentError,
    DeviceError,
    DTypeError,
    NonFiniteError,
    ReadOnlyError,
    ShapeError,
    SingleValueError,
    memory,
    runtime,
)
from problems import make_random

SHAPE = (2, 3, 4, 5)


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def arguments():
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, dtype=np.float32)  # noqa: E731
    a = SimpleNamespace(x=normal(*SHAPE), dy=normal(*SHAPE), residual=normal(*SHAPE), out=normal(*SHAPE))
    a.gamma, a.beta, a.mean = normal(3), normal(3), normal(3)
    a.var = np.abs(normal(3)) + 1
    a.vector = normal(6, 3)
    a.room = normal(4, 3, 4, 5)  # two overlapping arrays of x's shape fit in
    a.y, a.cache = fastbn.batchnorm_forward(a.x, a.gamma, a.beta)
    a.layer = fastbn.BatchNorm2d(3)
    a.state = a.layer.state_dict()
    return a


def plain(a, **options):
    return fastbn.batchnorm2d(a.x, a.gamma, a.beta, out=a.out, **options)


def train(a, **options):
    options = {"x": a.x, "running_mean": a.mean, "running_var": a.var, "training": True, "out": a.out} | options
    return fastbn.batchnorm2d(gamma=a.gamma, beta=a.beta, **options)


def infer(a, **options):
    return train(a, training=False, **options)


def backward(a, dy=None, **options):
    return fastbn.batchnorm_backward(a.dy if dy is None else dy, a.cache, **options)


def stats(a, x=None, **options):
    return fastbn.batchnorm_stats(a.x if x is None else x, **options)


def changed(state, **entries):
    return {**state, **entries}


def self_overlapping(a):
    return np.lib.stride_tricks.as_strided(a.out, SHAPE, (80, 80, 20, 4))


class Unreadable:
    def __array__(self, dtype=None, copy=None):
        raise ValueError("no data here")


DTYPES = " or ".join(fastbn.runtime.dtypes())

TABLE = [
    # x
    ("x-int-hint", lambda a: fastbn.batchnorm([[1, 2], [3, 4]]), DTypeError, "astype(np.float32)"),
    ("x-longdouble", lambda a: fastbn.batchnorm(a.x.astype(np.longdouble)), DTypeError, "x: expected dtype"),
    ("x-none", lambda a: fastbn.batchnorm2d(None), ArgumentError, "x: expected an array_like, got NoneType"),
    ("x-text", lambda a: fastbn.batchnorm("image"), ArgumentError, "x: expected an array_like, got str"),
    ("x-dict", lambda a: fastbn.batchnorm_stats({}), ArgumentError, "x: expected an array_like, got dict"),
    ("x-scalar", lambda a: fastbn.batchnorm(1.0), ShapeError, "x: expected at least 1 dimension, got 0"),
    ("x-rank-1d", lambda a: fastbn.batchnorm1d(a.x), ShapeError, "x: expected 2 (NC) or 3 (NCL) dimensions, got 4"),
    ("x-rank-2d", lambda a: fastbn.batchnorm2d(a.x[0]), ShapeError, "x: expected 4 (NCHW) dimensions, got 3"),
    ("x-rank-3d", lambda a: fastbn.batchnorm3d(a.x), ShapeError, "x: expected 5 (NCDHW) dimensions, got 4"),
    ("x-rank-of-layout", lambda a: fastbn.batchnorm1d(a.vector, layout="NLC"), ShapeError, "expected 3 (NLC) dimen"),
    ("x-one-value", lambda a: fastbn.batchnorm1d(a.vector[:1]), SingleValueError, "more than 1 value per channel"),
    ("x-one-value-shape", lambda a: fastbn.batchnorm1d(a.vector[:1]), SingleValueError, "got input size (1, 3)"),
    ("x-one-value-running",
     lambda a: fastbn.batchnorm(a.vector[:1], running_mean=a.mean, running_var=a.var, training=True),
     SingleValueError, "per channel when training"),
    ("x-one-value-forward", lambda a: fastbn.batchnorm_forward(a.vector[:1]), SingleValueError, "when training"),
    ("x-overlaps-running",
     lambda a: fastbn.batchnorm(a.vector, running_mean=a.vector[0], running_var=a.var, training=True),
     AliasError, "running_mean: expected an array apart from x"),
    # axis and layout
    ("axis-large", lambda a: fastbn.batchnorm(a.x, axis=4), ShapeError, "axis: expected -4 to 3 for an x of 4 dimens"),
    ("axis-small", lambda a: fastbn.batchnorm(a.x, axis=-5), ShapeError, "got -5"),
    ("axis-forward", lambda a: fastbn.batchnorm_forward(a.x, axis=9), ShapeError, "got 9"),
    ("layout-unknown", lambda a: plain(a, layout="NHCW"), ArgumentError, "layout: expected one of 'NCHW', 'NHWC', got"),
    ("layout-lower-case", lambda a: plain(a, layout="nchw"), ArgumentError, "got 'nchw'"),
    ("layout-of-other-function", lambda a: plain(a, layout="NC"), ArgumentError, "got 'NC'"),
    ("layout-1d", lambda a: fastbn.batchnorm1d(a.vector, layout="NCHW"), ArgumentError, "'NC', 'NCL', 'NLC'"),
    ("layout-3d", lambda a: fastbn.batchnorm3d(a.x, layout="NCHW"), ArgumentError, "'NCDHW', 'NDHWC'"),
    # gamma and beta
    ("gamma-layout", lambda a: fastbn.batchnorm2d(a.x, a.gamma, layout="NHWC"), ShapeError, "for the 5 channels of x"),
    # running statistics and training
    ("running_mean-alone", lambda a: train(a, running_var=None),
     ArgumentError, "running_var: expected an array, since"),
    ("running_var-alone", lambda a: train(a, running_mean=None), ArgumentError, "since running_var is given, got None"),
    ("training-unsaid", lambda a: train(a, training=None),
     ArgumentError, "training: expected True or False when running"),
    ("training-false-alone", lambda a: plain(a, training=False), ArgumentError, "running_mean and running_var when"),
    ("running-same", lambda a: train(a, running_mean=a.var),
     AliasError, "running_mean: expected an array apart from r"),
    ("running-residual",
     lambda a: train(a, residual=a.residual, running_mean=a.residual[0, :, 0, 0]), AliasError, "apart from residual"),
    # numbers
    ("momentum-large", lambda a: train(a, momentum=1.1), ArgumentError, "momentum: expected a number from 0 to 1"),
    ("momentum-none", lambda a: train(a, momentum=None), ArgumentError, "for layers only"),
    ("eps-zero", lambda a: plain(a, eps=0.0), ArgumentError, "eps: expected a finite number > 0 in training, got 0.0"),
    ("eps-negative", lambda a: infer(a, eps=-1e-5), ArgumentError, "eps: expected a finite number >= 0 in inference"),
    ("nan_guard-raise", lambda a: train(a, nan_guard="raise", x=a.x * np.float32(np.inf)),
     NonFiniteError, "x: expected finite statistics in every channel (nan_guard='raise'), got NaN or Inf in 3 of 3"),
    # names
    ("activation-unknown", lambda a: plain(a, activation="rleu"),
     ArgumentError, "activation: expected None, one of 'id"),
    ("activation-slope-of-relu", lambda a: plain(a, activation=("relu", 0.1)),
     ArgumentError, "activation: expected None, one of"),
    ("activation-slope-nan", lambda a: plain(a, activation=("leaky_relu", np.nan)),
     ArgumentError, "activation: expected a finite slope"),
    ("activation-slope-text", lambda a: plain(a, activation=("leaky_relu", "0.1")),
     ArgumentError, "activation: expected a finite slope"),
    ("device-unknown", lambda a: plain(a, device="tpu"),
     ArgumentError, "device: expected one of 'cpu', 'cuda', got 'tpu'"),
    ("keyword-unknown", lambda a: plain(a, decay=0.9), TypeError, "decay"),
    # residual
    # out
    ("out-byte-order", lambda a: fastbn.batchnorm(a.x, out=a.out.astype(a.out.dtype.newbyteorder())),
     DTypeError, "native"),
    ("out-broadcast", lambda a: fastbn.batchnorm(a.x, out=np.broadcast_to(a.out[:1], SHAPE)), ReadOnlyError, "out:"),
    ("out-overlaps-itself", lambda a: fastbn.batchnorm(a.x, out=self_overlapping(a)), AliasError, "do not overlap"),
    ("out-irreducible", lambda a: fastbn.batchnorm(a.x, out=np.zeros((2, 3, 4, 9), np.float32)[..., :5]), ArgumentError,
     "pass np.empty_like(x)"),
    ("out-family", lambda a: fastbn.batchnorm(a.x, out=np.moveaxis(np.zeros((2, 4, 5, 3), np.float32), -1, 1)),
     ArgumentError, "out: expected aligned memory in the order of x"),
    ("out-misaligned",
     lambda a: fastbn.batchnorm(a.x, out=np.zeros(a.x.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(SHAPE)),
     ArgumentError, "out: expected aligned memory"),
    ("out-shifted-x", lambda a: fastbn.batchnorm(a.room[:2], out=a.room[1:3]), AliasError,
     "out: expected x itself or an array apart from it, got one that overlaps x"),
    ("out-shifted-residual", lambda a: fastbn.batchnorm(a.x, residual=a.room[:2], out=a.room[1:3]), AliasError,
     "got one that overlaps residual"),
    ("out-reversed-x", lambda a: fastbn.batchnorm(a.x, out=a.x[::-1]), AliasError, "overlaps x"),
    ("out-is-x-of-forward", lambda a: fastbn.batchnorm_forward(a.x, out=a.x), AliasError, "an array apart from x"),
    ("out-is-x-of-2d", lambda a: fastbn.batchnorm2d_forward(a.x, out=a.x), AliasError, "an array apart from x"),
    ("out-overlaps-running", lambda a: train(a, running_mean=a.out[0, :, 0, 0]), AliasError, "apart from running_mean"),
    ("out-overlaps-running-infer", lambda a: infer(a, running_var=a.out[0, :, 0, 0]), AliasError, "running_var"),
    # backward
    ("cache-swapped", lambda a: fastbn.batchnorm_backward(a.cache, a.dy), ArgumentError, "cache: expected"),
    ("dx-out-is-x", lambda a: backward(a, out=a.x), AliasError, "out: expected an array apart from x"),
    ("dx-out-shifted-dy", lambda a: backward(a, a.room[:2], out=a.room[1:3]), AliasError, "overlaps dy"),
    ("dx-out-family", lambda a: backward(a, out=np.moveaxis(np.zeros((2, 4, 5, 3), np.float32), -1, 1)), ArgumentError,
     "np.empty_like(x)"),
    # statistics
    ("stats-axis", lambda a: stats(a, axis=7), ShapeError, "axis: expected"),
    ("stats-shapes", lambda a: fastbn.Stats(2, a.mean, a.var[:2]), ShapeError, "m2: expected shape (3,) as mean"),
    ("stats-merge-channels", lambda a: stats(a).merge(stats(a, a.vector[:, :2])),
     ShapeError, "expected 3 channels, got 2"),
    ("stats-merge-type", lambda a: stats(a).merge(a.x), ArgumentError, "other: expected Stats, got ndarray"),
    # layers
    ("layer-layout", lambda a: fastbn.BatchNorm2d(3, layout="NCL"), ArgumentError, "layout: expected"),
    ("layer-rank", lambda a: a.layer(a.x[0]), ShapeError, "x: expected 4 (NCHW) dimensions, got 3"),
    ("layer-channels", lambda a: a.layer(a.x[:, :2]),
     ShapeError, "x: expected 3 channels (num_features) on axis 1, got"),
    ("layer-one-value", lambda a: a.layer(a.x[:1, :, :1, :1]), SingleValueError, "more than 1 value per channel"),
    ("layer-backward-first", lambda a: a.layer.backward(a.dy),
     ArgumentError, "backward: expected a call of BatchNorm2d"),
    ("state-type", lambda a: a.layer.load_state_dict([1]), ArgumentError, "state: expected a mapping"),
    ("state-missing", lambda a: a.layer.load_state_dict({"weight": a.gamma}),
     ArgumentError, "missing ['bias', 'running_"),
    ("state-unexpected", lambda a: a.layer.load_state_dict(changed(a.state, w=a.gamma)),
     ArgumentError, "unexpected ['w']"),
    ("state-shape", lambda a: a.layer.load_state_dict(changed(a.state, bias=a.beta[:2])),
     ShapeError, "bias: expected sh"),
    ("state-dtype", lambda a: a.layer.load_state_dict(changed(a.state, bias=a.beta + 1j)),
     DTypeError, "bias: expected"),
    ("state-counter-dtype", lambda a: a.layer.load_state_dict(changed(a.state, num_batches_tracked=np.float32(1.5))),
     DTypeError, "num_batches_tracked: expected"),
    # runtime
]  # fmt: skip


# Plain values --------------------------------------------------------------------------------------------------------

VALUES = {
    "none": None,
    "true": True,
    "zero": 0,
    "one": 1,
    "two": 2,
    "minus-one": -1,
    "a-half": 0.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "minus-inf": float("-inf"),
    "huge": 10**400,
    "complex": 1j,
    "text": "text",
    "no-text": "",
    "bytes": b"1",
    "list": [1],
    "tuple": (1, 2),
    "dict": {"a": 1},
    "array": np.ones(3),
    "class": int,
    "function": len,
    "object": object(),
}
BOOLEAN, WEIGHT, POSITIVE = {"true"}, {"zero", "one", "a-half"}, {"one", "two", "a-half"}
COUNT = {"one", "two"}

# (argument, its name in the message, call, the values that are accepted)
PLAIN = [
    ("momentum", "momentum", lambda a, v: train(a, momentum=v), WEIGHT),
    ("momentum-unused", "momentum", lambda a, v: plain(a, momentum=v), WEIGHT),
    ("eps", "eps", lambda a, v: plain(a, eps=v), POSITIVE),
    ("eps-in-inference", "eps", lambda a, v: infer(a, eps=v), POSITIVE | {"zero"}),
    ("training", "training", lambda a, v: train(a, training=v), BOOLEAN),
    ("unbiased", "unbiased", lambda a, v: train(a, unbiased=v), BOOLEAN),
    ("nan_guard", "nan_guard", lambda a, v: train(a, nan_guard=v), set()),
    ("nan_guard-unused", "nan_guard", lambda a, v: plain(a, nan_guard=v), set()),
    ("activation", "activation", lambda a, v: plain(a, activation=v), {"none"}),
    ("activation-slope", "activation", lambda a, v: plain(a, activation=("leaky_relu", v)),
     {"zero", "one", "two", "minus-one", "a-half"}),
    ("device", "device", lambda a, v: plain(a, device=v), set()),
    ("num_threads", "num_threads", lambda a, v: plain(a, num_threads=v), COUNT | {"none"}),
    ("backward-num_threads", "num_threads", lambda a, v: backward(a, num_threads=v), COUNT | {"none"}),
    ("backward-cache", "cache", lambda a, v: fastbn.batchnorm_backward(a.dy, v), set()),
    ("axis", "axis", lambda a, v: fastbn.batchnorm(a.x, axis=v, out=a.out), {"zero", "one", "two", "minus-one"}),
    ("layout", "layout", lambda a, v: plain(a, layout=v), {"none"}),
    ("stats-axis", "axis", lambda a, v: stats(a, axis=v), {"zero", "one", "two", "minus-one"}),
    ("stats-num_threads", "num_threads", lambda a, v: stats(a, num_threads=v), COUNT | {"none"}),
    ("stats-count", "count", lambda a, v: fastbn.Stats(v, a.mean, a.var), COUNT | {"zero", "huge"}),
    ("stats-unbiased", "unbiased", lambda a, v: stats(a).var(unbiased=v), BOOLEAN),
    ("stats-merge", "other", lambda a, v: stats(a).merge(v), set()),
    ("layer-num_features", "num_features", lambda a, v: fastbn.BatchNorm2d(v), COUNT),
    ("layer-eps", "eps", lambda a, v: fastbn.BatchNorm2d(3, v), POSITIVE),
    ("layer-momentum", "momentum", lambda a, v: fastbn.BatchNorm2d(3, momentum=v), WEIGHT | {"none"}),
    ("layer-affine", "affine", lambda a, v: fastbn.BatchNorm2d(3, affine=v), BOOLEAN),
    ("layer-track", "track_running_stats", lambda a, v: fastbn.BatchNorm2d(3, track_running_stats=v), BOOLEAN),
    ("layer-layout", "layout", lambda a, v: fastbn.BatchNorm1d(3, layout=v), {"none"}),
    ("layer-unbiased", "unbiased", lambda a, v: fastbn.BatchNorm2d(3, unbiased=v), BOOLEAN),
    ("layer-nan_guard", "nan_guard", lambda a, v: fastbn.BatchNorm3d(3, nan_guard=v), set()),
    ("layer-activation", "activation", lambda a, v: fastbn.BatchNorm2d(3, activation=v), {"none"}),
    ("layer-dtype", "dtype", lambda a, v: fastbn.BatchNorm2d(3, dtype=v), {"none"}),
    ("layer-device", "device", lambda a, v: fastbn.BatchNorm2d(3, device=v), set()),
    ("layer-num_threads", "num_threads", lambda a, v: fastbn.BatchNorm2d(3, num_threads=v), COUNT | {"none"}),
    ("layer-mode", "mode", lambda a, v: a.layer.train(v), BOOLEAN),
    ("state", "state", lambda a, v: a.layer.load_state_dict(v), set()),
    ("state-strict", "strict", lambda a, v: a.layer.load_state_dict(a.state, strict=v), BOOLEAN),
    ("isa", "isa", lambda a, v: fastbn.runtime.isa(v).__enter__(), set()),
    ("threads", "n", lambda a, v: enter_and_leave(fastbn.threads(v)), COUNT),
    ("set_num_threads", "n", lambda a, v: fastbn.set_num_threads(v), COUNT | {"none"}),
    ("set_cache_limit", "nbytes", lambda a, v: fastbn.set_cache_limit(v), COUNT | {"none", "zero", "huge"}),
    ("set_stream_bytes", "nbytes", lambda a, v: memory.set_stream_bytes(v), COUNT | {"none", "zero", "huge"}),
    ("copy_speed-nbytes", "nbytes", lambda a, v: fastbn.runtime.copy_speed(v), COUNT),
    ("copy_speed-repeats", "repeats", lambda a, v: fastbn.runtime.copy_speed(64, repeats=v), COUNT),
    ("copy_speed-num_threads", "num_threads", lambda a, v: fastbn.runtime.copy_speed(64, v), COUNT | {"none"}),
]  # fmt: skip


def enter_and_leave(context):
    with context:
        pass


# Arrays --------------------------------------------------------------------------------------------------------------

KINDS = {
    "integers": lambda good: good.astype(np.int32),
    "booleans": lambda good: good > 0,
    "complex": lambda good: good.astype(complex),
    "objects": lambda good: good.astype(object),
    "texts": lambda good: good.astype(str),
    "dates": lambda good: np.zeros(good.shape, "datetime64[s]"),
    "records": lambda good: np.zeros(good.shape, [("a", "f4")]),
    "masked": lambda good: np.ma.masked_less(good, 0),
    "without-the-last": lambda good: good[:-1],
    "one-twice": lambda good: np.concatenate([good, good[:1]]),
    "one-axis-more": lambda good: good[None],
    "empty": lambda good: good[:0],
    "scalar": lambda good: 1.0,
    "ragged": lambda good: [[1.0], [2.0, 3.0]],
    "unreadable": lambda good: Unreadable(),
    "text": lambda good: "text",
}
LIKE_X = KINDS | {
    "transposed": lambda good: np.swapaxes(good, 0, -1),
    "of-another-dtype": lambda good: good.astype(np.float64),
    "half": lambda good: good.astype(np.float16),
}
WRITTEN = {
    "list": lambda good: good.tolist(),
    "none-of-numpy": lambda good: bytearray(good.nbytes),
    "read-only": lambda good: read_only(good),
    "broadcast": lambda good: np.broadcast_to(good[:1], good.shape),
}


def without(*names):
    return {name: kind for name, kind in KINDS.items() if name not in names}


# (argument, its name in the message, the array that it takes, call, what it refuses)
ARRAYS = [
    ("gamma", "gamma", "gamma", lambda a, v: fastbn.batchnorm2d(a.x, v, a.beta, out=a.out), KINDS),
    ("beta", "beta", "beta", lambda a, v: fastbn.batchnorm2d(a.x, a.gamma, v, out=a.out), KINDS),
    ("running_mean", "running_mean", "mean", lambda a, v: train(a, running_mean=v), KINDS | WRITTEN),
    ("running_var", "running_var", "var", lambda a, v: train(a, running_var=v), KINDS | WRITTEN),
    ("running_mean-in-inference", "running_mean", "mean", lambda a, v: infer(a, running_mean=v), KINDS),
    ("running_var-in-inference", "running_var", "var", lambda a, v: infer(a, running_var=v), KINDS),
    ("residual", "residual", "residual", lambda a, v: plain(a, residual=v), LIKE_X),
    ("out", "out", "out", lambda a, v: fastbn.batchnorm(a.x, out=v), LIKE_X | WRITTEN),
    ("dy", "dy", "dy", lambda a, v: backward(a, v, out=a.out), LIKE_X),
    ("backward-out", "out", "out", lambda a, v: backward(a, out=v), LIKE_X | WRITTEN),
    ("layer-residual", "residual", "residual", lambda a, v: a.layer(a.x, v), LIKE_X),
    ("layer-dy", "dy", "dy", lambda a, v: (a.layer.eval()(a.x), a.layer.backward(v)), LIKE_X),
    ("state-weight", "weight", "gamma", lambda a, v: a.layer.load_state_dict(a.state | {"weight": v}),
     without("integers", "booleans")),
    ("state-running_var", "running_var", "var", lambda a, v: a.layer.load_state_dict(a.state | {"running_var": v}),
     without("integers", "booleans")),
    ("stats-mean", "mean", "mean", lambda a, v: fastbn.Stats(4, v, a.var),
     without("integers", "booleans", "without-the-last", "one-twice", "empty")),
    ("stats-m2", "m2", "var", lambda a, v: fastbn.Stats(4, a.mean, v),
     without("integers", "booleans")),
    # what x is alone decides about its shape
    *((f"{name}-x", "x", "x", call, without("without-the-last", "one-twice", "one-axis-more", "empty"))
      for name, call in {
          "batchnorm": lambda a, v: fastbn.batchnorm(v),
          "batchnorm1d": lambda a, v: fastbn.batchnorm1d(v),
          "batchnorm2d": lambda a, v: fastbn.batchnorm2d(v, a.gamma, a.beta),
          "batchnorm3d": lambda a, v: fastbn.batchnorm3d(v),
          "batchnorm_forward": lambda a, v: fastbn.batchnorm_forward(v),
          "stats": stats,
          "layer": lambda a, v: a.layer(v),
      }.items()),
]  # fmt: skip

CASES = [
    (f"{argument}-is-{rule}", name, lambda a, call=call, value=value: call(a, value))
    for argument, name, call, accepted in PLAIN
    for rule, value in VALUES.items()
    if rule not in accepted
]
CASES += [(f"{argument}-is-{rule}", name, lambda a, call=call, kind=kind, good=good: call(a, kind(getattr(a, good))))
          for argument, name, good, call, kinds in ARRAYS for rule, kind in kinds.items()]  # fmt: skip


def snapshot(a):
    arrays = {name: value for name, value in vars(a).items() if isinstance(value, np.ndarray)}
    arrays |= {f"state {name}": value for name, value in a.state.items()}
    arrays |= {f"layer {name}": value for name, value in a.layer.state_dict().items()}
    return {name: (value.dtype, value.tobytes()) for name, value in arrays.items()}


def test_validation_table_has_distinct_rules():
    names = [name for name, *_ in TABLE + CASES]
    assert len(set(names)) == len(names) >= 1000


@pytest.mark.parametrize(("call", "exception", "fragment"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_validation_raises_and_writes_nothing(call, exception, fragment):
    a = arguments()
    before = snapshot(a)
    with pytest.raises(exception) as info:
        call(a)
    assert fragment in str(info.value)
    assert snapshot(a) == before


@pytest.mark.parametrize(("name", "call"), [row[1:] for row in CASES], ids=[row[0] for row in CASES])
def test_validation_refuses_other_kinds_and_writes_nothing(name, call):
    a = arguments()
    before = snapshot(a)
    with pytest.raises(fastbn.FastBNError) as info:
        call(a)
    assert str(info.value).startswith(f"{name}: expected ")
    assert ", got " in str(info.value) or "array_like" in str(info.value)
    assert snapshot(a) == before


@pytest.mark.parametrize(("call", "accepted"), [row[2:] for row in PLAIN], ids=[row[0] for row in PLAIN])
def test_validation_accepts_what_the_table_says(call, accepted):
    try:
        for rule in accepted:
            call(arguments(), VALUES[rule])
    finally:
        fastbn.set_num_threads(None)
        fastbn.set_cache_limit(None)
        memory.set_stream_bytes(None)


@pytest.mark.parametrize("text", ["-1", "-0", "two", "1.5", "1e3", "0x4", "4,2", "true", "nan", "\uff14"])
@pytest.mark.parametrize(
    ("read", "variable"),
    [
        (runtime.fastbn_num_threads, "FASTBN_NUM_THREADS"),
        (partial(memory.nbytes_of_environment, "FASTBN_CACHE_LIMIT"), "FASTBN_CACHE_LIMIT"),
        (partial(memory.nbytes_of_environment, "FASTBN_STREAM_BYTES"), "FASTBN_STREAM_BYTES"),
        (runtime._initial_isa, "FASTBN_ISA"),
    ],
)
def test_validation_of_the_environment_names_the_variable_and_the_text(read, variable, text):
    """An ImportError: these are read when fastbn is imported."""
    with pytest.raises(ImportError, match=f"^{variable}(=|: expected ).*{re.escape(repr(text))}"):
        read({variable: text})


def test_validation_of_numbers_in_the_environment_that_are_larger_than_any():
    """More threads than there can be are a mistake; that many bytes are no limit."""
    huge = "9" * 40
    with pytest.raises(ImportError, match=r"^FASTBN_NUM_THREADS: expected"):
        runtime.fastbn_num_threads({"FASTBN_NUM_THREADS": huge})
    assert memory.nbytes_of_environment("FASTBN_STREAM_BYTES", {"FASTBN_STREAM_BYTES": huge}) == int(huge)
    try:
        memory.set_stream_bytes(int(huge))
        assert memory.stream_bytes() == memory.LARGEST
    finally:
        memory.set_stream_bytes(None)


def test_validation_does_not_depend_on_what_was_accepted_before():
    """1 == True and 0.0 == -0.0, but not as a slope."""
    x = np.array([[-1.0], [1.0]], np.float32)
    plain(arguments(), activation=("leaky_relu", 1))
    with pytest.raises(ArgumentError, match=r"^activation: "):
        plain(arguments(), activation=("leaky_relu", True))
    zeros = [fastbn.batchnorm(x, activation=("leaky_relu", slope))[0, 0] for slope in (0.0, -0.0)]
    assert [np.signbit(zero) for zero in zeros] == [True, False]


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_validation_of_running_statistics_whose_elements_overlap(name):
    x = np.zeros((4, 3), np.float32)
    running = {"running_mean": np.zeros(3, np.float32), "running_var": np.ones(3, np.float32)}
    running[name] = np.broadcast_to(running[name][:1], 3)
    running[name].flags.writeable = True
    with pytest.raises(AliasError, match=f"^{name}: expected elements that do not overlap"):
        fastbn.batchnorm(x, **running, training=True)
    fastbn.batchnorm(x, **running, training=False)  # which writes none


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fastbn.batchnorm([[1.0], [2.0]], activation=(np.zeros(2), 0.1)), "activation: expected"),
        (lambda: fastbn.batchnorm([[1.0], [2.0]], device=np.array(["a", "b"])), "device: expected"),
        (
            lambda: fastbn.fold_into_conv(np.ones((3, 2), int), None, np.zeros(3), np.ones(3)),
            "weight: expected a floating-point dtype",
        ),
    ],
    ids=["activation", "device", "weight"],
)
def test_validation_names_the_argument_of_odd_values(call, message):
    with pytest.raises((ArgumentError, DTypeError), match=f"^{message}"):
        call()


@pytest.mark.parametrize(
    "function",
    [plain, train, infer, backward, stats],
    ids=["plain", "training", "inference", "backward", "stats"],
)
def test_validation_accepts_the_valid_arguments(function):
    function(arguments())


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (ShapeError, ValueError),
        (SingleValueError, ValueError),
        (ArgumentError, ValueError),
        (ReadOnlyError, ValueError),
        (AliasError, ValueError),
        (DTypeError, TypeError),
        (DeviceError, RuntimeError),
        (NonFiniteError, FloatingPointError),
    ],
)
def test_validation_errors_are_also_built_in_ones(error, builtin):
    assert issubclass(error, fastbn.FastBNError) and issubclass(error, builtin)


@pytest.mark.parametrize("name", ["batchnorm", "batchnorm1d", "batchnorm2d", "batchnorm3d"])
def test_validation_of_all_forms_is_one(name):
    """The same options, defaults included, in every form: there is one implementation behind them."""
    import inspect

    def options(function):
        parameters = inspect.signature(function).parameters
        return {key: p.default for key, p in parameters.items() if key not in ("axis", "layout")}

    assert options(getattr(fastbn, name)) == options(getattr(fastbn, f"{name}_forward")) == options(fastbn.batchnorm2d)
    assert list(options(fastbn.batchnorm2d))[:3] == ["x", "gamma", "beta"]
    assert "running_mean" in options(fastbn.batchnorm2d)


# What has been accepted is not checked again --------------------------------------------------------------------------


def test_validation_takes_options_that_it_remembers_for_no_others():
    """After a call with valid options, others are taken for what they are."""
    x = np.arange(12, dtype=np.float32).reshape(4, 3) - 6
    valid = {"training": False, "momentum": 0.5, "eps": 1.0, "activation": "relu", "num_threads": 1}

    def call(**changed):
        running = {"running_mean": np.zeros(3), "running_var": np.ones(3)}
        return fastbn.batchnorm(x, **running | valid | changed)

    expected = call()
    for name, value in {"eps": 0.25, "activation": None, "training": True, "residual": x}.items():
        assert not np.array_equal(call(**{name: value}), expected)
        np.testing.assert_array_equal(call(), expected)
    for name, value in {"eps": -1.0, "activation": "tanh", "training": 1, "num_threads": 0, "momentum": 2.0}.items():
        for _ in range(2):
            with pytest.raises(ArgumentError, match=name):
                call(**{name: value})
    for _ in range(2):
        with pytest.raises(ArgumentError, match="running_mean"):
            call(running_mean=None, running_var=None)
        with pytest.raises(TypeError, match="'unknown'"):
            call(unknown=None)


def test_validation_of_a_gradient_that_is_none_or_the_kept_x():
    x = make_random((2, 4, 6, 6), 1, np.float32)
    _y, cache = fastbn.batchnorm_forward(x)
    for out in (None, np.empty_like(x)):
        with pytest.raises(ArgumentError, match="dy: expected an array_like, got NoneType"):
            fastbn.batchnorm_backward(None, cache, out=out)
    with pytest.raises(AliasError, match="out: expected an array apart from x"):
        fastbn.batchnorm_backward(x, cache, out=x)
    with pytest.raises(AliasError, match="out: expected an array apart from x"):
        fastbn.batchnorm2d_forward(x, residual=x, out=x)
    layer = fastbn.BatchNorm2d(4)
    layer(x)
    with pytest.raises(ArgumentError, match="dy: expected an array_like, got NoneType"):
        layer.backward(None)
    np.testing.assert_array_equal(x, make_random((2, 4, 6, 6), 1, np.float32))


def test_validation_of_a_tensor_that_records_gradients():
    torch = pytest.importorskip("torch")
    with pytest.raises(ArgumentError, match="x: expected an array_like, got Tensor: Can't call numpy"):
        fastbn.batchnorm(torch.ones(4, 3, requires_grad=True))


def test_validation_remembers_some_options_and_no_arrays():
    x = np.zeros((4, 3), np.float32)
    for i in range(100):
        assert fastbn.batchnorm(x, np.zeros(3), np.full(3, float(i)), eps=1.0 + i)[0, 0] == i
    residual = x.copy()
    gone = weakref.ref(residual)
    fastbn.batchnorm(x, residual=residual)
    del residual
    assert gone() is None


def test_validation_of_arrays_that_differ_from_x_in_one_thing():
    """Ordinary arrays pass without a closer look; these are not ordinary."""
    x = make_random((2, 4, 6, 6), 1, np.float32)
    other = make_random((2, 4, 6, 6), 1, np.float32, 1)
    expected = fastbn.batchnorm(x, residual=other)
    moved = np.empty(other.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(other.shape)
    moved[...] = other
    alike = {
        "byte order": other.astype(">f4"),
        "memory order": np.asfortranarray(other),
        "alignment": moved,
        "subclass": other.view(type("Sub", (np.ndarray,), {})),
    }
    for name, residual in alike.items():
        np.testing.assert_array_equal(fastbn.batchnorm(x, residual=residual), expected, err_msg=name)
    y, cache = fastbn.batchnorm_forward(x)
    dx = fastbn.batchnorm_backward(other, cache).dx
    for name, dy in alike.items():
        np.testing.assert_array_equal(fastbn.batchnorm_backward(dy, cache).dx, dx, err_msg=name)
    for vector in (np.ones(4, np.float16), read_only(np.ones(4)), np.ones(8)[::2], np.ones(4, ">f8")):
        np.testing.assert_array_equal(fastbn.batchnorm(x, vector, vector), fastbn.batchnorm(x, np.ones(4), np.ones(4)))
    in_place = x.copy()
    assert fastbn.batchnorm(in_place, out=in_place) is in_place
    np.testing.assert_array_equal(in_place, y)
    in_place = other.copy()
    assert fastbn.batchnorm(x, residual=in_place, out=in_place) is in_place
    np.testing.assert_array_equal(in_place, expected)
