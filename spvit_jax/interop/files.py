"""Files of weights: PyTorch's `.pth` and `.pth.tar`, `.safetensors`, and folders of them.

A file's format is told by its first bytes, not by its name. Nothing in a file is ever executed.
"""

from __future__ import annotations

import json
import logging
import os
import pathlib
import stat
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from spvit_jax import atomic, paths
from spvit_jax.errors import InputError, first_line, shown
from spvit_jax.interop import pickles
from spvit_jax.interop.containers import unwrap
from spvit_jax.interop.pickles import import_torch
from spvit_jax.interop.tensors import StateDict, as_arrays

log = logging.getLogger("spvit_jax")

_NOTE = "spvit_jax"  # key of the model's description in files written here
SUFFIXES = (".pth", ".pt", ".tar", ".safetensors")
# Files of weights in a folder of a model hub; the first that exists is read.
IN_FOLDER = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "model.bin"),
)


class Contents(NamedTuple):
    """Contents of a file of weights.

    Attributes:
      state_dict: arrays under PyTorch's names, without wrappers' prefixes.
      note: description of the model, as passed to `write`; None in files of other programs.
      is_average: whether these weights are a moving average.
      has_average: whether the file holds a moving average, taken or not.
    """

    state_dict: StateDict
    note: dict[str, Any] | None
    is_average: bool
    has_average: bool


def is_file_of_weights(path: epath.Path) -> bool:
    """Returns whether a path is a file or folder of weights that `read` reads, no checkpoint."""
    if path.is_dir():
        return _in_folder(path) is not None
    return path.exists() or path.suffix in SUFFIXES


def read(path: epath.Path, *, weights: str = "auto") -> Contents:
    """Reads a file of weights without executing anything in it, and logs what was left out.

    Args:
      path: a file of `torch.save` or safetensors, the index of one that is split into several, or
        a folder with `model.safetensors`, `pytorch_model.bin` or `model.bin` or their index.
      weights: "model" for the weights themselves, "ema" for their moving average, or "auto" for
        the average where there is one.

    Raises:
      InputError: the file cannot be read, or does not hold weights.
    """
    file = (_in_folder(path) or path) if path.is_dir() else path
    content, note = _content(file)
    unwrapped = unwrap(content, file, weights=weights)
    if unwrapped.changes:
        log.warning("note: %s: %s", file, "; ".join(unwrapped.changes))
    return Contents(
        as_arrays(unwrapped.tensors, file),
        note if isinstance(note, dict) else None,
        unwrapped.is_average,
        unwrapped.has_average,
    )


def read_array(path: epath.Path) -> np.ndarray:
    """Reads a `.pt` file that holds a single tensor.

    Raises:
      InputError: the file cannot be read, or does not hold a tensor.
    """
    content = pickles.read(path)
    if not import_torch().is_tensor(content):
        raise InputError(f"{path} holds {type(content).__name__}; expected a tensor")
    return content.numpy()


def write(path: epath.Path, state_dict: StateDict, note: dict[str, Any]) -> None:
    """Writes a state dict to a file; a `.pth` file holds it under `state_dict`.

    Args:
      path: a new file, `.safetensors`, `.pth` or `.pth.tar`.
      state_dict: arrays by name.
      note: description of the model, of values that JSON can hold.

    Raises:
      InputError: the file exists, has another suffix, or cannot be written.
    """
    check_name(path)
    torch = None if path.suffix == ".safetensors" else import_torch()
    try:
        with atomic.replacing(path) as temporary:
            if torch is None:
                metadata = {"format": "pt", _NOTE: json.dumps(note)}
                safetensors.numpy.save_file(state_dict, temporary, metadata=metadata)
            else:
                tensors = {name: torch.from_numpy(array) for name, array in state_dict.items()}
                torch.save({"state_dict": tensors, _NOTE: note}, temporary)
    # On a full disk torch and safetensors raise errors of their own.
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise InputError(f"cannot write {path}: {first_line(error)}") from error


def check_name(path: epath.Path) -> None:
    """Raises an `InputError` if a path exists or has no suffix of a file of weights."""
    if path.suffix not in SUFFIXES:
        raise InputError(f"cannot write {path}: expected a name that ends in .safetensors or .pth")
    if path.exists():
        raise InputError(f"{path} exists; choose another --output or remove it")


def _in_folder(path: epath.Path) -> epath.Path | None:
    return next((path / name for name in IN_FOLDER if (path / name).is_file()), None)


def _content(path: epath.Path, *, may_be_index: bool = True) -> tuple[Mapping[Any, Any], Any]:
    """Returns the unprocessed contents of a file of weights, and the note in it."""
    start = _start_of(path)
    is_torch = start.startswith((b"PK", b"\x80"))  # a zip archive or, formerly, a bare pickle
    if _starts_safetensors(start) or (path.suffix == ".safetensors" and not is_torch):
        return _read_safetensors(path)
    if start.startswith(b"{") and may_be_index:
        return _read_shards(path), None
    content = pickles.read(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {type(content).__name__}; expected a dictionary of tensors")
    return content, content.get(_NOTE)


def _start_of(path: epath.Path) -> bytes:
    """Returns the first bytes of a file.

    Raises:
      InputError: the file cannot be read, or is a web page or a pointer of Git LFS.
    """
    try:
        # Opening a pipe would block until somebody writes into it.
        if not paths.is_remote(path) and not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"{path} is a pipe, a device or a folder; expected a file of weights")
        with paths.reached(), path.open("rb") as file:
            start = file.read(256)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or first_line(error)}") from error
    if not _starts_safetensors(start):
        if start.lstrip().startswith(b"<"):
            raise InputError(f"{path} is a web page, not weights; download the file itself")
        if start.startswith(b"version https://git-lfs"):
            raise InputError(f"{path} stands for a file that Git LFS has; fetch it: git lfs pull")
    return start


def _starts_safetensors(start: bytes) -> bool:
    """Returns whether the first bytes of a file are a safetensors header: its length and JSON."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32


def _read_safetensors(path: epath.Path) -> tuple[StateDict, Any]:
    try:
        with paths.local_copy(path) as local, safetensors.safe_open(local, framework="np") as file:
            note = (file.metadata() or {}).get(_NOTE)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, note and json.loads(note)
    except AttributeError as error:  # safetensors looks the type up in NumPy
        raise InputError(
            f"{path} has tensors that cannot be read ({error}); expected float32, float64, float16 "
            "or bfloat16: save it again as such"
        ) from error
    except Exception as error:  # whatever a damaged file makes raise
        raise InputError(
            f"{path} is damaged or not a safetensors file: {shown(error, 200)}"
        ) from error


def _read_shards(path: epath.Path) -> dict[str, Any]:
    """Reads the shards that an index lists, such as `model.safetensors.index.json`."""
    try:
        index = json.loads(path.read_bytes())["weight_map"]
        files = {name: set[str]() for name in sorted(set(index.values()))}
        for name, file in index.items():
            files[file].add(name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path} is no index of weights: expected a weight_map from names to files"
        ) from error
    content: dict[str, Any] = {}
    for file, names in files.items():
        if pathlib.PurePath(file).name != file:
            raise InputError(f"{path} names {shown(file)}; expected a file in the same folder")
        shard, _ = _content(path.with_name(file), may_be_index=False)
        if missing := sorted(names - shard.keys()):
            raise InputError(
                f"{path.with_name(file)} lacks {shown(missing[0])} and "
                f"{len(missing) - 1} more that {path.name} says are in it"
            )
        content |= {name: shard[name] for name in names}
    return content
