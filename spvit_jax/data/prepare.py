"""Makes a TFDS data set ready for training, and says what it made.

    python -m spvit_jax.data.prepare --dataset=imagenet2012 --manual_dir=/archives --data_dir=/data
    python -m spvit_jax.data.prepare --dataset=imagenet2012_real --manual_dir=/archives
    python -m spvit_jax.data.prepare --dataset=imagenet_v2/matched-frequency
    python -m spvit_jax.data.prepare --dataset=imagenet2012 --data_dir=DATA

For `imagenet2012` it reads `ILSVRC2012_img_train.tar` and `ILSVRC2012_img_val.tar`, checks that
they are whole, and goes on where it was interrupted; `--partial` takes smaller ones, for trying
things out. ImageNet-ReaL needs the second archive, and its labels are downloaded; ImageNet-V2 is
downloaded, as are other data sets of TFDS. Where TFDS has prepared a data set in DATA as TFRecord,
its default, ArrayRecord files are added, without the archives.
"""

from __future__ import annotations

import pathlib
import sys

import numpy as np
import tensorflow_datasets as tfds
from absl import flags

from spvit_jax import cli
from spvit_jax.data import imagenet, records
from spvit_jax.data.sources import TfdsSource, builder_of, label_feature, only_one_process
from spvit_jax.data.tensorflow import tf
from spvit_jax.errors import InputError


def prepare(
    name: str, manual_dir: pathlib.Path | None, data_dir: pathlib.Path, *, partial: bool = False
) -> tfds.core.DatasetBuilder:
    """Makes a data set ready, unless it is.

    Args:
      name: of TFDS.
      manual_dir: holds archives that have to be downloaded by hand, where the data set has such.
      data_dir: where TFDS data sets are kept.
      partial: for imagenet2012, whether a part of it will do.

    Raises:
      InputError: there is no such data set, it has no images, an archive or a file of what was
        prepared is missing or damaged, or the disk is full or cannot be written.
    """
    try:
        builder = builder_of(name, str(data_dir))
        label_feature(name, builder)
        if builder.is_prepared():
            return _converted(builder, name, data_dir, partial)
        if name == imagenet.NAME and manual_dir is not None:
            return imagenet.prepare(manual_dir, data_dir, partial=partial)
        return _made_by_tfds(builder, name, manual_dir, data_dir)
    except OSError as error:
        raise InputError(f"data set {name!r} cannot be prepared in {data_dir}: {error}") from error


def _converted(
    builder: tfds.core.DatasetBuilder, name: str, data_dir: pathlib.Path, partial: bool
) -> tfds.core.DatasetBuilder:
    """Adds ArrayRecord files to a data set that was prepared without them."""
    check_label = None
    if builder.name == imagenet.NAME:
        check_label = imagenet.label_check(builder)
        if not partial:
            imagenet.check_complete(builder)
    if not records.is_converted(builder):
        with only_one_process(data_dir):
            records.convert(builder, check_label)
    return builder_of(name, str(data_dir))


def _made_by_tfds(
    builder: tfds.core.DatasetBuilder,
    name: str,
    manual_dir: pathlib.Path | None,
    data_dir: pathlib.Path,
) -> tfds.core.DatasetBuilder:
    """Has TFDS make a data set."""
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS and manual_dir is None:
        wanted = " ".join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
        raise InputError(f"data set {name!r} needs --manual_dir=DIR: {wanted}")
    if manual_dir is not None:
        imagenet.check_validation_archive(manual_dir)
    try:
        with only_one_process(data_dir):
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(manual_dir=manual_dir)
            )
    except (AssertionError, ValueError, RuntimeError, tf.errors.OpError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"data set {name!r} cannot be prepared: {error}") from error
    return builder


def describe(name: str, data_dir: pathlib.Path) -> str:
    """Returns what a data set that is ready holds: counts, bytes, and one image, decoded."""
    info = builder_of(name, str(data_dir)).info
    lines = [f"{name:15} {info.data_dir}"]
    for split, found in info.splits.items():
        source = TfdsSource(name, split, str(data_dir))
        size = sum(path.stat().st_size for path in map(pathlib.Path, found.filepaths))
        lines.append(
            f"{split:15} {len(source)} examples of {source.num_classes} classes, "
            f"{len(found.shard_lengths)} files, {size} bytes"
        )
        (encoded,), labels = source.fetch(np.array([0]))
        right = np.flatnonzero(labels[0]).tolist() if source.several_labels else labels.tolist()
        lines.append(
            f"{'':15} the first: {_look_of(encoded)}, label {', '.join(map(str, right)) or 'none'}"
        )
    return "\n".join(lines)


def _look_of(encoded: bytes) -> str:
    """Returns an image's size and mean in words."""
    try:
        image = tf.io.decode_image(encoded, expand_animations=False).numpy()
    except tf.errors.OpError:
        return f"{len(encoded)} bytes that cannot be decoded"
    return f"{'×'.join(map(str, image.shape))} pixels of mean {image.mean():.1f}"


def main() -> None:
    """Defines the flags and runs the command."""
    name = flags.DEFINE_string("dataset", imagenet.NAME, "Of TFDS.")
    manual_dir = flags.DEFINE_string("manual_dir", None, "Folder of the archives.")
    data_dir = flags.DEFINE_string("data_dir", "data", "Where TFDS data sets are kept.")
    partial = flags.DEFINE_bool("partial", False, "Take a part of imagenet2012.")

    def run() -> None:
        folder = None if manual_dir.value is None else pathlib.Path(manual_dir.value)
        if folder is not None and not folder.is_dir():
            raise InputError(f"--manual_dir={folder} is not a folder")
        prepare(name.value, folder, pathlib.Path(data_dir.value), partial=partial.value)
        print(describe(name.value, pathlib.Path(data_dir.value)))
        sys.stdout.flush()

    cli.run(run)


if __name__ == "__main__":
    main()
