"""The optimizer: stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fastbn.nn.layers import Array, LayerLike, State, copy_into, parameters


class SGD:
    """Gradient descent with momentum and weight decay, by PyTorch's rule.

    ``v = momentum * v + gradient + weight_decay * value`` and ``value -= lr * v``, in place, for all parameters.
    """

    def __init__(self, model: LayerLike, lr: float, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        self.model, self.lr, self.momentum, self.weight_decay = model, lr, momentum, weight_decay
        self.velocities = [np.zeros_like(value) for value, _ in parameters(model)]

    def step(self) -> None:
        for velocity, (value, gradient) in zip(self.velocities, parameters(self.model), strict=True):
            velocity *= self.momentum
            velocity += gradient + self.weight_decay * value
            value -= self.lr * velocity

    def state_dict(self) -> State:
        return {f"velocity.{i}": velocity for i, velocity in enumerate(self.velocities)}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        copy_into(self.state_dict(), state)
