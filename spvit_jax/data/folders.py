"""Image folders in the layout of torchvision's ImageFolder: `root/split/class/…/image`."""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import os
from collections.abc import Iterator

import numpy as np
from etils import epath

from spvit_jax import paths
from spvit_jax.classes import ClassNames
from spvit_jax.data import decode
from spvit_jax.errors import InputError, some

log = logging.getLogger("spvit_jax.data")

_MAX_NAMED = 10  # ignored paths in the log
_LISTED_AT_ONCE = 16  # classes in a bucket


class FolderSource:
    """Images of a folder with one sub-folder per class.

    Classes are numbered in the order of their folders' names. Images may also be in nested folders.
    Hidden files, files that are no images, and folders without images are ignored, and logged.
    """

    several_labels = False

    def __init__(self, root: epath.Path, split: str):
        """Lists the images of a split.

        Args:
          root: folder of the splits.
          split: name of the split.

        Raises:
          InputError: the split is no folder, cannot be read, or holds no images.
        """
        self._remote = paths.is_remote(root)
        self._paths: list[str] = []
        names: list[str] = []
        ignored: list[str] = []
        ends = [0]  # offset in the list of paths after each class
        for name, images in _classes(root, split, ignored):
            self._paths += images
            if len(self._paths) > ends[-1]:
                ends.append(len(self._paths))
                names.append(name)
            else:
                ignored.append(os.path.join(root, split, name))
        directory = root / split
        if not names:
            raise InputError(
                f"{directory} holds no images; expected {directory}/CLASS/IMAGE of one of the "
                f"formats {', '.join(decode.FORMATS)}"
            )
        if ignored:
            shown = some([os.path.relpath(path, directory) for path in ignored], _MAX_NAMED)
            _log_once(
                f"ignored         {len(ignored)} in {directory} that are hidden, not images, or "
                f"folders without any: {shown}"
            )
        self._labels = np.repeat(np.arange(len(names), dtype=np.int32), np.diff(ends))
        self.class_names: ClassNames = tuple(names)
        self.num_classes = len(names)

    def __len__(self) -> int:
        return len(self._paths)

    def places(self, indices: np.ndarray) -> np.ndarray:
        return indices

    def file_names(self, indices: np.ndarray) -> list[str]:
        return [os.path.basename(self._paths[index]) for index in indices.tolist()]

    def labels(self) -> np.ndarray:
        return self._labels

    def fetch(self, indices: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        files = [self._paths[index] for index in indices.tolist()]
        if self._remote:
            return paths.read_ranges(files), self._labels[indices]
        images = []
        for path in files:
            with open(path, "rb", buffering=0) as file:
                images.append(file.read())
        return images, self._labels[indices]


def class_names(root: epath.Path, split: str) -> ClassNames:
    """Returns the classes of a split as in `FolderSource`, without listing all images.

    Raises:
      InputError: the split is no folder, or cannot be read.
    """
    return tuple(name for name, images in _classes(root, split, []) if next(images, None))


def images_below(folder: epath.Path) -> list[epath.Path]:
    """Returns the paths of all images in a folder, those that `FolderSource` would take.

    Raises:
      InputError: the folder cannot be read.
    """
    if paths.is_remote(folder):
        found = _images_in_bucket(folder, paths.files_below(folder), [])
    else:
        found = _images(os.fspath(folder), [], frozenset())
    return [epath.Path(path) for path in found]


def _classes(
    root: epath.Path, split: str, ignored: list[str]
) -> Iterator[tuple[str, Iterator[str]]]:
    """Yields the names of the folders in a split, and the paths of their images.

    Args:
      root: folder of the splits.
      split: name of the split.
      ignored: list to which all other paths are appended.
    """
    directory = root / split
    if not directory.is_dir():
        raise InputError(f"{directory} is not a folder; expected {root}/SPLIT/CLASS/IMAGE")
    if paths.is_remote(directory):
        yield from _classes_in_bucket(directory, ignored)
        return
    for entry in _visible(os.fspath(directory), ignored):
        if os.path.isdir(entry.path):
            yield entry.name, _images(entry.path, ignored, frozenset())
        else:
            ignored.append(entry.path)


def _classes_in_bucket(
    directory: epath.Path, ignored: list[str]
) -> Iterator[tuple[str, Iterator[str]]]:
    """Yields classes and images of a split in a bucket, as `_classes` and in the same order.

    A bucket lists a thousand names at a time, so that classes are listed side by side.
    """
    try:
        entries = sorted(directory.iterdir(), key=lambda entry: entry.name)
        with concurrent.futures.ThreadPoolExecutor(_LISTED_AT_ONCE) as pool:
            listed = list(pool.map(paths.files_below, entries))
    except OSError as error:
        raise InputError(f"{directory} cannot be read: {error}") from error
    for entry, names in zip(entries, listed, strict=True):
        if entry.name.startswith(".") or names == [entry.name]:  # hidden, or a file
            ignored.append(str(entry))
        else:
            yield entry.name, _images_in_bucket(entry, names, ignored)


def _images_in_bucket(folder: epath.Path, names: list[str], ignored: list[str]) -> Iterator[str]:
    """Yields the paths of the images among the files below a folder, in the order of `_images`."""
    for name in sorted(names, key=lambda name: name.split("/")):
        path = folder / name
        hidden = any(part.startswith(".") for part in name.split("/"))
        if hidden or not decode.is_image(path):
            ignored.append(str(path))
        else:
            yield str(path)


def _images(folder: str, ignored: list[str], above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Yields the paths of all images in a folder, nested or linked too, in the order of names.

    Args:
      folder: path of the folder.
      ignored: list to which all other paths are appended.
      above: device and inode of the parent folders, to which a link may lead back.
    """
    status = os.stat(folder)
    identity = status.st_dev, status.st_ino
    if identity in above:
        ignored.append(folder)
        return
    for entry in _visible(folder, ignored):
        # `is_file` needs no system call except for links; a call for each of a million takes long.
        if entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path):
            if decode.is_image(epath.Path(entry.path)):
                yield entry.path
            else:
                ignored.append(entry.path)
        elif os.path.isdir(entry.path):
            yield from _images(entry.path, ignored, above | {identity})
        else:
            ignored.append(entry.path)


def _visible(folder: str, ignored: list[str]) -> Iterator[os.DirEntry[str]]:
    """Yields the entries of a folder that are not hidden, in the order of names.

    Raises:
      InputError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from error
    for entry in ordered:
        if entry.name.startswith("."):
            ignored.append(entry.path)
        else:
            yield entry


@functools.cache
def _log_once(message: str) -> None:
    log.warning("%s", message)
