"""The command ``fastbn``: train a network, measure this machine, show the configuration.

Exit codes: 0, 1 if something failed on the way, 2 for wrong arguments (one line on stderr), 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

import fastbn
from fastbn import nn
from fastbn.nn import checkpoint

Array = NDArray[Any]


class UsageError(Exception):
    """A wrong argument that argparse cannot see."""


class Parser(argparse.ArgumentParser):
    """Reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def number(kind: type, accepted: str, valid: Callable[[Any], bool]) -> Callable[[str], Any]:
    """A type for argparse: a number with a rule, and the words that describe it."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if valid(value):
                return value
        raise argparse.ArgumentTypeError(f"expected {accepted}, got {text!r}")

    return parse


POSITIVE = number(int, "a whole number of at least 1", lambda value: value >= 1)
NATURAL = number(int, "a whole number of at least 0", lambda value: value >= 0)
THREADS = number(
    int,
    f"a whole number from 1 to {fastbn.runtime.MAX_THREADS}",
    lambda value: 1 <= value <= fastbn.runtime.MAX_THREADS,
)
RATE = number(float, "a number above 0", lambda value: 0 < value < math.inf)
SHARE = number(float, "a number of at least 0 and below 1", lambda value: 0 <= value < 1)
DECAY = number(float, "a number of at least 0", lambda value: 0 <= value < math.inf)


def output(text: str) -> Path:
    """A type for argparse: a file that can be written. Better to know before the training than after it."""
    path = Path(text)
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "is a directory")
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: {error.strerror}") from error


def picture(text: str) -> Path:
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"expected a name that ends in .png, got {text!r}")
    return output(text)


# ---- fastbn train ----------------------------------------------------------------------------------------------------

# What decides the numbers of a training, and is kept in its checkpoint. The learning rate is chosen so that `--compare`
# is fair: medians of 8 seeds after 12 epochs are 97.6 to 98.1 % without batch normalization for rates from 0.07 to
# 0.14, and 98.6 to 98.9 % with it for rates from 0.03 to 0.1. This one belongs to the best of both.
DEFAULTS: dict[str, Any] = {
    "epochs": 12,
    "batch_size": 64,
    "lr": 0.07,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "seed": 0,
    "batch_norm": True,
}
TARGET = 0.95  # the accuracy to which `--compare` counts epochs


def add_train(parser: argparse.ArgumentParser) -> None:
    def option(name: str, kind: Callable[[str], Any], text: str) -> None:
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, metavar="N", help=f"{text} (default {DEFAULTS[name]})"
        )

    option("epochs", POSITIVE, "passes over the training images")
    option("batch_size", POSITIVE, "the most images in a batch")
    option("lr", RATE, "learning rate")
    option("momentum", SHARE, "momentum of the gradient descent")
    option("weight_decay", DECAY, "weight decay")
    option("seed", NATURAL, "decides initial weights and order; the same seed gives the same numbers")
    parser.add_argument(
        "--no-bn", dest="batch_norm", action="store_const", const=False, help="leave batch normalization out"
    )
    parser.add_argument("--compare", action="store_true", help="train with and without batch normalization")
    parser.add_argument("--plot", type=picture, metavar="FILE", help="write the curves as a PNG")
    parser.add_argument("--checkpoint", type=output, metavar="FILE", help="save the state after every epoch")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="continue from a checkpoint, and save to it")
    parser.add_argument(
        "--num-threads",
        type=THREADS,
        metavar="N",
        default=1,
        help="threads of fastbn and of NumPy's products (default 1: the digits are too small to be worth sharing)",
    )
    parser.set_defaults(run=train)


def require_extra(args: argparse.Namespace) -> None:
    """UsageError if a library is missing that this training will use, at once rather than when it is needed."""
    uses = {
        "sklearn": True,
        "tqdm": True,
        "matplotlib": args.plot is not None,
        "safetensors": args.checkpoint is not None or args.resume is not None,
    }
    missing = [name for name, used in uses.items() if used and importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"not installed: {', '.join(missing)}; the command is: pip install 'fastbn[train]'")


def resolve(args: argparse.Namespace) -> tuple[dict[str, Any], checkpoint.Checkpoint | None]:
    """The configuration (given on the command line, else saved in the checkpoint, else default) and the checkpoint."""
    given = {name: value for name in DEFAULTS if (value := getattr(args, name)) is not None}
    if args.compare and (args.batch_norm is not None or args.checkpoint is not None or args.resume is not None):
        raise UsageError("--compare trains two networks: it goes with none of --no-bn, --checkpoint, --resume")
    if args.resume is None:
        return DEFAULTS | given, None
    saved = checkpoint.load(args.resume)
    for name, value in given.items():
        if name != "epochs" and value != saved.config.get(name):
            option = "--no-bn" if name == "batch_norm" else f"--{name.replace('_', '-')} {value}"
            raise UsageError(f"{option}: {args.resume} was trained with {name} = {saved.config.get(name)}")
    config = DEFAULTS | saved.config | given
    if len(saved.history) >= config["epochs"]:
        raise UsageError(f"{args.resume} has {len(saved.history)} epochs already: --epochs must ask for more")
    return config, saved


def train_network(
    config: dict[str, Any], data: nn.Dataset, saved: checkpoint.Checkpoint | None, save_to: Path | None
) -> list[dict[str, Any]]:
    rng = np.random.default_rng(config["seed"])
    model = nn.digits_cnn(config["batch_norm"], rng=rng)
    optimizer = nn.SGD(model, config["lr"], config["momentum"], config["weight_decay"])
    history = []
    if saved is not None:
        saved.restore(model, optimizer, rng)
        history = saved.history
    return nn.fit(
        model,
        optimizer,
        data,
        epochs=config["epochs"],
        batch_size=config["batch_size"],
        rng=rng,
        history=history,
        save_to=save_to,
        config=config,
    )


def compared(histories: dict[str, list[dict[str, Any]]], test_images: int) -> str:
    """What the two trainings show, with what it is worth."""

    def reached(history: list[dict[str, Any]]) -> str:
        first = next((epoch["epoch"] for epoch in history if epoch["test_accuracy"] >= TARGET), None)
        return "never" if first is None else f"after epoch {first}"

    lines = [
        f"{'test accuracy':<13} {'epoch 1':>8} {'best':>8} {'last':>8} {f'{TARGET:.0%} reached':>15} {'images/s':>9}"
    ]
    for label, history in histories.items():
        accuracies = [epoch["test_accuracy"] for epoch in history]
        speed = statistics.median(epoch["images_per_second"] for epoch in history)
        lines.append(
            f"{label:<13} {accuracies[0]:>8.2%} {max(accuracies):>8.2%} {accuracies[-1]:>8.2%}"
            f" {reached(history):>15} {speed:>9,.0f}"
        )
    lines.append(f"One seed, {test_images} test images: a gap of {1 / test_images:.2%} is one image.")
    return "\n".join(lines)


def train(args: argparse.Namespace) -> int:
    require_extra(args)
    from threadpoolctl import threadpool_limits  # a dependency of scikit-learn

    config, saved = resolve(args)
    save_to = args.checkpoint or args.resume
    data = nn.load_digits()
    variants = {"with BN": True, "without BN": False}
    if not args.compare:
        variants = {label: used for label, used in variants.items() if used == config["batch_norm"]}

    histories = {}
    with fastbn.threads(args.num_threads), threadpool_limits(args.num_threads, user_api="blas"):
        for label, batch_norm in variants.items():
            print(f"{label}: lr {config['lr']:g}, batch size {config['batch_size']}, seed {config['seed']}", flush=True)
            try:
                histories[label] = train_network(config | {"batch_norm": batch_norm}, data, saved, save_to)
            except KeyboardInterrupt:
                advice = (
                    f"continue with: fastbn train --resume {save_to}"
                    if save_to
                    else "nothing was saved (--checkpoint FILE does)"
                )
                print(f"fastbn train: interrupted; {advice}", file=sys.stderr)
                return 130
            print()

    if args.compare:
        print(compared(histories, len(data.x_test)))
    if args.plot is not None:
        nn.plot_histories(args.plot, histories)
        print(f"curves: {args.plot}")
    diverged = [label for label, history in histories.items() if not math.isfinite(history[-1]["train_loss"])]
    if diverged:
        print(f"fastbn train: diverged {' and '.join(diverged)}: try a smaller --lr", file=sys.stderr)
        return 1
    return 0


# ---- fastbn bench ----------------------------------------------------------------------------------------------------

SHAPES: tuple[tuple[tuple[int, ...], int, str], ...] = (  # shape, channel axis, layout
    ((32, 64, 56, 56), 1, "NCHW"),
    ((32, 56, 56, 64), -1, "NHWC"),
    ((32, 256, 14, 14), 1, "NCHW"),
    ((32, 2048, 7, 7), 1, "NCHW"),
    ((256, 512), 1, "NC"),
)
QUICK_SHAPES = SHAPES[2:3] + SHAPES[4:]

BENCH_NOTES = """\
float32; medians of {repeats} repeats, fastbn and NumPy taking turns; fastbn writes to a buffer of the caller.
GB/s counts what must move: x read and y written; in the backward pass x and dy read and dx written. Training needs
the statistics first, so it reads its inputs twice unless a cache holds them: about 67 % (forward) and 60 % (backward)
of the copy speed is then the most to expect. Shapes that fit into a cache can exceed the speed of copying in memory."""


def add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="two small shapes")
    parser.add_argument("--json", type=output, metavar="FILE", help="write the results as JSON, too")
    parser.add_argument("--num-threads", type=THREADS, metavar="N", help="threads of fastbn (NumPy uses one)")
    parser.set_defaults(run=bench)


def median_seconds(contenders: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median time of a call of each contender. They take turns; a turn starts with a pause, in which the threads of the
    other one go to sleep, and with a call that is not counted."""
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(repeats):
        for contender, results in zip(contenders, times, strict=True):
            time.sleep(0.01)
            start = time.perf_counter()
            contender()
            calls = max(1, int(0.005 / (time.perf_counter() - start)))  # enough of them for the clock
            start = time.perf_counter()
            for _ in range(calls):
                contender()
            results.append((time.perf_counter() - start) / calls)
    return [statistics.median(results) for results in times]


def numpy_forward(x: Array, gamma: Array, beta: Array, axes: tuple[int, ...], eps: float = 1e-5) -> Array:
    mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    return numpy_inference(x, gamma, beta, mean, var, eps)


def numpy_inference(x: Array, gamma: Array, beta: Array, mean: Array, var: Array, eps: float = 1e-5) -> Array:
    y: Array = (x - mean) * (gamma / np.sqrt(var + eps)) + beta
    return y


def numpy_backward(dy: Array, x: Array, gamma: Array, mean: Array, rstd: Array, axes: tuple[int, ...]) -> Array:
    count = x.size // gamma.size
    normalized = (x - mean) * rstd
    dbeta = dy.sum(axes, keepdims=True)
    dgamma = (dy * normalized).sum(axes, keepdims=True)
    dx: Array = (gamma * rstd) * (dy - dbeta / count - normalized * (dgamma / count))
    return dx


def bench_shape(shape: tuple[int, ...], axis: int, repeats: int) -> dict[str, tuple[int, list[float]]]:
    """Per operation the bytes that must move and the median seconds of fastbn and of NumPy."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(shape, np.float32) for _ in range(2))
    channels = shape[axis]
    gamma, beta = np.ones(channels, np.float32), np.zeros(channels, np.float32)
    running_mean, running_var = np.zeros(channels, np.float32), np.ones(channels, np.float32)
    out = np.empty_like(x)
    batchnorm = functools.partial(
        fastbn.batchnorm, x, gamma, beta, running_mean=running_mean, running_var=running_var, axis=axis, out=out
    )
    _, cache = fastbn.batchnorm_forward(x, gamma, beta, axis=axis)

    axes = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    # NumPy wants vectors that broadcast against x.
    g, b, m, v = (np.expand_dims(vector, axes) for vector in (gamma, beta, running_mean, running_var))
    mean, rstd = x.mean(axes, keepdims=True), 1 / np.sqrt(x.var(axes, keepdims=True) + 1e-5)

    contenders: dict[str, tuple[int, Callable[[], object], Callable[[], object]]] = {
        "forward": (
            2 * x.nbytes,
            functools.partial(batchnorm, training=True),
            lambda: numpy_forward(x, g, b, axes),
        ),
        "inference": (
            2 * x.nbytes,
            functools.partial(batchnorm, training=False),
            lambda: numpy_inference(x, g, b, m, v),
        ),
        "backward": (
            3 * x.nbytes,
            lambda: fastbn.batchnorm_backward(dy, cache, out=out),
            lambda: numpy_backward(dy, x, g, mean, rstd, axes),
        ),
    }
    return {name: (nbytes, median_seconds(pair, repeats)) for name, (nbytes, *pair) in contenders.items()}


def bench(args: argparse.Namespace) -> int:
    repeats = 7
    rows = []
    with fastbn.threads(args.num_threads) if args.num_threads is not None else contextlib.nullcontext():
        threads = fastbn.get_num_threads()
        copy_speed = fastbn.runtime.copy_speed()
        print(
            f"fastbn {fastbn.__version__}, NumPy {np.__version__}; threads: {threads}; copying: {copy_speed:.1f} GB/s\n"
        )
        print(f"{'operation':<10} {'layout':<6} {'shape':<18} {'ms':>9} {'GB/s':>7} {'of copy':>8}", end="")
        print(f" {'NumPy ms':>9} {'speed-up':>9}", flush=True)
        for shape, axis, layout in QUICK_SHAPES if args.quick else SHAPES:
            for operation, (nbytes, (ours, numpys)) in bench_shape(shape, axis, repeats).items():
                speed = nbytes / ours / 1e9
                rows.append(
                    {
                        "operation": operation,
                        "layout": layout,
                        "shape": shape,
                        "ms": ours * 1e3,
                        "gb_per_s": speed,
                        "share_of_copy": speed / copy_speed,
                        "numpy_ms": numpys * 1e3,
                        "speed_up": numpys / ours,
                    }
                )
                print(
                    f"{operation:<10} {layout:<6} {'x'.join(map(str, shape)):<18} {ours * 1e3:>9.3f} {speed:>7.1f}"
                    f" {speed / copy_speed:>8.0%} {numpys * 1e3:>9.3f} {numpys / ours:>8.1f}x",
                    flush=True,
                )
    print(f"\n{BENCH_NOTES.format(repeats=repeats)}")
    if args.json is not None:
        record = {
            "machine": fastbn.runtime.config(),
            "repeats": repeats,
            "copy_gb_per_s": copy_speed,
            "rows": rows,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


# ---- fastbn info, and the command ------------------------------------------------------------------------------------


def info(args: argparse.Namespace) -> int:
    fastbn.show_config()
    return 0


def build_parser() -> Parser:
    parser = Parser(prog="fastbn", description="Batch normalization for NumPy arrays, at the speed of memory.")
    parser.add_argument("--version", action="version", version=f"fastbn {fastbn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,bench,info}")
    add_train(commands.add_parser("train", help="train a small CNN on handwritten digits"))
    add_bench(commands.add_parser("bench", help="measure the throughput on this machine"))
    commands.add_parser("info", help="show versions, instruction sets, threads").set_defaults(run=info)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name; ``sys.argv`` if None) and return the exit code."""
    args = build_parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except (UsageError, nn.CheckpointError, fastbn.FastBNError) as error:
        message, code = str(error), 2
    except BrokenPipeError:
        # The reader of our output has gone, as in `fastbn bench | head`; keep Python from flushing into the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        message, code = str(error), 1
    print(f"fastbn {args.command}: {message}", file=sys.stderr)
    return code
