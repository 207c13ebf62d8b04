"""Files that are replaced as a whole."""

from __future__ import annotations

import contextlib
import os
import pathlib


def write_text(path: pathlib.Path, text: str) -> None:
    """Replaces a file: a reader, or a run after a crash, finds the old text or the new one.

    Raises:
      OSError: it cannot be written; the old file is as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
