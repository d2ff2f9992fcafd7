"""The benchmark suite works: shapes, a tiny run, its report, and a comparison. Its numbers are not tested."""

import importlib.metadata
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
    contenders = ["--contenders", "limit,fastbn,numpy"]
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
    found = cases.cases_in_turns(shape, ["nchw"], cases.OPS, ["f32"], ["relu"], [2])
    assert [[case.name for case in group] for group in found] == [["inference/nchw-f32-relu/t2/extremes.one_value"]]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says what is mapped")
def test_benchmarks_arrays_are_private(suite):
    """Shared memory would have no huge pages, which NumPy's own large arrays have."""
    import cases

    array = cases.aligned((1 << 20,), np.float32)
    access = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(address, 16) for address in line.split()[0].split("-"))
        if first <= array.ctypes.data < last:
            access.append(line.split()[1])
    assert access == ["rw-p"]


def test_benchmarks_a_wrong_result_is_noticed(suite):
    import cases

    shape = cases.Shape("any", "any", 4, 3, 5, 5, 1)
    case = cases.Case("forward", "nchw", "f32", "identity", 1, shape)
    y = cases.right_results(cases.make_inputs(shape, "f32", ["forward"], "identity"), "forward", "identity")["y"]
    assert cases.difference("y", y, y, case, 1.0) is None
    for value in (y.flat[7] + 0.1, np.nan):
        wrong = y.copy()
        wrong.flat[7] = value
        assert "wrong at 1 values" in cases.difference("y", wrong, y, case, 1.0)


def test_benchmarks_a_wrong_gradient_of_few_channels_is_noticed(suite):
    """Where the kink of an activation excuses some values, it does not excuse all channels."""
    import cases

    shape = cases.Shape("any", "any", 4, 2, 40, 40, 1)
    case = cases.Case("backward", "nchw", "f32", "relu", 1, shape)
    dgamma = cases.right_results(cases.make_inputs(shape, "f32", ["backward"], "relu"), "backward", "relu")["dgamma"]
    assert cases.difference("dgamma", dgamma, dgamma, case, 80.0) is None
    assert "wrong at 2 values" in cases.difference("dgamma", dgamma + 100, dgamma, case, 80.0)


def test_benchmarks_files_hide_no_package():
    """Their folder comes first where Python looks for modules."""
    names = {path.stem for path in SUITE.glob("*.py")}
    installed = set(importlib.metadata.packages_distributions()) | {"cuda", "numba", "torch", "jax", "cupy"}
    assert not names & (installed | sys.stdlib_module_names)


def test_benchmarks_pages_are_what_their_results_say(suite):
    import report

    results = report.load_all(report.of_pages())
    for name in ("README.md", "docs/benchmarks.md"):
        text = (report.ROOT / name).read_text()
        assert report.fill(text, results)[0] == text


def test_benchmarks_kinds_of_a_case_take_turns(suite, tmp_path):
    """Every dtype, activation and number of threads has the same rounds, and is compared with its own right results."""
    (tmp_path / "kinds.txt").write_text("many 4 8 28 28 1\ntwo 2 512 1 1 1\n")
    path = tmp_path / "results.json"
    dtypes = "f32,f16" + (",bf16" if importlib.util.find_spec("ml_dtypes") else "")
    kinds = ["--dtype", dtypes, "--activation", "relu,add+relu", "--threads", "1,2"]
    options = ["--shapes-folder", tmp_path, "--shapes", "kinds", "--output", path, "--rounds", 2, "--idle", 0]
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two CPUs")
    output = start("run.py", "--quick", "--contenders", "limit-plain,limit-read,fastbn-out", *kinds, *options)
    found = json.loads(path.read_text())["cases"]
    together = 4 * len(dtypes.split(","))
    assert len({case["name"] for case in found}) == len(found) == 2 * 2 * 3 * together, output
    for case in found:
        assert set(case["seconds"]) == {"limit-plain", "limit-read", "fastbn-out"}, output
        assert {len(rounds) for rounds in case["seconds"].values()} == {2}
    assert [case["case"]["op"] for case in found[: 2 * together]] == ["forward"] * together + ["inference"] * together


def test_benchmarks_results_are_read_afterwards(suite, tmp_path, monkeypatch):
    """All whole lines of the first result, by those whose threads leave the CPUs to who reads."""
    import limit
    from base import Contender
    from cases import Case, Shape
    from worker import Worker

    read = []
    monkeypatch.setattr(limit, "load_limit", lambda: lambda *arguments: read.append(arguments))
    memory = np.zeros(1024, np.uint8)
    start = -memory.ctypes.data % 64
    line = memory.ctypes.data + start
    for begin, end, address, size in ((0, 256, line, 256), (4, 252, line + 64, 128)):
        part = memory[start + begin : start + end]
        returned = (part, memory)
        assert limit.read_after(lambda result=returned: result, 2)() is returned
        limit.read_after(lambda result=part: result, 2)()
        assert read == [(limit.KERNELS.index("read"), 0, 2, size, *[address] * 4)] * 2
        read.clear()
    case = Case("inference", "nchw", "f32", "identity", 1, Shape("net", "a", 2, 3, 4, 5, 1), reader=True)
    answer = Worker(Contender(1, 0)).prepare(case.to_json(), str(tmp_path), 1e-3, 1, False)
    assert "in the way" in answer["unsupported"]


def test_benchmarks_with_a_reader_and_without_take_turns(suite, tmp_path):
    from report import totals_table
    from results import Results

    (tmp_path / "net.txt").write_text("a 2 3 40 50 1\n")
    path = tmp_path / "results.json"
    options = ["--shapes-folder", tmp_path, "--shapes", "net", "--output", path, "--rounds", 2, "--idle", 0]
    names = ["limit-plain", "fastbn-out", "fastbn-streamed", "numpy"]
    start("run.py", "--quick", "--contenders", ",".join(names), "--reader", "no,yes", "--threads", 1, *options)
    results = Results.load(path)
    assert [case.case.reader for case in results.cases] == [False, True] * 6
    assert all(set(case.samples) == set(names) for case in results.cases)
    rows = [line for line in totals_table(results).splitlines() if line.startswith("| net, ")]
    assert len(rows) == 12 and sum(", backward then read, NHWC" in row for row in rows) == 1


def in_kinds(*kinds):
    from cases import Case, Shape
    from results import Result, Results

    shape = Shape("net", "a", 2, 3, 4, 5, 1)
    return Results(cases=[Result(Case("forward", "nchw", *kind, shape), samples) for kind, samples in kinds])


def test_benchmarks_ratios_are_of_the_same_rounds(suite):
    from report import ratios_table

    results = in_kinds(
        (("f32", "relu", 1), {"fastbn-out": [2e-3, 4e-3, 8e-3], "torch": [1e-3] * 3, "limit-plain": [1e-3] * 3}),
        (("f16", "relu", 1), {"fastbn-out": [1e-3, 2e-3, 4e-3], "limit-plain": [0.25e-3] * 3}),
        (("bf16", "relu", 1), {"fastbn-out": [4e-3, 8e-3, 16e-3], "torch": [2e-3] * 3}),
        (("f32", "relu", 2), {"fastbn-out": [1e-3] * 3}),
    )
    results.cases[1].unsettled = "it is not"
    name = results.cases[0].case.name
    table = ratios_table(results, "dtype")
    assert [line for line in table.splitlines() if "net.a" in line] == [
        f"| `{name}`* | 1, 4.00x (0%), - | 4, 2.00x (0%), 0.50x (0%) | 1, -, 0.50x (0%) |"
    ]
    assert "with dtype f32; then how many times as fast with f16, bf16 " in table
    assert f"| `{name}` | 1, - | 4, 4.00x (75%) | 1, - |" in ratios_table(results, "threads")
    assert ratios_table(results, "activation") == "None."


def test_benchmarks_a_residual_is_counted_in_passes_of_reading(suite):
    from report import residual_table

    results = in_kinds(
        (("f32", "relu", 1), {"fastbn-out": [2e-3, 4e-3], "limit-plain": [1e-3] * 2, "limit-read": [1e-3, 2e-3]}),
        (("f32", "add+relu", 1), {"fastbn-out": [5e-3, 1e-2], "limit-plain": [2e-3] * 2}),
    )
    rows = [line for line in residual_table(results).splitlines() if "net.a" in line]
    name = results.cases[0].case.name
    assert rows == [
        f"| `{name}` | limit | 1 | 2 | 1.5 | 0.75 (0.62 to 0.88) |",
        f"| `{name}` | fastbn-out | 3 | 7.5 | 1.5 | 3.00 (3.00 to 3.00) |",
    ]
    assert residual_table(in_kinds((("f32", "relu", 1), {"limit-read": [1.0]}))) == "None."


def test_benchmarks_allocate_anew_for_every_part_of_the_rounds(suite, tmp_path):
    """Who fails is asked no more, and everybody who is ready has all rounds, of which each is everybody's."""
    from cases import Case, Shape
    from results import Results
    from run import Driver, Seat, parse

    asked, sampled = [], []

    class Fake(Driver):
        def fitting(self, group):
            return {seat: case for case in group for seat in self.processes if seat == Seat.of(seat.contender, case)}

        def ask(self, seat, do, **arguments):
            asked.append((seat.contender, do, arguments.get("verify")))
            if do == "sample":
                sampled.append(seat)
            return None if (seat.contender, do) == ("wrong", "prepare") else {"seconds": float(seat.threads)}

    driver = Fake(parse(["--rounds", "7", "--placements", "3", "--idle", "0"]), Results(), tmp_path)
    one, two = (Case("forward", "nchw", "f32", "identity", n, Shape("net", "a", 2, 3, 4, 5, 1)) for n in (1, 2))
    driver.processes = dict.fromkeys([Seat.of("right", one), Seat.of("wrong", one), Seat.of("right", two)])
    assert driver.attempt([one, two]) == {one: {"right": [1.0] * 7}, two: {"right": [2.0] * 7}}
    turns = [set(sampled[i : i + 2]) for i in range(0, len(sampled), 2)]
    assert turns == [{Seat.of("right", one), Seat.of("right", two)}] * 7
    assert [verify for name, do, verify in asked if (name, do) == ("right", "prepare")] == [True] * 2 + [False] * 4
    assert [(name, do) for name, do, _ in asked if name == "wrong"] == [("wrong", "prepare"), ("wrong", "release")]
    assert [do for name, do, _ in asked if name == "right"].count("release") == 6


def test_benchmarks_the_steadier_attempt_counts(suite, tmp_path):
    """Of all cases that take turns, one that has not settled has them all measured again."""
    from cases import Case, Shape
    from results import Results
    from run import Driver, parse

    one, two = (Case("forward", "nchw", "f32", "identity", n, Shape("net", "a", 2, 3, 4, 5, 1)) for n in (1, 2))

    def samples(*ours):
        return {"limit-plain": [1.0] * 5, "fastbn-out": list(ours)}

    steady, unsteady, worse = samples(*[2.0] * 5), samples(1.5, 1.7, 2.0, 2.4, 3.0), samples(1.5, 1.6, 2.0, 4.0, 5.0)

    def measured(*attempts):
        driver = Driver(parse(["--retries", str(len(attempts) - 1)]), Results(), tmp_path)
        left = iter(attempts)
        driver.attempt = lambda group: {c: s for c, s in zip(group, next(left), strict=True) if s}
        return {r.case: (r.samples, r.attempts, r.unsettled is None) for r in driver.measure([one, two])}

    assert measured([unsteady, steady], [steady, steady]) == {one: (steady, 2, True), two: (steady, 2, True)}
    assert measured([steady, steady], [worse, worse])[one] == (steady, 1, True)
    assert measured([unsteady, steady], [worse, steady]) == {one: (unsteady, 2, False), two: (steady, 2, True)}
    # and one in which somebody is missing is no better
    assert measured([unsteady, steady], [None, steady]) == {one: (unsteady, 2, False), two: (steady, 2, True)}
    without = {"limit-plain": [1.0] * 5}
    assert measured([unsteady, steady], [without, steady]) == {one: (unsteady, 2, False), two: (steady, 2, True)}


def test_benchmarks_lists_on_the_command_line(suite, capsys):
    from run import parse

    assert not {"limit-read", "fastbn-streamed"} & set(parse([]).contenders)
    assert (parse([]).reader, parse(["--reader", "yes,no"]).reader) == ([False], [True, False])
    assert parse(["--threads", "1", "--dtype", "bf16,f32"]).dtype == ["bf16", "f32"]
    assert (parse([]).placements, parse(["--rounds", "2"]).placements, parse(["--quick"]).placements) == (3, 2, 1)
    for wrong in (
        ["--placements", "3", "--rounds", "2"],
        ["--threads", "0"],
        ["--dtype", "f31"],
        ["--activation", "?"],
        ["--reader", "maybe"],
    ):
        with pytest.raises(SystemExit):
            parse(wrong)
        assert wrong[0] in capsys.readouterr().err


def test_benchmarks_run(measured, suite):
    from results import Results

    path, output = measured
    results = Results.load(path)
    assert len(results.cases) == 2 * 2 * 3, output
    for result in results.cases:
        assert {"limit-plain", "fastbn-out", "fastbn-fresh", "numpy"} <= set(result.samples), output
        assert all(len(rounds) == 3 and min(rounds) > 0 for rounds in result.samples.values())
        assert result.case.name in output
    assert {"cpu", "caches", "governor", "commit", "python", "fastbn"} <= set(results.machine)


def test_benchmarks_a_missing_contender_is_skipped_with_the_reason(suite, monkeypatch, tmp_path):
    import onednn
    from onednn import OneDNN

    monkeypatch.delenv("ONEDNN_LIBRARY", raising=False)
    monkeypatch.setattr(onednn.sys, "prefix", str(tmp_path))
    monkeypatch.setattr(onednn.ctypes.util, "find_library", lambda name: None)
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
    names = ("machine", "totals", "cases", "dtypes", "threads", "residual", "slower", "skipped")
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
    del record["cases"][3]["seconds"]["fastbn-out"]  # as if it had been wrong
    (tmp_path / "new.json").write_text(json.dumps(record))
    output = start("compare.py", tmp_path / "old.json", tmp_path / "new.json", status=1)
    assert f"missing       fastbn-out       {record['cases'][3]['name']}" in output and "1 missing" in output
    del record["cases"][4:]  # not measured at all
    (tmp_path / "new.json").write_text(json.dumps(record))
    assert "1 missing" in start("compare.py", tmp_path / "old.json", tmp_path / "new.json", status=1)


def test_benchmarks_results_of_two_machines_are_not_one(measured, tmp_path, monkeypatch, capsys):
    """Nor where both have the name of a virtual machine: caches tell them apart."""
    import report
    from results import load_all

    path, _ = measured
    record = json.loads(path.read_text())
    record["machine"]["caches"] = {"L2 Unified": "512K, CPUs 0"}
    (tmp_path / "one.json").write_text(json.dumps(record))
    record["machine"]["caches"] = {"L2 Unified": "512K, CPUs 0-1"}
    (tmp_path / "same.json").write_text(json.dumps(record))
    record["machine"]["caches"] = {"L2 Unified": "1024K, CPUs 0"}
    (tmp_path / "other.json").write_text(json.dumps(record))
    one, same, other = (tmp_path / f"{name}.json" for name in ("one", "same", "other"))
    assert len(load_all([one, same]).parts) == 2
    with pytest.raises(ValueError, match="different CPUs"):
        load_all([one, other])
    monkeypatch.setattr(report, "OF_PAGES", [one, other, same])
    assert report.of_pages() == [one, same]
    assert "other.json: of another machine than one.json" in capsys.readouterr().out
