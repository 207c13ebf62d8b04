"""What the sources hold: the digits, a folder of images, subsets, and their errors."""

import collections
import shutil
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from spvit_jax import config as config_lib
from spvit_jax.data import datasets, sources
from spvit_jax.data.tensorflow import tf
from spvit_jax.errors import InputError


def everything(source):
    images, labels = source.fetch(np.arange(len(source)))
    return [tf.io.decode_image(image).numpy()[..., 0] for image in images], labels


def test_digits_are_those_of_scikit_learn_split_once(data_dir):
    """Every digit is in exactly one split, with its own label, and the shares are equal."""
    splits = [everything(datasets.load("digits", name, data_dir)) for name in ("train", "test")]
    assert [len(images) for images, _ in splits] == [1297, 500]

    found = collections.Counter()
    for images, labels in splits:
        found.update((image.tobytes(), int(k)) for image, k in zip(images, labels, strict=True))
    original = load_digits()
    pixels = np.rint(original.images * (255 / 16)).astype(np.uint8)
    expected = collections.Counter(
        (image.tobytes(), int(k)) for image, k in zip(pixels, original.target, strict=True)
    )
    assert found == expected

    shares = [np.bincount(labels, minlength=10) / len(labels) for _, labels in splits]
    np.testing.assert_allclose(*shares, atol=0.002)


def test_tfds_slices_are_splits_too(data_dir):
    assert len(datasets.load("digits", "train[:10%]", data_dir)) == 130


@pytest.mark.parametrize("size", [10, 105, 300, 1297])
def test_subset_is_balanced_and_holds_each_example_once(size, data_dir):
    source = datasets.load("digits", "train", data_dir)
    subset = datasets.balanced_subset(source, size, seed=3)
    images, labels = subset.fetch(np.arange(len(subset)))
    assert len(images) == size
    counts = np.bincount(labels, minlength=10)
    assert counts.max() - counts.min() <= (1 if size < 1200 else 10)
    assert len(set(subset._indices.tolist())) == size


def test_subsets_of_one_seed_are_nested_and_of_two_differ(data_dir):
    source = datasets.load("digits", "train", data_dir)
    small, large, other = (
        set(datasets.balanced_subset(source, size, seed)._indices.tolist())
        for size, seed in ((100, 0), (300, 0), (100, 1))
    )
    assert small < large
    assert small != other


def test_folder_of_images(tmp_path):
    colours = {"b_green": (0, 200, 0), "a_red": (200, 0, 0)}
    for name, colour in colours.items():
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (5 + i, 4), colour).save(folder / f"{i}.png")
        (folder / "notes.txt").write_text("not an image")
    source = datasets.load(f"folder:{tmp_path}", "train", "unused")
    assert (len(source), source.num_classes) == (6, 2)
    images, labels = source.fetch(np.array([5, 0]))
    assert labels.tolist() == [1, 0]  # in the order of the folders' names
    assert tf.io.decode_image(images[0]).numpy()[0, 0].tolist() == [0, 200, 0]


@pytest.mark.parametrize(
    ("name", "split", "words"),
    [
        ("digit", "train", "did you mean 'digits'"),
        ("digits", "validation", "'validation'.*which has .*test"),
        ("folder:/nowhere", "train", "not a folder"),
        ("imagenet2012", "train", r"python -m spvit_jax\.data\.prepare --dataset=imagenet2012"),
    ],
)
def test_data_that_is_not_there(name, split, words, data_dir):
    with pytest.raises(InputError, match=words):
        datasets.load(name, split, data_dir)


def test_folder_without_images(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no images"):
        datasets.load(f"folder:{tmp_path}", "train", "unused")


def test_data_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be prepared"):
        datasets.load("digits", "train", str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("size", "count"), [("1%", 13), ("10%", 130), ("100%", 1297), ("2.5%", 32), ("200", 200)]
)
def test_subset_of_a_share(size, count, data_dir):
    subset = datasets.balanced_subset(datasets.load("digits", "train", data_dir), size, 0)
    assert len(subset) == count
    per_class = np.bincount(subset.fetch(np.arange(count))[1], minlength=10)
    assert per_class.max() - per_class.min() <= (1 if count < 1000 else 20)


@pytest.mark.parametrize("size", ["some", "%", "nan%", "inf%"])
def test_subset_of_a_size_that_cannot_be_read(size, data_dir):
    with pytest.raises(InputError, match="or a share such as '10%'"):
        datasets.balanced_subset(datasets.load("digits", "train", data_dir), size, 0)


@pytest.mark.parametrize("size", [0, -1, 1298, "101%", "0.01%"])
def test_subset_of_impossible_size(size, data_dir):
    with pytest.raises(InputError, match="expected 1 to 1297"):
        datasets.balanced_subset(datasets.load("digits", "train", data_dir), size, 0)


def data_of(data_dir, **fields):
    data = config_lib.base().data
    data.update(dataset="digits", data_dir=str(data_dir), **fields)
    return data


@pytest.mark.parametrize("size", [100, "10%"])
def test_minival_is_held_out_of_training(size, data_dir):
    """Balanced, the same for every seed, and with training the whole split."""
    data = data_of(data_dir, minival=size)
    whole = datasets.load("digits", "train", str(data_dir))
    held_out = datasets.for_evaluation(data, "minival")
    rest = datasets.for_training(whole, data, seed=5)
    assert len(held_out) == (100 if size == 100 else 130)
    per_class = np.bincount(held_out.labels(), minlength=10)
    assert per_class.max() - per_class.min() <= 1
    places = [part.places(np.arange(len(part))).tolist() for part in (held_out, rest)]
    assert sorted(places[0] + places[1]) == list(range(1297))
    np.testing.assert_array_equal(rest.labels(), rest.fetch(np.arange(len(rest)))[1])

    few = datasets.for_training(whole, data_of(data_dir, minival=size, train_size=50), seed=5)
    assert set(few.places(np.arange(50)).tolist()) <= set(places[1])


def test_minival_that_is_not_there(data_dir):
    with pytest.raises(InputError, match=r"say how much, for example --config\.data\.minival"):
        datasets.for_evaluation(data_of(data_dir), "minival")
    whole = datasets.load("digits", "train", str(data_dir))
    with pytest.raises(InputError, match="minival is 2000; expected 1 to 1297"):
        datasets.for_training(whole, data_of(data_dir, minival=2000), seed=0)
    with pytest.raises(InputError, match="leaves nothing to train on"):
        datasets.for_training(whole, data_of(data_dir, minival="100%"), seed=0)


def test_labels_are_written_beside_the_records_once(data_dir, tmp_path):
    copy = shutil.copytree(data_dir, tmp_path / "data")
    for path in copy.rglob("labels-*.npy"):
        path.unlink()
    source = datasets.load("digits", "train", str(copy))
    expected = source.fetch(np.arange(1297))[1]
    np.testing.assert_array_equal(source.labels(), expected)
    (path,) = copy.rglob("labels-train.npy")
    np.testing.assert_array_equal(np.load(path), expected)


def test_labels_that_are_no_classes():
    """As those of a data set of ages or of captions."""
    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(), "label": tfds.features.Scalar(np.float32)}
    )
    builder = types.SimpleNamespace(info=types.SimpleNamespace(features=features))
    with pytest.raises(InputError, match=r"'ages' has labels that are Scalar.*expected classes"):
        sources.label_feature("ages", builder)
