"""Sources of examples: splits of TFDS data sets, and subsets of another source.

Folders of images are in `folders.py`; data sets by name, and the parts of them that a run uses, in
`datasets.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.file_adapters import FileFormat
from tqdm import tqdm

from spvit_jax import atomic, paths
from spvit_jax.classes import ClassNames
from spvit_jax.data.digits import Digits
from spvit_jax.data.records import check_files
from spvit_jax.errors import InputError, nearest

# Files by which TFDS knows a prepared data set; written after all others where nothing is renamed.
LAST_FILES = ("features.json", "dataset_info.json")

_CHUNK = 1024  # records per read when all labels are read


class Source(Protocol):
    """Random access to examples: encoded images and their labels by index.

    Attributes:
      class_names: names of the C classes by number.
      num_classes: number of classes, C; labels are in 0 … C-1.
      several_labels: whether an image may have any number of labels rather than one.
    """

    class_names: ClassNames
    num_classes: int
    several_labels: bool

    def __len__(self) -> int: ...

    def places(self, indices: np.ndarray) -> np.ndarray:
        """Returns the indices [n] of examples [n] in the whole split, which index label maps."""
        ...

    def file_names(self, indices: np.ndarray) -> list[str]:
        """Returns the names of the image files of examples [n].

        Raises:
          InputError: the names are not known.
        """
        ...

    def labels(self) -> np.ndarray:
        """Returns the labels of all examples, in the form of `fetch`."""
        ...

    def fetch(self, indices: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        """Returns the encoded images and the labels of examples [n]; thread safe.

        Labels are int32 [n], or with `several_labels` uint8 [n, C], 1 for each label.
        """
        ...


class TfdsSource:
    """Split of a TFDS data set with random access to its ArrayRecord files.

    The label is the feature `label`, or in ImageNet-ReaL (arXiv 2006.07159) `real_label`.
    """

    def __init__(self, name: str, split: str, data_dir: str):
        self._name, self._split, self._data_dir = name, split, data_dir
        self._builder = prepared_builder(name, data_dir)
        self._label = label_feature(name, self._builder)
        self.several_labels = self._label == "real_label"
        label = self._builder.info.features[self._label]
        self.class_names: ClassNames = tuple(
            (label.feature if self.several_labels else label).names
        )
        self.num_classes = len(self.class_names)
        try:
            self._records: Any = self._builder.as_data_source(
                split, decoders={"image": tfds.decode.SkipDecoding()}
            )
        except NotImplementedError as error:
            raise InputError(
                f"data set {name!r} in {data_dir} is in {self._builder.info.file_format.value} "
                "files, which can only be read in order; add ArrayRecord files with "
                f"python -m spvit_jax.data.prepare --dataset={name} --data_dir={data_dir}"
            ) from error
        except (ValueError, KeyError) as error:
            splits = ", ".join(self._builder.info.splits)
            raise InputError(
                f"cannot open split {split!r} of data set {name!r}, which has {splits}: {error}"
            ) from error
        if not len(self._records):
            raise InputError(f"split {split!r} of data set {name!r} in {data_dir} is empty")
        info = self._builder.info
        check_files(info.splits[split].file_instructions, info.file_format)

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
        """Returns the labels of all examples, from a file that is made the first time."""
        infos = self._builder.info.splits
        parts = tfds.core.ReadInstruction.from_spec(self._split).to_absolute(infos)
        return np.concatenate([self._labels_of(p.splitname)[p.from_ : p.to] for p in parts])

    def _labels_of(self, split: str) -> np.ndarray:
        """Returns the labels of a whole split, from its file of labels or from the records."""
        path = labels_file(self._builder, split)
        if path.exists():
            with path.open("rb") as file:
                return np.load(file)
        whole = TfdsSource(self._name, split, self._data_dir)
        chunks = [
            whole.fetch(np.arange(start, min(start + _CHUNK, len(whole))))[1]
            for start in tqdm(
                range(0, len(whole), _CHUNK),
                desc=f"labels of {split}",
                disable=len(whole) < 50 * _CHUNK or not sys.stderr.isatty(),
            )
        ]
        labels = np.concatenate(chunks)
        with contextlib.suppress(OSError):  # in a read-only folder they are read each time
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
    """Returns the builder of a data set, which is prepared first where that needs no archives.

    Raises:
      InputError: the data set does not exist, or is not on disk and cannot be prepared.
    """
    try:
        builder = builder_of(name, data_dir)
        if not builder.is_prepared():
            label_feature(name, builder)
            if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
                raise InputError(
                    f"data set {name!r} is not in {data_dir}; make it of its archives with "
                    f"python -m spvit_jax.data.prepare --dataset={name} --manual_dir=DIR "
                    f"--data_dir={data_dir}"
                )
            prepare_with_tfds(name, epath.Path(data_dir))
            builder = builder_of(name, data_dir)
    except (OSError, AssertionError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"data set {name!r} is not in {data_dir} and cannot be prepared there: {error}"
        ) from error
    return builder


def builder_of(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """Returns the builder of a data set, prepared or not.

    Raises:
      InputError: the data set does not exist.
    """
    if name == Digits.name:
        return Digits(data_dir=data_dir, file_format="array_record")
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        if not builder.is_prepared():
            return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        hint = nearest(name, tfds.list_builders(with_community_datasets=False))
        raise InputError(f"unknown data set {name!r}{hint}") from error
    array_record = FileFormat.ARRAY_RECORD.value
    if array_record in builder.info.as_proto.alternative_file_formats:
        builder.info.set_file_format(array_record, override=True, override_if_initialized=True)
    return builder


def label_feature(name: str, builder: tfds.core.DatasetBuilder) -> str:
    """Returns the name of the feature that holds the labels of a data set.

    Raises:
      InputError: the data set does not have images with labels.
    """
    found = builder.info.features
    features = found if isinstance(found, tfds.features.FeaturesDict) else {}
    label = "real_label" if "real_label" in features and "label" not in features else "label"
    if "image" not in features or label not in features:
        raise InputError(
            f"data set {name!r} has the features {', '.join(sorted(features)) or found}; "
            "expected 'image' and 'label' among them"
        )
    kind = features[label].feature if label == "real_label" else features[label]
    if not isinstance(kind, tfds.features.ClassLabel):
        raise InputError(
            f"data set {name!r} has labels that are {kind}; expected classes (ClassLabel)"
        )
    return label


def prepare_with_tfds(
    name: str, data_dir: epath.Path, manual_dir: epath.Path | None = None
) -> None:
    """Prepares a data set with TFDS itself, unless another process has done so in the meantime.

    ArrayRecord is written on this machine only: files for a bucket are made in a temporary folder.

    Args:
      name: name of the data set.
      data_dir: folder of the TFDS data sets.
      manual_dir: folder of the archives that have to be downloaded by hand, if any.

    Raises:
      InputError: the directory cannot be written.
      Exception: whatever TFDS raises.
    """
    config = tfds.download.DownloadConfig(manual_dir=manual_dir)
    with preparation_lock(data_dir):
        if not paths.is_remote(data_dir):
            builder_of(name, str(data_dir)).download_and_prepare(download_config=config)
            return
        with tempfile.TemporaryDirectory(prefix="spvit_jax-") as folder:
            builder = builder_of(name, folder)
            builder.download_and_prepare(download_config=config)
            made = pathlib.Path(builder.data_dir)
            paths.put_folder(made, data_dir / str(made.relative_to(folder)), last=LAST_FILES)


@contextlib.contextmanager
def preparation_lock(directory: epath.Path) -> Iterator[None]:
    """Holds a lock in a directory, so that only one process at a time prepares data there.

    A bucket has no locks: of processes that prepare data there the first to write a file has it.

    Raises:
      InputError: the directory cannot be written.
    """
    if paths.is_remote(directory):
        yield
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(directory / ".lock", "w")  # noqa: SIM115 closed below
    except OSError as error:
        raise InputError(
            f"data cannot be prepared in {directory}: {error.strerror}; expected a folder that can "
            "be written, or made"
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def labels_file(builder: tfds.core.DatasetBuilder, split: str) -> epath.Path:
    """Returns the path of the file with a split's labels, beside its records."""
    return epath.Path(builder.data_dir) / f"labels-{split}.npy"


def save_labels(path: epath.Path, labels: np.ndarray) -> None:
    """Writes a file of labels, whole or not at all."""
    with atomic.replacing(path) as temporary:
        np.save(temporary, labels)


class Subset:
    """Subset of the examples of another source, in the order of `indices`."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.class_names, self.num_classes = source.class_names, source.num_classes
        self.several_labels = source.several_labels
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


class Renumbered:
    """Examples of another source, with classes numbered as in `class_names`."""

    def __init__(self, source: Source, class_names: ClassNames):
        """Renumbers the classes of a source, all of which are in `class_names`."""
        self.class_names, self.num_classes = class_names, len(class_names)
        self.several_labels = source.several_labels
        self._source = source
        numbers = {name: number for number, name in enumerate(class_names)}
        self._numbers = np.array([numbers[name] for name in source.class_names], np.int32)

    def __len__(self) -> int:
        return len(self._source)

    def places(self, indices: np.ndarray) -> np.ndarray:
        return self._source.places(indices)

    def file_names(self, indices: np.ndarray) -> list[str]:
        return self._source.file_names(indices)

    def labels(self) -> np.ndarray:
        return self._renumber(self._source.labels())

    def fetch(self, indices: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        images, labels = self._source.fetch(indices)
        return images, self._renumber(labels)

    def _renumber(self, labels: np.ndarray) -> np.ndarray:
        """Returns labels, in the form of `fetch`, by the new numbers."""
        if not self.several_labels:
            return self._numbers[labels]
        renumbered = np.zeros((len(labels), self.num_classes), labels.dtype)
        renumbered[:, self._numbers] = labels
        return renumbered
