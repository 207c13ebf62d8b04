"""Measures the time to the first batch when training starts at step 0 and at later ones.

    python -m benchmarks.start_step

Writes a million small records as TFDS keeps them, and takes the first batch at the first step, in
the middle of the first epoch, and in the three-hundredth. The records that were read are counted.
"""

from __future__ import annotations

import itertools
import pathlib
import statistics
import tempfile
import time

import numpy as np
import tensorflow_datasets as tfds
from absl import app
from array_record.python.array_record_module import ArrayRecordWriter

from spvit_jax.data import pipeline
from spvit_jax.data.crops import TrainTransform
from spvit_jax.data.sources import TfdsSource
from spvit_jax.data.tensorflow import tf

RECORDS = 1_000_000
BATCH = 256
STEPS = (0, RECORDS // BATCH // 2, 299 * RECORDS // BATCH)
ROUNDS = 3
NAME = "small_records"


def write(data_dir: pathlib.Path) -> None:
    """Writes a TFDS data set of grey images of one pixel, of ten brightnesses."""
    directory = data_dir / NAME / "1.0.0"
    directory.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(1, 1, 3)),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
    )
    records = [
        features.serialize_example({"image": np.full((1, 1, 3), 25 * k, np.uint8), "label": k})
        for k in range(10)
    ]
    template = tfds.core.ShardedFileTemplate(
        data_dir=directory, dataset_name=NAME, split="train", filetype_suffix="array_record"
    )
    path = template.sharded_filepath(shard_index=0, num_shards=1)
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in itertools.islice(itertools.cycle(records), RECORDS):
        writer.write(record)
    writer.close()
    split = tfds.core.SplitInfo(
        name="train", shard_lengths=[RECORDS], num_bytes=0, filename_template=template
    )
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=features,
        split_infos=[split],
        filename_template=template,
        check_data=False,  # it can check TFRecord alone
    )


class Counted(TfdsSource):
    """TFDS source that counts the records that are read.

    Attributes:
      read: number of records read so far.
    """

    read = 0

    def fetch(self, indices: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        """Returns the examples of the indices, and counts them."""
        self.read += len(indices)
        return super().fetch(indices)


def first_batch(data_dir: pathlib.Path, step: int) -> tuple[float, int]:
    """Returns the seconds until the first batch, and the number of records read for it."""
    start = time.monotonic()
    source = Counted(NAME, "train", str(data_dir))
    with pipeline.train_batches(
        source, TrainTransform((8, 8)), batch_size=BATCH, seed=0, start_step=step
    ) as batches:
        next(batches)
        seconds = time.monotonic() - start
    return seconds, source.read


def main(argv: list[str]) -> None:
    """Runs `python -m benchmarks.start_step`: prints a line for each step to start at."""
    del argv
    tf.constant(0)  # starts TensorFlow
    with tempfile.TemporaryDirectory() as folder:
        write(pathlib.Path(folder))
        measured: dict[int, list[tuple[float, int]]] = {step: [] for step in STEPS}
        for _ in range(ROUNDS):
            for step in STEPS:
                measured[step].append(first_batch(pathlib.Path(folder), step))
    for step, rounds in measured.items():
        seconds, read = (statistics.median(values) for values in zip(*rounds, strict=True))
        print(
            f"step {step:8}, after {step * BATCH:12} records: {seconds:.2f} s, {read:.0f} "
            f"of {RECORDS} records read"
        )


if __name__ == "__main__":
    app.run(main)
