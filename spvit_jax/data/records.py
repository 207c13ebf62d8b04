"""Files of records: atomic writes and checks of ArrayRecord, and conversion from TFRecord.

ImageNet's records are made in `imagenet.py`; records are read in `sources.py`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import dataset_info
from tensorflow_datasets.core.file_adapters import ADAPTER_FOR_FORMAT, FileFormat
from tqdm import tqdm

from spvit_jax import atomic, paths
from spvit_jax.data.tensorflow import tf
from spvit_jax.errors import InputError

_GIB = 2**30
_UNREADABLE = (OSError, RuntimeError, ValueError)  # raised by ArrayRecord and Parquet


class RecordFile(Protocol):
    """File of records and the number of records that it should hold; TFDS's `FileInstruction`.

    Attributes:
      filename: path of the file.
      examples_in_shard: number of records.
    """

    filename: str
    examples_in_shard: int


def write(path: epath.Path, records: Iterable[tuple[str, bytes]]) -> None:
    """Writes an ArrayRecord file, whole or not at all.

    Args:
      path: path of the file.
      records: pairs of a key, which is not written, and a record.

    Raises:
      InputError: the file cannot be written.
    """
    try:
        with _temporary(path) as temporary:
            ADAPTER_FOR_FORMAT[FileFormat.ARRAY_RECORD].write_examples(temporary, records)
    except (OSError, RuntimeError) as error:  # RuntimeError is ArrayRecord's
        raise InputError(
            f"cannot write {path}: {error}; what is finished is kept, and the same command goes on"
        ) from error


@contextlib.contextmanager
def _temporary(path: epath.Path) -> Iterator[os.PathLike[str]]:
    """Yields a temporary path for a file, and gives it its name.

    On this machine it is always the same one: a file may be large, and what a killed process left
    is overwritten.
    """
    if paths.is_remote(path):
        with atomic.replacing(path) as temporary:
            yield temporary
        return
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_space(directory: epath.Path, needed: int) -> None:
    """Raises an `InputError` if a directory's disk has less than `needed` bytes free."""
    free = paths.free_space(directory)
    if free is not None and needed > free:
        raise InputError(
            f"{directory} needs {needed / _GIB:.1f} GiB and its disk has {free / _GIB:.1f} left; "
            "make room, or choose another --data_dir"
        )


def check_files(files: Sequence[RecordFile], file_format: FileFormat) -> None:
    """Checks that files of records exist and are complete, by their indices alone.

    Raises:
      InputError: a file is missing or cut off, or holds another number of records than it should.
    """
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        problems = pool.map(lambda file: _problem_of(file, file_format), files)
        for file, problem in zip(files, problems, strict=True):
            if problem is not None:
                raise InputError(
                    f"{file.filename} {problem}; copy it again, or remove its folder and prepare "
                    "the data set anew"
                )


def _problem_of(file: RecordFile, file_format: FileFormat) -> str | None:
    """Returns the problem of a file of records in words, or None if it is complete."""
    if not epath.Path(file.filename).is_file():
        return "is not there"
    try:
        found = ADAPTER_FOR_FORMAT[file_format].num_examples(file.filename)
    except _UNREADABLE as error:
        return f"is cut off or damaged: {error}"
    if found != file.examples_in_shard:
        return f"holds {found} records; expected {file.examples_in_shard}"
    return None


def is_converted(builder: tfds.core.DatasetBuilder) -> bool:
    """Returns whether a prepared data set has all its files in a format with random access."""
    if _prepared_as(builder) in FileFormat.with_random_access():
        return True
    known = builder.info.file_format == FileFormat.ARRAY_RECORD
    return known and not _unconverted(builder)


def convert(
    builder: tfds.core.DatasetBuilder, check_record: Callable[[str, bytes], None] | None = None
) -> None:
    """Adds ArrayRecord files to a data set that TFDS has prepared as TFRecord, its default.

    Records are copied unchanged, file by file, and the TFRecord files stay; ArrayRecord becomes an
    alternative format of the data set, in TFDS's terms. Complete ArrayRecord files are kept.

    Args:
      builder: builder of the prepared data set.
      check_record: function of a split's name and a record of it that raises for a wrong one.

    Raises:
      InputError: a file cannot be read to its end or written, or the disk is full.
    """
    directory = epath.Path(builder.data_dir)
    file_format = _prepared_as(builder)
    if file_format != FileFormat.TFRECORD:
        raise InputError(f"{directory} holds {file_format.value} files; expected tfrecord")
    missing = _unconverted(builder)
    for _, source, _ in missing:
        if not epath.Path(source.filename).is_file():
            raise InputError(f"{source.filename} is not there; copy it again")
    sizes = [paths.size(epath.Path(source.filename)) for _, source, _ in missing]
    check_space(directory, sum(sizes))
    bar = tqdm(
        total=sum(sizes), desc=builder.name, unit="B", unit_scale=True, disable=hide_progress()
    )
    with bar:
        for (split, source, target), size in zip(missing, sizes, strict=True):
            write(epath.Path(target.filename), _checked(_tf_records(source), split, check_record))
            bar.update(size)
    info = dataset_info.read_proto_from_builder_dir(directory)
    if FileFormat.ARRAY_RECORD.value not in info.alternative_file_formats:
        info.file_format = file_format.value  # TFDS did not always write it
        info.alternative_file_formats.append(FileFormat.ARRAY_RECORD.value)
        # Replaced atomically, since a data set without this file is lost.
        path = epath.Path(dataset_info.dataset_info_path(directory))
        atomic.write_text(path, dataset_info.get_dataset_info_json(info))


def _prepared_as(builder: tfds.core.DatasetBuilder) -> FileFormat:
    """Returns the file format that a data set was first prepared in."""
    info = dataset_info.read_proto_from_builder_dir(builder.data_dir)
    return FileFormat(info.file_format or FileFormat.TFRECORD)


def _unconverted(builder: tfds.core.DatasetBuilder) -> list[tuple[str, RecordFile, RecordFile]]:
    """Returns the splits, TFRecord files and ArrayRecord files to convert: (split, from, to)."""
    # Small splits first: their problems are found before hours are spent on large ones.
    splits = sorted(builder.info.splits.items(), key=lambda item: item[1].num_examples)
    return [
        (name, source, target)
        for name, split in splits
        for source, target in zip(
            _files(split, FileFormat.TFRECORD), _files(split, FileFormat.ARRAY_RECORD), strict=True
        )
        if _problem_of(target, FileFormat.ARRAY_RECORD) is not None
    ]


def _files(split: tfds.core.SplitInfo, file_format: FileFormat) -> list[RecordFile]:
    """Returns the files of a split in a file format."""
    template = split.filename_template.replace(filetype_suffix=file_format.file_suffix)
    return split.replace(filename_template=template).file_instructions


def _tf_records(file: RecordFile) -> Iterator[bytes]:
    """Yields all records of a TFRecord file."""
    found = 0
    try:
        with paths.local_copy(epath.Path(file.filename)) as path:
            for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
                found += 1
                yield record
    except tf.errors.OpError as error:
        raise InputError(
            f"{file.filename} cannot be read to its end: {error.message}; copy it again"
        ) from error
    if found != file.examples_in_shard:
        raise InputError(
            f"{file.filename} holds {found} records; expected {file.examples_in_shard}: "
            "copy it again"
        )


def _checked(
    records: Iterable[bytes], split: str, check_record: Callable[[str, bytes], None] | None
) -> Iterator[tuple[str, bytes]]:
    """Yields checked records with an empty key, as `write` takes them."""
    for record in records:
        if check_record is not None:
            check_record(split, record)
        yield "", record


def hide_progress() -> bool:
    """Returns whether to hide progress bars, which is when stderr is no terminal."""
    return not sys.stderr.isatty()
