"""Types and ranges of the fields of a model's configuration.

Values from Python, the command line, a checkpoint or a foreign file all go through `check_fields`.
"""

from __future__ import annotations

import math
import re
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from spvit_jax.errors import InputError

# Smallest and largest value of each number, also where a field holds several. Far beyond what
# anybody trains: damaged settings fail here rather than by a shape or a loss that is no number.
_RANGES: Mapping[str, tuple[float, float]] = {
    "image_size": (1, 2**14),
    "num_classes": (1, 10**7),
    "patch_size": (1, 2**10),
    "dim": (1, 2**16),
    "num_heads": (1, 2**10),
    "mlp_ratio": (0, 100),
    "norm_eps": (1e-12, 1),
    "mask_radius": (0, 2**14),
    "depth": (1, 1000),
    "depths": (1, 1000),
    "class_layers": (1, 1000),
    "window": (1, 2**14),
    "stem_width": (0, 2**14),
    "skip_lam": (1e-3, 1e3),
    "layer_scale": (0, 100),
    "prior_extent": (1, 2**14),
}
_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    types.NoneType: "None",
}


def check_fields(config: Any) -> None:
    """Checks the fields of a configuration against their types and ranges.

    Args:
      config: dataclass, whose annotations are the types.

    Raises:
      InputError: a field has a value of another type, no finite number, or one out of its range.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not _is_a(value, hint):
            raise InputError(f"{name} is {reprlib.repr(value)}; expected {_describe(hint)}")
        numbers = value if isinstance(value, tuple) else (value,)
        least, most = _RANGES.get(name, (-math.inf, math.inf))
        if not all(least <= item <= most for item in numbers if isinstance(item, int | float)):
            raise InputError(
                f"{name} is {reprlib.repr(value)}; expected {_describe(hint)} of at least "
                f"{least:g} and at most {most:g}"
            )


def read_field(name: str, value: Any) -> Any:
    """Returns the value of a configuration's field, converted to its Python type.

    Lists, which JSON has in the place of tuples, become tuples, NumPy's numbers Python's, and an
    image size such as "160x256" its numbers.

    Raises:
      InputError: an image size cannot be read.
    """
    if name == "image_size" and isinstance(value, str):
        return read_image_size(value)
    if isinstance(value, list | tuple):
        return tuple(read_field("", item) for item in value)
    return value.item() if isinstance(value, np.generic) else value


def read_image_size(text: str) -> int | tuple[int, int]:
    """Returns the image size that a text gives: "384" pixels, or "160x256" (height and width).

    Raises:
      InputError: the text cannot be read.
    """
    match = re.fullmatch(r"(\d{1,6})(?:[x×,](\d{1,6}))?", text)
    if match is None:
        raise InputError(
            f"image_size is {reprlib.repr(text)}; expected pixels such as 384, or 320x480 "
            "(height and width)"
        )
    height, width = match.groups()
    return (int(height), int(width)) if width else int(height)


def _is_a(value: Any, hint: Any) -> bool:
    """Returns whether a value is of a type, for the types that configurations have."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is_a(value, arg) for arg in args)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = args[:1] * len(value) if args[1:] == (...,) else args
        return len(value) == len(kinds) and all(map(_is_a, value, kinds))
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint


def _describe(hint: Any) -> str:
    """Returns the words for a type in an error."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        *first, last = map(_describe, args)
        return f"{', '.join(first)} or {last}"
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is tuple:
        if typing.get_origin(args[0]) is types.UnionType:
            return "whole numbers or groups of them"
        return "whole numbers" if args == (int, ...) else "two of them"
    return _NAMES[hint]
