"""Tables that commands write into Markdown files, between marks that a reader does not see."""

from __future__ import annotations

import pathlib


def marks(name: str) -> tuple[str, str]:
    """Returns the marks before and behind a table."""
    return f"<!-- {name} -->", f"<!-- end of {name} -->"


def replace_between(marks: tuple[str, str], text: str, path: pathlib.Path) -> None:
    """Writes a text between two marks of a Markdown file, in the place of what is there.

    Raises:
      ValueError: the file does not have each mark once, in this order.
    """
    content = path.read_text()
    before, begin, rest = content.partition(marks[0])
    old, end, after = rest.partition(marks[1])
    if not (begin and end) or any(mark in before + old + after for mark in marks):
        raise ValueError(f"{path} does not have {marks[0]} and then {marks[1]}, each once")
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
