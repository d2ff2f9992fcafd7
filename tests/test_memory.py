"""The memory of large results: used again, never while it is in use, within the limit, across threads and forks."""

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest

import fastbn
from combinations import LONG
from fastbn import _core, memory
from problems import assert_same_bits, make_random

SHAPE = (8, 16, 32, 32)  # 512 KiB
MIB = 1 << 20


@pytest.fixture(autouse=True)
def pool():
    """An empty cache of 64 MiB for every test."""
    fastbn.empty_cache()
    fastbn.set_cache_limit(64 * MIB)
    yield
    fastbn.empty_cache()
    fastbn.set_cache_limit(None)


def batch(seed=0, shape=SHAPE):
    return make_random(shape, 1, np.float32, seed)


def address(array):
    return array.__array_interface__["data"][0]


def resident():
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def poison(count=4, shape=SHAPE):
    """Blocks full of NaN in the cache, for results of this shape."""
    arrays = [_core.empty_like(np.empty(shape, np.float32)) for _ in range(count)]
    for array in arrays:
        array.fill(np.nan)
    del arrays, array
    assert fastbn.cache_info().idle_blocks >= count


# Use again ------------------------------------------------------------------------------------------------------------


def test_memory_of_a_buffer_is_used_again():
    buffer = memory.empty(SHAPE, np.float32)
    assert buffer.shape == SHAPE and buffer.dtype == np.float32 and buffer.flags.c_contiguous
    first, again = address(buffer), memory.empty(SHAPE, np.float32)
    assert not np.shares_memory(buffer, again)
    del buffer
    assert address(memory.empty(SHAPE, np.float32)) == first
    assert memory.empty([3]).dtype == np.float64


def test_memory_of_a_freed_result_is_used_again():
    x = batch()
    y = fastbn.batchnorm(x)
    first, before = address(y), fastbn.cache_info()
    del y
    assert fastbn.cache_info().idle_bytes >= x.nbytes
    y = fastbn.batchnorm(x)
    after = fastbn.cache_info()
    assert address(y) == first
    assert (after.hits, after.misses, after.idle_blocks) == (before.hits + 1, before.misses, 0)


def test_memory_of_every_large_result_is_used_again():
    """y, dx, dresidual, and the copy of an x that cannot be used in place."""
    wide = np.zeros((8, 16, 32, 33), np.float32)
    x, residual = wide[..., 1:], batch(1)

    def step():
        y, cache = fastbn.batchnorm_forward(x, residual=residual, activation="relu")
        return y, fastbn.batchnorm_backward(y, cache)

    step()
    misses = fastbn.cache_info().misses
    for _ in range(3):
        step()
    assert fastbn.cache_info().misses == misses


def test_memory_of_small_results_is_left_to_numpy():
    before = fastbn.cache_info()
    fastbn.batchnorm(batch(shape=(2, 3, 8, 8)))
    assert fastbn.cache_info() == before


def test_memory_of_other_arrays_is_left_to_numpy():
    fastbn.batchnorm(batch())
    before = fastbn.cache_info()
    np.empty(SHAPE, np.float32)
    batch().copy()
    assert fastbn.cache_info() == before


def test_memory_of_a_slightly_larger_result_serves_a_smaller_one_and_not_a_much_smaller_one():
    fastbn.batchnorm(batch(shape=(10, 16, 32, 32)))
    hits = fastbn.cache_info().hits
    fastbn.batchnorm(batch(shape=(4, 16, 32, 32)))
    assert fastbn.cache_info().hits == hits
    fastbn.empty_cache()
    fastbn.batchnorm(batch(shape=(10, 16, 32, 32)))
    fastbn.batchnorm(batch(shape=(9, 16, 32, 32)))
    assert fastbn.cache_info().hits == hits + 1


@pytest.mark.parametrize("nbytes", [MIB // 2, 3 * MIB, 5 * MIB])
def test_memory_is_aligned(nbytes):
    y = fastbn.batchnorm(np.ones((2, nbytes // 8), np.float32))
    assert address(y) % 64 == 0
    assert y.flags.aligned and y.flags.owndata and y.base is None and y.flags.writeable


# In use ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "view",
    [
        lambda y: y[1:, ::2],
        lambda y: y.T,
        lambda y: y.reshape(-1)[5:6],
        lambda y: memoryview(y),
        lambda y: y.view(np.int32),
        lambda y: np.lib.stride_tricks.as_strided(y, (2,), (4,)),
    ],
    ids=["slice", "transpose", "one value", "memoryview", "dtype", "as_strided"],
)
def test_memory_is_not_used_again_while_a_view_lives(view):
    x = batch()
    y = fastbn.batchnorm(x)
    seen = view(y)
    kept, place = np.array(seen), address(y)
    del y
    others = [fastbn.batchnorm(batch(seed)) for seed in range(3)]
    assert place not in map(address, others)
    assert np.array_equal(np.array(seen), kept)
    del seen
    assert address(fastbn.batchnorm(x)) == place


def test_memory_of_x_in_a_cache_of_backward_is_in_use():
    x = fastbn.batchnorm(batch())
    expected, place = x.copy(), address(x)
    _y, cache = fastbn.batchnorm_forward(x)
    del x
    assert place not in [address(fastbn.batchnorm(batch(seed))) for seed in range(3)]
    assert_same_bits(cache.x, expected)


@pytest.mark.parametrize("arrange", [lambda x: x, lambda x: x[..., 1:], lambda x: x.transpose(0, 3, 1, 2)])
def test_memory_that_is_used_again_is_overwritten_completely(arrange):
    x = arrange(batch(shape=(8, 17, 33, 31)))
    residual, dy = (arrange(batch(seed, (8, 17, 33, 31))) for seed in (1, 2))

    def results():
        y, cache = fastbn.batchnorm_forward(x, residual=residual, activation="relu")
        gradients = fastbn.batchnorm_backward(dy, cache)
        return y, gradients.dx, gradients.dresidual

    fastbn.set_cache_limit(0)
    expected = results()
    fastbn.set_cache_limit(64 * MIB)
    poison(6, x.shape)
    hits = fastbn.cache_info().hits
    for actual, wanted in zip(results(), expected, strict=True):
        assert_same_bits(actual, wanted)
    assert fastbn.cache_info().hits >= hits + 3


def test_memory_results_copy_pickle_and_resize_as_arrays_do():
    y = fastbn.batchnorm(batch())
    for other in (y.copy(), copy.deepcopy(y), pickle.loads(pickle.dumps(y))):
        assert_same_bits(other, y)
        assert address(other) != address(y)
    expected = y.copy().ravel()
    y.resize(4 * y.size)
    assert_same_bits(y[: expected.size], expected)
    assert not y[expected.size :].any()
    y.resize(10)
    assert_same_bits(y, expected[:10])
    view = y[:]
    with pytest.raises(ValueError, match="resize"):
        y.resize(20)
    assert_same_bits(view, expected[:10])


# The limit ------------------------------------------------------------------------------------------------------------


def test_memory_limit_is_respected_and_the_newest_stay():
    fastbn.set_cache_limit(2 * MIB)
    results = [fastbn.batchnorm(batch()) for _ in range(8)]
    newest = address(results[-1])
    while results:
        del results[0]
        assert fastbn.cache_info().idle_bytes <= 2 * MIB
    assert fastbn.cache_info().idle_blocks == 4
    assert address(fastbn.batchnorm(batch())) == newest


def test_memory_larger_than_the_limit_is_returned_to_the_system():
    fastbn.set_cache_limit(MIB // 4)
    fastbn.batchnorm(batch())
    assert fastbn.cache_info()[:3] == (MIB // 4, 0, 0)


def test_memory_limit_lowered_returns_blocks_and_raised_keeps_them():
    del (lambda: [fastbn.batchnorm(batch()) for _ in range(4)])()[:]
    assert fastbn.cache_info().idle_blocks == 4
    fastbn.set_cache_limit(MIB)
    assert fastbn.cache_info().idle_blocks == 2
    fastbn.set_cache_limit(MIB * 64)
    assert fastbn.cache_info().idle_blocks == 2
    fastbn.empty_cache()
    assert fastbn.cache_info().idle_bytes == fastbn.cache_info().idle_blocks == 0


def test_memory_limit_of_zero_turns_it_off():
    y = fastbn.batchnorm(batch())
    fastbn.set_cache_limit(0)
    before = fastbn.cache_info()
    fastbn.batchnorm(batch())
    del y
    assert fastbn.cache_info() == before
    assert before.limit == before.idle_bytes == 0


def test_memory_of_large_results_is_aligned_and_returned_at_once_if_nothing_is_kept():
    fastbn.set_cache_limit(0)
    sizes = [32 * MIB - 8, 32 * MIB]
    before = fastbn.cache_info()
    results = [fastbn.batchnorm(np.zeros((2, nbytes // 8), np.float32)) for nbytes in sizes]
    assert [result.nbytes for result in results] == sizes
    assert address(results[1]) % 4096 == 0 and not results[1].any()
    assert fastbn.cache_info().misses == before.misses + 1  # the smaller one is NumPy's
    del results
    assert fastbn.cache_info().idle_bytes == 0


@pytest.mark.parametrize("value", [-1, 1.5, True, "1G"], ids=repr)
def test_memory_limit_must_be_a_number_of_bytes(value):
    with pytest.raises(fastbn.ArgumentError, match="nbytes: expected a number of bytes"):
        fastbn.set_cache_limit(value)
    assert fastbn.cache_info().limit == 64 * MIB


def group(root, name, path, **files):
    (root / "proc" / "self").mkdir(parents=True, exist_ok=True)
    (root / "proc" / "self" / "cgroup").write_text(name)
    folder = root / "cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        (folder / file).write_text(text)


@pytest.mark.parametrize(
    ("name", "path", "files", "expected"),
    [
        ("0::/job\n", "job", {"memory.max": "300000\n"}, 300000),
        ("0::/job/step\n", "job", {"memory.max": "300000\n"}, 300000),
        ("0::/job\n", "job", {"memory.max": "max\n", "memory.high": "200000\n"}, 200000),
        ("4:memory:/job\n1:cpu:/\n", "memory/job", {"memory.limit_in_bytes": "100000\n"}, 100000),
        ("4:memory:/job\n", "memory", {"memory.limit_in_bytes": "9223372036854771712\n"}, None),
        ("0::/job\n", "job", {"memory.max": "nonsense\n"}, None),
    ],
)
def test_memory_limits_of_control_groups_are_found(tmp_path, name, path, files, expected):
    group(tmp_path, name, path, **files)
    machine = memory.usable_memory(tmp_path / "nothing", tmp_path / "nothing")
    found = memory.usable_memory(tmp_path / "proc", tmp_path / "cgroup")
    assert found == (machine if expected is None else expected)


def test_memory_limit_by_default():
    fastbn.set_cache_limit(None)
    assert fastbn.cache_info().limit == min(1 << 30, memory.usable_memory() // 8)


def imported(text, variable="FASTBN_CACHE_LIMIT", code="fastbn.cache_info().limit"):
    code = f"import fastbn; print({code})"
    environment = {**os.environ, variable: text}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(("text", "limit"), [("0", 0), (" 1048576 ", MIB)])
def test_memory_limit_from_the_environment(text, limit):
    assert int(imported(text).stdout) == limit


def test_memory_streaming_from_the_environment():
    for text, expected in (("1048576", MIB), ("", _core.MEASURED_STREAM_BYTES)):
        assert int(imported(text, "FASTBN_STREAM_BYTES", "fastbn.memory.stream_bytes()").stdout) == expected


@pytest.mark.parametrize("text", ["-1", "1.5", "1G", "many"])
def test_memory_limit_from_the_environment_must_be_a_number(text):
    done = imported(text)
    assert done.returncode == 1
    assert f"FASTBN_CACHE_LIMIT: expected a number of bytes, got {text!r}" in done.stderr


def test_memory_is_in_the_configuration():
    fastbn.batchnorm(batch(shape=(64, 16, 32, 32)))
    assert fastbn.runtime.config()["cache"] == "4 of at most 64 MiB of freed results kept"


# Threads, forks, leaks ------------------------------------------------------------------------------------------------


def test_memory_is_given_to_one_of_eight_threads_only():
    xs = [batch(seed) for seed in range(8)]
    expected = [fastbn.batchnorm(x) for x in xs]
    failures = []

    def work(seed):
        try:
            live = []
            for step in range(60):
                live.append(fastbn.batchnorm(xs[seed], num_threads=1))
                if len(live) > step % 5:
                    assert_same_bits(live.pop(0), expected[seed])
                if step % 20 == seed:
                    fastbn.empty_cache()
            for y in live:
                assert_same_bits(y, expected[seed])
        except AssertionError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert fastbn.cache_info().idle_bytes <= 64 * MIB


def test_memory_freed_by_another_thread_comes_back():
    results = [fastbn.batchnorm(batch())]
    place = address(results[0])
    thread = threading.Thread(target=results.clear)
    thread.start()
    thread.join()
    assert address(fastbn.batchnorm(batch())) == place


def in_child(y, expected):
    """What was alive is intact, what was idle is gone, and the pool works."""
    assert fastbn.cache_info().idle_blocks == 0
    assert_same_bits(y, expected)
    del y
    for _ in range(3):
        assert_same_bits(fastbn.batchnorm(batch()), expected)
    assert fastbn.cache_info().idle_blocks >= 1


def test_memory_survives_a_fork():
    y = fastbn.batchnorm(batch())
    expected = y.copy()
    poison(2)
    process = multiprocessing.get_context("fork").Process(target=in_child, args=(y, expected))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert fastbn.cache_info().idle_blocks == 2
    assert_same_bits(y, expected)


def test_memory_fork_while_threads_allocate_does_not_hang():
    stop = threading.Event()

    def work():
        while not stop.is_set():
            fastbn.batchnorm(batch(shape=(1, 16, 32, 32)), num_threads=1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    expected = fastbn.batchnorm(batch())
    try:
        for _ in range(10):
            process = multiprocessing.get_context("fork").Process(target=in_child, args=(expected, expected))
            process.start()
            process.join(60)
            assert process.exitcode == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_memory_of_many_calls_grows_by_a_megabyte_at_most(record_property):
    """A hundred thousand calls: small ones, results that are recycled, both directions, statistics, errors."""
    small, large = batch(shape=(2, 3, 4, 4)), batch(shape=(4, 64, 8, 8))
    gamma, mean, var = np.ones(3, np.float32), np.zeros(3, np.float16), np.ones(3)

    def work(rounds):
        for _ in range(rounds):
            y, cache = fastbn.batchnorm_forward(
                small,
                gamma,
                gamma,
                running_mean=mean,
                running_var=var,
                training=True,
                activation="relu",
                residual=small,
            )
            fastbn.batchnorm_backward(y, cache)
            fastbn.batchnorm(large)
            fastbn.batchnorm_stats(small)
            with pytest.raises(fastbn.ShapeError):
                fastbn.batchnorm(small, gamma[:2])

    work(1000)
    before, hits = resident(), fastbn.cache_info().hits
    rounds = 200_000 if LONG else 20_000
    work(rounds)
    growth = resident() - before
    record_property("calls", 5 * rounds)
    record_property("largest growth in KiB", growth >> 10)
    assert growth <= MIB
    assert fastbn.cache_info().hits - hits >= 20_000


def test_memory_does_not_leak():
    """Ten thousand small calls and a thousand of changing large shapes."""
    small, room = batch(shape=(2, 3, 4, 4)), batch(shape=(16, 16, 32, 32))
    gamma, mean, var = np.ones(3, np.float32), np.zeros(3), np.ones(3)

    def work(calls):
        for _ in range(calls):
            fastbn.batchnorm(small, gamma, gamma, running_mean=mean, running_var=var, training=True)
        for step in range(calls // 10):
            x = room[: 2 + step % 13]
            y, cache = fastbn.batchnorm_forward(x, num_threads=1)
            fastbn.batchnorm_backward(y, cache, num_threads=1)

    work(500)
    before = resident()
    work(10_000)
    assert resident() - before < 16 * MIB
    assert fastbn.cache_info().idle_bytes <= 64 * MIB
    fastbn.empty_cache()
    assert resident() <= before


# Copies ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("isa", range(len(fastbn.runtime.available_isas())))
def test_memory_copy_writes_every_byte_and_no_other(isa, stream):
    """What `fastbn.runtime.copy_speed` measures with; from and to every place in a cache line."""
    index = [i for i, (_name, available) in enumerate(_core.isas()) if available][isa]
    source = np.arange(1000, dtype=np.uint16).astype(np.uint8)
    for offset in range(64):
        for count in (0, 1, 63, 64, 65, 200, 577):
            for threads in (1, 3):
                destination = np.zeros(1000, np.uint8)
                _core.copy(index, threads, destination[offset : offset + count], source[7 : 7 + count], stream)
                expected = np.zeros(1000, np.uint8)
                expected[offset : offset + count] = source[7 : 7 + count]
                np.testing.assert_array_equal(destination, expected)
