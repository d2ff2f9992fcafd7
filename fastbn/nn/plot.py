"""Pictures of a training."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastbn.nn.checkpoint import write_atomically
from fastbn.nn.layers import Array
from fastbn.nn.train import Epoch


def plot_histories(path: str | os.PathLike[str], histories: Mapping[str, list[Epoch]]) -> None:
    """Write a PNG: training loss and test accuracy per epoch, one curve for each label in `histories`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for label, history in histories.items():
        epochs = [epoch["epoch"] for epoch in history]
        loss.plot(epochs, [epoch["train_loss"] for epoch in history], marker="o", markersize=4, label=label)
        accuracy.plot(epochs, [epoch["test_accuracy"] for epoch in history], marker="o", markersize=4, label=label)
    loss.set(title="Training loss", ylabel="cross-entropy (log scale)", yscale="log")
    accuracy.set(title="Test accuracy", ylabel="images classified correctly")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for axes in (loss, accuracy):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    write(path, figure)


def plot_mistakes(path: str | os.PathLike[str], images: Array, labels: Array, predictions: Array) -> None:
    """Write a PNG: the confusion matrix, and the first images (N, C, H, W) that are classified wrongly."""
    from matplotlib.figure import Figure

    classes = int(max(labels.max(), predictions.max())) + 1
    counts = np.zeros((classes, classes), int)
    np.add.at(counts, (labels, predictions), 1)
    wrong = np.flatnonzero(labels != predictions)
    figure = Figure(figsize=(13, 6), dpi=120, layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False)[0]

    axes = left.subplots()
    # Without the diagonal, which would outshine everything else.
    axes.imshow(np.where(np.eye(classes, dtype=bool), 0, counts), cmap="Reds")
    if classes <= 20:
        for (row, column), count in np.ndenumerate(counts):
            axes.text(column, row, count or "", ha="center", va="center", fontsize=8)
        axes.set(xticks=range(classes), yticks=range(classes))
    axes.set(title=f"{len(wrong)} of {len(labels)} images are classified wrongly", xlabel="prediction", ylabel="label")

    for place, number in zip(right.subplots(5, 6, squeeze=False).flat, [*wrong[:30], *[None] * 30], strict=False):
        place.axis("off")
        if number is not None:
            place.imshow(images[number].transpose(1, 2, 0).squeeze(), cmap="gray")
            place.set_title(f"{predictions[number]}, not {labels[number]}", fontsize=8)
    write(path, figure)


def write(path: str | os.PathLike[str], figure: Any) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomically(path, content.getvalue())
