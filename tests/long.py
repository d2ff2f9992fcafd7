"""`make test-long`: the long parts one after the other, and what each has found, in tests/results/long.json and from
there in docs/reliability.md.

A part is a file of tests, which then draws many more cases, or a target of make. Each replaces its own entry only:
`make test-long PARTS=coverage` runs coverage and leaves what the others have found before. An entry is read from what
the part has left in build/: the XML of pytest, with all that tests record (record_property: numbers of one name are
added up; of "largest ..." the largest counts), and the two summaries of coverage.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import fastbn
from pages import replaced

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests" / "results" / "long.json"
PAGE = ROOT / "docs" / "reliability.md"
BUILD = ROOT / "build"

Entry = dict[str, Any]

# Targets of make: their arguments, and what they are called on the page. Coverage is of `make test`, not of long runs.
TARGETS = {
    "asan": (["ASAN_TESTS=tests/test_fuzz.py"], "`test_fuzz.py` on a build with `-fsanitize=address,undefined`"),
    "coverage": ([], "`make coverage`"),
}


def name_of(part: str) -> str:
    return Path(part).stem.removeprefix("test_")


def run(part: str) -> int:
    """Exit status; the XML lies in build/."""
    xml = BUILD / f"long-{name_of(part)}.xml"
    xml.unlink(missing_ok=True)
    options = [*shlex.split(os.environ.get("PYTEST", "")), f"--junitxml={xml}"]
    if part in TARGETS:
        command = ["make", part, f"PYTEST={shlex.join(options)}", *TARGETS[part][0]]
    else:
        command = [str(Path(sys.executable).with_name("pytest")), *options, part]  # the installed fastbn, not ROOT's
    more = {} if part == "coverage" else {"FASTBN_TEST_LONG": "1"}
    more |= {} if part in TARGETS else {"FASTBN_TEST_WHEEL": "1"}
    # Of threads that wait for each other at full speed, more than cores, a call may take a hundred times as long.
    more = {"OMP_WAIT_POLICY": "passive", **os.environ, **more}
    print(f"fastbn: {shlex.join(command)}", flush=True)
    return subprocess.run(command, cwd=ROOT, env=more).returncode


# ---------------------------------------------------------------------------------------------------------------------
# What a part has left


def record() -> dict[str, Any]:
    """What was tested, and where."""
    sys.path.append(str(ROOT / "benchmarks"))
    import machine

    config = fastbn.runtime.config()
    kept = {key: config[key] for key in ("fastbn", "python", "numpy", "machine", "compiler", "isas available")}
    description = {"cpu": machine.cpu_model(), "logical CPUs": str(os.cpu_count()), **kept}
    return {"commit": machine.commit(ROOT), "machine": description}


def entry(xml: Path) -> Entry:
    suite = next(ElementTree.parse(xml).iter("testsuite"))
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    figures: dict[str, int] = {}
    for recorded in suite.iter("property"):
        name, text = recorded.get("name", ""), recorded.get("value", "")
        if not text.lstrip("-").isdecimal():  # hypothesis records texts
            continue
        value = int(text)
        before = figures.get(name, 0)
        figures[name] = max(before, value) if name.startswith("largest ") else before + value
    return {
        "date": suite.get("timestamp", "")[:10],
        "seconds": round(float(suite.get("time", 0))),
        "passed": counts["tests"] - failed - counts["skipped"],
        "failed": failed,
        "skipped": counts["skipped"],
        "figures": figures,
    }


def coverage(folder: Path) -> dict[str, Any]:
    """Lines, lines reached, and where lines were not, of either language."""
    python = json.loads((folder / "python.json").read_text())
    c = json.loads((folder / "c.json").read_text())

    def missed(counts: dict[str, int]) -> dict[str, int]:
        return {name: count for name, count in sorted(counts.items()) if count}

    return {
        "Python": {
            "lines": python["totals"]["num_statements"],
            "reached": python["totals"]["covered_lines"],
            "missed": missed(
                {
                    name.partition("build/coverage/")[2]: file["summary"]["missing_lines"]
                    for name, file in python["files"].items()
                }
            ),
        },
        "C": {
            "lines": c["line_total"],
            "reached": c["line_covered"],
            "missed": missed({file["filename"]: file["line_total"] - file["line_covered"] for file in c["files"]}),
        },
    }


# ---------------------------------------------------------------------------------------------------------------------
# The page


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def long_section(results: dict[str, Entry]) -> str:
    lines = [row("what", "tests", "failed", "minutes", "date", "commit", "found")]
    lines.append("| --- | ---: | ---: | ---: | --- | --- | --- |")
    for name, of in results.items():
        what = TARGETS[name][1] if name in TARGETS else f"`test_{name}.py`"
        found = "; ".join(f"{key}: {value:,}" for key, value in of["figures"].items())
        lines.append(
            row(what, f"{of['passed']:,}", of["failed"], f"{of['seconds'] / 60:.0f}", of["date"], of["commit"], found)
        )
    machines: dict[str, list[str]] = {}
    for name, of in results.items():
        machines.setdefault(", ".join(f"{key} {value}" for key, value in of["machine"].items()), []).append(name)
    lines += ["", *(f"{', '.join(names)}: {machine}." for machine, names in machines.items())]
    return "\n".join(lines)


def coverage_section(results: dict[str, Entry]) -> str:
    if "coverage" not in results:
        return "Not yet."
    of = results["coverage"]["coverage"]
    lines = [row("", "lines", "reached", "not reached, by file"), "| --- | ---: | ---: | --- |"]
    for language, where in (("C", "`src_c/`"), ("Python", "`fastbn/` without the GPU backend")):
        counts = of[language]
        missed = ", ".join(f"`{file.partition('/')[2]}` {count}" for file, count in counts["missed"].items())
        percent = f"{100 * counts['reached'] / counts['lines']:.1f} %"
        lines.append(row(f"{language} ({where})", counts["lines"], percent, missed))
    return "\n".join(lines)


SECTIONS = {"long": long_section, "coverage": coverage_section}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"a file of tests, or {' or '.join(TARGETS)}")
    parser.add_argument("--read", action="store_true", help="run nothing: read what such a run has left in build/")
    arguments = parser.parse_args()
    results: dict[str, Entry] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    failed = []
    for part in arguments.parts:
        name = name_of(part)
        status = 0 if arguments.read else run(part)
        xml = BUILD / f"long-{name}.xml"
        if status:
            failed.append(part)
        if status not in (0, 1) or not xml.exists():  # ended before its end
            continue
        results[name] = {**entry(xml), **record()}
        if part == "coverage":
            results[name]["coverage"] = coverage(BUILD / "coverage")
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    page = PAGE.read_text()
    for marker, section in SECTIONS.items():
        page = replaced(page, marker, section(json.loads(RESULTS.read_text())))
    PAGE.write_text(page)
    if failed:
        print(f"fastbn: failed: {' '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
