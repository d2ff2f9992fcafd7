"""What the kernels alone need, in the caches of one core: `python benchmarks/kernels.py`, in a source tree.

Compiles src_c with the flags of setup.py and kernels.c, and runs it. What a benchmark takes beyond this is memory,
threads and the call.
"""

import platform
import runpy
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "src_c"


def main() -> None:
    setup = runpy.run_path(str(ROOT / "setup.py"))
    isas = setup["isa_rows"](platform.machine())
    units = {SOURCES / f"isa_{name}.c": flags for name, flags in isas}
    units |= {SOURCES / "dispatch.c": isas[-1][1], ROOT / "benchmarks" / "kernels.c": isas[-1][1]}
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for source, flags in units.items():
            objects.append(f"{folder}/{source.stem}.o")
            options = ["-std=gnu11", *setup["OPTIMIZATION"], *setup["NUMERICS"], "-Wall", "-Wextra", f"-I{SOURCES}"]
            subprocess.run(["cc", *options, *flags, "-c", str(source), "-o", objects[-1]], check=True)
        subprocess.run(["cc", *objects, "-lm", "-o", f"{folder}/kernels"], check=True)
        subprocess.run([f"{folder}/kernels"], check=True)


if __name__ == "__main__":
    main()
