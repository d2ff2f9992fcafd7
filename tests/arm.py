"""`make test-arm`: the kernels, cross-compiled for aarch64 and run by qemu, give the bits that they give here.

Compiles src_c with the flags of setup.py and tests/checksums.c for both machines and compares what they print. Ends
with a message, and without an error, where the cross compiler or qemu is missing: nothing is installed from here.
"""

import platform
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "src_c"
CROSS, QEMU = "aarch64-linux-gnu-gcc", "qemu-aarch64"
PACKAGES = "gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user (names of Debian and Ubuntu)"


def build(folder: Path, machine: str, compiler: list[str]) -> Path:
    """The program for a machine, all its ISAs in it."""
    setup = runpy.run_path(str(ROOT / "setup.py"))
    isas = setup["isa_rows"](machine)
    common = ["-std=gnu11", *setup["OPTIMIZATION"], *setup["NUMERICS"], "-Wall", "-Wextra", f"-I{SOURCES}"]
    units = {SOURCES / f"isa_{name}.c": flags for name, flags in isas}
    units |= {SOURCES / "dispatch.c": isas[-1][1], ROOT / "tests" / "checksums.c": isas[-1][1]}
    objects = [str(folder / f"{machine}_{source.stem}.o") for source in units]
    commands = [
        [*compiler, *common, *flags, "-c", str(source), "-o", target]
        for (source, flags), target in zip(units.items(), objects, strict=True)
    ]
    program = folder / machine
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True), commands))
    subprocess.run([*compiler, "-static", *objects, "-o", str(program)], check=True)
    return program


def main() -> int:
    missing = [name for name in (CROSS, QEMU) if shutil.which(name) is None]
    if missing:
        print(f"fastbn: test-arm is skipped: {' and '.join(missing)} not found; they come with {PACKAGES}")
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        here = build(folder, platform.machine(), ["cc"])
        there = build(folder, "aarch64", [CROSS])
        lines = [
            line.rsplit(" ", 1)
            for command in ([str(here)], [QEMU, str(there)])
            for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        ]
    found: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for key, checksum in lines:
        isa, kernel = key.split(" ", 1)
        found[kernel][isa] = checksum
    isas = {isa for checksums in found.values() for isa in checksums}
    different = [kernel for kernel, checksums in found.items() if len(set(checksums.values())) > 1]
    incomplete = [kernel for kernel, checksums in found.items() if set(checksums) != isas]
    for kernel in different:
        print(f"{kernel}: {', '.join(f'{isa} {checksum}' for isa, checksum in found[kernel].items())}")
    print(f"fastbn: test-arm: {len(found)} checksums on {', '.join(sorted(isas))}: {len(different)} differ")
    return int(bool(different or incomplete) or "neon" not in isas or len(isas) < 2 or not found)


if __name__ == "__main__":
    sys.exit(main())
