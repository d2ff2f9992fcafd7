"""Batch normalization in plain NumPy, as one writes it without this library: what timings compare with."""

from __future__ import annotations

import numpy as np

from fastbn.nn.layers import Array, Layer


def numpy_forward(x: Array, gamma: Array, beta: Array, axes: tuple[int, ...], eps: float = 1e-5) -> Array:
    mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    return numpy_inference(x, gamma, beta, mean, var, eps)


def numpy_inference(x: Array, gamma: Array, beta: Array, mean: Array, var: Array, eps: float = 1e-5) -> Array:
    y: Array = (x - mean) * (gamma / np.sqrt(var + eps)) + beta
    return y


def numpy_backward(
    dy: Array, x: Array, gamma: Array, mean: Array, rstd: Array, axes: tuple[int, ...]
) -> tuple[Array, Array, Array]:
    count = x.size // gamma.size
    normalized = (x - mean) * rstd
    dbeta = dy.sum(axes, keepdims=True)
    dgamma = (dy * normalized).sum(axes, keepdims=True)
    dx: Array = (gamma * rstd) * (dy - dbeta / count - normalized * (dgamma / count))
    return dx, dgamma, dbeta


class PlainBatchNorm2d(Layer):
    """Batch normalization of images (N, C, H, W) with the statistics of the batch, forward and backward."""

    axes = (0, 2, 3)
    eps = 1e-5

    def __init__(self, num_features: int) -> None:
        self.weight = np.ones(num_features, np.float32)
        self.bias: Array = np.zeros(num_features, np.float32)

    def forward(self, x: Array, /) -> Array:
        self.x, self.mean = x, x.mean(self.axes, keepdims=True)
        var = x.var(self.axes, keepdims=True)
        self.rstd = 1 / np.sqrt(var + self.eps)
        return numpy_inference(x, self.weight[:, None, None], self.bias[:, None, None], self.mean, var, self.eps)

    def backward(self, dy: Array, /) -> Array:
        gamma = self.weight[:, None, None]
        dx, dgamma, dbeta = numpy_backward(dy, self.x, gamma, self.mean, self.rstd, self.axes)
        self.weight_grad, self.bias_grad = dgamma.ravel(), dbeta.ravel()
        return dx
