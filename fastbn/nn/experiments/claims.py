"""The experiments: what each trains and measures with one seed, below the claim and the criteria that judge it.

Criteria come from the literature where it has a number, else from what the claim must mean to be worth making. All
were fixed before the published run.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import fastbn
from fastbn.nn import models
from fastbn.nn.conv import Conv2d
from fastbn.nn.data import Dataset
from fastbn.nn.experiments.common import Grouped, convolutions_of, final, halved, learn, steps_to, training
from fastbn.nn.experiments.protocol import Criterion, Experiment, Panel, Result
from fastbn.nn.inference import evaluate, fold, recalibrate
from fastbn.nn.layers import Flatten, Linear, ReLU, Sequential, Sigmoid
from fastbn.nn.loss import softmax_cross_entropy
from fastbn.nn.plain import PlainBatchNorm2d
from fastbn.nn.pooling import MaxPool2d

IOFFE = "Ioffe and Szegedy 2015, arXiv:1502.03167"
BJORCK = "Bjorck et al. 2018, arXiv:1806.02375"
WU = "Wu and Johnson 2021, arXiv:2105.07576"

STEPS = ("training steps", "test accuracy")
BATCH_NORM = {"with BN": True, "without BN": False}
MLP = {"images": 10_000, "test_images": 2_000, "batch_size": 60}
CNN = {"images": 2_000, "test_images": 2_000, "batch_size": 64, "momentum": 0.9, "schedule": "cosine"}

EXPERIMENTS: dict[str, Experiment] = {}


def experiment(**description: Any) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Put the decorated function into `EXPERIMENTS`."""

    def add(measure: Callable[..., Result]) -> Callable[..., Result]:
        EXPERIMENTS[measure.__name__] = Experiment(measure=measure, **description)
        return measure

    return add


@experiment(
    title="Fewer steps",
    claim="With batch normalization the same accuracy takes many times fewer training steps.",
    source=f"{IOFFE}, sections 4.1 and 4.2.2",
    criteria=[
        Criterion("equal", "steps without BN / steps with BN, equal learning rate", ">=", 5),
        Criterion("best", "the same, each at its best learning rate", ">=", 3),
    ],
    panels=[Panel("Equal learning rate", *STEPS), Panel("Each at its best learning rate", *STEPS)],
    setting=MLP | {"steps": 2000, "points": 80, "target": 0.8, "equal_lr": 0.5, "lrs": [0.5, 1, 2]},
    quick={"images": 1400, "steps": 1000, "points": 40, "target": 0.9, "lrs": [0.5, 1]},
)
def fewer_steps(
    data: Dataset, seed: int, *, equal_lr: float, lrs: Sequence[float], target: float, **options: Any
) -> Result:
    """The network of the paper's figure 1, three hidden layers of 100 sigmoid units with normal initial weights of
    standard deviation 0.1, is trained by plain gradient descent with several learning rates. What counts are the steps
    to the target accuracy; a network that never gets there counts with all its steps."""
    equal, best = {}, {}
    for label, batch_norm in BATCH_NORM.items():
        curves = {}
        for lr in lrs:
            model = models.mlp_sigmoid(batch_norm, input_shape=data.input_shape, rng=seed)
            curves[lr] = learn(model, data, seed, lr=lr, **options)
        fastest = min(lrs, key=lambda lr: steps_to(target, curves[lr]))
        equal[label] = curves[equal_lr]
        best[label] = curves[fastest]
    values = {
        name: steps_to(target, curves["without BN"]) / steps_to(target, curves["with BN"])
        for name, curves in (("equal", equal), ("best", best))
    }
    return Result(values, [equal, best])


@experiment(
    title="Higher learning rates",
    claim="Batch normalization allows learning rates 5 and 30 times as high; without it they make training diverge.",
    source=f"{IOFFE}, section 4.2.2 (BN-Baseline, BN-x5, BN-x30)",
    criteria=[
        Criterion("x5", "with BN, best accuracy of all rates less that at rate x5, points", "<=", 1),
        Criterion("x30", "the same at rate x30, points", "<=", 1),
        Criterion("x5_without", "without BN at rate x5, accuracy, percent", "<=", 20),
        Criterion("x30_without", "without BN at rate x30, accuracy, percent", "<=", 20),
    ],
    panels=[Panel("With BN", *STEPS), Panel("Without BN", *STEPS)],
    setting=CNN
    | {"images": 4_000, "test_images": 1_000, "batch_size": 32, "steps": 240, "points": 8, "lr": 0.01}
    | {"factors": [1, 5, 30]},
    quick={"images": 300, "test_images": 100, "steps": 10, "points": 2},
)
def learning_rate(data: Dataset, seed: int, *, lr: float, factors: Sequence[float], **options: Any) -> Result:
    """Five modules of the paper's Inception network, with a quarter of the filters (`bn_inception_small`), learn from
    images of half the size with the initial weights of He et al. 2015, at a learning rate that suits them without batch
    normalization, and at 5 and 30 times that. In the paper, too, x30 needed more steps than x5 to the accuracy of the
    network without BN (2.7 against 2.1 million), and became the best in the end."""
    data = halved(data)
    curves: dict[str, dict[str, Any]] = {}
    for label, batch_norm in BATCH_NORM.items():
        curves[label] = {}
        for factor in factors:
            model = models.bn_inception_small(batch_norm, input_shape=data.input_shape, rng=seed)
            convolutions_of(model, seed, lambda inputs, outputs: 2 / inputs)
            curves[label][f"x{factor}"] = learn(model, data, seed, lr=lr * factor, **options)
    with_bn, without = ({name: 100 * final(curve) for name, curve in curves[label].items()} for label in BATCH_NORM)
    values = {
        "x5": max(with_bn.values()) - with_bn["x5"],
        "x30": max(with_bn.values()) - with_bn["x30"],
        "x5_without": without["x5"],
        "x30_without": without["x30"],
    }
    return Result(values, list(curves.values()))


@experiment(
    title="Sigmoids become trainable",
    claim="Batch normalization makes networks of saturating nonlinearities trainable; without it they stay at chance.",
    source=f"{IOFFE}, section 4.2.2 (BN-x5-Sigmoid)",
    criteria=[
        Criterion("shallow", "3 hidden layers, learning rate 0.05: accuracy with BN less without, points", ">=", 50),
        Criterion("deep", "6 hidden layers, each at its best learning rate: the same", ">=", 50),
    ],
    panels=[Panel("3 hidden layers, learning rate 0.05", *STEPS), Panel("6 hidden layers, best learning rate", *STEPS)],
    setting=MLP | {"steps": 1500, "points": 15, "lrs": [0.05, 0.5, 2]},
    quick={"images": 1400, "steps": 500, "points": 10},
)
def sigmoid(data: Dataset, seed: int, *, lrs: Sequence[float], **options: Any) -> Result:
    """Sigmoid networks as above with 3 and with 6 hidden layers are trained by plain gradient descent. The paper found
    that an Inception network with sigmoids never gets beyond chance without batch normalization. Three layers are few:
    without BN they are slow rather than untrainable."""
    shallow, deep = {}, {}
    for label, batch_norm in BATCH_NORM.items():
        curves = {}
        for depth, lr in [(3, lrs[0]), *((6, lr) for lr in lrs)]:
            model = models.mlp_sigmoid(batch_norm, input_shape=data.input_shape, rng=seed, depth=depth)
            curves[depth, lr] = learn(model, data, seed, lr=lr, **options)
        shallow[label] = curves[3, lrs[0]]
        deep[label] = max((curves[6, lr] for lr in lrs), key=final)
    gaps = [100 * (final(curves["with BN"]) - final(curves["without BN"])) for curves in (shallow, deep)]
    return Result({"shallow": gaps[0], "deep": gaps[1]}, [shallow, deep])


@experiment(
    title="Initial weights",
    claim="With batch normalization training depends little on the size of the initial weights.",
    source=f"{IOFFE}, section 1; the range of 1 to 5,000 is ours",
    criteria=[
        Criterion("drop", "with BN, best accuracy of all sizes less the worst, points", "<=", 10),
        Criterion("failures", "without BN, sizes (of 5) that end at 20 percent or below", ">=", 3),
    ],
    panels=[Panel("After the training", "standard deviation of the initial weights", "test accuracy", log="x")],
    setting=MLP | {"steps": 1000, "lr": 0.1, "stds": [0.001, 0.01, 0.1, 1, 5]},
    quick={"images": 1400, "steps": 300},
)
def initial_weights(data: Dataset, seed: int, *, stds: Sequence[float], **options: Any) -> Result:
    """Three hidden layers of 100 relu units, with normal initial weights of several sizes, are trained by plain
    gradient descent with the same learning rate. With BN the size of the weights has no effect on the output, but their
    gradient is inversely proportional to it (section 3.3 of the paper): large weights move slowly."""
    accuracy = {}
    for label, batch_norm in BATCH_NORM.items():
        networks = [models.mlp_relu(batch_norm, input_shape=data.input_shape, rng=seed, std=std) for std in stds]
        accuracy[label] = [final(learn(model, data, seed, points=1, **options)) for model in networks]
    drop = 100 * (max(accuracy["with BN"]) - min(accuracy["with BN"]))
    failures = sum(value <= 0.2 for value in accuracy["without BN"])
    return Result({"drop": drop, "failures": failures}, [{label: (stds, y) for label, y in accuracy.items()}])


@experiment(
    title="Stable distributions",
    claim="Batch normalization keeps the distribution of a layer's inputs stable during training.",
    source=f"{IOFFE}, figure 1 (b, c)",
    criteria=[
        Criterion("with", "width of the 15 to 85 % band of a unit's input, widest / narrowest, with BN", "<=", 3),
        Criterion("without", "the same without BN", ">=", 10),
    ],
    panels=[
        Panel("With BN", "training steps", "input of one sigmoid, last hidden layer"),
        Panel("Without BN", "training steps", "input of one sigmoid, last hidden layer"),
    ],
    setting=MLP | {"steps": 2400, "points": 30, "lr": 0.5},
    quick={"images": 1400, "steps": 500, "points": 10},
)
def distribution(data: Dataset, seed: int, *, steps: int, points: int, **options: Any) -> Result:
    """The 15th, 50th and 85th percentiles, over a batch, of what enters each sigmoid of the last hidden layer are taken
    during training: the picture has one unit, the criterion the median over the units. It is a fact about batch
    normalization, but maybe not why it helps: Santurkar et al. 2018, arXiv:1805.11604, add noise behind it that makes
    the distributions less stable than without it, and training stays as fast."""
    at = range(0, steps, steps // points)
    values, panels = {}, []
    for label, batch_norm in BATCH_NORM.items():
        model = models.mlp_sigmoid(batch_norm, input_shape=data.input_shape, rng=seed)
        last = [layer for layer in model.layers if isinstance(layer, Sigmoid)][-1]
        percentiles = []
        for _ in itertools.islice(training(model, data, seed, **options), at.start, at.stop, at.step):
            y = np.clip(last.y.astype(np.float64), 1e-15, 1 - 1e-15)
            percentiles.append(np.percentile(np.log(y / (1 - y)), [15, 50, 85], axis=0))  # (3, units)
        low, middle, high = np.moveaxis(np.array(percentiles), 1, 0)  # (points, units) each
        width = np.median(high - low, axis=1)
        values[label.split()[0]] = width.max() / width.min()
        panels.append({"85 %": (at, high[:, 0]), "50 %": (at, middle[:, 0]), "15 %": (at, low[:, 0])})
    return Result(values, panels)


@experiment(
    title="Gradients at initialization",
    claim="Batch normalization keeps gradients of very deep networks small and alike; without it they explode.",
    source=f"{BJORCK}, section 3 and figure 5",
    criteria=[
        Criterion("ratio", "residual network, layer 55: std of the gradient without BN / with BN", ">=", 100),
        Criterion("spread", "residual network with BN: largest / smallest std of all layers", "<=", 30),
        Criterion("kurtosis", "kurtosis at layer 55 with BN (a normal distribution has 3)", "<=", 6),
        Criterion("kurtosis_without", "the same without BN", ">=", 10),
        Criterion("plain", "the limit, same network without skips, with BN: std at layer 2 / at layer 108", "<=", 30),
    ],
    panels=[
        Panel("Residual network, 110 layers", "layer", "std of the gradient of the weights", log="y"),
        Panel("The same without skips", "layer", "std of the gradient of the weights", log="y"),
        Panel("Layer 55, residual network", "gradient / its std", "density", log="y"),
    ],
    setting={"images": 32, "test_images": 1, "depth": 110},
    quick={"images": 8},
)
def gradients(data: Dataset, seed: int, *, depth: int) -> Result:
    """One batch goes forward and backward through a network of 110 layers with the initial weights of Glorot and Bengio
    2010, and the gradients of the weights of each convolution are taken. Skips matter: in a network without them, batch
    normalization itself makes gradients grow with every layer on the way back (Yang et al. 2019, arXiv:1902.08129)."""
    deviations: dict[bool, dict[str, Any]] = {True: {}, False: {}}
    histograms, kurtosis = {}, {}
    bins = np.linspace(-8, 8, 41)
    for skips in (True, False):
        for label, batch_norm in BATCH_NORM.items():
            model = models.resnet110(batch_norm, input_shape=data.input_shape, rng=seed, depth=depth, skips=skips)
            convolutions = convolutions_of(model, seed, lambda inputs, outputs: 2 / (inputs + outputs))
            _, dlogits = softmax_cross_entropy(model.forward(data.x_train), data.y_train)
            model.backward(dlogits)
            std = [float(layer.weight_grad.std(dtype=np.float64)) for layer in convolutions]
            deviations[skips][label] = (range(1, len(std) + 1), std)
            if skips:
                middle = np.float64(convolutions[depth // 2 - 1].weight_grad.ravel())
                middle = (middle - middle.mean()) / middle.std()
                density, _ = np.histogram(middle, bins, density=True)
                histograms[label] = ((bins[1:] + bins[:-1]) / 2, np.where(density > 0, density, np.nan))
                kurtosis[label] = (middle**4).mean()
    residual, plain = ({label: curve[1] for label, curve in deviations[skips].items()} for skips in (True, False))
    values = {
        "ratio": residual["without BN"][depth // 2 - 1] / residual["with BN"][depth // 2 - 1],
        "spread": max(residual["with BN"]) / min(residual["with BN"]),
        "kurtosis": kurtosis["with BN"],
        "kurtosis_without": kurtosis["without BN"],
        "plain": plain["with BN"][1] / plain["with BN"][depth - 3],
    }
    return Result(values, [deviations[True], deviations[False], histograms])


@experiment(
    title="Few images",
    claim="Batch normalization regularizes: it reduces overfitting.",
    source=f"{IOFFE}, section 3.4; {BJORCK}, figure 1",
    criteria=[
        Criterion("best", "accuracy with BN less without, each at its best learning rate, points", ">=", 0),
        Criterion("small", "the same at the smallest learning rate, equal for both", ">=", 0),
        Criterion("gap", "train less test accuracy, best learning rates, without BN less with BN, points", ">=", 0),
    ],
    panels=[
        Panel("After the training", "learning rate", "test accuracy", log="x"),
        Panel("After the training", "learning rate", "train less test accuracy", log="x"),
    ],
    setting=CNN | {"images": 300, "batch_size": 32, "steps": 200, "lrs": [0.001, 0.003, 0.01, 0.03, 0.1]},
    quick={"images": 100, "steps": 20, "lrs": [0.01, 0.03]},
)
def few_images(data: Dataset, seed: int, *, lrs: Sequence[float], **options: Any) -> Result:
    """Two convolutions and a linear layer (`cnn_bn`) learn from few images with several learning rates. At an equal
    small rate Bjorck et al. found no gain, at the best rates a clear one."""
    accuracy: dict[str, list[float]] = {}
    gap: dict[str, list[float]] = {}
    for label, batch_norm in BATCH_NORM.items():
        accuracy[label], gap[label] = [], []
        for lr in lrs:
            model = models.cnn_bn(batch_norm, input_shape=data.input_shape, rng=seed)
            accuracy[label].append(final(learn(model, data, seed, lr=lr, points=1, **options)))
            gap[label].append(evaluate(model, data.x_train, data.y_train) - accuracy[label][-1])
    best = {label: int(np.argmax(values)) for label, values in accuracy.items()}

    def difference(of: dict[str, list[float]], at: dict[str, int]) -> float:
        return 100 * (of["with BN"][at["with BN"]] - of["without BN"][at["without BN"]])

    values = {
        "best": difference(accuracy, best),
        "small": difference(accuracy, dict.fromkeys(BATCH_NORM, 0)),
        "gap": -difference(gap, best),
    }
    return Result(values, [{label: (lrs, y) for label, y in panel.items()} for panel in (accuracy, gap)])


@experiment(
    title="Training and inference agree",
    claim="In inference batch normalization is a fixed affine map: running averages stand for the statistics of the "
    "training images, and the map can be folded into the convolution before it.",
    source=f"{IOFFE}, section 3.1; {WU}, section 3",
    criteria=[
        Criterion("running", "accuracy with all images' statistics less with running averages, points", "<=", 1),
        Criterion("recalibrated", "the same with those of 1,000 images, larger or smaller", "<=", 0.2),
        Criterion("folded", "folded network: largest difference of an output / largest output", "<=", 1e-5),
        Criterion("lag", "running mean after k batches: its distance from the mean, less 0.9^k", "<=", 0.05),
        Criterion("alone", "values of the first normalization that differ for an image alone and in a batch", "<=", 0),
    ],
    panels=[
        Panel("Running averages begun anew", "batches", "test accuracy"),
        Panel("First layer", "batches", "distance from the mean / the mean", log="y"),
    ],
    setting=CNN | {"images": 5_000, "steps": 240, "lr": 0.02, "batches": 40, "recalibration": 1000},
    quick={"images": 600, "steps": 60, "batches": 20, "recalibration": 300},
)
def inference(data: Dataset, seed: int, *, batch_size: int, batches: int, recalibration: int, **options: Any) -> Result:
    """`cnn_bn` is trained, and its accuracy is taken with the running averages of training, with statistics of part of
    the images and of all, and with each normalization folded into its convolution. The first normalization is given a
    batch and then its images one by one. Then the running averages begin anew, with weights that stay as they are:
    after k batches they lack 0.9^k of the mean."""
    model = models.cnn_bn(input_shape=data.input_shape, rng=seed)
    accuracy = {"running averages": final(learn(model, data, seed, batch_size=batch_size, points=1, **options))}
    recalibrate(model, data.x_train[:recalibration])
    accuracy["some images"] = evaluate(model, data.x_test, data.y_test)
    recalibrate(model, data.x_train)
    accuracy["all images"] = evaluate(model, data.x_test, data.y_test)

    outputs = model.forward(data.x_test)
    difference = fold(model).forward(data.x_test) - outputs

    norms = [layer for layer in model.layers if isinstance(layer, fastbn.BatchNorm2d)]
    maps = model.layers[0].forward(data.x_test[:batch_size])
    alone = np.concatenate([norms[0].forward(maps[i : i + 1]) for i in range(len(maps))])
    differing = np.count_nonzero(alone != norms[0].forward(maps))
    running_mean = np.asarray(norms[0].running_mean)  # the array itself
    mean = running_mean.copy()
    for norm in norms:
        norm.reset_running_stats()
    rng, renewed, distance = np.random.default_rng(seed), [], []
    for _ in range(batches):
        model.train()
        model.forward(rng.choice(data.x_train, batch_size, replace=False))
        distance.append(np.linalg.norm(running_mean - mean) / np.linalg.norm(mean))
        renewed.append(evaluate(model, data.x_test, data.y_test))
    at = range(1, batches + 1)
    missing = [0.9**k for k in at]
    values = {
        "running": 100 * (accuracy["all images"] - accuracy["running averages"]),
        "recalibrated": 100 * abs(accuracy["all images"] - accuracy["some images"]),
        "folded": np.abs(difference).max() / np.abs(outputs).max(),
        "lag": float(np.max(np.subtract(distance, missing))),
        "alone": differing,
    }
    flat = {
        f"statistics of {name}": (at, [value] * batches) for name, value in accuracy.items() if name != "some images"
    }
    return Result(values, [{"begun anew": (at, renewed), **flat}, {"measured": (at, distance), "0.9^k": (at, missing)}])


@experiment(
    title="Batch size",
    claim="The accuracy hardly depends on how many images are normalized together, unless they are very few.",
    source=f"{WU}, section 3.3: error in percent 23.2 to 23.7 for 16 to 1,024, 24.3 at 8, 26.4 at 4, 32.5 at 2",
    criteria=[
        Criterion("flat", "best less worst accuracy for 16 to 256 images, points", "<=", 1),
        Criterion("small", "accuracy for 32 images less that for 2, points", ">=", 2),
        Criterion("recalibrated", "the same with the statistics of all images, points", ">=", 2),
    ],
    panels=[Panel("After the training", "images normalized together", "test accuracy", log="x")],
    setting=CNN
    | {"images": 4_000, "batch_size": 256, "steps": 120, "lr": 0.05, "sizes": [2, 4, 8, 16, 32, 64, 128, 256]},
    quick={"images": 512, "steps": 4, "sizes": [2, 16, 32, 256]},
)
def batch_size(data: Dataset, seed: int, *, sizes: Sequence[int], **options: Any) -> Result:
    """`cnn_bn` is trained on images of half the size. All steps have the same batches, but each group of some images is
    normalized by itself, so nothing else changes with their number. Accuracy is taken with the running averages, and
    with the statistics of all training images instead. Few images are not few values: those of all pixels are
    normalized together, 392 for 2 images in the first layer here; ResNet-50, in the source, ends with 7 x 7 pixels."""
    data = halved(data)
    accuracy: dict[str, list[float]] = {"running averages": [], "statistics of all images": []}
    for size in sizes:
        model = models.cnn_bn(input_shape=data.input_shape, rng=seed)
        model.layers = tuple(
            Grouped(layer, size) if isinstance(layer, fastbn.BatchNorm2d) else layer for layer in model.layers
        )
        accuracy["running averages"].append(final(learn(model, data, seed, points=1, **options)))
        recalibrate(model, data.x_train)
        accuracy["statistics of all images"].append(evaluate(model, data.x_test, data.y_test))
    running, recalibrated = (dict(zip(sizes, 100 * np.array(values), strict=True)) for values in accuracy.values())
    usual = [running[size] for size in sizes if size >= 16]
    values = {
        "flat": max(usual) - min(usual),
        "small": running[32] - running[2],
        "recalibrated": recalibrated[32] - recalibrated[2],
    }
    return Result(values, [{label: (sizes, y) for label, y in accuracy.items()}])


@experiment(
    title="Before or after the activation",
    claim="Batch normalization belongs before the activation, as in its paper, or behind it, as in Keras's examples: "
    "the articles disagree.",
    source=f"{IOFFE}, section 3.2",
    criteria=[
        Criterion("before", "accuracy with BN before relu less that with BN behind it, points", ">=", 0),
        Criterion("matters", "the same, larger or smaller", "<=", 1),
    ],
    panels=[Panel("Two convolutions", *STEPS)],
    setting=CNN | {"images": 4_000, "steps": 240, "points": 8, "lr": 0.02},
    quick={"images": 600, "steps": 30, "points": 3},
)
def order(data: Dataset, seed: int, *, lr: float, **options: Any) -> Result:
    """Two blocks of convolution, BN, relu and pooling, and a linear layer, are trained with BN before relu, behind it,
    and without."""
    C, H, W = data.input_shape
    orders: dict[str, Callable[[int], Sequence[Any]]] = {
        "BN, relu": lambda channels: (fastbn.BatchNorm2d(channels), ReLU()),
        "relu, BN": lambda channels: (ReLU(), fastbn.BatchNorm2d(channels)),
        "relu": lambda channels: (ReLU(),),
    }
    curves = {}
    for label, middle in orders.items():
        rng = np.random.default_rng(seed)
        model = Sequential(
            *(Conv2d(C, 16, 3, padding=1, rng=rng), *middle(16), MaxPool2d(2)),
            *(Conv2d(16, 32, 3, padding=1, rng=rng), *middle(32), MaxPool2d(2)),
            *(Flatten(), Linear(32 * (H // 4) * (W // 4), 10, rng=rng)),
        )
        curves[label] = learn(model, data, seed, lr=lr, **options)
    difference = 100 * (final(curves["BN, relu"]) - final(curves["relu, BN"]))
    return Result({"before": difference, "matters": abs(difference)}, [curves])


@experiment(
    title="Cost",
    claim="Batch normalization takes a large part of the time of a training step.",
    source="oneDNN issue 92: up to 30 % of the time of ResNet-50",
    criteria=[
        Criterion("fastbn", "not with this library: share of BN in a step, percent", "<=", 30, "oneDNN issue 92"),
        Criterion("numpy", "in plain NumPy: share of BN in a step, percent", ">=", 30, "oneDNN issue 92"),
    ],
    panels=[Panel("Two convolutions", "images in a batch", "share of BN in a training step", log="x")],
    setting={"images": 128, "test_images": 1, "repeats": 21, "sizes": [16, 32, 64, 128]},
    quick={"repeats": 3, "sizes": [32, 64]},
)
def cost(data: Dataset, seed: int, *, repeats: int, sizes: Sequence[int]) -> Result:
    """Training steps of `cnn_bn` are timed with the BN of this library, with BN in plain NumPy, and without, taking
    turns; the time of BN is what a step takes longer than one without (less than none where BN computes relu, too,
    which without it is a pass of its own). Medians; the criteria are about the largest batch."""
    networks = {
        "fastbn": models.cnn_bn(True, input_shape=data.input_shape, rng=seed),
        "plain NumPy": models.cnn_bn(True, input_shape=data.input_shape, rng=seed),
        "none": models.cnn_bn(False, input_shape=data.input_shape, rng=seed),
    }
    plain: list[Any] = []
    for layer in networks["plain NumPy"].layers:
        if isinstance(layer, fastbn.BatchNorm2d):  # relu is part of it
            plain += [PlainBatchNorm2d(layer.num_features), ReLU()]
        else:
            plain.append(layer)
    networks["plain NumPy"] = Sequential(*plain)
    shares: dict[str, list[float]] = {"fastbn": [], "plain NumPy": []}
    for size in sizes:
        batch = Dataset(data.x_train[:size], data.y_train[:size], data.x_test, data.y_test)
        runs = {name: training(model, batch, seed, lr=0.01, batch_size=size) for name, model in networks.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(repeats):
            for name, run in runs.items():
                start = time.perf_counter()
                next(run)
                times[name].append(time.perf_counter() - start)
        seconds = {name: statistics.median(values) for name, values in times.items()}
        for name, share in shares.items():
            share.append(1 - seconds["none"] / seconds[name])
    values = {"fastbn": 100 * shares["fastbn"][-1], "numpy": 100 * shares["plain NumPy"][-1]}
    return Result(values, [{name: (sizes, share) for name, share in shares.items()}])
