"""The loss of a classifier."""

from __future__ import annotations

import numpy as np

from fastbn.nn.layers import Array


def one_for_each(labels: Array, count: int) -> None:
    """ValueError or TypeError unless they are so many integers."""
    if labels.shape != (count,):
        raise ValueError(f"labels: expected shape ({count},), got {labels.shape}")
    if labels.dtype.kind not in "iu":
        raise TypeError(f"labels: expected integers, got {labels.dtype}")


def softmax_cross_entropy(logits: Array, labels: Array) -> tuple[float, Array]:
    """Mean cross-entropy of ``softmax(logits)``, and its gradient.

    Parameters
    ----------
    logits : ndarray of shape (N, classes)
    labels : integer ndarray of shape (N,)

    Returns
    -------
    loss : float
    dlogits : ndarray of shape (N, classes)

    Raises
    ------
    ValueError, TypeError
        If `labels` are not one class for each row of `logits`.
    """
    one_for_each(labels, len(logits))
    if len(labels) and not 0 <= labels.min() <= labels.max() < logits.shape[1]:
        raise ValueError(
            f"labels: expected 0 to {logits.shape[1] - 1} for logits of shape {logits.shape}, got {labels.min()} to "
            f"{labels.max()}"
        )
    rows = np.arange(len(labels))
    shifted = logits - logits.max(axis=1, keepdims=True)  # exp of it cannot overflow
    exp = np.exp(shifted)
    total = exp.sum(axis=1, keepdims=True)
    loss = float((np.log(total[:, 0]) - shifted[rows, labels]).mean())
    dlogits = exp / total
    dlogits[rows, labels] -= 1
    return loss, dlogits / len(labels)
