"""Tests run outside the source tree: a Python that they start must import the installed package, not the sources."""

import os
import signal

import pytest

# Where there is no GPU, its kernels run in Numba's simulator. With FASTBN_TEST_DEVICE=cuda (`make test-cuda`) all tests
# that do not name a device run on the GPU.
DEVICE = os.environ.get("FASTBN_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["NUMBA_ENABLE_CUDASIM"] = "1"
else:
    from fastbn import _engine

    _engine.DEFAULTS["device"] = DEVICE

# A shell starts what it puts into the background deaf to Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def outside_the_source_tree(tmp_path_factory):
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    os.chdir(before)
