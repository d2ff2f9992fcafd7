"""The kernels on an emulated processor give the bits that they give here: `make test-arm` and `make test-valgrind`.

Compiles src_c with the flags of setup.py and tests/checksums.c for both, and compares what they print. Valgrind also
looks for values that depend on memory which nobody has written. Ends with a message, and without an error, where the
emulator or its compiler is missing: nothing is installed from here.
"""

import platform
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "src_c"


class Emulator(NamedTuple):
    command: list[str]
    machine: str
    compiler: str
    link: list[str]
    packages: str  # names of Debian and Ubuntu


EMULATORS = {
    "arm": Emulator(
        ["qemu-aarch64"],
        "aarch64",
        "aarch64-linux-gnu-gcc",
        ["-static"],
        "gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user",
    ),
    "valgrind": Emulator(
        ["valgrind", "--quiet", "--error-exitcode=1"], platform.machine(), "cc", [], "valgrind libc6-dbg"
    ),
}


def build(entry: Path, folder: Path, machine: str, compiler: str, link: list[str]) -> Path:
    """The program of a C file and src_c for a machine, all its ISAs in it."""
    folder.mkdir()
    setup = runpy.run_path(str(ROOT / "setup.py"))
    isas = setup["isa_rows"](machine)
    common = ["-std=gnu11", *setup["OPTIMIZATION"], *setup["NUMERICS"], "-Wall", "-Wextra", f"-I{SOURCES}"]
    units = {SOURCES / f"isa_{name}.c": flags for name, flags in reversed(isas)}  # as in setup.py, the slowest first
    units |= {SOURCES / "dispatch.c": isas[-1][1], entry: isas[-1][1]}
    objects = [str(folder / f"{source.stem}.o") for source in units]
    commands = [
        [compiler, *common, *flags, "-c", str(source), "-o", target]
        for (source, flags), target in zip(units.items(), objects, strict=True)
    ]
    program = folder / entry.stem
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True), commands))
    subprocess.run([compiler, *link, *objects, "-o", str(program)], check=True)
    return program


def main(name: str) -> int:
    emulator = EMULATORS[name]
    missing = [command for command in (emulator.compiler, emulator.command[0]) if shutil.which(command) is None]
    if missing:
        print(f"fastbn: test-{name} is skipped: no {' and no '.join(missing)} (packages {emulator.packages})")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        checksums = ROOT / "tests" / "checksums.c"
        with ThreadPoolExecutor(2) as pool:
            here, there = pool.map(
                lambda arguments: build(checksums, *arguments),
                (
                    (Path(temporary, "here"), platform.machine(), "cc", []),
                    (Path(temporary, "there"), emulator.machine, emulator.compiler, emulator.link),
                ),
            )
        printed = [
            subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
            for command in ([str(here)], [*emulator.command, str(there)])
        ]
    # each line: ISA, what was computed, checksum
    found: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for place, lines in zip(("here", name), printed, strict=True):
        for line in lines:
            isa, computed, checksum = re.fullmatch(r"(\w+) (.+) (\w+)", line).groups()  # type: ignore[union-attr]
            found[computed][f"{isa} {place}"] = checksum
    places = {place for checksums in found.values() for place in checksums}
    different = {computed: of for computed, of in found.items() if len(set(of.values())) > 1 or set(of) != places}
    for computed, checksums in different.items():
        print(f"{computed}: {checksums}")
    print(f"fastbn: test-{name}: {len(found)} checksums of {', '.join(sorted(places))}: {len(different)} differ")
    return int(bool(different) or not printed[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
