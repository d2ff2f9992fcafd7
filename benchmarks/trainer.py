"""A training step of three networks, with fastbn's trainer and with PyTorch.

    python benchmarks/trainer.py [--threads 2] [--rounds 15] [--output benchmarks/results/trainer.json]

A step is forward, loss, backward and SGD with momentum, on one batch of random images. Each contender is a process of
its own; they take turns, a turn is some steps, and the time of a turn is the median of its steps. PyTorch's networks
are those that the tests compare with (tests/torch_networks.py).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastbn import nn

TESTS = Path(__file__).resolve().parents[1] / "tests"
NETWORKS = {"cnn_bn": (128, 3, 32, 32), "keras_cnn": (64, 1, 28, 28), "cnn2d": (128, 1, 28, 28)}  # batches
CONTENDERS = ("fastbn NHWC", "fastbn NCHW", "torch NCHW", "torch channels_last")
STEPS = 5  # of a turn


def fastbn_step(name: str, layout: str, x: Any, labels: Any) -> Callable[[], None]:
    model = nn.MODELS[name](input_shape=x.shape[1:], layout=layout, rng=0)
    optimizer = nn.SGD(model, 0.01, 0.9)
    images = x if layout == "NCHW" else np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    model.layers[0].input_gradient = False  # as in nn.fit, and in PyTorch: images need none

    def step() -> None:
        _loss, dlogits = nn.softmax_cross_entropy(model.forward(images), labels)
        model.backward(dlogits)
        optimizer.step()

    return step


def torch_step(name: str, layout: str, x: Any, labels: Any) -> Callable[[], None]:
    import torch

    sys.path.append(str(TESTS))
    import torch_networks

    model = getattr(torch_networks, name)(True, x.shape[1:], 10)
    images, targets = torch.from_numpy(x), torch.from_numpy(labels)
    if layout == "channels_last":
        model, images = (thing.to(memory_format=torch.channels_last) for thing in (model, images))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), targets).backward()
        optimizer.step()

    return step


def worker(name: str, contender: str, threads: int) -> None:
    """Answer each line of stdin with the seconds of a step."""
    library, layout = contender.split()
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal(NETWORKS[name], np.float32), rng.integers(0, 10, NETWORKS[name][0])
    step = {"fastbn": fastbn_step, "torch": torch_step}[library](name, layout, x, labels)

    with nn.threads(threads) if library == "fastbn" else contextlib.nullcontext():
        for _ in range(STEPS):
            step()
        for _ in sys.stdin:
            seconds = []
            for _ in range(STEPS):
                start = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - start)
            print(statistics.median(seconds), flush=True)


def measure(name: str, threads: int, rounds: int) -> dict[str, dict[str, float]]:
    processes = {}
    for contender in CONTENDERS:
        command = [sys.executable, __file__, "--worker", name, contender, "--threads", str(threads)]
        processes[contender] = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},  # PyTorch's number of threads
        )
    times: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
    try:
        for turn in range(rounds + 1):
            for contender, process in processes.items():
                assert process.stdin and process.stdout
                process.stdin.write("\n")
                process.stdin.flush()
                answer = float(process.stdout.readline())
                if turn:  # the first one only waits until the process is ready
                    times[contender].append(1e3 * answer)
                time.sleep(0.02)  # threads of this one go to sleep
    finally:
        for process in processes.values():
            process.communicate()
    return {
        contender: {
            "ms": statistics.median(found),
            "low": float(np.quantile(found, 0.25)),
            "high": float(np.quantile(found, 0.75)),
        }
        for contender, found in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(*args.worker, args.threads)
        return

    import torch

    import machine

    cpus = sorted(os.sched_getaffinity(0))
    record = {"machine": machine.record(args.threads, cpus), "torch": torch.__version__, "steps": {}}
    print(f"{'ms a step':<12}", *(f"{contender:>20}" for contender in CONTENDERS), f"{'torch / fastbn':>18}")
    for name, batch in NETWORKS.items():
        found = measure(name, args.threads, args.rounds)
        best = {of: min(found[name]["ms"] for name in CONTENDERS if name.startswith(of)) for of in ("fastbn", "torch")}
        ratio = best["torch"] / best["fastbn"]
        record["steps"][name] = {"batch": batch, "contenders": found, "torch / fastbn": ratio}
        print(f"{name:<12}", *(f"{found[contender]['ms']:>20.1f}" for contender in CONTENDERS), f"{ratio:>17.2f}x")
    if args.output:
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
