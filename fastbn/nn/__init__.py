"""A minimal trainer of convolutional networks, and an example of how to use fastbn.

Layers, networks and optimizers need NumPy alone. What `fit`, data sets, checkpoints and pictures need is imported where
it is used, from the extra ``fastbn[train]``.
"""

from fastbn.nn.checkpoint import CheckpointError
from fastbn.nn.conv import Conv1d, Conv2d
from fastbn.nn.data import DataError, Dataset, augment, load, load_cifar10, load_digits, load_idx
from fastbn.nn.inference import evaluate, fold, predict, recalibrate
from fastbn.nn.layers import (
    AddReLU,
    Columns,
    Concat,
    Dropout,
    Flatten,
    Layer,
    Linear,
    ReLU,
    Residual,
    Sequential,
    Sigmoid,
    Subsample,
    parameters,
    walk,
)
from fastbn.nn.loss import softmax_cross_entropy
from fastbn.nn.models import MODELS, digits_cnn
from fastbn.nn.optim import SGD, Adam, constant, cosine, step_decay
from fastbn.nn.plot import plot_histories, plot_mistakes
from fastbn.nn.pooling import AvgPool2d, GlobalAvgPool2d, MaxPool2d
from fastbn.nn.threads import threads
from fastbn.nn.train import fit

__all__ = [
    "MODELS",
    "SGD",
    "Adam",
    "AddReLU",
    "AvgPool2d",
    "CheckpointError",
    "Columns",
    "Concat",
    "Conv1d",
    "Conv2d",
    "DataError",
    "Dataset",
    "Dropout",
    "Flatten",
    "GlobalAvgPool2d",
    "Layer",
    "Linear",
    "MaxPool2d",
    "ReLU",
    "Residual",
    "Sequential",
    "Sigmoid",
    "Subsample",
    "augment",
    "constant",
    "cosine",
    "digits_cnn",
    "evaluate",
    "fit",
    "fold",
    "load",
    "load_cifar10",
    "load_digits",
    "load_idx",
    "parameters",
    "plot_histories",
    "plot_mistakes",
    "predict",
    "recalibrate",
    "softmax_cross_entropy",
    "step_decay",
    "threads",
    "walk",
]
