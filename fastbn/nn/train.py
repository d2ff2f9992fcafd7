"""The training loop."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np

import fastbn
from fastbn.nn import checkpoint
from fastbn.nn.conv import without_input_gradient
from fastbn.nn.data import Dataset, batches
from fastbn.nn.inference import evaluate
from fastbn.nn.layers import Array, LayerLike
from fastbn.nn.loss import softmax_cross_entropy
from fastbn.nn.optim import Optimizer, Schedule, constant
from fastbn.nn.threads import threads

Augmentation = Callable[[Array, np.random.Generator], Array]
Epoch = dict[str, Any]  # one row of the history: the keys of `fit`'s table

HEADER = f"{'epoch':>5} {'train loss':>11} {'train acc':>10} {'test acc':>9} {'images/s':>9}"


def row(epoch: Epoch) -> str:
    return (
        f"{epoch['epoch']:>5} {epoch['train_loss']:>11.4f} {epoch['train_accuracy']:>10.2%}"
        f" {epoch['test_accuracy']:>9.2%} {epoch['images_per_second']:>9,.0f}"
    )


def learn_from(model: LayerLike, optimizer: Optimizer, x: Array, labels: Array) -> tuple[float, Array]:
    """One step of training: the loss of a batch, and the logits. Nothing is learned from a loss that is not finite."""
    logits = model.forward(x)
    loss, dlogits = softmax_cross_entropy(logits, labels)
    if math.isfinite(loss):
        model.backward(dlogits)
        optimizer.step()
    return loss, logits


def fit(
    model: LayerLike,
    optimizer: Optimizer,
    data: Dataset,
    *,
    epochs: int,
    batch_size: int,
    rng: np.random.Generator | int,
    schedule: Schedule = constant,
    augment: Augmentation | None = None,
    history: list[Epoch] | None = None,
    save_to: str | os.PathLike[str] | None = None,
    config: dict[str, Any] | None = None,
    log: Callable[[str], object] = print,
) -> list[Epoch]:
    """Train until the history has `epochs` epochs; a table goes to `log`, a progress bar to a terminal.

    Parameters
    ----------
    batch_size : int
        The most images of a batch: the batches of an epoch are of nearly equal size. (If it is 2, an odd one out makes
        one of 3: alone it could have no variance.)
    rng : numpy.random.Generator or int
        Shuffles and augments. The same state gives the same result, bit for bit, on the same machine.
    schedule : callable
        Factor of the optimizer's learning rate after so many epochs, fractions included: `fastbn.nn.cosine` and others.
    augment : callable, optional
        ``augment(images, rng)`` changes the images of a batch: `functools.partial` of `fastbn.nn.augment`.
    history : list of dict, optional
        Epochs done before, when a checkpoint was restored. Epochs are appended to it.
    save_to : path, optional
        Checkpoint, written at the start and after each epoch. An interruption at any moment (KeyboardInterrupt
        passes through) leaves the last finished epoch there.
    config : dict, optional
        Kept in the checkpoint.

    Returns
    -------
    history : list of dict
        ``epoch``, ``train_loss``, ``train_accuracy`` (means over the epoch, while the model learned), ``test_accuracy``
        and ``images_per_second`` of training. It ends early, with a loss that is not finite, if training diverges.
    """
    from tqdm import tqdm

    rng = np.random.default_rng(rng)
    history = [] if history is None else history
    log(HEADER)
    for epoch in history:
        log(row(epoch))
    if save_to is not None:
        checkpoint.save(save_to, model, optimizer, rng, history, config)

    images, rate = len(data.x_train), optimizer.lr
    # Training that diverges ends with a row that shows it, not with warnings.
    with (
        threads(fastbn.get_num_threads()),
        without_input_gradient(model),
        np.errstate(over="ignore", invalid="ignore"),
        ExitStack() as stack,
    ):
        stack.callback(setattr, optimizer, "lr", rate)  # also if somebody interrupts
        for number in range(len(history) + 1, epochs + 1):
            model.train()
            loss_sum, correct, start = 0.0, 0, time.perf_counter()
            parts = batches(rng.permutation(images), batch_size)
            progress = tqdm(parts, desc=f"epoch {number}/{epochs}", unit="batch", leave=False, disable=None)
            for step, batch in enumerate(progress):
                x, labels = data.x_train[batch], data.y_train[batch]
                optimizer.lr = rate * schedule(number - 1 + step / len(parts))
                loss, logits = learn_from(model, optimizer, x if augment is None else augment(x, rng), labels)
                loss_sum += loss * len(batch)
                correct += int((logits.argmax(axis=1) == labels).sum())
                if not math.isfinite(loss):
                    break
            speed = images / (time.perf_counter() - start)
            history.append(
                {
                    "epoch": number,
                    "train_loss": loss_sum / images,
                    "train_accuracy": correct / images,
                    "test_accuracy": evaluate(model, data.x_test, data.y_test),
                    "images_per_second": speed,
                }
            )
            log(row(history[-1]))
            if not math.isfinite(loss_sum):
                break
            if save_to is not None:
                checkpoint.save(save_to, model, optimizer, rng, history, config)
    return history
