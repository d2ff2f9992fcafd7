"""The limit itself: flat passes over memory, the better of plain and streaming stores."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

import cases
from base import Call, Contender, UnsupportedError
from cases import ALIGNMENT, Case, Data

KERNELS = ("read", "read2", "copy", "read2_write1", "read2_write2")  # the enum of limit.c
SERIAL_BYTES = 4 << 20  # larger tensors are not tried on one thread


def compiled_limit() -> Any:
    """limit.c as a library, compiled once per content and compiler into the folder of temporary files."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise ImportError("no C compiler")
    source = Path(__file__).with_name("limit.c")
    command = [*compiler.split(), "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", str(source)]
    cpu = Path("/proc/cpuinfo").read_text().split("\n\n")[0] if Path("/proc/cpuinfo").exists() else ""
    model = "".join(line for line in cpu.splitlines() if line.startswith(("model name", "flags", "Features")))
    key = hashlib.sha256(source.read_bytes() + repr(command).encode() + model.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"fastbn-limit-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise ImportError(f"{folder} belongs to somebody else")
    library = folder / f"{key}.so"
    if not library.exists():
        fresh = folder / f"{key}.{os.getpid()}.so"
        done = subprocess.run([*command, "-o", str(fresh)], capture_output=True, text=True)
        if done.returncode:
            raise ImportError(f"limit.c does not compile: {done.stderr.strip()[:300]}")
        fresh.replace(library)
    return ctypes.CDLL(str(library))


def load_limit() -> Any:
    """The function of limit.c."""
    run = compiled_limit().fastbn_limit
    run.restype = None
    pointer = ctypes.c_void_p
    run.argtypes = [ctypes.c_int] * 3 + [ctypes.c_int64] + [pointer] * 4
    return run


def read_after(call: Call, threads: int) -> Call:
    """The call, and somebody who reads its first result once, all whole lines of it."""
    run, read = load_limit(), KERNELS.index("read")

    def both() -> Any:
        returned = call()
        result = returned if isinstance(returned, np.ndarray) else next(iter(returned))
        start = result.__array_interface__["data"][0]
        first = -(-start // ALIGNMENT) * ALIGNMENT
        size = (start + result.nbytes - first) // ALIGNMENT * ALIGNMENT
        run(read, 0, threads, size, first, first, first, first)
        return returned

    return both


class Limit(Contender):
    """The flat passes of `cases.limit_passes` over aligned buffers of the size of x. Its three kinds are contenders of
    their own; the limit of a case is whichever has the lowest median."""

    stream = False
    serial = False
    buffers: ClassVar[dict[str, int]] = {"forward": 2, "inference": 2, "backward": 3}
    verified = False
    can_be_read = True

    def load(self) -> None:
        self._run = load_limit()

    def passes(self, case: Case) -> list[str]:
        return cases.limit_passes(case)

    def prepare(self, case: Case, data: Data) -> Call:
        if self.serial and (self.threads == 1 or case.nbytes > SERIAL_BYTES):
            raise UnsupportedError(f"one thread is only tried for tensors up to {SERIAL_BYTES >> 20} MiB")
        size = -(-case.nbytes // ALIGNMENT) * ALIGNMENT
        passes = self.passes(case)
        if self.stream and not any("write" in name or name == "copy" for name in passes):
            raise UnsupportedError("nothing is written")
        # What a pass does not touch needs no memory.
        used = max(cases.TENSORS[name] for name in passes)
        buffers = [cases.aligned((size,), np.uint8) for _ in range(used)]
        x = buffers[0]
        dy = buffers[1] if used >= 3 else x
        y = buffers[min(used, 3) - 1]
        z = buffers[-1]
        threads = 1 if self.serial else self.threads
        ends = [array.ctypes.data for array in (x, dy, y, z)]
        calls = [(KERNELS.index(name), int(self.stream), threads, size, *ends) for name in passes]

        def call(keep: Any = buffers) -> Any:
            for arguments in calls:
                self._run(*arguments)
            return y

        return call


class LimitStream(Limit):
    stream = True


class LimitSerial(Limit):
    serial = True


class ReadPass(Limit):
    """No limit of a case, but the unit of what a residual costs."""

    def passes(self, case: Case) -> list[str]:
        return ["read"]
