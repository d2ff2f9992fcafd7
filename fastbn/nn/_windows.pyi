"""Windows of images, compiled. Arrays are C-contiguous and of one dtype, float32 or float64.

Common arguments
    geometry    channels, height and width of an image; height and width of a window, of a stride; zeros above the image
                and to its left; windows from top to bottom and from left to right
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy.typing as npt

_Array: TypeAlias = npt.NDArray[Any]
_Geometry: TypeAlias = tuple[int, ...]

def for_each(function: Callable[[int], object], count: int, num_threads: int) -> None: ...
def exchange(
    x: _Array, columns: _Array, line: int, lines: int, geometry: _Geometry, channels_last: bool, back: bool
) -> None: ...
def max_pool(x: _Array, y: _Array, places: _Array, geometry: _Geometry) -> None: ...
def max_unpool(dy: _Array, places: _Array, dx: _Array) -> None: ...
