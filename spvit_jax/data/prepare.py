"""Makes a TFDS data set ready for training, and says what it made.

    python -m spvit_jax.data.prepare --dataset=imagenet2012 --manual_dir=/archives --data_dir=/data
    python -m spvit_jax.data.prepare --dataset=imagenet2012_real --manual_dir=/archives
    python -m spvit_jax.data.prepare --dataset=imagenet_v2/matched-frequency

For `imagenet2012` it reads `ILSVRC2012_img_train.tar` and `ILSVRC2012_img_val.tar`, checks that
they are whole, and goes on where it was interrupted; `--partial` takes smaller ones, for trying
things out. ImageNet-ReaL needs the second archive, and its labels are downloaded; ImageNet-V2 is
downloaded, as are other data sets of TFDS.
"""

from __future__ import annotations

import pathlib
import sys

import numpy as np
import tensorflow_datasets as tfds
from absl import flags

from spvit_jax import cli
from spvit_jax.data import imagenet
from spvit_jax.data.sources import TfdsSource, builder_of, only_one_process
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
      InputError: there is no such data set, an archive is missing or damaged, or the disk is full.
    """
    if name == imagenet.NAME and manual_dir is not None:
        return imagenet.prepare(manual_dir, data_dir, partial=partial)
    builder = builder_of(name, str(data_dir))
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS and manual_dir is None and not builder.is_prepared():
        wanted = " ".join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
        raise InputError(f"data set {name!r} needs --manual_dir=DIR: {wanted}")
    try:
        with only_one_process(data_dir):
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(manual_dir=manual_dir)
            )
    except (OSError, AssertionError, ValueError, RuntimeError, tf.errors.OpError) as error:
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
        image = tf.io.decode_image(encoded, expand_animations=False).numpy()
        right = np.flatnonzero(labels[0]).tolist() if source.several_labels else labels.tolist()
        lines.append(
            f"{'':15} the first: {'×'.join(map(str, image.shape))} pixels of mean "
            f"{image.mean():.1f}, label {', '.join(map(str, right)) or 'none'}"
        )
    return "\n".join(lines)


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
