"""The loss of a classifier."""

from __future__ import annotations

import numpy as np

from fastbn.nn.layers import Array


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
    """
    rows = np.arange(len(labels))
    shifted = logits - logits.max(axis=1, keepdims=True)  # exp of it cannot overflow
    exp = np.exp(shifted)
    total = exp.sum(axis=1, keepdims=True)
    loss = float((np.log(total[:, 0]) - shifted[rows, labels]).mean())
    dlogits = exp / total
    dlogits[rows, labels] -= 1
    return loss, dlogits / len(labels)
