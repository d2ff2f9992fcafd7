"""Batch normalization with running statistics as part of the convolution before it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from . import _check
from .errors import ShapeError

__all__ = ["fold_into_conv"]

Array = npt.NDArray[Any]


def fold_into_conv(
    weight: npt.ArrayLike,
    bias: npt.ArrayLike | None,
    running_mean: npt.ArrayLike,
    running_var: npt.ArrayLike,
    gamma: npt.ArrayLike | None = None,
    beta: npt.ArrayLike | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[Array, Array]:
    """Weight and bias of the one convolution that does what a convolution and batch normalization in inference do.

    ``weight' = weight * scale`` and ``bias' = beta + (bias - running_mean) * scale``, with ``scale = gamma /
    sqrt(running_var + eps)``: Algorithm 2 of the paper is linear, and so is a convolution.

    Parameters
    ----------
    weight : array_like of shape (C, ...)
        Of a convolution of any dimension, or of a linear layer: the output channels come first, as in PyTorch.
    bias : array_like of shape (C,) or None
        None is 0.
    running_mean, running_var : array_like of shape (C,)
    gamma, beta : array_like of shape (C,), optional
        None is 1 and 0.
    eps : float

    Returns
    -------
    weight, bias : ndarray of shape (C, ...) and (C,)
        New arrays of weight's dtype, computed in float64 and rounded once.

    Raises
    ------
    ShapeError, ArgumentError, DTypeError

    References
    ----------
    Ioffe and Szegedy 2015, arXiv:1502.03167, Algorithm 2, step 11.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.fold_into_conv([[2.0]], [1.0], running_mean=[3.0], running_var=[4.0], eps=0)
    (array([[1.]]), array([-1.]))
    """
    values = _check.array("weight", weight)
    _check.parameter_dtype(values.dtype, "weight")
    eps = _check.eps(eps, training=False)
    if values.ndim < 1:
        raise ShapeError(f"weight: expected shape (C, ...), got {values.shape}")
    channels = values.shape[0]

    def vector(name: str, value: npt.ArrayLike | None, default: float) -> Array:
        if value is None:
            return np.full(channels, default)
        return _check.parameter(name, value, channels, "weight").astype(np.float64)

    scale = vector("gamma", gamma, 1) / np.sqrt(vector("running_var", running_var, 1) + eps)
    shift = vector("beta", beta, 0) + (vector("bias", bias, 0) - vector("running_mean", running_mean, 0)) * scale
    folded = values * scale.reshape(-1, *(1,) * (values.ndim - 1))
    return folded.astype(values.dtype), shift.astype(values.dtype)
