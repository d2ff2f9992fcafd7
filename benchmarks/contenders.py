"""All contenders by name. Each runs in a process of its own, which imports nothing that its contender does not need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

import fastbn
from base import Call, Contender
from cases import DTYPES, EPS, Array, Case, Data, activations, aligned_like
from frameworks import Jax, OnnxRuntime, Torch, TorchCompiled
from limit import Limit, LimitSerial, LimitStream, ReadPass
from onednn import OneDNN, OneDNNBlocked
from results import LIMITS, READ_PASS


class FastBN(Contender):
    """Its output in a buffer of the caller."""

    buffers: ClassVar[dict[str, int]] = {"forward": 2, "inference": 2, "backward": 4}
    dtypes = tuple(DTYPES)
    functions = tuple(name for name in activations() if not name.startswith("add+"))
    caller_buffer = True
    can_be_read = True

    def versions(self) -> dict[str, str]:
        return {"fastbn": fastbn.__version__, "numpy": np.__version__}

    def _options(self, case: Case, data: Data) -> dict[str, Any]:
        return {
            "axis": case.axis,
            "eps": EPS,
            "activation": case.function,
            "residual": data.residual,
            "out": aligned_like(data.x, self.offset) if self.caller_buffer else None,
        }

    def forward(self, case: Case, data: Data) -> Call:
        options = self._options(case, data)
        options |= {"running_mean": data.mean.copy(), "running_var": data.var.copy(), "training": True}
        # Only a residual makes the cache for backward cost something.
        if case.residual:
            return lambda: fastbn.batchnorm_forward(data.x, data.gamma, data.beta, **options)[0]
        return lambda: fastbn.batchnorm(data.x, data.gamma, data.beta, **options)

    def inference(self, case: Case, data: Data) -> Call:
        options = self._options(case, data)
        options |= {"running_mean": data.mean, "running_var": data.var, "training": False}
        return lambda: fastbn.batchnorm(data.x, data.gamma, data.beta, **options)

    def backward(self, case: Case, data: Data) -> Call:
        options = self._options(case, data)
        out = options.pop("out")
        assert data.dy is not None
        dy = data.dy
        cache = fastbn.batchnorm_forward(data.x, data.gamma, data.beta, **options)[1]
        return lambda: fastbn.batchnorm_backward(dy, cache, out=out)

    def arrays(self, returned: Any, case: Case) -> list[Array]:
        if case.op != "backward":
            return [returned]
        return [*returned] + ([returned.dresidual] if case.residual else [])

    def release(self) -> None:
        if hasattr(fastbn, "empty_cache"):
            fastbn.empty_cache()


class FastBNFresh(FastBN):
    """A new output per call, nothing recycled."""

    caller_buffer = False

    def load(self) -> None:
        set_cache_limit = getattr(fastbn, "set_cache_limit", None)
        if set_cache_limit is not None:
            set_cache_limit(0)


class FastBNRecycled(FastBN):
    """A new output per call, in recycled memory: the default."""

    caller_buffer = False

    def load(self) -> None:
        if not hasattr(fastbn, "set_cache_limit"):
            raise ImportError("this fastbn does not recycle outputs")


class FastBNStreamed(FastBN):
    """Into the caller's buffer, past the caches from some 4 MiB of all arrays on, whoever reads the result next."""

    def load(self) -> None:
        fastbn.memory.set_stream_bytes(4 << 20)


class Numpy(Contender):
    """The formula, as NumPy users write it; half precision in float32."""

    buffers: ClassVar[dict[str, int]] = {"forward": 7, "inference": 7, "backward": 7}
    dtypes = ("f32", "f64", "f16", "bf16")
    can_be_read = True

    def forward(self, case: Case, data: Data) -> Call:
        axes, gamma, beta, _mean, _var = self._broadcast(case, data)
        running_mean, running_var = np.zeros_like(gamma), np.ones_like(gamma)
        unbiased = data.x.size / gamma.size / (data.x.size / gamma.size - 1)
        finish = self._finish(case, data)

        def call() -> Array:
            x = self._wide(data.x)
            mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
            running_mean[...] = 0.9 * running_mean + 0.1 * mean
            running_var[...] = 0.9 * running_var + 0.1 * unbiased * var
            return finish((x - mean) * (gamma / np.sqrt(var + EPS)) + beta)

        return call

    def inference(self, case: Case, data: Data) -> Call:
        _axes, gamma, beta, mean, var = self._broadcast(case, data)
        finish = self._finish(case, data)
        return lambda: finish((self._wide(data.x) - mean) * (gamma / np.sqrt(var + EPS)) + beta)

    def backward(self, case: Case, data: Data) -> Call:
        axes, gamma, _beta, mean, var = self._broadcast(case, data)
        rstd = 1 / np.sqrt(var + EPS)
        count = data.x.size // gamma.size
        assert data.dy is not None
        given, y, zero = data.dy, data.y, data.x.dtype.type(0)

        def call() -> tuple[Array, ...]:
            dy = given if y is None else np.where(y > 0, given, zero)
            normalized = (self._wide(data.x) - mean) * rstd
            dbeta = dy.sum(axes, keepdims=True, dtype=gamma.dtype)
            dgamma = (dy * normalized).sum(axes, keepdims=True)
            dx = (gamma * rstd) * (dy - dbeta / count - normalized * (dgamma / count))
            results = (dx.astype(data.x.dtype, copy=False), dgamma.ravel(), dbeta.ravel())
            return results + ((dy,) if case.residual else ())

        return call

    @staticmethod
    def _wide(x: Array) -> Array:
        return x if x.dtype.itemsize >= 4 else x.astype(np.float32)

    @staticmethod
    def _broadcast(case: Case, data: Data) -> tuple[tuple[int, ...], Array, Array, Array, Array]:
        """The axes of the statistics, and vectors that broadcast against x."""
        axes = (0, 2, 3) if case.layout == "nchw" else (0, 1, 2)
        gamma, beta, mean, var = (np.expand_dims(v, axes) for v in (data.gamma, data.beta, data.mean, data.var))
        return axes, gamma, beta, mean.astype(gamma.dtype), var.astype(gamma.dtype)

    @staticmethod
    def _finish(case: Case, data: Data) -> Callable[[Array], Array]:
        def finish(y: Array) -> Array:
            if case.residual:
                y += data.residual
            if case.function == "relu":
                np.maximum(y, 0, out=y)
            return y.astype(data.x.dtype, copy=False)

        return finish


class Numba(Contender):
    """Loops over channels or rows under prange, one new output per call."""

    residual = False

    def load(self) -> None:
        import numba

        import numba_kernels

        self._numba, self._kernels = numba, numba_kernels
        numba.set_num_threads(self.threads)

    def versions(self) -> dict[str, str]:
        return {"numba": self._numba.__version__, "threading layer": self._numba.config.THREADING_LAYER}

    @staticmethod
    def _triple(x: Array, case: Case) -> Array:
        s = case.shape
        return x.reshape((s.N, s.C, s.H * s.W) if case.layout == "nchw" else (s.N * s.H * s.W, s.C))

    def _kernel(self, case: Case) -> Callable[..., Any]:
        kernel: Callable[..., Any] = getattr(self._kernels, f"{case.op}_{case.layout}")
        return kernel

    def forward(self, case: Case, data: Data) -> Call:
        x, kernel, relu = self._triple(data.x, case), self._kernel(case), case.function == "relu"
        running = np.zeros((2, case.shape.C), data.gamma.dtype)
        return lambda: kernel(x, data.gamma, data.beta, running, EPS, relu)

    def inference(self, case: Case, data: Data) -> Call:
        x, kernel, relu = self._triple(data.x, case), self._kernel(case), case.function == "relu"
        mean, var = data.mean.astype(x.dtype), data.var.astype(x.dtype)
        return lambda: kernel(x, data.gamma, data.beta, mean, var, EPS, relu)

    def backward(self, case: Case, data: Data) -> Call:
        assert data.dy is not None
        y = data.dy if data.y is None else data.y  # read under relu only
        x, dy, y = (self._triple(array, case) for array in (data.x, data.dy, y))
        kernel, relu = self._kernel(case), case.function == "relu"
        mean, rstd = data.mean.astype(x.dtype), (1 / np.sqrt(data.var + EPS)).astype(x.dtype)
        return lambda: kernel(dy, x, y, data.gamma, mean, rstd, relu)

    def arrays(self, returned: Any, case: Case) -> list[Array]:
        s = case.shape
        results = super().arrays(returned, case)
        shape = (s.N, s.C, s.H, s.W) if case.layout == "nchw" else (s.N, s.H, s.W, s.C)
        return [results[0].reshape(shape), *results[1:]]


# In order of importance: where memory does not suffice for all, the last ones stay out.
CONTENDERS: dict[str, type[Contender]] = {
    "limit-plain": Limit,
    "limit-stream": LimitStream,
    "limit-serial": LimitSerial,
    READ_PASS: ReadPass,
    "fastbn-out": FastBN,
    "fastbn-recycled": FastBNRecycled,
    "fastbn-fresh": FastBNFresh,
    "fastbn-streamed": FastBNStreamed,
    "torch": Torch,
    "torch-compiled": TorchCompiled,
    "onednn": OneDNN,
    "onednn-blocked": OneDNNBlocked,
    "onnxruntime": OnnxRuntime,
    "jax": Jax,
    "numba": Numba,
    "numpy": Numpy,
}
# These answer a question, and take part only by name.
BY_NAME = (READ_PASS, "fastbn-streamed")
GROUPS = {
    "limit": list(LIMITS),
    "fastbn": ["fastbn-out", "fastbn-recycled", "fastbn-fresh"],
}
