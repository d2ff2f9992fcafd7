"""Records to one line of verdict, a picture, and a page."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastbn.nn.checkpoint import write_atomically
from fastbn.nn.experiments.protocol import Experiment, Panel, Verdict, judge
from fastbn.nn.experiments.runner import Record

COLOURS = ("#08519c", "#e6550d", "#31a354", "#756bb1", "#c51b8a", "#636363", "#6baed6", "#fdae6b")

INTRODUCTION = """\
# Experiments

What articles and papers say about batch normalization (BN), measured. Each experiment trains networks of `fastbn.nn`
with several seeds; a seed decides the images, the initial weights and their order. Lines in the pictures are medians
over the seeds, shaded from the lowest to the highest. A claim holds if the median meets a criterion that was fixed
before; what does not hold is listed as such. "Points" are percentage points of accuracy on test images. Where "best"
learning rates are compared, they are best on the test images, with and without BN alike.

This page and its pictures are made from the JSON files in the folder `{folder}` beside it, by the command that measures
what is missing there:

    fastbn experiment all --output {folder}

`--quick` is the same on small digits with one seed: it shows that everything works, and judges nothing. The sizes of
all that was trained are below each picture. The whole took {minutes:.0f} minutes of one core ({machine}).
"""


def values_of(record: Record) -> list[dict[str, float]]:
    """The values of each seed; what was not finite is NaN again."""
    return [
        {name: math.nan if value is None else value for name, value in run["values"].items()}
        for run in record["runs"].values()
    ]


def verdicts_of(experiment: Experiment, record: Record) -> list[Verdict]:
    return judge(experiment.criteria, values_of(record))


def number(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def measured(verdict: Verdict) -> str:
    """The median, with the spread over the seeds."""
    return f"{number(verdict.median)} ({number(verdict.lowest)} to {number(verdict.highest)})"


def required(verdict: Verdict) -> str:
    criterion = verdict.criterion
    words = {">=": "at least", "<=": "at most"}[criterion.comparison]
    return f"{words} {number(criterion.threshold)}" + (f" ({criterion.source})" if criterion.source != "ours" else "")


def line(experiment: Experiment, record: Record) -> str:
    """One line: whether the claim holds, and each criterion beside its value. A quick run is not judged."""
    verdicts = verdicts_of(experiment, record)
    numbers = "; ".join(f"{v.criterion.meaning}: {measured(v)}, {required(v)}" for v in verdicts)
    held = sum(verdict.holds for verdict in verdicts)
    word = "quick, no verdict" if record["quick"] else f"{held} of {len(verdicts)} criteria hold"
    return f"{experiment.name}: {word}: {numbers} [{len(record['runs'])} seeds]"


def spread(curves: Sequence[Sequence[Sequence[float | None]]]) -> tuple[Any, Any, Any, Any]:
    """x, and the median, lowest and highest y over the seeds; NaN where a seed has none."""
    x = np.array(curves[0][0], np.float64)
    y = np.array([curve[1] for curve in curves], np.float64)
    return x, np.median(y, axis=0), y.min(axis=0), y.max(axis=0)


def draw_panel(axes: Any, panel: Panel, curves: Sequence[Mapping[str, Any]]) -> None:
    """`curves` has the labels of one seed each."""
    for colour, label in zip(COLOURS, curves[0], strict=False):
        x, median, lowest, highest = spread([labels[label] for labels in curves])
        axes.plot(
            x, median, color=colour, label=label, marker="o" if len(x) < 12 else None, markersize=3, linewidth=1.4
        )
        axes.fill_between(x, lowest, highest, color=colour, alpha=0.15, linewidth=0)
    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    if "x" in panel.log:  # few points: their own values are the marks
        axes.set_xscale("log")
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.minorticks_off()
    if "y" in panel.log:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def draw(experiment: Experiment, record: Record, path: Path) -> None:
    """Write the picture of all panels side by side as PNG."""
    from matplotlib.figure import Figure

    count = len(experiment.panels)
    figure = Figure(figsize=(1 + 4.5 * count, 3.6), dpi=72, layout="constrained")
    for i, axes in enumerate(figure.subplots(1, count, squeeze=False)[0]):
        draw_panel(axes, experiment.panels[i], [run["curves"][i] for run in record["runs"].values()])
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    write_atomically(path, content.getvalue())


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def verdict_rows(experiment: Experiment, record: Record) -> list[list[str]]:
    return [
        [verdict.criterion.meaning, required(verdict), measured(verdict), "holds" if verdict.holds else "**fails**"]
        for verdict in verdicts_of(experiment, record)
    ]


def section(experiment: Experiment, record: Record, folder: str) -> str:
    setting = ", ".join(
        f"{name.replace('_', ' ')} {'/'.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in record["setting"].items()
    )
    seconds = [run["seconds"] for run in record["runs"].values()]
    doc = " ".join((experiment.measure.__doc__ or "").split())
    return "\n\n".join(
        [
            f"## {experiment.title}",
            f"> {experiment.claim}",
            f"![{experiment.title}]({folder}/{experiment.name}.png)",
            doc,
            table(
                ["criterion", "threshold", "median (lowest to highest)", "verdict"], verdict_rows(experiment, record)
            ),
            f"Setting: {setting}; {len(seconds)} seeds, {np.median(seconds):.0f} s each. Source: {experiment.source}.",
        ]
    )


def page(found: Sequence[tuple[Experiment, Record]], folder: str) -> str:
    """Markdown of all experiments with a record; `folder` is where the pictures are, as seen from the page."""
    minutes = sum(run["seconds"] for _, record in found for run in record["runs"].values()) / 60
    rows = [
        [f"[{experiment.title}](#{experiment.title.lower().replace(' ', '-')})", *row]
        for experiment, record in found
        for row in verdict_rows(experiment, record)
    ]
    machines = dict.fromkeys(", ".join(f"{k} {v}" for k, v in record["machine"].items()) for _, record in found)
    parts = [
        INTRODUCTION.format(folder=folder, minutes=minutes, machine="; ".join(machines)),
        table(["experiment", "criterion", "threshold", "median (lowest to highest)", "verdict"], rows),
        *(section(experiment, record, folder) for experiment, record in found),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"
