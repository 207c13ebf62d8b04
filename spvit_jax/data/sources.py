"""Where examples are read from: TFDS's records and folders of images.

What data sets there are by name, and which part of one is used, is in `datasets.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from spvit_jax import atomic
from spvit_jax.data.digits import Digits
from spvit_jax.errors import InputError, nearest

_IMAGE_SUFFIXES = frozenset({".jpeg", ".jpg", ".png", ".bmp", ".gif"})
_AT_ONCE = 1024  # records that are read together when all of them are


class Source(Protocol):
    """Examples by index: the encoded images and their labels.

    Attributes:
      num_classes: C; labels are in 0 … C-1.
      several_labels: whether an image may have any number of labels rather than one.
    """

    num_classes: int
    several_labels: bool

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

    def labels(self) -> np.ndarray:
        """Returns the labels of all examples, as `fetch` does."""
        ...

    def fetch(self, indices: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        """Returns the encoded images and the labels of examples [n]; thread safe.

        Labels are int32 [n], or, where there may be several, uint8 [n, C], 1 for each.
        """
        ...


class TfdsSource:
    """A split of a TFDS data set, read at random from ArrayRecord files.

    The label is the feature `label`, or in ImageNet-ReaL (arXiv 2006.07159) `real_label`.
    """

    def __init__(self, name: str, split: str, data_dir: str):
        self._name, self._split, self._data_dir = name, split, data_dir
        self._builder = prepared_builder(name, data_dir)
        features = self._builder.info.features
        self.several_labels = "real_label" in features and "label" not in features
        self._label = "real_label" if self.several_labels else "label"
        if "image" not in features or self._label not in features:
            raise InputError(
                f"data set {name!r} has the features {', '.join(features)}; "
                "expected 'image' and 'label' among them"
            )
        label = features[self._label]
        self.num_classes = (label.feature if self.several_labels else label).num_classes
        try:
            self._records: Any = self._builder.as_data_source(
                split, decoders={"image": tfds.decode.SkipDecoding()}
            )
        except NotImplementedError as error:
            raise InputError(
                f"data set {name!r} in {data_dir} is not in ArrayRecord files, which can be read "
                "in any order; convert it with tfds convert_format --out_file_format=array_record "
                f"--dataset_dir={self._builder.data_dir} --out_path=NEW_DIR"
            ) from error
        except (ValueError, KeyError) as error:
            splits = ", ".join(self._builder.info.splits)
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

    def labels(self) -> np.ndarray:
        """Reads them from a file beside the records, which is made the first time."""
        infos = self._builder.info.splits
        parts = tfds.core.ReadInstruction.from_spec(self._split).to_absolute(infos)
        return np.concatenate([self._labels_of(p.splitname)[p.from_ : p.to] for p in parts])

    def _labels_of(self, split: str) -> np.ndarray:
        path = labels_file(self._builder, split)
        if path.exists():
            return np.load(path)
        whole = TfdsSource(self._name, split, self._data_dir)
        chunks = [
            whole.fetch(np.arange(start, min(start + _AT_ONCE, len(whole))))[1]
            for start in tqdm(
                range(0, len(whole), _AT_ONCE),
                desc=f"labels of {split}",
                disable=len(whole) < 50 * _AT_ONCE or not sys.stderr.isatty(),
            )
        ]
        labels = np.concatenate(chunks)
        with contextlib.suppress(OSError):  # where data may not be written it is read each time
            save_labels(path, labels)
        return labels

    def fetch(self, indices: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        records = self._records.__getitems__(indices.tolist())
        images = [record["image"] for record in records]
        if not self.several_labels:
            return images, np.array([record[self._label] for record in records], np.int32)
        labels = np.zeros((len(records), self.num_classes), np.uint8)
        for row, record in zip(labels, records, strict=True):
            row[record[self._label]] = 1
        return images, labels


def prepared_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """Returns the builder of a data set that is on disk, or can be put there without help.

    Raises:
      InputError: there is no such data set, or it is not there and cannot be made.
    """
    try:
        builder = builder_of(name, data_dir)
        if not builder.is_prepared():
            if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
                raise InputError(
                    f"data set {name!r} is not in {data_dir}; make it of its archives with "
                    f"python -m spvit_jax.data.prepare --dataset={name} --manual_dir=DIR "
                    f"--data_dir={data_dir}"
                )
            with only_one_process(pathlib.Path(data_dir)):
                builder = builder_of(name, data_dir)
                builder.download_and_prepare()
    except (OSError, AssertionError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"data set {name!r} is not in {data_dir} and cannot be prepared there: {error}"
        ) from error
    return builder


def builder_of(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """Returns the builder of a data set, which may not be prepared.

    Raises:
      InputError: there is no such data set.
    """
    if name == Digits.name:
        return Digits(data_dir=data_dir, file_format="array_record")
    try:
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        hint = nearest(name, tfds.list_builders())
        raise InputError(f"unknown data set {name!r}{hint}") from error


@contextlib.contextmanager
def only_one_process(directory: pathlib.Path) -> Iterator[None]:
    """Holds a lock in a directory, so that of several processes one prepares and the rest find."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def labels_file(builder: tfds.core.DatasetBuilder, split: str) -> pathlib.Path:
    """Returns the file beside a split's records that holds their labels in order."""
    return pathlib.Path(builder.data_dir) / f"labels-{split}.npy"


def save_labels(path: pathlib.Path, labels: np.ndarray) -> None:
    """Writes labels, whole or not at all."""
    with atomic.writing(path) as temporary:
        np.save(temporary, labels)


class FolderSource:
    """A folder of images as PyTorch users keep it: `root/split/class/*.jpeg`.

    Classes are numbered in the order of their folders' names.
    """

    several_labels = False

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

    def labels(self) -> np.ndarray:
        return np.array([label for _, label in self._files], np.int32)

    def fetch(self, indices: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        files = [self._files[index] for index in indices.tolist()]
        labels = np.array([label for _, label in files], np.int32)
        return [path.read_bytes() for path, _ in files], labels


class Subset:
    """Some of the examples of another source."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.num_classes, self.several_labels = source.num_classes, source.several_labels
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def places(self, indices: np.ndarray) -> np.ndarray:
        return self._source.places(self._indices[indices])

    def file_names(self, indices: np.ndarray) -> list[str]:
        return self._source.file_names(self._indices[indices])

    def labels(self) -> np.ndarray:
        return self._source.labels()[self._indices]

    def fetch(self, indices: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        return self._source.fetch(self._indices[indices])
