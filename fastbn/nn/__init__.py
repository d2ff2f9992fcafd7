"""A minimal trainer of convolutional networks, and an example of how to use fastbn.

It needs NumPy alone; what reads data, saves and draws is imported where it is used, from the extra ``fastbn[train]``.
"""

from fastbn.nn.checkpoint import CheckpointError
from fastbn.nn.data import Dataset, load_digits
from fastbn.nn.layers import Conv2d, Flatten, Layer, Linear, MaxPool2d, ReLU, Sequential, parameters
from fastbn.nn.loss import softmax_cross_entropy
from fastbn.nn.models import digits_cnn
from fastbn.nn.optim import SGD
from fastbn.nn.plot import plot_histories
from fastbn.nn.train import evaluate, fit

__all__ = [
    "SGD",
    "CheckpointError",
    "Conv2d",
    "Dataset",
    "Flatten",
    "Layer",
    "Linear",
    "MaxPool2d",
    "ReLU",
    "Sequential",
    "digits_cnn",
    "evaluate",
    "fit",
    "load_digits",
    "parameters",
    "plot_histories",
    "softmax_cross_entropy",
]
