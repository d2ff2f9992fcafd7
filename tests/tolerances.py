"""The one place with tolerances. Each follows from the arithmetic that is promised, not from what was once measured.

`u` is the unit roundoff, half of eps: one correctly rounded operation has a relative error of at most u. float32 and
the half precisions compute in float32 and round once more on storing; statistics are float64 for every dtype.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from problems import finfo, ulp

# Mean and variance of float32 and half input, rounded to float32: at most one ulp from exact arithmetic, the mean in
# ulp of max(|mean|, std), for |mean| / std up to 1e6.
STATISTICS_ULP = 1.0

# float64 input: relative error of the mean (to max(|mean|, std)) and of the variance.
STATISTICS_RELATIVE_F64 = 1e-13

# Exact data (problems.make_exact): no error at all once rounded to float32, none in float64 if the count is a power
# of two. Otherwise float64 divides by counts that do not divide evenly when partial sums merge: at most 2 ulp of
# float64.
EXACT_ULP_F32 = 0
EXACT_ULP_F64_POWER_OF_TWO = 0
EXACT_ULP_F64 = 2

# dx lies within 4 ulp of the largest |dx| of its channel, for offsets of x and dy up to 1e6.
DX_ULP = 4.0

U64 = float(np.finfo(np.float64).eps) / 2
U32 = float(np.finfo(np.float32).eps) / 2


def exact_ulp_f64(count: int) -> int:
    """Ulp of float64 allowed to mean and variance of exact data."""
    return EXACT_ULP_F64_POWER_OF_TWO if count & (count - 1) == 0 else EXACT_ULP_F64


def unit_roundoff(dtype: npt.DTypeLike) -> float:
    """Of the arithmetic in which dtype is computed: float64 for float64, else float32."""
    return U64 if np.dtype(dtype) == np.float64 else U32


def storing(dtype: npt.DTypeLike) -> float:
    """Relative error of storing a result that was computed in wider arithmetic; 0 where there is nothing to round."""
    return 0.0 if np.dtype(dtype).itemsize >= 4 else float(finfo(dtype).eps) / 2


# Where |mean| is at most so many std, it is not subtracted from x but its share from beta.
CENTERED_FROM = 2.0


def forward_atol(
    dtype: npt.DTypeLike,
    scaled: Any,
    beta: Any = 0.0,
    residual: Any = 0.0,
    offset_ratio: float = 0.0,
    gamma: Any = 1.0,
) -> npt.NDArray[np.float64]:
    """Error allowed to y = (x - m) * scale + offset + residual, element by element.

    `scaled` is |(x - mean) * scale|, `offset_ratio` |mean| / std, the largest of all channels. Where m is 0, its share
    of the product is at most `moved` = 2 |gamma|. The subtraction: u scaled. The rounding of scale, and (float64) the
    product: 2 u (scaled + moved). Rounding offset: u (|beta| + moved). Two additions: u (scaled + |beta|) and u (scaled
    + |beta| + |residual|). Together at most u (5 scaled + 3 |beta| + |residual| + 3 moved). The statistics add half of
    the relative error of the variance and the error of the mean over std. What m has lost is at most u |mean|, and
    rounded with offset: off by 2^-48 |mean| at most.
    """
    scaled, beta, residual, gamma = (np.abs(np.asarray(value, np.float64)) for value in (scaled, beta, residual, gamma))
    u = unit_roundoff(dtype)
    total = u * (5 * scaled + 3 * beta + residual + 3 * CENTERED_FROM * gamma)
    # An error of the mean moves x - mean, in units of std, by this much in every element: also where scaled is 0.
    if np.dtype(dtype) == np.float64:
        mean = STATISTICS_RELATIVE_F64 * max(offset_ratio, 1.0)
        variance = STATISTICS_RELATIVE_F64 / 2
    else:
        mean = 2.0**-48 * offset_ratio
        variance = U32 * u  # float64 statistics: far below one rounding of float32
    largest = scaled.max(initial=0.0)
    total = total + mean * max(float(largest), 1.0) + variance * scaled
    rounded = scaled + beta + residual
    return total + storing(dtype) * rounded + float(finfo(dtype).smallest_subnormal)


# relu and relu6 choose among exact values. The others compute: a sum, two products and a rounded constant at most, of
# numbers up to max(|y|, 1); and none is steeper than this.
EXACT_ACTIVATIONS = ("identity", "relu", "relu6")
STEEPEST = 1.5


def activation_atol(dtype: npt.DTypeLike, activation: str, v_atol: Any, y: Any) -> Any:
    """Error allowed to y = activation(v), given that of v."""
    if activation in EXACT_ACTIVATIONS:
        return v_atol
    return STEEPEST * v_atol + (4 * unit_roundoff(dtype) + storing(dtype)) * np.maximum(np.abs(y), 1)


def gradient_rounding(dtype: npt.DTypeLike, activation: str) -> float:
    """Error of g = dy * slope(v), relative to the largest |dy|: likewise."""
    return 0.0 if activation in EXACT_ACTIVATIONS else STEEPEST * 4 * unit_roundoff(dtype)


def dx_atol(dtype: npt.DTypeLike, largest: float) -> float:
    """Error allowed to dx in a channel whose largest |dx| is given.

    dx is a difference, (g - mean(g)) * scale - (x - mean) * c * scale. With very few values per channel the two nearly
    cancel (with two values, always), and dx is smaller than the roundings of either: `largest` is then the largest
    magnitude of them, see `dx_addends`.
    """
    # float64 has nothing wider to keep its statistics in; the reference has no more digits either.
    statistics = STATISTICS_RELATIVE_F64 * largest if np.dtype(dtype) == np.float64 else 0.0
    return DX_ULP * ulp(largest, dtype) + statistics + 4 * float(finfo(dtype).smallest_subnormal)


def dx_addends(x: Any, g: Any, gamma: Any, eps: float) -> float:
    """The largest magnitude in a channel of either term of dx (training), from float64 rows of x and g."""
    x, g = np.asarray(x, np.float64).ravel(), np.asarray(g, np.float64).ravel()
    centered, rstd = x - x.mean(), 1 / np.sqrt(x.var() + eps)
    scale = abs(float(gamma) * rstd)
    slope = abs(rstd * rstd * (g * centered).mean())
    return float(scale * max(np.abs(g - g.mean()).max(), np.abs(centered).max() * slope))


def sum_atol(dtype: npt.DTypeLike, terms: float, count: int, computed: npt.DTypeLike = np.float64) -> float:
    """Error allowed to a sum of `count` products (dgamma, dbeta) that is rounded to dtype at the end.

    `terms` is the sum of the absolute values of what is added. Each term is a product of at most four rounded
    factors, each addition rounds at most once: (count + 4) u of float64. The factors x - mean are float32 where
    `computed` says so.
    """
    factors = 4 * unit_roundoff(computed)
    return (count + 4) * U64 * terms + factors * terms * (np.dtype(computed) != np.float64) + ulp(terms, dtype)


def central_difference_step(scale: float) -> float:
    """Step of a central difference in float64: the cube root of eps balances truncation and rounding."""
    return float(np.cbrt(np.finfo(np.float64).eps)) * max(scale, 1.0)


def central_difference_atol(values: float, step: float) -> float:
    """Error allowed to (f(x + h) - f(x - h)) / 2h: rounding of f, and h^2 for the third derivative, taken as |f|."""
    return 64 * U64 * values / step + 16 * step * step * values


def torch_rtol(dtype: npt.DTypeLike, count: int = 0) -> float:
    """Relative to the largest value, against PyTorch, whose y = a x + b loses bits that ours keeps (offset up to 4).

    `count` is the number of terms of its sums, which it adds one after the other.
    """
    return (64 + 2 * count) * unit_roundoff(dtype) + 2 * storing(dtype)


def running_ulp() -> int:
    """A running statistic is computed in float64 and rounded once; the reference does the same in another order."""
    return 1
