"""The exceptions of fastbn. Each is also the built-in exception that a caller would expect."""

__all__ = [
    "AliasError",
    "ArgumentError",
    "DTypeError",
    "DeviceError",
    "FastBNError",
    "NonFiniteError",
    "ReadOnlyError",
    "ShapeError",
    "SingleValueError",
]


class FastBNError(Exception):
    """Base of every exception that functions and layers raise on purpose. After one of them nothing has been written.

    `fastbn.nn`, the trainer, has CheckpointError and DataError besides, and raises ValueError and TypeError.
    """


class ShapeError(FastBNError, ValueError):
    """An array has the wrong rank or shape, or the axis does not exist."""


class SingleValueError(FastBNError, ValueError):
    """Training with one value per channel: its variance is zero, and every output would be beta."""


class ArgumentError(FastBNError, ValueError):
    """An argument has a value that is not accepted, or contradicts another one."""


class ReadOnlyError(FastBNError, ValueError):
    """An array that must be written cannot be written."""


class AliasError(FastBNError, ValueError):
    """An array that is written shares memory with another one in a way that would spoil the result."""


class DTypeError(FastBNError, TypeError):
    """The data type of an array is not supported."""


class NonFiniteError(FastBNError, FloatingPointError):
    """The batch would bring NaN or Inf into running statistics, which ``nan_guard="raise"`` forbids."""


class DeviceError(FastBNError, RuntimeError):
    """The device is not available in this installation."""
