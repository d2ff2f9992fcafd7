"""The frameworks: PyTorch eager and compiled, JAX, ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from base import Call, Contender, UnsupportedError
from cases import DTYPES, EPS, Array, Case, Data


class Torch(Contender):
    """Eager, a new output per call: contiguous tensors for nchw, channels_last for nhwc. Backward is the operator that
    autograd calls, without autograd."""

    dtypes = tuple(DTYPES)
    compiled = False

    def load(self) -> None:
        import torch

        self._torch = torch
        torch.set_num_threads(self.threads)
        torch.set_grad_enabled(False)

    def versions(self) -> dict[str, str]:
        return {"torch": self._torch.__version__}

    def _tensor(self, array: Array, case: Case) -> Any:
        torch = self._torch
        if array.dtype.name == "bfloat16":
            tensor = torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(array)
        return tensor.permute(0, 3, 1, 2) if case.layout == "nhwc" and array.ndim == 4 else tensor

    def _ready(self, function: Callable[..., Any], *arguments: Any) -> Call:
        if self.compiled:
            self._torch._dynamo.reset()
            function = self._torch.compile(function, fullgraph=True, dynamic=False)
        return lambda: function(*arguments)

    def _normalize(self, case: Case, data: Data, training: bool) -> Call:
        normalize = self._torch.nn.functional.batch_norm
        relu = case.function == "relu"
        tensors = [
            self._tensor(array, case) for array in (data.x, data.mean.copy(), data.var.copy(), data.gamma, data.beta)
        ]

        def function(x: Any, mean: Any, var: Any, gamma: Any, beta: Any, residual: Any) -> Any:
            y = normalize(x, mean, var, gamma, beta, training, 0.1, EPS)
            if residual is not None:
                y = y.add_(residual)
            return y.relu_() if relu else y

        residual = None if data.residual is None else self._tensor(data.residual, case)
        return self._ready(function, *tensors, residual)

    def forward(self, case: Case, data: Data) -> Call:
        return self._normalize(case, data, True)

    def inference(self, case: Case, data: Data) -> Call:
        return self._normalize(case, data, False)

    def backward(self, case: Case, data: Data) -> Call:
        assert data.dy is not None
        operators = self._torch.ops.aten
        x, gamma, beta = (self._tensor(array, case) for array in (data.x, data.gamma, data.beta))
        relu, residual = case.function == "relu", case.residual
        _, mean, rstd = operators.native_batch_norm(x, gamma, beta, None, None, True, 0.1, EPS)

        def function(dy: Any, y: Any) -> Any:
            g = operators.threshold_backward(dy, y, 0) if relu else dy
            results = operators.native_batch_norm_backward(
                g, x, gamma, None, None, mean, rstd, True, EPS, [True, True, True]
            )
            return (*results, g) if residual else results

        y = None if data.y is None else self._tensor(data.y, case)
        return self._ready(function, self._tensor(data.dy, case), y)

    def arrays(self, returned: Any, case: Case) -> list[Array]:
        results = []
        for tensor in returned if isinstance(returned, (tuple, list)) else [returned]:
            turned = tensor.permute(0, 2, 3, 1) if case.layout == "nhwc" and tensor.ndim == 4 else tensor
            # Tolerances are those of the dtype that was asked for: widening loses nothing.
            results.append((turned.float() if turned.element_size() == 2 else turned).numpy())
        return results


class TorchCompiled(Torch):
    """Compiled by Inductor for exactly this shape."""

    compiled = True

    def release(self) -> None:
        self._torch._dynamo.reset()


class Jax(Contender):
    """The formula under jit, a new output per call."""

    dtypes = tuple(DTYPES)

    def load(self) -> None:
        import os

        os.environ["JAX_PLATFORMS"] = "cpu"
        import jax

        jax.config.update("jax_enable_x64", True)
        self._jax = jax

    def versions(self) -> dict[str, str]:
        import jaxlib

        return {"jax": self._jax.__version__, "jaxlib": jaxlib.__version__}

    def _ready(self, function: Callable[..., Any], *arrays: Array | None) -> Call:
        jax = self._jax
        jitted, wait = jax.jit(function), jax.block_until_ready
        arguments = [None if array is None else jax.device_put(array) for array in arrays]
        return lambda: wait(jitted(*arguments))

    @staticmethod
    def _wide(x: Any) -> Any:
        return x if x.dtype.itemsize >= 4 else x.astype(np.float32)

    def _normalize(self, case: Case, data: Data, training: bool) -> Call:
        jnp = self._jax.numpy
        axes = (0, 2, 3) if case.layout == "nchw" else (0, 1, 2)
        relu, count = case.function == "relu", data.x.size // data.gamma.size

        def function(x: Any, gamma: Any, beta: Any, mean: Any, var: Any, residual: Any) -> Any:
            wide, running = self._wide(x), None
            if training:
                batch_mean, batch_var = wide.mean(axes), wide.var(axes)
                running = 0.9 * mean + 0.1 * batch_mean, 0.9 * var + 0.1 * count / (count - 1) * batch_var
                mean, var = batch_mean, batch_var
            gamma, beta, mean, var = (jnp.expand_dims(v, axes) for v in (gamma, beta, mean, var))
            y = (wide - mean) * (gamma / jnp.sqrt(var + EPS)) + beta
            y = y if residual is None else y + residual
            y = jnp.where(y < 0, 0, y) if relu else y
            return y.astype(x.dtype), running

        kind = data.gamma.dtype
        arrays = (data.x, data.gamma, data.beta, data.mean.astype(kind), data.var.astype(kind), data.residual)
        return self._ready(function, *arrays)

    def forward(self, case: Case, data: Data) -> Call:
        return self._normalize(case, data, True)

    def inference(self, case: Case, data: Data) -> Call:
        return self._normalize(case, data, False)

    def backward(self, case: Case, data: Data) -> Call:
        jnp = self._jax.numpy
        axes = (0, 2, 3) if case.layout == "nchw" else (0, 1, 2)
        relu, count = case.function == "relu", data.x.size // data.gamma.size

        def function(dy: Any, x: Any, y: Any, gamma: Any, mean: Any, rstd: Any) -> Any:
            gamma, mean, rstd = (jnp.expand_dims(v, axes) for v in (gamma, mean, rstd))
            g = self._wide(jnp.where(y > 0, dy, 0) if relu else dy)
            normalized = (self._wide(x) - mean) * rstd
            dbeta, dgamma = g.sum(axes, keepdims=True), (g * normalized).sum(axes, keepdims=True)
            dx = (gamma * rstd) * (g - dbeta / count - normalized * (dgamma / count))
            results = dx.astype(x.dtype), dgamma.ravel(), dbeta.ravel()
            return (*results, g.astype(x.dtype)) if case.residual else results

        kind = data.gamma.dtype
        mean, rstd = data.mean.astype(kind), (1 / np.sqrt(data.var + EPS)).astype(kind)
        return self._ready(function, data.dy, data.x, data.y, data.gamma, mean, rstd)

    def arrays(self, returned: Any, case: Case) -> list[Array]:
        results = returned if case.op == "backward" else returned[:1]
        return [np.asarray(result) for result in results]


class OnnxRuntime(Contender):
    """A model of one or three nodes; its output comes from the arena of the runtime, so it is recycled memory."""

    dtypes = ("f32", "f64", "f16")

    def load(self) -> None:
        import onnx
        import onnxruntime

        self._onnx, self._runtime = onnx, onnxruntime

    def versions(self) -> dict[str, str]:
        return {"onnxruntime": self._runtime.__version__}

    def inference(self, case: Case, data: Data) -> Call:
        if case.layout != "nchw":
            raise UnsupportedError("its batch normalization is NCHW only")
        helper, kind = self._onnx.helper, self._onnx.helper.np_dtype_to_tensor_dtype(data.x.dtype)
        names = ("gamma", "beta", "mean", "var")
        vectors = [
            self._onnx.numpy_helper.from_array(getattr(data, name).astype(data.gamma.dtype), name) for name in names
        ]
        nodes = [helper.make_node("BatchNormalization", ["x", *names], ["v0"], epsilon=EPS)]
        if case.residual:
            nodes.append(helper.make_node("Add", [nodes[-1].output[0], "residual"], ["v1"]))
        if case.function == "relu":
            nodes.append(helper.make_node("Relu", [nodes[-1].output[0]], ["v2"]))
        inputs = ["x"] + (["residual"] if case.residual else [])
        tensors = [helper.make_tensor_value_info(name, kind, data.x.shape) for name in inputs]
        output = nodes[-1].output[0]
        graph = helper.make_graph(
            nodes, "bn", tensors, [helper.make_tensor_value_info(output, kind, data.x.shape)], vectors
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        session = self._runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        values = {name: self._runtime.OrtValue.ortvalue_from_numpy(getattr(data, name)) for name in inputs}
        return lambda: session.run_with_ort_values([output], values)

    def arrays(self, returned: Any, case: Case) -> list[Array]:
        return [returned[0].numpy()]
