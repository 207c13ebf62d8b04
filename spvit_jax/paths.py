"""Paths on this machine and in buckets of Google Cloud Storage, `gs://BUCKET/NAME`.

Every path that a user gives goes through `parse`, and is an `epath.Path`, which has pathlib's
methods for both kinds. What differs between them beyond those methods is here. Files that appear
whole are written in `atomic.py`, and files that grow in `append_only.py`.

A bucket has objects rather than files and folders: an object is put whole and cannot be appended
to, and a folder is there when an object's name begins with its own.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import pathlib
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import fsspec
from etils import epath
from fsspec import asyn

from spvit_jax.errors import InputError

if TYPE_CHECKING:
    from gcsfs import GCSFileSystem

_GS = "gs://"
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+:/|(gs|s3|hdfs|file|https?):|.*://)")
_ROOTS = re.compile(r"/(gs|s3|az|hf)(/|$)")  # where epath keeps URLs among the local paths
_TIMEOUT = 20  # seconds for the first answer of a bucket
_CLIENT = ("aiohttp", "gcsfs", "google", "requests")  # packages whose exceptions it raises

# gcsfs keeps listings, and would not see what other processes write.
fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)


def parse(text: str | os.PathLike[str]) -> epath.Path:
    """Returns a path that a user gave, after a look at its bucket if it has one.

    Raises:
      InputError: the path has another scheme than `gs://`, or its bucket cannot be read.
    """
    text = os.fspath(text)
    if text.startswith(_GS):
        bucket = text.removeprefix(_GS).partition("/")[0]
        if not bucket:
            raise InputError(f"{text} names no bucket; expected gs://BUCKET/NAME")
        _check_bucket(bucket)
    elif _ROOTS.match(text):
        raise InputError(
            f"{text} cannot be told from a URL by etils.epath; expected gs://BUCKET/NAME, or a "
            "folder that is not in /gs, /s3, /az or /hf"
        )
    elif _URL.match(text):
        raise InputError(
            f"{text} names a place that cannot be read or written; expected a path on this "
            "machine, or gs://BUCKET/NAME"
        )
    return epath.Path(text)


def parse_output(text: str | os.PathLike[str]) -> epath.Path:
    """Returns a path that a user gave for a result, as `parse`, after a trial write to its bucket.

    Raises:
      InputError: as `parse`; or its bucket cannot be written to.
    """
    path = parse(text)
    if is_remote(path):
        try:
            check_writable(path)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error}") from error
    return path


def absolute(path: epath.Path) -> epath.Path:
    """Returns a local path from the root on, without links, and one in a bucket as it is."""
    # epath's own method follows no links, and would put the working directory before gs://.
    return path if is_remote(path) else epath.Path(os.path.realpath(path))


def is_remote(path: os.PathLike[str]) -> bool:
    """Returns whether a path is in a bucket."""
    return os.fspath(path).startswith(_GS)


def size(path: epath.Path) -> int:
    """Returns the size of a file in bytes.

    Raises:
      OSError: there is no such file.
    """
    # epath's own looks up the names of a local file's owners, which a container may not have.
    return path.stat().length if is_remote(path) else os.path.getsize(path)


def modified(path: epath.Path) -> float:
    """Returns when a file was last written, in seconds; of a bucket's, whole ones.

    Raises:
      OSError: there is no such file.
    """
    if not is_remote(path):
        return os.path.getmtime(path)
    with reached():
        return path.stat().mtime


def check_writable(folder: epath.Path) -> None:
    """Checks that files can be written to a folder or, where it is not there yet, the one above it.

    In a bucket an object is put below the name, and removed.

    Raises:
      OSError: they cannot.
    """
    if is_remote(folder):
        probe = folder / f".writable-{uuid.uuid4().hex}"
        with reached():
            probe.write_bytes(b"")
            with contextlib.suppress(OSError):  # who may write may not always remove
                probe.unlink()
        return
    with tempfile.TemporaryFile(dir=_nearest(folder)):
        pass


def free_space(folder: epath.Path) -> int | None:
    """Returns the free bytes of the disk that a folder is, or will be, on; None for a bucket."""
    return None if is_remote(folder) else shutil.disk_usage(_nearest(folder)).free


def _nearest(folder: epath.Path) -> pathlib.Path:
    """Returns a local folder or, where it is not there yet, the nearest one above it."""
    whole = pathlib.Path(folder).absolute()
    return next(path for path in (whole, *whole.parents) if path.exists())


@contextlib.contextmanager
def local_copy(path: epath.Path) -> Iterator[pathlib.Path]:
    """Downloads a file of a bucket for as long as the context lasts; a local one is read in place.

    Yields:
      The path of the file on this machine.

    Raises:
      OSError: the file cannot be read, or this machine has no room for it.
    """
    if not is_remote(path):
        yield pathlib.Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="spvit_jax-") as folder:
        target = pathlib.Path(folder) / path.name
        with reached():
            _file_system().get_file(str(path), str(target))
        yield target


def put(source: pathlib.Path, target: epath.Path, *, replace: bool = True) -> None:
    """Writes a local file to a bucket; the object is there whole, or not at all.

    Args:
      source: the local file.
      target: the object.
      replace: whether an object of that name is replaced, rather than an error.

    Raises:
      FileExistsError: the object exists, and is not to be replaced.
      OSError: the object cannot be written.
    """
    with reached():
        mode = "overwrite" if replace else "create"
        _file_system().put_file(str(source), str(target), mode=mode)


def put_bytes(data: bytes, target: epath.Path) -> None:
    """Writes an object of a bucket; it is replaced whole, or not at all.

    Raises:
      OSError: the object cannot be written.
    """
    with reached():
        _file_system().pipe_file(str(target), data)


def put_folder(source: pathlib.Path, target: epath.Path, *, last: Sequence[str]) -> None:
    """Writes a local folder's files to a bucket one by one, those that mark it as complete last.

    An object that is there already stays: another process may have put it, and others may read it.

    Args:
      source: the local folder.
      target: the folder in the bucket.
      last: names of the files in `source` that are written after all others, in this order.

    Raises:
      OSError: an object cannot be written.
    """
    names = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
    for name in _in_order(names, last):
        with contextlib.suppress(FileExistsError):
            put(source / name, target / name, replace=False)


def move_folder(source: epath.Path, target: epath.Path, *, last: Sequence[str] = ()) -> None:
    """Moves a folder to a name that is free.

    In a bucket its objects are copied one by one, as in `put_folder`, before the old ones go.

    Raises:
      OSError: the folder cannot be moved.
    """
    if not is_remote(source):
        source.rename(target)
        return
    with reached():
        for name in _in_order(files_below(source), last):
            _file_system().cp_file(str(source / name), str(target / name))
        source.rmtree()


def files_below(folder: epath.Path) -> list[str]:
    """Returns the paths of all files of a bucket's folder, nested too, relative to it.

    Raises:
      OSError: the folder cannot be read.
    """
    prefix = f"{str(folder).removeprefix(_GS)}/"
    with reached():
        return [name.removeprefix(prefix) for name in _file_system().find(str(folder))]


def read_ranges(
    files: Sequence[str], starts: Sequence[int] | int = 0, ends: Sequence[int] | int | None = None
) -> list[bytes]:
    """Reads parts of files in buckets, or whole files, all at once.

    Args:
      files: paths of the files; a file may be there several times.
      starts: first byte of each part.
      ends: byte behind each part; None for the file's end.

    Raises:
      OSError: a file cannot be read.
    """
    with reached():
        return _file_system().cat_ranges(list(files), starts, ends, on_error="raise")


@contextlib.contextmanager
def reached() -> Iterator[None]:
    """Raises an `OSError` of one line in place of any exception of the client of buckets."""
    try:
        yield
    except Exception as error:
        if type(error) is FileNotFoundError and error.errno is None:
            raise FileNotFoundError(errno.ENOENT, "No such object or bucket", str(error)) from error
        # What gcsfs raises without permission is an `OSError` itself, of two lines.
        of_client = type(error).__module__.partition(".")[0] in _CLIENT
        if of_client or (type(error) is OSError and error.errno is None):
            raise OSError(" ".join(str(error).split())) from error
        raise


@functools.cache
def _check_bucket(bucket: str) -> None:
    """Raises an `InputError` if a bucket is not there or cannot be listed; asks it for one name."""
    try:
        with reached():
            client = _file_system()
            query = {"maxResults": 1, "json_out": True, "timeout": _TIMEOUT}
            asyn.sync(client.loop, client._call, "GET", "b/{}/o", bucket, **query)
    except FileNotFoundError as error:
        raise InputError(
            f"there is no bucket gs://{bucket}; make it first, or check its name"
        ) from error
    except TimeoutError as error:
        raise InputError(
            f"gs://{bucket} does not answer within {_TIMEOUT} seconds; check the network"
        ) from error
    except OSError as error:
        raise InputError(
            f"gs://{bucket} cannot be read: {error}; expected credentials that may list and read "
            "its objects (gcloud auth application-default login, or the VM's service account)"
        ) from error


def _in_order(names: Sequence[str], last: Sequence[str]) -> list[str]:
    """Returns names in their order, but those in `last` behind all others, in its order."""
    return sorted(names, key=lambda name: (last.index(name) if name in last else -1, name))


def _file_system() -> GCSFileSystem:
    """Returns the client of buckets, which is imported when the first path needs it."""
    client: Any = fsspec.filesystem("gcs", finalize_on_close=True)  # the one that epath has, too
    return client
