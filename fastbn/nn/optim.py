"""The optimizers, and schedules of their learning rate."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from fastbn.nn.layers import Array, LayerLike, State, copies, copy_into, gradients, parameters


class Optimizer(Protocol):
    """What the training loop and checkpoints ask of an optimizer."""

    lr: float

    def step(self) -> None: ...
    def state_dict(self) -> State: ...
    def load_state_dict(self, state: Mapping[str, Array], /) -> None: ...


class _WithState(ABC):
    """What optimizers share: their arrays, copied out and in."""

    @abstractmethod
    def _state(self) -> State:
        """Those that `step` changes besides the parameters, by name."""

    def state_dict(self) -> State:
        return copies(self._state())

    def load_state_dict(self, state: Mapping[str, Array], /) -> None:
        copy_into(self._state(), state)


class SGD(_WithState):
    """Gradient descent with momentum and weight decay, by PyTorch's rule.

    ``v = momentum * v + gradient + weight_decay * value`` and ``value -= lr * v``, in place, for all parameters.

    Parameters
    ----------
    model : layer
        After its `backward`, `step` changes its parameters and those of its ``layers``.
    lr : float
        The learning rate; may be set between steps.
    momentum, weight_decay : float
    """

    def __init__(self, model: LayerLike, lr: float, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        self.model, self.lr, self.momentum, self.weight_decay = model, lr, momentum, weight_decay
        self.velocities = [np.zeros_like(value) for value, _ in parameters(model)]

    def step(self) -> None:
        for velocity, (value, gradient) in zip(self.velocities, gradients(self.model), strict=True):
            velocity *= self.momentum
            velocity += gradient + self.weight_decay * value
            value -= self.lr * velocity

    def _state(self) -> State:
        return {f"velocity.{i}": velocity for i, velocity in enumerate(self.velocities)}


class Adam(_WithState):
    """Steps of about the size `lr`, whatever the size of the gradients.

    Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015, arXiv:1412.6980, algorithm 1; weight decay is
    added to the gradient, as in PyTorch.

    Parameters
    ----------
    model, lr, weight_decay
        As in `SGD`.
    betas : (float, float)
        Weights of the past in the averages of the gradient and of its square.
    eps : float
        Added to the root of the second.
    """

    def __init__(
        self,
        model: LayerLike,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.model, self.lr, self.betas, self.eps, self.weight_decay = model, lr, betas, eps, weight_decay
        self.steps = np.zeros((), np.int64)
        self.means = [np.zeros_like(value) for value, _ in parameters(model)]
        self.squares = [np.zeros_like(value) for value, _ in parameters(model)]

    def step(self) -> None:
        pairs = gradients(self.model)
        self.steps += 1
        beta1, beta2 = self.betas
        # The averages start at 0: they are divided by the weight that has come in so far.
        scale = self.lr / (1 - beta1 ** int(self.steps))
        root = math.sqrt(1 - beta2 ** int(self.steps))
        for mean, square, (value, gradient) in zip(self.means, self.squares, pairs, strict=True):
            gradient = gradient + self.weight_decay * value
            mean += (1 - beta1) * (gradient - mean)
            square += (1 - beta2) * (gradient * gradient - square)
            value -= scale * mean / (np.sqrt(square) / root + self.eps)

    def _state(self) -> State:
        averages = (("mean", self.means), ("square", self.squares))
        return {"steps": self.steps} | {f"{name}.{i}": x for name, arrays in averages for i, x in enumerate(arrays)}


# A schedule gives the factor of the learning rate after so many epochs, fractions included. It has no state, so
# resuming needs no more than the number of epochs.
Schedule = Callable[[float], float]


def constant(epochs: float) -> float:
    """Always 1."""
    return 1.0


def cosine(total: float) -> Schedule:
    """From 1 to 0 in `total` epochs, along half a cosine: Loshchilov and Hutter 2016, arXiv:1608.03983, equation 5."""
    return lambda epochs: (1 + math.cos(math.pi * min(epochs / total, 1.0))) / 2


def step_decay(every: float, factor: float = 0.1) -> Schedule:
    """Times `factor` after each `every` epochs."""
    return lambda epochs: factor ** (epochs // every)


OPTIMIZERS: dict[str, Callable[..., Any]] = {"sgd": SGD, "adam": Adam}
# By name, made for a number of epochs.
SCHEDULES: dict[str, Callable[[float], Schedule]] = {
    "constant": lambda total: constant,
    "cosine": cosine,
    "step": lambda total: step_decay(total / 3),
}
