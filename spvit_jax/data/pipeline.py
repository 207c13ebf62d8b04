"""Batches as a pure function of (seed, step, process): nothing to save, nothing to skip.

The global batch at a step is a run of consecutive ordinals in an endless stream of epochs, each a
permutation of the whole data set; a process reads its share of it. Starting at step k computes
step k, and touches nothing before it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Self

import numpy as np

from spvit_jax.data.augment import EvalTransform, TrainTransform, WholeTransform
from spvit_jax.data.datasets import Source
from spvit_jax.data.tensorflow import tf
from spvit_jax.data.token_labels.store import LabelMaps
from spvit_jax.errors import InputError

Batch = dict[str, np.ndarray]
Example = dict[str, tf.Tensor]  # as it was fetched: `encoded`, `label`, and perhaps `label_map`

_FETCH_AHEAD = 2  # batches whose records are read while earlier ones are decoded


@dataclasses.dataclass(frozen=True)
class Share:
    """Which part of each global batch a process reads.

    Attributes:
      parts: of the equal parts that a batch is cut into, the one that the process reads, or
        several in rising order; in 0 … count-1.
      count: the number of parts.
    """

    parts: int | tuple[int, ...] = 0
    count: int = 1

    def of(self, batch_size: int) -> int:
        """Returns the examples of a global batch that one process reads."""
        return len(self._rows(batch_size))

    def ordinals(self, step: tf.Tensor, batch_size: int) -> tf.Tensor:
        """Returns the places int64 [b] of the process's examples in the stream of all batches."""
        return step * batch_size + tf.constant(self._rows(batch_size), tf.int64)

    def _rows(self, batch_size: int) -> np.ndarray:
        """Returns the rows [b] of a global batch that the process reads."""
        if batch_size % self.count:
            raise InputError(f"batch size {batch_size} is not a multiple of the {self.count} parts")
        rows = np.arange(batch_size).reshape(self.count, -1)
        return rows[np.atleast_1d(self.parts)].reshape(-1)


class BatchIterator(Iterator[Batch]):
    """NumPy batches of a tf.data pipeline; a context manager that ends its threads.

    A live tf.data iterator over Python code can hang the interpreter at exit, so whoever makes
    one closes it.
    """

    def __init__(self, dataset: tf.data.Dataset):
        self._iterator: Iterator[Batch] | None = dataset.as_numpy_iterator()

    def __next__(self) -> Batch:
        if self._iterator is None:
            raise StopIteration
        return next(self._iterator)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._iterator = None


def train_batches(
    source: Source,
    transform: TrainTransform,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    repeats: int = 1,
    label_maps: LabelMaps | None = None,
    share: Share = Share(),
    threads: int | None = None,
) -> BatchIterator:
    """Returns the endless batches of training from a step on.

    Args:
      source: the training examples.
      transform: makes an image from its encoding and a seed.
      batch_size: of the global batch, a multiple of the share's number of parts.
      seed: of order and augmentation.
      start_step: the step of the first batch.
      repeats: how often an example occurs in a row, each time augmented anew (repeated
        augmentation, arXiv 1902.05509); the stream then takes so many times longer to go through
        all examples.
      label_maps: of the whole split, to go with the images.
      share: which part of each batch this process reads.
      threads: for decoding; None for one per core. The batches do not depend on it.

    Returns:
      Batches of `image` uint8 [b, height, width, 3], `label` int32 [b] and `index` int64 [b], the
      example's number in the source. With label maps also `label_map` float16 [b, 2, K, h, w],
      and what part of the image the crop is: `box` float32 [b, 4] and `flip` bool [b], as
      `TrainTransform.with_box` returns them.

    Raises:
      InputError: the batch size is not a multiple of the share's number of parts.
    """
    local = share.of(batch_size)

    def make(example: Example, index: tf.Tensor, ordinal: tf.Tensor) -> dict:
        image, box, flip = transform.with_box(
            example["encoded"], tf.stack([tf.constant(seed, tf.int64), ordinal])
        )
        made = {"image": image, "label": example["label"], "index": index}
        if label_maps is not None:
            made |= {"label_map": example["label_map"], "box": box, "flip": flip}
        return made

    def locate(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        ordinal = share.ordinals(step, batch_size)
        return shuffled_index(ordinal // repeats, len(source), seed), ordinal

    steps = tf.data.Dataset.range(start_step, np.iinfo(np.int64).max)
    return BatchIterator(_read(source, label_maps, steps.map(locate), make, local, threads))


def eval_batches(
    source: Source,
    transform: EvalTransform | WholeTransform,
    *,
    batch_size: int,
    share: Share = Share(),
    threads: int | None = None,
) -> BatchIterator:
    """Returns batches in which each example occurs once, with a mask over what fills up the last.

    Args:
      source: the examples.
      transform: makes an image from its encoding.
      batch_size: of the global batch, a multiple of the share's number of parts.
      share: which part of each batch this process reads; all get the same number of batches.
      threads: as in `train_batches`.

    Returns:
      Batches of `image` uint8 [b, height, width, 3], `label` int32 [b], `index` int64 [b] and
      `mask` float32 [b], 1 for an example and 0 for padding.

    Raises:
      InputError: the batch size is not a multiple of the share's number of parts.
    """
    local, total = share.of(batch_size), len(source)

    def make(example: Example, index: tf.Tensor, ordinal: tf.Tensor) -> dict:
        mask = tf.cast(ordinal < total, tf.float32)
        image = transform(example["encoded"])
        return {"image": image, "label": example["label"], "index": index, "mask": mask}

    def locate(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        ordinal = share.ordinals(step, batch_size)
        return tf.minimum(ordinal, total - 1), ordinal

    steps = tf.data.Dataset.range(-(-total // batch_size))
    return BatchIterator(_read(source, None, steps.map(locate), make, local, threads))


def shuffled_index(ordinal: tf.Tensor, total: int, seed: int) -> tf.Tensor:
    """Returns the example at each place of the endless stream of shuffled epochs.

    Args:
      ordinal: int64 [n], places in the stream.
      total: the number of examples; places k·total to (k+1)·total - 1 hold each of them once.
      seed: of the permutations, one per epoch.

    Returns:
      int64 [n] in 0 … total-1.
    """
    epoch, position = ordinal // total, ordinal % total
    same = tf.ones_like(ordinal)
    seeds = tf.cast(tf.stack([seed * same, epoch, 0 * same], axis=1), tf.int32)
    return tf.raw_ops.RandomIndexShuffle(index=position, seed=seeds, max_index=(total - 1) * same)


def _read(
    source: Source,
    label_maps: LabelMaps | None,
    located: tf.data.Dataset,
    make: Callable[[Example, tf.Tensor, tf.Tensor], dict],
    batch_size: int,
    threads: int | None,
) -> tf.data.Dataset:
    """Reads the examples at (indices [b], ordinals [b]) and makes a batch of each such pair."""

    # Name, dtype and shape of what is fetched for each example.
    fields = [("encoded", tf.string, ()), ("label", tf.int32, ())]
    if label_maps is not None:
        fields.append(("label_map", tf.float16, (2, *label_maps.shape)))

    def fetch(indices: np.ndarray) -> tuple[np.ndarray, ...]:
        images, labels = source.fetch(indices)
        fetched = np.array(images, object), labels
        if label_maps is None:
            return fetched
        return *fetched, label_maps.fetch(source.places(indices), labels)

    def read(indices: tf.Tensor, ordinal: tf.Tensor) -> tuple[Example, tf.Tensor, tf.Tensor]:
        dtypes = [dtype for _, dtype, _ in fields]
        fetched = tf.numpy_function(fetch, [indices], dtypes, stateful=False)
        example = {
            name: tf.ensure_shape(value, [batch_size, *shape])
            for (name, _, shape), value in zip(fields, fetched, strict=True)
        }
        return example, indices, ordinal

    parallel = threads or os.cpu_count() or 1
    examples = located.map(read, num_parallel_calls=_FETCH_AHEAD, deterministic=True).unbatch()
    made = examples.map(make, num_parallel_calls=parallel, deterministic=True)
    batches = made.batch(batch_size, drop_remainder=True).prefetch(2)
    options = tf.data.Options()
    options.threading.private_threadpool_size = parallel
    options.autotune.enabled = False  # its thread can take a minute to end with the iterator
    return batches.with_options(options)
