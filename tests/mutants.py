"""`make mutants`: bugs planted into kernels and schedule by rules (mutant_rules.py), and the tests that find them.

A mutant is the source with one place of one line (or two neighbouring statements) changed by one rule. All mutants of
all lines are listed; 200 of them are drawn with a fixed seed, of each file so many as it has lines, the rules in turn.
Each is compiled for the best ISA of this machine and the ABI floor, and meets a subset of `make test`: QUICK on the
best ISA where the mutant is found, at -O0; if it survives, THOROUGH on both, at -O1.

    python tests/mutants.py            those that the log in build/mutants has no verdict of; then record and page
    python tests/mutants.py --again    and survivors once more, with some long tests
"""

import argparse
import hashlib
import json
import os
import platform
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import sysconfig
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from functools import cache
from multiprocessing import Process
from pathlib import Path
from typing import Any

import pytest

from mutant_rules import RULES, Mutant, code_of, mutants_of, planted

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests" / "results" / "mutants.json"
PAGE = ROOT / "docs" / "planted_bugs.md"
BUILD = ROOT / "build" / "mutants"
LOG = BUILD / "log.jsonl"  # a line for each verdict: an interruption loses nothing
CC = os.environ.get("CC", "cc")
NOT_COUNTED = ("does not compile", "not built here", "same machine code")  # replaced by the next mutant

SEED, COUNT = 90, 200
FILES = (
    *(
        f"src_c/kernels/{name}.inc"
        for name in ("stats", "apply", "backward", "adjoining", "copy", "finish", "dtype", "table")
    ),
    *(f"src_c/{name}" for name in ("simd.h", "half.h", "activations.def", "dispatch.c")),
    *(f"fastbn/_{name}.pxi" for name in ("job", "blocks", "finish", "schedule")),
)

# The subset of `make test`, the tests that notice most first: of each test so many cases, drawn with the seed.
QUICK = {
    "test_stats.py::test_stats_are_exact_on_exact_data": 16,
    "test_forward.py::test_y_matches_reference": 24,
    "test_backward.py::test_gradients_match_reference": 24,
    "test_bits.py::test_bits_of_a_drawn_call": 16,
    "test_bits.py::test_bits_are_those_of_this_version": 8,
    "test_memory.py::test_memory_copy_writes_every_byte_and_no_other": 8,
    "test_forward.py::test_statistics_of_exact_data_are_exact": 16,
    "test_backward.py::test_gradients_of_every_tail": 16,
    "test_bits.py::test_bits_do_not_depend_on_isa_or_threads": 8,
    "test_inplace_and_out.py::test_out_of_backward_may_be_dy": 8,
    "test_forward.py::test_statistics_are_as_accurate_as_promised": 8,
    "test_backward.py::test_offsets_of_x_and_dy_cost_no_digits": 4,
    "test_backward.py::test_float64_gradients_keep_what_additions_lose": 4,
    "test_forward.py::test_hostile_data_stay_in_their_channel": 12,
    "test_guard_pages.py::test_nothing_beyond_the_arrays_is_touched": 4,
    "test_dispatch.py::test_dispatch_gives_a_processor_what_it_knows": 7,
}
THOROUGH = {
    "test_bits.py::test_bits_of_a_drawn_call": 60,
    "test_bits.py::test_bits_of_hostile_data": 16,
    "test_bits.py::test_bits_of_large_arrays": 16,
    "test_forward.py::test_nan_and_infinity_through_activations": 144,
    "test_forward.py::test_results_are_rounded_to_nearest_even": 16,
    "test_forward.py::test_product_and_offset_are_rounded_once": 4,
    "test_forward.py::test_y_is_within_one_rounding_of_the_largest": 16,
    "test_backward.py::test_float64_gradients_keep_what_additions_lose": 32,
    "test_forward.py::test_leaky_relu_has_the_slope_that_is_asked_for": 4,
    "test_backward.py::test_inference_gradient_is_g_times_scale_even_beside_infinity": 2,
    "test_backward.py::test_gradient_of_an_outlier_that_the_activation_stops": 8,
    "test_stats.py::test_stats_keep_nan_and_inf_in_their_channel": 4,
    "test_reference.py::test_reference_activations_are_those_of_the_kernels": 6,
    "test_layouts.py::test_layout_memory_order_does_not_change_the_numbers": 20,
    "test_layouts.py::test_layout_windows_that_slide_are_used_in_place": 28,
    "test_bits.py::test_bits_do_not_depend_on_flush_to_zero": 2,
    "test_running_stats.py::test_running_guard_is_that_of_the_reference": 16,
    "test_running_stats.py::test_running_guard_changes_no_bit_of_a_finite_batch": 6,
    "test_running_stats.py::test_running_statistics_are_used_in_inference_and_stay": 1,
    "test_running_stats.py::test_running_guard_raises_before_anything_is_written": 2,
    "test_inplace_and_out.py::test_out_may_be_residual_of_forward_and_backward_still_knows_the_mask": 8,
    "test_inplace_and_out.py::test_out_may_be_an_x_that_is_packed": 2,
    "test_inplace_and_out.py::test_out_may_be_the_only_array_with_strides": 4,
    "test_forward.py::test_roundings_that_do_not_average_out": 4,
    "test_forward.py::test_float64_differences_from_an_outlier_do_not_spoil_the_variance": 4,
    "test_forward.py::test_statistics_of_exact_data_are_exact": 60,
    "test_forward.py::test_statistics_are_as_accurate_as_promised": 30,
    "test_forward.py::test_y_matches_reference": 60,
    "test_forward.py::test_hostile_data_stay_in_their_channel": 40,
    "test_backward.py::test_gradients_match_reference": 60,
    "test_backward.py::test_gradients_of_every_tail": 60,
    "test_guard_pages.py::test_nothing_beyond_the_arrays_is_touched": 48,
    "test_guard_pages.py::test_nothing_beyond_the_last_group_is_touched": 24,
    "test_bits.py::test_bits_do_not_depend_on_isa_or_threads": 16,
    "test_bits.py::test_bits_of_a_channel_are_those_that_it_has_alone": 32,
    "test_bits.py::test_bits_of_streamed_output": 48,
    "test_bits.py::test_bits_in_place_and_repeated": 4,
    "test_bits.py::test_bits_of_a_view_are_those_of_its_copy": 80,
    "test_forward.py::test_a_shift_far_from_the_mean_does_not_spoil_the_variance": 6,
    "test_properties.py::test_property_scale_by_a_power_of_two_changes_no_bit": 1,
}
LAST = {  # long ones: with --again only
    "test_cuda.py::test_cuda_activations": 8,
    "test_properties.py::test_property_any_array_is_normalized_as_the_definition_says": 1,
    "test_bits.py::test_bits_do_not_depend_on_alignment": 2,
}
CPU_SECONDS, WALL_SECONDS, MEMORY = 30, 900, 8 << 30  # of a test; of all tests of a mutant; of addresses


def all_mutants() -> list[Mutant]:
    return [mutant for path in FILES for mutant in mutants_of(path, (ROOT / path).read_text())]


def in_turn(mutants: list[Mutant], seed: int) -> list[Mutant]:
    """At random, the rules in turn."""
    shuffled = random.Random(seed).sample(mutants, len(mutants))
    turn: Counter[str] = Counter()
    place = {mutant: (turn.update([mutant.rule]), turn[mutant.rule])[1] for mutant in shuffled}
    return sorted(shuffled, key=lambda mutant: (place[mutant], RULES.index(mutant.rule)))


@cache
def quotas() -> dict[str, int]:
    """How many mutants of each file: by its lines of code, five at least."""
    lines = {path: sum(map(bool, map(str.strip, code_of(path, (ROOT / path).read_text())))) for path in FILES}
    share = {path: max(5, COUNT * n // sum(lines.values())) for path, n in lines.items()}
    largest = max(share, key=share.__getitem__)
    return share | {largest: share[largest] + COUNT - sum(share.values())}


# ---------------------------------------------------------------------------------------------------------------------
# One mutant: build it, run the tests on it


class Builder:
    """The objects of the package, each made once; the package with some of them replaced."""

    def __init__(self, folder: Path) -> None:
        import numpy

        setup: dict[str, Any] = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
        self.folder, self.tree = folder, folder / "tree"
        self.package = folder / "run" / "fastbn"
        shutil.rmtree(self.package, ignore_errors=True)
        shutil.copytree(in_python("import fastbn; print(fastbn.__path__[0])"), self.package)
        self.extension = next(self.package.glob("_core*.so"))
        isas = setup["isa_rows"](platform.machine())
        # An overflow of an array on the stack is a crash.
        common = [
            "-fstack-protector-strong",
            "-g0",
            "-w",
            "-fPIC",
            "-fwrapv",
            "-std=gnu11",
            "-DNDEBUG",
            "-fvisibility=hidden",
            *setup["NUMERICS"],
        ]
        includes = [f"-I{path}" for path in (ROOT / "src_c", numpy.get_include(), sysconfig.get_paths()["include"])]
        floor = isas[-1][1]
        self.flags = {f"isa_{name}.c": [*common, *flags] for name, flags in isas}
        self.flags["dispatch.c"] = [*common, *floor]
        self.flags["_core.c"] = [*common, *floor, *includes, *setup["NUMPY_API"], "-fopenmp"]
        self.cython = ["-3", *(f"-X{name}={value}" for name, value in setup["DIRECTIVES"].items())]
        self.isas = isas_here()
        self.copy_sources()
        self.originals = {unit: self.text(unit, ROOT) for unit in self.flags}

    def copy_sources(self) -> None:
        shutil.rmtree(self.tree, ignore_errors=True)
        shutil.copytree(ROOT / "src_c", self.tree / "src_c")
        (self.tree / "fastbn").mkdir()
        for source in (ROOT / "fastbn").glob("_*.p[xy]*"):
            shutil.copy(source, self.tree / "fastbn")

    def text(self, unit: str, tree: Path) -> bytes:
        """The C of a unit, preprocessed."""
        if unit != "_core.c":
            text = call(CC, *self.flags[unit], "-E", "-P", tree / "src_c" / unit)
            # Compiled in a tenth of the time.
            return text.replace(
                b"static inline __attribute__((always_inline, unused))", b"static __attribute__((unused))"
            )
        command = [sys.executable, "-m", "cython", *self.cython, "fastbn/_core.pyx", "-o", self.folder / unit]
        call(*command, cwd=tree)  # its path stands in the C
        return (self.folder / unit).read_bytes()

    def compile(self, unit: str, text: bytes, level: str) -> Path:
        """Its object, made if there is none of this text."""
        key = hashlib.sha256(text + " ".join([*self.flags[unit], level]).encode()).hexdigest()[:16]
        target = self.folder / "objects" / f"{Path(unit).stem}-{key}.o"
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            (self.folder / unit).write_bytes(text)
            call(CC, *self.flags[unit], level, "-c", self.folder / unit, "-o", target)
        return target

    def link(self, changed: dict[str, bytes], level: str) -> bool:
        """The library with these units; False if their machine code is that of the originals."""
        objects = {
            unit: self.compile(unit, text, level if unit in changed else "-O0") for unit, text in self.originals.items()
        }
        mutated = {unit: self.compile(unit, text, level) for unit, text in changed.items()}
        self.extension.unlink(missing_ok=True)
        call(CC, "-shared", *(objects | mutated).values(), "-o", self.extension, "-fopenmp")
        different = [unit for unit in mutated if mutated[unit].read_bytes() != objects[unit].read_bytes()]
        for unit in different:
            mutated[unit].unlink()
        return bool(different)

    def plant(self, mutant: Mutant) -> dict[str, bytes]:
        """The units that it changes, the best ISA first."""
        self.copy_sources()
        path = self.tree / mutant.file
        path.write_text(planted(mutant, path.read_text()))
        units = ["_core.c"] if mutant.file.endswith(".pxi") else [*(f"isa_{isa}.c" for isa in self.isas), "dispatch.c"]
        texts = {unit: self.text(unit, self.tree) for unit in units}
        return {unit: text for unit, text in texts.items() if text != self.originals[unit]}

    def judge(self, mutant: Mutant, again: bool) -> str:
        try:
            changed = self.plant(mutant)
            if not changed:
                return "not built here"
            first = next(iter(changed))
            if not self.link({first: changed[first]}, "-O0") and len(changed) == 1:
                return "same machine code"
            isas = [isa for isa in self.isas if f"isa_{isa}.c" == first] or self.isas[:1]
            verdict = self.run_tests(QUICK, isas)
            if verdict:
                return verdict
            # Optimized: some mutants are the same machine code then, and the long tests are faster.
            if not self.link(changed, "-O1"):
                return "same machine code"
            return self.run_tests(THOROUGH | (LAST if again else {}), self.isas) or "survived"
        except subprocess.CalledProcessError as error:
            (self.folder / "compiler.log").write_bytes(error.stderr)
            return "does not compile"

    def run_tests(self, subset: dict[str, int], isas: list[str]) -> str:
        """In a process of its own: "", or how it ended and at which test."""
        note = self.folder / "test"
        note.write_text("the collection of tests")
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                out = os.open(self.folder / "tests.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(out, 1)
                os.dup2(out, 2)
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
                sys.path.insert(0, str(self.package.parent))
                os.environ["PYTHONPATH"] = str(self.package.parent)  # of processes that tests start
                import fastbn

                assert Path(fastbn.__file__).parent == self.package
                fastbn.runtime.available_isas = lambda: tuple(isas)
                paths = [f"{ROOT}/tests/{name}" for name in dict.fromkeys(test.partition("::")[0] for test in subset)]
                options = ["-x", "-q", "-p", "no:cacheprovider", "-o", "timeout=0", "--tb=short", "--durations=9"]
                with fastbn.runtime.isa(isas[0]):
                    code = pytest.main(
                        [*options, "--rootdir", str(ROOT), *paths], plugins=[Sampler(subset, note, self.tree / "src_c")]
                    )
            finally:
                os._exit(code)
        started = time.monotonic()
        while not (done := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > started + WALL_SECONDS:  # all threads wait for each other
                os.kill(pid, signal.SIGPROF)
            time.sleep(0.05)
        code, test = os.waitstatus_to_exitcode(done[1]), note.read_text()
        if code >= 0:
            return f"caught by {test}" if code else ""
        return f"timeout in {test}" if code == -signal.SIGPROF else f"crash ({signal.Signals(-code).name}) in {test}"


def call(*command: Any, cwd: Path | None = None) -> bytes:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, cwd=cwd).stdout


def isas_here() -> list[str]:
    """The best one of this machine, and the floor."""
    names = in_python("import fastbn; print(*fastbn.runtime.available_isas())").split()
    return list(dict.fromkeys((names[0], names[-1])))


def in_python(code: str) -> str:
    return call(sys.executable, "-P", "-c", code).decode().strip()


class Sampler:
    """A plugin of pytest: some cases of the tests of a subset, on the C of the mutant where they compile it themselves,
    and a note of the one that runs."""

    def __init__(self, subset: dict[str, int], note: Path, sources: Path) -> None:
        self.subset, self.note, self.sources = subset, note, sources

    @pytest.hookimpl(trylast=True)
    def pytest_generate_tests(self, metafunc: Any) -> None:
        test = f"{Path(metafunc.module.__file__).name}::{metafunc.function.__name__}"
        wanted, cases = self.subset.get(test, 0), metafunc._calls
        if len(cases) > wanted:
            kept = random.Random(f"{SEED} {test}").sample(range(len(cases)), wanted)
            metafunc._calls = [cases[i] for i in sorted(kept)]

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        order = list(self.subset)
        for module in {item.module for item in items if hasattr(item.module, "SOURCES")}:
            module.SOURCES = self.sources
        items[:] = [item for item in items if f"{item.path.name}::{item.originalname}" in self.subset]
        items.sort(key=lambda item: order.index(f"{item.path.name}::{item.originalname}"))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.note.write_text(nodeid.removeprefix("tests/"))
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # of this process: however slow the machine is


# ---------------------------------------------------------------------------------------------------------------------
# All of them

# Mutants that are no bugs: what was, what it becomes, and why no test can notice it.
ARGUMENTS = Path(__file__).with_name("equivalent_mutants.txt").read_text()


def key(before: str, after: str) -> tuple[str, str]:
    """The content of a mutant, wherever it is."""
    one, other = ("; ".join(line.strip().rstrip(";") or ";" for line in text.split("\n")) for text in (before, after))
    return one, other


EQUIVALENT = {
    key(before, after): " ".join(argument.split())
    for before, after, argument in re.findall(r"^- (.*)\n\+ (.*)\n= ([^\n]*(?:\n(?!\n).*)*)", ARGUMENTS, re.M)
}


@cache
def version(path: str) -> str:
    return hashlib.sha256((ROOT / path).read_bytes()).hexdigest()[:16]


def read_log() -> dict[Mutant, str]:
    """The verdicts on mutants of files as they are now."""
    lines = LOG.read_text().splitlines() if LOG.exists() else []
    entries = [(of, Mutant(*mutant), verdict) for of, mutant, verdict in map(json.loads, lines)]
    return {mutant: verdict for of, mutant, verdict in entries if of == version(mutant.file)}


def work(files: list[str], name: str, again: bool) -> None:
    """Judge mutants of these files, each rule in turn, until there are as many as the quota says."""
    folder = BUILD / name
    (folder / "objects").mkdir(parents=True, exist_ok=True)
    builder, known = Builder(folder), read_log()
    for path in files:
        counted = 0
        for mutant in in_turn(mutants_of(path, (ROOT / path).read_text()), SEED):
            if counted == quotas()[path]:
                break
            verdict = known.get(mutant)
            argued = key(mutant.before, mutant.after) in EQUIVALENT
            if verdict is None or (again and verdict == "survived" and not argued):
                verdict = builder.judge(mutant, again)
                with LOG.open("a") as log:
                    log.write(json.dumps([version(path), mutant, verdict]) + "\n")
            counted += verdict not in NOT_COUNTED


def drawn(known: dict[Mutant, str]) -> Iterator[tuple[Mutant, str]]:
    """The mutants that the log has the verdicts of, in the order of the draw, as far as the quotas go."""
    for path in FILES:
        counted = 0
        for mutant in in_turn(mutants_of(path, (ROOT / path).read_text()), SEED):
            if counted < quotas()[path]:
                yield mutant, known[mutant]
                counted += known[mutant] not in NOT_COUNTED


def record(known: dict[Mutant, str]) -> dict[str, Any]:
    sys.path.append(str(ROOT / "benchmarks"))
    import fastbn
    import machine

    found = list(drawn(known))
    entries = []
    for mutant, verdict in found:
        if verdict in NOT_COUNTED:
            continue
        argument = EQUIVALENT.get(key(mutant.before, mutant.after)) if verdict == "survived" else None
        entry = mutant._asdict() | {"verdict": "equivalent" if argument else verdict}
        entries.append(entry | ({"argument": argument} if argument else {}))
    return {
        "version": fastbn.__version__,
        "compiler": call(CC, "--version").decode().splitlines()[0],
        "machine": machine.record(1, sorted(os.sched_getaffinity(0))),
        "ISAs": isas_here(),
        "seed": SEED,
        "tests": len(QUICK | THOROUGH | LAST),
        "mutants of all lines": len(all_mutants()),
        "replaced": dict(Counter(verdict for _, verdict in found if verdict in NOT_COUNTED)),
        "mutants": entries,
    }


# ---------------------------------------------------------------------------------------------------------------------
# The page


def counts(entries: list[dict[str, Any]]) -> list[int]:
    """Drawn, found, equivalent, survived."""
    left = Counter(entry["verdict"] for entry in entries)
    return [len(entries), len(entries) - left["equivalent"] - left["survived"], left["equivalent"], left["survived"]]


def share_found(entries: list[dict[str, Any]]) -> float:
    drawn, found, equivalent, _ = counts(entries)
    return found / (drawn - equivalent)


def change(entry: dict[str, Any]) -> str:
    """Place, rule and change as cells of a table."""
    before, after = (text.replace("|", "\\|") for text in key(entry["before"], entry["after"]))
    return f"{Path(entry['file']).name}:{entry['line']} | {entry['rule']} | `` {before} `` becomes `` {after} ``"


def page(results: dict[str, Any]) -> str:
    entries, machine = results["mutants"], results["machine"]
    drawn, found, equivalent, survived = counts(entries)
    ends = Counter(entry["verdict"].split()[0] for entry in entries)
    tests = Counter(
        re.sub(r".*(caught by|in) |\[.*", "", entry["verdict"]) for entry in entries if "::" in entry["verdict"]
    )
    replaced = ", ".join(f"{number} {why}" for why, number in sorted(results["replaced"].items()))
    paragraphs = [
        "Do the tests notice a wrong line? `make mutants` changes the kernels and the schedule, one place at a time, "
        f"by {len(RULES)} rules, which give {results['mutants of all lines']} mutants of all lines of code. {drawn} "
        f"of them, drawn with seed {results['seed']}, have been compiled and have met some cases of "
        f"{results['tests']} tests of `make test`, named in [tests/mutants.py](../tests/mutants.py).",
        f"**{found} of the {drawn - equivalent} that are bugs have been found: {100 * share_found(entries):.1f} %.** "
        f"{ends['caught']} by a test that failed, {ends['crash']} by a crash, {ends['timeout']} by a time limit. "
        f"{equivalent} are equivalent: no bugs, as is argued below, one by one. {survived} survived.",
        f"Replaced by the next of their file, and not counted: {replaced}. (Not built here: in the code of another "
        "ISA. Same machine code: `-O1` makes the same object of it.)",
        f"Version {results['version']}, commit {machine['commit']}; {machine['cpu']}, {' and '.join(results['ISAs'])}; "
        f"{results['compiler']}. Each mutant and its end: [mutants.json](../tests/results/mutants.json).",
    ]

    def share(key: str, names: tuple[str, ...]) -> list[str]:
        rows = [[name, *map(str, counts([e for e in entries if e[key] == name]))] for name in names]
        return table([key, "drawn", "found", "equivalent", "survived"], [" | ".join(row) for row in rows])

    survivors, equivalents = ([e for e in entries if e["verdict"] == end] for end in ("survived", "equivalent"))
    sections = {
        "By rule": share("rule", RULES),
        "By file": share("file", tuple(dict.fromkeys(entry["file"] for entry in entries))),  # those of its commit
        "The tests that found them": table(["test", "mutants"], [f"`{t}` | {n}" for t, n in tests.most_common()]),
        "Survivors": table(["place", "rule", "change"], [change(e) for e in survivors]),
        "Equivalent mutants": table(
            ["place", "rule", "change", "why it is none"], [f"{change(e)} | {e['argument']}" for e in equivalents]
        ),
    }
    text = ["# Planted bugs", *("\n".join(textwrap.wrap(p, 120, break_on_hyphens=False)) for p in paragraphs)]
    text += [f"## {head}\n\n" + "\n".join(lines) for head, lines in sections.items()]
    return "\n\n".join(text) + "\n"


def table(head: list[str], rows: list[str]) -> list[str]:
    if not rows:
        return ["None."]
    return [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *(f"| {row} |" for row in rows)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at the same time (all CPUs)")
    parser.add_argument("--again", action="store_true", help="survivors once more")
    parser.add_argument("--page", action="store_true", help="only the page, from what is recorded")
    options = parser.parse_args(arguments)
    if options.page:
        PAGE.write_text(page(json.loads(RESULTS.read_text())))
        return 0
    shares: list[list[str]] = [[] for _ in range(options.jobs)]
    for path, _ in sorted(quotas().items(), key=lambda item: -item[1]):
        min(shares, key=lambda share: sum(quotas()[file] for file in share)).append(path)
    (BUILD / "unchanged" / "objects").mkdir(parents=True, exist_ok=True)
    builder = Builder(BUILD / "unchanged")
    builder.link({}, "-O0")
    if found := builder.run_tests(QUICK, builder.isas) or builder.run_tests(THOROUGH | LAST, builder.isas):
        print(f"fastbn: the code as it is: {found}", file=sys.stderr)
        return 1
    workers = [Process(target=work, args=(share, str(i), options.again)) for i, share in enumerate(shares) if share]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        return 1
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record(read_log()), indent=1) + "\n")
    PAGE.write_text(page(json.loads(RESULTS.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
