"""How an array becomes (outer, channels, inner) with three strides, or must be copied first.

Planar kernels walk runs of `inner` values of one channel; interleaved kernels walk runs of channels and have inner ==
1. An array fits a family if its axes merge in nominal order: axes are never sorted, since the order of the values
decides the bits. This arithmetic depends on shape and strides only and is cached; its results are tuples, so a forked
child may use them too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from . import _core, runtime

Array: TypeAlias = npt.NDArray[Any]
Extents: TypeAlias = tuple[int, ...]
Triple: TypeAlias = tuple[int, int, int]

# Per number of dimensions (batch and channels not counted, as in the names of the functions): the layouts, and which
# one is meant where none is given. A layout is a string with one letter per axis; C is the channel axis.
LAYOUTS: dict[int, tuple[str, ...]] = {1: ("NC", "NCL", "NLC"), 2: ("NCHW", "NHWC"), 3: ("NCDHW", "NDHWC")}
DEFAULT_LAYOUTS: dict[int, dict[int, str]] = {
    dimensions: {len(layout): layout for layout in reversed(layouts)} for dimensions, layouts in LAYOUTS.items()
}

# Per number of dimensions: (layout or None, rank of x) -> channel axis.
CHANNEL_AXES: dict[int, dict[tuple[str | None, int], int]] = {
    dimensions: {(layout, len(layout)): layout.index("C") for layout in layouts}
    | {(None, rank): layout.index("C") for rank, layout in DEFAULT_LAYOUTS[dimensions].items()}
    for dimensions, layouts in LAYOUTS.items()
}


class View(NamedTuple):
    """An array as the kernels see it; strides in bytes."""

    planar: bool
    shape: Triple
    strides: Triple
    dense: bool  # a new array like this one has the same strides

    def threads(self, given: int | None, nbytes: int, sums: bool) -> int:
        """Threads for one call, with sums or without."""
        if given is None and nbytes < runtime.BYTES_PER_THREAD:  # as most small calls, before all else
            return 1
        channels = self.shape[1]
        if self.planar:
            return runtime.choose_threads(given, nbytes, own=channels if sums else 0)
        return runtime.choose_threads(given, nbytes, shared=channels)


def _merged_stride(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> int | None:
    """The one stride which visits these axes in nominal order, None if there is none. Axes of length 1 do not count."""
    merged = None
    span = 0
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if extent == 1:
            continue
        if merged is None:
            merged, span = stride, stride * extent
        elif stride == span:
            span *= extent
        else:
            return None
    return itemsize if merged is None else merged


def _interleaved(shape: Extents, strides: Extents, axis: int, itemsize: int) -> View | None:
    channels = shape[axis]
    stride = _merged_stride(shape[:axis] + shape[axis + 1 :], strides[:axis] + strides[axis + 1 :], itemsize)
    if channels == 1 or stride is None:
        return None
    return _view(False, (math.prod(shape) // channels, channels, 1), (stride, strides[axis], itemsize), itemsize)


def _planar(shape: Extents, strides: Extents, axis: int, itemsize: int) -> View | None:
    outer, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    before = _merged_stride(shape[:axis], strides[:axis], itemsize)
    after = _merged_stride(shape[axis + 1 :], strides[axis + 1 :], itemsize)
    if before is None or after is None:
        return None
    if inner == 1:  # (N, C): the batch is the run
        return _view(True, (1, shape[axis], outer), (itemsize, strides[axis], before), itemsize)
    channel = strides[axis] if shape[axis] > 1 else inner * after  # of one, any stride will do: planes then adjoin
    return _view(True, (outer, shape[axis], inner), (before, channel, after), itemsize)


def _view(planar: bool, shape: Triple, strides: Triple, itemsize: int) -> View:
    span = itemsize
    for stride, extent in sorted(zip(strides, shape, strict=True)):
        if extent > 1 and stride == span:
            span *= extent
    return View(planar, shape, strides, span == itemsize * math.prod(shape))


@lru_cache(maxsize=4096)
def view(shape: Extents, strides: Extents, axis: int, itemsize: int, planar: bool | None = None) -> View | None:
    """The kernels' view of an array, None if it does not reduce (to the wanted family, if given).

    Which family an array belongs to: interleaved if its channels are closer together than its other values, else
    planar. An array in which that question has no answer (no value at all; one value per channel; one value repeated by
    stride 0) suits both.
    """
    if 0 in shape:
        return View(planar is not False, (0, shape[axis], 0), (0, 0, 0), True)
    if any(stride % itemsize and extent > 1 for stride, extent in zip(strides, shape, strict=True)):
        return None
    flat = _planar(shape, strides, axis, itemsize)
    mixed = _interleaved(shape, strides, axis, itemsize)
    interleaved = suits_both = False
    if mixed is not None:
        between, channel, _ = mixed.strides
        single = mixed.shape[0] == 1
        interleaved = channel == itemsize if single else abs(channel) < abs(between)
        suits_both = single or between == 0 or channel == 0
    if planar is None:
        planar = not interleaved
    elif planar == interleaved and not suits_both:
        return None
    return flat if planar else mixed


class Plan(NamedTuple):
    """What follows from shape, strides, dtype, alignment and channel axis of x, whatever its values."""

    dtype: int | None  # None: not supported
    channels: int
    per_channel: int  # values
    view: View | None  # None: x must be copied


_plans: dict[bytes, Plan] = {}


def plan(x: Array, axis: int) -> Plan:
    """The plan of a call. One look-up, by the bytes of all that it follows from."""
    key = _core.description(x, axis)
    known = _plans.get(key)
    if known is not None:
        return known
    dtype, channels, seen = runtime.dtype_index(x.dtype), x.shape[axis], None
    if dtype is not None and x.dtype.isnative and x.flags.aligned:
        seen = view(x.shape, x.strides, axis, x.itemsize)
    new = Plan(dtype, channels, x.size // channels if channels else 0, seen)
    if len(_plans) >= 4096:
        _plans.clear()
    _plans[key] = new
    return new


@lru_cache(maxsize=4096)
def separate(strides: Extents, shape: Extents, itemsize: int) -> bool:
    """Whether no two elements of an array share memory, so that it can be written."""
    span = itemsize
    if 0 in shape:
        return True
    for stride, extent in sorted((abs(stride), extent) for stride, extent in zip(strides, shape, strict=True)):
        if extent > 1:
            if stride < span:
                return False
            span += stride * (extent - 1)
    return True


def allocate(shape: Extents, axis: int, dtype: np.dtype[Any], planar: bool) -> Array:
    """A new dense array of this nominal shape which reduces in this family."""
    if planar and math.prod(shape[axis + 1 :]) > 1:
        return _core.empty(shape, dtype)
    rest = (*shape[:axis], *shape[axis + 1 :])
    if planar:  # the runs are those of the batch
        return np.moveaxis(_core.empty((shape[axis], *rest), dtype), 0, axis)
    return np.moveaxis(_core.empty((*rest, shape[axis]), dtype), -1, axis)


def new_like(x: Array, axis: int, like: View) -> tuple[Array, Triple]:
    """A new array in the memory order of x, whose view is `like`, and its strides as the kernels see it."""
    y = _core.empty_like(x)
    if like.dense:
        return y, like.strides
    seen = view(y.shape, y.strides, axis, y.itemsize, like.planar)
    if seen is None:
        y = allocate(x.shape, axis, x.dtype, like.planar)
        seen = view(y.shape, y.strides, axis, y.itemsize, like.planar)
        assert seen is not None
    return y, seen.strides


def reduced(name: str, array: Array, axis: int, planar: bool | None = None) -> tuple[Array, View]:
    """The array itself and its view; or those of a copy, reported, where kernels cannot use it in place."""
    in_order = array.dtype.isnative and array.flags.aligned
    if in_order:
        seen = view(array.shape, array.strides, axis, array.itemsize, planar)
        if seen is not None:
            return array, seen
    if not array.dtype.isnative:
        reason = "its byte order is foreign"
    elif not array.flags.aligned or any(stride % array.itemsize for stride in array.strides):
        reason = "its elements are misaligned"
    elif planar is None:
        reason = f"its strides {array.strides} do not reduce to (outer, channels, inner)"
    else:
        reason = f"its strides {array.strides} do not suit the memory order of x"
    runtime.report(f"{name}: copied {array.nbytes} bytes of shape {array.shape}, because {reason}")
    dtype = array.dtype.newbyteorder("=")
    if planar is None:
        # The copy keeps the memory order if that suffices: a crop of a channels-last batch becomes channels-last.
        copy = _core.empty_like(array, dtype)
        seen = view(copy.shape, copy.strides, axis, copy.itemsize)
        if seen is not None:
            copy[...] = array
            return copy, seen
    copy = allocate(array.shape, axis, dtype, planar is not False)
    copy[...] = array
    seen = view(copy.shape, copy.strides, axis, copy.itemsize, planar)
    assert seen is not None
    return copy, seen
