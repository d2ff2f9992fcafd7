"""device="cuda": on a GPU with FASTBN_TEST_DEVICE=cuda, else in Numba's simulator, which is slow: small shapes only.

In the simulator device memory is host memory, and a thread of Python each thread: all that `fastbn.cuda` does is done,
but for the loads and stores of `_access`, whose machine code test_cuda_machine_code.py reads.
"""

import functools
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fastbn
import fastbn.cuda
from combinations import ACTIVATIONS, DTYPES
from fastbn import _core
from fastbn.cli import main
from problems import (
    MEMORY_ORDERS,
    assert_same_bits,
    dtype_of,
    exact_statistics,
    make_exact,
    make_hostile,
    make_parameters,
    make_random,
    shape_id,
    ulp_error,
)
from tolerances import storing, unit_roundoff

pytest.importorskip("numba.cuda.extending", reason="numba-cuda is not installed")
if not fastbn.cuda.is_available():
    pytest.skip(str(fastbn.cuda.why_not()), allow_module_level=True)

from numba import cuda

from fastbn.cuda import _access, _launch, _plan

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the simulator computes in NumPy

# (N, C, ...): planar and, with channels last, interleaved; with one split and several, one tile and several, folded
# rows, and tails of vectors.
SHAPES = ((3, 5), (2, 4, 8), (4, 3, 20), (5, 2, 7), (2, 3, 3, 5), (1, 2, 300), (70, 3, 4), (2, 66, 2))
ORDERS = ("c-order", "channels-last")


class OnGPU:
    """An array in device memory that only speaks ``__cuda_array_interface__``; any strides."""

    def __init__(self, array, readonly=False, **more):
        low, high = np.lib.array_utils.byte_bounds(array)
        memory = np.lib.stride_tricks.as_strided(array.view(f"u{array.itemsize}"), (0,), (1,)).view(np.uint8)
        whole = (np.ctypeslib.ctypes.c_uint8 * (high - low)).from_address(low) if high > low else memory
        self.bytes = cuda.to_device(np.frombuffer(whole, np.uint8).copy() if high > low else np.zeros(1, np.uint8))
        self.like, self.offset = array, array.ctypes.data - low
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "strides": array.strides,
            "data": (_launch.address_of(self.bytes) + self.offset, readonly),
            "typestr": "<V2" if array.dtype.name == "bfloat16" else array.dtype.str,
            "version": 3,
            "stream": None,
            **more,
        }

    def numpy(self):
        memory = self.bytes.copy_to_host()[self.offset :]
        plain = np.ndarray(self.like.shape, f"u{self.like.itemsize}", memory, strides=self.like.strides)
        return plain.copy().view(self.like.dtype)


def numpy(array, like=None):
    """An array on the GPU as a NumPy array."""
    host = array.numpy() if isinstance(array, OnGPU) else array.copy_to_host()
    return host.view(like.dtype) if like is not None and host.dtype != like.dtype else host


def close(actual, expected, dtype, scale=1.0):
    """Within a few roundings: the order of float64 sums differs, and the GPU fuses multiply and add."""
    largest = np.abs(np.nan_to_num(expected.astype(np.float64), posinf=0, neginf=0)).max(initial=0)
    limit = (32 * unit_roundoff(dtype) + 2 * storing(dtype)) * max(scale, float(largest))
    difference = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
    same = (actual == expected) | ((actual != actual) & (expected != expected))
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert np.all(same | (difference <= limit)), float(np.nanmax(difference)) / limit


def both(x, dy, gamma, beta, activation, residual, running=None, training=True, **options):
    """Every result of forward and backward, on the CPU and on the GPU."""
    results = []
    for device in ("cpu", "cuda"):
        running_arrays = (
            {}
            if running is None
            else {"running_mean": running[0].copy(), "running_var": running[1].copy(), "training": training}
        )
        y, cache = fastbn.batchnorm_forward(
            x, gamma, beta, activation=activation, residual=residual, device=device, **running_arrays, **options
        )
        gradients = fastbn.batchnorm_backward(dy, cache)
        found = {
            "y": y,
            "mean": cache.mean,
            "rstd": cache.rstd,
            "dx": gradients.dx,
            "dgamma": gradients.dgamma,
            "dbeta": gradients.dbeta,
            "dresidual": gradients.dresidual,
        }
        found |= {name: array for name, array in running_arrays.items() if name != "training"}
        results.append({name: array for name, array in found.items() if array is not None})
    cpu, gpu = results
    assert cpu.keys() == gpu.keys()
    return cpu, gpu


def problem(shape, order, dtype, seed=0):
    move = MEMORY_ORDERS[order]
    x, dy, residual = (move(make_random(shape, 1, dtype, seed + i), 1) for i in range(3))
    return x, dy, residual, *make_parameters(shape[1], np.float32, seed)


def compare(cpu, gpu, dtype):
    count = 64
    for name, expected in cpu.items():
        close(gpu[name], expected, expected.dtype, scale=count if name in ("dgamma", "dbeta") else 4.0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_computes_what_the_cpu_does(dtype, shape, order):
    if _access.SIMULATOR and shape[1] > 16 and (order, dtype) != ("channels-last", "float32"):
        pytest.skip("a block for each channel takes the simulator 10 seconds")
    dtype = dtype_of(dtype)
    x, dy, _, gamma, beta = problem(shape, order, dtype)
    running = np.zeros(shape[1], np.float32), np.ones(shape[1], np.float64)
    cpu, gpu = both(x, dy, gamma, beta, "relu", None, running)
    compare(cpu, gpu, dtype)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, ("leaky_relu", 0.2)], ids=str)
def test_cuda_activations(activation, with_residual, training):
    for order, dtype in zip(ORDERS, ("float32", "float64"), strict=True):
        x, dy, residual, gamma, beta = problem((2, 3, 9), order, dtype)
        x *= 4
        running = np.full(3, 0.25, np.float32), np.full(3, 2.0, np.float32)
        cpu, gpu = both(x, dy, gamma, beta, activation, residual if with_residual else None, running, training)
        compare(cpu, gpu, np.dtype(dtype))


@pytest.mark.skipif(not _access.SIMULATOR, reason="of the simulator")
def test_cuda_threads_of_the_simulator_share_arrays():
    """However often Python changes threads: Numba's own class gives two arrays in every fifteenth of these trials."""
    from numba.cuda.simulator import kernelapi

    def ask(shared, barrier):
        barrier.wait()
        return shared.array((4, 4), np.float64)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(32) as pool:
            for _ in range(200):
                shared, barrier = kernelapi.FakeCUDAShared(0), threading.Barrier(32)
                asked = [pool.submit(ask, shared, barrier) for _ in range(32)]
                assert len({id(future.result()) for future in asked}) == 1
    finally:
        sys.setswitchinterval(interval)


def test_cuda_shapes_of_these_tests_take_every_way():
    """One launch and two, one tile and several, folded rows, every width of a vector."""
    plans = []
    for outer, channels, *rest in SHAPES:
        inner = int(np.prod(rest))
        for planar, shape in ((True, (outer, channels, inner)), (False, (outer * inner, channels, 1))):
            for itemsize in (2, 4, 8):
                operand = _plan.Operand(0, _plan.contiguous_strides(shape, itemsize))
                threads = 16 if planar else 32
                plans.append(_plan.make(shape, [operand], itemsize, planar, _launch.processors(), threads))
    for planar in (True, False):
        mine = [plan for plan in plans if plan.planar == planar]
        assert {plan.splits > 1 for plan in mine} == {True, False}
        assert {plan.tiles > 1 for plan in mine} == {True, False} or planar
        assert {plan.width for plan in mine} >= {1, 2, 4}
    assert {plan.fold for plan in plans} > {1}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_cuda_statistics_of_exact_data_are_exact(dtype, order):
    for shape in ((4, 3, 32), (64, 2)):
        exact = make_exact(shape, 1, dtype, offset=1024.0)
        x = MEMORY_ORDERS[order](exact.x, 1)
        _, cache = fastbn.batchnorm_forward(x, eps=1e-5, device="cuda")
        np.testing.assert_allclose(cache.mean, exact.mean, rtol=4e-16)
        np.testing.assert_allclose(cache.rstd, 1 / np.sqrt(exact.var + 1e-5), rtol=4e-15)


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
@pytest.mark.parametrize("order", ORDERS)
def test_cuda_statistics_are_within_two_ulp_with_an_offset(order, offset):
    shape = (4, 2, 40)
    x = MEMORY_ORDERS[order](make_random(shape, 1, np.float32, offset=offset), 1)
    mean, var = np.zeros(2, np.float32), np.ones(2, np.float32)
    fastbn.batchnorm(x, running_mean=mean, running_var=var, training=True, momentum=1.0, unbiased=False, device="cuda")
    for channel, exact in enumerate(exact_statistics(x, 1)):
        assert ulp_error(mean[channel], exact.mean, np.float32, max(abs(float(exact.mean)), exact.std)) <= 2
        assert ulp_error(var[channel], exact.var, np.float32) <= 2


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "hostile", ["constant", "nan", "nan-first", "inf", "minus-inf-first", "outlier-first", "huge-1e37"]
)
def test_cuda_hostile_values_stay_in_their_channel(hostile, order):
    shape = (3, 3, 8)
    x = MEMORY_ORDERS[order](make_hostile(hostile, shape, 1, np.float32, channel=1), 1)
    _, dy, _, gamma, beta = problem(shape, order, np.float32, seed=5)
    cpu, gpu = both(x, dy, gamma, beta, "relu", None)
    for name, expected in cpu.items():
        with np.errstate(all="ignore"):
            expected, actual = expected.astype(np.float64), gpu[name].astype(np.float64)
            scale = np.abs(expected[np.isfinite(expected)]).max(initial=1)
        assert np.array_equal(np.isfinite(actual), np.isfinite(expected)), name
        finite = np.isfinite(expected)
        assert np.all(np.abs(actual[finite] - expected[finite]) <= 1e-5 * scale), name


@pytest.mark.parametrize("name", MEMORY_ORDERS)
def test_cuda_memory_orders_of_numpy_arrays(name):
    x, dy, residual, gamma, beta = problem((3, 4, 2, 4), name, np.float32)
    cpu, gpu = both(x, dy, gamma, beta, "relu", residual)
    compare(cpu, gpu, np.float32)
    assert gpu["y"].strides == cpu["y"].strides


def test_cuda_negative_variance_is_not_a_number():
    x, running = np.ones((2, 2), np.float32), {"running_mean": np.zeros(2), "running_var": np.array([-1.0, 1.0])}
    for device in ("cpu", "cuda"):
        y = fastbn.batchnorm(x, **running, training=False, device=device)
        assert np.isnan(y[:, 0]).all() and np.isfinite(y[:, 1]).all()


def test_cuda_repeats_give_the_same_bits():
    for order in ORDERS:
        x, dy, residual, gamma, beta = problem((16, 3, 24), order, np.float32)
        first, second = (both(x, dy, gamma, beta, "relu", residual)[1] for _ in range(2))
        for name in first:
            assert_same_bits(first[name], second[name])


def test_cuda_in_place_and_out():
    x, dy, _, gamma, beta = problem((4, 3, 8), "c-order", np.float32)
    expected, cache = fastbn.batchnorm_forward(x, gamma, beta, device="cuda")
    gradients = fastbn.batchnorm_backward(dy, cache)
    out = np.empty_like(x)
    assert fastbn.batchnorm(x, gamma, beta, out=out, device="cuda") is out
    assert_same_bits(out, expected)
    assert fastbn.batchnorm_backward(dy, cache, out=dy).dx is dy
    assert_same_bits(dy, gradients.dx)
    assert fastbn.batchnorm(x, gamma, beta, out=x, device="cuda") is x
    assert_same_bits(x, expected)


def test_cuda_empty_batches_and_no_channels():
    for shape in ((0, 3, 4), (4, 0, 4), (2, 3, 0)):
        x = np.empty(shape, np.float32)
        gamma = np.ones(shape[1], np.float32)
        running = np.full(shape[1], 7.0), np.full(shape[1], 8.0)
        y, cache = fastbn.batchnorm_forward(
            x, gamma, gamma, running_mean=running[0], running_var=running[1], training=True, device="cuda"
        )
        gradients = fastbn.batchnorm_backward(x, cache)
        assert y.shape == gradients.dx.shape == shape
        assert (running[0] == 7).all() and (running[1] == 8).all()
        assert not gradients.dgamma.any() and not gradients.dbeta.any()
        on_gpu = OnGPU(x)
        y, cache = fastbn.batchnorm_forward(on_gpu, OnGPU(gamma), OnGPU(gamma), device="cuda")
        gradients = fastbn.batchnorm_backward(on_gpu, cache)
        assert y.shape == shape and not numpy(gradients.dgamma).any()


def test_cuda_layers():
    x, dy, residual, _, _ = problem((4, 3, 2, 4), "c-order", np.float32)
    results = []
    for device in ("cpu", "cuda"):
        layer = fastbn.BatchNorm2d(3, activation="relu", device=device)
        y = layer(x, residual)
        dx, dresidual = layer.backward(dy)
        layer.eval()
        results.append(
            {
                "y": y,
                "dx": dx,
                "dresidual": dresidual,
                "mean": layer.running_mean,
                "var": layer.running_var,
                "dgamma": layer.weight_grad,
                "dbeta": layer.bias_grad,
                "eval": layer(x),
            }
        )
    compare(*results, np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Arrays on the GPU


@pytest.mark.parametrize("order", ["c-order", "channels-last", "every-other-channel", "reversed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_arrays_on_the_gpu_stay_there(dtype, order):
    dtype = dtype_of(dtype)
    x, dy, residual, gamma, beta = problem((4, 4, 8), order, dtype)
    beta = beta.astype(np.float64)
    mean, var = np.zeros(4, np.float32), np.ones(4, np.float32)
    on_gpu = [OnGPU(array) for array in (mean, var)]
    for activation, added in (("relu", residual), ("hardswish", residual), ("relu", None)):
        y, cache = fastbn.batchnorm_forward(
            x, gamma, beta, activation=activation, residual=added, running_mean=mean, running_var=var, training=True
        )
        expected = fastbn.batchnorm_backward(dy, cache)
        y_gpu, cache_gpu = fastbn.batchnorm_forward(
            OnGPU(x),
            OnGPU(gamma),
            OnGPU(beta),
            activation=activation,
            residual=None if added is None else OnGPU(added),
            running_mean=on_gpu[0],
            running_var=on_gpu[1],
            training=True,
            device="cuda",
        )
        gradients = fastbn.batchnorm_backward(OnGPU(dy), cache_gpu)
        close(numpy(y_gpu, x), y, dtype, 4.0)
        for actual, array in zip((*gradients, gradients.dresidual), (*expected, expected.dresidual), strict=True):
            if array is not None:
                close(numpy(actual, array), array, array.dtype, 64.0)
        assert (gradients.dresidual is None) == (added is None)
        close(numpy(cache_gpu.mean), cache.mean, np.float64)
        close(numpy(cache_gpu.rstd), cache.rstd, np.float64)
        assert cache_gpu.x is not None and "on the GPU" in repr(cache_gpu) and cache_gpu.nbytes > x.nbytes
    close(numpy(on_gpu[0]), mean, np.float32)
    close(numpy(on_gpu[1]), var, np.float32)


def test_cuda_arrays_on_the_gpu_in_place_and_inference():
    x, dy, _, gamma, beta = problem((4, 3, 8), "channels-last", np.float32)
    mean, var = np.full(3, 0.5, np.float32), np.full(3, 2.0, np.float32)
    running = {"running_mean": mean, "running_var": var, "training": False}
    expected, cache = fastbn.batchnorm_forward(x, gamma, beta, **running)
    gradients = fastbn.batchnorm_backward(dy, cache)
    on_gpu = {name: OnGPU(value) if isinstance(value, np.ndarray) else value for name, value in running.items()}
    x_gpu, dy_gpu, parameters = OnGPU(x), OnGPU(dy), (OnGPU(gamma), OnGPU(beta))
    _, cache_gpu = fastbn.batchnorm_forward(x_gpu, *parameters, **on_gpu, device="cuda")
    found = fastbn.batchnorm_backward(dy_gpu, cache_gpu, out=dy_gpu)
    assert found.dx is dy_gpu
    close(numpy(dy_gpu), gradients.dx, np.float32)
    close(numpy(found.dgamma), gradients.dgamma, np.float32, 64.0)
    assert fastbn.batchnorm(x_gpu, *parameters, **on_gpu, out=x_gpu, device="cuda") is x_gpu
    close(numpy(x_gpu), expected, np.float32)


def test_cuda_layer_with_parameters_on_the_gpu():
    x, _, _, _, _ = problem((4, 3, 8), "c-order", np.float32)
    expected, layer = fastbn.BatchNorm1d(3)(x), fastbn.BatchNorm1d(3, device="cuda")
    for name in ("weight", "bias", "running_mean", "running_var"):
        setattr(layer, name, OnGPU(getattr(layer, name)))
    close(numpy(layer(OnGPU(x))), expected, np.float32)


def test_cuda_speaks_dlpack():
    class Capsule:
        def __init__(self, array):
            self.array = array

        def __dlpack__(self, *, stream=None, **options):
            return self.array.__dlpack__(**options)

        def __dlpack_device__(self):
            return 2, 0  # CUDA

    if not _access.SIMULATOR:
        pytest.skip("the capsule is of host memory")
    x = make_random((4, 3, 8), 1, np.float32)
    close(numpy(fastbn.batchnorm(Capsule(x), device="cuda")), fastbn.batchnorm(x), np.float32)


X = np.ones((2, 3, 4), np.float32)
V = np.ones(3, np.float32)
bn = functools.partial(fastbn.batchnorm, device="cuda")
bn_forward = functools.partial(fastbn.batchnorm_forward, device="cuda")


class WithGradient:
    """What PyTorch answers for a tensor on the GPU that records gradients."""

    @property
    def __cuda_array_interface__(self):
        raise RuntimeError("Can't get __cuda_array_interface__ on Variable that requires grad.")


def partly_overlapping():
    """A residual and an `out` which begins at its second row."""
    memory = OnGPU(np.zeros((3, 3, 4), np.float32))
    address, _ = memory.__cuda_array_interface__["data"]
    residual, out = OnGPU(X, data=(address, False)), OnGPU(X, data=(address + X.strides[0], False))
    return bn(OnGPU(X), residual=residual, out=out)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fastbn.batchnorm(OnGPU(X)), fastbn.ArgumentError, "x: expected a NumPy array .* device='cuda'"),
        (lambda: fastbn.batchnorm(X, OnGPU(V)), fastbn.ArgumentError, "gamma: expected a NumPy array"),
        (lambda: bn(X, OnGPU(V)), fastbn.ArgumentError, "gamma: expected a NumPy array"),
        (lambda: bn(OnGPU(X), V), fastbn.ArgumentError, "gamma: expected an array on the GPU"),
        (lambda: bn(OnGPU(X), OnGPU(V[:2])), fastbn.ShapeError, r"gamma: expected shape \(3,\)"),
        (lambda: bn(OnGPU(X), residual=X), fastbn.ArgumentError, "residual: .* on the GPU"),
        (lambda: bn(OnGPU(X), residual=OnGPU(X[:1])), fastbn.ShapeError, "residual: expected"),
        (lambda: bn(OnGPU(X), residual=OnGPU(X.astype("f8"))), fastbn.DTypeError,
         "residual: expected dtype float32 as x, got float64"),
        (lambda: bn(OnGPU(X), out=X.copy()), fastbn.ArgumentError, "out: .* on the GPU"),
        (lambda: bn(OnGPU(X), out=OnGPU(X, readonly=True)), fastbn.ReadOnlyError, "out"),
        (lambda: bn(OnGPU(X.astype(int))), fastbn.DTypeError, "x: expected dtype float32 or"),
        (lambda: bn(OnGPU(X, mask=OnGPU(X))), fastbn.ArgumentError, "without a mask"),
        (lambda: bn(WithGradient()), fastbn.ArgumentError, "x: expected an array without a gradient of its own"),
        (lambda: fastbn.batchnorm(WithGradient()), fastbn.ArgumentError, "x: expected a NumPy array"),
        (lambda: bn(OnGPU(X[:1, :, :1])), fastbn.SingleValueError, "more than 1 value"),
        (lambda: bn(OnGPU(X), axis=3), fastbn.ShapeError, "axis"),
        (lambda: bn(OnGPU(np.ones((4, 6, 3, 5), np.float32)[::2, :, :, ::2]), axis=2),
         fastbn.ArgumentError, "x: expected aligned memory that reduces"),
        (lambda: bn(OnGPU(X), eps=0), fastbn.ArgumentError, "eps"),
        (lambda: bn(OnGPU(X), num_threads=0), fastbn.ArgumentError, "num_threads"),
        (lambda: bn(OnGPU(X), running_mean=OnGPU(V, readonly=True), running_var=OnGPU(V), training=True),
         fastbn.ReadOnlyError, "running_mean"),
        (lambda: bn(OnGPU(X), running_mean=OnGPU(V), running_var=OnGPU(V), training=True, nan_guard="skip"),
         fastbn.ArgumentError, "nan_guard: expected 'propagate' for arrays on the GPU"),
        (partly_overlapping, fastbn.AliasError, "out: .* overlaps residual"),
        (lambda: bn_forward(a := OnGPU(X), out=a), fastbn.AliasError, "out: .* overlaps x"),
        (lambda: fastbn.batchnorm_backward(X, bn_forward(OnGPU(X))[1]), fastbn.ArgumentError,
         "dy: expected an array on the GPU"),
        (lambda: fastbn.batchnorm_backward(OnGPU(X), fastbn.batchnorm_forward(X)[1]), fastbn.ArgumentError,
         "dy: expected a NumPy array"),
        (lambda: fastbn.cuda.stream("x").__enter__(), fastbn.ArgumentError, "stream: expected a CUDA stream"),
    ],
)  # fmt: skip
def test_cuda_errors_say_what_to_write(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_cuda_bench_prints_a_table_and_writes_json(monkeypatch, capsys, tmp_path):
    from fastbn.cli import bench, bench_cuda

    monkeypatch.setattr(bench_cuda, "CALLS", 1)
    monkeypatch.setattr(bench, "QUICK_SHAPES", (((4, 3, 8), 1, "NCL"), ((4, 8, 3), -1, "NLC")))
    assert main(["bench", "--device", "cuda", "--quick", "--json", str(tmp_path / "gpu.json")]) == 0
    out = capsys.readouterr().out
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [row["operation"] for row in rows] == ["copy", "forward", "inference", "backward"] * 2
    assert all(row["wall_us"] > 0 and row["device_us"] != 0 for row in rows)  # the simulator has a clock of its own
    assert out.count("NCL") == out.count("NLC") == 4


@pytest.mark.parametrize(
    ("option", "value"),
    [("training", 1), ("momentum", 2.0), ("eps", -1.0), ("unbiased", 0), ("nan_guard", "no"), ("activation", "tanh"),
     ("num_threads", -1), ("axis", "C"), ("device", "gpu"), ("running_mean", None), ("unknown", 1)],
)  # fmt: skip
def test_cuda_arrays_on_the_gpu_take_the_options_of_the_cpu(option, value):
    running = {"running_mean": V.copy(), "running_var": V.copy(), "training": True}
    with pytest.raises((fastbn.FastBNError, TypeError)) as on_cpu:
        fastbn.batchnorm(X, **running | {option: value})
    on_gpu = {name: OnGPU(array) if isinstance(array, np.ndarray) else array for name, array in running.items()}
    with pytest.raises(type(on_cpu.value)) as error:
        fastbn.batchnorm(OnGPU(X), **{"device": "cuda"} | on_gpu | {option: value})
    if option != "device":  # which is why x is refused
        assert str(error.value) == str(on_cpu.value)


# ---------------------------------------------------------------------------------------------------------------------
# Without a GPU


def refused(monkeypatch, **replaced):
    monkeypatch.setattr(fastbn.cuda, "_works", False)
    monkeypatch.setattr("numba.config.ENABLE_CUDASIM", 0)
    for name, function in replaced.items():
        monkeypatch.setattr(fastbn.cuda, name, function)
    assert not fastbn.cuda.is_available()
    with pytest.raises(fastbn.DeviceError, match="device: 'cuda' cannot be used here") as error:
        fastbn.batchnorm(X, device="cuda")
    with pytest.raises(fastbn.DeviceError):
        fastbn.BatchNorm2d(3, device="cuda")
    assert main(["bench", "--device", "cuda"]) == 2
    return str(error.value)


def test_cuda_without_a_driver(monkeypatch):
    def missing():
        raise RuntimeError("Error at driver init:\n\nCUDA driver library cannot be found.\n:")

    assert "CUDA driver library cannot be found." in refused(monkeypatch, _driver_version=missing)


def test_cuda_with_an_old_driver(monkeypatch):
    message = refused(monkeypatch, _driver_version=lambda: (12, 4), _toolkit_version=lambda: (13, 0))
    assert "supports CUDA 12.4, and CUDA 13.0 is installed" in message and "numba-cuda[cu12]" in message


def test_cuda_without_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba.cuda.extending", None)
    assert "pip install 'fastbn[cuda]'" in refused(monkeypatch)


def test_cuda_is_not_imported_before_it_is_asked_for():
    code = (
        "import sys, numpy, fastbn; fastbn.batchnorm(numpy.ones((2, 3))); fastbn.BatchNorm1d(3);"
        "sys.exit(any(name.split('.')[0] in ('numba', 'llvmlite', 'cuda') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cuda_statistics_rows_are_those_of_the_cpu():
    x = make_random((3, 2, 8), 1, np.float64)
    _, on_cpu = fastbn.batchnorm_forward(x, np.full(2, 2.0), np.full(2, 3.0))
    _, on_gpu = fastbn.batchnorm_forward(x, np.full(2, 2.0), np.full(2, 3.0), device="cuda")
    for row in range(_core.STATISTICS_ROWS):
        if row not in (_core.STATISTICS_MEAN_LO, _core.STATISTICS_RSTD_LO):  # roundings of float64
            np.testing.assert_allclose(on_gpu._statistics[row], on_cpu._statistics[row], rtol=1e-14)
