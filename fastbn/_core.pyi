"""The bridge to the compiled kernels. Nothing here checks an argument: callers do (`_check`, `_layout`).

Common arguments
    isa         index into `isas()`; the caller has made sure that it is available
    dtype       index into `dtypes()`
    activation  index into `activations()`, and the slope of leaky_relu
    threads     number of threads to use, >= 1
    planar      the kernel family: True for planar, False for interleaved
    shape       (outer, channels, inner); interleaved kernels require inner == 1; nothing is computed if one is 0
    _Operand    (array, (outer, channel, inner)): an array and its three strides in bytes
    vector      array of shape (channels,), of any float dtype and any stride
    statistics  float64 array of shape (STATISTICS_ROWS, channels), C-contiguous; its rows are the STATISTICS_* below
"""

from collections.abc import Mapping
from typing import Any, Final, TypeAlias, final

import numpy as np
import numpy.typing as npt

_Float64Array: TypeAlias = npt.NDArray[np.float64]
_Array: TypeAlias = npt.NDArray[Any]
_MaskArray: TypeAlias = npt.NDArray[np.uint8]
_Shape: TypeAlias = tuple[int, int, int]
_Operand: TypeAlias = tuple[npt.NDArray[np.generic], tuple[int, int, int]]

STATISTICS_MEAN: Final[int]  # mean, rounded to float64
STATISTICS_MEAN_LO: Final[int]  # what the rounding of the mean has lost
STATISTICS_M2: Final[int]  # sum of (x - mean)^2
STATISTICS_VAR: Final[int]  # population variance
STATISTICS_RSTD: Final[int]  # 1 / sqrt(var + eps), rounded to float64
STATISTICS_RSTD_LO: Final[int]  # what that rounding has lost
STATISTICS_GAMMA: Final[int]  # copies of the vectors that forward was given
STATISTICS_BETA: Final[int]
STATISTICS_ROWS: Final[int]

OPENMP: Final[bool]  # compiled with OpenMP
DEBUG: Final[bool]  # compiled with FASTBN_DEBUG=1
COMPILER: Final[str]  # name and version of the C compiler
MEASURED_STREAM_BYTES: Final[int]  # of a call's arrays from which streaming stores pay

def isas() -> tuple[tuple[str, bool], ...]:
    """(name, available on this CPU and operating system) of every compiled ISA, best first."""

def processors() -> tuple[tuple[str, bool], ...]:
    """(name, whether it is this one) of every kind of processor on which sizes and tactics were measured."""

def set_processor(index: int) -> None:
    """Take those of another kind, but for `stream_bytes`: the same bits, perhaps slower. For tests."""

def dtypes() -> tuple[tuple[str, str], ...]:
    """(code, NumPy name) of every dtype, e.g. ("f32", "float32")."""

def activations() -> tuple[tuple[str, bool], ...]:
    """(name, whether its gradient needs the argument and not only a bit of it); the first is "identity"."""

def activation_formulas() -> tuple[tuple[str, str, str, str], ...]:
    """Of every activation, as src_c/activations.def has them: y, open, and the gradients where open and where shut."""

def stream_bytes() -> int:
    """Bytes of a call's arrays together from which its results are stored past the caches."""

def set_stream_bytes(nbytes: int) -> None:
    """Store results past the caches where the arrays of a call have so many bytes together."""

def mask_nbytes(planar: bool, shape: _Shape, itemsize: int) -> int:
    """Bytes of the mask that `forward` fills when an activation follows a residual."""

def statistics(
    isa: int, dtype: int, threads: int, planar: bool, shape: _Shape, x: _Operand, statistics: _Float64Array
) -> None:
    """Fill the rows from x, up to STATISTICS_VAR."""

def forward(
    isa: int,
    dtype: int,
    threads: int,
    planar: bool,
    shape: _Shape,
    x: _Operand,
    residual: _Operand | None,
    y: _Operand,
    mask: _MaskArray | None,
    activation: tuple[int, float],
    gamma: _Array | None,
    beta: _Array | None,
    running_mean: _Array | None,
    running_var: _Array | None,
    eps: float,
    training: bool,
    momentum: float,
    unbiased: bool,
    counter: npt.NDArray[np.int64] | None,
    finite_only: bool,
    finite_first: bool,
    keep: bool,
) -> _Float64Array:
    """Write y; return the statistics: all that backward needs if they are to be kept, else the mean and the variance of
    a batch.

    Training takes them from x, and updates running vectors if there are some: computed in float64 and rounded once,
    both or none, and `counter` with them. `finite_only`: not with statistics that are not finite; `finite_first`: nor
    is y written then. Inference takes them from the running vectors. All vectors are converted in the default
    floating-point mode.
    """

def backward(
    isa: int,
    dtype: int,
    threads: int,
    planar: bool,
    shape: _Shape,
    x: _Operand,
    residual: _Operand | None,
    dy: _Operand,
    dx: _Operand,
    dresidual: _Operand | None,
    mask: _MaskArray | None,
    activation: tuple[int, float],
    statistics: _Float64Array,
    training: bool,
    gamma_dtype: np.dtype[Any] | None,
    beta_dtype: np.dtype[Any] | None,
) -> tuple[_Array | None, _Array | None]:
    """Write dx (and dresidual); return dgamma and dbeta in these dtypes, None where forward had no such vector.

    A residual is given if the gradient of the activation needs its argument, which is rebuilt. dx may be dy itself.
    `statistics` are what forward has returned.
    """

def spans_overlap(a: _Array, b: _Array | None) -> bool:
    """Whether the memory from the first to the last byte of one array meets that of the other.

    The elements between may still be apart (`numpy.shares_memory`). An empty array has no memory.
    """

@final
class Accepted:
    """Remembers what checks have made of options: of the same objects they would make the same again.

    Of `arrays`, some names of `defaults`, only whether there is one counts; all other options must be immutable.
    """

    def __init__(self, defaults: Mapping[str, object], arrays: tuple[str, ...]) -> None: ...
    def recall(self, given: Mapping[str, object]) -> tuple[Any, list[Any]] | None:
        """What was remembered of these options, and the arrays, in the order of `defaults`; None if nothing was."""

    def remember(self, given: Mapping[str, object], result: object) -> None:
        """Of these options."""

def are_ordinary(
    x: _Array,
    residual: Any,
    out: Any,
    over_x: bool,
    over_residual: bool,
    channels: int,
    gamma: Any,
    beta: Any,
    running_mean: Any,
    running_var: Any,
    update: bool,
) -> bool:
    """Whether the arrays of forward pass every check without a closer look. x has a dense view.

    They do if `residual` and `out` are None or plain ndarrays with the dtype, shape and strides of x, the vectors None
    or plain ones of float32 or float64, and what is written (`out`; if `update`, the running vectors) is writable and
    meets nothing else; but `out` may be x itself, or the residual, where the caller says so.
    """

def is_ordinary_gradient(x: _Array, dy: Any, out: Any) -> bool:
    """Likewise for backward, whose `out` may be dy itself."""

def description(array: _Array, axis: int) -> bytes:
    """Dtype, byte order, alignment, shape, strides and the axis: equal for arrays that differ in values at most."""

def empty_like(array: _Array, dtype: np.dtype[Any] | None = None) -> _Array:
    """numpy.empty_like(array, dtype, subok=False); a large one from the blocks that are kept (see `fastbn.memory`)."""

def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> _Array:
    """numpy.empty(shape, dtype); likewise."""

def set_cache_limit(limit: int) -> None:
    """Keep at most so many bytes in idle blocks, from now on; 0 leaves arrays below 32 MiB to NumPy too."""

def empty_cache() -> None:
    """Return all idle blocks to the system."""

def cache_info() -> tuple[int, int, int, int, int]:
    """(limit, bytes of idle blocks, idle blocks, results from one of them, results from new memory)."""

def copy(
    isa: int, threads: int, destination: npt.NDArray[np.uint8], source: npt.NDArray[np.uint8], stream: bool
) -> None:
    """Copy equal numbers of bytes, with streaming stores if asked; for `runtime.copy_speed`."""

def openmp_limit() -> int:
    """Threads that OpenMP would use now (1 without OpenMP); 0 if the caller runs inside a parallel region of it."""
