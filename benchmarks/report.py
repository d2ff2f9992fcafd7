"""Results to tables and pictures: python benchmarks/report.py [A.json B.json ...]; without files, those of the pages.

The tables replace what stands between ``<!-- benchmarks NAME -->`` and ``<!-- /benchmarks NAME -->`` in README.md and
docs/benchmarks.md; the pictures go to docs/pictures. Nothing is copied by hand. ``<!-- benchmarks NAME FILE -->`` is
the table of one file in benchmarks/results, whatever the command line says.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import pictures
from cases import Case
from results import (
    LIMITS,
    READ_PASS,
    Group,
    Result,
    Results,
    by_network,
    is_limit,
    limit_of,
    load_all,
    paired,
    shares,
    totals,
    with_limit,
)

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "results"
# What the tables without a file of their own, and the pictures, are made from.
OF_PAGES = [FOLDER / name for name in ("networks.json", "relu.json", "sizes.json")]
# networks whose totals stand in the README
README_NETWORKS = ("resnet50", "bn_inception")
UNSETTLED = "* measured again without settling."


def of_pages() -> list[Path]:
    """`OF_PAGES`, but none of another machine than the first: the others may have to be measured yet."""
    first, *others = OF_PAGES
    here = Results.load(first)
    strange = [path for path in others if not here.on_the_same_machine(Results.load(path))]
    for path in strange:
        print(f"{path}: of another machine than {first.name}, left out")
    return [path for path in OF_PAGES if path not in strange]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str = "---:") -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" + f" {align} |" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def milliseconds(seconds: float) -> str:
    """Three digits, or all of them before the point."""
    value = 1e3 * seconds
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def times(ratio: float) -> str:
    return f"{ratio:.2g}x" if ratio < 9.95 else f"{ratio:.0f}x"


def contenders_of(results: Results) -> list[str]:
    present = {name for result in results.cases for name in result.samples}
    return [name for name in results.versions if name in present and not is_limit(name)]


def title(group: Group) -> str:
    network, work, layout, dtype, activation, threads = group
    plain = activation == "identity"
    return f"{network}, {work}{'' if plain else ' + ' + activation}, {layout.upper()} {dtype}, {threads} threads"


def machine_table(results: Results) -> str:
    machine = results.machine
    rows = [[key, str(value)] for key, value in machine.items() if not isinstance(value, dict) and key != "commit"]
    rows += [["caches", "; ".join(f"{key}: {value}" for key, value in machine["caches"].items())]]
    rows += [[f"fastbn: {key}", value] for key, value in machine["fastbn"].items()]
    libraries = {key: value for versions in results.versions.values() for key, value in versions.items()}
    rows += [["libraries", ", ".join(f"{key} {value}" for key, value in libraries.items())]]
    for part in results.parts or [results]:
        settings = {key: ",".join(map(str, v)) if isinstance(v, list) else v for key, v in part.settings.items()}
        named = "; ".join(f"{key} {value}" for key, value in settings.items())
        took = f"{part.minutes:.0f} minutes, {len(part.cases)} cases, commit {part.machine['commit']}"
        rows += [["settings", f"{named} ({took})"]]
    return table(["what", "value"], rows, "---")


def readme_table(results: Results) -> str:
    """Totals of the two networks: share of the limit, and how many times longer the others take."""
    names = [name for name in contenders_of(results) if not name.startswith("fastbn")]
    rows = []
    for group, members in by_network(results).items():
        if group[0] not in README_NETWORKS:
            continue
        sums = totals(members)
        ours = next((name for name in ("fastbn-recycled", "fastbn-fresh", "fastbn-out") if name in sums), None)
        if ours is None:
            continue
        share = f"{paired(sums['limit'], sums['fastbn-out'])[0]:.2f}" if {"limit", "fastbn-out"} <= set(sums) else ""
        rest = [times(paired(sums[name], sums[ours])[0]) if name in sums else "" for name in names]
        rows.append([title(group), share, f"{sorted(sums[ours])[len(sums[ours]) // 2] * 1e3:.0f}", *rest])
    head = ["network total", "share of the limit (own buffer)", "fastbn ms", *names]
    note = "\n\nOther columns: time of the contender divided by that of fastbn with new outputs"
    return table(head, rows) + note + (" (recycled memory)." if "fastbn-recycled" in results.versions else ".")


def totals_table(results: Results) -> str:
    """Network totals in milliseconds, and shares of the limit."""
    names = contenders_of(results)
    rows = []
    for group, members in by_network(results).items():
        sums = totals(members)
        cells = []
        for name in names:
            if name not in sums:
                cells.append("")
                continue
            share = f" ({paired(sums['limit'], sums[name])[0]:.2f})" if "limit" in sums else ""
            cells.append(f"{milliseconds(sorted(sums[name])[len(sums[name]) // 2])}{share}")
        limit = milliseconds(sorted(sums["limit"])[len(sums["limit"]) // 2]) if "limit" in sums else ""
        rows.append([title(group), limit, *cells])
    return table(["network total, ms (share of the limit)", "limit", *names], rows)


def cases_table(results: Results) -> str:
    """Every case: the limit, the best of fastbn's shares, everything else relative to fastbn's own kind of output."""
    names = contenders_of(results)
    rows = [[f"`{result.case.name}`", *case_cells(result, names)] for result in results.cases]
    note = f"\n\nMilliseconds; in brackets the share of the limit. {UNSETTLED}"
    return table(["case", "limit GB/s", *names], rows) + note


def case_cells(result: Result, names: Sequence[str]) -> list[str]:
    limit = limit_of(result.samples)
    share = shares(result.samples)
    speed = f"{max(result.speed(name) for name in LIMITS if name in result.samples):.1f}" if limit else ""
    cells = [speed + ("*" if result.unsettled else "")]
    for name in names:
        if name not in result.samples:
            cells.append("")
            continue
        cells.append(milliseconds(result.median(name)) + (f" ({share[name][0]:.2f})" if name in share else ""))
    return cells


def slower_table(results: Results) -> str:
    """Cases in which fastbn takes longer than another contender with the same kind of output."""
    rows = []
    for result in results.cases:
        for name in result.samples:
            own_buffer = name.startswith("onednn")
            kinds = ("fastbn-out",) if own_buffer else ("fastbn-recycled", "fastbn-fresh")
            ours = next((kind for kind in kinds if kind in result.samples), None)
            if ours is None or name.startswith(("fastbn", "limit")):
                continue
            ratio, spread = paired(result.samples[name], result.samples[ours])
            if ratio < 1:
                rows.append([f"`{result.case.name}`", name, ours, f"{ratio:.2f}x (spread {spread:.0%})"])
    return table(["case", "faster contender", "than", "its time / ours"], rows) if rows else "None."


def in_turns(results: Results, field: str) -> tuple[list[Any], list[dict[Any, Result]]]:
    """The values of a field of cases, and for cases that differ in nothing else, which result is whose. For one file:
    only there are rounds the same."""
    groups: dict[Case, dict[Any, Result]] = {}
    for result in results.cases:
        rest = replace(result.case, **{field: None})
        groups.setdefault(rest, {})[getattr(result.case, field)] = result
    return list(dict.fromkeys(value for group in groups.values() for value in group)), list(groups.values())


def ratios_table(results: Results, field: str) -> str:
    """How many times as fast as with the first value of a field everybody is with the others, in the same rounds."""
    values, groups = in_turns(results, field)
    groups = [group for group in groups if len(group) > 1 and values[0] in group]
    if not groups:
        return "None."
    names = list(dict.fromkeys(name for group in groups for name in with_limit(group[values[0]].samples)))
    rows = []
    for group in groups:
        samples = {value: with_limit(result.samples) for value, result in group.items()}
        row = [f"`{group[values[0]].case.name}`" + "*" * any(result.unsettled is not None for result in group.values())]
        for name in names:
            base = samples[values[0]].get(name)
            cell = [milliseconds(float(np.median(base)))] if base else []
            for value in values[1:] if base else ():
                theirs = samples.get(value, {}).get(name)
                cell.append("{:.2f}x ({:.0%})".format(*paired(base, theirs)) if theirs else "-")
            row.append(", ".join(cell))
        rows.append(row)
    first, *others = map(str, values)
    note = f"Milliseconds with {field} {first}; then how many times as fast with {', '.join(others)} (spread)."
    return table(["case", *names], rows) + f"\n\n{note} {UNSETTLED}"


def residual_table(results: Results) -> str:
    """What a residual costs, in passes of reading, in the same rounds."""
    rows = []
    for group in in_turns(results, "activation")[1]:
        for activation, result in group.items():
            added = group.get(f"add+{activation}")
            if added is None or READ_PASS not in result.samples:
                continue
            one = result.samples[READ_PASS]
            without, with_it = with_limit(result.samples), with_limit(added.samples)
            star = "*" if result.unsettled or added.unsettled else ""
            for name in [name for name in without if name in with_it]:
                passes = [(a - b) / c for a, b, c in zip(with_it[name], without[name], one, strict=False)]
                low, median, high = np.percentile(passes, [25, 50, 75])
                cells = [milliseconds(float(np.median(rounds))) for rounds in (without[name], with_it[name], one)]
                row = [f"`{result.case.name}`{star}", name, *cells, f"{median:.2f} ({low:.2f} to {high:.2f})"]
                rows.append(row)
    if not rows:
        return "None."
    head = ["case", "contender", "ms", "with a residual", "a pass of reading", "passes for the residual"]
    return table(head, rows) + f"\n\nIn brackets the quartiles of rounds. {UNSETTLED}"


def skipped_list(results: Results) -> str:
    return "\n".join(f"* {line}" for line in results.skipped) or "None."


TABLES: dict[str, Callable[[Results], str]] = {
    "readme": readme_table,
    "machine": machine_table,
    "totals": totals_table,
    "cases": cases_table,
    "slower": slower_table,
    "dtypes": partial(ratios_table, field="dtype"),
    "threads": partial(ratios_table, field="threads"),
    "residual": residual_table,
    "skipped": skipped_list,
}


def fill(text: str, results: Results) -> tuple[str, int]:
    """The text with every marked place filled, and how many places there were."""
    count = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal count
        name, _, file = match[1].partition(" ")
        if name not in TABLES:
            raise ValueError(f"no table named {name!r}; there are {', '.join(TABLES)}")
        count += 1
        source = Results.load(FOLDER / file) if file else results
        return f"<!-- benchmarks {match[1]} -->\n\n{TABLES[name](source)}\n\n<!-- /benchmarks {match[1]} -->"

    pattern = r"<!-- benchmarks ([\w. -]+?) -->.*?<!-- /benchmarks \1 -->"
    return re.sub(pattern, replace, text, flags=re.S), count


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "results",
        type=Path,
        nargs="*",
        help="result files, of which a later one replaces cases of an earlier; without any, those of the pages that "
        "were measured on the machine of the first of them",
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="where README.md and docs/ are")
    args = parser.parse_args(argv)
    results = load_all(args.results or of_pages())
    for name in ("README.md", "docs/benchmarks.md"):
        page = args.root / name
        if not page.exists():
            print(f"{page}: does not exist")
            continue
        text, count = fill(page.read_text(), results)
        page.write_text(text)
        print(f"{page}: {count} tables")
    folder = args.root / "docs" / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    for path in pictures.draw_all(results, folder):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
