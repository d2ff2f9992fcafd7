"""Runs experiments seed by seed. The JSON file of an experiment is complete after each seed, and a run continues it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

import fastbn
from fastbn.nn.checkpoint import write_atomically
from fastbn.nn.data import DataError, Dataset
from fastbn.nn.experiments.protocol import Experiment, Result

QUICK = {"test_images": 360}  # more than that the digits do not have
DIGITS = 5  # significant ones of the numbers in a file


class Record(TypedDict):
    """What a JSON file holds."""

    experiment: str
    quick: bool
    setting: dict[str, Any]
    machine: dict[str, str]
    runs: dict[str, dict[str, Any]]


class RecordError(ValueError):
    """A file that is no record, or of another setting, or to be continued on another kind of machine."""


def new_record(experiment: Experiment, data_name: str, quick: bool) -> Record:
    setting = {"data": data_name, **experiment.setting, **({**QUICK, **experiment.quick} if quick else {})}
    machine = {"numpy": np.__version__, "isa": fastbn.runtime.config()["isa"]}
    return {"experiment": experiment.name, "quick": quick, "setting": setting, "machine": machine, "runs": {}}


def read(path: Path) -> Record:
    try:
        record: Record = json.loads(path.read_text())
    except ValueError as error:
        raise RecordError(f"{path}: no record of an experiment ({error})") from error
    missing = Record.__required_keys__.difference(record if isinstance(record, dict) else ())
    if missing:
        raise RecordError(f"{path}: no record of an experiment (without {', '.join(sorted(missing))})")
    return record


def write(path: Path, record: Record) -> None:
    """A line for each seed: a difference between two files is easy to see."""
    head = "".join(f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in record.items() if key != "runs")
    runs = ",\n".join(f"{json.dumps(seed)}: {json.dumps(run, allow_nan=False)}" for seed, run in record["runs"].items())
    write_atomically(path, f'{{\n{head}"runs": {{\n{runs}\n}}\n}}\n'.encode())


def rounded(value: float) -> float | None:
    """`DIGITS` significant digits; None, which JSON knows, for what is not finite."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def plain(result: Result) -> dict[str, Any]:
    curves = [
        {label: [[rounded(value) for value in axis] for axis in curve] for label, curve in panel.items()}
        for panel in result.curves
    ]
    return {"values": {name: rounded(value) for name, value in result.values.items()}, "curves": curves}


def part(data: Dataset, seed: int, images: int, test_images: int) -> Dataset:
    """`images` of the training images, chosen at random, and the first `test_images` test images."""
    if len(data.x_train) < images or len(data.x_test) < test_images:
        found = f"{len(data.x_train)} and {len(data.x_test)}"
        raise DataError(f"data: expected at least {images} training and {test_images} test images, got {found}")
    chosen = np.random.default_rng(seed).permutation(len(data.x_train))[:images]
    return Dataset(data.x_train[chosen], data.y_train[chosen], data.x_test[:test_images], data.y_test[:test_images])


def measure(experiment: Experiment, setting: dict[str, Any], data: Dataset, seed: int) -> dict[str, Any]:
    """What one seed gives, and the CPU seconds it took; the seed also decides which training images are used."""
    options = {name: value for name, value in setting.items() if name not in ("data", "images", "test_images")}
    start = time.process_time()
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # some of what is trained diverges
        result = experiment.measure(part(data, seed, setting["images"], setting["test_images"]), seed, **options)
    return {"seconds": round(time.process_time() - start, 1), **plain(result)}


def run(
    experiment: Experiment,
    seeds: Iterable[int],
    path: Path,
    load: Callable[[], Dataset],
    data_name: str,
    *,
    quick: bool = False,
    log: Callable[[str], object] = print,
) -> Record:
    """Measure those of `seeds` that are not in the file `path` yet, and return what is in it then.

    `load` is called if there is something to measure. RecordError if the file was measured with another setting, or
    would be continued with another NumPy or instruction set, whose last bits lead elsewhere.
    """
    record = new_record(experiment, data_name, quick)
    machine = record["machine"]
    if path.exists():
        found = read(path)
        if found["setting"] != json.loads(json.dumps(record["setting"])):
            raise RecordError(f"{path}: measured with another setting; remove it, or choose another folder")
        record = found
    for seed in seeds:
        if str(seed) not in record["runs"]:
            if record["machine"] != machine:
                begun = ", ".join(f"{name} {value}" for name, value in record["machine"].items())
                raise RecordError(f"{path}: begun with {begun}; remove it, or choose another folder")
            record["runs"][str(seed)] = measure(experiment, record["setting"], load(), seed)
            write(path, record)
            log(f"{experiment.name}: seed {seed}, {record['runs'][str(seed)]['seconds']:.0f} s")
    return record
