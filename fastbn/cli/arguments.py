"""What the arguments of the commands may be; a wrong one is reported in one line."""

from __future__ import annotations

import argparse
import contextlib
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import fastbn


class UsageError(Exception):
    """A wrong argument that argparse cannot see."""


class Parser(argparse.ArgumentParser):
    """Reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def number(kind: type, accepted: str, valid: Callable[[Any], bool]) -> Callable[[str], Any]:
    """A type for argparse: a number with a rule, and the words that describe it."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if valid(value):
                return value
        raise argparse.ArgumentTypeError(f"expected {accepted}, got {text!r}")

    return parse


POSITIVE = number(int, "a whole number of at least 1", lambda value: value >= 1)
NATURAL = number(int, "a whole number of at least 0", lambda value: value >= 0)
THREADS = number(
    int,
    f"a whole number from 1 to {fastbn.runtime.MAX_THREADS}",
    lambda value: 1 <= value <= fastbn.runtime.MAX_THREADS,
)
RATE = number(float, "a number above 0", lambda value: 0 < value < math.inf)
SHARE = number(float, "a number of at least 0 and below 1", lambda value: 0 <= value < 1)
DECAY = number(float, "a number of at least 0", lambda value: 0 <= value < math.inf)


def output(text: str) -> Path:
    """A type for argparse: a file that can be written. Better to know before the training than after it."""
    path = Path(text)
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "is a directory")
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: {error.strerror}") from error


def picture(text: str) -> Path:
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"expected a name that ends in .png, got {text!r}")
    return output(text)
