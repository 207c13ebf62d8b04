"""Files and folders that appear under their name when they are whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a file or folder its name once it is written; a context manager.

    It is written under a name that nothing had before, so that what a process that was killed has
    left is never taken for it. Whatever else ends the writing, Ctrl-C included, leaves nothing.

    Args:
      path: its name; the folders above are created. A file of that name is replaced.

    Yields:
      Where to write it, in a folder beside `path`.

    Raises:
      OSError: it cannot be written.
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
    """Replaces a text file: a reader, or a run after a crash, finds the old text or the new one.

    Raises:
      OSError: it cannot be written; the old file is as it was.
    """
    with replacing(path) as temporary, temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
