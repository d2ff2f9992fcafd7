"""The networks of `fastbn.nn.models` in PyTorch, by the same names."""

import itertools
import math

import torch
from torch import nn
from torch.nn import functional


def norm(batch_norm, channels, kind=nn.BatchNorm2d, **options):
    return [kind(channels, **options)] if batch_norm else []


def block(batch_norm, inputs, filters, kernel, stride=1, padding=0, bias=True):
    convolution = nn.Conv2d(inputs, filters, kernel, stride, padding, bias=bias)
    return [convolution, *norm(batch_norm, filters), nn.ReLU()]


def cnn_bn(batch_norm, shape, classes):
    C, H, W = shape
    return nn.Sequential(
        *block(batch_norm, C, 16, 3, padding=1),
        nn.MaxPool2d(2),
        *block(batch_norm, 16, 32, 3, padding=1),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (H // 4) * (W // 4), classes),
    )


def keras_cnn(batch_norm, shape, classes):
    C, H, W = shape
    keras = {"eps": 1e-3, "momentum": 0.01}
    return nn.Sequential(
        nn.Conv2d(C, 32, 3),
        nn.ReLU(),
        *norm(batch_norm, 32, **keras),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        *norm(batch_norm, 64, **keras),
        nn.Flatten(),
        nn.Linear(64 * (H - 4) * (W - 4), classes),
    )


def keras_blocks(batch_norm, shape, classes):
    C, H, W = shape
    return nn.Sequential(
        *block(batch_norm, C, 32, 3, padding="same"),
        nn.MaxPool2d(2),
        *block(batch_norm, 32, 64, 3, padding="same"),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (H // 4) * (W // 4), 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


def cnn1d(batch_norm, shape, classes):
    C, H, W = shape
    return nn.Sequential(
        nn.Flatten(1, 2),
        nn.Conv1d(C * H, 32, 3, padding=1),
        *norm(batch_norm, 32, nn.BatchNorm1d),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * W, classes),
    )


def cnn2d(batch_norm, shape, classes):
    C, H, W = shape
    return nn.Sequential(*block(batch_norm, C, 32, 3, padding=1), nn.Flatten(), nn.Linear(32 * H * W, classes))


def mlp(activation, batch_norm, shape, classes):
    sizes = [math.prod(shape), 100, 100, 100]
    hidden = [
        layer
        for i, o in itertools.pairwise(sizes)
        for layer in (nn.Linear(i, o), *norm(batch_norm, o, nn.BatchNorm1d), activation())
    ]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(100, classes))


def mlp_sigmoid(*arguments):
    return mlp(nn.Sigmoid, *arguments)


def mlp_relu(*arguments):
    return mlp(nn.ReLU, *arguments)


class ResidualBlock(nn.Module):
    def __init__(self, batch_norm, inputs, filters, skip):
        super().__init__()
        self.stride, self.new, self.skip = 1 if inputs == filters else 2, filters - inputs, skip
        self.body = nn.Sequential(
            *block(batch_norm, inputs, filters, 3, self.stride, 1, bias=not batch_norm),
            nn.Conv2d(filters, filters, 3, padding=1, bias=not batch_norm),
            *norm(batch_norm, filters),
        )

    def forward(self, x):
        y = self.body(x)
        if self.skip:
            y = y + functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new))
        return functional.relu(y)


def resnet110(batch_norm, shape, classes, skips=True, depth=110):
    n = (depth - 2) // 6
    sizes = [16] + [16] * n + [32] * n + [64] * n
    blocks = [ResidualBlock(batch_norm, i, o, skips) for i, o in itertools.pairwise(sizes)]
    return nn.Sequential(
        *block(batch_norm, shape[0], 16, 3, padding=1, bias=not batch_norm),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, classes),
    )


class Module(nn.Module):
    """One row of the paper's figure 5."""

    def __init__(self, batch_norm, inputs, one, three, double, pool, projection):
        super().__init__()
        stride = 1 if one else 2

        def conv(i, o, kernel, stride=1):
            return block(batch_norm, i, o, kernel, stride, kernel // 2, bias=not batch_norm)

        pool = nn.AvgPool2d(3, stride, 1) if pool == "avg" else nn.MaxPool2d(3, stride, 1)
        self.branches = nn.ModuleList(
            [
                *([nn.Sequential(*conv(inputs, one, 1))] if one else []),
                nn.Sequential(*conv(inputs, three[0], 1), *conv(*three, 3, stride)),
                nn.Sequential(*conv(inputs, double[0], 1), *conv(*double, 3), *conv(double[1], double[1], 3, stride)),
                nn.Sequential(pool, *(conv(inputs, projection, 1) if projection else [])),
            ]
        )

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1)


def bn_inception(batch_norm, shape, classes):
    bias = not batch_norm
    return nn.Sequential(
        *block(batch_norm, shape[0], 64, 7, 2, 3, bias=bias),
        nn.MaxPool2d(3, 2, 1),
        *block(batch_norm, 64, 64, 1, bias=bias),
        *block(batch_norm, 64, 192, 3, padding=1, bias=bias),
        nn.MaxPool2d(3, 2, 1),
        Module(batch_norm, 192, 64, (64, 64), (64, 96), "avg", 32),
        Module(batch_norm, 256, 64, (64, 96), (64, 96), "avg", 64),
        Module(batch_norm, 320, 0, (128, 160), (64, 96), "max", 0),
        Module(batch_norm, 576, 224, (64, 96), (96, 128), "avg", 128),
        Module(batch_norm, 576, 192, (96, 128), (96, 128), "avg", 128),
        Module(batch_norm, 576, 160, (128, 160), (128, 160), "avg", 96),
        Module(batch_norm, 576, 96, (128, 192), (160, 192), "avg", 96),
        Module(batch_norm, 576, 0, (128, 192), (192, 256), "max", 0),
        Module(batch_norm, 1024, 352, (192, 320), (160, 224), "avg", 128),
        Module(batch_norm, 1024, 352, (192, 320), (192, 224), "max", 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(1024, classes),
    )


def bn_inception_small(batch_norm, shape, classes):
    return nn.Sequential(
        *block(batch_norm, shape[0], 48, 3, padding=1, bias=not batch_norm),
        nn.MaxPool2d(3, 2, 1),
        Module(batch_norm, 48, 16, (16, 16), (16, 24), "avg", 8),
        Module(batch_norm, 64, 16, (16, 24), (16, 24), "avg", 16),
        Module(batch_norm, 80, 0, (32, 40), (16, 24), "max", 0),
        Module(batch_norm, 144, 88, (48, 80), (40, 56), "avg", 32),
        Module(batch_norm, 256, 88, (48, 80), (48, 56), "max", 32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(256, classes),
    )
