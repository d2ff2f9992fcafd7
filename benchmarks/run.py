"""The driver of the benchmark suite: every contender in a process of its own, on the same cores, taking turns.

    python benchmarks/run.py --shapes resnet50,bn_inception            # everything; see docs/benchmarks.md
    python benchmarks/run.py --quick --contenders limit,fastbn,torch   # a look

Only one process computes at a time: the driver says "sample" to one and waits for its answer. Before each sample there
is idle time, in which the threads of the others go to sleep, and then untimed calls. The order is drawn anew for every
round. A result is compared with float64 before it is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import cases
import machine
from cases import Array, Case, Shape
from contenders import CONTENDERS, GROUPS
from results import HALF_PRECISION, Result, Results, Samples, limit_of, paired, shares, unsettled, worst_spread

HERE = Path(__file__).resolve().parent
MEMORY_SHARE = 0.9  # of what is available


class WorkerError(Exception):
    """A worker has died."""


class Process:
    """The driver's end of a worker."""

    def __init__(self, name: str, threads: int, offset: int, cpus: Sequence[int], log: Path) -> None:
        self.name, self.log = name, log
        count = str(threads)
        variables = ("OMP", "MKL", "OPENBLAS", "NUMBA", "FASTBN")
        environment = os.environ | {f"{variable}_NUM_THREADS": count for variable in variables}
        command = [sys.executable, str(HERE / "worker.py"), name, count, str(offset)]
        # The worker inherits the CPUs; runtimes count those when they start.
        before = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
        if before is not None:
            os.sched_setaffinity(0, cpus)
        try:
            with log.open("w") as file:
                self.popen = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, env=environment
                )
        finally:
            if before is not None:
                os.sched_setaffinity(0, before)
        self.hello = self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        if not line:
            last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
            raise WorkerError(f"died with status {self.popen.wait()} {' '.join(last)}".rstrip())
        record: dict[str, Any] = json.loads(line)
        return record

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert self.popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the missing answer tells
            self.popen.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.popen.stdin.flush()
        return self.answer()

    def stop(self) -> None:
        assert self.popen.stdin is not None and self.popen.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.popen.stdin.close()
        try:
            self.popen.wait(10)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        self.popen.stdout.close()


class Driver:
    def __init__(self, args: argparse.Namespace, results: Results, folder: Path) -> None:
        self.args, self.results, self.folder = args, results, folder
        self.random = random.Random(args.seed)
        self.start = time.monotonic()
        self.processes: dict[str, Process] = {}

    def skip(self, contender: str, reason: str) -> None:
        """One line, once per contender and reason."""
        line = f"{contender}: {reason}"
        if line not in self.results.skipped:
            self.results.skipped.append(line)
            print(f"skipped  {line}", flush=True)

    def start_workers(self) -> None:
        for name in self.args.contenders:
            try:
                process = Process(
                    name, self.args.threads, self.args.offset, self.args.cpus, self.folder / f"{name}.log"
                )
            except WorkerError as failure:
                self.skip(name, str(failure))
                continue
            if "missing" in process.hello:
                self.skip(name, process.hello["missing"])
                process.stop()
                continue
            self.processes[name] = process
            self.results.versions[name] = process.hello["versions"]

    def stop_workers(self) -> None:
        for process in self.processes.values():
            process.stop()
        self.processes.clear()

    def ask(self, name: str, do: str, **arguments: Any) -> dict[str, Any] | None:
        """None if the contender has failed; it is out if its process has died."""
        try:
            answer = self.processes[name].ask(do, **arguments)
        except WorkerError as failure:
            self.skip(name, str(failure))
            self.processes.pop(name).stop()
            return None
        problem = answer.get("failed") or answer.get("wrong")
        if problem:
            where = arguments.get("case_record", {}).get("name", "")
            self.skip(name, f"{problem} {where}".rstrip())
            return None
        return answer

    def fitting(self, case: Case) -> list[str]:
        """Contenders for which memory suffices, the important ones first."""
        left = (machine.memory_bytes("MemAvailable") or 1 << 62) * MEMORY_SHARE
        fitting = []
        for name, process in self.processes.items():
            left -= (process.hello["buffers"][case.op] + 2 * case.residual) * case.nbytes
            if left > 0:
                fitting.append(name)
            else:
                self.skip(name, f"not enough memory beside the others for {case.shape.network}.{case.shape.layer}")
        return fitting

    def prepare(self, case: Case, names: Sequence[str], verify: bool) -> list[str]:
        ready = []
        for name in names:
            record = case.to_json()
            answer = self.ask(
                name,
                "prepare",
                case_record=record,
                folder_name=str(self.folder),
                target=self.args.target,
                verify=verify,
            )
            if answer is not None and "unsupported" not in answer:
                ready.append(name)
                continue
            if answer is not None and not name.startswith("limit"):
                self.skip(name, f"{answer['unsupported']} ({case.op}, {case.layout})")
            self.release([name])
        return ready

    def release(self, names: Sequence[str]) -> None:
        for name in names:
            if name in self.processes:
                self.ask(name, "release")

    def rounds(self, ready: Sequence[str], count: int) -> Samples:
        samples: Samples = {name: [] for name in ready}
        for _ in range(count):
            for name in self.random.sample(list(samples), len(samples)):
                time.sleep(self.args.idle)
                answer = self.ask(name, "sample")
                if answer is None:
                    del samples[name]
                else:
                    samples[name].append(answer["seconds"])
        return samples

    def attempt(self, case: Case) -> Samples:
        """All rounds, in parts for which the arrays are allocated anew: which physical pages they get is chance, and
        changes the time for as long as they live."""
        parts: list[Samples] = []
        ready = self.fitting(case)
        for i in range(self.args.placements):
            ready = self.prepare(case, ready, verify=i == 0)
            parts.append(self.rounds(ready, (self.args.rounds + i) // self.args.placements))
            self.release(ready)
            ready = [name for name in ready if name in self.processes]
        names = [name for name in parts[0] if all(name in part for part in parts)]
        return {name: [seconds for part in parts for seconds in part[name]] for name in names}

    def measure(self, case: Case) -> Result | None:
        best: Samples | None = None
        attempts = 0
        while attempts <= self.args.retries:
            attempts += 1
            samples = self.attempt(case)
            if not samples:
                break
            if best is None or (unsettled(samples) is None, -worst_spread(samples)) > (
                unsettled(best) is None,
                -worst_spread(best),
            ):
                best = samples
            late = time.monotonic() - self.start > 60 * self.args.minutes
            if late or unsettled(samples) is None:
                break
        return Result(case, best, attempts, unsettled(best)) if best else None

    def write(self, arrays: dict[str, Array], layout: str) -> None:
        for name, array in arrays.items():
            turned = np.ascontiguousarray(np.moveaxis(array, 1, -1)) if layout == "nhwc" and array.ndim == 4 else array
            np.save(self.folder / f"{name}.npy", turned)

    def run_shape(self, shape: Shape) -> None:
        a = self.args
        todo = list(cases.make_cases([shape], a.layout, a.ops, a.dtype, a.activation, a.threads))
        if not todo:
            return
        inputs = cases.make_inputs(shape, a.dtype, [case.op for case in todo], a.activation)
        training = {case.op for case in todo} - {"inference"}
        right: dict[str, dict[str, Array]] = {}
        if training:
            both = cases.right_results(inputs, "backward" if "backward" in training else "forward", a.activation)
            right |= {op: both for op in training}
        if any(case.op == "inference" for case in todo):
            right["inference"] = cases.right_results(inputs, "inference", a.activation)
        written = None
        for case in todo:
            if case.layout != written:
                self.write({name: array for name, array in inputs.items() if "running" not in name}, case.layout)
                written = case.layout
            results = right[case.op]
            expected = {f"{name}_expected": results[name] for name in cases.expected_names(case)}
            statistics = {name: results[name].astype(inputs["gamma"].dtype) for name in ("mean", "var")}
            self.write(expected | statistics | {"y": results["y"]}, case.layout)
            scale = np.abs(results["y"]).max()
            if case.op == "backward":
                scale = np.abs(inputs["dy"]).max() * np.abs(inputs["gamma"] / np.sqrt(results["var"] + cases.EPS)).max()
            np.save(self.folder / "scale.npy", np.float64(scale))
            self.add(self.measure(case))

    def add(self, result: Result | None) -> None:
        if result is not None:
            self.results.cases.append(result)
            print(line_of(result), flush=True)

    def copy_shape(self, shape: Shape, measured: Shape) -> None:
        """Two networks may have the same shape."""
        for result in [result for result in self.results.cases if result.case.shape == measured]:
            self.add(dataclasses.replace(result, case=dataclasses.replace(result.case, shape=shape)))

    def run(self, shapes: Sequence[Shape], path: Path) -> None:
        try:
            self.start_workers()
            measured: dict[tuple[int, ...], Shape] = {}
            for shape in shapes:
                size = (shape.N, shape.C, shape.H, shape.W)
                if size in measured:
                    self.copy_shape(shape, measured[size])
                else:
                    self.run_shape(shape)
                measured.setdefault(size, shape)
                self.results.minutes = (time.monotonic() - self.start) / 60
                self.results.save(path)
        finally:
            self.stop_workers()


def line_of(result: Result) -> str:
    """A case on one line: the time of the first fastbn, its share of the limit, and how much longer others take."""
    samples = result.samples
    base = next((name for name in samples if name.startswith("fastbn")), next(iter(samples)))
    parts = [f"{result.case.name:<52} {base} {result.median(base) * 1e3:.4g} ms"]
    if base in shares(samples) and limit_of(samples) is not None:
        share, spread = shares(samples)[base]
        parts.append(f"{share:.2f} of limit (spread {spread:.0%})")
    parts += [
        f"{name} {paired(rounds, samples[base])[0]:.2f}x"
        for name, rounds in samples.items()
        if name != base and not name.startswith("limit")
    ]
    return ", ".join(parts) + (f"  [{result.unsettled}]" if result.unsettled else "")


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def chosen(parser: argparse.ArgumentParser, option: str, names: Sequence[str], valid: Sequence[str]) -> list[str]:
    unknown = [name for name in names if name not in valid]
    if unknown or not names:
        parser.error(f"--{option}: {', '.join(unknown) or 'nothing'}; valid: {', '.join(valid)}")
    return list(dict.fromkeys(names))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    available = (
        sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="few rounds, short samples, and unless told otherwise few cases")
    add("--shapes", type=words, help="shape files (default resnet50,bn_inception), or layers as resnet50.bn2a")
    everybody = [name for name in CONTENDERS if name not in HALF_PRECISION]
    add("--contenders", type=words, default=everybody, help="names, or the groups limit, fastbn and half")
    add("--ops", type=words, default=list(cases.OPS), help=",".join(cases.OPS))
    add("--layout", type=words, default=list(cases.LAYOUTS), help=",".join(cases.LAYOUTS))
    add("--dtype", default="f32", choices=list(cases.DTYPES))
    add("--activation", default="identity", choices=cases.activations(), metavar="NAME", help="relu, add+relu, ...")
    add("--threads", type=int, default=len(available), help="of every contender, on as many CPUs")
    add("--offset", type=int, default=0, help="bytes by which arrays miss an alignment of 64; 16 is NumPy's habit")
    add("--rounds", type=int, help="samples of each contender (default 15)")
    add("--placements", type=int, help="how often in these rounds arrays are allocated anew (default 3)")
    add("--retries", type=int, default=1, help="how often a case that did not settle is measured again")
    add("--minutes", type=float, default=20, help="after these nothing is measured again")
    add("--idle", type=float, default=20, help="milliseconds before each sample (default 20)")
    add("--target", type=float, help="least milliseconds of calls in a sample (default 3)")
    add("--seed", type=int, default=0, help="of the order")
    add("--shapes-folder", type=Path, default=cases.SHAPES, help="where the shape files are")
    add("--output", type=Path, metavar="FILE", help="default benchmarks/results/DATE-COMMIT.json")
    args = parser.parse_args(argv)

    args.contenders = [name for word in args.contenders for name in GROUPS.get(word, [word])]
    args.contenders = chosen(parser, "contenders", args.contenders, list(CONTENDERS))
    args.contenders.sort(key=list(CONTENDERS).index)
    args.ops = chosen(parser, "ops", args.ops, cases.OPS)
    args.layout = chosen(parser, "layout", args.layout, cases.LAYOUTS)
    if not 1 <= args.threads <= len(available):
        parser.error(f"--threads: this process may use {len(available)} CPUs")
    args.cpus = available[: args.threads]
    default = ["resnet50.bn3b", "tiny.cube8"] if args.quick else ["resnet50", "bn_inception"]
    args.shapes = default if args.shapes is None else args.shapes
    args.rounds = (5 if args.quick else 15) if args.rounds is None else args.rounds
    args.placements = min(1 if args.quick else 3, args.rounds) if args.placements is None else args.placements
    args.target = 1e-3 * ((1 if args.quick else 3) if args.target is None else args.target)
    args.idle *= 1e-3
    args.retries = 0 if args.quick else args.retries
    if args.rounds < 1 or not args.shapes:
        parser.error("--rounds and --shapes need at least one")
    if not 1 <= args.placements <= args.rounds:
        parser.error("--placements: from one to as many as rounds")
    files = chosen(parser, "shapes", [word.split(".")[0] for word in args.shapes], cases.networks(args.shapes_folder))
    known = {name: cases.read_shapes(name, args.shapes_folder) for name in files}
    args.selected = []
    for word in args.shapes:
        network, _, layer = word.partition(".")
        found = [shape for shape in known[network] if layer in ("", shape.layer)]
        if not found:
            parser.error(f"--shapes: {network} has the layers {', '.join(s.layer for s in known[network])}")
        args.selected += found
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    record = machine.record(args.threads, args.cpus)
    today = datetime.datetime.now(datetime.timezone.utc)
    names = (
        "shapes",
        "ops",
        "layout",
        "dtype",
        "activation",
        "threads",
        "offset",
        "rounds",
        "placements",
        "retries",
        "idle",
        "target",
    )
    settings = {name: getattr(args, name) for name in names} | {
        "seed": args.seed,
        "date": f"{today:%Y-%m-%d %H:%M} UTC",
    }
    path = args.output or HERE / "results" / f"{today:%Y%m%d-%H%M}-{record['commit']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = Results(record, settings)
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fastbn-bench-", dir=shared) as folder:
        driver = Driver(args, results, Path(folder))
        try:
            driver.run(args.selected, path)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
    print(f"{path}: {len(results.cases)} cases in {results.minutes:.1f} minutes")
    return 0 if results.cases else 1


if __name__ == "__main__":
    sys.exit(main())
