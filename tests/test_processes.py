"""Forks after use, and calls from many Python threads at once."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import fastbn
from problems import assert_same_bits

CHILDREN = 20
SHAPE = (16, 24, 31, 17)


def work(threads, shape=SHAPE):
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
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


@pytest.mark.parametrize(
    ("callers", "calls", "threads", "shape"), [(8, 25, 2, SHAPE), (8, 25, 1, SHAPE), (32, 500, 1, (5, 24, 7, 9))]
)
def test_many_python_threads_get_the_bits_of_one(callers, calls, threads, shape):
    expected = work(1, shape)
    failures = []

    def call():
        try:
            for _ in range(calls):
                for actual, wanted in zip(work(threads, shape), expected, strict=True):
                    assert_same_bits(actual, wanted)
        except AssertionError as error:
            failures.append(error)

    callers = [threading.Thread(target=call) for _ in range(callers)]
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


def test_ctrl_c_ends_a_loop_of_calls():
    """At once, with Python's own traceback, and the interpreter ends as it always does: no thread is waited for."""
    code = """
import numpy as np, fastbn
x = np.ones((64, 64, 14, 14), np.float32)
fastbn.batchnorm(x, num_threads=2)
print("ready", flush=True)
while True:
    y, cache = fastbn.batchnorm_forward(x, num_threads=2)
    fastbn.batchnorm_backward(y, cache, num_threads=2)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT
    assert errors.splitlines()[-1] == "KeyboardInterrupt"


def test_threadpoolctl_sees_our_threads():
    pytest.importorskip("threadpoolctl")
    code = "import threadpoolctl, fastbn; print({{i['num_threads'] for i in threadpoolctl.threadpool_info() if {}}})"
    code = code.format("i['user_api'] == 'openmp'")
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ("{3}" if fastbn._core.OPENMP else "set()")


def test_spawned_process_honours_the_environment():
    code = "import fastbn; print(fastbn.get_num_threads(), fastbn.runtime.config()['isa'])"
    isa = fastbn.runtime.available_isas()[-1]
    environment = {**os.environ, "FASTBN_NUM_THREADS": "3", "FASTBN_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3" if fastbn._core.OPENMP else "1", isa]
