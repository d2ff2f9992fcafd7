"""The bridge to the compiled kernels. Nothing here checks an argument: callers do (`_check`, `_layout`).

Common arguments
    isa         index into `isas()`; the caller has made sure that it is available
    dtype       index into `dtypes()`
    activation  index into `activations()`
    threads     number of threads to use, >= 1
    planar      the kernel family: True for planar, False for interleaved
    shape       (outer, channels, inner), every one >= 1; interleaved kernels require inner == 1
    Operand     (array, (outer, channel, inner)): an array and its three strides in bytes
    statistics  float64 array of shape (5, channels), C-contiguous; its rows are the STATISTICS_* below
"""

from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

Float64Array: TypeAlias = npt.NDArray[np.float64]
MaskArray: TypeAlias = npt.NDArray[np.uint8]
Shape: TypeAlias = tuple[int, int, int]
Operand: TypeAlias = tuple[npt.NDArray[np.generic], tuple[int, int, int]]

STATISTICS_MEAN: Final[int]  # mean, rounded to float64
STATISTICS_MEAN_LO: Final[int]  # what the rounding of the mean has lost
STATISTICS_M2: Final[int]  # sum of (x - mean)^2
STATISTICS_VAR: Final[int]  # population variance
STATISTICS_RSTD: Final[int]  # 1 / sqrt(var + eps)

OPENMP: Final[bool]  # compiled with OpenMP
DEBUG: Final[bool]  # compiled with FASTBN_DEBUG=1
COMPILER: Final[str]  # name and version of the C compiler

def isas() -> tuple[tuple[str, bool], ...]:
    """(name, available on this CPU and operating system) of every compiled ISA, best first."""

def dtypes() -> tuple[tuple[str, str], ...]:
    """(code, NumPy name) of every dtype, e.g. ("f32", "float32")."""

def activations() -> tuple[str, ...]:
    """Names of the activations; the first is "identity"."""

def mask_nbytes(planar: bool, shape: Shape) -> int:
    """Bytes of the mask that `forward` fills when an activation follows a residual."""

def statistics(
    isa: int, dtype: int, threads: int, planar: bool, shape: Shape, x: Operand, statistics: Float64Array
) -> None:
    """Fill all rows but rstd from x."""

def forward(
    isa: int,
    dtype: int,
    threads: int,
    planar: bool,
    shape: Shape,
    x: Operand,
    residual: Operand | None,
    y: Operand,
    mask: MaskArray | None,
    activation: int,
    gamma: Float64Array | None,
    beta: Float64Array | None,
    eps: float,
    statistics: Float64Array,
    training: bool,
) -> None:
    """Write y. Training fills all of `statistics` from x; inference reads mean, mean_lo and var and fills rstd."""

def backward(
    isa: int,
    dtype: int,
    threads: int,
    planar: bool,
    shape: Shape,
    x: Operand,
    dy: Operand,
    dx: Operand,
    dresidual: Operand | None,
    mask: MaskArray | None,
    activation: int,
    gamma: Float64Array | None,
    beta: Float64Array | None,
    statistics: Float64Array,
    training: bool,
    dgamma: Float64Array,
    dbeta: Float64Array,
) -> None:
    """Write dx (and dresidual), dgamma and dbeta. dx may be dy itself."""

class DefaultMode:
    """Context manager: round to nearest and keep denormals in this thread, whatever another library has set.

    The kernels see to that themselves; this is for the conversions that NumPy does around them.
    """

    def __enter__(self) -> None: ...
    def __exit__(self, *exception: object) -> None: ...

def update_running(running: Float64Array, batch: Float64Array, momentum: float) -> None:
    """running = (1 - momentum) * running + momentum * batch, in place."""

def copy(
    isa: int, threads: int, destination: npt.NDArray[np.uint8], source: npt.NDArray[np.uint8], stream: bool
) -> None:
    """Copy equal numbers of bytes, with streaming stores if asked; for `runtime.copy_speed`."""

def openmp_max_threads() -> int:
    """What OpenMP would use now (1 without OpenMP)."""

def openmp_in_parallel() -> bool:
    """Whether the caller runs inside an OpenMP parallel region."""
