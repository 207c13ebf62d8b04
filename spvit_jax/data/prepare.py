"""Prepares a TFDS data set for training, and prints its contents.

    python -m spvit_jax.data.prepare --dataset=imagenet2012 --manual_dir=/archives --data_dir=/data
    python -m spvit_jax.data.prepare --dataset=imagenet2012_real --manual_dir=/archives
    python -m spvit_jax.data.prepare --dataset=imagenet_v2/matched-frequency
    python -m spvit_jax.data.prepare --dataset=imagenet2012 --data_dir=DATA

`imagenet2012` is made from `ILSVRC2012_img_train.tar` and `ILSVRC2012_img_val.tar`, which must be
complete, and resumes after an interruption; `--partial` accepts smaller ones, for trying things
out. ImageNet-ReaL needs the second archive, and its labels are downloaded; ImageNet-V2 is
downloaded, as are other data sets of TFDS. Where TFDS has prepared a data set in DATA as TFRecord,
its default, ArrayRecord files are added, without the archives.
"""

from __future__ import annotations

import sys

import numpy as np
import tensorflow_datasets as tfds
from absl import flags
from etils import epath

from spvit_jax import cli, paths
from spvit_jax.data import imagenet, records
from spvit_jax.data.sources import (
    TfdsSource,
    builder_of,
    label_feature,
    preparation_lock,
    prepare_with_tfds,
)
from spvit_jax.data.tensorflow import tf
from spvit_jax.errors import InputError


def prepare(
    name: str, manual_dir: epath.Path | None, data_dir: epath.Path, *, partial: bool = False
) -> tfds.core.DatasetBuilder:
    """Prepares a data set for training, unless it is prepared, and returns its builder.

    Args:
      name: name of a TFDS data set.
      manual_dir: folder of the archives that have to be downloaded by hand, if any.
      data_dir: folder of the TFDS data sets.
      partial: for imagenet2012, whether to accept a part of it.

    Raises:
      InputError: the data set does not exist or has no images, an archive or a prepared file is
        missing or damaged, or the disk is full or cannot be written.
    """
    try:
        builder = builder_of(name, str(data_dir))
        label_feature(name, builder)
        if builder.is_prepared():
            return _add_array_records(builder, name, data_dir, partial)
        if name == imagenet.NAME and manual_dir is not None:
            return imagenet.prepare(manual_dir, data_dir, partial=partial)
        return _prepare_with_tfds(builder, name, manual_dir, data_dir)
    except OSError as error:
        raise InputError(f"data set {name!r} cannot be prepared in {data_dir}: {error}") from error


def _add_array_records(
    builder: tfds.core.DatasetBuilder, name: str, data_dir: epath.Path, partial: bool
) -> tfds.core.DatasetBuilder:
    """Adds ArrayRecord files to a prepared data set that lacks them, and returns its builder."""
    check_label = None
    if builder.name == imagenet.NAME:
        check_label = imagenet.label_check(builder)
        if not partial:
            imagenet.check_complete(builder)
    if not records.is_converted(builder):
        with preparation_lock(data_dir):
            records.convert(builder, check_label)
    return builder_of(name, str(data_dir))


def _prepare_with_tfds(
    builder: tfds.core.DatasetBuilder,
    name: str,
    manual_dir: epath.Path | None,
    data_dir: epath.Path,
) -> tfds.core.DatasetBuilder:
    """Prepares a data set with TFDS itself, and returns its builder."""
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS and manual_dir is None:
        wanted = " ".join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
        raise InputError(f"data set {name!r} needs --manual_dir=DIR: {wanted}")
    if manual_dir is not None:
        imagenet.check_validation_archive(manual_dir)
    try:
        prepare_with_tfds(name, data_dir, manual_dir)
    except (AssertionError, ValueError, RuntimeError, tf.errors.OpError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"data set {name!r} cannot be prepared: {error}") from error
    return builder_of(name, str(data_dir))


def describe(name: str, data_dir: epath.Path) -> str:
    """Returns the contents of a prepared data set in words: counts, bytes, and its first image."""
    info = builder_of(name, str(data_dir)).info
    lines = [f"{name:15} {info.data_dir}"]
    for split, found in info.splits.items():
        source = TfdsSource(name, split, str(data_dir))
        size = sum(paths.size(path) for path in map(epath.Path, found.filepaths))
        lines.append(
            f"{split:15} {len(source)} examples of {source.num_classes} classes, "
            f"{len(found.shard_lengths)} files, {size} bytes"
        )
        (encoded,), labels = source.fetch(np.array([0]))
        numbers = np.flatnonzero(labels[0]).tolist() if source.several_labels else labels.tolist()
        lines.append(
            f"{'':15} the first: {_describe_image(encoded)}, "
            f"label {', '.join(map(str, numbers)) or 'none'}"
        )
    return "\n".join(lines)


def _describe_image(encoded: bytes) -> str:
    """Returns an encoded image's shape and mean in words."""
    try:
        image = tf.io.decode_image(encoded, expand_animations=False).numpy()
    except tf.errors.OpError:
        return f"{len(encoded)} bytes that cannot be decoded"
    return f"{'×'.join(map(str, image.shape))} pixels of mean {image.mean():.1f}"


def main() -> None:
    """Defines the flags of `spvit_jax.data.prepare` and runs it."""
    name = flags.DEFINE_string("dataset", imagenet.NAME, "Name of a TFDS data set.")
    manual_dir = flags.DEFINE_string("manual_dir", None, "Folder of the archives.")
    data_dir = flags.DEFINE_string("data_dir", "data", "Folder of the TFDS data sets.")
    partial = flags.DEFINE_bool("partial", False, "Accept a part of imagenet2012.")

    def run() -> None:
        folder = None if manual_dir.value is None else paths.parse(manual_dir.value)
        target = paths.parse_output(data_dir.value)
        if folder is not None and not folder.is_dir():
            raise InputError(f"--manual_dir={folder} is not a folder")
        prepare(name.value, folder, target, partial=partial.value)
        print(describe(name.value, target))
        sys.stdout.flush()

    cli.run(run)


if __name__ == "__main__":
    main()
