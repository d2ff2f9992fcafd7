"""The picture of a training."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping

from fastbn.nn.checkpoint import write_atomically
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
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomically(path, content.getvalue())
