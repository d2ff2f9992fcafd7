"""How many threads a call uses: the order of precedence, limits, cgroup files, environment errors."""

import os
import subprocess
import sys
import threading
from functools import lru_cache

import numpy as np
import pytest

import fastbn
from fastbn import _core, _layout, runtime

LARGE = 1 << 30  # bytes: no call is too small
OPENMP = pytest.mark.skipif(not _core.OPENMP, reason="built without OpenMP")

# The rule ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """A machine described by the test: nothing comes from the real one."""

    def describe(affinity=8, cpus=None, omp=None, environment=None, limit=None, in_parallel=False, openmp=True):
        untouched = affinity if omp is None else omp
        monkeypatch.setattr(runtime, "_available_cpus", lambda: (affinity, affinity if cpus is None else cpus))
        monkeypatch.setattr(runtime, "_omp_threads", omp)
        monkeypatch.setattr(runtime, "_environment_threads", environment)
        monkeypatch.setattr(runtime, "_set_threads", None)
        monkeypatch.setattr(_core, "OPENMP", openmp)
        monkeypatch.setattr(runtime, "_process_threads", lru_cache(runtime._process_threads.__wrapped__))
        monkeypatch.setattr(_core, "openmp_limit", lambda: 0 if in_parallel else untouched if limit is None else limit)

    return describe


@pytest.mark.parametrize(
    ("description", "threads", "reason"),
    [
        ({}, 8, "CPU affinity"),
        ({"cpus": 2}, 2, "cgroup quota"),
        ({"cpus": 2, "omp": 6}, 6, "OMP_NUM_THREADS"),
        ({"omp": 16}, 16, "OMP_NUM_THREADS"),
        ({"omp": 6, "environment": 3}, 3, "FASTBN_NUM_THREADS"),
        ({"environment": 12}, 12, "FASTBN_NUM_THREADS"),
        ({"limit": 3}, 3, "OpenMP limit lowered at run time"),
        ({"environment": 12, "limit": 3}, 3, "OpenMP limit lowered at run time"),
        ({"omp": 6, "limit": 2}, 2, "OpenMP limit lowered at run time"),
        ({"cpus": 2, "limit": 3}, 2, "cgroup quota"),
        ({"limit": 99}, 8, "CPU affinity"),
        ({"in_parallel": True, "environment": 3}, 1, "inside an OpenMP parallel region"),
        ({"openmp": False, "environment": 3}, 1, "built without OpenMP"),
    ],
    ids=lambda value: (
        ",".join(f"{k}-{v}" for k, v in value.items()) or "untouched" if isinstance(value, dict) else None
    ),
)
def test_threads_default(machine, description, threads, reason):
    machine(**description)
    assert runtime._default_threads() == (threads, reason)
    assert runtime.get_num_threads() == runtime.choose_threads(None, LARGE) == threads


def test_threads_precedence_of_calls(machine):
    machine(environment=3)
    fastbn.set_num_threads(5)
    assert fastbn.get_num_threads() == 5
    with fastbn.threads(2):
        assert fastbn.get_num_threads() == 2
        assert runtime.choose_threads(7, LARGE) == 7
        with fastbn.threads(4):
            assert fastbn.get_num_threads() == 4
        assert fastbn.get_num_threads() == 2
    assert fastbn.get_num_threads() == 5
    fastbn.set_num_threads(None)
    assert fastbn.get_num_threads() == 3


def test_threads_block_ends_with_an_error(machine):
    machine()
    with pytest.raises(KeyError), fastbn.threads(2):
        raise KeyError
    assert fastbn.get_num_threads() == 8


def test_threads_explicit_number_is_never_capped(machine):
    machine(limit=1)
    assert runtime.choose_threads(6, LARGE) == 6
    assert runtime.choose_threads(6, 4) == 6
    fastbn.set_num_threads(6)
    assert runtime.choose_threads(None, LARGE) == 1


@pytest.mark.parametrize(
    ("nbytes", "threads"),
    [
        (0, 1),
        (runtime.BYTES_PER_THREAD, 1),
        (2 * runtime.BYTES_PER_THREAD - 1, 1),
        (2 * runtime.BYTES_PER_THREAD, 2),
        (5 * runtime.BYTES_PER_THREAD, 5),
        (LARGE, 8),
    ],
)
def test_threads_small_work_uses_fewer(machine, nbytes, threads):
    machine()
    assert runtime.choose_threads(None, nbytes) == threads


def test_threads_of_shared_channels_need_more(machine):
    machine()
    two = 2 * runtime.BYTES_PER_THREAD
    assert runtime.choose_threads(None, two, shared=1) == 1
    assert runtime.choose_threads(None, two + 2 * 64 * runtime.BYTES_PER_CHANNEL, shared=64) == 2
    most = two + 2 * runtime.MANY_CHANNELS * runtime.BYTES_PER_CHANNEL
    assert runtime.choose_threads(None, most - 1, shared=runtime.MANY_CHANNELS) == 1
    assert runtime.choose_threads(None, most, shared=100 * runtime.MANY_CHANNELS) == 2


def test_threads_of_own_channels_need_less(machine):
    machine()
    two = 2 * runtime.BYTES_PER_THREAD
    assert runtime.choose_threads(None, two - 64 * runtime.WORK_OF_CHANNEL, own=64) == 2
    assert runtime.choose_threads(None, two - 64 * runtime.WORK_OF_CHANNEL - 1, own=64) == 1


def test_threads_by_layout(machine):
    machine()
    planar, interleaved = (_layout.plan(np.ones((2, 64, 64)), axis).view for axis in (1, 2))
    two = 2 * runtime.BYTES_PER_THREAD
    less = two - 64 * runtime.WORK_OF_CHANNEL
    assert [planar.threads(None, less, sums) for sums in (False, True)] == [1, 2]
    assert planar.threads(None, two, False) == 2
    more = two + 128 * runtime.BYTES_PER_CHANNEL
    for sums in (False, True):
        assert [interleaved.threads(None, nbytes, sums) for nbytes in (more - 1, more)] == [1, 2]
        assert interleaved.threads(7, 1, sums) == 7


def test_threads_block_and_isa_belong_to_their_python_thread(machine):
    machine()
    seen = []
    with fastbn.threads(2), runtime.isa(runtime.available_isas()[-1]):
        here = fastbn.get_num_threads(), runtime.current_isa()
        other = threading.Thread(target=lambda: seen.append((fastbn.get_num_threads(), runtime.current_isa())))
        other.start()
        other.join()
    assert here == (2, len(_core.isas()) - 1)
    assert seen == [(8, runtime.current_isa())]


def test_threads_of_the_call_reach_the_core(monkeypatch):
    seen = []
    real = _core.forward
    monkeypatch.setattr(_core, "forward", lambda *arguments: (seen.append(arguments[2]), real(*arguments))[1])
    fastbn.batchnorm(np.ones((4, 2), np.float32), num_threads=3)
    fastbn.batchnorm(np.ones((4, 2), np.float32))
    assert seen == [3, 1]


@OPENMP
def test_threads_obey_threadpoolctl():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    fastbn.batchnorm(np.ones((4, 2), np.float32))
    before = fastbn.get_num_threads()
    with threadpoolctl.threadpool_limits(limits=1, user_api="openmp"):
        assert fastbn.get_num_threads() == 1
    assert fastbn.get_num_threads() == before


def test_threads_counted_again_after_fork():
    counts = (runtime._available_cpus, runtime._process_threads)
    runtime._process_threads()
    pid = os.fork()
    if pid == 0:
        os._exit(sum(count.cache_info().currsize for count in counts))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert [count.cache_info().currsize for count in counts] == [1, 1]


# The environment -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "threads"),
    [
        ("4", 4),
        (" 4 ", 4),
        ("4,2,1", 4),
        ("", None),
        ("0", None),
        ("-2", None),
        ("four", None),
        ("4.0", None),
        (",2", None),
    ],
)
def test_threads_omp_num_threads_is_read_as_openmp_does(text, threads):
    assert runtime.omp_num_threads({"OMP_NUM_THREADS": text}) == threads
    assert runtime.omp_num_threads({}) is None


def imported(**environment):
    code = "import fastbn; print(fastbn.get_num_threads(), fastbn.runtime.config()['isa'])"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FASTBN_", "OMP_"))}
    return subprocess.run([sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True)


@OPENMP
@pytest.mark.parametrize(
    ("environment", "threads"),
    [({"FASTBN_NUM_THREADS": "3"}, 3), ({"OMP_NUM_THREADS": "3"}, 3),
     ({"FASTBN_NUM_THREADS": "2", "OMP_NUM_THREADS": "3"}, 2), ({"OMP_NUM_THREADS": "3,1"}, 3)],
    ids=["fastbn", "omp", "both", "omp-list"],
)  # fmt: skip
def test_threads_environment_of_a_fresh_process(environment, threads):
    result = imported(**environment)
    assert result.stdout.split()[:1] == [str(threads)], result.stderr


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "99999999"])
def test_threads_invalid_environment_is_one_clear_line(text):
    result = imported(FASTBN_NUM_THREADS=text)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last == f"ImportError: FASTBN_NUM_THREADS: expected an integer from 1 to {runtime.MAX_THREADS}, got {text!r}"


def test_threads_isa_of_the_environment_is_used():
    name = runtime.available_isas()[-1]
    assert imported(FASTBN_ISA=name).stdout.split()[1:] == [name]


def test_threads_invalid_isa_of_the_environment_lists_the_valid_names():
    last = imported(FASTBN_ISA="mmx").stderr.splitlines()[-1]
    assert last == f"ImportError: FASTBN_ISA='mmx' is unknown; valid names: {', '.join(runtime.available_isas())}"


# cgroups -------------------------------------------------------------------------------------------------------------

V2_DOCKER = "0::/\n"
V2_SYSTEMD = "0::/user.slice/user-1000.slice/session-3.scope\n"
V1_DOCKER = """\
12:memory:/docker/6f3d
11:pids:/docker/6f3d
4:cpu,cpuacct:/docker/6f3d
3:cpuset:/docker/6f3d
1:name=systemd:/docker/6f3d
0::/system.slice/containerd.service
"""
V1_SPLIT = "9:name=systemd:/\n4:memory:/job/1\n2:cpuacct:/\n1:cpu:/job/1\n0::/\n"

CGROUPS = {
    "nothing": (None, {}, None),
    "v2, no limit": (V2_DOCKER, {"cpu.max": "max 100000\n"}, None),
    "v2, container": (V2_DOCKER, {"cpu.max": "150000 100000\n"}, 1.5),
    "v2, no file at the root": (V2_SYSTEMD, {}, None),
    "v2, the middle level rules": (
        V2_SYSTEMD,
        {
            "user.slice/cpu.max": "max 100000\n",
            "user.slice/user-1000.slice/cpu.max": "200000 100000\n",
            "user.slice/user-1000.slice/session-3.scope/cpu.max": "400000 100000\n",
        },
        2.0,
    ),
    "v2, path of the host in a container": (V2_SYSTEMD, {"cpu.max": "300000 100000\n"}, 3.0),
    "v2, parent of a namespace": ("0::/../other\n", {"other/cpu.max": "50000 100000\n"}, 0.5),
    "v2, nonsense": (V2_DOCKER, {"cpu.max": "a lot\n"}, None),
    "v2, empty file": (V2_DOCKER, {"cpu.max": ""}, None),
    "v2, period of zero": (V2_DOCKER, {"cpu.max": "100000 0\n"}, None),
    "v1, container": (
        V1_DOCKER,
        {"cpu,cpuacct/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
        2.5,
    ),
    "v1, no limit": (
        V1_DOCKER,
        {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
        None,
    ),
    "v1, own level": (
        V1_SPLIT,
        {
            "cpu/cpu.cfs_quota_us": "-1\n",
            "cpu/cpu.cfs_period_us": "100000\n",
            "cpu/job/1/cpu.cfs_quota_us": "70000\n",
            "cpu/job/1/cpu.cfs_period_us": "100000\n",
        },
        0.7,
    ),
    "v1, link to the joint controllers": (
        V1_DOCKER,
        {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"},
        1.0,
    ),
    "v1, quota of another controller": ("4:memory:/\n", {"memory/cpu.max": "100000 100000\n"}, None),
    "hybrid": (V1_DOCKER, {"unified/system.slice/cpu.max": "100000 100000\n"}, 1.0),
    "broken lines": ("nonsense\n\n0::\n", {"cpu.max": "200000 100000\n"}, 2.0),
}


@pytest.mark.parametrize("name", CGROUPS)
def test_threads_cgroup_quota(tmp_path, name):
    membership, files, expected = CGROUPS[name]
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    cgroups.mkdir()
    if membership is not None:
        (proc / "self" / "cgroup").write_text(membership)
    for path, text in files.items():
        (cgroups / path).parent.mkdir(parents=True, exist_ok=True)
        (cgroups / path).write_text(text)
    assert runtime.cgroup_cpus(proc, cgroups) == expected


@pytest.mark.parametrize(
    ("quota", "affinity", "cpus"), [(None, 8, 8), (0.5, 8, 1), (1.0, 8, 1), (1.5, 8, 2), (16.0, 8, 8), (2.0, 1, 1)]
)
def test_threads_quota_is_rounded_up_and_limited_by_affinity(monkeypatch, quota, affinity, cpus):
    monkeypatch.setattr(runtime, "cgroup_cpus", lambda: quota)
    monkeypatch.setattr(runtime, "_affinity", lambda: affinity)
    assert runtime._available_cpus.__wrapped__() == (affinity, cpus)


# The report ----------------------------------------------------------------------------------------------------------


def test_threads_show_config_says_what_is_used(machine, capsys):
    machine(environment=3)
    fastbn.show_config()
    text = capsys.readouterr().out
    for wanted in ("3 (FASTBN_NUM_THREADS)", *runtime.dtypes(), *runtime.activations(), *runtime.available_isas()):
        assert wanted in text
    assert fastbn.cuda.description() in text and np.__version__ in text


def test_threads_copy_speed_is_plausible():
    assert 0.01 < runtime.copy_speed(1 << 20, repeats=3) < 1e5
    assert runtime.copy_speed(1, num_threads=2, repeats=1) > 0
