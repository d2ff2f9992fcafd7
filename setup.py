# SPDX-License-Identifier: MIT
"""Build `fastbn._core`: Cython's C, the tables (dispatch.c) and the kernels, compiled once for each row of isa.def;
and `fastbn.nn._windows` for the trainer, which shares nothing with it.

Metadata is in pyproject.toml. The environment of a build:

    CC, CFLAGS, LDFLAGS    as usual; flags that would change results or the ISA are ignored (see FOREIGN)
    FASTBN_DEBUG=1         C asserts and Cython's bounds checks
    FASTBN_SANITIZE=LIST   -fsanitize=LIST for all C, with the asserts: for `make asan`
    FASTBN_NO_OPENMP=1     serial
    FASTBN_WERROR=1        a warning in our C is an error

Each command that ran is written to `_build.json` beside the extension; tests/test_build.py reads it.
"""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

DEBUG, NO_OPENMP, WERROR = (
    os.environ.get(f"FASTBN_{name}", "0") not in ("", "0") for name in ("DEBUG", "NO_OPENMP", "WERROR")
)
DEBUG = DEBUG or bool(os.environ.get("FASTBN_SANITIZE"))

# For every translation unit, Cython's too: the bits of results depend on them (docs/numerics.md).
NUMERICS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
# -fwrapv as CPython itself; -g0 because the interpreter's -g makes the library ten times larger.
OPTIMIZATION = [
    "-fwrapv",
    *(["-O1", "-g", "-UNDEBUG", "-DFASTBN_DEBUG=1"] if DEBUG else ["-O3", "-fno-jump-tables", "-g0", "-DNDEBUG"]),
]
SANITIZE = [f"-fsanitize={os.environ['FASTBN_SANITIZE']}"] if os.environ.get("FASTBN_SANITIZE") else []
WARNINGS = ["-Wall", "-Wextra", *(["-Werror"] if WERROR else [])]
if DEBUG:  # at -O1 gcc does not unroll the loops that fill a vector and warns of nothing
    WARNINGS.append("-Wno-maybe-uninitialized")
DIRECTIVES = {
    "language_level": 3,
    "boundscheck": DEBUG,
    "wraparound": False,  # in a debug build too: there a negative index is an error
    "initializedcheck": DEBUG,
    "nonecheck": DEBUG,
}
# The floor of NumPy at run time, as in pyproject.toml.
NUMPY_API = ["-DNPY_NO_DEPRECATED_API=NPY_1_7_API_VERSION", "-DNPY_TARGET_VERSION=NPY_1_23_API_VERSION"]

# Flags of CFLAGS, LDFLAGS, CC or the interpreter that do not reach a command: other arithmetic, another ISA than
# isa.def says. A later flag cannot undo all of them: -march does not revoke -mavx2, and -ffast-math on a link makes
# the whole process flush denormals.
FOREIGN = re.compile(
    r"-Ofast|-flto.*|-f(no-)?(fast-math|unsafe-math-optimizations|finite-math-only|associative-math|reciprocal-math"
    r"|signed-zeros|honor-nans|honor-infinities|approx-func|cx-limited-range|single-precision-constant)"
    r"|-f(fp-model|fp-contract|fp-eval-method|excess-precision|denormal-fp-math)=.*"
    r"|-m(?!32$|64$|llvm$|macosx|branch-protection).*"
)

C11 = """#include <stdio.h>
_Static_assert(sizeof(void *) == 8, "64-bit");
int main(void) { return puts(__VERSION__) < 0; }
"""
PYTHON_H = "#include <Python.h>\nint main(void) { return 0; }\n"
OPENMP = """#include <omp.h>
#include <stdio.h>
int main(void)
{
    int threads = 0;
#pragma omp parallel num_threads(2) reduction(+ : threads)
    threads++;
    return threads < 1 || omp_get_max_threads() < 1 || printf("%d", _OPENMP) < 0;
}
"""


def isa_rows(machine):
    """(name, flags) of each ISA that isa.def has for `machine`, best first. The last one is the ABI floor."""
    table = Path(__file__).with_name("src_c").joinpath("isa.def").read_text()
    rows = re.findall(r'^FASTBN_ISA\((\w+), (\w+), "([^"]*)",', table, re.MULTILINE)
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine.lower(), machine.lower())
    found = [(name, flags.split()) for architecture, name, flags in rows if architecture == machine]
    if not found:
        known = ", ".join(sorted({architecture for architecture, _, _ in rows}))
        raise SystemExit(f"fastbn: {machine or 'this machine'} is not supported: src_c/isa.def has rows for {known}")
    return found


def own(command):
    """`command` without the flags that FOREIGN matches."""
    return [argument for argument in command if not FOREIGN.fullmatch(argument)]


def anonymous(argument):
    """`argument` of a command with each path reduced to its last part: a wheel tells nothing about its builder."""
    return re.sub(r"(^-[IL])?(?:[^/=:,\s]*/)+", r"\1", argument)


def try_program(source, command, flags=()):
    """Compile, link and run a C program. (its output, "") or (None, why not)."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "probe.c").write_text(source)
        link = own(shlex.split(os.environ.get("LDFLAGS", "")))
        try:
            for step in ([*command, *flags, "probe.c", "-o", "probe", *link], [str(Path(folder, "probe"))]):
                done = subprocess.run(step, cwd=folder, capture_output=True, text=True, errors="replace", timeout=60)
                if done.returncode:
                    reason = (done.stderr or done.stdout).strip() or f"it returned {done.returncode}"
                    return None, reason.splitlines()[0]
        except (OSError, subprocess.TimeoutExpired) as error:
            return None, str(error)
        return done.stdout.strip(), ""


class BuildCore(build_ext):
    """Compile each C file with flags of its own, which setuptools cannot."""

    def probe(self):
        """What this build depends on, for `_build.json`. Ends with one clear message if nothing can be built."""
        compiler = self.compiler.compiler
        version, reason = try_program(C11, own(compiler), ["-std=gnu11"])
        if version is None:
            raise SystemExit(
                f"fastbn: no working C compiler: `{compiler[0]}` does not build and run a small C11 program for a "
                f"64-bit machine. Install gcc or clang, or name one in the variable CC.\n{reason}"
            )
        if try_program(PYTHON_H, own(compiler), [f"-I{path}" for path in self.include_dirs])[0] is None:
            raise SystemExit(
                "fastbn: the compiler does not find Python.h: install the development files of this Python "
                "(python3-dev or python3-devel in most distributions)."
            )
        openmp, reason = (None, "FASTBN_NO_OPENMP=1") if NO_OPENMP else try_program(OPENMP, own(compiler), ["-fopenmp"])
        if openmp is None:
            print(f"fastbn: built without OpenMP, every call will use one thread: {reason}", file=sys.stderr)
        used = [*compiler, *self.compiler.compiler_so, *self.compiler.linker_so]
        ignored = sorted({flag for flag in used if FOREIGN.fullmatch(flag)})
        if ignored:
            print(f"fastbn: ignored compiler flags: {' '.join(ignored)}", file=sys.stderr)

        import Cython
        import numpy

        return {
            "compiler": f"{anonymous(compiler[0])} {version}",
            "openmp": openmp and int(openmp),
            "openmp_missing": reason,
            "debug": DEBUG,
            "sanitize": SANITIZE,
            "werror": WERROR,
            "ignored_flags": ignored,
            "flags": [anonymous(flag) for flag in own(used)],
            "cython": Cython.__version__,
            "numpy": numpy.__version__,
        }

    def build_extensions(self):
        """Both extensions or none: one record says how they were made."""
        paths = [Path(self.get_ext_fullpath(extension.name)) for extension in self.extensions]
        record = self.record(paths[0])
        facts = self.probe()
        before = json.loads(record.read_text()) if record.exists() else {}
        newer = any(
            newer_group(extension.depends, str(path)) for extension, path in zip(self.extensions, paths, strict=True)
        )
        if facts.items() <= before.items() and not newer and not self.force:
            return
        import numpy
        from Cython.Build import cythonize

        isas = isa_rows(platform.machine())
        _, floor = isas[-1]
        openmp = ["-fopenmp"] if facts["openmp"] else []
        common = ["-std=gnu11", *OPTIMIZATION, *SANITIZE, *NUMERICS, "-fvisibility=hidden"]
        includes = [f"-I{folder}" for folder in ("src_c", numpy.get_include(), *self.include_dirs)]
        cythonized = cythonize(
            self.extensions, build_dir=self.build_temp, compiler_directives=DIRECTIVES, force=True, quiet=True
        )
        core, windows = (
            {extension.sources[0]: [*includes, *NUMPY_API, *common, *openmp, *floor]} for extension in cythonized
        )
        kernels = {  # C file: its flags, the ISA's last so that they hold; the floor's kernels first: they take longest
            **{f"src_c/isa_{name}.c": [*common, *WARNINGS, *openmp, *flags] for name, flags in reversed(isas)},
            "src_c/dispatch.c": [*common, *WARNINGS, *openmp, *floor],
        }

        def target(source):
            return str(Path(self.build_temp, Path(source).with_suffix(".o").name))

        commands = [
            [*own(self.compiler.compiler_so), "-c", source, "-o", target(source), *flags]
            for source, flags in (kernels | core | windows).items()
        ]
        links = [
            [*own(self.compiler.linker_so), *map(target, units), "-o", str(path), *openmp, *SANITIZE]
            for units, path in zip((kernels | core, windows), paths, strict=True)
        ]
        for folder in (self.build_temp, *(path.parent for path in paths)):
            Path(folder).mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self.execute_command, commands))
            list(pool.map(self.execute_command, links))
        facts["commands"] = [[anonymous(argument) for argument in command] for command in [*commands, *links]]
        record.write_text(json.dumps(facts, indent=1) + "\n")

    @staticmethod
    def record(core):
        """`_build.json` beside the extension `fastbn._core`."""
        return core.with_name("_build.json")

    def execute_command(self, command):
        print(shlex.join(command) + "\n", end="", flush=True)  # one write: threads print at the same time
        if subprocess.run(command).returncode:
            raise SystemExit(f"fastbn: the build ended at this command:\n{shlex.join(command)}")

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        core = self.extensions[0].name
        built = Path(self.build_lib, *core.split(".")[:-1], "_build.json")
        self.copy_file(str(built), str(self.record(Path(self.get_ext_fullpath(core)))))

    def get_outputs(self):
        outputs = super().get_outputs()
        return [*outputs, str(self.record(Path(outputs[0])))]


if __name__ == "__main__":
    sources = sorted(str(path) for path in Path("src_c").rglob("*") if path.suffix in {".c", ".h", ".inc", ".def"})
    core = ["fastbn/_core.pyx", *sorted(str(path) for path in Path("fastbn").glob("*.pxi")), *sources]
    windows = ["fastbn/nn/_windows.pyx"]
    setup(
        ext_modules=[
            Extension("fastbn._core", core[:1], depends=["setup.py", *core]),
            Extension("fastbn.nn._windows", windows, depends=["setup.py", *windows]),
        ],
        cmdclass={"build_ext": BuildCore},
    )
