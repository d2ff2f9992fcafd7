"""What was built, and how: the compile commands that the build recorded in `_build.json` beside the extension."""

import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import types
from pathlib import Path

import pytest

import fastbn
from fastbn import _core

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(fastbn.__file__).resolve().parent
RECORD = json.loads((PACKAGE / "_build.json").read_text())
COMPILE = {command[command.index("-c") + 1]: command for command in RECORD["commands"] if "-c" in command}
LINKS = [command for command in RECORD["commands"] if "-c" not in command]
ISAS = [name for name, _ in _core.isas()]
FLOOR = ISAS[-1]


def machine_flags(command):
    return [flag for flag in command if flag.startswith("-m")]


def test_build_installed_package_is_tested():
    if os.environ.get("FASTBN_TEST_WHEEL"):
        assert PACKAGE != ROOT / "fastbn", "the tests import the source tree, not the installed wheel"


def test_build_every_translation_unit_is_recorded():
    core = {"_core.c", "dispatch.c", *(f"isa_{name}.c" for name in ISAS)}
    assert set(COMPILE) == core | {"_windows.c"}
    linked = [{word.replace(".o", ".c") for word in command if word.endswith(".o")} for command in LINKS]
    assert linked == [core, {"_windows.c"}]  # the trainer's extension has no part in the core


@pytest.mark.parametrize("source", sorted(COMPILE))
def test_build_numerics_flags(source):
    flags = COMPILE[source]
    assert {"-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"} <= set(flags)
    fast = (
        "-Ofast|-f(fast-math|unsafe-.*|finite-.*|associative-.*|reciprocal-.*|fp-model.*|fp-contract=(on|fast))|-flto.*"
    )
    assert not [flag for flag in itertools.chain(flags, *LINKS) if re.fullmatch(fast, flag)]


@pytest.mark.parametrize("source", ["_core.c", "_windows.c", "dispatch.c", f"isa_{FLOOR}.c"])
def test_build_abi_floor(source):
    assert machine_flags(COMPILE[source]) == machine_flags(COMPILE[f"isa_{FLOOR}.c"])
    wide = [flag for flag in machine_flags(COMPILE[source]) if not flag.startswith(("-march=x86-64", "-march=armv8-a"))]
    assert not wide


def test_build_isa_flags_are_those_of_the_table():
    table = (ROOT / "src_c" / "isa.def").read_text()
    for name in ISAS:
        (flags,) = re.findall(rf'^FASTBN_ISA\(\w+, {name}, "([^"]*)"', table, re.MULTILINE)
        assert machine_flags(COMPILE[f"isa_{name}.c"]) == flags.split()


def test_build_record_agrees_with_the_extension():
    assert bool(RECORD["openmp"]) is _core.OPENMP
    assert RECORD["debug"] is _core.DEBUG
    assert all(("-fopenmp" in command) is _core.OPENMP for command in RECORD["commands"])
    assert _core.OPENMP or RECORD["openmp_missing"]


def test_build_record_has_no_machine_paths():
    paths = [argument for command in RECORD["commands"] for argument in command if re.search(r"/\w", argument)]
    assert not paths


@pytest.fixture(scope="module")
def setup_script():
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("fastbn_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_build_unknown_machine_is_one_line(setup_script):
    with pytest.raises(SystemExit, match=r"riscv64 is not supported.* aarch64, x86_64$"):
        setup_script.isa_rows("riscv64")


@pytest.mark.parametrize(("alias", "machine"), [("AMD64", "x86_64"), ("arm64", "aarch64")])
def test_build_machine_aliases(setup_script, alias, machine):
    assert setup_script.isa_rows(alias) == setup_script.isa_rows(machine)


def test_build_foreign_flags_do_not_reach_the_compiler(setup_script):
    kept = ["gcc", "-O3", "-g", "-m64", "-fno-math-errno", "-fPIC", "-DNAME=1", "-Wl,-rpath,/opt/lib", "-pthread"]
    foreign = [
        "-march=native",
        "-mtune=native",
        "-mavx2",
        "-mfma",
        "-mfpmath=387",
        "-ffast-math",
        "-Ofast",
        "-flto=auto",
    ]
    foreign += ["-funsafe-math-optimizations", "-fno-signed-zeros", "-ffp-contract=fast", "-ffp-model=fast"]
    assert setup_script.own([*kept, *foreign]) == kept


def test_build_paths_are_reduced(setup_script):
    before = ["/usr/bin/gcc", "-I/usr/include/python3", "-Isrc_c", "build/a/b.o", "-Wl,-rpath,/opt/x/lib", "-O3"]
    assert [setup_script.anonymous(a) for a in before] == [
        "gcc",
        "-Ipython3",
        "-Isrc_c",
        "b.o",
        "-Wl,-rpath,lib",
        "-O3",
    ]


def test_build_broken_compiler_is_one_message(setup_script, tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path}"]
    environment = {**os.environ, "CC": "/bin/false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "fastbn: no working C compiler: `/bin/false`" in done.stderr
    assert "Install gcc or clang" in done.stderr
    assert "Traceback" not in done.stderr


def probe_with_compiler(setup_script, monkeypatch, tmp_path, refused):
    """What the build finds out about a compiler that refuses whatever has this text in it."""
    compiler = tmp_path / "cc"
    real = shutil.which(RECORD["compiler"].split()[0])
    if real is None:
        pytest.skip("the compiler of this build is not here")
    compiler.write_text(f"""#!/bin/sh
for argument; do
    if [ "$argument" = "{refused}" ] || grep -q -s -e "{refused}" -- "$argument"; then
        echo "probe.c:1: error: no {refused} here" >&2
        exit 1
    fi
done
exec {real} "$@"
""")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.chdir(ROOT)
    facts = []
    monkeypatch.setattr(setup_script, "NO_OPENMP", False)
    monkeypatch.setitem(sys.modules, "Cython", types.SimpleNamespace(__version__="0"))  # may be missing here
    monkeypatch.setattr(setup_script.BuildCore, "build_extensions", lambda build: facts.append(build.probe()))
    from setuptools import Distribution, Extension

    command = setup_script.BuildCore(Distribution({"ext_modules": [Extension("fastbn._core", ["fastbn/_core.pyx"])]}))
    command.build_lib = command.build_temp = str(tmp_path)
    command.ensure_finalized()
    command.run()
    return facts[0]


def test_build_without_openmp_says_so_and_goes_on(setup_script, monkeypatch, tmp_path, capsys):
    facts = probe_with_compiler(setup_script, monkeypatch, tmp_path, "-fopenmp")
    reason = "probe.c:1: error: no -fopenmp here"
    assert capsys.readouterr().err == f"fastbn: built without OpenMP, every call will use one thread: {reason}\n"
    assert facts["openmp"] is None and facts["openmp_missing"] == reason


def test_build_depends_on_the_flags_of_the_environment(setup_script, monkeypatch, tmp_path):
    """Other CFLAGS or LDFLAGS are another build, but for those that reach no command."""

    def facts(cflags, ldflags=""):
        monkeypatch.setenv("CFLAGS", cflags)
        monkeypatch.setenv("LDFLAGS", ldflags)
        return probe_with_compiler(setup_script, monkeypatch, tmp_path, "nothing")

    plain = facts("")
    assert facts("") == plain
    assert facts("-g1")["flags"] != plain["flags"] != facts("", "-Wl,-O1")["flags"]
    assert facts("-ffast-math")["flags"] == plain["flags"]


def test_build_without_the_headers_of_python_is_one_message(setup_script, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=r"does not find Python\.h: install .*python3-dev"):
        probe_with_compiler(setup_script, monkeypatch, tmp_path, "Python.h")


def test_build_declares_no_free_threading():
    """Without the declaration a free-threaded Python turns its lock on when it imports the extensions, with a warning.
    Nothing here is tested without the lock, so nothing may say that it works."""
    sources = [ROOT / "setup.py", *(ROOT / "fastbn").rglob("*.py[xi]"), *(ROOT / "fastbn").rglob("*.pxi")]
    assert len(sources) > 5
    assert [source.name for source in sources if "freethreading" in source.read_text()] == []
    assert "Free Threading" not in (ROOT / "pyproject.toml").read_text()
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        assert sys._is_gil_enabled()


def test_build_numpy_floor_is_stated_once():
    """The oldest NumPy of pyproject.toml is the one whose C interface setup.py asks for."""
    (floor,) = re.findall(
        r'^dependencies = \["numpy>=(\d+\.\d+)"\]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    assert f"NPY_{floor.replace('.', '_')}_API_VERSION" in (ROOT / "setup.py").read_text()
