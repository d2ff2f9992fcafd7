"""The signature that all contenders share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from cases import Array, Case, Data

Call = Callable[[], Any]


class UnsupportedError(Exception):
    """This contender cannot do this case; the message says why."""


class Contender:
    """One way of computing batch normalization. The methods `forward` (training: running statistics are updated),
    `inference` and `backward` prepare a case and return the call to be timed, which returns y, or dx, dgamma, dbeta and
    perhaps dresidual.

    Attributes
    ----------
    buffers : dict of str to int
        For each op the tensors of the size of x that a case without residual keeps alive, temporaries included; to see
        whether memory suffices.
    dtypes, functions, residual
        What it can do: dtype codes, activations, and whether it adds a residual before them.
    can_be_read
        Whether somebody can read its result next (`limit.read_after`): it has no threads that would be in the way.
    """

    buffers: ClassVar[dict[str, int]] = {"forward": 3, "inference": 3, "backward": 5}
    dtypes: tuple[str, ...] = ("f32", "f64")
    functions: tuple[str, ...] = ("identity", "relu")
    residual = True
    can_be_read = False
    verified = True  # False: nothing is computed, there is no result to check

    def __init__(self, threads: int, offset: int) -> None:
        self.threads = threads
        self.offset = offset
        self.load()

    def load(self) -> None:
        """Import what is needed; ImportError says what is missing."""

    def versions(self) -> dict[str, str]:
        return {"numpy": np.__version__}

    def prepare(self, case: Case, data: Data) -> Call:
        if case.dtype not in self.dtypes:
            raise UnsupportedError(f"no {case.dtype}")
        if case.function not in self.functions or (case.residual and not self.residual):
            raise UnsupportedError(f"no {case.activation}")
        call: Call = getattr(self, case.op)(case, data)
        return call

    def forward(self, case: Case, data: Data) -> Call:
        raise UnsupportedError("no forward in training")

    def inference(self, case: Case, data: Data) -> Call:
        raise UnsupportedError("no inference")

    def backward(self, case: Case, data: Data) -> Call:
        raise UnsupportedError("no backward")

    def arrays(self, returned: Any, case: Case) -> list[Array]:
        """What a call has returned as NumPy arrays, tensors in the axes of the case."""
        return list(returned) if isinstance(returned, (tuple, list)) else [returned]

    def release(self) -> None:
        """Forget the case."""
