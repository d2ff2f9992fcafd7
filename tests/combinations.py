"""The product that every kernel is tested over. All lists come from the library; a new row of a table tests itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest

import fastbn
from fastbn import _core
from problems import MEMORY_ORDERS, dtype_of, make_parameters, make_random, shape_id

ISAS = fastbn.runtime.available_isas()
DTYPES = [dtype_of(name) for name in fastbn.runtime.dtypes()]
ACTIVATIONS = fastbn.runtime.activations()
THREADS = (1, 2, 3, 5, 8)
PROCESSORS = [name for name, _ in _core.processors()]

# `make test-long` asks for more of the tests that draw their cases.
LONG = os.environ.get("FASTBN_TEST_LONG", "0") not in ("", "0")

each_isa = pytest.mark.parametrize("isa", ISAS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
each_mode = pytest.mark.parametrize("training", (True, False), ids=("training", "inference"))
with_or_without_residual = pytest.mark.parametrize("with_residual", (False, True), ids=("plain", "residual"))
# One planar and one interleaved family, planes that do not adjoin, and runs that are packed before kernels see them.
ORDERS = ("c-order", "channels-last", "every-other-channel", "every-other-value")
each_order = pytest.mark.parametrize("order", ORDERS)


def each_activation_and_shape(shapes: Any) -> Any:
    """Identity and relu with all shapes, the others (whose loops are the same) with a quarter of them each."""
    pairs = [
        (activation, shape)
        for i, activation in enumerate(ACTIVATIONS)
        for j, shape in enumerate(shapes)
        if activation in ("identity", "relu") or (i + j) % 4 == 0
    ]
    ids = [f"{activation}-{shape_id(shape)}" for activation, shape in pairs]
    return pytest.mark.parametrize(("activation", "shape"), pairs, ids=ids)


@contextmanager
def streaming(everything: bool) -> Iterator[None]:
    """Every result is stored past the caches (where its rows allow it), or none."""
    before = fastbn.memory.stream_bytes()
    fastbn.memory.set_stream_bytes(0 if everything else 1 << 50)
    try:
        yield
    finally:
        fastbn.memory.set_stream_bytes(before)


@contextmanager
def tuned_for(processor: str) -> Iterator[None]:
    """The tactics of a kind of processor, which this one need not be."""
    before = [here for _, here in _core.processors()].index(True)
    _core.set_processor(PROCESSORS.index(processor))
    try:
        yield
    finally:
        _core.set_processor(before)


def each_shape(shapes: Any) -> Any:
    return pytest.mark.parametrize("shape", shapes, ids=shape_id)


class Problem(NamedTuple):
    """Everything that a forward and a backward call take; arrays in one memory order."""

    x: Any
    dy: Any
    residual: Any
    gamma: Any
    beta: Any
    running: dict[str, Any]

    def forward(self, activation: str, **options: Any) -> tuple[Any, Any]:
        return fastbn.batchnorm_forward(
            self.x, self.gamma, self.beta, activation=activation, residual=self.residual, **self.running, **options
        )

    def reference(self, activation: str) -> tuple[Any, Any]:
        return fastbn.reference.batchnorm_forward(
            self.x, self.gamma, self.beta, activation=activation, residual=self.residual, **self.running
        )


def make_problem(
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    *,
    order: str = "c-order",
    with_residual: bool = False,
    training: bool = True,
    offset: float = 0.0,
    seed: int = 0,
) -> Problem:
    """A random problem with its channels on axis 1."""
    move = MEMORY_ORDERS[order]
    x = move(make_random(shape, 1, dtype, seed, offset), 1)
    dy = move(make_random(shape, 1, dtype, seed + 1), 1)
    residual = move(make_random(shape, 1, dtype, seed + 2), 1) if with_residual else None
    gamma, beta = make_parameters(shape[1], np.float64 if dtype == "float64" else np.float32, seed + 3)
    running = {}
    if not training:
        rng = np.random.default_rng(seed + 4)
        mean = offset + rng.standard_normal(shape[1])
        running = {"running_mean": mean, "running_var": rng.uniform(0.5, 2, shape[1]), "training": False}
    return Problem(x, dy, residual, gamma, beta, running)


def activation_slope(problem: Problem, activation: str, **options: Any) -> Any:
    """The slope at the values that the library has applied the activation to, in the arithmetic of the dtype: they may
    be a rounding away from the reference's, on the other side of a kink."""
    if problem.x.dtype.itemsize == 2:
        wide = (None if a is None else a.astype(np.float32) for a in (problem.x, problem.dy, problem.residual))
        problem = Problem(*wide, *problem[3:])
    v, _ = problem.forward("identity", **options)
    return fastbn.reference.ACTIVATIONS[activation][1](v.astype(np.float64), fastbn.reference.NEGATIVE_SLOPE)


def run(problem: Problem, activation: str, isa: str, threads: int, **options: Any) -> dict[str, Any]:
    """Forward (with these options) and backward; every result by name."""
    with fastbn.runtime.isa(isa):
        y, cache = problem.forward(activation, num_threads=threads, **options)
        gradients = fastbn.batchnorm_backward(problem.dy, cache, num_threads=threads)
    dx, dgamma, dbeta = gradients
    results = {"y": y, "mean": cache.mean, "rstd": cache.rstd, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}
    if problem.residual is not None:
        results["dresidual"] = gradients.dresidual
    return results
