"""Batch normalization for NumPy arrays at the speed of memory: training, inference and backward."""

from . import cuda, memory, reference, runtime
from .errors import (
    AliasError,
    ArgumentError,
    DeviceError,
    DTypeError,
    FastBNError,
    NonFiniteError,
    ReadOnlyError,
    ShapeError,
    SingleValueError,
)
from .folding import fold_into_conv
from .functional import (
    BatchNormCache,
    Gradients,
    batchnorm,
    batchnorm1d,
    batchnorm1d_forward,
    batchnorm2d,
    batchnorm2d_forward,
    batchnorm3d,
    batchnorm3d_forward,
    batchnorm_backward,
    batchnorm_forward,
)
from .layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .memory import cache_info, empty_cache, set_cache_limit
from .runtime import get_num_threads, set_num_threads, show_config, threads
from .stats import Stats, batchnorm_stats

__version__ = runtime.version()

__all__ = [
    "AliasError",
    "ArgumentError",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormCache",
    "DTypeError",
    "DeviceError",
    "FastBNError",
    "Gradients",
    "NonFiniteError",
    "ReadOnlyError",
    "ShapeError",
    "SingleValueError",
    "Stats",
    "batchnorm",
    "batchnorm1d",
    "batchnorm1d_forward",
    "batchnorm2d",
    "batchnorm2d_forward",
    "batchnorm3d",
    "batchnorm3d_forward",
    "batchnorm_backward",
    "batchnorm_forward",
    "batchnorm_stats",
    "cache_info",
    "cuda",
    "empty_cache",
    "fold_into_conv",
    "get_num_threads",
    "memory",
    "reference",
    "runtime",
    "set_cache_limit",
    "set_num_threads",
    "show_config",
    "threads",
]
