"""``fastbn train``: a network on images."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import signal
import statistics
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

import fastbn
from fastbn import nn
from fastbn.cli.arguments import DECAY, NATURAL, POSITIVE, RATE, SHARE, THREADS, UsageError, output, picture
from fastbn.nn import checkpoint
from fastbn.nn.optim import OPTIMIZERS, SCHEDULES

# What decides the numbers of a training, and is kept in its checkpoint. The learning rate is chosen so that `--compare`
# is fair: medians of 8 seeds after 12 epochs are 97.6 to 98.1 % without batch normalization for rates from 0.07 to
# 0.14, and 98.6 to 98.9 % with it for rates from 0.03 to 0.1. This one belongs to the best of both.
DEFAULTS: dict[str, Any] = {
    "model": "cnn_bn",
    "data": "digits",
    "layout": "NHWC",
    "epochs": 12,
    "batch_size": 64,
    "optimizer": "sgd",
    "lr": 0.07,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "schedule": "constant",
    "shift": 0,
    "flip": False,
    "seed": 0,
    "batch_norm": True,
}
TARGET = 0.95  # the accuracy to which `--compare` counts epochs


def add_train(parser: argparse.ArgumentParser) -> None:
    def option(name: str, text: str, **options: Any) -> None:
        if "choices" not in options:
            options.setdefault("metavar", "N")
        help = f"{text} (default {DEFAULTS[name]})"
        parser.add_argument(f"--{name.replace('_', '-')}", help=help, **options)

    option("model", "the network", choices=nn.MODELS)
    option("data", "'digits', 'fashion-mnist', or a folder with files of MNIST's format or of CIFAR-10", metavar="DATA")
    option("layout", "order of the axes of images", choices=("NCHW", "NHWC"))
    option("epochs", "passes over the training images", type=POSITIVE)
    option("batch_size", "the most images in a batch", type=POSITIVE)
    option("optimizer", "how weights follow gradients", choices=OPTIMIZERS)
    option("lr", "learning rate", type=RATE)
    option("momentum", "momentum of sgd", type=SHARE)
    option("weight_decay", "weight decay", type=DECAY)
    option("schedule", "how the learning rate falls: 'step' divides it by 10 after each third", choices=SCHEDULES)
    option("shift", "move training images at random by so many pixels", type=NATURAL)
    option("seed", "decides initial weights and order; the same seed gives the same numbers", type=NATURAL)
    for name, value, text in (
        ("flip", True, "mirror training images at random"),
        ("no-bn", False, "leave batch normalization out"),
    ):
        dest = "batch_norm" if name == "no-bn" else name
        parser.add_argument(f"--{name}", dest=dest, action="store_const", const=value, help=text)
    parser.add_argument("--compare", action="store_true", help="train with and without batch normalization")
    parser.add_argument("--plot", type=picture, metavar="FILE", help="write the curves as a PNG")
    parser.add_argument(
        "--mistakes", type=picture, metavar="FILE", help="write confusion matrix and misclassified images as a PNG"
    )
    parser.add_argument(
        "--checkpoint", type=output, metavar="FILE", help="save the state after every epoch; a new file"
    )
    parser.add_argument("--resume", type=Path, metavar="FILE", help="continue from a checkpoint, and save to it")
    parser.add_argument(
        "--num-threads",
        type=THREADS,
        metavar="N",
        help="threads of fastbn and of the layers (default: 1 for the digits, which are too small to be shared; else "
        "those of `fastbn info`)",
    )
    parser.set_defaults(run=train)


def require_extra(args: argparse.Namespace, data: str | None) -> None:
    """UsageError if a library is missing that this training will use, at once rather than when it is needed. Which
    data they are is perhaps said by the checkpoint only."""
    uses = {
        "sklearn": data == "digits",
        "threadpoolctl": True,
        "tqdm": True,
        "matplotlib": args.plot is not None or args.mistakes is not None,
        "safetensors": args.checkpoint is not None or args.resume is not None,
    }
    missing = [name for name, used in uses.items() if used and importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"not installed: {', '.join(missing)}; the command is: pip install 'fastbn[train]'")


def check_config(path: Path, config: dict[str, Any]) -> None:
    """CheckpointError if it is none that this command has saved: another program may have written the file."""
    tables = {"model": nn.MODELS, "layout": ("NCHW", "NHWC"), "optimizer": OPTIMIZERS, "schedule": SCHEDULES}
    for name, value in config.items():
        if type(value) is not type(DEFAULTS.get(name)) or value not in tables.get(name, [value]):
            raise nn.CheckpointError(f"{path}: not of this command: {name} = {value!r}")
    missing = [name for name in DEFAULTS if name not in config]
    if missing:
        raise nn.CheckpointError(f"{path}: not of this command: without {', '.join(missing)}")


def resolve(args: argparse.Namespace) -> tuple[dict[str, Any], checkpoint.Checkpoint | None]:
    """The configuration (given on the command line, else saved in the checkpoint, else default) and the checkpoint."""
    given = {name: value for name in DEFAULTS if (value := getattr(args, name)) is not None}
    if args.compare and (args.batch_norm is not None or args.checkpoint is not None or args.resume is not None):
        raise UsageError("--compare trains two networks: it goes with none of --no-bn, --checkpoint, --resume")
    if args.compare and args.mistakes is not None:
        raise UsageError("--mistakes shows one network, --compare trains two")
    if args.resume is None:
        if args.checkpoint is not None and args.checkpoint.exists():
            raise UsageError(f"--checkpoint {args.checkpoint}: exists; --resume {args.checkpoint} continues it")
        return DEFAULTS | given, None
    saved = checkpoint.load(args.resume)
    check_config(args.resume, saved.config)
    for name, value in given.items():
        if name == "epochs" and (saved.config["schedule"] == "constant" or value == saved.config[name]):
            continue
        if name == "epochs" or value != saved.config[name]:
            option = "--no-bn" if name == "batch_norm" else f"--{name.replace('_', '-')} {value}"
            raise UsageError(f"{option}: {args.resume} was trained with {name} = {saved.config[name]}")
    config = saved.config | given
    if len(saved.history) >= config["epochs"]:
        advice = "--epochs must ask for more"
        if config["schedule"] != "constant":
            advice = f"with the schedule {config['schedule']} they are all"
        raise UsageError(f"{args.resume} has {len(saved.history)} epochs already: {advice}")
    return config, saved


def build(config: dict[str, Any], data: nn.Dataset) -> tuple[nn.Sequential, Any, np.random.Generator]:
    """A new model, its optimizer, and the generator that decides all random numbers of the training."""
    rng = np.random.default_rng(config["seed"])
    options = {"input_shape": data.input_shape, "classes": data.classes, "layout": config["layout"], "rng": rng}
    try:
        model = nn.MODELS[config["model"]](config["batch_norm"], **options)
    except ValueError as error:
        raise UsageError(f"--model {config['model']}: not for images of shape {data.input_shape}: {error}") from error
    momentum = {"momentum": config["momentum"]} if config["optimizer"] == "sgd" else {}
    optimizer = OPTIMIZERS[config["optimizer"]](model, config["lr"], weight_decay=config["weight_decay"], **momentum)
    return model, optimizer, rng


@contextmanager
def no_interrupt_lost() -> Iterator[Callable[[str], None]]:
    """`print`, for the lines of a training; it raises a KeyboardInterrupt once more that did not end the training:
    Python drops one that comes while an object is destroyed."""
    seen = []

    def remember(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    def log(line: str) -> None:
        print(line)
        if seen:
            raise KeyboardInterrupt

    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield log
        return
    signal.signal(signal.SIGINT, remember)
    try:
        yield log
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def train_network(
    config: dict[str, Any], data: nn.Dataset, saved: checkpoint.Checkpoint | None, save_to: Path | None
) -> tuple[nn.Sequential, list[dict[str, Any]]]:
    """The trained model and its history."""
    model, optimizer, rng = build(config, data)
    history = []
    if saved is not None:
        saved.restore(model, optimizer, rng)
        history = saved.history
    changes = {"shift": config["shift"], "flip": config["flip"], "layout": config["layout"]}
    with no_interrupt_lost() as log:
        nn.fit(
            model,
            optimizer,
            data.in_layout(config["layout"]),
            epochs=config["epochs"],
            batch_size=config["batch_size"],
            rng=rng,
            schedule=SCHEDULES[config["schedule"]](config["epochs"]),
            augment=functools.partial(nn.augment, **changes) if config["shift"] or config["flip"] else None,
            history=history,
            save_to=save_to,
            config=config,
            log=log,
        )
    return model, history


def compared(histories: dict[str, list[dict[str, Any]]], test_images: int) -> str:
    """What the trainings show, with what it is worth."""

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
    require_extra(args, args.data if args.resume is not None else args.data or DEFAULTS["data"])
    config, saved = resolve(args)
    require_extra(args, config["data"])
    if args.momentum is not None and config["optimizer"] != "sgd":
        raise UsageError(f"--momentum is of sgd: it does not go with --optimizer {config['optimizer']}")
    save_to = args.checkpoint or args.resume
    data = nn.load(config["data"])
    variants = {"with BN": True, "without BN": False}
    if not args.compare:
        variants = {label: used for label, used in variants.items() if used == config["batch_norm"]}

    histories = {}
    with nn.threads(args.num_threads or (1 if config["data"] == "digits" else fastbn.get_num_threads())):
        for label, batch_norm in variants.items():
            print(
                f"{config['model']} on {config['data']}, {label}: {config['optimizer']}, lr {config['lr']:g}, "
                f"batch size {config['batch_size']}, seed {config['seed']}",
                flush=True,
            )
            try:
                model, histories[label] = train_network(config | {"batch_norm": batch_norm}, data, saved, save_to)
            except KeyboardInterrupt:
                advice = (
                    f"continue with: fastbn train --resume {save_to}"
                    if save_to
                    else "nothing was saved" + ("" if args.compare else " (--checkpoint FILE does)")
                )
                print(f"fastbn train: interrupted; {advice}", file=sys.stderr)
                return 130
            print()
        if args.mistakes is not None:
            predictions = nn.predict(model, data.in_layout(config["layout"]).x_test)
            nn.plot_mistakes(args.mistakes, data.x_test, data.y_test, predictions)

    print(compared(histories, len(data.x_test)))
    if args.plot is not None:
        nn.plot_histories(args.plot, histories)
        print(f"curves: {args.plot}")
    if args.mistakes is not None:
        print(f"mistakes: {args.mistakes}")
    diverged = [label for label, history in histories.items() if not math.isfinite(history[-1]["train_loss"])]
    if diverged:
        print(f"fastbn train: diverged {' and '.join(diverged)}: try a smaller --lr", file=sys.stderr)
        return 1
    return 0
