"""Files of weights: `.pth` and `.pth.tar` of PyTorch, and `.safetensors`.

Nothing in a file is ever executed: PyTorch's files are pickles, and are read with an allow-list.
PyTorch is imported only here, and only when such a file is read or written.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from spvit_jax import atomic
from spvit_jax.errors import InputError, first_line

_WEIGHTS = ("state_dict", "model")
_AVERAGES = ("state_dict_ema", "model_ema")
# How torch names what it refuses to run.
_REFUSED = re.compile(r"unsupported (?:global: )?(?:global|class) ([\w.]+)", re.IGNORECASE)
_NOTE = "spvit_jax"  # under which a file written here says what model it is of
SUFFIXES = (".pth", ".pt", ".tar", ".safetensors")

StateDict = dict[str, np.ndarray]


def is_file_of_weights(path: pathlib.Path) -> bool:
    """Returns whether a path names a file such as are read here, rather than a checkpoint."""
    return path.is_file() or (path.suffix in SUFFIXES and not path.is_dir())


class Contents(NamedTuple):
    """What a file of weights holds.

    Attributes:
      state_dict: as `as_arrays` returns it.
      note: what `write` was told to note; None in other people's files.
      is_average: whether these weights are a moving average.
      has_average: whether the file holds one, taken or not.
    """

    state_dict: StateDict
    note: dict[str, Any] | None
    is_average: bool
    has_average: bool


def read(path: pathlib.Path, *, weights: str = "auto") -> Contents:
    """Reads a file of weights without executing anything in it.

    Args:
      path: `.pth`, `.pth.tar` or `.safetensors`.
      weights: "model" for the weights themselves, "ema" for their moving average, or "auto" for
        the average where there is one.

    Raises:
      InputError: the file cannot be read, or holds something else than weights.
    """
    try:
        with path.open("rb") as file:
            start = file.read(256)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if start.lstrip().startswith(b"<"):
        raise InputError(f"{path} is a web page, not weights; download the file itself")
    if path.suffix == ".safetensors":
        if weights == "ema":
            raise InputError(f"{path} has no moving average; leave out --weights=ema")
        state_dict, note = _read_safetensors(path)
        is_average = has_average = False
    else:
        content = _read_pickle(path)
        state_dict, is_average, has_average = _choose(content, path, weights)
        note = content.get(_NOTE)
    return Contents(state_dict, note if isinstance(note, dict) else None, is_average, has_average)


def as_arrays(state_dict: Mapping[str, Any]) -> StateDict:
    """Returns a state dict of PyTorch tensors, or of arrays, as one of NumPy arrays.

    Names lose the `module.` that data-parallel training puts before them, and half precision
    becomes single.
    """
    return {name.removeprefix("module."): _as_array(value) for name, value in state_dict.items()}


def read_array(path: pathlib.Path) -> np.ndarray:
    """Reads a `.pt` file that holds a single tensor.

    Raises:
      InputError: it cannot be read, or holds something else.
    """
    content = _unpickle(path)
    if not _torch().is_tensor(content):
        raise InputError(f"{path} holds {type(content).__name__}; expected a tensor")
    return content.numpy()


def write(path: pathlib.Path, state_dict: StateDict, note: dict[str, Any]) -> None:
    """Writes a state dict; a `.pth` file holds it under `state_dict`.

    Args:
      path: `.safetensors`, `.pth` or `.pth.tar`; must not exist yet.
      state_dict: the arrays.
      note: what the file says about its model, as JSON can hold it.

    Raises:
      InputError: the file exists, has another suffix, or cannot be written.
    """
    check_name(path)
    torch = None if path.suffix == ".safetensors" else _torch()
    try:
        with atomic.writing(path) as temporary:
            if torch is None:
                metadata = {"format": "pt", _NOTE: json.dumps(note)}
                safetensors.numpy.save_file(state_dict, temporary, metadata=metadata)
            else:
                tensors = {name: torch.from_numpy(array) for name, array in state_dict.items()}
                torch.save({"state_dict": tensors, _NOTE: note}, temporary)
    # Of a full disk torch and safetensors say so with errors of their own.
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise InputError(f"cannot write {path}: {first_line(error)}") from error


def check_name(path: pathlib.Path) -> None:
    """Raises an `InputError` if no file of weights can be written under this name."""
    if path.suffix not in SUFFIXES:
        raise InputError(f"cannot write {path}: expected a name that ends in .safetensors or .pth")
    if path.exists():
        raise InputError(f"{path} exists; choose another --output or remove it")


def _read_safetensors(path: pathlib.Path) -> tuple[StateDict, dict[str, Any] | None]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            note = (file.metadata() or {}).get(_NOTE)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return as_arrays(tensors), note and json.loads(note)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is damaged or not a safetensors file: {error}") from error


def _read_pickle(path: pathlib.Path) -> dict[str, Any]:
    content = _unpickle(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {type(content).__name__}; expected a dictionary of tensors")
    return content


def _unpickle(path: pathlib.Path) -> Any:
    torch = _torch()
    try:
        # The authors saved their command line beside the weights; it is data.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes torch raise
        if match := _REFUSED.search(str(error)):
            raise InputError(
                f"{path} is refused: it asks for {match[1]} to be run, and weights have no need "
                "of that. If you trust where it is from, save its tensors alone"
            ) from error
        raise InputError(
            f"{path} is damaged or not a file of PyTorch weights; nothing in it was run"
        ) from error


def _choose(
    content: dict[str, Any], path: pathlib.Path, weights: str
) -> tuple[StateDict, bool, bool]:
    """Returns a state dict of what training saved, and whether it and any other is an average."""
    torch = _torch()
    averages = [key for key in _AVERAGES if key in content]
    plain = [key for key in _WEIGHTS if isinstance(content.get(key), dict)]
    known = ", ".join(map(str, list(content)[:6])) or "nothing"
    if weights == "ema" and not averages:
        raise InputError(f"{path} has no moving average (it has {known}); leave out --weights=ema")
    if weights == "model" and averages and not plain:
        raise InputError(f"{path} has nothing but a moving average; leave out --weights=model")
    is_average = bool(averages) and weights != "model"
    keys = averages if is_average else plain
    chosen = content[keys[0]] if keys else content
    tensors = {k: v for k, v in chosen.items() if isinstance(k, str) and torch.is_tensor(v)}
    if not tensors:
        raise InputError(
            f"{path} has no weights: expected tensors, or a dictionary of them under one of "
            f"{', '.join(_WEIGHTS + _AVERAGES)}; it has {known}"
        )
    return as_arrays(tensors), is_average, bool(averages)


def _as_array(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (
            value.float() if value.is_floating_point() and value.itemsize < 4 else value
        ).numpy()
    array = np.asarray(value)
    is_half = array.dtype.itemsize < 4 and array.dtype.kind not in "iub"
    return array.astype(np.float32) if is_half else array


def _torch() -> ModuleType:
    try:
        import torch
    except ImportError as error:
        raise InputError(
            "files of PyTorch are read and written with PyTorch, which is not installed: "
            "pip install torch==2.13.0, or use a .safetensors file"
        ) from error
    return torch
