"""The driver of the benchmark suite: every contender in a process of its own, on the same cores, taking turns.

    python benchmarks/run.py --shapes resnet50,bn_inception            # everything; see docs/benchmarks.md
    python benchmarks/run.py --quick --contenders limit,fastbn,torch   # a look
    python benchmarks/run.py --dtype f32,f16,bf16 --threads 1,2        # these are compared: they take turns

Only one process computes at a time: the driver says "sample" to one and waits for its answer. Before each sample there
is idle time, in which the threads of the others go to sleep, and then untimed calls. The order is drawn anew for every
round. A result is compared with float64 before it is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import cases
import machine
from cases import Array, Case, Shape
from contenders import BY_NAME, CONTENDERS, GROUPS
from fastbn.memory import usable_memory
from results import (
    Result,
    Results,
    Samples,
    is_limit,
    limit_of,
    paired,
    shares,
    unsettled,
    worst_spread,
)

HERE = Path(__file__).resolve().parent
MEMORY_SHARE = 0.9  # of what is available


class WorkerError(Exception):
    """A worker has died."""


class Seat(NamedTuple):
    """Who takes turns: a contender with cases of one kind."""

    contender: str
    dtype: str
    activation: str
    threads: int
    reader: bool

    @classmethod
    def of(cls, contender: str, case: Case) -> Seat:
        return cls(contender, case.dtype, case.activation, case.threads, case.reader)


class Process:
    """The driver's end of a worker."""

    def __init__(self, name: str, threads: int, offset: int, cpus: Sequence[int], log: Path) -> None:
        self.log = log
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
        self.processes: dict[Seat, Process] = {}
        self.failed = False  # some fastbn did not run, or was wrong

    def skip(self, contender: str, reason: str) -> None:
        """One line, once per contender and reason."""
        line = f"{contender}: {reason}"
        if line not in self.results.skipped:
            self.results.skipped.append(line)
            print(f"skipped  {line}", flush=True)

    def start_workers(self) -> None:
        a = self.args
        kinds = itertools.product(a.contenders, a.dtype, a.activation, a.threads, a.reader)
        for seat in itertools.starmap(Seat, kinds):
            log = self.folder / f"{'-'.join(map(str, seat))}.log"
            try:
                process = Process(seat.contender, seat.threads, a.offset, a.cpus[: seat.threads], log)
            except WorkerError as failure:
                self.skip(seat.contender, str(failure))
                continue
            if "missing" in process.hello:
                self.skip(seat.contender, process.hello["missing"])
                process.stop()
                continue
            self.processes[seat] = process
            self.results.versions[seat.contender] = process.hello["versions"]

    def stop_workers(self) -> None:
        for process in self.processes.values():
            process.stop()
        self.processes.clear()

    def ask(self, seat: Seat, do: str, **arguments: Any) -> dict[str, Any] | None:
        """None if the contender has failed; it is out if its process has died."""
        try:
            answer = self.processes[seat].ask(do, **arguments)
        except WorkerError as failure:
            self.failed = self.failed or seat.contender.startswith("fastbn")
            self.skip(seat.contender, f"{failure} ({seat.dtype}, {seat.activation}, {seat.threads} threads)")
            self.processes.pop(seat).stop()
            return None
        problem = answer.get("failed") or answer.get("wrong")
        if problem:
            self.failed = self.failed or seat.contender.startswith("fastbn")
            where = arguments.get("case_record", {}).get("name", "")
            self.skip(seat.contender, f"{problem} {where}".rstrip())
            return None
        return answer

    def fitting(self, group: Sequence[Case]) -> dict[Seat, Case]:
        """Those for which memory suffices, the important contenders first."""
        left = min(machine.memory_bytes("MemAvailable") or 1 << 62, usable_memory()) * MEMORY_SHARE
        fitting = {}
        for name, case in itertools.product(self.args.contenders, group):
            seat = Seat.of(name, case)
            if seat not in self.processes:
                continue
            left -= (self.processes[seat].hello["buffers"][case.op] + 2 * case.residual) * case.nbytes
            if left > 0:
                fitting[seat] = case
            else:
                self.skip(name, f"not enough memory beside the others for {case.name}")
        return fitting

    def prepare(self, seats: dict[Seat, Case], verify: bool) -> dict[Seat, Case]:
        ready = {}
        for seat, case in seats.items():
            answer = self.ask(
                seat,
                "prepare",
                case_record=case.to_json(),
                folder_name=str(self.arrays_of(case.dtype, case.activation)),
                target=self.args.target,
                warm=self.args.warm,
                verify=verify,
            )
            if answer is not None and "unsupported" not in answer:
                ready[seat] = case
                continue
            if answer is not None and not is_limit(seat.contender):
                self.skip(seat.contender, f"{answer['unsupported']} ({case.op}, {case.layout})")
            self.release([seat])
        return ready

    def release(self, seats: Iterable[Seat]) -> None:
        for seat in seats:
            if seat in self.processes:
                self.ask(seat, "release")

    def rounds(self, ready: Iterable[Seat], count: int) -> dict[Seat, list[float]]:
        samples: dict[Seat, list[float]] = {seat: [] for seat in ready}
        for _ in range(count):
            for seat in self.random.sample(list(samples), len(samples)):
                time.sleep(self.args.idle)
                answer = self.ask(seat, "sample")
                if answer is None:
                    del samples[seat]
                else:
                    samples[seat].append(answer["seconds"])
        return samples

    def attempt(self, group: Sequence[Case]) -> dict[Case, Samples]:
        """All rounds, in parts for which the arrays are allocated anew: which physical pages they get is chance, and
        changes the time for as long as they live."""
        parts = []
        ready = self.fitting(group)
        for i in range(self.args.placements):
            ready = self.prepare(ready, verify=i == 0)
            parts.append(self.rounds(ready, (self.args.rounds + i) // self.args.placements))
            self.release(ready)
            ready = {seat: case for seat, case in ready.items() if seat in self.processes}
        found: dict[Case, Samples] = {case: {} for case in group}
        for seat, case in ready.items():
            if all(seat in part for part in parts):
                found[case][seat.contender] = [seconds for part in parts for seconds in part[seat]]
        return {case: samples for case, samples in found.items() if samples}

    def measure(self, group: Sequence[Case]) -> list[Result]:
        """Cases that take turns; again, all of them, if one did not settle."""
        best: dict[Case, Samples] = {}
        attempts = 0
        while attempts <= self.args.retries:
            attempts += 1
            found = self.attempt(group)
            if not found:
                break
            best = min(best or found, found, key=unrest)
            late = time.monotonic() - self.start > 60 * self.args.minutes
            if late or not any(unsettled(samples) for samples in found.values()):
                break
        return [Result(case, samples, attempts, unsettled(samples)) for case, samples in best.items()]

    def arrays_of(self, dtype: str, activation: str) -> Path:
        """The folder of what cases of a kind are given, and what they must return."""
        folder = self.folder / f"{dtype}-{activation}"
        folder.mkdir(exist_ok=True)
        return folder

    def write(self, arrays: dict[str, Array], case: Case) -> None:
        for name, array in arrays.items():
            turn = case.layout == "nhwc" and array.ndim == 4
            turned = np.ascontiguousarray(np.moveaxis(array, 1, -1)) if turn else array
            np.save(self.arrays_of(case.dtype, case.activation) / f"{name}.npy", turned)

    def write_right(self, case: Case, inputs: dict[str, Array], right: dict[str, Array]) -> None:
        arrays = {f"{name}_expected": right[name] for name in cases.expected_names(case)}
        arrays |= {name: right[name].astype(inputs["gamma"].dtype) for name in ("mean", "var")}
        scale = np.abs(right["y"]).max()
        if case.op == "backward":
            scale = np.abs(inputs["dy"]).max() * np.abs(inputs["gamma"] / np.sqrt(right["var"] + cases.EPS)).max()
        self.write(arrays | {"y": right["y"], "scale": np.asarray(scale, np.float64)}, case)

    def run_shape(self, shape: Shape) -> None:
        a = self.args
        todo = list(cases.cases_in_turns(shape, a.layout, a.ops, a.dtype, a.activation, a.threads, a.reader))
        ops = [op for op in a.ops if any(group[0].op == op for group in todo)]
        known = {}
        for dtype, activation in sorted({(case.dtype, case.activation) for group in todo for case in group}):
            inputs = cases.make_inputs(shape, dtype, ops, activation)
            known[dtype, activation] = inputs, cases.right_results_of(inputs, ops, activation)
        written = None
        for group in todo:
            for case in {(case.dtype, case.activation): case for case in group}.values():
                inputs, right = known[case.dtype, case.activation]
                if case.layout != written:
                    self.write({name: array for name, array in inputs.items() if "running" not in name}, case)
                self.write_right(case, inputs, right[case.op])
            written = group[0].layout
            for result in self.measure(group):
                self.add(result)

    def add(self, result: Result) -> None:
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


def unrest(found: dict[Case, Samples]) -> tuple[int, int, float]:
    """What makes one attempt worse than another: contenders that are missing, then cases that have not settled, then
    the widest spread."""
    return (
        -sum(map(len, found.values())),
        sum(unsettled(samples) is not None for samples in found.values()),
        max(worst_spread(samples) for samples in found.values()),
    )


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
        if name != base and not is_limit(name)
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
    everybody = [name for name in CONTENDERS if name not in BY_NAME]
    add(
        "--contenders",
        type=words,
        default=everybody,
        help=f"names, or the groups limit and fastbn; {' and '.join(BY_NAME)} only by name",
    )
    add("--ops", type=words, default=list(cases.OPS), help=",".join(cases.OPS))
    add("--layout", type=words, default=list(cases.LAYOUTS), help=",".join(cases.LAYOUTS))
    add("--dtype", type=words, default=["f32"], help=",".join(cases.DTYPES) + "; several of them take turns")
    add("--activation", type=words, default=["identity"], help="relu, add+relu, ...; several of them take turns")
    threads_help = "of every contender, on as many CPUs; several of them take turns"
    add("--threads", type=words, default=[str(len(available))], help=threads_help)
    reader_help = "whether the result is read once in the time that counts: no,yes; both take turns"
    add("--reader", type=words, default=["no"], help=reader_help)
    add("--offset", type=int, default=0, help="bytes by which arrays miss an alignment of 64; 16 is NumPy's habit")
    add("--rounds", type=int, help="samples of each contender (default 15)")
    add("--placements", type=int, help="how often in these rounds arrays are allocated anew (default 3)")
    add("--retries", type=int, default=1, help="how often cases of which one did not settle are measured again")
    add("--minutes", type=float, default=20, help="after these nothing is measured again")
    add("--idle", type=float, default=20, help="milliseconds before each sample (default 20)")
    add(
        "--warm", type=int, default=8, help="least untimed calls before each sample, unless they take 20 ms (default 8)"
    )
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
    args.dtype = chosen(parser, "dtype", args.dtype, list(cases.DTYPES))
    args.activation = chosen(parser, "activation", args.activation, cases.activations())
    counts = [str(count + 1) for count in range(len(available))]
    args.threads = [int(count) for count in chosen(parser, "threads", args.threads, counts)]
    args.reader = [answer == "yes" for answer in chosen(parser, "reader", args.reader, ["no", "yes"])]
    args.cpus = available[: max(args.threads)]
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
    record = machine.record(max(args.threads), args.cpus)
    today = datetime.datetime.now(datetime.timezone.utc)
    names = (
        "shapes",
        "ops",
        "layout",
        "dtype",
        "activation",
        "threads",
        "reader",
        "offset",
        "rounds",
        "placements",
        "retries",
        "idle",
        "warm",
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
    return 0 if results.cases and not driver.failed else 1


if __name__ == "__main__":
    sys.exit(main())
