"""The one exception that means "the input is wrong", and the words that help to mend it.

Commands print an `InputError` as a single line and exit with code 2; any other
exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class InputError(ValueError):
    """A mistake in what the user gave: says what was given, what was expected, what to do."""


def nearest(name: str, options: Iterable[str]) -> str:
    """Returns a hint such as `; did you mean 'spvit_s'?`, or all options if none is near."""
    options = sorted(options)
    matches = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if matches:
        return f"; did you mean {matches[0]!r}?"
    return f"; known names are {', '.join(options)}"


def first_line(error: BaseException) -> str:
    """Returns what an error of a library says, without the pages that may follow."""
    return (str(error).strip() or repr(error)).splitlines()[0][:200]


def check_shapes(
    expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], where: object
) -> None:
    """Compares the arrays that were found with those that a model needs.

    Raises:
      InputError: they differ; shows the missing, unexpected and wrongly shaped names together.
    """
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    reshaped = [
        f"{name} {_times(given[name])} instead of {_times(shape)}"
        for name, shape in expected.items()
        if name in given and tuple(given[name]) != tuple(shape)
    ]
    if missing or unexpected or reshaped:
        raise InputError(
            f"{where} is of another model. Missing: {_some(missing)}. "
            f"Unexpected: {_some(unexpected)}. Wrong shape: {_some(reshaped)}."
        )


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a number"


def _some(names: list[str], most: int = 6) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + rest
