"""What is measured: shapes from text files, cases, their data and their right results, and what each must move."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import fastbn
from fastbn import _core, reference

Array = npt.NDArray[Any]

SHAPES = Path(__file__).resolve().parent / "shapes"
OPS = ("forward", "inference", "backward")
LAYOUTS = ("nchw", "nhwc")
DTYPES = dict(_core.dtypes())  # code -> NumPy name
EPS = 1e-5
ALIGNMENT = 64
# How far a result may be from float64, relative to its largest values: it tells a wrong formula from a right one, for
# contenders of any accuracy. How exact fastbn is, its tests say.
TOLERANCE = {8: 1e-9, 4: 1e-3, 2: 5e-2}  # by bytes per value
CHUNK = 1 << 21  # values at a time in float64
LARGEST_TERM = 25.0  # of a sum over a channel: dy times normalized x, both normal
COMPARED = 1 << 17  # values compared at a time: in the cache


def activations() -> tuple[str, ...]:
    """Those of fastbn, and each after adding a residual."""
    names = fastbn.runtime.activations()
    return names + tuple(f"add+{name}" for name in names)


@dataclass(frozen=True)
class Shape:
    """One line of a shape file; `count` is how often the network has it."""

    network: str
    layer: str
    N: int
    C: int
    H: int
    W: int
    count: int

    @property
    def values(self) -> int:
        return self.N * self.C * self.H * self.W


@dataclass(frozen=True)
class Case:
    """One measurement; its name is, say, ``forward/nchw-f32-relu/t2/resnet50.bn2a``."""

    op: str
    layout: str
    dtype: str
    activation: str
    threads: int
    shape: Shape
    reader: bool = False  # whether the time is also that of somebody who reads the result once afterwards

    @property
    def work(self) -> str:
        return f"{self.op} then read" if self.reader else self.op

    @property
    def name(self) -> str:
        kind = f"{self.work.replace(' ', '-')}/{self.layout}-{self.dtype}-{self.activation}"
        return f"{kind}/t{self.threads}/{self.shape.network}.{self.shape.layer}"

    @property
    def function(self) -> str:
        """The activation without its residual."""
        return self.activation.removeprefix("add+")

    @property
    def residual(self) -> bool:
        return self.activation.startswith("add+")

    @property
    def axis(self) -> int:
        return 1 if self.layout == "nchw" else -1

    @property
    def interleaved(self) -> bool:
        """Channels are adjacent in memory, so a pass over all of x must end before the next can begin."""
        return self.shape.C > 1 and (self.layout == "nhwc" or self.shape.H * self.shape.W == 1)

    @property
    def nbytes(self) -> int:
        """Of x."""
        return self.shape.values * np_dtype(self.dtype).itemsize

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Case:
        return cls(**(record | {"shape": Shape(**record["shape"])}))


def np_dtype(code: str) -> np.dtype[Any]:
    name = DTYPES[code]
    if name == "bfloat16":
        import ml_dtypes

        wide: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return wide
    return np.dtype(name)


def read_shapes(network: str, folder: Path = SHAPES) -> list[Shape]:
    """The shapes of one file: ``name N C H W count`` per line, ``#`` begins a comment."""
    shapes = []
    for number, line in enumerate((folder / f"{network}.txt").read_text().splitlines(), 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) != 6 or not all(word.isdigit() and int(word) >= 1 for word in words[1:]):
            raise ValueError(f"{network}.txt, line {number}: expected `name N C H W count`, got {line!r}")
        shapes.append(Shape(network, words[0], *map(int, words[1:])))
    return shapes


def networks(folder: Path = SHAPES) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.txt"))


def cases_in_turns(
    shape: Shape,
    layouts: Sequence[str],
    ops: Sequence[str],
    dtypes: Sequence[str],
    activations: Sequence[str],
    threads: Sequence[int],
    readers: Sequence[bool] = (False,),
) -> Iterator[list[Case]]:
    """All combinations that exist (one value per channel has no training): each layout and operation with every dtype,
    activation and number of threads, without and with a reader, which take turns and so can be compared."""
    for layout, op in itertools.product(layouts, ops):
        if op == "inference" or shape.values > shape.C:
            kinds = itertools.product(dtypes, activations, threads, readers)
            yield [Case(op, layout, *kind, shape, reader) for *kind, reader in kinds]


def limit_passes(case: Case) -> list[str]:
    """The flat passes over memory that the operation needs at least: kernels of limit.c, one after the other.

    Channel by channel, the second reading of x finds it in the cache: one read, one write. Where channels are adjacent
    in memory a pass over all of x comes first.
    """
    last = {False: "copy", True: "read2_write1"}[case.residual]
    if case.op == "inference":
        return [last]
    if case.op == "forward":
        return ["read", last] if case.interleaved else [last]
    last = {False: "read2_write1", True: "read2_write2"}[case.residual]
    return ["read2", last] if case.interleaved else [last]


TENSORS = {"read": 1, "read2": 2, "copy": 2, "read2_write1": 3, "read2_write2": 4}


def moved_bytes(case: Case) -> int:
    """Bytes that the limit reads and writes, and a reader: what GB/s counts."""
    return case.nbytes * (sum(TENSORS[name] for name in limit_passes(case)) + case.reader)


# ---- data ------------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """Arrays of one case, in its layout. `mean` and `var` are of the batch, or the running ones for inference; `y` is
    the right output of forward (from which backward can tell where the activation passes)."""

    x: Array
    gamma: Array
    beta: Array
    mean: Array
    var: Array
    dy: Array | None = None
    residual: Array | None = None
    y: Array | None = None


def aligned(shape: tuple[int, ...], dtype: Any, offset: int = 0) -> Array:
    """Memory that starts `offset` bytes behind a multiple of ALIGNMENT, written, so that it exists."""
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape)) * dtype.itemsize
    # Of its own, for what malloc has from before is not placed anew; private, for shared memory has no huge pages.
    pages = mmap.mmap(-1, nbytes + 2 * ALIGNMENT, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # as NumPy does
        pages.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(pages, np.uint8)
    memory.fill(1)
    start = -memory.ctypes.data % ALIGNMENT + offset
    values: Array = memory[start : start + nbytes].view(dtype).reshape(shape)
    return values


def aligned_copy(values: Array, offset: int = 0) -> Array:
    result = aligned(values.shape, values.dtype, offset)
    result[...] = values
    return result


def aligned_like(values: Array, offset: int = 0) -> Array:
    return aligned(values.shape, values.dtype, offset)


def make_inputs(shape: Shape, dtype: str, ops: Sequence[str], activation: str) -> dict[str, Array]:
    """Random x, and dy and residual where they are used, in (N, C, H, W), and parameters, the same for every op and
    layout."""
    rng = np.random.default_rng(0)
    full = (shape.N, shape.C, shape.H, shape.W)
    target = np_dtype(dtype)
    parameter = target if target.itemsize >= 4 else np.dtype(np.float32)

    def vector(low: float, high: float) -> Array:
        return rng.uniform(low, high, shape.C).astype(parameter)

    arrays: dict[str, Array] = {
        "gamma": vector(0.5, 1.5),
        "beta": vector(-1, 1),
        "running_mean": vector(-1, 1),
        "running_var": vector(0.5, 2),
    }
    offset = vector(-1, 1).astype(target).reshape(1, -1, 1, 1)
    for name, used in (("x", True), ("dy", "backward" in ops), ("residual", activation.startswith("add+"))):
        if used:
            arrays[name] = rng.standard_normal(full, np.float32).astype(target, copy=False)
    arrays["x"] += offset
    return arrays


def right_results(inputs: dict[str, Array], op: str, activation: str) -> dict[str, Array]:
    """What the op must return, by fastbn.reference, some channels at a time; and mean, var and y for backward."""
    x = inputs["x"]
    per_channel = x.size // x.shape[1]
    step = max(1, CHUNK // max(per_channel, 1))
    results: dict[str, Array] = {"y": np.empty_like(x)}
    vectors: dict[str, list[Array]] = {name: [] for name in ("mean", "var", "dgamma", "dbeta")}
    if op == "backward":
        results["dx"] = np.empty_like(x)
        if activation.startswith("add+"):
            results["dresidual"] = np.empty_like(x)
    for first in range(0, x.shape[1], step):
        part = slice(first, first + step)
        options: dict[str, Any] = {"eps": EPS, "activation": activation.removeprefix("add+")}
        if op == "inference":
            running = {name: inputs[name][part].copy() for name in ("running_mean", "running_var")}
            options |= running | {"training": False}
        if activation.startswith("add+"):
            options["residual"] = inputs["residual"][:, part]
        y, cache = reference.batchnorm_forward(x[:, part], inputs["gamma"][part], inputs["beta"][part], **options)
        results["y"][:, part] = y
        vectors["mean"].append(cache.mean)
        vectors["var"].append(cache.rstd**-2.0 - EPS)
        if op == "backward":
            gradients = reference.batchnorm_backward(inputs["dy"][:, part], cache)
            results["dx"][:, part] = gradients.dx
            if "dresidual" in results and gradients.dresidual is not None:
                results["dresidual"][:, part] = gradients.dresidual
            for name, gradient in (("dgamma", gradients.dgamma), ("dbeta", gradients.dbeta)):
                assert gradient is not None
                vectors[name].append(gradient)
    return results | {name: np.concatenate(parts) for name, parts in vectors.items() if parts}


def right_results_of(inputs: dict[str, Array], ops: Sequence[str], activation: str) -> dict[str, dict[str, Array]]:
    """Those of each op; forward and backward have the same ones."""
    results = {}
    training = [op for op in ops if op != "inference"]
    if training:
        both = right_results(inputs, "backward" if "backward" in training else "forward", activation)
        results |= dict.fromkeys(training, both)
    if "inference" in ops:
        results["inference"] = right_results(inputs, "inference", activation)
    return results


def expected_names(case: Case) -> list[str]:
    """Which of `right_results` a contender returns, in this order."""
    if case.op != "backward":
        return ["y"]
    return ["dx", "dgamma", "dbeta"] + (["dresidual"] if case.residual else [])


def difference(name: str, actual: Array, expected: Array, case: Case, scale: float) -> str | None:
    """None if right, else what is wrong. Where an activation has its kink, a rounding decides: a few values may differ
    there, and sums over a channel by the terms of one. `scale` is the size of large values."""
    if actual.shape != expected.shape:
        return f"{name} has shape {actual.shape}, expected {expected.shape}"
    flat, wanted = actual.reshape(-1), expected.reshape(-1)
    of_channels = name in ("dgamma", "dbeta")
    tolerance = TOLERANCE[np_dtype(case.dtype).itemsize] * scale
    if of_channels and case.function != "identity":
        tolerance += LARGEST_TERM
    kind = np.float64 if case.dtype == "f64" else np.float32
    largest, wrong = 0.0, 0
    for first in range(0, flat.size, COMPARED):
        part = slice(first, first + COMPARED)
        error = np.abs(flat[part].astype(kind, copy=False) - wanted[part].astype(kind, copy=False))
        part_largest = float(error.max())
        if not part_largest <= tolerance:  # NaN, too
            wrong += int((~(error <= tolerance)).sum())
            largest = max(largest, part_largest)
    allowed = 0 if case.function == "identity" or of_channels else 2 + flat.size // 1_000_000
    return f"{name} is wrong at {wrong} values, by up to {largest:.3g}" if wrong > allowed else None
