"""How a call is shared among blocks of threads: arithmetic on shapes, which needs no GPU.

Both kernel families are one walk. A *unit* is what a thread reads at once, `width` adjacent values: of one channel
(planar), or of as many channels (interleaved; where channels do not fill a vector, `fold` rows are one row of a
multiple of the channels). A *tile* is the units that a block works on side by side: planar one channel, interleaved up
to 256 bytes of a row. Its rows are split among `splits` blocks, each of which leaves a sum for every column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Triple = tuple[int, int, int]

# By the codes of src_c/dtypes.def: (bytes in memory, type of the arithmetic).
FORMATS: dict[str, tuple[int, type[np.floating[Any]]]] = {
    "f32": (4, np.float32),
    "f64": (8, np.float64),
    "f16": (2, np.float32),
    "bf16": (2, np.float32),
}

VECTOR_BYTES = 16  # the widest load
MAX_WIDTH = 8  # values: the bits of a byte of the mask
TILE_BYTES = 256  # of an interleaved row: whole memory transactions, and few channels whose sums a block adds up
MAX_CHANNELS = 128  # of a tile: the table of coefficients in shared memory
MAX_BLOCKS = 2**31 - 1
ROWS_PER_THREAD = 4  # fewer are not worth a block of its own
# Bytes that must be on their way to a multiprocessor for full speed, by Little's law (4.3 TB/s x 750 ns / 132
# processors on an H200: 24 KB); what a thread reads before it waits; and in how many vectors and values, lest they
# leave the registers, which a test of the machine code checks.
BYTES_ON_THEIR_WAY = 24 * 1024
PLANAR_BYTES, INTERLEAVED_BYTES = 32, 64
MAX_LOADS, MAX_VALUES = 8, 16
# Blocks for each multiprocessor. Interleaved as few as will do, because each adds up the sums of all splits.
PLANAR_BLOCKS = 8


def contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Of an array in C order."""
    strides = []
    for extent in reversed(shape):
        strides.append(itemsize)
        itemsize *= max(extent, 1)
    return tuple(reversed(strides))


class Operand(NamedTuple):
    """An array as (outer, channels, inner); strides and address in bytes."""

    address: int
    strides: Triple


class Plan(NamedTuple):
    """What a launch needs to know; the kernels receive `geometry`."""

    planar: bool
    width: int  # values of a vector
    channel_stride: int  # of a unit, in channels: 1 or width
    fold: int
    threads: int
    units: int
    columns: int  # sums of a split
    side: int  # units of a tile side by side
    rows: int  # that the threads of a block read at once
    table: int  # channels of a tile
    length: int  # rows of a unit in all
    chunk: int  # rows of a split
    splits: int
    runs: int  # planar: vectors of a run, after which comes the next outer index
    tiles: int
    loads: int  # vectors of each array that a thread reads before it waits

    @property
    def blocks(self) -> int:
        return self.tiles * self.splits

    @property
    def single(self) -> bool:
        """Whether one launch can do it all: no block needs the sums of another, and both phases find registers."""
        return self.planar and self.splits == 1

    @property
    def sums(self) -> int:
        """Values of float64 that the splits leave."""
        return 2 * self.splits * self.columns


def _divisible(operand: Operand, shape: Triple, axes: Sequence[int], nbytes: int) -> bool:
    return operand.address % nbytes == 0 and all(operand.strides[a] % nbytes == 0 for a in axes if shape[a] > 1)


def _vectors(shape: Triple, operands: Sequence[Operand], itemsize: int, planar: bool, limit: int) -> tuple[int, int]:
    """(width, fold): the widest vectors that suit every operand."""
    outer, channels, inner = shape
    along = 2 if planar else 1
    dense = all(o.strides == (channels * itemsize, itemsize, o.strides[2]) for o in operands)
    # Four channels of a thread have eight sums of float64; eight would not leave registers for anything else.
    width = min(VECTOR_BYTES // itemsize, limit, MAX_WIDTH if planar else 4)
    while width > 1:
        nbytes = width * itemsize
        adjacent = all(o.strides[along] == itemsize for o in operands)
        if planar and adjacent and inner % width == 0:
            if all(_divisible(o, shape, (0, 1), nbytes) for o in operands):
                return width, 1
        elif not planar and adjacent:
            if channels % width == 0 and all(_divisible(o, shape, (0,), nbytes) for o in operands):
                return width, 1
            fold = width // math.gcd(channels, width)
            if dense and outer % fold == 0 and all(o.address % nbytes == 0 for o in operands):
                return width, fold
        width //= 2
    return 1, 1


def loads(itemsize: int, width: int, planar: bool, arrays: int) -> int:
    """Vectors that a thread reads before it waits, of each of so many arrays."""
    if width == MAX_WIDTH:
        return 1
    room = (PLANAR_BYTES if planar else INTERLEAVED_BYTES) // (width * itemsize * arrays)
    return max(1, min(room, MAX_VALUES // width, MAX_LOADS))


def make(
    shape: Triple,
    operands: Sequence[Operand],
    itemsize: int,
    planar: bool,
    processors: int,
    threads: int,
    arrays: int = 1,
    limit: int = MAX_WIDTH,
) -> Plan:
    """The plan of a call.

    Parameters
    ----------
    shape : (outer, channels, inner)
    operands : what is read and written, each with the strides of `shape`
    itemsize : int
        Bytes of a value.
    processors : int
        Multiprocessors of the GPU.
    threads : int
        Of a block.
    arrays : int
        That a thread reads side by side: x, or x and dy.
    limit : int
        The widest vector, in values.
    """
    outer, channels, inner = shape
    width, fold = _vectors(shape, operands, itemsize, planar, limit)
    if planar:
        units, columns, side, rows, table, runs = channels, channels, 1, threads, 1, inner // width
        count = outer * runs
    else:
        columns = channels * fold
        units = columns // width
        tiles = -(-units // min(TILE_BYTES // (width * itemsize), MAX_CHANNELS // width, threads))
        side = -(-units // tiles)
        rows = threads // side
        table, count, runs = min(channels, side * width), outer // fold, 1
    tiles = -(-units // side)
    ahead = loads(itemsize, width, planar, arrays)
    blocks = PLANAR_BLOCKS if planar else -(-BYTES_ON_THEIR_WAY // (threads * ahead * width * itemsize * arrays))
    wanted = -(-processors * blocks // tiles)
    splits = max(1, min(wanted, -(-count // (rows * ROWS_PER_THREAD)), MAX_BLOCKS // tiles))
    chunk = -(-count // splits)
    splits = -(-count // chunk)  # none is empty
    return Plan(
        planar,
        width,
        1 if planar else width,
        fold,
        threads,
        units,
        columns,
        side,
        rows,
        table,
        count,
        chunk,
        splits,
        runs,
        tiles,
        ahead,
    )


def geometry(plan: Plan, channels: int) -> tuple[int, ...]:
    """The integers that the kernels take, in their order."""
    unit_values, row_values = (plan.length * plan.width, plan.width) if plan.planar else (plan.width, plan.columns)
    return (
        channels,
        plan.units,
        plan.columns,
        plan.side,
        plan.rows,
        plan.table,
        plan.length,
        plan.chunk,
        plan.splits,
        plan.runs,
        plan.fold,
        unit_values,
        row_values,
    )


def walk(plan: Plan, operand: Operand) -> tuple[int, int, int, int, int]:
    """An operand as the kernels take it: address, and the strides of channels, units, outer indices and vectors."""
    outer, channel, inner = operand.strides
    unit = channel * plan.channel_stride
    return operand.address, channel, unit, outer * plan.fold, inner * plan.width if plan.planar else 0
