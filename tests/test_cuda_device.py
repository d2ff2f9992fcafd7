"""What only a GPU can show: arrays of other libraries, streams, memory, sizes. `make test-cuda` runs it."""

import gc
import os

import numpy as np
import pytest

import fastbn
import fastbn.cuda
from problems import assert_same_bits, make_parameters, make_random

if os.environ.get("FASTBN_TEST_DEVICE") != "cuda" or not fastbn.cuda.is_available():
    pytest.skip("no GPU, or not asked for (FASTBN_TEST_DEVICE=cuda)", allow_module_level=True)

from numba import cuda

SHAPE = (8, 16, 14, 14)


def problem(dtype=np.float32):
    x, dy = (make_random(SHAPE, 1, dtype, seed) for seed in (0, 1))
    return x, dy, *make_parameters(SHAPE[1])


def on_cpu(x, dy, gamma, beta):
    y, cache = fastbn.batchnorm_forward(x, gamma, beta, activation="relu", device="cpu")
    return y, *fastbn.batchnorm_backward(dy, cache)


def on_gpu(x, dy, gamma, beta):
    y, cache = fastbn.batchnorm_forward(x, gamma, beta, activation="relu", device="cuda")
    return y, *fastbn.batchnorm_backward(dy, cache)


def close(actual, expected):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=64 * np.finfo(np.float32).eps * max(scale, 1))


def test_cuda_device_torch_tensors_stay_tensors():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch without CUDA")
    arrays = problem()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x, dy = (torch.from_numpy(a).cuda().to(memory_format=memory_format) for a in arrays[:2])
        results = on_gpu(x, dy, *(torch.from_numpy(a).cuda() for a in arrays[2:]))
        assert all(isinstance(result, torch.Tensor) and result.is_cuda for result in results)
        assert results[0].is_contiguous(memory_format=memory_format)
        for actual, expected in zip(results, on_cpu(*arrays), strict=True):
            close(actual.cpu().numpy(), expected)


def test_cuda_device_torch_bfloat16_and_streams():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch without CUDA")
    x = torch.from_numpy(problem()[0]).cuda().bfloat16()
    expected = fastbn.batchnorm(x, device="cuda")
    assert expected.dtype == torch.bfloat16
    stream = torch.cuda.Stream()
    for _ in range(20):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            doubled = x + x
            y = fastbn.batchnorm(doubled, device="cuda")  # must wait for the sum on its stream
            doubled.zero_()  # must wait for y
        stream.synchronize()
        assert (y - expected).abs().max() < 0.05


def test_cuda_device_cupy_arrays_stay_cupy_arrays():
    cupy = pytest.importorskip("cupy")
    arrays = problem()
    results = on_gpu(*map(cupy.asarray, arrays))
    assert all(isinstance(result, cupy.ndarray) for result in results)
    for actual, expected in zip(results, on_cpu(*arrays), strict=True):
        close(cupy.asnumpy(actual), expected)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize(
    "shape", [(64, 3, 4096), (70000, 3), (40000, 64), (4001, 1023), (256, 2048, 7, 7), (3, 5, 70001)]
)
def test_cuda_device_shapes_that_fill_it(shape, dtype):
    """Many splits, several tiles, folded rows: what the simulator is too slow for."""
    x, dy = (make_random(shape, 1, dtype, seed) for seed in (0, 1))
    parameters = make_parameters(shape[1])
    for order in (np.ascontiguousarray, lambda a: np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1)):
        arrays = order(x), order(dy), *parameters
        for actual, expected in zip(on_gpu(*arrays), on_cpu(*arrays), strict=True):
            u = np.finfo(dtype).eps if actual.dtype == x.dtype else np.finfo(np.float32).eps
            scale = max(np.abs(expected.astype(np.float64)).max(), 1)
            assert np.abs(actual.astype(np.float64) - expected).max() <= 64 * max(u, 1e-12) * scale


def test_cuda_device_numba_streams():
    arrays = problem()
    expected = [result.copy_to_host() for result in on_gpu(*map(cuda.to_device, arrays))]
    with fastbn.cuda.stream(cuda.stream()):
        results = on_gpu(*map(cuda.to_device, arrays))
    cuda.synchronize()
    for actual, wanted in zip(results, expected, strict=True):
        assert_same_bits(actual.copy_to_host(), wanted)


def test_cuda_device_memory_is_freed_after_results_and_after_errors():
    x = make_random((16, 64, 128, 128), 1, np.float32)  # 64 MB
    bad = np.ones(3, np.float32)

    def free():
        gc.collect()
        cuda.current_context().deallocations.clear()
        return cuda.current_context().get_memory_info().free

    fastbn.batchnorm(x, device="cuda")
    before = free()
    for _ in range(10):
        fastbn.batchnorm(x, device="cuda")
        with pytest.raises(fastbn.ShapeError):
            fastbn.batchnorm(x, bad, device="cuda")
    assert free() >= before - x.nbytes


def test_cuda_device_more_than_two_to_the_31_values():
    shape = (2, 3, (1 << 31) // 6 + 4099)
    if cuda.current_context().get_memory_info().free < 3 * 2 * np.prod(shape):
        pytest.skip("too little memory on the GPU")
    x = np.empty(shape, np.float16)
    x[..., ::2], x[..., 1::2] = 1, 3
    x = cuda.to_device(x)
    y, cache = fastbn.batchnorm_forward(x, device="cuda")
    tail = y[1, 2, -4096:].copy_to_host()
    assert set(np.unique(np.round(tail))) == {-1, 1}
    np.testing.assert_allclose(cache.mean.copy_to_host(), 2, atol=1e-6)


def test_cuda_device_repeats_give_the_same_bits():
    x, dy, gamma, beta = problem()
    first = on_gpu(x, dy, gamma, beta)
    for _ in range(10):
        for actual, expected in zip(on_gpu(x, dy, gamma, beta), first, strict=True):
            assert_same_bits(actual, expected)
