"""What an experiment is made of, and how it is judged."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

Curve = tuple[Any, Any]  # x and y, sequences of numbers
COMPARISONS = {">=": operator.ge, "<=": operator.le}


class Criterion(NamedTuple):
    """What must hold for the median over the seeds, decided before it was measured; `source` is of the threshold."""

    value: str  # key in `Result.values`
    meaning: str
    comparison: Literal[">=", "<="]
    threshold: float
    source: str = "ours"


class Panel(NamedTuple):
    """One pair of axes in the picture of an experiment; "x" and "y" in `log` make these axes logarithmic."""

    title: str
    x: str
    y: str
    log: str = ""


class Result(NamedTuple):
    """What one seed gives: numbers by name, and for each panel of the picture (in order) its curves by label."""

    values: Mapping[str, float]
    curves: Sequence[Mapping[str, Curve]]


@dataclass(frozen=True)
class Experiment:
    """A claim, the function that measures it with one seed, and the criteria.

    `measure` is called with the images, the seed and `setting`; its docstring says what is trained and measured. The
    seed decides initial weights and batches: networks of an experiment begin alike and see the same. `setting` also has
    ``images`` and ``test_images``, the sizes of the two parts. `quick` replaces some of it for a run that only shows
    that everything works.
    """

    title: str
    claim: str
    source: str
    measure: Callable[..., Result]
    criteria: Sequence[Criterion]
    panels: Sequence[Panel]
    setting: Mapping[str, Any]
    quick: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.measure.__name__


class Verdict(NamedTuple):
    """The values of all seeds against a criterion."""

    criterion: Criterion
    median: float
    lowest: float
    highest: float

    @property
    def holds(self) -> bool:
        """Whether the median meets the threshold; a median that is not a number does not."""
        return bool(COMPARISONS[self.criterion.comparison](self.median, self.criterion.threshold))


def judge(criteria: Sequence[Criterion], results: Sequence[Mapping[str, float]]) -> list[Verdict]:
    """One verdict for each criterion, from the values of each seed."""
    verdicts = []
    for criterion in criteria:
        values = np.array([values[criterion.value] for values in results], np.float64)
        verdicts.append(Verdict(criterion, float(np.median(values)), float(values.min()), float(values.max())))
    return verdicts
