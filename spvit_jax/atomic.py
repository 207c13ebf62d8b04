"""Atomic writes: a file or folder appears under its name when it is complete, or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from etils import epath

from spvit_jax import paths


@contextlib.contextmanager
def replacing(path: epath.Path) -> Iterator[pathlib.Path]:
    """Writes a file that gets its name once it is complete; a context manager.

    It is written under a temporary name that nothing had before, so that what a killed process
    leaves behind is never taken for it, and renamed. A file of a bucket is written on this machine
    and put as one object, which a bucket replaces whole. Any exception, Ctrl-C included, leaves
    nothing behind.

    Args:
      path: the file; folders above it are created. A file of that name is replaced.

    Yields:
      The temporary path to write to, which is on this machine and ends in `path.name`.

    Raises:
      OSError: the file cannot be written.
    """
    if paths.is_remote(path):
        with tempfile.TemporaryDirectory(prefix="spvit_jax-") as folder:
            temporary = pathlib.Path(folder) / path.name
            yield temporary
            paths.put(temporary, path)
        return
    with _renamed(pathlib.Path(path)) as temporary:
        yield temporary


@contextlib.contextmanager
def making_folder(path: epath.Path) -> Iterator[epath.Path]:
    """Makes a new folder that gets its name once it is complete; a context manager.

    A bucket cannot rename a folder: there it is written in place, and what is written must itself
    say when it is complete, as orbax's checkpoints do. Any exception, Ctrl-C included, leaves
    nothing behind.

    Args:
      path: the folder, which is not there yet; folders above it are created.

    Yields:
      The folder to write to.

    Raises:
      OSError: the folder cannot be made.
    """
    if paths.is_remote(path):
        try:
            yield path
        except BaseException:
            with contextlib.suppress(Exception):  # there may be nothing, or no way to reach it
                path.rmtree()
            raise
        return
    with _renamed(pathlib.Path(path)) as temporary:
        yield epath.Path(temporary)


@contextlib.contextmanager
def _renamed(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary path in a folder beside `path`, which is renamed to it afterwards."""
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


def write_text(path: epath.Path, text: str) -> None:
    """Replaces a text file atomically: a reader, also after a crash, finds the old or the new text.

    Raises:
      OSError: the file cannot be written; the old one is as it was.
    """
    with replacing(path) as temporary, temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
