"""The use of a trained model: predictions, and batch normalization with other statistics or folded away."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import numpy as np

import fastbn
from fastbn.nn.conv import Conv2d
from fastbn.nn.data import batches
from fastbn.nn.layers import Array, Layer, LayerLike, Linear, ReLU, Sequential, walk
from fastbn.nn.loss import one_for_each

Model = TypeVar("Model", bound=Layer)
BATCH_NORM = (fastbn.BatchNorm1d, fastbn.BatchNorm2d, fastbn.BatchNorm3d)
IDENTITY = fastbn.runtime.activations()[0]


def predict(model: LayerLike, x: Array, batch_size: int = 256) -> Array:
    """The most likely class of each image, in inference mode; shape (N,)."""
    model.eval()
    parts = [model.forward(x[start : start + batch_size]).argmax(axis=1) for start in range(0, len(x), batch_size)]
    return np.concatenate([np.empty(0, np.intp), *parts])


def evaluate(model: LayerLike, x: Array, labels: Array, batch_size: int = 256) -> float:
    """Share of images classified correctly, in inference mode; `labels` is an integer for each, of shape (N,)."""
    one_for_each(labels, len(x))
    return float((predict(model, x, batch_size) == labels).mean())


def recalibrate(model: LayerLike, x: Array, batch_size: int = 256) -> None:
    """Set all running statistics to those of the images `x`, as the model is now.

    Running averages lag behind the weights. 10^3 to 10^4 images are enough: Wu and Johnson, "Rethinking 'Batch' in
    BatchNorm", 2021, arXiv:2105.07576, section 3 (PreciseBN, here with the variance of all images together instead of
    the mean of those of the batches). On the way each batch is normalized with its own statistics; all else, such as
    dropout, is in inference mode, and the model is left in it.
    """
    model.eval()
    norms: list[Any] = [layer for layer in walk(model) if isinstance(layer, BATCH_NORM) and layer.track_running_stats]
    options = [(norm.momentum, norm.unbiased) for norm in norms]
    before = [norm.state_dict() for norm in norms]
    totals: list[fastbn.Stats | None] = [None] * len(norms)
    taken = [0] * len(norms)
    try:
        for norm in norms:
            norm.train()
            norm.momentum, norm.unbiased = 1.0, False  # the running statistics become those of the batch
        for batch in batches(x, batch_size):
            for norm in norms:
                norm.reset_running_stats()  # NaN would stay whatever its weight is
            model.forward(batch)
            for i, norm in enumerate(norms):
                if not norm.num_batches_tracked:  # `nan_guard` has not taken this batch
                    continue
                # Images weigh alike, whatever the number of pixels: that is the same for all.
                stats = fastbn.Stats(len(batch), norm.running_mean, len(batch) * norm.running_var.astype(np.float64))
                total = totals[i]
                totals[i] = stats if total is None else total.merge(stats)
                taken[i] += 1
    except BaseException:  # also an interruption leaves the statistics as they were
        for norm, state in zip(norms, before, strict=True):
            norm.load_state_dict(state)
        raise
    finally:
        for norm, (norm.momentum, norm.unbiased) in zip(norms, options, strict=True):
            norm.eval()
    for norm, state, total, count in zip(norms, before, totals, taken, strict=True):
        norm.load_state_dict(state)
        if total is not None:
            norm.running_mean[...], norm.running_var[...] = total.mean, total.var()
            norm.num_batches_tracked[...] += count


def fold(model: Model) -> Model:
    """A copy for inference, in which batch normalization right behind a convolution or linear layer is part of it.

    It stays as it is where it has another activation than relu, or is the join of a `Residual`.
    """
    model = copy.deepcopy(model)
    for part in walk(model):
        if isinstance(part, Sequential):
            part.layers = tuple(_folded(part.layers))
    model.eval()
    return model


def _folded(layers: tuple[LayerLike, ...]) -> list[LayerLike]:
    result: list[LayerLike] = []
    for layer in layers:
        before = result[-1] if result else None
        if (
            isinstance(before, (Conv2d, Linear))
            and isinstance(layer, BATCH_NORM)
            and layer.running_mean is not None
            and layer.running_var is not None
            and layer.activation in (None, IDENTITY, "relu")
        ):
            before.weight, before.bias = fastbn.fold_into_conv(
                before.weight,
                before.bias,
                layer.running_mean,
                layer.running_var,
                layer.weight,
                layer.bias,
                eps=layer.eps,
            )
            result += [ReLU()] if layer.activation == "relu" else []
        else:
            result.append(layer)
    return result
