"""``fastbn experiment``: what is claimed about batch normalization, measured."""

from __future__ import annotations

import argparse
import functools
import importlib.util
from pathlib import Path

from fastbn import nn
from fastbn.cli.arguments import POSITIVE, THREADS, UsageError
from fastbn.nn import experiments
from fastbn.nn.checkpoint import write_atomically

SEEDS = 5


def add_experiment(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=[*experiments.EXPERIMENTS, "all"], metavar="NAME", help="%(choices)s")
    parser.add_argument("--quick", action="store_true", help="digits, one seed, little training: does everything work?")
    parser.add_argument("--seeds", type=POSITIVE, metavar="N", help=f"how many (default {SEEDS}, 1 with --quick)")
    parser.add_argument(
        "--data", metavar="DATA", help="as for `fastbn train` (default 'fashion-mnist', 'digits' with --quick)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="for a JSON file and a picture of each experiment, and without --quick FOLDER.md; seeds that are there "
        "are not measured again (default 'experiments', 'experiments-quick' with --quick)",
    )
    parser.add_argument(
        "--num-threads", type=THREADS, default=1, metavar="N", help="of fastbn and of the layers (default 1)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    data = args.data or ("digits" if args.quick else "fashion-mnist")
    needed = ["matplotlib", "threadpoolctl", *(["sklearn"] if data == "digits" else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"not installed: {', '.join(missing)}; the command is: pip install 'fastbn[train]'")
    folder = args.output or Path("experiments-quick" if args.quick else "experiments")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UsageError(f"--output {folder}: is not a folder") from None
    seeds = range(args.seeds or (1 if args.quick else SEEDS))
    chosen = list(experiments.EXPERIMENTS) if args.name == "all" else [args.name]
    load = functools.cache(functools.partial(nn.load, data))
    log = functools.partial(print, flush=True)
    with nn.threads(args.num_threads):
        for experiment in map(experiments.EXPERIMENTS.__getitem__, chosen):
            path = folder / f"{experiment.name}.json"
            record = experiments.run(experiment, seeds, path, load, data, quick=args.quick, log=log)
            experiments.draw(experiment, record, path.with_suffix(".png"))
            log(experiments.line(experiment, record))
    if not args.quick:
        page = folder.resolve().with_name(f"{folder.resolve().name}.md")
        found = [(experiment, folder / f"{name}.json") for name, experiment in experiments.EXPERIMENTS.items()]
        records = [(experiment, experiments.read(path)) for experiment, path in found if path.exists()]
        records = [(experiment, record) for experiment, record in records if not record["quick"]]
        write_atomically(page, experiments.page(records, folder.resolve().name).encode())
        log(f"page: {page}")
    return 0
