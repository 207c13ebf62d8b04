"""Exceptions that are not bugs, and functions that word error messages.

Commands print them as a single line and exit with the code of `exit_code`; any other exception is
a bug and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

# Exit codes of all commands, which the scripts and manifests of launch/ act upon.
FAILED = 1  # may succeed when tried again, a limited number of times
WRONG_INPUT = 2  # never succeeds as it is
START_AGAIN = os.EX_TEMPFAIL  # 75: the same command, started again, goes on from what is saved


class InputError(ValueError):
    """Invalid input of the user: the message says what was given, what was expected, what to do."""


class WriteError(OSError):
    """A result that cannot be written, for example because the disk is full."""


def exit_code(error: BaseException) -> int | None:
    """Returns the exit code of a command that ends with an error; None if the error is a bug."""
    if isinstance(error, InputError):
        return WRONG_INPUT
    return FAILED if isinstance(error, WriteError | FloatingPointError) else None


@contextlib.contextmanager
def writing(path: os.PathLike[str]) -> Iterator[None]:
    """Turns an `OSError` inside into a `WriteError` that names the file; a context manager."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"cannot write {os.fspath(path)}: {error.strerror or error}") from error


def nearest(name: str, options: Iterable[str]) -> str:
    """Returns a hint such as `; did you mean 'spvit_s'?`, or all options if none is near."""
    options = sorted(options)
    matches = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if matches:
        return f"; did you mean {matches[0]!r}?"
    return f"; known names are {', '.join(options)}"


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, at most 200 characters of it."""
    return (str(error).strip() or repr(error)).splitlines()[0][:200]


def check_shapes(
    expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], where: object
) -> None:
    """Checks that arrays have the names and shapes that a model needs.

    Args:
      expected: shapes that the model needs, by name.
      given: shapes of the arrays, by name.
      where: origin of the arrays, for the error.

    Raises:
      InputError: names or shapes differ; shows the missing, unexpected and wrongly shaped
        names together.
    """
    missing = [name for name in expected if name not in given]
    unexpected = [shown(name) for name in given if name not in expected]
    reshaped = [
        f"{name} {_times(given[name])} instead of {_times(shape)}"
        for name, shape in expected.items()
        if name in given and tuple(given[name]) != tuple(shape)
    ]
    if missing or unexpected or reshaped:
        raise InputError(
            f"{where} is of another model. Missing: {some(missing)}. "
            f"Unexpected: {some(unexpected)}. Wrong shape: {some(reshaped)}."
        )


def shown(text: object, most: int = 80) -> str:
    """Returns a text from a user's file for an error: escaped, and at most `most` characters."""
    letters = str(text)
    rest = "…" if len(letters) > most else ""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in letters[:most]) + rest


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a number"


def some(names: Sequence[str], most: int = 6) -> str:
    """Returns names joined by commas: the first `most`, and the number of the others."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + rest
