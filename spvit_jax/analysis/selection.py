"""Which images, patches, layers and heads to look at: defaults, and checks of what is asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from spvit_jax.analysis.image_maps import Query
from spvit_jax.errors import InputError
from spvit_jax.models import ModelConfig


def evenly(total: int, number: int | None) -> np.ndarray:
    """Returns the indices int64 of a number of examples, spread evenly over all; None for all.

    Raises:
      InputError: there are none, or fewer than `number`.
    """
    number = total if number is None else number
    if not 1 <= number <= total:
        raise InputError(
            f"{number} images are asked for, and the split has {total}; expected at least one, and "
            "no more than there are"
        )
    return np.arange(number, dtype=np.int64) * total // number


def default_queries(config: ModelConfig) -> tuple[Query, ...]:
    """Returns two patches of a model's grid: in the middle, and between there and the corner."""
    h, w = config.grid
    return tuple(dict.fromkeys([(h // 2, w // 2), (h // 4, w // 4)]))


def parse_queries(text: str) -> tuple[Query, ...]:
    """Returns the patches that a text such as "3,5;7,7" names, by row and column.

    Raises:
      InputError: the text cannot be read.
    """
    if re.fullmatch(r"\s*\d+\s*,\s*\d+\s*(;\s*\d+\s*,\s*\d+\s*)*", text) is None:
        raise InputError(
            f"--queries={text} cannot be read; expected rows and columns of patches, such as "
            "--queries='3,5;7,7'"
        )
    pairs = [pair.split(",") for pair in text.split(";")]
    return tuple((int(row), int(column)) for row, column in pairs)


def parse_numbers(flag: str, values: Sequence[str]) -> tuple[int, ...]:
    """Returns the numbers that a flag lists.

    Raises:
      InputError: one is no number, or there is none.
    """
    if not values or not all(re.fullmatch(r"\s*\d+\s*", value) for value in values):
        raise InputError(f"--{flag}={','.join(values)} cannot be read; expected numbers from 0")
    return tuple(int(value) for value in values)


def check_queries(queries: Sequence[Query], config: ModelConfig) -> None:
    """Checks that patches are in a model's grid, each named once.

    Raises:
      InputError: one is not, or is named twice.
    """
    h, w = config.grid
    for row, column in queries:
        if not (0 <= row < h and 0 <= column < w):
            raise InputError(
                f"the query {row},{column} is outside of the grid of {h}×{w} patches; expected "
                f"a row from 0 to {h - 1} and a column from 0 to {w - 1}"
            )
        if list(queries).count((row, column)) > 1:
            raise InputError(f"the query {row},{column} is named twice; name each patch once")


def check_numbers(kind: str, numbers: Sequence[int], total: int, where: str) -> None:
    """Checks that there are images, layers or heads of some numbers, each named once.

    Args:
      kind: what they are, such as "head".
      numbers: numbers, counted from 0.
      total: how many there are.
      where: what has them, for the error.

    Raises:
      InputError: one is not there, or is named twice.
    """
    for number in numbers:
        if not 0 <= number < total:
            raise InputError(
                f"there is no {kind} {number}: {where} has {total}; expected 0 to {total - 1}"
            )
        if list(numbers).count(number) > 1:
            raise InputError(f"{kind} {number} is named twice; name each once")
