"""A damaged image costs itself, whatever is wrong with it, and too many of them stop the run."""

import gc
import itertools
import logging
import shutil
import weakref

import numpy as np
import pytest

from spvit_jax.data import datasets, pipeline
from spvit_jax.data.crops import EvalTransform, TrainTransform
from spvit_jax.errors import InputError
from tests.helpers.archives import photograph

TRANSFORM = TrainTransform((16, 16))
COUNT = 24
DAMAGED = [3, 4, 20]  # two of them in a row


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    root = tmp_path_factory.mktemp("clean")
    (root / "train" / "scene").mkdir(parents=True)
    for number in range(COUNT):
        (root / "train" / "scene" / f"{number:02}.jpeg").write_bytes(photograph(number))
    return root


@pytest.fixture(scope="module")
def damaged(clean, tmp_path_factory):
    """Cut off, empty, and not an image at all."""
    root = shutil.copytree(clean, tmp_path_factory.mktemp("damaged") / "copy")
    first, second, third = (root / "train" / "scene" / f"{n:02}.jpeg" for n in DAMAGED)
    first.write_bytes(first.read_bytes()[:600])
    second.write_bytes(b"")
    third.write_bytes(b"not an image")
    return root


def take(root, count=6, limit=3, **settings):
    source = datasets.load(f"folder:{root}", "train", "unused")
    settings = {"batch_size": 8, "seed": 5, "max_unreadable": limit} | settings
    with pipeline.train_batches(source, TRANSFORM, **settings) as batches:
        return list(itertools.islice(batches, count))


def test_training_goes_on_with_the_next_example(clean, damaged, caplog):
    """All others are as they were; two epochs, and each damaged file is logged once."""
    with caplog.at_level(logging.WARNING, "spvit_jax.data"):
        ours = take(damaged)
    logged = sorted(r.getMessage() for r in caplog.records if r.name == "spvit_jax.data")
    reasons = ("Invalid JPEG data, size 600", "Input is empty.", "Unknown image file format")
    for line, number, reason in zip(logged, DAMAGED, reasons, strict=True):
        assert f"unreadable      {number:02}.jpeg (example {number}): {reason}" in line

    stands_in = {3: 5, 4: 5, 20: 21}
    replaced = 0
    for batch, whole in zip(ours, take(clean), strict=True):
        expected = [stands_in.get(index, index) for index in whole["index"].tolist()]
        assert batch["index"].tolist() == expected
        same = batch["index"] == whole["index"]
        replaced += (~same).sum()
        np.testing.assert_array_equal(batch["image"][same], whole["image"][same])
    assert replaced == 2 * len(DAMAGED)


def test_an_iterator_that_failed_is_gone_before_the_next_begins(damaged):
    """Garbage collected later, in the middle of a call of Python, it could wait for that call."""
    source = datasets.load(f"folder:{damaged}", "train", "unused")
    settings = {"batch_size": 8, "seed": 5, "max_unreadable": 3}
    with pipeline.train_batches(source, TRANSFORM, **settings) as batches:
        first = weakref.ref(batches._iterator)
        gc.collect()
        gc.disable()
        try:
            while batches._iterator is first():  # until an image cannot be read
                next(batches)
            assert first() is None
        finally:
            gc.enable()


def test_a_restart_gives_the_same_batches(damaged):
    for batch, again in zip(take(damaged)[4:], take(damaged, 2, start_step=4), strict=True):
        for key in batch:
            np.testing.assert_array_equal(batch[key], again[key])


def test_too_many_are_an_error_that_names_them(damaged):
    with pytest.raises(
        InputError, match=r"3 images cannot be read, more than data\.max_un.*=2: "
    ) as error:
        take(damaged, limit=2)
    for number in DAMAGED:
        assert f"{number:02}.jpeg (example {number})" in str(error.value)


def test_evaluation_leaves_them_out(damaged):
    source = datasets.load(f"folder:{damaged}", "train", "unused")
    with pipeline.eval_batches(
        source, EvalTransform((16, 16)), batch_size=10, max_unreadable=3
    ) as batches:
        counted = np.concatenate([batch["index"][batch["mask"] > 0] for batch in batches])
    assert sorted(counted) == [index for index in range(COUNT) if index not in DAMAGED]


def test_a_file_that_is_gone(clean, tmp_path):
    root = shutil.copytree(clean, tmp_path / "copy")
    source = datasets.load(f"folder:{root}", "train", "unused")
    (root / "train" / "scene" / "07.jpeg").unlink()
    with pipeline.train_batches(
        source, TRANSFORM, batch_size=24, seed=5, max_unreadable=1
    ) as batches:
        assert sorted(next(batches)["index"]) == sorted([*range(7), *range(8, COUNT), 8])


@pytest.fixture
def digits(data_dir, tmp_path):
    return shutil.copytree(data_dir, tmp_path / "data")


def records_file(digits):
    (path,) = (digits / "digits").rglob("digits-train.array_record*")
    return path


def test_a_damaged_record(digits):
    path = records_file(digits)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(50))
    source = datasets.load("digits", "train", str(digits))
    with pipeline.train_batches(
        source, TRANSFORM, batch_size=1297, seed=5, max_unreadable=2
    ) as batches:
        found = np.bincount(next(batches)["index"], minlength=1297)
    assert 1 <= (found == 0).sum() <= 2
    assert found.sum() == 1297


def test_a_file_of_records_that_is_cut_off(digits):
    path = records_file(digits)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(InputError, match=r"digits-train.*is cut off or damaged"):
        datasets.load("digits", "train", str(digits))
