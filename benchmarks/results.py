"""Result files and what is computed from them: medians, paired ratios, shares of the limit, network totals.

A ratio of two contenders is the median over rounds of the ratio within the round, in which both had the machine as it
was then. A network's total is, round by round, the sum over its shapes of `count` times the seconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cases import Case, moved_bytes

LIMITS = ("limit-plain", "limit-stream", "limit-serial")
READ_PASS = "limit-read"  # one reading of x
SHARE_TOO_HIGH = 1.05
SPREAD_TOO_WIDE = 0.10

Samples = dict[str, list[float]]


def is_limit(contender: str) -> bool:
    """Whether it computes nothing, but passes over memory."""
    return contender in LIMITS or contender == READ_PASS


def limit_of(samples: Samples) -> list[float] | None:
    """Rounds of the fastest limit."""
    present = [samples[name] for name in LIMITS if name in samples]
    return min(present, key=lambda rounds: float(np.median(rounds))) if present else None


def with_limit(samples: Samples) -> Samples:
    """The fastest limit as "limit", and those that compute something."""
    limit = limit_of(samples)
    others = {name: rounds for name, rounds in samples.items() if not is_limit(name)}
    return ({"limit": limit} if limit else {}) | others


def paired(numerator: Sequence[float], denominator: Sequence[float]) -> tuple[float, float]:
    """Median over rounds of the ratio, and its interquartile range as a part of it."""
    rounds = min(len(numerator), len(denominator))
    low, median, high = np.percentile(np.array(numerator[:rounds]) / np.array(denominator[:rounds]), [25, 50, 75])
    return float(median), float((high - low) / median)


def shares(samples: Samples) -> dict[str, tuple[float, float]]:
    """Share of the limit, and its spread, of every contender."""
    limit = limit_of(samples)
    if limit is None:
        return {}
    return {name: paired(limit, rounds) for name, rounds in samples.items() if not is_limit(name)}


def unsettled(samples: Samples) -> str | None:
    """Why this must be measured again: what a share of fastbn shows."""
    for name, (share, spread) in shares(samples).items():
        if name.startswith("fastbn"):
            if share > SHARE_TOO_HIGH:
                return f"{name} at {share:.2f} of its limit"
            if spread > SPREAD_TOO_WIDE:
                return f"{name} spreads over {spread:.0%}"
    return None


def worst_spread(samples: Samples) -> float:
    return max((spread for name, (_, spread) in shares(samples).items() if name.startswith("fastbn")), default=0.0)


@dataclass
class Result:
    """One case as measured."""

    case: Case
    samples: Samples
    attempts: int = 1
    unsettled: str | None = None

    def to_json(self) -> dict[str, Any]:
        rounded = {name: [float(f"{s:.5g}") for s in rounds] for name, rounds in self.samples.items()}
        return {
            "name": self.case.name,
            "case": self.case.to_json(),
            "moved_bytes": moved_bytes(self.case),
            "attempts": self.attempts,
            "unsettled": self.unsettled,
            "seconds": rounded,
        }

    def median(self, contender: str) -> float:
        return float(np.median(self.samples[contender]))

    def speed(self, contender: str) -> float:
        """GB/s of what the limit must move."""
        return moved_bytes(self.case) / self.median(contender) / 1e9


@dataclass
class Results:
    machine: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    cases: list[Result] = field(default_factory=list)
    minutes: float = 0.0
    parts: list[Results] = field(default_factory=list)  # the files, if there are several

    def on_the_same_machine(self, other: Results) -> bool:
        """Of a processor's name, virtual machines tell little; its caches tell the models apart."""

        def sizes(machine: dict[str, Any]) -> dict[str, str]:
            return {level: text.partition(",")[0] for level, text in machine.get("caches", {}).items()}

        one, two = self.machine, other.machine
        return bool(one.get("cpu") == two.get("cpu") and sizes(one) == sizes(two))

    def save(self, path: Path) -> None:
        record = {
            "format": 1,
            "machine": self.machine,
            "settings": self.settings,
            "versions": self.versions,
            "skipped": self.skipped,
            "minutes": round(self.minutes, 1),
        }
        head = json.dumps(record, indent=1)[:-2]
        lines = ",\n".join("  " + json.dumps(result.to_json()) for result in self.cases)  # a line per case
        path.write_text(f'{head},\n "cases": [\n{lines}\n ]\n}}\n')

    @classmethod
    def load(cls, path: Path) -> Results:
        record = json.loads(path.read_text())
        if record.get("format") != 1:
            raise ValueError(f"{path}: not a result file of this suite")
        results = [
            Result(Case.from_json(entry["case"]), entry["seconds"], entry["attempts"], entry["unsettled"])
            for entry in record["cases"]
        ]
        keys = ("machine", "settings", "versions", "skipped")
        return cls(**{key: record[key] for key in keys}, cases=results, minutes=record["minutes"])


def load_all(paths: Sequence[Path]) -> Results:
    """Several files as one; a case measured twice counts as in the last file. The machine is that of the first."""
    loaded = [Results.load(path) for path in paths]
    merged = replace(loaded[0])
    if not all(merged.on_the_same_machine(other) for other in loaded):
        raise ValueError("these files come from different CPUs")
    merged.parts = loaded if len(loaded) > 1 else []
    merged.cases = list({result.case.name: result for other in loaded for result in other.cases}.values())
    merged.minutes = sum(other.minutes for other in loaded)
    merged.versions = {name: version for other in loaded for name, version in other.versions.items()}
    merged.skipped = list(dict.fromkeys(line for other in loaded for line in other.skipped))
    return merged


Group = tuple[str, str, str, str, str, int]  # network, what is done, layout, dtype, activation, threads


def group_of(case: Case) -> Group:
    return (case.shape.network, case.work, case.layout, case.dtype, case.activation, case.threads)


def by_network(results: Results) -> dict[Group, list[Result]]:
    groups: dict[Group, list[Result]] = {}
    for result in results.cases:
        groups.setdefault(group_of(result.case), []).append(result)
    return groups


def totals(group: Sequence[Result]) -> Samples:
    """Seconds per round of all layers of a network, for contenders that have done every shape; "limit" is the sum of
    the best limits."""
    samples = [with_limit(result.samples) for result in group]
    rounds = min(len(r) for result in group for r in result.samples.values())
    sums: Samples = {}
    for name in set.intersection(*map(set, samples)):
        sums[name] = [0.0] * rounds
        for result, own in zip(group, samples, strict=True):
            sums[name] = [a + result.case.shape.count * b for a, b in zip(sums[name], own[name], strict=False)]
    return sums
