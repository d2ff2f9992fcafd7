"""Batch normalization in Numba as a careful user writes it: float accumulators, fastmath, prange over channels (nchw)
or over blocks of rows (nhwc)."""

from __future__ import annotations

import numpy as np
from numba import get_num_threads, njit, prange

fast = njit(parallel=True, fastmath=True, nogil=True)


@fast
def forward_nchw(x, gamma, beta, running, eps, relu):
    N, C, L = x.shape
    y = np.empty_like(x)
    count = N * L
    for c in prange(C):
        total = x.dtype.type(0)
        mean = 0.0
        for n in range(N):
            total = x.dtype.type(0)
            for i in range(L):
                total += x[n, c, i]
            mean += total
        center = x.dtype.type(mean / count)
        squares = 0.0
        for n in range(N):
            total = x.dtype.type(0)
            for i in range(L):
                total += (x[n, c, i] - center) ** 2
            squares += total
        scale = x.dtype.type(gamma[c] / np.sqrt(squares / count + eps))
        shift = beta[c]
        for n in range(N):
            for i in range(L):
                v = (x[n, c, i] - center) * scale + shift
                y[n, c, i] = max(v, x.dtype.type(0)) if relu else v
        running[0, c] = 0.9 * running[0, c] + 0.1 * center
        running[1, c] = 0.9 * running[1, c] + 0.1 * squares / max(count - 1, 1)
    return y


@fast
def inference_nchw(x, gamma, beta, mean, var, eps, relu):
    N, C, L = x.shape
    y = np.empty_like(x)
    for row in prange(N * C):
        n, c = row // C, row % C
        scale = x.dtype.type(gamma[c] / np.sqrt(var[c] + eps))
        center, shift = mean[c], beta[c]
        for i in range(L):
            v = (x[n, c, i] - center) * scale + shift
            y[n, c, i] = max(v, x.dtype.type(0)) if relu else v
    return y


@fast
def backward_nchw(dy, x, y, gamma, mean, rstd, relu):
    N, C, L = x.shape
    dx = np.empty_like(x)
    dgamma, dbeta = np.empty_like(gamma), np.empty_like(gamma)
    count = N * L
    zero = x.dtype.type(0)
    for c in prange(C):
        center, r = mean[c], rstd[c]
        sum_g, sum_gx = 0.0, 0.0
        for n in range(N):
            part, part_x = zero, zero
            for i in range(L):
                g = dy[n, c, i] if not relu or y[n, c, i] > 0 else zero
                part += g
                part_x += g * ((x[n, c, i] - center) * r)
            sum_g += part
            sum_gx += part_x
        scale, g_mean, slope = gamma[c] * r, x.dtype.type(sum_g / count), x.dtype.type(sum_gx / count)
        for n in range(N):
            for i in range(L):
                g = dy[n, c, i] if not relu or y[n, c, i] > 0 else zero
                dx[n, c, i] = scale * (g - g_mean - (x[n, c, i] - center) * r * slope)
        dgamma[c], dbeta[c] = sum_gx, sum_g
    return dx, dgamma, dbeta


@fast
def forward_nhwc(x, gamma, beta, running, eps, relu):
    rows, C = x.shape
    y = np.empty_like(x)
    blocks = 8 * get_num_threads()
    sums = np.zeros((2, blocks, C))
    first = x[0].copy()
    for b in prange(blocks):
        total, squares = np.zeros_like(first), np.zeros_like(first)
        for i in range(b * rows // blocks, (b + 1) * rows // blocks):
            for c in range(C):
                d = x[i, c] - first[c]
                total[c] += d
                squares[c] += d * d
        sums[0, b] = total
        sums[1, b] = squares
    shift = sums[0].sum(0) / rows
    var = sums[1].sum(0) / rows - shift * shift
    center = (first + shift).astype(x.dtype)
    scale = (gamma / np.sqrt(var + eps)).astype(x.dtype)
    running[0] = 0.9 * running[0] + 0.1 * center
    running[1] = 0.9 * running[1] + 0.1 * var * rows / max(rows - 1, 1)
    for i in prange(rows):
        for c in range(C):
            v = (x[i, c] - center[c]) * scale[c] + beta[c]
            y[i, c] = max(v, x.dtype.type(0)) if relu else v
    return y


@fast
def inference_nhwc(x, gamma, beta, mean, var, eps, relu):
    rows, C = x.shape
    y = np.empty_like(x)
    scale = (gamma / np.sqrt(var + eps)).astype(x.dtype)
    for i in prange(rows):
        for c in range(C):
            v = (x[i, c] - mean[c]) * scale[c] + beta[c]
            y[i, c] = max(v, x.dtype.type(0)) if relu else v
    return y


@fast
def backward_nhwc(dy, x, y, gamma, mean, rstd, relu):
    rows, C = x.shape
    dx = np.empty_like(x)
    blocks = 8 * get_num_threads()
    sums = np.zeros((2, blocks, C))
    zero = x.dtype.type(0)
    for b in prange(blocks):
        part, part_x = np.zeros_like(mean), np.zeros_like(mean)
        for i in range(b * rows // blocks, (b + 1) * rows // blocks):
            for c in range(C):
                g = dy[i, c] if not relu or y[i, c] > 0 else zero
                part[c] += g
                part_x[c] += g * (x[i, c] - mean[c])
        sums[0, b] = part
        sums[1, b] = part_x
    dbeta = sums[0].sum(0).astype(x.dtype)
    dgamma = (sums[1].sum(0) * rstd).astype(x.dtype)
    scale, g_mean, slope = gamma * rstd, dbeta / x.dtype.type(rows), dgamma * rstd / x.dtype.type(rows)
    for i in prange(rows):
        for c in range(C):
            g = dy[i, c] if not relu or y[i, c] > 0 else zero
            dx[i, c] = scale[c] * (g - g_mean[c] - (x[i, c] - mean[c]) * slope[c])
    return dx, dgamma, dbeta
