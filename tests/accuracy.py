"""`make accuracy`: how far fastbn, PyTorch, NumPy and JAX are from exact arithmetic; the tables of docs/numerics.md.

Errors are in units in the last place (ulp) of the dtype: of the mean at max(|mean|, std), of the variance at its own
size, of y, dx and dgamma at the largest of a channel (dgamma: of all channels). The worst channel counts. Mean and
variance are compared with rational arithmetic. The other three are compared with 80-bit arithmetic that starts from
those: its own error is far below what a table shows.
"""

import argparse
import platform
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

import fastbn
from pages import replaced
from problems import HOSTILE, dtype_of, exact_statistics, finfo, ulp

PAGE = Path(__file__).resolve().parent.parent / "docs" / "numerics.md"
QUANTITIES = ("mean", "var", "y", "dx", "dgamma")
EPS = 1e-5
CHANNELS = 4
CHUNK = 1 << 20  # rows that are compared at once: 80-bit arrays of all of them would need gigabytes
Long = np.longdouble
Errors: TypeAlias = dict[str, float | None]  # by quantity


class Case(NamedTuple):
    """Values of shape (count, channels), made from normal ones."""

    name: str
    count: int
    make: Callable[[Any], Any]
    dtype: str = "float32"
    dy_offset: float = 0.0
    channels: int = CHANNELS


def hostile(name: str, dtype: str = "float32") -> Callable[[Any], Any]:
    return lambda z: np.stack([HOSTILE[name](column.copy(), finfo(dtype_of(dtype))) for column in z.T], axis=1)


def offset(ratio: float) -> Callable[[Any], Any]:
    return lambda z: z + ratio


CASES = [
    *(Case(f"mean = {ratio:g} std", 1 << 14, offset(ratio)) for ratio in (0.0, 1.0, 1e2, 1e4, 1e6)),
    *(Case(f"2^{power} values, mean = 10 std", 1 << power, offset(10.0)) for power in (1, 10, 18, 22)),
    Case("2^26 values, mean = 10 std", 1 << 26, offset(10.0), channels=1),
    Case("first value 1e6", 1 << 14, hostile("outlier-first")),
    Case("all values 0.1", 1 << 14, hostile("constant")),
    Case("values of 1e37", 1 << 14, hostile("huge-1e37")),
    Case("denormal values", 1 << 14, hostile("denormal")),
    Case("1 plus a few ulp", 1 << 14, hostile("tiny-variance")),
    Case("mean of dy = 1e4 std", 1 << 14, offset(1.0), dy_offset=1e4),
    *(Case(f"{dtype}, mean = 10 std", 1 << 14, offset(10.0), dtype) for dtype in ("float16", "bfloat16")),
    *(Case(f"float64, mean = {ratio:g} std", 1 << 14, offset(ratio), "float64") for ratio in (0.0, 1e4)),
]


class Results(NamedTuple):
    """Of one contender; mean and var are None where it does not tell them in full."""

    mean: Any
    var: Any
    y: Any
    dx: Any
    dgamma: Any


# ---------------------------------------------------------------------------------------------------------------------
# Contenders: x and dy of shape (count, channels), gamma and beta of its dtype or, for the half precisions, float32


def by_fastbn(x: Any, dy: Any, gamma: Any, beta: Any, planar: bool) -> Results:
    if planar:
        x, dy = (np.ascontiguousarray(a.T)[None] for a in (x, dy))
    y, cache = fastbn.batchnorm_forward(x, gamma, beta, eps=EPS)
    dx, dgamma, _ = fastbn.batchnorm_backward(dy, cache)
    stats = fastbn.batchnorm_stats(x)
    mean, var = (a.astype(gamma.dtype) for a in (stats.mean, np.minimum(stats.var(), np.finfo(gamma.dtype).max)))
    y, dx = (a[0].T if planar else a for a in (y, dx))
    return Results(mean, var, y, dx, dgamma)


def by_torch(x: Any, dy: Any, gamma: Any, beta: Any, planar: bool) -> Results:
    import torch

    def tensor(a: Any) -> Any:
        if a.dtype.name == "bfloat16":
            return torch.from_numpy(a.view(np.uint16).astype(np.int32).astype(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(a.copy())

    def images(a: Any) -> Any:
        """(1, C, count, 1), with its channels adjacent in memory or not."""
        columns = tensor(a).T[None, :, :, None]
        return columns.contiguous() if planar else columns.contiguous(memory_format=torch.channels_last)

    parameters = [tensor(a).requires_grad_() for a in (gamma, beta)]
    values = images(x).requires_grad_()
    mean, var = torch.zeros(x.shape[1], dtype=parameters[0].dtype), torch.ones(x.shape[1], dtype=parameters[0].dtype)
    y = torch.nn.functional.batch_norm(values, mean, var, *parameters, training=True, momentum=1.0, eps=EPS)
    y.backward(images(dy))
    n = len(x)
    wide = torch.promote_types(y.dtype, torch.float32)
    y, dx = (a.detach()[0, :, :, 0].T.to(wide).numpy() for a in (y, values.grad))
    return Results(mean.numpy(), var.numpy().astype(Long) * (n - 1) / n, y, dx, parameters[0].grad.numpy())


def by_formula(xp: Any, x: Any, dy: Any, gamma: Any, beta: Any) -> Results:
    """What everybody writes: mean and variance along the axis, and section 3 of the paper."""
    mean, var = x.mean(axis=0), x.var(axis=0)
    rstd = 1 / xp.sqrt(var + x.dtype.type(EPS))
    normalized = (x - mean) * rstd
    dgamma, dbeta = (dy * normalized).sum(axis=0), dy.sum(axis=0)
    dx = gamma * rstd * (dy - (dbeta + normalized * dgamma) / x.dtype.type(len(x)))
    return Results(*map(np.asarray, (mean, var, gamma * normalized + beta, dx, dgamma)))


def by_numpy(x: Any, dy: Any, gamma: Any, beta: Any) -> Results:
    with np.errstate(all="ignore"):
        return by_formula(np, x, dy, gamma.astype(x.dtype), beta.astype(x.dtype))


def by_jax(x: Any, dy: Any, gamma: Any, beta: Any) -> Results:
    import jax

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_platforms", "cpu")
    arrays = [jax.numpy.asarray(a) for a in (x, dy, gamma.astype(x.dtype), beta.astype(x.dtype))]
    return by_formula(jax.numpy, *arrays)


CONTENDERS: dict[str, Callable[..., Results]] = {
    "fastbn, NCHW": lambda *a: by_fastbn(*a, planar=True),
    "fastbn, NHWC": lambda *a: by_fastbn(*a, planar=False),
    "PyTorch, NCHW": lambda *a: by_torch(*a, planar=True),
    "PyTorch, NHWC": lambda *a: by_torch(*a, planar=False),
    "NumPy": by_numpy,
    "JAX": by_jax,
}

# ---------------------------------------------------------------------------------------------------------------------
# Exact


def split(value: Fraction) -> Any:
    """As a sum of 80-bit numbers, added: what is lost is 2^-63 of it."""
    high = Long(float(value))
    return high + Long(float(value - Fraction(float(value))))


def chunks(count: int) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, count, CHUNK)]


class Exact:
    def __init__(self, x: Any, dy: Any, gamma: Any, beta: Any) -> None:
        self.x, self.dy, self.gamma, self.beta = x, dy, gamma.astype(Long), beta.astype(Long)
        self.statistics = exact_statistics(x, 1)
        # The mean in two parts: x - mean must not lose what an offset leaves of it.
        self.high = np.array([float(s.mean) for s in self.statistics], Long)
        self.low = np.array([float(s.mean - Fraction(float(s.mean))) for s in self.statistics], Long)
        self.rstd = 1 / np.sqrt(np.array([split(s.var + Fraction(EPS)) for s in self.statistics]))
        self.mean_dy = sum(dy[rows].astype(Long).sum(axis=0) for rows in chunks(len(x))) / len(x)
        parts = (self.centered(rows) * self.normalized(rows) for rows in chunks(len(x)))
        self.dgamma = sum(part.sum(axis=0) for part in parts)

    def normalized(self, rows: slice) -> Any:
        return ((self.x[rows].astype(Long) - self.high) - self.low) * self.rstd

    def centered(self, rows: slice) -> Any:
        return self.dy[rows].astype(Long) - self.mean_dy

    def y(self, rows: slice) -> Any:
        return self.gamma * self.normalized(rows) + self.beta

    def dx(self, rows: slice) -> Any:
        slope = self.dgamma / len(self.x)
        return self.gamma * self.rstd * (self.centered(rows) - self.normalized(rows) * slope)

    def errors(self, results: Results, dtype: Any, parameter_dtype: Any) -> Errors:
        """In ulp; NaN and Inf where none should be are infinitely wrong; None for what the dtype cannot hold."""

        def units(scales: Any, dtype: Any) -> Any:
            return np.array([ulp(float(scale), dtype) for scale in scales], Long)

        def worst(actual: Any, expected: Callable[[slice], Any]) -> float:
            """At the largest value of a channel."""
            largest, error = np.zeros((2, self.x.shape[1]), Long)
            for rows in chunks(len(self.x)):
                wanted = expected(rows)
                largest = np.maximum(largest, np.abs(wanted).max(axis=0))
                with np.errstate(all="ignore"):
                    off = np.abs(np.asarray(actual[rows]).astype(Long) - wanted)
                error = np.maximum(error, np.where(np.isfinite(off), off, np.inf).max(axis=0))
            return float((error / units(largest, dtype)).max())

        def exactly(value: Any) -> Fraction:
            return Fraction(float(value)) + Fraction(float(Long(value) - Long(float(value))))

        def statistic(actual: Any, expected: list[Fraction], scales: list[float]) -> float | None:
            if max(scales) > float(finfo(parameter_dtype).max):
                return None
            return max(
                float(abs(exactly(value) - exact) / Fraction(ulp(scale, parameter_dtype)))
                if np.isfinite(value)
                else float("inf")
                for value, exact, scale in zip(actual, expected, scales, strict=True)
            )

        s = self.statistics
        with np.errstate(all="ignore"):
            dgamma = np.abs(np.asarray(results.dgamma).astype(Long) - self.dgamma)
        dgamma = np.where(np.isfinite(dgamma), dgamma, np.inf) / units([np.abs(self.dgamma).max()], parameter_dtype)
        return {
            "mean": statistic(results.mean, [c.mean for c in s], [max(abs(float(c.mean)), c.std) for c in s]),
            "var": statistic(results.var, [c.var for c in s], [float(c.var) for c in s]),
            "y": worst(results.y, self.y),
            "dx": worst(results.dx, self.dx),
            "dgamma": float(dgamma.max()),
        }


def measure(case: Case, contenders: Iterable[str] = CONTENDERS) -> dict[str, Errors]:
    """{contender: {quantity: error}}; None for a contender that does not know the dtype or is not installed."""
    rng = np.random.default_rng(0)
    dtype = dtype_of(case.dtype)
    parameter_dtype = np.dtype(np.float64 if case.dtype == "float64" else np.float32)
    with np.errstate(over="ignore"):
        x = case.make(rng.standard_normal((case.count, case.channels))).astype(dtype)
    dy = (rng.standard_normal((case.count, case.channels)) + case.dy_offset).astype(dtype)
    gamma, beta = (rng.uniform(0.5, 2, case.channels).astype(parameter_dtype) for _ in range(2))
    exact = Exact(x, dy, gamma, beta)
    table: dict[str, Errors] = {}
    for name in contenders:
        try:
            results = CONTENDERS[name](x, dy, gamma, beta)
        except (ImportError, RuntimeError, TypeError):
            table[name] = dict.fromkeys(QUANTITIES)
            continue
        table[name] = exact.errors(results, dtype, parameter_dtype)
    return table


# ---------------------------------------------------------------------------------------------------------------------
# The page


def shown(error: float | None) -> str:
    if error is None:
        return ""
    return "wrong" if error == float("inf") else f"{error:.2f}" if error < 9.995 else f"{error:.2g}"


def versions() -> str:
    found = []
    for name in ("numpy", "torch", "jax"):
        with suppress(ImportError):
            found.append(f"{name} {__import__(name).__version__}")
    return ", ".join(found)


def table(quantity: str, measured: dict[str, dict[str, Errors]]) -> str:
    rows = [[f"{quantity}, error in ulp", *CONTENDERS], ["---", *["---:"] * len(CONTENDERS)]]
    rows += [[case, *(shown(of[name][quantity]) for name in CONTENDERS)] for case, of in measured.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def beaten(measured: dict[str, dict[str, Errors]]) -> str:
    """Where the less accurate of our two families is more than 1 ulp off, and another contender is less."""
    rows, lines = 0, []
    for quantity in QUANTITIES:
        for case, of in measured.items():
            known = {name: error for name, errors in of.items() if (error := errors[quantity]) is not None}
            ours = max((error for name, error in known.items() if name.startswith("fastbn")), default=0.0)
            others = {name: error for name, error in known.items() if not name.startswith("fastbn")}
            best = min(others, key=others.__getitem__, default="")
            rows += bool(known)
            if ours > max(1.0, others.get(best, ours)):
                lines.append(f"* {quantity}, {case}: {shown(ours)}; {best} {shown(others[best])}")
    claim = "fastbn is within 1 ulp, or nobody else is more accurate."
    if not lines:
        return f"In all {rows} rows {claim}"
    return "\n".join([f"In {rows - len(lines)} of {rows} rows {claim} The others:", "", *lines])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--page", type=Path, default=PAGE, help="the page with <!-- accuracy --> (docs/numerics.md)")
    page: Path = parser.parse_args(arguments).page
    measured = {case.name: measure(case) for case in CASES}
    text = "\n\n".join(
        [
            *(table(quantity, measured) for quantity in QUANTITIES),
            beaten(measured),
            f"({versions()}; {platform.machine()}.)",
        ]
    )
    page.write_text(replaced(page.read_text(), "accuracy", text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
