"""The schedule under ThreadSanitizer: `make test-tsan`, whose arguments are those of pytest.

Compiles the library with it into build/tsan, and tests/openmp.c, which stands in for OpenMP. Defects that a schedule
could have must be found in each way to share the work; then these ways, and the tests, must pass without a report.
Ends with a message, and without an error, where gcc has no ThreadSanitizer: nothing is installed from here.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "build" / "tsan"
FOUND = 66  # the exit status after a report
# What the main thread hands to a region lies on its stack, and is the compiler's: it is not what "early" must find.
SUPPRESSED = "race_top:_omp_fn\n"

# shape of x, axis of the channels, step along the last axis
WAYS = {
    "groups of channels": ((8, 64, 14, 14), 1, 1),
    "bytes of several planes": ((16, 64, 7, 7), 1, 1),
    "staggered groups": ((20, 16, 64, 64), 1, 1),
    "blocks of channels": ((64, 3, 64, 64), 1, 1),
    "rows of all channels": ((64, 56, 56, 24), 3, 1),
    "packed blocks": ((64, 3, 64, 128), 1, 2),
}
IN_STEPS = ("blocks of channels", "rows of all channels", "packed blocks")  # whose threads wait for each other
PLANTED = {"twice": WAYS, "early": WAYS, "unordered": IN_STEPS}
CALLS = """
import sys, numpy, fastbn
shape, axis, step = map(eval, sys.argv[1:])
x = numpy.random.default_rng(0).standard_normal(shape, "f4")[..., ::step]
for _ in range(3):
    y, cache = fastbn.batchnorm_forward(x, axis=axis, residual=x, activation="relu", num_threads=4)
    fastbn.batchnorm_backward(y, cache, num_threads=4)
"""


def run(openmp: Path, library: str, race: str, command: list[str]) -> subprocess.CompletedProcess[str]:
    """A command of Python with both libraries loaded first; the first report ends it. It starts in a folder of its own:
    Python would find the package of the source tree."""
    suppressions = openmp.with_name("suppressions")
    suppressions.write_text(SUPPRESSED if race else "")
    options = f"halt_on_error=1 exitcode={FOUND} suppressions={suppressions}"
    environment = {
        **os.environ,
        "PYTHONPATH": str(TARGET),
        "LD_PRELOAD": f"{library} {openmp}",
        "TSAN_OPTIONS": options,
        "OPENBLAS_NUM_THREADS": "1",  # those of NumPy's products meet in ways that ThreadSanitizer does not see
        "RACE": race,
    }
    capture = subprocess.PIPE if race else None
    return subprocess.run(
        [sys.executable, *command], cwd=openmp.parent, env=environment, stdout=capture, stderr=capture, text=True
    )


def main(arguments: list[str]) -> int:
    found = subprocess.run(["gcc", "-print-file-name=libtsan.so"], stdout=subprocess.PIPE, text=True, check=False)
    library = found.stdout.strip()
    if not os.path.isabs(library):  # a library that gcc does not find is printed as it came
        print("fastbn: test-tsan is skipped: gcc has no libtsan.so")
        return 0
    install = [sys.executable, "-m", "pip", "--quiet", "install", "--upgrade", "--no-deps", "--target", str(TARGET)]
    environment = {**os.environ, "CC": "gcc", "FASTBN_SANITIZE": "thread"}
    subprocess.run([*install, str(ROOT)], env=environment, check=True)
    with tempfile.TemporaryDirectory() as folder:
        openmp = Path(folder, "openmp.so")
        flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-fPIC", "-shared", "-pthread"]
        subprocess.run(["gcc", *flags, str(ROOT / "tests" / "openmp.c"), "-o", str(openmp)], check=True)
        # The floor: gcc tells ThreadSanitizer nothing of what intrinsics read and write.
        asked = run(openmp, library, "none", ["-c", "import fastbn; print(fastbn.runtime.available_isas()[-1])"])
        os.environ["FASTBN_ISA"] = asked.stdout.strip()
        wrong = 0
        for race in (*PLANTED, ""):
            for way in PLANTED.get(race, WAYS):
                done = run(openmp, library, race or "none", ["-c", CALLS, *map(repr, WAYS[way])])
                reports = [line for line in done.stderr.splitlines() if line.startswith("SUMMARY: ThreadSanitizer: ")]
                as_it_should = (done.returncode, bool(reports)) == ((FOUND, True) if race else (0, False))
                wrong += not as_it_should
                result = reports or "no report" if as_it_should else f"WRONG {done.stderr}"
                print(f"fastbn: test-tsan: {race or 'nothing planted'}, {way}: {result}", flush=True)
        if wrong:
            return 1
        options = ["-p", "no:cacheprovider", "--capture=sys"]  # a report is written past Python: pytest would keep it
        return run(openmp, library, "", ["-m", "pytest", *options, *arguments]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
