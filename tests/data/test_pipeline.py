"""Batches are a function of (seed, step, process), and evaluation counts each example once."""

import collections
import itertools

import numpy as np
import pytest

from spvit_jax.data import datasets, pipeline
from spvit_jax.data.augmentation import Augmentation, RandAugment
from spvit_jax.data.crops import EvalTransform, TrainTransform
from spvit_jax.data.pipeline import BatchShard
from spvit_jax.data.tensorflow import tf
from spvit_jax.errors import InputError

TRANSFORM = TrainTransform(
    size=(12, 12),
    scale=(0.5, 1.0),
    flip=0.5,
    interpolation="bilinear",
    augmentation=Augmentation(True, 0.4, RandAugment(), fill=(9, 9, 9)),
)


@pytest.fixture(scope="module")
def source(data_dir):
    return datasets.load("digits", "train", data_dir)


def take(source, count, **settings):
    settings = {"batch_size": 24, "seed": 7} | settings
    with pipeline.train_batches(source, TRANSFORM, **settings) as batches:
        return list(itertools.islice(batches, count))


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_restart_at_any_step_gives_the_same_pixels(source):
    assert_same(take(source, 8)[5:], take(source, 3, start_step=5))


def test_number_of_threads_does_not_matter(source):
    assert_same(take(source, 6, threads=1), take(source, 6, threads=4))


@pytest.mark.parametrize("count", [2, 4])
def test_processes_together_read_the_global_batch(source, count):
    shares = [take(source, 3, shard=BatchShard(index, count)) for index in range(count)]
    for whole, *parts in zip(take(source, 3), *shares, strict=True):
        for key in whole:
            np.testing.assert_array_equal(whole[key], np.concatenate([p[key] for p in parts]))


def test_each_epoch_is_another_permutation(source):
    total = len(source)
    index = np.concatenate([batch["index"] for batch in take(source, 3 * total // 24 + 1)])
    epochs = [index[k * total : (k + 1) * total] for k in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(total))
    assert not np.array_equal(epochs[0], epochs[1])
    other = np.concatenate([batch["index"] for batch in take(source, 10, seed=8)])
    assert not np.array_equal(index[:240], other)


def test_repeats_follow_each_other_augmented_anew(source):
    batches = take(source, 6, repeats=3)
    index = np.concatenate([batch["index"] for batch in batches]).reshape(-1, 3)
    assert (index == index[:, :1]).all()
    plain = np.concatenate([batch["index"] for batch in take(source, 2)])
    np.testing.assert_array_equal(index[:, 0], plain)
    images = np.concatenate([batch["image"] for batch in batches]).reshape(48, 3, -1)
    assert np.mean((images[:, 0] != images[:, 1]).any(1)) > 0.9
    assert_same(take(source, 6, repeats=3)[4:], take(source, 2, repeats=3, start_step=4))


def test_an_example_is_augmented_anew_in_each_epoch(source):
    small = datasets.balanced_subset(source, 1, seed=0)
    images = take(small, 1)[0]["image"]
    assert len({image.tobytes() for image in images}) > 20


def test_a_step_far_away_is_reached_at_once(source):
    """10¹¹ steps would take years to pass over; the indices still are a permutation's."""
    batch = take(source, 1, start_step=10**11)[0]
    assert len(set(batch["index"].tolist())) == 24


class Million(datasets.Subset):
    """As many examples as ImageNet's, each of them one digit; counts those that are read."""

    read = 0

    def __init__(self, source):
        super().__init__(source, np.arange(1_281_167))

    def fetch(self, indices):
        self.read += len(indices)
        return self._source.fetch(indices % len(self._source))


@pytest.mark.parametrize("start_step", [0, 1, 250_000])
def test_starting_late_reads_no_more_than_starting_early(source, start_step):
    """A few batches are read ahead; of what came before nothing is."""
    million = Million(source)
    batch = take(million, 1, start_step=start_step)[0]
    assert len(set(batch["index"].tolist())) == 24
    assert million.read <= 10 * 24


def test_shuffle_is_a_permutation_at_imagenet_size():
    total = 1_281_167
    epoch = pipeline.shuffled_index(tf.range(total, dtype=tf.int64) + 5 * total, total, seed=1)
    assert np.array_equal(np.sort(epoch.numpy()), np.arange(total))


@pytest.fixture(
    scope="module", params=itertools.product((0, 1, 42), (500, 1297, 20_000, 1_281_167))
)
def five_epochs(request):
    """The examples of five epochs int64 [5, n], by seed and number of examples."""
    seed, total = request.param
    order = pipeline.shuffled_index(tf.range(5 * total, dtype=tf.int64), total, seed)
    return order.numpy().reshape(5, total)


def in_batches(epochs, size=64):
    """[epochs, batches, size], without what does not fill a batch."""
    return epochs[:, : epochs.shape[1] // size * size].reshape(len(epochs), -1, size)


def test_batches_of_data_ordered_by_class_have_the_classes_of_random_draws(five_epochs):
    """χ² per degree of freedom of the class counts is 1, within five standard deviations."""
    total, classes, size = five_epochs.shape[1], 10, 64
    batches = in_batches(five_epochs * classes // total).reshape(-1, size)
    counts = np.stack([(batches == label).sum(1) for label in range(classes)], axis=1)
    expected = size * np.bincount(np.arange(total) * classes // total) / total
    drawn_without_replacement = (total - size) / (total - 1)
    chi2 = ((counts - expected) ** 2 / expected).sum(1) / drawn_without_replacement
    deviation = (2 * (classes - 1) / len(batches)) ** 0.5
    assert abs(chi2.mean() - (classes - 1)) < 5 * deviation


def test_images_that_shared_a_batch_meet_again_as_often_as_by_chance(five_epochs):
    total, size = five_epochs.shape[1], 64
    first, *later = in_batches(five_epochs)
    met = 0
    for epoch in later:
        batch_of = np.full(total, -1)
        batch_of[epoch.reshape(-1)] = np.repeat(np.arange(len(epoch)), size)
        then, now = np.indices(first.shape)[0], batch_of[first]
        _, together = np.unique((then * total + now)[now >= 0], return_counts=True)
        met += (together * (together - 1) // 2).sum()
    pairs = len(first) * size * (size - 1) / 2
    in_a_batch = len(first) * size / total  # what does not fill one is in none
    chance = len(later) * pairs * in_a_batch * (size - 1) / (total - 1)
    assert abs(met - chance) < 5 * chance**0.5


@pytest.mark.parametrize(("batch_size", "count"), [(1, 1), (96, 1), (500, 1), (512, 2), (64, 4)])
def test_evaluation_counts_each_example_once(batch_size, count, data_dir):
    source = datasets.load("digits", "test", data_dir)
    seen, lengths = collections.Counter(), []
    for index in range(count):
        with pipeline.eval_batches(
            source, EvalTransform((8, 8)), batch_size=batch_size, shard=BatchShard(index, count)
        ) as iterator:
            batches = list(iterator)
        lengths.append(len(batches))
        for batch in batches:
            assert batch["image"].shape == (batch_size // count, 8, 8, 3)
            seen.update(batch["index"][batch["mask"] == 1].tolist())
    assert seen == collections.Counter(range(500))
    assert len(set(lengths)) == 1  # or processes would wait for each other


def test_evaluation_leaves_images_of_the_right_size_alone(data_dir):
    source = datasets.load("digits", "test", data_dir)
    with pipeline.eval_batches(source, EvalTransform((8, 8)), batch_size=4) as batches:
        batch = next(batches)
    images, labels = source.fetch(np.arange(4))
    for image, encoded in zip(batch["image"], images, strict=True):
        np.testing.assert_array_equal(image, tf.io.decode_image(encoded, channels=3).numpy())
    np.testing.assert_array_equal(batch["label"], labels)


def test_batch_that_processes_cannot_share(source):
    with pytest.raises(InputError, match="not a multiple of the 5 parts"):
        take(source, 1, shard=BatchShard(0, 5))
