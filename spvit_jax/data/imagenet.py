"""Resumable conversion of ImageNet-1K's archives to TFDS's `imagenet2012`, shard by shard.

TFDS makes a data set in one pass and begins anew after an interruption, which for ImageNet costs
hours and twice the disk. Here the archives' tables of contents are read first; they give the images
of each shard, so that each is written once. The result is that of TFDS's own builder, record for
record: its features, its corrections of CMYK and PNG files, its order, and its metadata. Reads are
in random order over the archives, which is slow on a hard disk.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import io
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import hashing
from tensorflow_datasets.core.utils import shard_utils
from tqdm import tqdm

from spvit_jax import paths
from spvit_jax.data import records
from spvit_jax.data.sources import (
    LAST_FILES,
    builder_of,
    labels_file,
    preparation_lock,
    save_labels,
)
from spvit_jax.data.tensorflow import tf
from spvit_jax.errors import InputError

NAME = "imagenet2012"


@dataclasses.dataclass(frozen=True)
class Archive:
    """Published archive of one split of ImageNet.

    Attributes:
      file_name: name of the file.
      num_bytes: size of the file in bytes.
      num_images: number of images in it.
    """

    file_name: str
    num_bytes: int
    num_images: int


ARCHIVES = {
    "train": Archive("ILSVRC2012_img_train.tar", 147_897_477_120, 1_281_167),
    "validation": Archive("ILSVRC2012_img_val.tar", 6_744_924_160, 50_000),
}


class Image(NamedTuple):
    """Position and class of an image in an archive.

    Attributes:
      file_name: name of the image's file.
      label: name of its class, a WordNet id.
      offset: first byte of the image in the archive.
      num_bytes: size of the image in bytes.
    """

    file_name: str
    label: str
    offset: int
    num_bytes: int


def prepare(
    manual_dir: epath.Path,
    data_dir: epath.Path,
    *,
    partial: bool = False,
    num_shards: int | None = None,
) -> tfds.core.DatasetBuilder:
    """Makes the data set from the archives, or resumes after an interruption.

    Args:
      manual_dir: folder of the archives.
      data_dir: folder of the TFDS data sets.
      partial: whether to accept a single archive, or archives smaller than the published ones.
      num_shards: number of shards of each split; None for TFDS's choice.

    Returns:
      The builder of the prepared data set.

    Raises:
      InputError: an archive is missing, cut off or not ImageNet's, or the disk is full.
    """
    archives = {split: manual_dir / archive.file_name for split, archive in ARCHIVES.items()}
    builder = builder_of(NAME, str(data_dir))
    if not builder.is_prepared():
        if partial:
            archives = {split: path for split, path in archives.items() if path.exists()}
        if not archives:
            files = " and ".join(archive.file_name for archive in ARCHIVES.values())
            raise InputError(f"{manual_dir} holds neither {files}")
        for split, path in archives.items():
            _check_file(path, ARCHIVES[split], partial)
        with preparation_lock(data_dir):
            builder = builder_of(NAME, str(data_dir))
            if not builder.is_prepared():  # by another process in the meantime
                _make(builder, archives, num_shards, partial)
        builder = builder_of(NAME, str(data_dir))
    if not partial:
        check_complete(builder)
    return builder


def check_complete(builder: tfds.core.DatasetBuilder) -> None:
    """Raises an `InputError` if a prepared data set holds only a part of ImageNet."""
    for split, archive in ARCHIVES.items():
        splits = builder.info.splits
        found = splits[split].num_examples if split in splits else 0
        if found != archive.num_images:
            raise InputError(
                f"{builder.data_dir} holds a part of ImageNet, {found} {split} images; expected "
                f"{archive.num_images}: pass --partial to go on with it, or remove it, or choose "
                "another --data_dir"
            )


def _check_file(path: epath.Path, archive: Archive, partial: bool) -> None:
    """Raises an `InputError` if an archive is missing or has not the published size."""
    if not path.exists():
        raise InputError(f"{path} is not there; register at https://image-net.org to download it")
    if not path.is_file():
        raise InputError(f"{path} is not a file; expected the archive as it was downloaded")
    size = paths.size(path)
    if size != archive.num_bytes and not partial:
        raise InputError(
            f"{path} has {size} bytes; expected {archive.num_bytes}: download it again, or pass "
            "--partial to try things out on a part of ImageNet"
        )


def _make(
    builder: tfds.core.DatasetBuilder,
    archives: dict[str, epath.Path],
    num_shards: int | None,
    partial: bool,
) -> None:
    """Makes the data set from the archives, or resumes an unfinished one."""
    # Validation first: its table of contents is read in a moment, and may show an error.
    contents = {split: _contents(path, split) for split, path in reversed(archives.items())}
    found = {split: contents[split] for split in archives}
    for split, images in found.items():
        _check_contents(archives[split], split, images, builder, partial=partial)
    final = epath.Path(builder.data_dir)
    # An unfinished folder is resumed only if it was made from the same files.
    key = zlib.crc32(repr((num_shards, found)).encode())
    unfinished = final.with_name(f"{final.name}.unfinished-{key:08x}")
    unfinished.mkdir(parents=True, exist_ok=True)
    for path in unfinished.glob(".*.partial"):  # left by a process that was killed
        path.unlink()
    needed = sum(image.num_bytes for images in found.values() for image in images)
    written = sum(paths.size(path) for path in unfinished.glob("*"))
    records.check_space(unfinished, needed - written)
    infos = [
        _write_split(builder, archives[split], unfinished, split, images, num_shards)
        for split, images in found.items()
    ]
    builder.info.set_splits(tfds.core.splits.SplitDict(infos))
    builder.info.write_to_directory(unfinished)
    paths.move_folder(unfinished, final, last=LAST_FILES)


def _check_contents(
    path: epath.Path,
    split: str,
    images: list[Image],
    builder: tfds.core.DatasetBuilder,
    *,
    partial: bool,
) -> None:
    """Raises an `InputError` if an archive's images are not ImageNet's, or not all of them."""
    if not images:
        raise InputError(f"{path} holds no images")
    name, times = collections.Counter(image.file_name for image in images).most_common(1)[0]
    if times > 1:
        raise InputError(f"{path} holds {name!r} {times} times; every file has a name of its own")
    classes = builder.info.features["label"].names
    found = collections.Counter(image.label for image in images)
    if unknown := sorted(found.keys() - set(classes)):
        raise InputError(
            f"{path} holds {unknown[0]!r}, which is none of ImageNet's {len(classes)} classes"
        )
    expected = ARCHIVES[split]
    complete = len(images) == expected.num_images and len(found) == len(classes)
    if not complete and not partial:
        raise InputError(
            f"{path} holds {len(images)} images of {len(found)} classes; expected "
            f"{expected.num_images} of {len(classes)}"
        )


def check_validation_archive(manual_dir: epath.Path) -> None:
    """Checks the validation archive, if it exists, for data sets that TFDS itself makes from it.

    Raises:
      InputError: the archive is cut off, or has other files than ImageNet's.
    """
    archive = ARCHIVES["validation"]
    path = manual_dir / archive.file_name
    if path.exists():
        _check_file(path, archive, partial=True)
        _contents(path, "validation")


def _contents(path: epath.Path, split: str) -> list[Image]:
    """Returns the images of an archive from its table of contents."""
    try:
        return list(_train_images(path) if split == "train" else _validation_images(path))
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{path} cannot be read to its end: {error}; download it again") from error


def _train_images(path: epath.Path) -> Iterator[Image]:
    """Yields the images of the training archive, which holds one archive for each class."""
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as outer:
        for member in tqdm(
            outer,
            desc=f"reading {path.name}",
            unit=" classes",
            total=1000,
            disable=records.hide_progress(),
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


def _validation_images(path: epath.Path) -> Iterator[Image]:
    """Yields the images of the validation archive, with classes by their files' names."""
    labels = validation_labels()
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
        images = [image for image in archive if image.isfile()]
    expected = list(labels)[: len(images)]
    if others := sorted({image.name for image in images} - set(expected)):
        raise InputError(
            f"{path} holds {others[0]!r}; expected files {expected[0]} to {expected[-1]}, since "
            "TFDS labels them by their order: a part of ImageNet has the first ones, as they were "
            "named"
        )
    for image in images:
        yield Image(image.name, labels[image.name], image.offset_data, image.size)


@functools.cache
def validation_labels() -> dict[str, str]:
    """Returns the classes of all validation images by file name, in the order of the names.

    They are read from a list that comes with TFDS.
    """
    path = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")
    wnids = path.read_text().split()
    return {f"ILSVRC2012_val_{i:08}.JPEG": wnid for i, wnid in enumerate(wnids, start=1)}


def label_check(builder: tfds.core.DatasetBuilder) -> Callable[[str, bytes], None]:
    """Returns a function that checks the label of a record made by TFDS's own builder.

    TFDS labels validation images by their order in the archive, so that images of a part of the
    archive, or under other names, get wrong labels.

    Args:
      builder: builder of the prepared data set.

    Returns:
      A function of a split's name and a serialised example that raises an `InputError` if the
      label is not that of the example's file name.
    """
    labels, features = validation_labels(), builder.info.features
    decoders = {"image": tfds.decode.SkipDecoding()}

    def check(split: str, record: bytes) -> None:
        if split != "validation":
            return
        example = features.deserialize_example_np(record, decoders=decoders)
        name = example["file_name"].decode()
        label = features["label"].int2str(int(example["label"]))
        if labels.get(name) != label:
            raise InputError(
                f"{builder.data_dir} has the label {label} for {name!r}; expected "
                f"{labels.get(name, 'no image of this name')}: TFDS has made it of a part of the "
                "validation archive or of files with other names; make it of the whole archive"
            )

    return check


class _Window(io.RawIOBase):
    """Read-only view of a byte range of a file as a file, for an archive in an archive."""

    def __init__(self, file: BinaryIO, start: int, length: int):
        super().__init__()
        self._file, self._start, self._length, self._position = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._position))
        self._file.seek(self._start + self._position)
        data = self._file.read(count)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _write_split(
    builder: tfds.core.DatasetBuilder,
    archive_path: epath.Path,
    directory: epath.Path,
    split: str,
    images: list[Image],
    num_shards: int | None,
) -> tfds.core.SplitInfo:
    """Writes the missing shards of a split, and a file of its labels."""
    hasher = hashing.Hasher(split)  # TFDS orders examples by the hashes of their names
    images = sorted(images, key=lambda image: hasher.hash_key(image.file_name))
    num_bytes = sum(image.num_bytes for image in images)
    count = shard_utils.ShardConfig(num_shards=num_shards).get_number_shards(num_bytes, len(images))
    ends = shard_utils.get_shard_boundaries(len(images), count)
    starts = [0, *ends[:-1]]
    template = tfds.core.ShardedFileTemplate(
        data_dir=directory, dataset_name=NAME, split=split, filetype_suffix="array_record"
    )
    bar = tqdm(
        total=num_bytes, desc=split, unit="B", unit_scale=True, disable=records.hide_progress()
    )
    with archive_path.open("rb") as archive, bar:
        for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
            path = epath.Path(template.sharded_filepath(shard_index=index, num_shards=count))
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


def _write_shard(builder: Any, archive: BinaryIO, images: list[Image], path: epath.Path) -> None:
    """Writes one shard of a split, whole or not at all."""

    def examples() -> Iterator[tuple[str, bytes]]:
        for image in images:
            archive.seek(image.offset)
            content: BinaryIO = io.BytesIO(archive.read(image.num_bytes))
            try:  # A few files of the train split are CMYK, and one is a PNG.
                content = builder._fix_image(image.file_name, content)
            except tf.errors.OpError as error:
                raise InputError(
                    f"{image.file_name} in {archive.name} cannot be decoded, as it has to be to "
                    "become an RGB JPEG; download the archive again"
                ) from error
            example = {"file_name": image.file_name, "image": content, "label": image.label}
            yield image.file_name, builder.info.features.serialize_example(example)

    records.write(path, examples())
