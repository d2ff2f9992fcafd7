"""oneDNN's batch normalization primitive through its C interface (version 3), with buffers of the caller.

The library is the one named by ONEDNN_LIBRARY, else libdnnl.so.3 where `pip install onednn-cpu-gomp` puts it (oneDNN
3.2 with GNU's OpenMP; the newest `onednn` package is built for SYCL), else that of the system.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from base import Call, Contender, UnsupportedError
from cases import EPS, Array, Case, Data, aligned, aligned_like

# Values of dnnl_types.h, which are part of the stable interface.
CPU, IN_ORDER, F32 = 1, 1, 3
FORWARD_TRAINING, FORWARD_INFERENCE, BACKWARD = 64, 96, 128
USE_GLOBAL_STATS, USE_SCALE, USE_SHIFT, FUSE_NORM_RELU = 1, 2, 4, 8
SRC, DST, MEAN, VARIANCE, SCALE, SHIFT, WORKSPACE = 1, 17, 49, 50, 51, 52, 64
DIFF_SRC, DIFF_DST, DIFF_SCALE, DIFF_SHIFT = 129, 145, 255, 256
TAG_A, TAG_ABCD, TAG_ACDB, TAG_BLOCKED = 2, 5, 22, 78  # a, nchw, nhwc, nChw16c
QUERY_IMPLEMENTATION, QUERY_WORKSPACE = 8, 135
BLOCK = 16

Handle = ctypes.c_void_p


class Argument(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_int), ("memory", Handle))


class Version(ctypes.Structure):
    _fields_ = (("major", ctypes.c_int), ("minor", ctypes.c_int), ("patch", ctypes.c_int))


def find_library() -> Any:
    installed = Path(sys.prefix) / "lib" / "libdnnl.so.3"
    name = os.environ.get("ONEDNN_LIBRARY") or (
        str(installed) if installed.exists() else ctypes.util.find_library("dnnl")
    )
    if not name:
        raise ImportError("no libdnnl.so.3: pip install onednn-cpu-gomp, or set ONEDNN_LIBRARY")
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise ImportError(f"{name} cannot be loaded: {error}") from error
    library.dnnl_version.restype = ctypes.POINTER(Version)
    if library.dnnl_version().contents.major != 3:
        raise ImportError(f"{name} is not version 3 of oneDNN")
    library.dnnl_primitive_desc_query_md.restype = Handle
    library.dnnl_memory_desc_get_size.restype = ctypes.c_size_t
    return library


class OneDNN(Contender):
    """The plain layout of the case: nchw or nhwc. Running statistics are left to the caller, as there."""

    dtypes = ("f32",)
    residual = False
    blocked = False
    can_be_read = True

    def load(self) -> None:
        self._library = find_library()
        self._engine, self._stream = Handle(), Handle()
        self._check("engine_create", ctypes.byref(self._engine), CPU, ctypes.c_size_t(0))
        self._check("stream_create", ctypes.byref(self._stream), self._engine, IN_ORDER)
        self._handles: list[tuple[str, Handle]] = []
        self._keep: list[Any] = []

    def versions(self) -> dict[str, str]:
        version = self._library.dnnl_version().contents
        return {"onednn": f"{version.major}.{version.minor}.{version.patch}"}

    def release(self) -> None:
        for kind, handle in reversed(self._handles):
            self._check(f"{kind}_destroy", handle)
        self._handles.clear()
        self._keep.clear()

    def _check(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, f"dnnl_{function}")(*arguments)
        if status:
            raise UnsupportedError(f"dnnl_{function} returns status {status}")

    def _make(self, kind: str, function: str, *arguments: Any) -> Handle:
        handle = Handle()
        self._check(function, ctypes.byref(handle), *arguments)
        self._handles.append((kind, handle))
        return handle

    def _describe(self, shape: tuple[int, ...], tag: int) -> Handle:
        dims = (ctypes.c_int64 * 12)(*shape)
        return self._make("memory_desc", "memory_desc_create_with_tag", len(shape), dims, F32, tag)

    def _memory(self, description: Any, array: Array) -> Handle:
        self._keep.append(array)
        return self._make("memory", "memory_create", description, self._engine, Handle(array.ctypes.data))

    def _call(self, descriptor: Handle, memories: dict[int, Handle], result: Any) -> Call:
        primitive = self._make("primitive", "primitive_create", descriptor)
        arguments = (Argument * len(memories))(*(Argument(arg, memory) for arg, memory in memories.items()))
        execute, wait = self._library.dnnl_primitive_execute, self._library.dnnl_stream_wait
        stream, count = self._stream, len(memories)

        def call() -> Any:
            if execute(primitive, stream, count, arguments) or wait(stream):
                raise RuntimeError("oneDNN failed")
            return result

        return call

    def _tensor(self, values: Array, case: Case) -> Array:
        """A copy in the layout of the primitive."""
        if self.blocked:
            n, c, h, w = values.shape
            values = values.reshape(n, c // BLOCK, BLOCK, h, w).transpose(0, 1, 3, 4, 2)
        copy = aligned(values.shape, values.dtype, self.offset)
        copy[...] = values
        return copy

    def _tag(self, case: Case) -> int:
        if not self.blocked:
            return {"nchw": TAG_ABCD, "nhwc": TAG_ACDB}[case.layout]
        if case.layout != "nchw" or case.shape.C % BLOCK:
            raise UnsupportedError("nChw16c stands beside nchw, for multiples of 16 channels")
        return TAG_BLOCKED

    def _normalize(self, case: Case, data: Data, kind: int, flags: int) -> tuple[Handle, dict[int, Handle], Array]:
        """Descriptor, memories and y of forward."""
        s = case.shape
        flags |= USE_SCALE | USE_SHIFT | (FUSE_NORM_RELU if case.function == "relu" else 0)
        tensor, vector = self._describe((s.N, s.C, s.H, s.W), self._tag(case)), self._describe((s.C,), TAG_A)
        epsilon = ctypes.c_float(EPS)
        descriptor = self._make(
            "primitive_desc",
            "batch_normalization_forward_primitive_desc_create",
            *(self._engine, kind, tensor, tensor, epsilon, flags, None),
        )
        x = self._tensor(data.x, case)
        y = aligned_like(x, self.offset)
        memories = {SRC: self._memory(tensor, x), DST: self._memory(tensor, y)}
        for arg, values in ((MEAN, data.mean), (VARIANCE, data.var), (SCALE, data.gamma), (SHIFT, data.beta)):
            memories[arg] = self._memory(vector, np.array(values, np.float32))
        if kind == FORWARD_TRAINING and case.function == "relu":
            space = self._library.dnnl_primitive_desc_query_md(descriptor, QUERY_WORKSPACE, 0)
            size = self._library.dnnl_memory_desc_get_size(Handle(space))
            memories[WORKSPACE] = self._memory(Handle(space), aligned((size,), np.uint8))
        return descriptor, memories, y

    def forward(self, case: Case, data: Data) -> Call:
        return self._call(*self._normalize(case, data, FORWARD_TRAINING, 0))

    def inference(self, case: Case, data: Data) -> Call:
        return self._call(*self._normalize(case, data, FORWARD_INFERENCE, USE_GLOBAL_STATS))

    def backward(self, case: Case, data: Data) -> Call:
        hint, memories, y = self._normalize(case, data, FORWARD_TRAINING, 0)
        self._call(hint, memories, y)()  # fills mean, variance and workspace
        assert data.dy is not None
        s = case.shape
        flags = USE_SCALE | USE_SHIFT | (FUSE_NORM_RELU if case.function == "relu" else 0)
        tensor, vector = self._describe((s.N, s.C, s.H, s.W), self._tag(case)), self._describe((s.C,), TAG_A)
        descriptor = self._make(
            "primitive_desc",
            "batch_normalization_backward_primitive_desc_create",
            *(self._engine, BACKWARD, tensor, tensor, tensor, ctypes.c_float(EPS), flags, hint, None),
        )
        dy = self._tensor(data.dy, case)
        dx = aligned_like(dy, self.offset)
        dgamma, dbeta = np.empty(s.C, np.float32), np.empty(s.C, np.float32)
        del memories[SHIFT], memories[DST]
        memories |= {DIFF_DST: self._memory(tensor, dy), DIFF_SRC: self._memory(tensor, dx)}
        memories |= {DIFF_SCALE: self._memory(vector, dgamma), DIFF_SHIFT: self._memory(vector, dbeta)}
        return self._call(descriptor, memories, (dx, dgamma, dbeta))

    def arrays(self, returned: Any, case: Case) -> list[Array]:
        results = super().arrays(returned, case)
        if self.blocked:
            s = case.shape
            results[0] = results[0].transpose(0, 1, 4, 2, 3).reshape(s.N, s.C, s.H, s.W)
        return results


class OneDNNBlocked(OneDNN):
    """nChw16c, the layout in which oneDNN's own networks keep their tensors."""

    blocked = True
