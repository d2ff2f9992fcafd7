"""What the documentation says is true: the code blocks of the README run, and so do the examples of the docstrings."""

import doctest
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import fastbn
import long
from pages import generated

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PUBLIC = ["fastbn"] + [
    f"fastbn.{module.name}"
    for module in pkgutil.iter_modules(fastbn.__path__)
    if not module.name.startswith("_") and module.name != "cuda"
]


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.M | re.S)


@pytest.mark.skipif(not README.exists(), reason="not a source tree")
@pytest.mark.parametrize(("page", "extra"), [("README.md", "numpy"), ("docs/trainer.md", "sklearn")])
def test_docs_code_runs(page, extra, tmp_path, monkeypatch):
    """All Python blocks of a page in one go: a later one may use the names of an earlier one."""
    pytest.importorskip(extra)
    python = blocks(ROOT / page, "python")
    assert python, "the page has an example"
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for number, block in enumerate(python):
        exec(compile(block, f"{page}, Python block {number + 1}", "exec"), names)


@pytest.mark.parametrize("name", [name for name in fastbn.__all__ if name.startswith("batchnorm")])
def test_docs_tools_resolve_annotations(name):
    hints = typing.get_type_hints(getattr(fastbn, name))
    assert "return" in hints and set(inspect.signature(getattr(fastbn, name)).parameters) == hints.keys() - {"return"}


def anchors(page):
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [README, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_docs_links_lead_somewhere(page):
    prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.S)
    for link in re.findall(r"\]\(([^):]+)\)", prose):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_docs_named_tests_exist():
    """Also without the extras that a test needs: the files are read, not imported."""
    pages = {page.name: page.read_text() for page in (ROOT / "docs").glob("*.md")}
    missing = []
    for file, test in re.findall(r"`(?:tests/)?(test_\w+\.py)(?:::(\w+))?`", "\n".join(pages.values())):
        path = ROOT / "tests" / file
        if not path.exists() or (test and f"\ndef {test}(" not in path.read_text()):
            missing.append((file, test))
    assert not missing
    promises = re.findall(r"^\| (?!promise)([^|]+) \| ([^|]*) \|$", pages["reliability.md"], re.M)
    assert len(promises) > 30
    assert [promise for promise, tests in promises if "::test_" not in tests and "make " not in tests] == []


@pytest.mark.parametrize("name", long.SECTIONS)
def test_docs_long_run_is_what_its_result_says(name):
    results = json.loads(long.RESULTS.read_text())
    assert generated(long.PAGE.read_text(), name).strip() == long.SECTIONS[name](results)


def test_docs_long_run_was_good():
    results = json.loads(long.RESULTS.read_text())
    tests = re.search(r"^LONG_TESTS = .*addsuffix .py,(.*)\)\)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert set(results) <= {*tests, *long.TARGETS}
    assert [name for name, of in results.items() if of["failed"] or not of["passed"]] == []
    promised = {("exact", "cases"): 100_000, ("fuzz", "calls"): 10**6, ("asan", "calls"): 10**6}
    for (name, figure), least in promised.items():
        assert name not in results or results[name]["figures"][figure] >= least


def test_docs_long_run_reads_what_pytest_leaves(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n\n"
        "@pytest.mark.parametrize('n', [1, 5, 3])\n"
        "def test_it(n, record_property):\n"
        "    record_property('cases', n)\n"
        "    record_property('largest', n)\n"
        "    record_property('largest growth', n)\n"
        "    assert n < 4\n\n"
        "def test_other():\n"
        "    pytest.skip('here')\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=some.xml", "-o"]
    subprocess.run([*command, "junit_family=xunit1"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    entry = long.entry(tmp_path / "some.xml")
    assert (entry["passed"], entry["failed"], entry["skipped"]) == (2, 1, 1)
    assert entry["figures"] == {"cases": 9, "largest": 9, "largest growth": 5}


@pytest.mark.parametrize("name", PUBLIC)
def test_docs_examples_of_public_modules_run(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:  # an extra that is not installed
        pytest.skip(str(error))
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_docs_examples_exist():
    finder = doctest.DocTestFinder()
    for name in ("functional", "layers", "memory", "runtime", "stats"):
        module = importlib.import_module(f"fastbn.{name}")
        assert any(test.examples for test in finder.find(module)), name


@pytest.mark.parametrize("name", [name for name in fastbn.__all__ if callable(getattr(fastbn, name))])
def test_docs_every_public_name_has_a_docstring(name):
    assert (inspect.getdoc(getattr(fastbn, name)) or "").strip()


def test_docs_signature_in_help_is_complete():
    parameters = inspect.signature(fastbn.batchnorm2d).parameters
    documented = inspect.getdoc(fastbn.batchnorm2d)
    section = documented.split("Parameters\n")[1].split("Returns\n")[0]
    assert [name for name in parameters if not re.search(rf"\b{name}\b", section)] == []
