"""Forks after use, and calls from many Python threads at once."""

import itertools
import multiprocessing
import os
import threading
import time

import numpy as np
import pytest

import fastbn
from problems import assert_same_bits

CHILDREN = 20


def problem():
    rng = np.random.default_rng(0)
    return rng.standard_normal((16, 24, 31, 17)).astype("f4"), rng.standard_normal((16, 24, 31, 17)).astype("f4")


def work(threads):
    x, dy = problem()
    y, cache = fastbn.batchnorm_forward(x, np.ones(24), np.zeros(24), activation="relu", num_threads=threads)
    return y, fastbn.batchnorm_backward(dy, cache, num_threads=threads).dx


def child(expected, grandchildren=0):
    """In a child: the same bits with threads; exit code 0 if so."""
    for actual, wanted in zip(work(2), expected, strict=True):
        assert_same_bits(actual, wanted)
    if grandchildren:
        join([start(child, expected) for _ in range(grandchildren)])


def start(target, *arguments):
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def join(processes):
    for process in processes:
        process.join(60)
        hung = process.exitcode is None
        if hung:
            process.kill()
        assert not hung, "a forked child hangs"
        assert process.exitcode == 0


def test_forked_children_work_with_threads():
    expected = work(2)
    for _ in range(CHILDREN):
        join([start(child, expected)])
    assert_same_bits(work(2)[0], expected[0])


def test_children_of_children():
    expected = work(2)
    join([start(child, expected, 2) for _ in range(3)])


def test_fork_from_another_thread_while_calls_run():
    """Some threads call, one forks."""
    expected = work(2)
    stop = threading.Event()

    def call():
        while not stop.is_set():
            work(2)

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    failures = []

    def fork():
        try:
            for _ in range(5):
                join([start(child, expected)])
        except AssertionError as error:
            failures.append(error)

    forker = threading.Thread(target=fork)
    forker.start()
    forker.join()
    stop.set()
    for caller in callers:
        caller.join()
    assert not failures


@pytest.mark.parametrize("threads", [1, 2])
def test_eight_python_threads_get_the_bits_of_one(threads):
    expected = work(1)
    failures = []

    def call():
        try:
            for _ in range(25):
                for actual, wanted in zip(work(threads), expected, strict=True):
                    assert_same_bits(actual, wanted)
        except AssertionError as error:
            failures.append(error)

    callers = [threading.Thread(target=call) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures


def test_the_gil_is_released():
    """While one thread is in a long call, another one runs on: it never waits for as long as half of the call."""
    x = np.zeros((1, 256, 1 << 20), "f4")[:, :, ::2]  # strided: half a second on one thread
    stamps, done = [], threading.Event()

    def tick():
        while not done.is_set():
            stamps.append(time.perf_counter())
            time.sleep(0.001)

    ticker = threading.Thread(target=tick)
    ticker.start()
    start = time.perf_counter()
    fastbn.batchnorm_stats(x, num_threads=1)
    end = time.perf_counter()
    done.set()
    ticker.join()
    during = [start, *(stamp for stamp in stamps if start < stamp < end), end]
    assert max(b - a for a, b in itertools.pairwise(during)) < (end - start) / 2


def test_spawned_process_honours_the_environment():
    import subprocess
    import sys

    code = "import fastbn; print(fastbn.get_num_threads(), fastbn.runtime.config()['isa'])"
    isa = fastbn.runtime.available_isas()[-1]
    environment = {**os.environ, "FASTBN_NUM_THREADS": "3", "FASTBN_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3" if fastbn._core.OPENMP else "1", isa]
