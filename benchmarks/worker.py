"""One contender in a process of its own. It reads commands, one JSON object per line, and answers each with one line.

hello                              -> versions, or why the contender is missing
prepare case folder target verify  -> calls per sample, or why it cannot do this case, or what is wrong with its result
sample                             -> seconds per call
release                            -> forgets the case
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from base import Call, Contender, UnsupportedError
from cases import Array, Case, Data, aligned_copy, difference, expected_names, np_dtype
from limit import read_after

MOST_CALLS = 5000
# Of untimed calls before each sample, which are several: what fits into a large L3 cache is not in it after one (on a
# Xeon with 300 MB, relu after a residual of 3 x 26 MB takes 3.7 ms then, and 2.6 after eight).
WARM_SECONDS = 0.02


def read(folder: Path, name: str, case: Case) -> Array:
    """An array of the driver; NumPy forgets the name of a dtype that is not its own."""
    array: Array = np.load(folder / f"{name}.npy", mmap_mode="r")
    return array.view(np_dtype(case.dtype)) if array.dtype.kind == "V" else array


class Worker:
    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.call: Call | None = None
        self.data: Data | None = None
        self.calls = self.warm = 1

    def prepare(
        self, case_record: dict[str, Any], folder_name: str, target: float, warm: int, verify: bool
    ) -> dict[str, Any]:
        case, folder, self.warm = Case.from_json(case_record), Path(folder_name), warm
        if case.reader and not self.contender.can_be_read:
            return {"unsupported": "its threads would be in the way of who reads next"}
        names = ["x", "gamma", "beta", "mean", "var"] if self.contender.verified else []
        if self.contender.verified:
            names += (["dy"] if case.op == "backward" else []) + (["residual"] if case.residual else [])
            names += ["y"] if case.op == "backward" and case.function != "identity" else []
        arrays = {name: aligned_copy(read(folder, name, case), self.contender.offset) for name in names}
        empty: Array = np.zeros(0)
        if not names:
            arrays = dict.fromkeys(("x", "gamma", "beta", "mean", "var"), empty)
        self.data = Data(**arrays)
        assert not names or self.data.x.dtype == np_dtype(case.dtype)
        try:
            self.call = self.contender.prepare(case, self.data)
        except UnsupportedError as reason:
            return {"unsupported": str(reason)}
        returned = self.call()  # compiles, for some
        wrong = self._verify(returned, case, folder) if verify else None
        if wrong:
            return {"wrong": wrong}
        del returned
        gc.collect()
        if case.reader:
            self.call = read_after(self.call, self.contender.threads)
        seconds = self._time(1)
        if seconds < 10 * target:  # the first calls wake threads, which may take the system's clock tick
            seconds = min(self._time(1) for _ in range(5))
        self.calls = max(1, min(MOST_CALLS, round(target / max(seconds, 1e-9))))
        return {"calls": self.calls}

    def _verify(self, returned: Any, case: Case, folder: Path) -> str | None:
        if not self.contender.verified:
            return None
        names = expected_names(case)
        arrays = self.contender.arrays(returned, case)
        if len(arrays) != len(names):
            return f"{len(arrays)} results instead of {len(names)}"
        scale = float(np.load(folder / "scale.npy"))
        for name, actual in zip(names, arrays, strict=True):
            expected = read(folder, f"{name}_expected", case)
            # Sums over a channel are as exact as the terms, not as what cancels in them.
            terms = np.sqrt(case.shape.values / case.shape.C) if name in ("dgamma", "dbeta") else 1.0
            problem = difference(name, np.asarray(actual), expected, case, scale * terms)
            if problem:
                return problem
        return None

    def _time(self, calls: int) -> float:
        call = self.call
        assert call is not None
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def sample(self) -> dict[str, Any]:
        """Seconds of the median call, after others that wake the threads and bring the caches as they are in use."""
        start = time.perf_counter()
        warm = max(1, self.calls // 4)
        self._time(warm)
        while warm < self.warm and time.perf_counter() - start < WARM_SECONDS:
            self._time(1)
            warm += 1
        return {"seconds": self._time(self.calls)}

    def release(self) -> dict[str, Any]:
        self.call = self.data = None
        self.contender.release()
        gc.collect()
        return {}


def main() -> None:
    name, threads, offset = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    # What libraries print goes to the log.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(record: dict[str, Any]) -> None:
        print(json.dumps(record), file=answers, flush=True)

    try:
        from contenders import CONTENDERS

        worker = Worker(CONTENDERS[name](threads, offset))
    except Exception as error:
        traceback.print_exc()
        answer({"missing": f"{type(error).__name__}: {error}" if not isinstance(error, ImportError) else str(error)})
        return
    answer({"versions": worker.contender.versions(), "buffers": worker.contender.buffers})
    gc.disable()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer(getattr(worker, command.pop("do"))(**command))
        except Exception as error:
            traceback.print_exc()
            answer({"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]})


if __name__ == "__main__":
    main()
