"""The one exception that means "the input is wrong", and the words that help to mend it.

Commands print an `InputError` as a single line and exit with code 2; any other
exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A mistake in what the user gave: says what was given, what was expected, what to do."""


def nearest(name: str, options: Iterable[str]) -> str:
    """Returns a hint such as `; did you mean 'spvit_s'?`, or all options if none is near."""
    options = sorted(options)
    matches = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if matches:
        return f"; did you mean {matches[0]!r}?"
    return f"; known names are {', '.join(options)}"
