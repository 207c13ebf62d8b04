"""Conversion of PyTorch tensors to NumPy arrays, and which tensors are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from spvit_jax.errors import InputError, shown

StateDict = dict[str, np.ndarray]

# Integers and booleans are counters and indices here; as weights `to_ours` refuses them.
_DTYPES = (
    *("float16", "bfloat16", "float32", "float64", "bool"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
)


def as_arrays(tensors: Mapping[str, Any], where: object = "the state dict") -> StateDict:
    """Returns PyTorch tensors, or arrays, as NumPy arrays; half precision becomes float32.

    Args:
      tensors: tensors by name.
      where: name of their file in error messages.

    Raises:
      InputError: some tensors are quantized, sparse, complex or without values; raised before
        anything is allocated.
    """
    problems = [
        f"{shown(name)} {problem}" for name, v in tensors.items() if (problem := _unsupported(v))
    ]
    if problems:
        rest = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(
            f"{where} has tensors that cannot be read: {', '.join(problems[:3])}{rest}; expected "
            "dense tensors of float32, float64, float16 or bfloat16: save it again as such"
        )
    return {name: _as_array(value) for name, value in tensors.items()}


def _unsupported(value: Any) -> str | None:
    """Returns why a tensor cannot be converted, or None if it can."""
    dtype = str(value.dtype).removeprefix("torch.")
    if hasattr(value, "untyped_storage"):
        if value.is_meta:
            return "on the meta device, without values"
        if value.is_quantized:
            return f"quantized ({dtype})"
        if value.is_nested or str(value.layout) != "torch.strided":
            return str(value.layout).removeprefix("torch.")
        # A view can repeat its storage, so that a few bytes would become terabytes.
        stored = value.untyped_storage().nbytes() // value.itemsize
        if stored < value.numel():
            return f"{'×'.join(map(str, value.shape))}, of which {stored} numbers are stored"
    return None if dtype in _DTYPES else dtype


def _as_array(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu().resolve_neg()
        if value.is_floating_point() and value.itemsize < 4:
            value = value.float()
        value = value.numpy()
    array = np.asarray(value)
    is_half = array.dtype.itemsize < 4 and array.dtype.kind not in "iub"
    return array.astype(np.float32) if is_half else array
