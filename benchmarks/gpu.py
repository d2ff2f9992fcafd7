"""Batch normalization on a GPU: fastbn, PyTorch (cuDNN on, off, compiled), CuPy, JAX, the copy speed; into a JSON file.

    python benchmarks/gpu.py --output benchmarks/results/cuda.json [--quick]

Needs PyTorch with CUDA. Device time is that between two events around `CALLS` calls, after as many untimed; wall time
is the host's, with a wait at the end; where a call costs the host more than the GPU, both say so. Contenders take turns
in random order; medians of `rounds` rounds. Bytes are those that must move: two reads and a write for forward, a read
and a write for inference, four reads and a write for backward; the share is their time at the copy speed measured in
the same round over the time taken.
"""

import argparse
import importlib.util
import json
import platform
import random
import statistics
import sys
import time
from pathlib import Path

import torch

import fastbn
import fastbn.cuda
from fastbn.cli.bench_cuda import TENSORS

# Of ResNet-50 (C, H, W), batch 256, and few channels.
SHAPES = [
    (256, c, size, size)
    for c, size in (
        (64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14), (1024, 14), (512, 14),
        (512, 7), (2048, 7),
    )
] + [(64, 3, 512, 512)]  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)
CALLS = 10


def contenders(shape, dtype, memory_format):
    """For every operation the functions of every contender."""
    channels = shape[1]
    x, dy = (torch.randn(shape, device="cuda", dtype=dtype).to(memory_format=memory_format) for _ in range(2))
    gamma, beta = torch.ones(channels, device="cuda"), torch.zeros(channels, device="cuda")
    mean, var = torch.zeros(channels, device="cuda"), torch.ones(channels, device="cuda")
    out = torch.empty_like(x)
    functional = torch.nn.functional.batch_norm
    torch._dynamo.reset()  # else it falls back to eager after a few shapes
    compiled = torch.compile(functional, dynamic=False)
    leaf, weight, bias = (tensor.detach().clone().requires_grad_() for tensor in (x, gamma, beta))
    _, cache = fastbn.batchnorm_forward(x, gamma, beta, device="cuda")

    def backward(forward):
        y = forward(leaf, mean, var, weight, bias, True)
        return lambda: torch.autograd.grad(y, (leaf, weight, bias), dy, retain_graph=True)

    def without_cudnn(function):
        def call():
            with torch.backends.cudnn.flags(enabled=False):
                return function()

        return call

    running = {"running_mean": mean, "running_var": var, "device": "cuda"}
    result = {
        "forward": {
            "fastbn": lambda: fastbn.batchnorm(x, gamma, beta, training=True, out=out, **running),
            "torch": lambda: functional(x, mean, var, gamma, beta, True),
            "torch compiled": lambda: compiled(x, mean, var, gamma, beta, True),
        },
        "inference": {
            "fastbn": lambda: fastbn.batchnorm(x, gamma, beta, training=False, out=out, **running),
            "torch": lambda: functional(x, mean, var, gamma, beta, False),
            "torch compiled": lambda: compiled(x, mean, var, gamma, beta, False),
        },
        "backward": {
            "fastbn": lambda: fastbn.batchnorm_backward(dy, cache, out=out),
            "torch": backward(functional),
            "torch compiled": backward(compiled),
        },
    }
    with torch.backends.cudnn.flags(enabled=False):
        native = backward(functional)  # the backward of a forward without cuDNN
    for library, functions in others(x, dy, gamma, beta).items():
        for operation, function in functions.items():
            result[operation][library] = function
    for operation, functions in result.items():
        functions["torch without cuDNN"] = native if operation == "backward" else without_cudnn(functions["torch"])
        functions["copy"] = lambda: out.copy_(x)
    return result, x.numel() * x.element_size()


def others(x, dy, gamma, beta):
    """CuPy and JAX, where they are installed: the formula, as their users write it. They know no channels-last.

    JAX has a stream of its own, so its calls wait for the result: its device time is wall time.
    """
    found = {}
    if x.dtype != torch.float32 or not x.is_contiguous():
        return found
    if importlib.util.find_spec("cupy"):
        import cupy

        X, G, B = (cupy.asarray(tensor) for tensor in (x, gamma.view(1, -1, 1, 1), beta.view(1, -1, 1, 1)))

        def formula():
            mean, var = X.mean((0, 2, 3), keepdims=True), X.var((0, 2, 3), keepdims=True)
            return (X - mean) * (G / cupy.sqrt(var + 1e-5)) + B

        found["cupy"] = {"forward": formula}
    if importlib.util.find_spec("jax"):
        import jax

        X, DY, G, B = (jax.dlpack.from_dlpack(tensor.contiguous()) for tensor in (x, dy, gamma, beta))

        def forward(x, gamma, beta):
            mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
            scale = gamma[:, None, None] * jax.lax.rsqrt(var + 1e-5)
            return (x - mean) * scale + beta[:, None, None]

        run_forward = jax.jit(forward)
        run_backward = jax.jit(lambda x, gamma, beta, dy: jax.vjp(forward, x, gamma, beta)[1](dy))
        found["jax"] = {
            "forward": lambda: run_forward(X, G, B).block_until_ready(),
            "backward": lambda: jax.block_until_ready(run_backward(X, G, B, DY)),
        }
    return found


def seconds(function):
    """(device time, wall time) of a call."""
    for _ in range(CALLS):
        function()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start = time.perf_counter()
    first.record()
    for _ in range(CALLS):
        function()
    last.record()
    torch.cuda.synchronize()
    wall = time.perf_counter() - start
    return first.elapsed_time(last) / 1e3 / CALLS, wall / CALLS


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="two shapes, three rounds")
    arguments = parser.parse_args()
    reason = fastbn.cuda.why_not()
    if reason is not None or not torch.cuda.is_available():
        sys.exit(f"benchmarks/gpu.py: no GPU: {reason or 'PyTorch sees none'}")
    shapes, rounds = (SHAPES[1:3], 3) if arguments.quick else (SHAPES, arguments.rounds)
    cases = []
    for shape in shapes:
        for dtype in DTYPES:
            for layout, memory_format in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last)):
                torch.cuda.empty_cache()
                operations, nbytes = contenders(shape, dtype, memory_format)
                for operation, functions in operations.items():
                    taken = {name: [] for name in functions}
                    for _ in range(rounds):
                        for name in random.sample(list(functions), len(functions)):
                            taken[name].append(seconds(functions[name]))
                    copies = [device for device, _ in taken["copy"]]
                    least = TENSORS[operation] / TENSORS["copy"]
                    case = {
                        "shape": shape,
                        "dtype": str(dtype).removeprefix("torch."),
                        "layout": layout,
                        "operation": operation,
                        "bytes": TENSORS[operation] * nbytes,
                        "contenders": {},
                    }
                    for name, times in taken.items():
                        device, wall = zip(*times, strict=True)
                        shares = [least * copy / one for copy, one in zip(copies, device, strict=True)]
                        case["contenders"][name] = {
                            "device_s": statistics.median(device),
                            "wall_s": statistics.median(wall),
                            "share_of_copy": statistics.median(shares),
                        }
                    cases.append(case)
                    ours, theirs = (case["contenders"][name]["device_s"] for name in ("fastbn", "torch"))
                    share = case["contenders"]["fastbn"]["share_of_copy"]
                    print(f"{operation:9} {layout} {case['dtype']:8} {shape!s:20} {ours * 1e6:8.0f} us"
                          f"  {share:5.2f} of copy  torch/fastbn {theirs / ours:5.2f}", flush=True)  # fmt: skip
    record = {
        "gpu": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        **fastbn.runtime.config(),
    }
    arguments.output.write_text(json.dumps({"machine": record, "rounds": rounds, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
