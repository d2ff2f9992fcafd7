"""Bad input never crashes and never writes: a table of (argument and rule, call, exception, fragment of the message).

Each call gets fresh valid arguments in `a` and breaks one rule; afterwards every array of `a` must be as it was.
"""

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
)

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
    ("x-int", lambda a: fastbn.batchnorm(a.x.astype(np.int32)), DTypeError, f"x: expected dtype {DTYPES}, got int32"),
    ("x-int-hint", lambda a: fastbn.batchnorm([[1, 2], [3, 4]]), DTypeError, "astype(np.float32)"),
    ("x-bool", lambda a: fastbn.batchnorm(a.x > 0), DTypeError, "got bool"),
    ("x-complex", lambda a: fastbn.batchnorm(a.x.astype(complex)), DTypeError, "got complex128"),
    ("x-longdouble", lambda a: fastbn.batchnorm(a.x.astype(np.longdouble)), DTypeError, "x: expected dtype"),
    ("x-object", lambda a: fastbn.batchnorm(a.x.astype(object)), DTypeError, "got object"),
    ("x-string", lambda a: fastbn.batchnorm("image"), ShapeError, "x: expected at least 1 dimension, got 0"),
    ("x-none", lambda a: fastbn.batchnorm2d(None), ShapeError, "x: expected 4 (NCHW) dimensions, got 0"),
    ("x-ragged", lambda a: fastbn.batchnorm([[1.0], [2.0, 3.0]]), ArgumentError, "x: expected an array_like, got list"),
    ("x-unreadable", lambda a: fastbn.batchnorm(Unreadable()), ArgumentError, "no data here"),
    ("x-masked", lambda a: fastbn.batchnorm(np.ma.masked_less(a.x, 0)), ArgumentError, "x: expected an array without"),
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
    ("axis-float", lambda a: fastbn.batchnorm(a.x, axis=1.0), ArgumentError, "axis: expected an integer, got 1.0"),
    ("axis-none", lambda a: fastbn.batchnorm(a.x, axis=None), ArgumentError, "axis: expected an integer, got None"),
    ("axis-tuple", lambda a: fastbn.batchnorm(a.x, axis=(0, 1)),
     ArgumentError, "axis: expected an integer, got (0, 1)"),
    ("axis-bool", lambda a: fastbn.batchnorm(a.x, axis=True), ArgumentError, "axis: expected an integer, got True"),
    ("axis-forward", lambda a: fastbn.batchnorm_forward(a.x, axis=9), ShapeError, "got 9"),
    ("layout-unknown", lambda a: plain(a, layout="NHCW"), ArgumentError, "layout: expected one of 'NCHW', 'NHWC', got"),
    ("layout-lower-case", lambda a: plain(a, layout="nchw"), ArgumentError, "got 'nchw'"),
    ("layout-of-other-function", lambda a: plain(a, layout="NC"), ArgumentError, "got 'NC'"),
    ("layout-no-string", lambda a: plain(a, layout=["NCHW"]), ArgumentError, "got ['NCHW']"),
    ("layout-1d", lambda a: fastbn.batchnorm1d(a.vector, layout="NCHW"), ArgumentError, "'NC', 'NCL', 'NLC'"),
    ("layout-3d", lambda a: fastbn.batchnorm3d(a.x, layout="NCHW"), ArgumentError, "'NCDHW', 'NDHWC'"),
    # gamma and beta
    ("gamma-shape", lambda a: fastbn.batchnorm(a.x, a.gamma[:2]), ShapeError,
     "gamma: expected shape (3,) for the 3 channels of x, got (2,)"),
    ("gamma-rank", lambda a: fastbn.batchnorm(a.x, a.gamma.reshape(1, 3, 1, 1)), ShapeError, "got (1, 3, 1, 1)"),
    ("gamma-scalar", lambda a: fastbn.batchnorm(a.x, 1.0), ShapeError, "gamma: expected shape (3,)"),
    ("gamma-layout", lambda a: fastbn.batchnorm2d(a.x, a.gamma, layout="NHWC"), ShapeError, "for the 5 channels of x"),
    ("gamma-int", lambda a: fastbn.batchnorm(a.x, [1, 1, 1]),
     DTypeError, "gamma: expected a floating-point dtype, got"),
    ("gamma-complex", lambda a: fastbn.batchnorm(a.x, a.gamma + 1j), DTypeError, "got complex64"),
    ("gamma-masked", lambda a: fastbn.batchnorm(a.x, np.ma.masked_less(a.gamma, 9)), ArgumentError, "gamma: expected"),
    ("beta-shape", lambda a: fastbn.batchnorm(a.x, a.gamma, a.beta[:1]), ShapeError, "beta: expected shape (3,)"),
    ("beta-object", lambda a: fastbn.batchnorm(a.x, None, a.beta.astype(object)), DTypeError, "beta: expected a float"),
    # running statistics and training
    ("running_mean-alone", lambda a: train(a, running_var=None),
     ArgumentError, "running_var: expected an array, since"),
    ("running_var-alone", lambda a: train(a, running_mean=None), ArgumentError, "since running_var is given, got None"),
    ("training-unsaid", lambda a: train(a, training=None),
     ArgumentError, "training: expected True or False when running"),
    ("training-false-alone", lambda a: plain(a, training=False), ArgumentError, "running_mean and running_var when"),
    ("training-int", lambda a: train(a, training=1), ArgumentError, "training: expected True or False, got 1"),
    ("training-string", lambda a: plain(a, training="no"), ArgumentError, "training: expected True or False, got 'no'"),
    ("running_mean-shape", lambda a: train(a, running_mean=a.mean[:2]),
     ShapeError, "running_mean: expected shape (3,)"),
    ("running_var-shape", lambda a: infer(a, running_var=a.gamma[:2]), ShapeError, "running_var: expected shape (3,)"),
    ("running_mean-list", lambda a: train(a, running_mean=[0.0] * 3),
     ArgumentError, "running_mean: expected an ndarray"),
    ("running_var-int", lambda a: train(a, running_var=np.ones(3, int)),
     DTypeError, "running_var: expected a floating"),
    ("running_mean-int", lambda a: infer(a, running_mean=np.ones(3, int)),
     DTypeError, "running_mean: expected a float"),
    ("running_mean-read-only", lambda a: train(a, running_mean=read_only(a.mean)),
     ReadOnlyError, "running_mean: expected"),
    ("running_var-read-only", lambda a: train(a, running_var=read_only(a.var)), ReadOnlyError, "running_var: expected"),
    ("running_var-masked", lambda a: train(a, running_var=np.ma.masked_less(a.var, 0)), ArgumentError, "masked"),
    ("running-same", lambda a: train(a, running_mean=a.var),
     AliasError, "running_mean: expected an array apart from r"),
    ("running-residual",
     lambda a: train(a, residual=a.residual, running_mean=a.residual[0, :, 0, 0]), AliasError, "apart from residual"),
    # numbers
    ("momentum-large", lambda a: train(a, momentum=1.1), ArgumentError, "momentum: expected a number from 0 to 1"),
    ("momentum-negative", lambda a: train(a, momentum=-0.1), ArgumentError, "got -0.1"),
    ("momentum-nan", lambda a: train(a, momentum=float("nan")), ArgumentError, "momentum: expected"),
    ("momentum-none", lambda a: train(a, momentum=None), ArgumentError, "for layers only"),
    ("momentum-string", lambda a: train(a, momentum="0.1"), ArgumentError, "got '0.1'"),
    ("momentum-bool", lambda a: train(a, momentum=True), ArgumentError, "momentum: expected"),
    ("momentum-unused", lambda a: plain(a, momentum=2.0), ArgumentError, "momentum: expected"),
    ("eps-zero", lambda a: plain(a, eps=0.0), ArgumentError, "eps: expected a finite number > 0 in training, got 0.0"),
    ("eps-negative", lambda a: infer(a, eps=-1e-5), ArgumentError, "eps: expected a finite number >= 0 in inference"),
    ("eps-nan", lambda a: plain(a, eps=float("nan")), ArgumentError, "eps: expected"),
    ("eps-inf", lambda a: infer(a, eps=float("inf")), ArgumentError, "got inf"),
    ("eps-none", lambda a: plain(a, eps=None), ArgumentError, "got None"),
    ("eps-array", lambda a: plain(a, eps=np.full(3, 1e-5)), ArgumentError, "eps: expected"),
    ("unbiased-int", lambda a: train(a, unbiased=0), ArgumentError, "unbiased: expected True or False, got 0"),
    ("nan_guard-unknown", lambda a: train(a, nan_guard="ignore"),
     ArgumentError, "nan_guard: expected one of 'propagate', 'skip', 'raise', got 'ignore'"),
    ("nan_guard-none", lambda a: train(a, nan_guard=None), ArgumentError, "nan_guard: expected one of"),
    ("nan_guard-list", lambda a: train(a, nan_guard=["skip"]), ArgumentError, "got ['skip']"),
    ("nan_guard-unused", lambda a: plain(a, nan_guard=True), ArgumentError, "nan_guard: expected one of"),
    ("nan_guard-raise", lambda a: train(a, nan_guard="raise", x=a.x * np.float32(np.inf)),
     NonFiniteError, "x: expected finite statistics in every channel (nan_guard='raise'), got NaN or Inf in 3 of 3"),
    ("num_threads-zero", lambda a: plain(a, num_threads=0),
     ArgumentError, "num_threads: expected an integer from 1 to"),
    ("num_threads-negative", lambda a: plain(a, num_threads=-1), ArgumentError, "got -1"),
    ("num_threads-bool", lambda a: plain(a, num_threads=True), ArgumentError, "got True"),
    ("num_threads-float", lambda a: plain(a, num_threads=2.0), ArgumentError, "got 2.0"),
    ("num_threads-huge", lambda a: plain(a, num_threads=10**12), ArgumentError, "num_threads: expected"),
    ("num_threads-stats", lambda a: stats(a, num_threads=0), ArgumentError, "num_threads: expected"),
    ("num_threads-backward", lambda a: backward(a, num_threads="2"), ArgumentError, "num_threads: expected"),
    # names
    ("activation-unknown", lambda a: plain(a, activation="rleu"),
     ArgumentError, "activation: expected None, one of 'id"),
    ("activation-slope-of-relu", lambda a: plain(a, activation=("relu", 0.1)),
     ArgumentError, "activation: expected None, one of"),
    ("activation-slope-nan", lambda a: plain(a, activation=("leaky_relu", np.nan)),
     ArgumentError, "activation: expected a finite slope"),
    ("activation-slope-text", lambda a: plain(a, activation=("leaky_relu", "0.1")),
     ArgumentError, "activation: expected a finite slope"),
    ("activation-callable", lambda a: plain(a, activation=np.tanh), ArgumentError, "activation: expected None, one of"),
    ("device-cuda", lambda a: plain(a, device="cuda"), DeviceError, "not installed"),
    ("device-unknown", lambda a: plain(a, device="tpu"),
     ArgumentError, "device: expected one of 'cpu', 'cuda', got 'tpu'"),
    ("device-none", lambda a: plain(a, device=None), ArgumentError, "device: expected"),
    ("keyword-unknown", lambda a: plain(a, decay=0.9), TypeError, "decay"),
    # residual
    ("residual-shape", lambda a: plain(a, residual=a.residual[:1]),
     ShapeError, "residual: expected shape (2, 3, 4, 5) as x"),
    ("residual-dtype", lambda a: plain(a, residual=a.residual.astype(float)),
     DTypeError, "expected dtype float32 as x"),
    ("residual-int", lambda a: plain(a, residual=a.residual.astype(int)),
     DTypeError, "residual: expected dtype float32"),
    ("residual-masked", lambda a: plain(a, residual=np.ma.masked_less(a.x, 0)), ArgumentError, "residual: expected"),
    # out
    ("out-list", lambda a: fastbn.batchnorm(a.x, out=[0.0]), ArgumentError, "out: expected an ndarray, got list"),
    ("out-masked", lambda a: fastbn.batchnorm(a.x, out=np.ma.array(a.out)), ArgumentError, "got MaskedArray"),
    ("out-shape", lambda a: fastbn.batchnorm(a.x, out=a.out[:1]), ShapeError, "out: expected shape (2, 3, 4, 5) as x"),
    ("out-dtype", lambda a: fastbn.batchnorm(a.x, out=a.out.astype(float)), DTypeError, "out: expected dtype float32"),
    ("out-byte-order", lambda a: fastbn.batchnorm(a.x, out=a.out.astype(a.out.dtype.newbyteorder())),
     DTypeError, "native"),
    ("out-read-only", lambda a: fastbn.batchnorm(a.x, out=read_only(a.out)), ReadOnlyError, "out: expected a writable"),
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
    ("cache-none", lambda a: fastbn.batchnorm_backward(a.dy, None),
     ArgumentError, "cache: expected the cache of a forw"),
    ("cache-swapped", lambda a: fastbn.batchnorm_backward(a.cache, a.dy), ArgumentError, "cache: expected"),
    ("dy-shape", lambda a: backward(a, a.dy[:1]), ShapeError, "dy: expected shape (2, 3, 4, 5) as x, got (1, 3, 4, 5)"),
    ("dy-dtype", lambda a: backward(a, a.dy.astype(float)), DTypeError, "dy: expected dtype float32 as x, got float64"),
    ("dy-masked", lambda a: backward(a, np.ma.masked_less(a.dy, 0)), ArgumentError, "dy: expected an array without"),
    ("dx-out-shape", lambda a: backward(a, out=a.out[:1]), ShapeError, "out: expected shape"),
    ("dx-out-dtype", lambda a: backward(a, out=a.out.astype(float)), DTypeError, "out: expected dtype float32"),
    ("dx-out-read-only", lambda a: backward(a, out=read_only(a.out)), ReadOnlyError, "out: expected a writable"),
    ("dx-out-is-x", lambda a: backward(a, out=a.x), AliasError, "out: expected an array apart from x"),
    ("dx-out-shifted-dy", lambda a: backward(a, a.room[:2], out=a.room[1:3]), AliasError, "overlaps dy"),
    ("dx-out-family", lambda a: backward(a, out=np.moveaxis(np.zeros((2, 4, 5, 3), np.float32), -1, 1)), ArgumentError,
     "np.empty_like(x)"),
    # statistics
    ("stats-dtype", lambda a: stats(a, a.x.astype(int)), DTypeError, "x: expected dtype"),
    ("stats-axis", lambda a: stats(a, axis=7), ShapeError, "axis: expected"),
    ("stats-masked", lambda a: stats(a, np.ma.masked_less(a.x, 0)), ArgumentError, "x: expected an array without"),
    ("stats-count", lambda a: fastbn.Stats(-1, a.mean, a.var),
     ArgumentError, "count: expected an integer >= 0, got -1"),
    ("stats-shapes", lambda a: fastbn.Stats(2, a.mean, a.var[:2]), ShapeError, "mean, m2: expected two arrays"),
    ("stats-merge-channels", lambda a: stats(a).merge(stats(a, a.vector[:, :2])),
     ShapeError, "expected 3 channels, got 2"),
    ("stats-merge-type", lambda a: stats(a).merge(a.x), ArgumentError, "other: expected Stats, got ndarray"),
    ("stats-unbiased", lambda a: stats(a).var(unbiased=1), ArgumentError, "unbiased: expected True or False"),
    # layers
    ("layer-num_features-zero", lambda a: fastbn.BatchNorm2d(0),
     ArgumentError, "num_features: expected an integer >= 1"),
    ("layer-num_features-float", lambda a: fastbn.BatchNorm1d(3.0), ArgumentError, "num_features: expected"),
    ("layer-eps", lambda a: fastbn.BatchNorm2d(3, eps=0), ArgumentError, "eps: expected a finite number > 0"),
    ("layer-momentum", lambda a: fastbn.BatchNorm2d(3, momentum=1.5), ArgumentError, "momentum: expected"),
    ("layer-nan_guard", lambda a: fastbn.BatchNorm2d(3, nan_guard="warn"), ArgumentError, "nan_guard: expected one of"),
    ("layer-affine", lambda a: fastbn.BatchNorm2d(3, affine=None), ArgumentError, "affine: expected True or False"),
    ("layer-track", lambda a: fastbn.BatchNorm2d(3, track_running_stats=2),
     ArgumentError, "track_running_stats: expec"),
    ("layer-layout", lambda a: fastbn.BatchNorm2d(3, layout="NCL"), ArgumentError, "layout: expected"),
    ("layer-activation", lambda a: fastbn.BatchNorm2d(3, activation="selu"), ArgumentError, "activation: expected"),
    ("layer-dtype-int", lambda a: fastbn.BatchNorm2d(3, dtype=int),
     DTypeError, "dtype: expected a floating-point dtype"),
    ("layer-dtype-name", lambda a: fastbn.BatchNorm2d(3, dtype="float31"), DTypeError, "got 'float31'"),
    ("layer-device", lambda a: fastbn.BatchNorm2d(3, device="cuda"), DeviceError, "not installed"),
    ("layer-num_threads", lambda a: fastbn.BatchNorm2d(3, num_threads=0), ArgumentError, "num_threads: expected"),
    ("layer-rank", lambda a: a.layer(a.x[0]), ShapeError, "x: expected 4 (NCHW) dimensions, got 3"),
    ("layer-channels", lambda a: a.layer(a.x[:, :2]),
     ShapeError, "x: expected 3 channels (num_features) on axis 1, got"),
    ("layer-one-value", lambda a: a.layer(a.x[:1, :, :1, :1]), SingleValueError, "more than 1 value per channel"),
    ("layer-backward-first", lambda a: a.layer.backward(a.dy),
     ArgumentError, "backward: expected a call of BatchNorm2d"),
    ("layer-mode", lambda a: a.layer.train("eval"), ArgumentError, "mode: expected True or False"),
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
    ("state-strict", lambda a: a.layer.load_state_dict(a.state, strict=1),
     ArgumentError, "strict: expected True or Fal"),
    # runtime
    ("isa-unknown", lambda a: fastbn.runtime.isa("mmx").__enter__(), ArgumentError, "isa: expected one of"),
    ("set_num_threads", lambda a: fastbn.set_num_threads(0), ArgumentError, "n: expected an integer from 1 to"),
    ("threads", lambda a: fastbn.threads(1.5).__enter__(), ArgumentError, "n: expected an integer from 1 to"),
    ("copy_speed-nbytes", lambda a: fastbn.runtime.copy_speed(0), ArgumentError, "nbytes: expected an integer >= 1"),
    ("copy_speed-repeats", lambda a: fastbn.runtime.copy_speed(64, repeats=0), ArgumentError, "repeats: expected"),
]  # fmt: skip


def snapshot(a):
    arrays = {name: value for name, value in vars(a).items() if isinstance(value, np.ndarray)}
    arrays |= {f"state {name}": value for name, value in a.state.items()}
    arrays |= {f"layer {name}": value for name, value in a.layer.state_dict().items()}
    return {name: (value.dtype, value.tobytes()) for name, value in arrays.items()}


def test_validation_table_has_distinct_rules():
    names = [name for name, *_ in TABLE]
    assert len(set(names)) == len(names) >= 80


@pytest.mark.parametrize(("call", "exception", "fragment"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_validation_raises_and_writes_nothing(call, exception, fragment):
    a = arguments()
    before = snapshot(a)
    with pytest.raises(exception) as info:
        call(a)
    assert fragment in str(info.value)
    assert snapshot(a) == before


@pytest.mark.parametrize(
    "function", [plain, train, infer, backward, stats], ids=["plain", "training", "inference", "backward", "stats"]
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
