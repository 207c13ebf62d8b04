"""What data exists: the embedded digits, any TFDS data set, or a folder of images.

Each is a `Source`: a number of examples that can be read in any order by their index, as encoded
images and labels. Which examples make up which batch is decided in `pipeline.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import pathlib
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds

from spvit_jax.data.digits import Digits
from spvit_jax.errors import InputError, nearest

_IMAGE_SUFFIXES = frozenset({".jpeg", ".jpg", ".png", ".bmp", ".gif"})


class Source(Protocol):
    """Examples by index: the encoded images and their labels.

    Attributes:
      num_classes: C; labels are in 0 … C-1.
    """

    num_classes: int

    def __len__(self) -> int: ...

    def places(self, indices: np.ndarray) -> np.ndarray:
        """Returns the places [n] of examples [n] in the whole split, as label maps count them."""
        ...

    def file_names(self, indices: np.ndarray) -> list[str]:
        """Returns the names of the files that examples [n] were made of.

        Raises:
          InputError: they are not known.
        """
        ...

    def fetch(self, indices: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        """Returns the encoded images and the labels [n] int32 of examples [n]; thread safe."""
        ...


def load(name: str, split: str, data_dir: str) -> Source:
    """Opens one split of a data set, and prepares the data set first if need be.

    Args:
      name: "digits", the name of any TFDS data set of images with labels, or "folder:PATH" for
        a folder with one sub-folder per split and in it one per class.
      split: a split's name, for TFDS also a slice such as "train[:1%]".
      data_dir: where TFDS data sets are kept.

    Raises:
      InputError: there is no such data set or split, or it cannot be read.
    """
    if name.startswith("folder:"):
        return FolderSource(pathlib.Path(name.removeprefix("folder:")), split)
    return TfdsSource(name, split, data_dir)


class TfdsSource:
    """A split of a TFDS data set, read at random from ArrayRecord files."""

    def __init__(self, name: str, split: str, data_dir: str):
        builder = _prepared_builder(name, data_dir)
        features = builder.info.features
        if "image" not in features or "label" not in features:
            raise InputError(
                f"data set {name!r} has the features {', '.join(features)}; "
                "expected 'image' and 'label' among them"
            )
        self.num_classes = features["label"].num_classes
        try:
            self._records: Any = builder.as_data_source(
                split, decoders={"image": tfds.decode.SkipDecoding()}
            )
        except (ValueError, KeyError) as error:
            splits = ", ".join(builder.info.splits)
            raise InputError(
                f"cannot open split {split!r} of data set {name!r}, which has {splits}: {error}"
            ) from error
        if not len(self._records):
            raise InputError(f"split {split!r} of data set {name!r} in {data_dir} is empty")

    def __len__(self) -> int:
        return len(self._records)

    def places(self, indices: np.ndarray) -> np.ndarray:
        return indices

    def file_names(self, indices: np.ndarray) -> list[str]:
        records = self._records.__getitems__(indices.tolist())
        if "file_name" not in records[0]:
            raise InputError("the data set does not say from which files its images are")
        return [record["file_name"].decode() for record in records]

    def fetch(self, indices: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        records = self._records.__getitems__(indices.tolist())
        labels = np.array([record["label"] for record in records], np.int32)
        return [record["image"] for record in records], labels


def _prepared_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """Returns the builder of a data set that is on disk in ArrayRecord files, or is put there."""
    try:
        builder = _builder(name, data_dir)
        if not builder.is_prepared():
            with _only_one_process(pathlib.Path(data_dir)):
                builder = _builder(name, data_dir)
                builder.download_and_prepare()
    except tfds.core.DatasetNotFoundError as error:
        hint = nearest(name, tfds.list_builders())
        raise InputError(f"unknown data set {name!r}{hint}") from error
    except (OSError, AssertionError, ValueError) as error:
        raise InputError(
            f"data set {name!r} is not in {data_dir} and cannot be prepared there: {error}"
        ) from error
    return builder


def _builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    if name == Digits.name:
        return Digits(data_dir=data_dir, file_format="array_record")
    return tfds.builder(name, data_dir=data_dir, file_format="array_record")


@contextlib.contextmanager
def _only_one_process(directory: pathlib.Path) -> Iterator[None]:
    """Holds a lock in a directory, so that of several processes one prepares and the rest find."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class FolderSource:
    """A folder of images as PyTorch users keep it: `root/split/class/*.jpeg`.

    Classes are numbered in the order of their folders' names.
    """

    def __init__(self, root: pathlib.Path, split: str):
        directory = root / split
        if not directory.is_dir():
            raise InputError(f"{directory} is not a folder; expected {root}/SPLIT/CLASS/IMAGE")
        classes = sorted(path.name for path in directory.iterdir() if path.is_dir())
        self.num_classes = len(classes)
        self._files = [
            (path, label)
            for label, name in enumerate(classes)
            for path in sorted((directory / name).iterdir())
            if path.suffix.lower() in _IMAGE_SUFFIXES
        ]
        if not self._files:
            raise InputError(
                f"{directory} holds no images; expected {directory}/CLASS/IMAGE "
                f"with one of the endings {', '.join(sorted(_IMAGE_SUFFIXES))}"
            )

    def __len__(self) -> int:
        return len(self._files)

    def places(self, indices: np.ndarray) -> np.ndarray:
        return indices

    def file_names(self, indices: np.ndarray) -> list[str]:
        return [self._files[index][0].name for index in indices.tolist()]

    def fetch(self, indices: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        files = [self._files[index] for index in indices.tolist()]
        labels = np.array([label for _, label in files], np.int32)
        return [path.read_bytes() for path, _ in files], labels


class Subset:
    """Some of the examples of another source."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.num_classes = source.num_classes
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def places(self, indices: np.ndarray) -> np.ndarray:
        return self._source.places(self._indices[indices])

    def file_names(self, indices: np.ndarray) -> list[str]:
        return self._source.file_names(self._indices[indices])

    def fetch(self, indices: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        return self._source.fetch(self._indices[indices])


def balanced_subset(source: Source, size: int | str, seed: int) -> Source:
    """Draws `size` examples at random, as many of each class as can be.

    Args:
      source: what to draw from.
      size: number of examples, or a share of them such as "10%"; a class with too few gives all
        it has and the rest fill up.
      seed: of the draw; smaller subsets of the same seed are part of larger ones.

    Raises:
      InputError: size cannot be read or is not between 1 and the number of examples.
    """
    size = _number_of(size, len(source))
    if not 1 <= size <= len(source):
        raise InputError(
            f"train_size is {size}; expected 1 to {len(source)}, the number of training examples"
        )
    order = np.random.default_rng(seed).permutation(len(source))
    labels = source.fetch(order)[1]
    # The k-th example of its class comes before any (k+1)-th one.
    by_class = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[by_class], labels[by_class])
    rank = np.empty(len(order), np.int64)
    rank[by_class] = np.arange(len(order)) - starts
    return Subset(source, order[np.argsort(rank, kind="stable")[:size]])


def _number_of(size: int | str, total: int) -> int:
    """Returns a number of examples, given as such or as a percentage of the total."""
    if isinstance(size, int):
        return size
    try:
        return round(total * float(size.removesuffix("%")) / 100) if size[-1:] == "%" else int(size)
    except (ValueError, OverflowError) as error:
        raise InputError(
            f"train_size is {size!r}; expected a number of examples, or a share such as '10%'"
        ) from error
