"""Weights inside of training checkpoints: nested dictionaries, prefixes of names, counters.

A new format of checkpoints is one more entry in these tables.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from spvit_jax.errors import InputError, shown

# The keys under which training scripts save weights, and whether these are a moving average.
CONTAINERS = {
    "state_dict": False,
    "model_state_dict": False,
    "model": False,
    "net": False,
    "module": False,
    "state_dict_ema": True,
    "model_ema": True,
    "ema": True,
    "teacher": True,  # of self-distillation, where it is the student's average
}
# Prefixes of names from data-parallel training, torch.compile, or a larger module.
# torch.compile of a submodule puts its own in the middle of the names.
_PREFIXES = ("module", "_orig_mod", "model", "net", "backbone")
_WRAPPER = re.compile(rf"^(?:(?:{'|'.join(_PREFIXES)})\.)+|(?<=\.)_orig_mod\.")
# `torch.optim.swa_utils.AveragedModel` saves the number of updates beside the average.
_COUNTER = "n_averaged"
_MAX_DEPTH = 4  # of nested containers; a pickle may contain itself


class Unwrapped(NamedTuple):
    """One set of weights taken out of a training checkpoint.

    Attributes:
      tensors: PyTorch tensors or arrays, under names without prefixes.
      is_average: whether these weights are a moving average.
      has_average: whether the checkpoint holds a moving average, taken or not.
      changes: descriptions of what was taken or removed, for the log.
    """

    tensors: dict[str, Any]
    is_average: bool
    has_average: bool
    changes: list[str]


class _WeightSet(NamedTuple):
    keys: tuple[str, ...]  # of the nested containers around the tensors
    is_average: bool
    tensors: dict[str, Any]


def unwrap(content: Mapping[Any, Any], where: object, *, weights: str = "auto") -> Unwrapped:
    """Returns the weights that a training checkpoint holds.

    Args:
      content: a state dict, or nested dictionaries around one or several.
      where: name of the checkpoint in error messages.
      weights: "model" for the weights themselves, "ema" for their moving average, or "auto" for
        the average where there is one.

    Raises:
      InputError: the checkpoint has no weights, several sets of them, or not those asked for.
    """
    found = list(_weight_sets(content))
    averages = [candidate for candidate in found if candidate.is_average]
    plain = [candidate for candidate in found if not candidate.is_average]
    known = ", ".join(shown(key) for key in list(content)[:6]) or "nothing"
    if not found:
        raise InputError(
            f"{where} has no weights: expected tensors, or a dictionary of them under one of "
            f"{', '.join(CONTAINERS)}; it has {known}"
        )
    if weights == "ema" and not averages:
        raise InputError(f"{where} has no moving average (it has {known}); leave out --weights=ema")
    if weights == "model" and not plain:
        raise InputError(f"{where} has nothing but a moving average; leave out --weights=model")
    candidates = plain if weights == "model" or not averages else averages
    if len(candidates) > 1:
        several = ", ".join(".".join(candidate.keys) for candidate in candidates)
        raise InputError(f"{where} holds several sets of weights: {several}; keep one of them")
    chosen = candidates[0]
    changes = [f"took {'.'.join(chosen.keys)}"] if chosen.keys else []
    tensors, renamed = _without_prefixes(chosen.tensors, where)
    return Unwrapped(tensors, chosen.is_average, bool(averages), changes + renamed)


def is_tensor(value: object) -> bool:
    """Returns whether a value is a PyTorch tensor or an array."""
    return hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, np.generic)


def _weight_sets(
    content: Mapping[Any, Any], keys: tuple[str, ...] = (), is_average: bool = False
) -> Iterator[_WeightSet]:
    """Yields the innermost dictionaries of tensors in nested containers."""
    nested = [
        weight_set
        for key, holds_average in CONTAINERS.items()
        if isinstance(content.get(key), Mapping) and len(keys) < _MAX_DEPTH
        for weight_set in _weight_sets(content[key], (*keys, key), is_average or holds_average)
    ]
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and is_tensor(v)}
    if nested:
        yield from nested
    elif tensors:
        yield _WeightSet(keys, is_average or _COUNTER in tensors, tensors)


def _without_prefixes(
    tensors: Mapping[str, Any], where: object
) -> tuple[dict[str, Any], list[str]]:
    """Returns tensors without wrappers' prefixes and counters, and what was removed, in words."""
    given = [name for name in tensors if name != _COUNTER]
    bare = {name: _WRAPPER.sub("", name) for name in given}
    if len(set(bare.values())) < len(bare):
        name = next(name for name, count in Counter(bare.values()).items() if count > 1)
        both = " and ".join(shown(long) for long, short in bare.items() if short == name)
        raise InputError(f"{where} holds several sets of weights: {both}; keep one of them")
    removed = dict.fromkeys(part for name in given for part in _WRAPPER.findall(name))
    changes = [f"took {', '.join(removed)} off the names"] if removed else []
    if len(given) < len(tensors):
        changes.append(f"left out {_COUNTER}")
    return {short: tensors[name] for name, short in bare.items()}, changes
