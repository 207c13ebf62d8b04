"""Files of records: ArrayRecord written whole or not at all, checked, and made of TFRecord.

What is in the records and where it comes from is in `imagenet.py`, how they are read in
`sources.py`.
"""

from __future__ import annotations

import concurrent.futures
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import tensorflow_datasets as tfds
from tensorflow_datasets.core import dataset_info
from tensorflow_datasets.core.file_adapters import ADAPTER_FOR_FORMAT, FileFormat
from tqdm import tqdm

from spvit_jax.data.tensorflow import tf
from spvit_jax.errors import InputError

_GIB = 2**30
_UNREADABLE = (OSError, RuntimeError, ValueError)  # ArrayRecord's and Parquet's


class RecordFile(Protocol):
    """A file and how many records it should hold, as TFDS's `FileInstruction` says it."""

    filename: str
    examples_in_shard: int


def write(path: pathlib.Path, records: Iterable[tuple[str, bytes]]) -> None:
    """Writes an ArrayRecord file, whole or not at all.

    Args:
      path: of the file.
      records: pairs of a key, which is not written, and a record.

    Raises:
      InputError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        ADAPTER_FOR_FORMAT[FileFormat.ARRAY_RECORD].write_examples(temporary, records)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # the latter is ArrayRecord's
        raise InputError(
            f"cannot write {path}: {error}; what is finished is kept, and the same command goes on"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_space(directory: pathlib.Path, needed: int) -> None:
    """Raises an `InputError` if a disk has less than `needed` bytes left."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise InputError(
            f"{directory} needs {needed / _GIB:.1f} GiB and its disk has {free / _GIB:.1f} left; "
            "make room, or choose another --data_dir"
        )


def check_files(files: Sequence[RecordFile], file_format: FileFormat) -> None:
    """Checks by their indices that files of records are there and whole, without reading them.

    Raises:
      InputError: one is missing or cut off, or holds more or fewer records than it should.
    """
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        unreadable = pool.map(lambda file: _fault(file, file_format), files)
        for file, fault in zip(files, unreadable, strict=True):
            if fault is not None:
                raise InputError(
                    f"{file.filename} {fault}; copy it again, or remove its folder and prepare the "
                    "data set anew"
                )


def _fault(file: RecordFile, file_format: FileFormat) -> str | None:
    """Returns what is wrong with a file of records, if anything."""
    if not pathlib.Path(file.filename).is_file():
        return "is not there"
    try:
        found = ADAPTER_FOR_FORMAT[file_format].num_examples(file.filename)
    except _UNREADABLE as error:
        return f"is cut off or damaged: {error}"
    if found != file.examples_in_shard:
        return f"holds {found} records; expected {file.examples_in_shard}"
    return None


def is_converted(builder: tfds.core.DatasetBuilder) -> bool:
    """Returns whether there is nothing for `convert` to do for a data set that is prepared."""
    if _prepared_as(builder) in FileFormat.with_random_access():
        return True
    known = builder.info.file_format == FileFormat.ARRAY_RECORD
    return known and not _unconverted(builder)


def convert(
    builder: tfds.core.DatasetBuilder, check_record: Callable[[str, bytes], None] | None = None
) -> None:
    """Adds ArrayRecord files to a data set that TFDS has prepared as TFRecord, its default.

    The records are copied as they are, file by file, and the TFRecord files stay; in TFDS's words
    ArrayRecord becomes an alternative format of the data set. Files that are whole are kept.

    Args:
      builder: of the data set, which is prepared.
      check_record: called with a split's name and each record of it; raises for one that is wrong.

    Raises:
      InputError: a file cannot be read to its end or written, or the disk is full.
    """
    directory = pathlib.Path(builder.data_dir)
    file_format = _prepared_as(builder)
    if file_format != FileFormat.TFRECORD:
        raise InputError(f"{directory} holds {file_format.value} files; expected tfrecord")
    missing = _unconverted(builder)
    for _, source, _ in missing:
        if not pathlib.Path(source.filename).is_file():
            raise InputError(f"{source.filename} is not there; copy it again")
    sizes = [pathlib.Path(source.filename).stat().st_size for _, source, _ in missing]
    check_space(directory, sum(sizes))
    bar = tqdm(total=sum(sizes), desc=builder.name, unit="B", unit_scale=True, disable=no_bar())
    with bar:
        for (split, source, target), size in zip(missing, sizes, strict=True):
            write(pathlib.Path(target.filename), _checked(_tf_records(source), split, check_record))
            bar.update(size)
    info = dataset_info.read_proto_from_builder_dir(directory)
    if FileFormat.ARRAY_RECORD.value not in info.alternative_file_formats:
        info.file_format = file_format.value  # TFDS did not always write it
        info.alternative_file_formats.append(FileFormat.ARRAY_RECORD.value)
        # The file is replaced when it is whole: without it nothing is a data set any more.
        path = pathlib.Path(dataset_info.dataset_info_path(directory))
        temporary = path.with_name(f".{path.name}.partial")
        temporary.write_text(dataset_info.get_dataset_info_json(info))
        temporary.replace(path)


def _prepared_as(builder: tfds.core.DatasetBuilder) -> FileFormat:
    """Returns the format that a data set was first written in."""
    info = dataset_info.read_proto_from_builder_dir(builder.data_dir)
    return FileFormat(info.file_format or FileFormat.TFRECORD)


def _unconverted(builder: tfds.core.DatasetBuilder) -> list[tuple[str, RecordFile, RecordFile]]:
    """Returns the splits, TFRecord files and ArrayRecord files of which the last are not whole."""
    # Small splits first: what is wrong with them is found before hours are spent on large ones.
    splits = sorted(builder.info.splits.items(), key=lambda item: item[1].num_examples)
    return [
        (name, source, target)
        for name, split in splits
        for source, target in zip(
            _files(split, FileFormat.TFRECORD), _files(split, FileFormat.ARRAY_RECORD), strict=True
        )
        if _fault(target, FileFormat.ARRAY_RECORD) is not None
    ]


def _files(split: tfds.core.SplitInfo, file_format: FileFormat) -> list[RecordFile]:
    """Returns the files of a split as they are called in a format."""
    template = split.filename_template.replace(filetype_suffix=file_format.file_suffix)
    return split.replace(filename_template=template).file_instructions


def _tf_records(file: RecordFile) -> Iterator[bytes]:
    """Yields all records of a TFRecord file."""
    found = 0
    try:
        for record in tf.data.TFRecordDataset(file.filename).as_numpy_iterator():
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
    for record in records:
        if check_record is not None:
            check_record(split, record)
        yield "", record


def no_bar() -> bool:
    """Returns whether progress is shown to nobody."""
    return not sys.stderr.isatty()
