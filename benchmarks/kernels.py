"""What the kernels alone need, in the caches of one core: `python benchmarks/kernels.py`, in a source tree.

Compiles kernels.c and src_c with the flags of setup.py, and runs it. What a benchmark takes beyond this is memory,
threads and the call.
"""

import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    sys.path.append(str(ROOT / "tests"))
    from emulated import build

    with tempfile.TemporaryDirectory() as temporary:
        source = ROOT / "benchmarks" / "kernels.c"
        subprocess.run([build(source, Path(temporary, "here"), platform.machine(), "cc", [])], check=True)


if __name__ == "__main__":
    main()
