"""Thousands of small problems whose results are known exactly, over all that a call can differ in.

The data are built so that no step of the definition rounds, in any order of summation and in every dtype: mean,
variance, rstd, y, the running statistics, dgamma, dbeta and, where the activation passes all values, dx are numbers of
a few bits. They have to come out bit for bit. Where the definition itself rounds (the constant 1/6 of hardsigmoid and
hardswish; the mean of a gradient that relu has thinned out, over a count that is no power of two) tolerances.py says
how much. The idea is oneDNN's, tests/benchdnn/bnorm.

A case is one value for each axis of AXES. For each shape the values of every axis are dealt out evenly, in an order of
their own; the first test sees to it that any two values of two axes have met. To repeat a case that failed:

    pytest tests/test_exact.py -k 3x2x17     (the message names the case, check(Problem(...), Case(...)) repeats it)
"""

import itertools
import math
import random
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest

import fastbn
from combinations import ACTIVATIONS, DTYPES, ISAS, LONG
from problems import MEMORY_ORDERS, SHAPES, assert_same_bits, dtype_of, shape_id
from tolerances import STEEPEST, activation_atol, dx_addends, dx_atol, gradient_rounding, storing, sum_atol

CASES = 120  # of a shape in a round
ROUNDS = 17 if LONG else 1  # each with other data and other cases

# Around the widths of vectors, in the innermost run of either family, and around blocks of either.
RUNS = (1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)
EXACT_SHAPES = [shape for shape in SHAPES if math.prod(shape) > shape[1]]
EXACT_SHAPES += [(3, 2, run) for run in RUNS] + [(5, channels) for channels in RUNS]
EXACT_SHAPES += [(1, 2, 16383), (1, 2, 16385), (1, 1, 1025), (511, 3), (513, 2), (65, 64), (2, 129, 2, 3, 1)]

# The slope 1/4 rounds nothing.
EXACT_SLOPE = {name: ("leaky_relu", 0.25) if name == "leaky_relu" else name for name in ACTIVATIONS}
ROUNDING = ("hardsigmoid", "hardswish")  # their constants are no numbers of a few bits
# Whose memory order a result can have: the others are copied first.
IN_PLACE = ("c-order", "channels-last", "every-other-channel", "every-other-value", "reversed")

AXES: dict[str, tuple[Any, ...]] = {
    "order": tuple(MEMORY_ORDERS),
    "dtype": tuple(map(str, DTYPES)),
    "activation": ACTIVATIONS,
    "residual": (False, True),
    "memory": ("fresh", "out", "in place"),
    "direction": ("training", "inference", "backward", "backward of inference"),
    "isa": ISAS,
    "threads": (1, 2, 3, 7),
}


class Case(NamedTuple):
    order: str
    dtype: str
    activation: str
    residual: bool
    memory: str
    direction: str
    isa: str
    threads: int


def legal(order: str, memory: str) -> bool:
    return memory != "in place" or order in IN_PLACE


def cases(shape: tuple[int, ...], round_: int) -> Iterator[Case]:
    drawn = random.Random(f"{shape} {round_}")
    columns = {}
    for axis, values in AXES.items():
        column = list(itertools.islice(itertools.cycle(values), CASES))
        drawn.shuffle(column)
        columns[axis] = column
    for row in zip(*columns.values(), strict=True):
        case = Case(*row)
        yield case if legal(case.order, case.memory) else case._replace(memory="out")


# ---------------------------------------------------------------------------------------------------------------------
# Data

# Rows of a channel in blocks of 3, 4 and 5 values: deviations from the mean whose squares have the mean 2 or 14, so
# that with eps = 2 rstd is 1/2 or 1/4; and beside them a gradient without mean and without slope against them.
BLOCKS = {
    2: {3: ((1, 1, -2), (1, -1, 0)), 4: ((2, -2, 0, 0), (1, 1, -1, -1)), 5: ((2, -2, 1, -1, 0), (1, 1, -1, -1, 0))},
    14: {
        3: ((1, 4, -5), (-3, 2, 1)),
        4: ((6, -4, -2, 0), (1, 1, 1, -3)),
        5: ((6, -5, -2, 2, -1), (1, 0, 1, -2, 0)),
    },
}
PAIR = ((1, -1), (0, 0))  # two values have the variance 1: eps = 3


class Expected(NamedTuple):
    y: Any
    running: dict[str, Any]  # after the call
    g: Any  # the gradient before the activation
    gradients: Any


class Problem:
    """Data in float64 of which every dtype has all bits, and what the definition makes of them.

    Values: x = mean + deviation, |x| <= 10 in halves. v = (x - mean) * gamma * rstd + beta + residual in odd eighths
    below 8, so that no v is at a kink. dy = a + b * deviation + ripple in halves.
    """

    def __init__(self, shape: tuple[int, ...], seed: int) -> None:
        rng = np.random.default_rng(seed)
        channels = shape[1]
        self.shape, self.count = shape, math.prod(shape) // channels
        self.eps = 3.0 if self.count == 2 else 2.0
        self.var = np.ones(channels) if self.count == 2 else rng.choice([2.0, 14.0], channels)
        self.mean = rng.integers(-8, 9, channels) / 2
        self.rstd = 1 / np.sqrt(self.var + self.eps)
        rows = np.empty((2, channels, self.count))
        for channel, var in enumerate(self.var):
            lengths = {0: [], 1: [5], 2: [3, 3], 3: [3]}[self.count % 4]
            lengths += [4] * ((self.count - sum(lengths)) // 4)
            blocks = [PAIR] if self.count == 2 else [BLOCKS[int(var)][length] for length in lengths]
            rows[:, channel] = np.concatenate(blocks, axis=1)[:, rng.permutation(self.count)]
        deviation, ripple = (self.spread(row) for row in rows)
        self.x = self.along(self.mean) + deviation
        self.gamma = rng.choice([-2.0, -1.0, 1.0, 2.0], channels)
        self.beta = (2 * rng.integers(-8, 8, channels) + 1) / 8
        self.residual = rng.integers(-8, 9, shape) / 4
        a, b = rng.integers(-4, 5, channels) / 2, rng.integers(-2, 3, channels) / 2
        self.dy = self.along(a) + self.along(b) * deviation + ripple
        self.expected = cache(self._expected)  # a few dozen for all cases of the shape

    def along(self, values: Any) -> Any:
        return values.reshape(-1, *(1,) * (len(self.shape) - 2))

    def spread(self, rows: Any) -> Any:
        """(channels, count) as the shape says."""
        return np.ascontiguousarray(np.moveaxis(rows.reshape(self.shape[1], self.shape[0], *self.shape[2:]), 0, 1))

    def rows(self, values: Any) -> Any:
        return np.moveaxis(values, 1, 0).reshape(self.shape[1], -1)

    def running(self, dtype: Any, training: bool) -> dict[str, Any]:
        """Inference is not by the statistics of the batch, but by others as simple."""
        mean, var = (self.mean * 0 + 0.5, self.var * 0 + 3) if training else (self.mean + 1, self.var.copy())
        return {"running_mean": mean.astype(dtype), "running_var": var.astype(dtype), "training": training}

    def _expected(self, activation: str, residual: bool, training: bool) -> Expected:
        """By the definition, in float64, where nothing of it rounds but a mean of g."""
        running = self.running(np.float64, training)
        y, kept = fastbn.reference.batchnorm_forward(
            self.x,
            self.gamma,
            self.beta,
            eps=self.eps,
            momentum=0.5,
            unbiased=False,
            activation=EXACT_SLOPE[activation],
            residual=self.residual if residual else None,
            **running,
        )
        if training:
            assert np.array_equal(kept.mean, self.mean) and np.array_equal(kept.rstd, self.rstd)
        assert (kept.v * 8 % 2 == 1).all() and np.abs(kept.v).max() < 8
        g = self.dy * fastbn.reference.ACTIVATIONS[activation][1](kept.v, kept.negative_slope)
        return Expected(y, running, g, fastbn.reference.batchnorm_backward(self.dy, kept))


def few_bits(*arrays: Any) -> bool:
    return all(np.array_equal(array, np.float32(array)) for array in arrays)


def exact_dx(problem: Problem, channel: int, g: Any) -> bool:
    """Whether no step to dx of a channel rounds in float32, given the gradient before the activation."""
    odd = problem.count // (problem.count & -problem.count)
    deviation = problem.x[:, channel] - problem.mean[channel]
    sums = float(g.sum()), float((g * deviation).sum())
    if any(total * 8 % odd for total in sums):
        return False
    mean, slope = sums[0] / problem.count, sums[1] / problem.count * problem.rstd[channel] ** 2
    return few_bits(mean, g - mean, slope, deviation * slope, g - mean - deviation * slope)


# ---------------------------------------------------------------------------------------------------------------------
# A case


def check(problem: Problem, case: Case) -> bool:
    """Whether all of it was compared without tolerance."""
    dtype, training = dtype_of(case.dtype), "inference" not in case.direction
    parameters = np.float64 if case.dtype == "float64" else np.float32
    move = MEMORY_ORDERS[case.order]
    x, dy, residual = (move(values.astype(dtype), 1) for values in (problem.x, problem.dy, problem.residual))
    gamma, beta = problem.gamma.astype(parameters), problem.beta.astype(parameters)
    running = problem.running(parameters, training)
    options = {
        **running,
        "eps": problem.eps,
        "momentum": 0.5,
        "unbiased": False,
        "activation": EXACT_SLOPE[case.activation],
        "residual": residual if case.residual else None,
        "num_threads": case.threads,
    }
    name = f"batchnorm{max(len(problem.shape) - 2, 1)}d"

    def out(in_place: Any) -> Any:
        if case.memory == "out":  # NaN, in an order that a result can have
            return np.full_like(in_place if case.order in IN_PLACE else getattr(fastbn, name)(in_place), np.nan, dtype)
        return in_place if case.memory == "in place" else None

    expected = problem.expected(case.activation, case.residual, training)
    with fastbn.runtime.isa(case.isa):
        if "backward" not in case.direction:
            target = out(residual if case.residual else x)
            actual = getattr(fastbn, name)(x, gamma, beta, out=target, **options)
            assert target is None or actual is target
            for key in ("running_mean", "running_var"):
                assert_same_bits(running[key], expected.running[key].astype(parameters))
            return check_y(case.activation, actual, expected.y)
        _, kept = getattr(fastbn, f"{name}_forward")(x, gamma, beta, **options)
        target = out(dy)
        actual = fastbn.batchnorm_backward(dy, kept, out=target, num_threads=case.threads)
    assert target is None or actual.dx is target
    assert_same_bits(kept.rstd, problem.rstd)
    assert_same_bits(kept.mean, problem.mean if training else problem.mean + 1)
    return check_gradients(problem, case, actual, expected)


def check_y(activation: str, actual: Any, expected: Any) -> bool:
    if activation in ROUNDING:
        assert (np.abs(actual - expected) <= activation_atol(actual.dtype, activation, 0.0, expected)).all()
    else:
        assert_same_bits(actual + 0, expected.astype(actual.dtype) + 0)  # both zeros are 0
    return activation not in ROUNDING


def check_gradients(problem: Problem, case: Case, actual: Any, expected: Expected) -> bool:
    dtype, training, rounds = actual.dx.dtype, case.direction == "backward", case.activation in ROUNDING
    g, dresidual = expected.g, actual.dresidual
    rounding = gradient_rounding(dtype, case.activation) * np.abs(problem.dy).max()
    if case.residual:
        assert (np.abs(dresidual - g) <= rounds * (rounding + storing(dtype) * np.abs(g))).all()
    else:
        assert dresidual is None
    exact = True
    loudest, scale = np.abs(problem.dy).max() * STEEPEST, np.abs(problem.gamma) * problem.rstd
    for channel in range(problem.shape[1]):
        dx, wanted = actual.dx[:, channel], expected.gradients.dx[:, channel]
        if not rounds and (not training or exact_dx(problem, channel, g[:, channel])):
            assert_same_bits(dx + 0, wanted.astype(dtype) + 0)
            continue
        exact = False
        x, gamma = problem.x[:, channel], problem.gamma[channel]
        largest = dx_addends(x, g[:, channel], gamma, problem.eps) if training else float(np.abs(wanted).max())
        atol = dx_atol(dtype, largest) + (2 if training else 1) * rounding * scale[channel]
        assert (np.abs(dx - wanted) <= atol).all()
    deviations = np.abs(problem.x - problem.along(problem.mean if training else problem.mean + 1))
    for key, terms in (
        ("dgamma", 2 * loudest * problem.rows(deviations).sum(axis=1) * problem.rstd),
        ("dbeta", np.full(problem.shape[1], problem.count * loudest)),
    ):
        got, wanted = getattr(actual, key), getattr(expected.gradients, key)
        if not rounds:
            assert_same_bits(got + 0, wanted.astype(got.dtype) + 0)
            continue
        computed = np.promote_types(np.float32, dtype)
        for channel, most in enumerate(terms):
            atol = sum_atol(got.dtype, float(most), problem.count, computed)
            assert abs(float(got[channel]) - wanted[channel]) <= atol
    return exact


# ---------------------------------------------------------------------------------------------------------------------
# Tests


def test_exact_cases_span_every_axis():
    """All values of all axes: any two of two axes, the shape being one, meet in some case of the first round."""
    met = set()
    number = 0
    for shape in EXACT_SHAPES:
        for case in cases(shape, 0):
            met.update(itertools.combinations([("shape", shape), *zip(AXES, case, strict=True)], 2))
            number += 1
    values = [[("shape", shape) for shape in EXACT_SHAPES]]
    values += [[(axis, value) for value in of] for axis, of in AXES.items()]
    expected = {
        pair for first, second in itertools.combinations(values, 2) for pair in itertools.product(first, second)
    }
    illegal = {(("order", order), ("memory", "in place")) for order in MEMORY_ORDERS if order not in IN_PLACE}
    assert met == expected - illegal
    assert len(set(EXACT_SHAPES)) == len(EXACT_SHAPES) >= 40 and number >= 5000


@pytest.mark.parametrize("seed", range(ROUNDS))
@pytest.mark.parametrize("shape", EXACT_SHAPES, ids=shape_id)
def test_exact_cases(shape, seed, record_property):
    problem = Problem(shape, seed)
    exact = 0
    for case in cases(shape, seed):
        try:
            exact += check(problem, case)
        except Exception as error:
            raise AssertionError(f"check(Problem({shape}, {seed}), {case})") from error
    record_property("cases", CASES)
    record_property("compared without tolerance", exact)
    assert exact > CASES / 3


@pytest.mark.parametrize("direction", AXES["direction"])
def test_exact_cases_notice_one_ulp(direction, monkeypatch):
    """In one value of y or of dx."""
    problem, case = Problem((3, 5, 7), 0), Case("c-order", "float32", "identity", False, "fresh", direction, ISAS[0], 2)
    assert check(problem, case)

    def off(function: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            values = getattr(result, "dx", result)
            values[2, 4, 6] = np.nextafter(values[2, 4, 6], np.float32(99))
            return result

        return wrapped

    for name in ("batchnorm1d", "batchnorm_backward"):
        monkeypatch.setattr(fastbn, name, off(getattr(fastbn, name)))
    with pytest.raises(AssertionError):
        check(problem, case)
