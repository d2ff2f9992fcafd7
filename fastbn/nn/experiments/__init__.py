"""What articles and papers claim about batch normalization, measured: ``fastbn experiment``."""

from fastbn.nn.experiments.claims import EXPERIMENTS
from fastbn.nn.experiments.protocol import Criterion, Experiment, Panel, Result, Verdict, judge
from fastbn.nn.experiments.report import draw, line, page
from fastbn.nn.experiments.runner import RecordError, read, run

__all__ = [
    "EXPERIMENTS",
    "Criterion",
    "Experiment",
    "Panel",
    "RecordError",
    "Result",
    "Verdict",
    "draw",
    "judge",
    "line",
    "page",
    "read",
    "run",
]
