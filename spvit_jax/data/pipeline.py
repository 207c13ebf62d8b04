"""Batches as a pure function of (seed, step, process), with no state to save or restore.

The global batch at a step is a range of consecutive ordinals in an endless stream of epochs, each a
permutation of the whole data set; a process reads its shard of the batch. An iterator that starts
at step k reads nothing before it.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from typing import Self

import numpy as np

from spvit_jax.data import decode
from spvit_jax.data.crops import EvalTransform, TrainTransform, WholeTransform
from spvit_jax.data.sources import Source
from spvit_jax.data.tensorflow import tf
from spvit_jax.data.token_labels.store import LabelMaps
from spvit_jax.data.unreadable import UnreadableExamples
from spvit_jax.errors import InputError

Batch = dict[str, np.ndarray]
Example = dict[str, tf.Tensor]  # with the fields of `_Reader._fields`

# What sources raise; RuntimeError is ArrayRecord's.
_UNREADABLE = (OSError, ValueError, RuntimeError)
_as_is = tf.autograph.experimental.do_not_convert  # for functions without Python control flow
_GROUP = 32  # images that are resized and augmented by one call of Python
_FETCH_AHEAD = 2  # batches whose records are read while earlier ones are decoded


@dataclasses.dataclass(frozen=True)
class BatchShard:
    """The part of each global batch that a process reads.

    Attributes:
      parts: index of the part that the process reads, or several in rising order; in
        0 … count-1.
      count: number of equal parts that a global batch is divided into.
    """

    parts: int | tuple[int, ...] = 0
    count: int = 1

    def of(self, batch_size: int) -> int:
        """Returns the number of examples of a global batch that the process reads."""
        return len(self._rows(batch_size))

    def ordinals(self, step: tf.Tensor, batch_size: int) -> tf.Tensor:
        """Returns the ordinals int64 [b] of the examples that the process reads at a step."""
        return step * batch_size + tf.constant(self._rows(batch_size), tf.int64)

    def _rows(self, batch_size: int) -> np.ndarray:
        """Returns the rows [b] of a global batch that the process reads."""
        if batch_size % self.count:
            raise InputError(f"batch size {batch_size} is not a multiple of the {self.count} parts")
        rows = np.arange(batch_size).reshape(self.count, -1)
        return rows[np.atleast_1d(self.parts)].reshape(-1)


class BatchIterator(Iterator[Batch]):
    """Iterator over NumPy batches from a step on; a context manager that ends its threads.

    An example that cannot be read is replaced by another one.

    A live tf.data iterator over Python code can hang the interpreter at exit, so use it in a
    `with` statement.
    """

    def __init__(self, reader: _Reader, start: int, stop: int):
        """Starts to read the batches of steps start … stop-1."""
        self._reader, self._step, self._stop = reader, start, stop
        self._iterator: Iterator[Batch] | None = reader.batches(start, stop)

    def __next__(self) -> Batch:
        while self._iterator is not None:
            try:
                batch = next(self._iterator)
                self._step += 1
                return batch
            except tf.errors.OpError as error:
                self._iterator = None
                # Frames of tracebacks would keep the iterator until some thread collects garbage.
                # Ending, it waits for its calls of Python, and they may wait for that very thread.
                failure = error.with_traceback(None)
                failure.__context__ = failure.__cause__ = None
            if not self._reader.replace_unreadable(self._step):
                raise failure
            self._iterator = self._reader.batches(self._step, self._stop)
        raise StopIteration

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
    shard: BatchShard = BatchShard(),
    threads: int | None = None,
    max_unreadable: int = 0,
) -> BatchIterator:
    """Returns the endless batches of training from a step on.

    Args:
      source: the training examples.
      transform: transform from an encoded image and a seed to a training image.
      batch_size: size of the global batch, a multiple of `shard.count`.
      seed: seed of the examples' order and augmentation.
      start_step: the step of the first batch.
      repeats: number of times that an example occurs in a row, each time augmented anew (repeated
        augmentation, arXiv 1902.05509); an epoch is then that many times longer.
      label_maps: label maps of the whole split, to be read with the images.
      shard: the part of each batch that this process reads.
      threads: number of threads that decode; None for one per core. Batches do not depend on it.
      max_unreadable: number of examples that may be unreadable; the next readable one in the
        source replaces each.

    Returns:
      Batches of `image` uint8 [b, height, width, 3], `label` int32 [b] and `index` int64 [b], the
      example's index in the source. With label maps also `label_map` float16 [b, 2, K, h, w], and
      `box` float32 [b, 4], `flip` bool [b] and, with RandAugment, `move` float32 [b, 3, 3], as in
      `crops.TrainImage`.

    Raises:
      InputError: the batch size is not a multiple of `shard.count`; later, in the iterator: too
        many examples cannot be read.
    """
    local = shard.of(batch_size)

    def make(example: Example, ordinal: tf.Tensor) -> dict:
        fields = {"label": example["label"], "index": example["index"]}
        if label_maps is not None:
            fields["label_map"] = example["label_map"]
        seeds = tf.stack([tf.constant(seed, tf.int64), ordinal])
        return fields | transform.prepare(example["encoded"], seeds)

    def finish(group: dict) -> dict:
        finished = transform.finish(group)
        geometry = {"box", "flip", "move"}
        if label_maps is not None:
            geometry -= {"box", "flip"}
            geometry -= {"move"} if transform.augmentation.moves_pixels else set()
        return {name: value for name, value in finished.items() if name not in geometry}

    def locate(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        ordinal = shard.ordinals(step, batch_size)
        return shuffled_index(ordinal // repeats, len(source), seed), ordinal

    unreadable = UnreadableExamples(source, max_unreadable)
    reader = _Reader(source, label_maps, locate, make, local, threads, unreadable, finish)
    return BatchIterator(reader, start_step, np.iinfo(np.int64).max)


def eval_batches(
    source: Source,
    transform: EvalTransform | WholeTransform,
    *,
    batch_size: int,
    shard: BatchShard = BatchShard(),
    threads: int | None = None,
    max_unreadable: int = 0,
) -> BatchIterator:
    """Returns the batches of evaluation, in which each example occurs once, with a mask of padding.

    Args:
      source: the evaluation examples.
      transform: transform from an encoded image to an evaluation image.
      batch_size: size of the global batch, a multiple of `shard.count`.
      shard: the part of each batch that this process reads; all get the same number of batches.
      threads: as in `train_batches`.
      max_unreadable: number of examples that may be unreadable; their mask is 0.

    Returns:
      Batches of `image` uint8 [b, height, width, 3], `label` (int32 [b], or uint8 [b, C] where an
      image may have several), `index` int64 [b] and `mask` float32 [b], 1 for an example and 0
      for padding or an unreadable one.

    Raises:
      InputError: the batch size is not a multiple of `shard.count`; later, in the iterator: too
        many examples cannot be read.
    """
    local, total = shard.of(batch_size), len(source)

    def make(example: Example, ordinal: tf.Tensor) -> dict:
        return {
            "image": transform(example["encoded"]),
            "label": example["label"],
            "index": example["index"],
            "mask": tf.cast((ordinal < total) & example["intact"], tf.float32),
        }

    def locate(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        ordinal = shard.ordinals(step, batch_size)
        return tf.minimum(ordinal, total - 1), ordinal

    unreadable = UnreadableExamples(source, max_unreadable)
    reader = _Reader(source, None, locate, make, local, threads, unreadable)
    return BatchIterator(reader, 0, -(-total // batch_size))


def shuffled_index(ordinal: tf.Tensor, total: int, seed: int) -> tf.Tensor:
    """Returns the index of the example at each ordinal of the endless stream of shuffled epochs.

    Args:
      ordinal: int64 [n], positions in the stream.
      total: number of examples; ordinals k·total to (k+1)·total - 1 are each of them once.
      seed: seed of the permutations, one per epoch.

    Returns:
      Indices int64 [n] in 0 … total-1.
    """
    epoch, position = ordinal // total, ordinal % total
    # Consecutive epochs as keys, or the operation's default of four rounds, would give permutations
    # that are hardly random.
    key = _hash(_hash(tf.fill(tf.shape(epoch), tf.constant(seed, tf.int64))) + epoch)
    words = tf.concat([tf.bitcast(key, tf.int32), tf.bitcast(_hash(key), tf.int32)], axis=1)
    return tf.raw_ops.RandomIndexShuffle(
        index=position, seed=words[:, :3], max_index=(total - 1) * tf.ones_like(ordinal), rounds=8
    )


def _hash(x: tf.Tensor) -> tf.Tensor:
    """Returns SplitMix64's next number after each state int64 [n] (Steele et al., OOPSLA 2014)."""
    x = tf.cast(x, tf.uint64) + tf.constant(0x9E3779B97F4A7C15, tf.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, tf.constant(shift, tf.uint64)))
        x = x * tf.constant(factor, tf.uint64)
    x = tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, tf.constant(31, tf.uint64)))
    return tf.cast(x, tf.int64)


def _merge_groups(batch: dict) -> dict:
    """Returns a batch of groups of examples, [n, g, ...], as one of examples, [n·g, ...]."""
    return {
        name: tf.reshape(value, tf.concat([[-1], tf.shape(value)[2:]], 0))
        for name, value in batch.items()
    }


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reader of examples that makes batches of them.

    Attributes:
      source: the examples.
      label_maps: label maps to fetch with the examples, or None.
      locate: function from a step to its examples' indices and ordinals, int64 [b] each.
      make: function from an example and its ordinal to its fields in a batch, or in a group.
      batch_size: number of examples that this process reads per batch, b.
      threads: number of threads that decode; None for one per core.
      unreadable: count of the examples that cannot be read.
      finish: function from a group of made examples, padded to the same shapes, to their fields
        in a batch; None where they are these fields.
      replacements: by ordinal of an unreadable example, the index of the example that replaces it,
        the next readable one in the source. Depends on the ordinal alone; found when it fails.
    """

    source: Source
    label_maps: LabelMaps | None
    locate: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]
    make: Callable[[Example, tf.Tensor], dict]
    batch_size: int
    threads: int | None
    unreadable: UnreadableExamples
    finish: Callable[[dict], dict] | None = None
    replacements: dict[int, int] = dataclasses.field(default_factory=dict)

    @property
    def _fields(self) -> list[tuple[str, tf.DType, tuple[int, ...]]]:
        """Name, dtype and shape of each field that is fetched for an example."""
        several = self.source.several_labels
        label = (tf.uint8, (self.source.num_classes,)) if several else (tf.int32, ())
        fields = [
            ("index", tf.int64, ()),
            ("intact", tf.bool, ()),
            ("encoded", tf.string, ()),
            ("label", *label),
        ]
        if self.label_maps is not None:
            fields.append(("label_map", tf.float16, (2, *self.label_maps.shape)))
        return fields

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Returns a tf.data iterator over the batches of steps start … stop-1."""

        def fetch(indices: np.ndarray, ordinals: np.ndarray) -> tuple[np.ndarray, ...]:
            wanted = indices
            if self.replacements:
                pairs = zip(ordinals.tolist(), indices.tolist(), strict=True)
                wanted = np.array(
                    [self.replacements.get(ordinal, index) for ordinal, index in pairs]
                )
            try:
                return self._fetch(wanted, wanted == indices)
            except _UNREADABLE:
                # Empty images fail to decode, and `replace_unreadable` then finds the unreadable.
                return tuple(
                    np.full(
                        (len(indices), *shape),
                        b"" if dtype == tf.string else 0,
                        dtype.as_numpy_dtype,
                    )
                    for _, dtype, shape in self._fields
                )

        def read(indices: tf.Tensor, ordinals: tf.Tensor) -> tuple[Example, tf.Tensor]:
            dtypes = [dtype for _, dtype, _ in self._fields]
            fetched = tf.numpy_function(fetch, [indices, ordinals], dtypes, stateful=False)
            example = {
                name: tf.ensure_shape(value, [self.batch_size, *shape])
                for (name, _, shape), value in zip(self._fields, fetched, strict=True)
            }
            return example, ordinals

        parallel = self.threads or os.cpu_count() or 1
        located = tf.data.Dataset.range(start, stop).map(_as_is(self.locate))
        fetched = located.map(_as_is(read), num_parallel_calls=_FETCH_AHEAD, deterministic=True)
        examples = fetched.unbatch()
        made = examples.map(_as_is(self.make), num_parallel_calls=parallel, deterministic=True)
        if self.finish is None:
            batches = made.batch(self.batch_size, drop_remainder=True)
        else:
            group = math.gcd(self.batch_size, _GROUP)
            groups = made.padded_batch(group, drop_remainder=True)
            finished = groups.map(
                _as_is(self.finish), num_parallel_calls=parallel, deterministic=True
            )
            batches = finished.batch(self.batch_size // group, drop_remainder=True)
            batches = batches.map(_as_is(_merge_groups))
        batches = batches.prefetch(2)
        options = tf.data.Options()
        options.threading.private_threadpool_size = parallel
        options.autotune.enabled = False  # its thread can take a minute to stop
        return batches.with_options(options).as_numpy_iterator()

    def replace_unreadable(self, step: int) -> bool:
        """Finds the unreadable examples of a step, and others to replace them.

        Returns:
          Whether any example of the step was unreadable.

        Raises:
          InputError: more examples are unreadable than allowed.
        """
        found, compiled = False, tf.function(self.make, autograph=False)
        indices, ordinals = self.locate(tf.constant(step, tf.int64))
        for index, ordinal in zip(indices.numpy().tolist(), ordinals.numpy().tolist(), strict=True):
            candidate = self.replacements.get(ordinal, index)
            while (error := self._error_of(candidate, ordinal, compiled)) is not None:
                # The error message of a graph is a page long, that of eager execution a line.
                self.unreadable.record(
                    candidate, self._error_of(candidate, ordinal, self.make) or error
                )
                candidate = (candidate + 1) % len(self.source)
                self.replacements[ordinal] = candidate
                found = True
        return found

    def _error_of(
        self, index: int, ordinal: int, make: Callable[[Example, tf.Tensor], dict]
    ) -> Exception | None:
        """Returns the error that reading an example raises, or None if it can be read."""
        try:
            fetched = self._fetch(np.array([index]), np.array([True]))
            example = {
                name: tf.constant(value[0], dtype)
                for (name, dtype, _), value in zip(self._fields, fetched, strict=True)
            }
            try:
                make(example, tf.constant(ordinal, tf.int64))
            except tf.errors.OpError as error:  # calls also too large images damaged
                message = decode.too_large(example["encoded"].numpy())
                return ValueError(message) if message else error
        except (tf.errors.OpError, *_UNREADABLE) as error:
            return error
        return None

    def _fetch(self, indices: np.ndarray, intact: np.ndarray) -> tuple[np.ndarray, ...]:
        """Returns the fields of examples [n]; `intact` [n] tells them from replacements."""
        images, labels = self.source.fetch(indices)
        fetched = indices, intact, np.array(images, object), labels
        if self.label_maps is None:
            return fetched
        return *fetched, self.label_maps.fetch(self.source.places(indices), labels)
