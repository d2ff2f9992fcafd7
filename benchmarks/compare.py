"""Tell two result files apart and name regressions: python benchmarks/compare.py OLD NEW; exit status 1 if any, or
if a contender has failed in a case that it had before.

Compared are shares of the limit, which a change of the machine's speed leaves alone, and seconds where a file has no
limit. A change counts if it exceeds both the threshold and the spread of the two measurements.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from results import Result, Results, is_limit, shares

THRESHOLD = 0.10


@dataclass(frozen=True)
class Change:
    case: str
    contender: str
    ratio: float  # new speed / old speed
    tolerance: float

    @property
    def verdict(self) -> str:
        if abs(np.log(self.ratio)) <= np.log1p(self.tolerance):
            return "same"
        return "slower" if self.ratio < 1 else "faster"

    def __str__(self) -> str:
        return f"{self.verdict:<6} {self.ratio:>5.2f}x  {self.contender:<16} {self.case}"


def speed(result: Result, contender: str, by_share: bool) -> tuple[float, float]:
    """Something that grows with speed, and its spread."""
    if by_share:
        return shares(result.samples)[contender]
    low, median, high = np.percentile(result.samples[contender], [25, 50, 75])
    return 1 / float(median), float((high - low) / median)


def compare(old: Results, new: Results, threshold: float, contenders: Sequence[str] | None) -> list[Change]:
    """Changes of what both files have measured; fastbn only unless contenders are named."""
    before = {result.case.name: result for result in old.cases}
    changes = []
    for result in new.cases:
        other = before.get(result.case.name)
        if other is None:
            continue
        by_share = shares(result.samples).keys() & shares(other.samples).keys()
        for name in result.samples:
            wanted = name in contenders if contenders else name.startswith("fastbn")
            if not wanted or name not in other.samples or (by_share and is_limit(name)):
                continue
            (was, was_spread), (now, now_spread) = (speed(r, name, name in by_share) for r in (other, result))
            changes.append(Change(result.case.name, name, now / was, max(threshold, was_spread, now_spread)))
    return changes


def missing(old: Results, new: Results, contenders: Sequence[str] | None) -> list[tuple[str, str]]:
    """(case, contender) of what has failed: a case that NEW has, too, without a contender that it has elsewhere."""
    after = {result.case.name: result.samples for result in new.cases}
    present = {name for samples in after.values() for name in samples}
    return [
        (result.case.name, name)
        for result in old.cases
        for name in result.samples
        if result.case.name in after
        and name in present - after[result.case.name].keys()
        and (name in contenders if contenders else name.startswith("fastbn"))
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="least change that counts (default 0.10)")
    parser.add_argument("--contenders", type=lambda text: text.split(","), help="default: all of fastbn")
    parser.add_argument("--all", action="store_true", help="also list what is the same")
    args = parser.parse_args(argv)
    old, new = Results.load(args.old), Results.load(args.new)
    for key in ("cpu", "threads"):
        if old.machine.get(key) != new.machine.get(key):
            print(f"note: different {key}: {old.machine.get(key)} and {new.machine.get(key)}")
    if old.machine.get("cpu") == new.machine.get("cpu") and not old.on_the_same_machine(new):
        print("note: different caches")
    changes = compare(old, new, args.threshold, args.contenders)
    lost = missing(old, new, args.contenders)
    if not changes:
        print("nothing in common", file=sys.stderr)
        return 2
    for change in sorted(changes, key=lambda change: change.ratio):
        if args.all or change.verdict != "same":
            print(change)
    for case, contender in lost:
        print(f"missing       {contender:<16} {case}")
    counts = {verdict: sum(change.verdict == verdict for change in changes) for verdict in ("slower", "same", "faster")}
    print(", ".join(f"{count} {verdict}" for verdict, count in [*counts.items(), ("missing", len(lost))]))
    return 1 if counts["slower"] or lost else 0


if __name__ == "__main__":
    sys.exit(main())
