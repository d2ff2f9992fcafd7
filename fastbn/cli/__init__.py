"""The command ``fastbn``: train a network, check claims, measure this machine, show the configuration.

Exit codes: 0, 1 if something failed on the way, 2 for wrong arguments (one line on stderr), 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import fastbn
from fastbn import nn
from fastbn.cli.arguments import Parser, UsageError
from fastbn.cli.bench import add_bench
from fastbn.cli.experiment import add_experiment
from fastbn.cli.train import add_train
from fastbn.nn.experiments import RecordError


def info(args: argparse.Namespace) -> int:
    fastbn.show_config()
    return 0


def build_parser() -> Parser:
    parser = Parser(prog="fastbn", description="Batch normalization for NumPy arrays, at the speed of memory.")
    parser.add_argument("--version", action="version", version=f"fastbn {fastbn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,experiment,bench,info}")
    add_train(commands.add_parser("train", help="train a network on images"))
    add_experiment(commands.add_parser("experiment", help="measure what is claimed about batch normalization"))
    add_bench(commands.add_parser("bench", help="measure the throughput on this machine"))
    commands.add_parser("info", help="show versions, instruction sets, threads").set_defaults(run=info)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name; ``sys.argv`` if None) and return the exit code."""
    args = build_parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except (UsageError, nn.CheckpointError, nn.DataError, RecordError, fastbn.FastBNError) as error:
        message, code = str(error), 2
    except BrokenPipeError:
        # The reader of our output has gone, as in `fastbn bench | head`; keep Python from flushing into the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        message, code = str(error), 1
    print(f"fastbn {args.command}: {message}", file=sys.stderr)
    return code
