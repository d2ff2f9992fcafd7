"""Forks after use, and calls from many Python threads at once."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import fastbn
from combinations import LONG
from problems import assert_same_bits

FORKS = Path(__file__).with_name("forks.py")
CHILDREN = 10_000 if LONG else 100  # of all orders together
ORDERS = ("fastbn", "fastbn,torch", "torch,fastbn")
SHAPE = (16, 24, 31, 17)
SHARED = [(SHAPE, 1), ((16, 31, 17, 24), 3), ((40, 2048), 1)]  # by channels; in steps; with many sums to finish


def work(threads, shape=SHAPE, axis=1):
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    y, cache = fastbn.batchnorm_forward(x, axis=axis, activation="relu", num_threads=threads)
    return y, fastbn.batchnorm_backward(dy, cache, num_threads=threads).dx


@pytest.mark.timeout(4 * 3600 if LONG else 600)
@pytest.mark.parametrize("libraries", ORDERS)
def test_forked_children_work_with_threads(libraries, record_property):
    """Plain and nested forks, from a thread while others call, of a Pool and of PyTorch's DataLoader, whose OpenMP is
    ours: whichever library is imported first, every child gets the same bits and none hangs."""
    if "torch" in libraries:
        pytest.importorskip("torch")
    command = [sys.executable, FORKS, libraries, str(-(-CHILDREN // len(ORDERS)))]
    done = subprocess.run(command, capture_output=True, text=True)
    record_property("hangs", int("hangs" in done.stderr))
    assert done.returncode == 0, done.stderr
    record_property("forks", int(done.stdout))
    assert int(done.stdout) >= CHILDREN // len(ORDERS)


@pytest.mark.parametrize(
    ("callers", "calls", "threads", "shape", "axis"),
    [
        (8, 25, 1, SHAPE, 1),
        (32, 500, 1, (5, 24, 7, 9), 1),
        *((8, 25, threads, *shared) for threads, shared in zip((2, 2, 3), SHARED, strict=True)),
    ],
)
def test_many_python_threads_get_the_bits_of_one(callers, calls, threads, shape, axis):
    expected = work(1, shape, axis)
    failures = []

    def call():
        try:
            for _ in range(calls):
                for actual, wanted in zip(work(threads, shape, axis), expected, strict=True):
                    assert_same_bits(actual, wanted)
        except AssertionError as error:
            failures.append(error)

    callers = [threading.Thread(target=call) for _ in range(callers)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures


FEWER_THREADS = """
import sys
sys.path.insert(0, sys.argv[1])
from problems import assert_same_bits
from test_processes import SHARED, work
for shape, axis in SHARED:
    for actual, wanted in zip(work(8, shape, axis), work(1, shape, axis)):
        assert_same_bits(actual, wanted)
"""


@pytest.mark.parametrize("environment", [{"OMP_THREAD_LIMIT": "1"}, {"OMP_THREAD_LIMIT": "3"}, {"OMP_DYNAMIC": "true"}])
def test_fewer_threads_than_asked_for(environment):
    """OpenMP need not give as many as a call wants: those that come do the work of all, and wait for no others."""
    command = [sys.executable, "-c", FEWER_THREADS, Path(__file__).parent]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr


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


REGION = """
#include <omp.h>
void region(int threads, void (*call)(int))
{
#pragma omp parallel num_threads(threads)
    call(omp_get_thread_num());
}
"""
CALLS_IN_A_REGION = """
import ctypes, os, sys, threading, time
import numpy as np, fastbn
x = np.ones((64, 64, 32, 32), "f4")
expected = [fastbn.batchnorm(x, axis=axis, num_threads=1) for axis in (1, 3)]
region = ctypes.CDLL(sys.argv[1]).region
done = threading.Event()
most = 0
def watch():
    global most
    while not done.is_set():
        most = max(most, len(os.listdir("/proc/self/task")))
def calls(asked, until):
    def call(thread):
        assert fastbn.get_num_threads() == 1
        while not until():
            for axis, y in zip((1, 3), expected):
                assert (fastbn.batchnorm(x, axis=axis, num_threads=asked) == y).all()
    region(2, ctypes.CFUNCTYPE(None, ctypes.c_int)(call))
threading.Thread(target=watch, daemon=True).start()
start = time.monotonic()
calls(None, lambda: time.monotonic() > start + 0.5)
first = most
calls(3, lambda: most > first or time.monotonic() > start + 100)
print(fastbn.get_num_threads(), first, most)
done.set()
"""


@pytest.mark.skipif(not fastbn._core.OPENMP, reason="built without OpenMP")
def test_calls_inside_a_parallel_region_start_no_threads(tmp_path):
    """Two threads of a C program's region call, where OpenMP would let each start a team of its own (and does, if the
    call asks for it)."""
    compiler = fastbn._core.COMPILER.split()[0]
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}, whose OpenMP the library uses")
    (tmp_path / "region.c").write_text(REGION)
    library = tmp_path / "region.so"
    subprocess.run([compiler, "-fopenmp", "-shared", "-fPIC", tmp_path / "region.c", "-o", library], check=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "4", "OMP_MAX_ACTIVE_LEVELS": "4", "OPENBLAS_NUM_THREADS": "1"}
    environment.pop("FASTBN_NUM_THREADS", None)
    command = [sys.executable, "-c", CALLS_IN_A_REGION, library]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""  # ctypes prints what a callback raises
    outside, without, with_teams = map(int, done.stdout.split())
    assert outside == 4
    assert without <= 3  # the main thread, the one that counts, the second of the region
    assert with_teams > without


# A real control group -------------------------------------------------------------------------------------------------


def cpu_mounts():
    """(where, file of the quota) of each hierarchy of control groups that may limit CPU time, in both versions."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, kind, options, *_ = line.split()
        if kind == "cgroup2":
            yield Path(mount), "cpu.max"
        if kind == "cgroup" and "cpu" in options.split(","):
            yield Path(mount), "cpu.cfs_quota_us"


@pytest.fixture(params=("the group itself", "the group around it"))
def enter_quota(request):
    """What a child calls to enter a group with CPU time for one processor. Skipped where none can be made."""
    refusals = []
    for mount, quota in cpu_mounts():
        outer = mount / f"fastbn-test-{os.getpid()}"
        inner = outer / "inner"
        try:
            inner.mkdir(parents=True)
            limited = inner if request.param == "the group itself" else outer
            (limited / quota).write_text("100000")  # microseconds of each 100,000

            def enter(members=inner / "cgroup.procs"):
                members.write_text("0")  # the process that writes

            subprocess.run(["true"], preexec_fn=enter, check=True)
            yield enter
            return
        except (OSError, subprocess.SubprocessError) as error:
            refusals.append(f"{mount}: {error}")
        finally:
            for group in (inner, outer):
                if group.exists():
                    group.rmdir()
    pytest.skip("; ".join(refusals) or "no control groups for CPU time are mounted")


def test_quota_of_a_real_control_group_is_honoured(enter_quota):
    if fastbn.runtime._affinity() < 2:
        pytest.skip("one processor: a quota changes nothing")
    code = "import fastbn; print(*fastbn.runtime._default_threads(), sep=', ')"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FASTBN_", "OMP_"))}
    options = {"env": clean, "capture_output": True, "text": True, "check": True}
    free = subprocess.run([sys.executable, "-c", code], **options)
    limited = subprocess.run([sys.executable, "-c", code], preexec_fn=enter_quota, **options)
    assert int(free.stdout.split(",")[0]) == fastbn.runtime._available_cpus()[1] > 1
    expected = "1, cgroup quota" if fastbn._core.OPENMP else "1, built without OpenMP"
    assert limited.stdout.strip() == expected


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
