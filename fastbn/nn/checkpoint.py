"""Checkpoints: one safetensors file with everything that resuming needs to give the numbers of not stopping."""

from __future__ import annotations

import glob
import json
import os
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastbn.nn.layers import LayerLike, State, walk
from fastbn.nn.optim import Optimizer

VERSION = 2


class CheckpointError(ValueError):
    """A file that is no checkpoint, is damaged, or belongs to another model."""


@dataclass
class Checkpoint:
    """What was in a file: `tensors` named ``model.<key>`` and ``optimizer.<key>``, and the rest as in `save`."""

    path: Path
    tensors: State
    rng_states: list[dict[str, Any]]
    history: list[dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)

    def restore(self, model: LayerLike, optimizer: Optimizer, rng: np.random.Generator) -> None:
        """Put the state back, all of it; CheckpointError if it does not fit."""
        of_model, of_optimizer = model.state_dict(), optimizer.state_dict()
        of_generators = [generator.bit_generator.state for generator in generators(model, rng)]
        try:
            for prefix, owner in (("model.", model), ("optimizer.", optimizer)):
                owner.load_state_dict(
                    {name.removeprefix(prefix): x for name, x in self.tensors.items() if name.startswith(prefix)}
                )
            for generator, state in zip(generators(model, rng), self.rng_states, strict=True):
                generator.bit_generator.state = state
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            model.load_state_dict(of_model)
            optimizer.load_state_dict(of_optimizer)
            for generator, before in zip(generators(model, rng), of_generators, strict=True):
                generator.bit_generator.state = before
            raise CheckpointError(f"{self.path}: does not fit this model: {error}") from error


def generators(model: LayerLike, rng: np.random.Generator) -> list[np.random.Generator]:
    """All that decide random numbers of the training: that of the loop, and those of layers such as dropout."""
    return [rng, *(layer.rng for layer in walk(model) if hasattr(layer, "rng"))]


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file so that `path` holds the old content or the new one whatever happens, never a part."""
    path = Path(path).resolve()  # a link stays a link
    remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same directory: os.replace needs one file system
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """What writers of this file left that were killed: each has the number of its process in its name."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError, ValueError, OverflowError):
            try:
                os.kill(int(leftover.name.split(".")[-2]), 0)  # sends nothing
            except ProcessLookupError:
                leftover.unlink()


def checksum(tensors: State, text: str) -> int:
    crc = zlib.crc32(text.encode())
    for name, x in sorted(tensors.items()):
        crc = zlib.crc32(x.tobytes(), zlib.crc32(f"{name} {x.dtype} {x.shape}".encode(), crc))
    return crc


def save(
    path: str | os.PathLike[str],
    model: LayerLike,
    optimizer: Optimizer,
    rng: np.random.Generator,
    history: list[dict[str, Any]],
    config: dict[str, Any] | None = None,
) -> None:
    """Write parameters, running statistics, optimizer, random state, finished epochs and the caller's `config`."""
    from safetensors.numpy import save as to_bytes

    tensors = {f"model.{name}": np.asarray(x) for name, x in model.state_dict().items()}
    tensors |= {f"optimizer.{name}": x for name, x in optimizer.state_dict().items()}
    states = [generator.bit_generator.state for generator in generators(model, rng)]
    content = {"version": VERSION, "rng_states": states, "history": history, "config": config or {}}
    text = json.dumps(content, default=np.ndarray.tolist)  # of some generators, a state is an array
    # safetensors finds a file that is too short or too long, but not a flipped bit.
    metadata = {"fastbn": text, "crc32": str(checksum(tensors, text))}
    write_atomically(path, to_bytes(tensors, metadata))


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint; CheckpointError, with one line that names the file and the reason, if that is not possible."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.exists() and not path.is_file():  # to open a pipe would wait for a writer
        raise CheckpointError(f"{path}: cannot be read: not a regular file")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged, or not a safetensors file ({error})") from error
    except (AttributeError, TypeError) as error:  # of NumPy, about the dtype of a tensor
        raise CheckpointError(f"{path}: not a checkpoint of fastbn ({error})") from error
    text = metadata.get("fastbn")
    if text is None:
        raise CheckpointError(f"{path}: a safetensors file, but not a checkpoint of fastbn")
    if metadata.get("crc32") != str(checksum(tensors, text)):
        raise CheckpointError(f"{path}: damaged (wrong checksum)")
    try:
        content = json.loads(text)
        version = content.pop("version")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of fastbn ({error})") from error
    if version != VERSION:
        raise CheckpointError(f"{path}: written by another version of fastbn")
    kinds = {"rng_states": list, "history": list, "config": dict}
    if {name: type(value) for name, value in content.items()} != kinds or not all(
        isinstance(entry, dict) for entry in content["rng_states"] + content["history"]
    ):
        raise CheckpointError(f"{path}: not a checkpoint of fastbn (its parts are not those of one)")
    return Checkpoint(path, tensors, **content)
