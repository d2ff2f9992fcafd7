"""The plan of the house: imports run one way, C knows nothing of Python, no list exists twice."""

import ast
import re
from pathlib import Path

import pytest

import fastbn
from fastbn import _core

PACKAGE = Path(fastbn.__file__).parent
ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for path in PACKAGE.rglob("*.py"))
KERNELS = ROOT / "src_c"

# Every module of the library may import those before it, and only those.
ORDER = [
    "errors",
    "_core",
    "_cgroup",
    "memory",
    "runtime",
    "_layout",
    "_check",
    "_engine",
    "stats",
    "folding",
    "functional",
    "layers",
]


def relative(path):
    return path.relative_to(PACKAGE).as_posix()


def imports(path):
    """Absolute names of what a module imports, one per imported name, at any depth of its code."""
    package = ["fastbn", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def internal(path):
    """First component below fastbn of every internal import."""
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "fastbn":
            yield parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("module", [name for name in ORDER if name != "_core"])
def test_architecture_imports_run_one_way(module):
    allowed = set(ORDER[: ORDER.index(module)])
    if module in ("_check", "_engine", "runtime"):  # where the GPU is asked for, and not before: see below
        allowed.add("cuda")
    assert set(internal(PACKAGE / f"{module}.py")) <= allowed


def test_architecture_every_module_has_its_place():
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    assert modules == (set(ORDER) - {"_core"}) | {"__init__", "__main__", "reference"}


def test_architecture_reference_imports_numpy_only():
    top = {name.split(".")[0] for name in imports(PACKAGE / "reference.py")}
    assert top == {"__future__", "collections", "dataclasses", "numpy", "typing"}


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if relative(path).startswith(("nn/", "cli", "__main__"))], ids=relative
)
def test_architecture_trainer_and_command_line_use_public_names_only(path):
    names = [name for name in imports(path) if name.split(".")[0] == "fastbn"]
    private = [name for name in names if any(part.startswith("_") for part in name.split("."))]
    if relative(path).startswith("nn/"):  # its own helpers may be private
        private = [name for name in private if not name.startswith("fastbn.nn.")]
    assert not private


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_architecture_cuda_is_imported_lazily(path):
    """The package fastbn.cuda is imported with fastbn, and imports nothing; its modules, which need Numba, are not."""
    if relative(path).startswith("cuda/_") and path.name != "__init__.py":
        pytest.skip("the backend itself")
    tree = ast.parse(path.read_text())
    at_import = [ast.dump(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not any("numba" in dump for dump in at_import)
    assert relative(path) in ("__init__.py", "cli/bench.py") or not any("cuda" in dump for dump in at_import)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_architecture_modules_are_short(path):
    assert len(path.read_text().splitlines()) <= 500


# src_c ---------------------------------------------------------------------------------------------------------------

if not KERNELS.is_dir():
    pytest.skip("not a source tree", allow_module_level=True)

C_FILES = sorted(path for path in KERNELS.rglob("*") if path.suffix in (".c", ".h", ".inc", ".def"))
LISTS = {
    "isa": {name for name, _available in _core.isas()},
    "dtype": {name for _code, name in _core.dtypes()},
    "activation": {name for name, _ in _core.activations()},
}


def without_comments(text):
    return re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.S)


@pytest.mark.parametrize("path", C_FILES, ids=lambda path: path.name)
def test_architecture_c_knows_no_python_and_kernels_no_openmp_and_no_heap(path):
    code = without_comments(path.read_text())
    forbidden = ["Python.h", "numpy/"]
    if path.parent.name == "kernels" or path.name.startswith("isa_"):
        forbidden += ["omp.h", "#pragma omp parallel", "stdlib.h", "malloc", "calloc", "realloc", "free("]
    assert [word for word in forbidden if word in code] == []


@pytest.mark.parametrize("path", C_FILES, ids=lambda path: path.name)
def test_architecture_kernels_call_no_libm(path):
    code = without_comments(path.read_text())
    assert "math.h" not in code


def literals(path):
    """The string constants of a Python file that are not docstrings."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
    }


@pytest.mark.parametrize("kind", LISTS)
def test_architecture_no_list_exists_twice(kind):
    """One name of a list may be mentioned (a default, a special case); two of them together are a copy of the list."""
    copies = {}
    for path in SOURCES:
        if path.name == "reference.py":
            continue
        found = LISTS[kind] & literals(path)
        if len(found) > 1:
            copies[relative(path)] = found
    for path in [*PACKAGE.glob("*.pyx"), *PACKAGE.glob("*.pxi")]:
        quoted = set(re.findall(r'"(\w+)"', path.read_text()))
        if len(LISTS[kind] & quoted) > 1:
            copies[relative(path)] = LISTS[kind] & quoted
    assert copies == {}


def test_architecture_tables_are_those_of_the_def_files():
    def rows(name, column):
        found = re.findall(r"^FASTBN_\w+\(([^\n]*)", without_comments((KERNELS / name).read_text()), re.M)
        return [row.split(",")[column].strip().strip(")").strip('"') for row in found]

    assert [code for code, _name in _core.dtypes()] == rows("dtypes.def", 0)
    assert [name for name, _ in _core.activations()] == rows("activations.def", 0)
    compiled = [name for name, _available in _core.isas()]
    assert [name for name in rows("isa.def", 1) if name in compiled] == compiled
