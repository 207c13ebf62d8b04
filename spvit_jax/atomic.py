"""Atomic writes: a file or folder appears under its name when it is complete, or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Writes a file or folder that gets its name once it is complete; a context manager.

    It is written under a temporary name that nothing had before, so that what a killed process
    leaves behind is never taken for it. Any exception, Ctrl-C included, leaves nothing behind.

    Args:
      path: the file or folder; folders above it are created. A file of that name is replaced.

    Yields:
      The temporary path to write to, in a folder beside `path`.

    Raises:
      OSError: the file or folder cannot be written.
    """
    created = [parent for parent in path.parents if not parent.exists()]
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        names = {"prefix": f".{path.name}.", "suffix": ".partial"}
        temporary = pathlib.Path(tempfile.mkdtemp(dir=path.parent, **names))
        yield temporary / path.name
        (temporary / path.name).replace(path)
    except BaseException:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
        for parent in created:
            with contextlib.suppress(OSError):  # others may have put something there
                parent.rmdir()
        raise
    shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """Replaces a text file atomically: a reader, also after a crash, finds the old or the new text.

    Raises:
      OSError: the file cannot be written; the old one is as it was.
    """
    with replacing(path) as temporary, temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
