"""The plan of a launch, on any shape: a model of the kernels' walk in NumPy says which thread reads which value."""

import itertools

import numpy as np
import pytest

from fastbn.cuda import _plan
from problems import SHAPES, TAIL_SHAPES, shape_id

PROCESSORS = (2, 132)
THREADS = (16, 512)


def triples():
    for shape in (*SHAPES, *TAIL_SHAPES[::13], (2, 2048, 49), (512, 3, 1), (6, 1000, 1), (4, 1023, 1), (1, 7000, 2)):
        outer, channels, inner = shape[0], shape[1], int(np.prod(shape[2:]))
        yield True, (outer, channels, inner)
        if channels > 1:
            yield False, (outer * inner, channels, 1)


CASES = list(triples())


def case_id(value):
    return shape_id(value) if isinstance(value, tuple) else "planar" if value else "interleaved"


def dense(shape, itemsize, address=0):
    return _plan.Operand(address, _plan.contiguous_strides(shape, itemsize))


def walked(plan, operand, shape, itemsize):
    """Addresses of the values that each (block, thread) reads, and of each the column of its sum: two flat arrays."""
    _, _, unit_stride, outer_stride, vector_stride = _plan.walk(plan, operand)
    block, thread = np.divmod(np.arange(plan.blocks * plan.threads), plan.threads)
    tile, split = np.divmod(block, plan.splits)
    row, unit = thread // plan.side, tile * plan.side + thread % plan.side
    active = (row < plan.rows) & (unit < plan.units)
    start, stop = split * plan.chunk + row, np.minimum(plan.length, (split + 1) * plan.chunk)
    addresses, columns = [], []
    lanes = 1 if plan.planar else plan.width
    for step in range(-(-plan.chunk // plan.rows)):
        i = start + step * plan.rows
        here = active & (i < stop)
        outer, vector = np.divmod(i[here], plan.runs)
        base = operand.address + unit[here] * unit_stride + outer * outer_stride + vector * vector_stride
        assert (base % (plan.width * itemsize) == 0).all(), "a vector is not aligned"
        for v in range(plan.width):
            addresses.append(base + v * itemsize)
            columns.append(unit[here] * lanes + v % lanes)
    return np.concatenate(addresses), np.concatenate(columns)


@pytest.mark.parametrize("processors", PROCESSORS)
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize(("planar", "shape"), CASES, ids=case_id)
def test_cuda_plan_every_value_is_read_once_and_added_to_its_channel(planar, shape, itemsize, processors):
    for threads, address in itertools.product(THREADS, (0, itemsize)):
        operand = dense(shape, itemsize, address)
        plan = _plan.make(shape, [operand], itemsize, planar, processors, threads)
        addresses, columns = walked(plan, operand, shape, itemsize)
        index = (addresses - address) // itemsize
        assert np.array_equal(np.sort(index), np.arange(np.prod(shape)))
        channel = index // shape[2] % shape[1]
        assert np.array_equal(columns % shape[1], channel)
        assert plan.columns == plan.fold * shape[1]


@pytest.mark.parametrize(("planar", "shape"), CASES, ids=case_id)
def test_cuda_plan_keeps_its_limits(planar, shape):
    for itemsize, processors, threads in itertools.product((2, 4, 8), PROCESSORS, THREADS):
        plan = _plan.make(shape, [dense(shape, itemsize)], itemsize, planar, processors, threads)
        assert plan.side * plan.rows <= plan.threads
        assert 1 <= plan.table <= _plan.MAX_CHANNELS
        assert plan.width * itemsize <= _plan.VECTOR_BYTES and plan.width <= _plan.MAX_WIDTH
        assert (plan.splits - 1) * plan.chunk < plan.length <= plan.splits * plan.chunk
        # Each channel has one column in the first fold, so one tile writes its statistics.
        width = plan.side * (1 if planar else plan.width)
        tiles = [range(tile * width, min((tile + 1) * width, plan.columns)) for tile in range(plan.tiles)]
        columns = [column for tile in tiles for column in tile if column < shape[1]]
        assert columns == list(range(shape[1]))
        if plan.single:
            assert plan.splits == 1 and planar


@pytest.mark.parametrize(
    ("shape", "itemsize", "planar", "expected"),
    [
        ((32, 64, 3136), 4, True, (4, 1)),
        ((32, 64, 49), 4, True, (1, 1)),
        ((32, 64, 3136), 2, True, (8, 1)),
        ((100352, 64, 1), 4, False, (4, 1)),
        ((100352, 3, 1), 4, False, (4, 4)),
        ((100353, 3, 1), 4, False, (1, 1)),
        ((100352, 6, 1), 4, False, (4, 2)),
        ((100352, 64, 1), 8, False, (2, 1)),
    ],
)
def test_cuda_plan_vectors_are_as_wide_as_the_array_allows(shape, itemsize, planar, expected):
    plan = _plan.make(shape, [dense(shape, itemsize)], itemsize, planar, 132, 512)
    assert (plan.width, plan.fold) == expected


def test_cuda_plan_vectors_suit_every_operand():
    shape = (4, 8, 64)
    aligned, shifted = dense(shape, 4), dense(shape, 4, address=8)
    padded = _plan.Operand(0, (8 * 66 * 4, 66 * 4, 4))
    every_other = _plan.Operand(0, (8 * 128 * 4, 128 * 4, 8))
    for others, width in (([], 4), ([shifted], 2), ([padded], 2), ([every_other], 1)):
        assert _plan.make(shape, [aligned, *others], 4, True, 132, 256).width == width
    assert _plan.make(shape, [aligned], 4, True, 132, 256, limit=2).width == 2


def test_cuda_plan_few_channels_fill_the_gpu_and_many_need_one_launch():
    few = _plan.make((64, 3, 512 * 512), [dense((64, 3, 512 * 512), 4)], 4, True, 132, 256)
    assert few.blocks >= 8 * 132
    many = _plan.make((256, 2048, 49), [dense((256, 2048, 49), 4)], 4, True, 132, 256)
    assert many.single
