"""The loop that needs no download: a teacher, its labels, and a student that learns from them."""

import numpy as np
import pytest

from spvit_jax.data.token_labels.store import LabelMaps
from tests.helpers.commands import CONFIG, SMALL, records_of, run

# Fifteen epochs, after which the small model is far from chance.
LONGER = [
    *SMALL,
    "--config.data.train_size=1297",
    "--config.data.batch_size=64",
    "--config.schedule.total=300 steps",
    "--config.log_every=50 steps",
    "--config.eval_every=300 steps",
    "--config.checkpoint.every=300 steps",
]


@pytest.fixture(scope="module")
def teacher(environment, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("token_labels") / "teacher"
    run(environment, "train", CONFIG, f"--workdir={workdir}", *LONGER)
    return workdir


@pytest.fixture(scope="module")
def labels(environment, teacher):
    path = teacher.parent / "labels.npy"
    args = ["make", CONFIG, *SMALL, f"--checkpoint={teacher}", f"--output={path}"]
    result = run(environment, "data.token_labels", *args)
    assert "1297 label maps of the shape 2×5×6×6; 0 images have none" in result.stdout
    return path


def test_the_teacher_labels_every_token_of_every_image(labels):
    maps = LabelMaps(labels)
    assert (len(maps), maps.shape, maps.num_classes, maps.missing) == (1297, (5, 6, 6), 10, 0)
    fetched = maps.fetch(np.arange(1297), np.zeros(1297, np.int32))
    values, classes = fetched[:, 0].astype(float), fetched[:, 1]
    assert (np.diff(values, axis=1) <= 0).all()
    assert set(np.unique(classes)) == set(range(10))


def test_a_student_that_sees_no_other_label_learns_from_them(environment, labels, tmp_path):
    student = [
        f"--config.token_labels.path={labels}",
        "--config.augment.mix_token=True",
        "--config.augment.mix_group_size=8",
    ]
    run(environment, "train", CONFIG, f"--workdir={tmp_path / 'run'}", *LONGER, *student)
    records = records_of(tmp_path / "run")
    assert [r["eval/top1"] for r in records if "eval/top1" in r][-1] > 0.4
    losses = [r["train/loss"] for r in records if "train/loss" in r]
    assert losses[-1] < losses[0] - 0.3


def test_labels_of_an_image_can_be_seen(environment, labels, tmp_path):
    args = ["show", "--dataset=digits", f"--labels={labels}", "--index=3"]
    result = run(environment, "data.token_labels", *args, f"--output={tmp_path / 'a.png'}")
    assert "image 3 of class" in result.stdout
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("data.token_labels", ["mak"], "did you mean 'make'?"),
        (
            "data.token_labels",
            ["pack", "--dataset=digits", "--labels={tmp}", "--output={tmp}/a.npy"],
            "does not say from which files its images are",
        ),
        (
            "data.token_labels",
            ["show", "--dataset=digits", "--split=test", "--labels={labels}", "--output={tmp}/a"],
            "of 1297 images of 10 classes, the split has 500",
        ),
        (
            "train",
            [CONFIG, "--workdir={tmp}/run", "--config.token_labels.path={tmp}/none.npy"],
            "is not a file of token labels",
        ),
        (
            "train",
            [
                *(CONFIG, "--workdir={tmp}/run", "--config.token_labels.path={labels}"),
                "--config.augment.mixup=0.8",
            ],
            "follow crops and not MixUp or CutMix",
        ),
        (
            "train",
            [
                *(CONFIG, "--workdir={tmp}/run", "--config.augment.mix_token=True"),
                "--config.augment.mix_group_size=48",
            ],
            "mix_group_size is 48, which does not divide the 64",
        ),
    ],
)
def test_wrong_input_is_one_line(name, args, words, environment, labels, tmp_path):
    args = [arg.format(tmp=tmp_path, labels=labels) for arg in args]
    result = run(environment, name, *args, check=False)
    assert result.returncode == 2
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert words in line
    assert list(tmp_path.iterdir()) == []
