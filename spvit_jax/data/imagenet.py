"""ImageNet-1K's archives, made into TFDS's `imagenet2012` one shard after the other.

TFDS makes a data set in one go and begins anew after an interruption, which for ImageNet costs
hours and twice the disk. Here the archives' tables of contents are read first; with them it is
known which image goes where, and each shard is written for good. What comes out is what TFDS's own
builder makes, record for record: its features, its corrections of the odd files, its order, and
its metadata. Images are read from all over the archives, which a disk that has to move an arm does
slowly.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import pathlib
import shutil
import sys
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import file_adapters, hashing
from tensorflow_datasets.core.utils import shard_utils
from tensorflow_datasets.datasets.imagenet2012 import imagenet_common
from tqdm import tqdm

from spvit_jax.data.sources import builder_of, labels_file, only_one_process, save_labels
from spvit_jax.errors import InputError

NAME = "imagenet2012"
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Archive:
    """What is published: a file of a known size with a known number of images."""

    file_name: str
    num_bytes: int
    num_images: int


ARCHIVES = {
    "train": Archive("ILSVRC2012_img_train.tar", 147_897_477_120, 1_281_167),
    "validation": Archive("ILSVRC2012_img_val.tar", 6_744_924_160, 50_000),
}


class Image(NamedTuple):
    """Where an image lies in an archive, and its class by name."""

    file_name: str
    label: str
    offset: int
    num_bytes: int


def prepare(
    manual_dir: pathlib.Path,
    data_dir: pathlib.Path,
    *,
    partial: bool = False,
    num_shards: int | None = None,
) -> tfds.core.DatasetBuilder:
    """Makes the data set of the archives, or goes on where an earlier call was interrupted.

    Args:
      manual_dir: holds the archives.
      data_dir: of TFDS.
      partial: whether archives that are smaller than the published ones will do, or only one.
      num_shards: of each split; as TFDS decides if None.

    Returns:
      The builder of the data set, which is prepared.

    Raises:
      InputError: an archive is missing, cut off or not ImageNet's, or the disk is full.
    """
    builder = builder_of(NAME, str(data_dir))
    if builder.is_prepared():
        return builder
    found = {
        split: images_of(manual_dir / archive.file_name, split, builder, partial=partial)
        for split, archive in ARCHIVES.items()
        if (manual_dir / archive.file_name).exists() or not partial
    }
    if not found:
        files = " and ".join(archive.file_name for archive in ARCHIVES.values())
        raise InputError(f"{manual_dir} holds neither {files}")

    final = pathlib.Path(builder.data_dir)
    # What was begun is gone on with if it was of the same files.
    contents = zlib.crc32(repr((num_shards, found)).encode())
    growing = final.with_name(f"{final.name}.unfinished-{contents:08x}")
    with only_one_process(data_dir):
        builder = builder_of(NAME, str(data_dir))
        if builder.is_prepared():  # by another process, meanwhile
            return builder
        growing.mkdir(parents=True, exist_ok=True)
        _check_space(growing, found)
        infos = [
            _write_split(builder, manual_dir, growing, split, images, num_shards)
            for split, images in found.items()
        ]
        builder.info.set_splits(tfds.core.splits.SplitDict(infos))
        builder.info.write_to_directory(growing)
        growing.rename(final)
    return builder_of(NAME, str(data_dir))


def images_of(
    path: pathlib.Path, split: str, builder: tfds.core.DatasetBuilder, *, partial: bool
) -> list[Image]:
    """Reads the table of contents of an archive, and checks that all of ImageNet is there.

    Raises:
      InputError: it is missing, cut off, or has other files than it should.
    """
    expected = ARCHIVES[split]
    if not path.exists():
        raise InputError(f"{path} is not there; register at https://image-net.org to download it")
    size = path.stat().st_size
    if size != expected.num_bytes and not partial:
        raise InputError(
            f"{path} has {size} bytes; expected {expected.num_bytes}: download it again, or pass "
            "--partial to try things out on a part of ImageNet"
        )
    try:
        images = list(_train_images(path) if split == "train" else _validation_images(path))
    except tarfile.TarError as error:
        raise InputError(f"{path} cannot be read to its end: {error}; download it again") from error

    classes = builder.info.features["label"].names
    found = collections.Counter(image.label for image in images)
    if unknown := sorted(found.keys() - set(classes)):
        raise InputError(
            f"{path} holds {unknown[0]!r}, which is none of ImageNet's {len(classes)} classes"
        )
    if not images:
        raise InputError(f"{path} holds no images")
    name, times = collections.Counter(image.file_name for image in images).most_common(1)[0]
    if times > 1:
        raise InputError(f"{path} holds {name!r} {times} times; every file has a name of its own")
    complete = len(images) == expected.num_images and len(found) == len(classes)
    if not complete and not partial:
        raise InputError(
            f"{path} holds {len(images)} images of {len(found)} classes; expected "
            f"{expected.num_images} of {len(classes)}"
        )
    return images


def _train_images(path: pathlib.Path) -> Iterator[Image]:
    """Yields the images of an archive of archives, one for each class."""
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as outer:
        for member in tqdm(
            outer, desc=f"reading {path.name}", unit=" classes", total=1000, disable=_no_bar()
        ):
            if not member.isfile():
                continue
            inside = _Window(file, member.offset_data, member.size)
            with tarfile.open(fileobj=inside, mode="r:") as inner:
                for image in inner:
                    if image.isfile():
                        offset = member.offset_data + image.offset_data
                        yield Image(
                            image.name, member.name.removesuffix(".tar"), offset, image.size
                        )


def _validation_images(path: pathlib.Path) -> Iterator[Image]:
    labels = imagenet_common.get_validation_labels(path)
    with tarfile.open(path, mode="r:") as archive:
        for image in archive:
            if image.isfile():
                label = labels.get(image.name, "an image that is not in the list of labels")
                yield Image(image.name, label, image.offset_data, image.size)


class _Window(io.RawIOBase):
    """A part of a file as a file of its own, for an archive in an archive."""

    def __init__(self, file: BinaryIO, start: int, length: int):
        super().__init__()
        self._file, self._start, self._length, self._place = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._length}[whence]
        self._place = base + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._place))
        self._file.seek(self._start + self._place)
        data = self._file.read(count)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


def _check_space(directory: pathlib.Path, found: dict[str, list[Image]]) -> None:
    """Raises an `InputError` if what is still to be written is more than the disk has left."""
    needed = sum(image.num_bytes for images in found.values() for image in images)
    for path in directory.glob(".*.partial"):  # left by a process that was killed
        path.unlink()
    written = sum(path.stat().st_size for path in directory.iterdir())
    free = shutil.disk_usage(directory).free
    if needed - written > free:
        raise InputError(
            f"{directory} needs {(needed - written) / _GIB:.1f} GiB and its disk has "
            f"{free / _GIB:.1f} left; make room, or choose another --data_dir"
        )


def _write_split(
    builder: tfds.core.DatasetBuilder,
    manual_dir: pathlib.Path,
    directory: pathlib.Path,
    split: str,
    images: list[Image],
    num_shards: int | None,
) -> tfds.core.SplitInfo:
    """Writes the shards of a split that are not there yet, and the labels in their order."""
    hasher = hashing.Hasher(split)  # TFDS's order: that of the hashed names
    images = sorted(images, key=lambda image: hasher.hash_key(image.file_name))
    num_bytes = sum(image.num_bytes for image in images)
    count = shard_utils.ShardConfig(num_shards=num_shards).get_number_shards(num_bytes, len(images))
    ends = shard_utils.get_shard_boundaries(len(images), count)
    starts = [0, *ends[:-1]]
    template = tfds.core.ShardedFileTemplate(
        data_dir=directory, dataset_name=NAME, split=split, filetype_suffix="array_record"
    )
    bar = tqdm(total=num_bytes, desc=split, unit="B", unit_scale=True, disable=_no_bar())
    with (manual_dir / ARCHIVES[split].file_name).open("rb") as archive, bar:
        for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
            path = pathlib.Path(template.sharded_filepath(shard_index=index, num_shards=count))
            if not path.exists():
                _write_shard(builder, archive, images[start:end], path)
            bar.update(sum(image.num_bytes for image in images[start:end]))
    to_number = builder.info.features["label"].str2int
    labels = np.array([to_number(image.label) for image in images], np.int32)
    save_labels(directory / labels_file(builder, split).name, labels)
    return tfds.core.SplitInfo(
        name=split,
        shard_lengths=[end - start for start, end in zip(starts, ends, strict=True)],
        num_bytes=num_bytes,
        filename_template=template,
    )


def _write_shard(builder: Any, archive: BinaryIO, images: list[Image], path: pathlib.Path) -> None:
    """Writes one file of records, whole or not at all."""

    def records() -> Iterator[tuple[str, bytes]]:
        for image in images:
            archive.seek(image.offset)
            content: BinaryIO = io.BytesIO(archive.read(image.num_bytes))
            # A few files of the train split are CMYK, and one is a PNG.
            content = builder._fix_image(image.file_name, content)
            example = {"file_name": image.file_name, "image": content, "label": image.label}
            yield image.file_name, builder.info.features.serialize_example(example)

    temporary = path.with_name(f".{path.name}.partial")
    try:
        file_adapters.ArrayRecordFileAdapter.write_examples(temporary, records())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # the latter is ArrayRecord's
        temporary.unlink(missing_ok=True)
        raise InputError(
            f"cannot write {path}: {error}; what is finished is kept, and the same command goes on"
        ) from error


def _no_bar() -> bool:
    return not sys.stderr.isatty()
