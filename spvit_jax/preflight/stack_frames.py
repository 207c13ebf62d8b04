"""Lines of Python that the instructions of a compiled program come from.

The text of a program has four tables before its computations: names of files and of functions,
places in them, and stack frames, each a place and the frame that called it.
"""

from __future__ import annotations

import re

_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_PACKAGE = "/spvit_jax/"


def read(text: str) -> dict[str, str]:
    """Returns the file and line of each stack frame of a program, by the frame's number.

    That is the innermost line in this package, as `spvit_jax/models/layers.py:34`, or, where a
    frame has none, the innermost of all.

    Args:
      text: result of `compiled.as_text()`.
    """
    tables: dict[str, dict[str, str]] = {name: {} for name in _TABLES}
    current = ""
    for line in text.splitlines():
        if line in _TABLES:
            current = line
        elif line.startswith(("ENTRY", "%")):
            break
        elif current and (row := re.match(r"(\d+) (.*)", line)):
            tables[current][row[1]] = row[2]
    places = {
        number: f"{tables['FileNames'][fields['file_name_id']][1:-1]}:{fields['line']}"
        for number, row in tables["FileLocations"].items()
        for fields in [_fields(row)]
    }
    frames = {number: _fields(row) for number, row in tables["StackFrames"].items()}
    return {number: _place(number, frames, places) for number in frames}


def _fields(row: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\d+)", row))


def _place(number: str, frames: dict[str, dict[str, str]], places: dict[str, str]) -> str:
    """Returns the place of a frame: the innermost in the package, else that of the frame itself."""
    innermost = places[frames[number]["file_location_id"]]
    while number in frames:
        place = places[frames[number]["file_location_id"]]
        if _PACKAGE in place:
            return _PACKAGE.strip("/") + "/" + place.rpartition(_PACKAGE)[2]
        number = str(int(frames[number].get("parent_frame_id", "0")) - 1)  # 1 is none
    return innermost.rpartition("/")[2]
