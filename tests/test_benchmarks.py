"""The benchmark suite works: shapes, a tiny run, its report, and a comparison. Its numbers are not tested."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
SUITE = ROOT / "benchmarks"

if not (SUITE / "run.py").exists():
    pytest.skip("not a source tree", allow_module_level=True)


def start(script, *arguments, status=0):
    command = [sys.executable, str(SUITE / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def suite(monkeypatch):
    """Modules of the suite can be imported."""
    monkeypatch.syspath_prepend(str(SUITE))


def test_program_of_kernels_compiles():
    """Syntax only: the kernels themselves take the compiler a minute."""
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("needs a C compiler")
    options = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{ROOT / 'src_c'}"]
    done = subprocess.run([compiler, *options, str(SUITE / "kernels.c")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "shapes").mkdir()
    (folder / "shapes" / "small.txt").write_text("# a comment\na 2 3 4 5 2\nb 4 16 2 2 1\n")
    path = folder / "results.json"
    options = [
        "--shapes-folder",
        folder / "shapes",
        "--shapes",
        "small",
        "--output",
        path,
        "--rounds",
        3,
        "--placements",
        2,
    ]
    contenders = ["--contenders", "limit,fastbn,half,numpy"]
    output = start("run.py", "--quick", "--threads", 1, "--target", 0.01, "--idle", 0, *contenders, *options)
    return path, output


def test_benchmarks_shape_files_are_valid(suite):
    import cases

    for network in cases.networks():
        shapes = cases.read_shapes(network)
        names = [shape.layer for shape in shapes]
        assert shapes and len(set(names)) == len(names), network
        assert len({(s.N, s.C, s.H, s.W) for s in shapes}) == len(shapes), network


@pytest.mark.parametrize(("network", "shapes", "layers"), [("resnet50", 12, 53), ("bn_inception", 21, 69)])
def test_benchmarks_networks_have_all_their_layers(suite, network, shapes, layers):
    import cases

    found = cases.read_shapes(network)
    assert (len(found), sum(shape.count for shape in found)) == (shapes, layers)


@pytest.mark.parametrize("line", ["a 1 2 3 4", "a 1 2 3 4 5 6", "a 1 2 x 4 5", "a 1 0 3 4 5"])
def test_benchmarks_a_bad_shape_is_named_with_its_line(suite, tmp_path, line):
    import cases

    (tmp_path / "bad.txt").write_text(f"# comment\n{line}\n")
    with pytest.raises(ValueError, match=r"bad\.txt, line 2"):
        cases.read_shapes("bad", tmp_path)


def test_benchmarks_one_value_per_channel_is_for_inference_only(suite):
    import cases

    shape = cases.Shape("extremes", "one_value", 1, 4096, 1, 1, 1)
    found = cases.make_cases([shape], ["nchw"], list(cases.OPS), "f32", "relu", 2)
    assert [case.name for case in found] == ["inference/nchw-f32-relu/t2/extremes.one_value"]


def test_benchmarks_a_wrong_result_is_noticed(suite):
    import cases

    shape = cases.Shape("any", "any", 4, 3, 5, 5, 1)
    case = cases.Case("forward", "nchw", "f32", "identity", 1, shape)
    y = cases.right_results(cases.make_inputs(shape, "f32", ["forward"], "identity"), "forward", "identity")["y"]
    assert cases.difference("y", y, y, case, 1.0, "f32") is None
    for value in (y.flat[7] + 0.1, np.nan):
        wrong = y.copy()
        wrong.flat[7] = value
        assert "wrong at 1 values" in cases.difference("y", wrong, y, case, 1.0, "f32")


def test_benchmarks_half_precision_has_its_own_tolerance(suite):
    """And may exceed the limit of float32."""
    import cases
    from results import unsettled

    case = cases.Case("forward", "nchw", "f32", "identity", 1, cases.Shape("any", "any", 1, 1, 2, 2, 1))
    right, rounded = np.ones((1, 1, 2, 2), np.float32), np.full((1, 1, 2, 2), 1.005, np.float32)
    assert cases.difference("y", rounded, right, case, 1.0, "f32") is not None
    assert cases.difference("y", rounded, right, case, 1.0, "bf16") is None
    samples = {"limit-plain": [1.0] * 5, "fastbn-out": [1.25] * 5}
    assert unsettled(samples | {"fastbn-bf16": [0.7] * 5}) is None


@pytest.mark.parametrize("activation", ["identity", "relu", "add+relu"])
def test_benchmarks_half_precision_of_every_kind_is_right(suite, tmp_path, activation):
    """Rounding x moves some values over the kink, and a channel's two values together."""
    pytest.importorskip("ml_dtypes")
    (tmp_path / "kinds.txt").write_text("many 4 8 28 28 1\ntwo 2 512 1 1 1\n")
    path = tmp_path / "results.json"
    options = ["--shapes-folder", tmp_path, "--shapes", "kinds", "--output", path, "--rounds", 1, "--idle", 0]
    output = start(
        "run.py", "--quick", "--contenders", "half", "--activation", activation, "--layout", "nchw", *options
    )
    cases = json.loads(path.read_text())["cases"]
    assert [set(case["seconds"]) for case in cases] == [{"fastbn-f16", "fastbn-bf16"}] * 6, output


def test_benchmarks_half_precision_table_has_ratios_of_the_same_rounds(suite):
    from cases import Case, Shape
    from report import half_precision_table
    from results import Result, Results

    case = Case("forward", "nchw", "f32", "identity", 1, Shape("net", "a", 2, 3, 4, 5, 1))
    with_half = Result(case, {"fastbn-out": [2e-3] * 3, "fastbn-f16": [1e-3] * 3}, unsettled="it was not")
    table = half_precision_table(Results(cases=[with_half, Result(case, {"fastbn-out": [1e-3] * 3})]))
    rows = [line for line in table.splitlines() if "net.a" in line]
    assert rows == [f"| `{case.name}` | 2* | 2.00x (spread 0%) |  |"]


def test_benchmarks_allocate_anew_for_every_part_of_the_rounds(suite, tmp_path):
    """Who fails is asked no more, and everybody who is ready has all rounds."""
    from cases import Case, Shape
    from results import Results
    from run import Driver, parse

    asked = []

    class Fake(Driver):
        def fitting(self, case):
            return list(self.processes)

        def ask(self, name, do, **arguments):
            asked.append((name, do, arguments.get("verify")))
            return None if (name, do) == ("wrong", "prepare") else {"seconds": 1.0}

    driver = Fake(parse(["--rounds", "7", "--placements", "3", "--idle", "0"]), Results(), tmp_path)
    driver.processes = dict.fromkeys(("right", "wrong"))
    case = Case("forward", "nchw", "f32", "identity", 1, Shape("net", "a", 2, 3, 4, 5, 1))
    assert driver.attempt(case) == {"right": [1.0] * 7}
    assert [verify for name, do, verify in asked if (name, do) == ("right", "prepare")] == [True, False, False]
    assert [(name, do) for name, do, _ in asked if name == "wrong"] == [("wrong", "prepare"), ("wrong", "release")]
    assert [do for name, do, _ in asked if name == "right"].count("release") == 3


def test_benchmarks_half_precision_is_asked_for(suite, capsys):
    from results import HALF_PRECISION
    from run import parse

    assert not set(HALF_PRECISION) & set(parse([]).contenders)
    assert parse(["--contenders", "half"]).contenders == list(HALF_PRECISION)
    assert (parse([]).placements, parse(["--rounds", "2"]).placements, parse(["--quick"]).placements) == (3, 2, 1)
    with pytest.raises(SystemExit):
        parse(["--rounds", "2", "--placements", "3"])
    assert "--placements" in capsys.readouterr().err


def test_benchmarks_run(measured, suite):
    from results import Results

    path, output = measured
    results = Results.load(path)
    assert len(results.cases) == 2 * 2 * 3, output
    for result in results.cases:
        assert {"limit-plain", "fastbn-out", "fastbn-fresh", "fastbn-f16", "numpy"} <= set(result.samples), output
        assert "fastbn-bf16" in result.samples or importlib.util.find_spec("ml_dtypes") is None, output
        assert all(len(rounds) == 3 and min(rounds) > 0 for rounds in result.samples.values())
        assert result.case.name in output
    assert {"cpu", "caches", "governor", "commit", "python", "fastbn"} <= set(results.machine)


def test_benchmarks_a_missing_contender_is_skipped_with_the_reason(suite):
    if os.path.exists(Path(sys.prefix) / "lib" / "libdnnl.so.3"):
        pytest.skip("it is installed here")
    from onednn import OneDNN

    with pytest.raises(ImportError, match=r"onednn-cpu-gomp|version 3"):
        OneDNN(1, 0)


def test_benchmarks_totals_are_weighted_by_count(suite):
    from cases import Case, Shape
    from results import Result, paired, totals

    layers = [Shape("net", "a", 2, 3, 4, 5, 2), Shape("net", "b", 2, 3, 4, 5, 3)]
    group = [
        Result(Case("forward", "nchw", "f32", "identity", 1, shape), {"limit-plain": [1.0, 2.0], "fastbn-out": times})
        for shape, times in zip(layers, ([2.0, 4.0], [5.0, 10.0]), strict=True)
    ]
    sums = totals(group)
    assert sums == {"limit": [5.0, 10.0], "fastbn-out": [19.0, 38.0]}
    assert paired(sums["limit"], sums["fastbn-out"]) == (5 / 19, 0.0)


def test_benchmarks_unsettled_cases_are_named(suite):
    from results import unsettled

    steady = [1.0] * 5
    assert unsettled({"limit-plain": steady, "fastbn-out": [1.25] * 5}) is None
    assert "1.25" in unsettled({"limit-plain": [1.25] * 5, "fastbn-out": steady})
    assert "spreads" in unsettled({"limit-plain": steady, "fastbn-out": [1.5, 1.7, 2.0, 2.4, 3.0]})


def test_benchmarks_report_fills_tables_and_draws(measured, tmp_path):
    pytest.importorskip("matplotlib")
    path, _ = measured
    (tmp_path / "docs").mkdir()
    names = ("machine", "totals", "cases", "half", "slower", "skipped")
    page = "".join(f"before\n<!-- benchmarks {name} -->\nold\n<!-- /benchmarks {name} -->\nafter\n" for name in names)
    (tmp_path / "docs" / "benchmarks.md").write_text(page)
    (tmp_path / "README.md").write_text("<!-- benchmarks readme --><!-- /benchmarks readme -->\n")
    for _ in range(2):  # what is filled can be filled again
        start("report.py", path, "--root", tmp_path)
        text = (tmp_path / "docs" / "benchmarks.md").read_text()
        assert text.count("before") == text.count("after") == len(names) and "old" not in text.split()
        assert "`backward/nhwc-f32-identity/t1/small.b`" in text
    pictures = {picture.name for picture in (tmp_path / "docs" / "pictures").iterdir()}
    assert {"bars-small-f32-identity-t1.png", "roofline.png"} <= pictures


def test_benchmarks_pages_have_marks_for_existing_tables_only(suite, measured):
    pytest.importorskip("matplotlib")
    from report import fill
    from results import Results

    page = (ROOT / "docs" / "benchmarks.md").read_text()
    _, count = fill(page, Results.load(measured[0]))
    assert count == page.count("<!-- benchmarks ") >= 5


def test_benchmarks_compare_names_what_is_slower(measured, tmp_path):
    path, _ = measured
    record = json.loads(path.read_text())
    for entry in record["cases"]:  # no noise
        entry["seconds"] = {name: [1e-3] * 3 for name in entry["seconds"]}
    (tmp_path / "old.json").write_text(json.dumps(record))
    record["cases"][3]["seconds"]["fastbn-out"] = [2e-3] * 3
    (tmp_path / "new.json").write_text(json.dumps(record))
    assert "0 slower" in start("compare.py", tmp_path / "old.json", tmp_path / "old.json")
    output = start("compare.py", tmp_path / "old.json", tmp_path / "new.json", status=1)
    assert f"slower  0.50x  fastbn-out       {record['cases'][3]['name']}" in output and "1 slower" in output
    assert "1 faster" in start("compare.py", tmp_path / "new.json", tmp_path / "old.json")
