"""One table of classes for all splits of a run, kept with it, and used by whatever reads it."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy.special import logsumexp

from spvit_jax import weights
from spvit_jax.convert import convert, write_checkpoint
from spvit_jax.data import datasets
from spvit_jax.data.crops import WholeTransform
from spvit_jax.data.sources import Renumbered
from spvit_jax.data.token_labels.store import LabelMaps, write
from spvit_jax.errors import InputError
from spvit_jax.evaluate import evaluate_checkpoint
from spvit_jax.explain import explain
from spvit_jax.preflight import launch_checks
from spvit_jax.train import train
from spvit_jax.training import checkpoint, sharding
from spvit_jax.training.run import DataSize
from tests.helpers.commands import saved_arrays
from tests.helpers.configs import digits
from tests.helpers.variables import run

CLASSES = ("ant", "bee", "cat", "dog", "eel")
IMAGES = 3  # of each class and split


def add(root, split, *names, count=IMAGES):
    """Writes a split of images, of which no two are alike."""
    for name in names:
        folder = root / split / name
        folder.mkdir(parents=True)
        for number in range(count):
            rng = np.random.default_rng([ord(letter) for letter in f"{split}{name}{number}"])
            pixels = rng.integers(0, 256, (12, 12, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")


def config_of(root, **data):
    config = digits("vit")
    config.model.update({"depth": 1, "dim": 12})
    config.data.update(dataset=f"folder:{root}", eval_split="validation", batch_size=8)
    config.data.update(eval_batch_size=16, **data)
    config.optim.ema = 0.0
    config.schedule.update(total="2 steps", warmup="0 steps")
    return config


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Splits that lack classes: in the middle, at the start, and all but one."""
    root = tmp_path_factory.mktemp("images")
    add(root, "train", *CLASSES)
    add(root, "validation", "ant", "cat", "dog", "eel")
    add(root, "late", "dog", "eel")
    add(root, "other", "bee", "zebra")
    return root


@pytest.fixture(scope="module")
def workdir(root, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "run"
    assert train(config_of(root), workdir)
    return workdir


def evaluate(root, path, split="validation"):
    return evaluate_checkpoint(config_of(root), path, which="best", weights="auto", split=split)


def losses(workdir, source, numbers):
    """The loss and the accuracy, from the logits alone."""
    config = config_of("unused")
    found = weights.find(workdir, None)
    variables = found.load(found.config, sharding.make_mesh(-1, 1))
    encoded, _ = source.fetch(np.arange(len(source)))
    images = np.stack([WholeTransform((12, 12))(one).numpy() for one in encoded])
    images = (images / 255 - config.data.mean) / config.data.std
    logits = np.asarray(run(variables, images), np.float64)
    right = logits[np.arange(len(logits)), numbers]
    return (logsumexp(logits, -1) - right).mean(), (right == logits.max(-1)).mean()


@pytest.mark.parametrize(("split", "numbers"), [("validation", [0, 2, 3, 4]), ("late", [3, 4])])
def test_a_split_without_some_classes_has_the_numbers_of_the_rest(split, numbers, workdir, root):
    source = datasets.load(f"folder:{root}", split, "unused")
    loss, top1 = losses(workdir, source, np.repeat(numbers, IMAGES))
    result = evaluate(root, workdir, split)
    assert result["count"] == len(numbers) * IMAGES
    np.testing.assert_allclose(result["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(result["top1"], top1)
    if split == "validation":
        last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
        np.testing.assert_allclose(next(v for k, v in last.items() if "loss" in k), loss, rtol=1e-5)


def test_the_table_is_kept_with_the_run_and_its_checkpoints(workdir):
    assert json.loads((workdir / "classes.json").read_text()) == list(CLASSES)
    assert checkpoint.class_names_of(checkpoint.find(workdir)) == CLASSES


def test_the_checkpoints_table_goes_before_the_training_splits(workdir, tmp_path):
    """Also where the training split is gone, or has other classes by now."""
    add(tmp_path, "validation", "bee", "eel")
    alone = evaluate(tmp_path, workdir)
    add(tmp_path, "train", "aardvark", "bee")
    assert evaluate(tmp_path, workdir)["loss"] == alone["loss"]
    source = datasets.load(f"folder:{tmp_path}", "validation", "unused")
    loss, _ = losses(workdir, source, np.repeat([1, 4], IMAGES))
    np.testing.assert_allclose(alone["loss"], loss, rtol=1e-5)


def test_a_class_of_another_split_alone_is_named(root, workdir, tmp_path):
    words = r"1 of them are not among the 5 of .*: zebra; expected only ant, bee, cat, dog, eel"
    with pytest.raises(InputError, match=words):
        train(config_of(root, eval_split="other"), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(InputError, match=words):
        evaluate(root, workdir, "other")
    with pytest.raises(InputError, match=words):
        explain(config_of(root, eval_split="other"), workdir, tmp_path / "new")
    with pytest.raises(InputError, match=words):
        launch_checks.check_data(config_of(root, eval_split="other"))


def without_table(workdir, path):
    """Writes the weights as they were saved before there were tables."""
    found = weights.find(workdir, None)
    mesh = sharding.make_mesh(-1, 1)
    checkpoint.save_variables(path, found.load(found.config, mesh), found.config)
    return path


def test_weights_without_a_table_take_that_of_the_training_split(root, workdir, tmp_path):
    old = without_table(workdir, tmp_path / "old")
    assert checkpoint.class_names_of(checkpoint.find(old)) is None
    results = [evaluate(root, path, "late")["loss"] for path in (old, workdir)]
    assert results[0] == results[1]
    add(tmp_path, "validation", "ant", "bee")  # where there is no training split either
    with pytest.raises(InputError, match="a head of 5 classes, and 2 are asked for"):
        evaluate(tmp_path, old)


def test_conversion_keeps_the_table(workdir, tmp_path):
    convert(workdir, tmp_path / "same", None, image_size=(24, 24), write=write_checkpoint)
    assert weights.find(tmp_path / "same", None).class_names == CLASSES
    convert(workdir, tmp_path / "new", None, num_classes=7, write=write_checkpoint)
    assert weights.find(tmp_path / "new", None).class_names is None


def test_a_run_goes_on_with_its_own_classes_alone(root, workdir, tmp_path):
    copy, data = (
        shutil.copytree(workdir, tmp_path / "run"),
        shutil.copytree(root, tmp_path / "data"),
    )
    (copy / "config.json").unlink()  # which would name the other folder
    (data / "train" / "bee").rename(data / "train" / "bug")
    with pytest.raises(InputError, match=r"not expected: bug; missing: bee\); choose another"):
        train(config_of(data), copy)
    (copy / "config.json").unlink()
    (copy / "classes.json").unlink()  # as in a run of before there was one
    assert train(config_of(root), copy)


def test_fine_tuning_on_other_classes_needs_a_new_head(workdir, tmp_path):
    """Of the same number: the head would fit, and be wrong in all it says."""
    add(tmp_path, "train", "a", "b", "c", "d", "e")
    add(tmp_path, "validation", "a")
    config = config_of(tmp_path)
    config.init_from = str(workdir)
    words = r"trained on other classes .*expected: ant, .*missing: a, b, .*init_new_head=True"
    with pytest.raises(InputError, match=words):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()

    config.init_new_head = True
    config.optim.update(lr=1e-30, min_lr=1e-30, warmup_lr=1e-30)
    assert train(config, tmp_path / "run")
    old, new = saved_arrays(workdir, 2), saved_arrays(tmp_path / "run", 2)
    heads = {"model/params/head/kernel", "model/params/head/bias"}
    for name in (name for name in old if name.startswith("model/params/")):
        assert np.allclose(new[name], old[name], rtol=1e-6, atol=1e-9) == (name not in heads), name


def test_a_teacher_of_other_classes_is_refused(workdir, tmp_path):
    add(tmp_path, "train", "a", "b", "c", "d", "e")
    add(tmp_path, "validation", "a")
    config = config_of(tmp_path)
    config.distill.teacher, config.model.distilled = str(workdir), True
    with pytest.raises(InputError, match="choose a teacher of the same classes"):
        train(config, tmp_path / "run")


def test_the_names_of_tfds_are_compared_too(data_dir, tmp_path):
    source = datasets.load("digits", "test", data_dir)
    labels = source.labels()
    table = tuple("ab9876543210")
    numbered = datasets.numbered(source, table, "a test")
    assert numbered.num_classes == 12
    assert [table[label] for label in numbered.labels()] == [str(label) for label in labels]
    indices = np.array([7, 400])
    np.testing.assert_array_equal(numbered.fetch(indices)[1], numbered.labels()[indices])
    assert datasets.numbered(source, tuple("0123456789"), "a test") is source
    with pytest.raises(InputError, match=r"1 of them are not among the 9 of a test: 9;"):
        datasets.numbered(source, tuple("012345678"), "a test")


def test_several_labels_are_renumbered():
    class Source:
        class_names, num_classes, several_labels = ("a", "b", "c"), 3, True

        def labels(self):
            return np.array([[1, 1, 0], [0, 0, 1]], np.uint8)

    labels = Renumbered(Source(), ("c", "x", "a", "b")).labels()
    assert labels.dtype == np.uint8
    assert labels.tolist() == [[0, 0, 1, 1], [1, 0, 0, 0]]


def test_token_labels_know_their_classes(tmp_path):
    one = np.zeros((2, 1, 2, 2), np.float16)
    settings = {"count": 2, "num_classes": 2, "source": "a test"}
    write(tmp_path / "a.npy", [one, one], **settings, class_names=("a", "b"))
    LabelMaps(tmp_path / "a.npy").check(2, ("a", "b"))
    with pytest.raises(InputError, match="the same names in another order"):
        LabelMaps(tmp_path / "a.npy").check(2, ("b", "a"))
    write(tmp_path / "old.npy", [one, one], **settings)
    LabelMaps(tmp_path / "old.npy").check(2, ("b", "a"))


def test_preflight_knows_the_names(root):
    facts, _ = launch_checks.check_data(config_of(root))
    assert facts == DataSize(15, 12, 5, class_names=CLASSES)
