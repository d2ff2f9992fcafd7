"""What experiments share: training counted in steps, smaller images, initial weights, and a layer."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np

import fastbn
from fastbn.nn.conv import Conv2d, without_input_gradient
from fastbn.nn.data import Dataset
from fastbn.nn.experiments.protocol import Curve
from fastbn.nn.inference import evaluate
from fastbn.nn.layers import Array, Layer, LayerLike, Sequential, walk
from fastbn.nn.optim import SCHEDULES, SGD, Schedule, constant
from fastbn.nn.train import learn_from


def training(
    model: LayerLike,
    data: Dataset,
    seed: int,
    *,
    lr: float,
    batch_size: int,
    momentum: float = 0.0,
    schedule: Schedule = constant,
) -> Iterator[float]:
    """Train for as long as the caller asks for the loss of another step; the end if that is not finite.

    `schedule` gives the factor of the learning rate after so many steps.
    """
    rng, optimizer = np.random.default_rng(seed), SGD(model, lr, momentum)
    counter = itertools.count()
    with without_input_gradient(model):
        while True:
            for batch in np.array_split(rng.permutation(len(data.x_train)), math.ceil(len(data.x_train) / batch_size)):
                model.train()
                optimizer.lr = lr * schedule(next(counter))
                loss, _ = learn_from(model, optimizer, data.x_train[batch], data.y_train[batch])
                if not math.isfinite(loss):
                    return
                yield loss


def learn(
    model: LayerLike,
    data: Dataset,
    seed: int,
    *,
    lr: float,
    steps: int,
    batch_size: int,
    momentum: float = 0.0,
    schedule: str = "constant",
    points: int = 20,
) -> Curve:
    """Test accuracy at `points` equal distances of `steps` steps. A network that has diverged answers at chance."""
    factor = SCHEDULES[schedule](steps)
    run = training(model, data, seed, lr=lr, batch_size=batch_size, momentum=momentum, schedule=factor)
    at = [steps * (i + 1) // points for i in range(points)]
    accuracy = []
    for start, end in itertools.pairwise([0, *at]):
        diverged = sum(1 for _ in itertools.islice(run, end - start)) < end - start
        accuracy.append(1 / 10 if diverged else evaluate(model, data.x_test, data.y_test))
    return at, accuracy


def final(curve: Curve) -> float:
    """The last y of a curve."""
    return float(curve[1][-1])


def steps_to(target: float, curve: Curve) -> float:
    """Steps to an accuracy; the length of the curve if it is never reached."""
    return float(next((step for step, accuracy in zip(*curve, strict=True) if accuracy >= target), curve[0][-1]))


def halved(data: Dataset) -> Dataset:
    """Images of half the height and width, each pixel the mean of four."""

    def mean(x: Array) -> Array:
        N, C, H, W = x.shape
        smaller: Array = x.reshape(N, C, H // 2, 2, W // 2, 2).mean((3, 5))
        return smaller

    return data._replace(x_train=mean(data.x_train), x_test=mean(data.x_test))


def convolutions_of(model: Sequential, seed: int, variance: Callable[[int, int], float]) -> list[Conv2d]:
    """The convolutions, with new normal weights; `variance` is a function of the numbers of inputs and of outputs."""
    rng = np.random.default_rng(seed)
    found = [layer for layer in walk(model) if isinstance(layer, Conv2d)]
    for layer in found:
        std = variance(layer.weight[0].size, layer.weight[:, 0].size) ** 0.5
        layer.weight[...] = rng.normal(0, std, layer.weight.shape)
    return found


class Grouped(Layer):
    """A batch normalization, which in training normalizes each `size` images of a batch by themselves."""

    def __init__(self, norm: fastbn.BatchNorm2d, size: int) -> None:
        self.norm, self.size, self.layers = norm, size, (norm,)

    def forward(self, x: Array, /) -> Array:
        if not self.training:
            return self.norm.forward(x)
        groups = [x[i : i + self.size] for i in range(0, len(x), self.size)]
        self.copies = [copy.copy(self.norm) for _ in groups]  # with the same parameters and running averages
        return np.concatenate([norm.forward(group) for norm, group in zip(self.copies, groups, strict=True)])

    def backward(self, dy: Array, /) -> Array:
        groups = [dy[i : i + self.size] for i in range(0, len(dy), self.size)]
        dx = np.concatenate([norm.backward(group) for norm, group in zip(self.copies, groups, strict=True)])
        self.norm.weight_grad = np.sum([np.asarray(norm.weight_grad) for norm in self.copies], axis=0)
        self.norm.bias_grad = np.sum([np.asarray(norm.bias_grad) for norm in self.copies], axis=0)
        return dx
