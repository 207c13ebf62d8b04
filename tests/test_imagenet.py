"""ImageNet from its archives to an evaluated model, with token labels of our own teacher."""

import json
import signal

import numpy as np
import pytest

from spvit_jax.data import imagenet
from spvit_jax.data.token_labels.store import LabelMaps
from tests.helpers import archives
from tests.helpers.commands import Command, assert_same_run, records_of, run, wait_until

STEPS = 8  # two epochs of 32 images
SMALL = [
    "--config.model.depth=2",
    "--config.model.dim=24",
    "--config.model.num_heads=2",
    "--config.model.stem_width=8",
    "--config.model.image_size=64",
    "--config.data.batch_size=8",
    "--config.data.eval_batch_size=8",
    "--config.data.max_unreadable=1",
    "--config.augment.mix_group_size=4",
    "--config.schedule.total=2 epochs",
    "--config.schedule.warmup=1 steps",
    "--config.schedule.cooldown=0 epochs",
    "--config.log_every=1 steps",
    "--config.checkpoint.every=1 steps",
]
STUDENT = ["--config=configs/spvit.py:s", *SMALL, "--config.model.spatial_layers=1"]
TEACHER = ["--config=configs/lvvit.py:t", *SMALL, "--config.augment.rand_augment="]
DAMAGED = "n01440764_3.JPEG"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The option that names a prepared data set, one of whose images is cut off."""
    root = tmp_path_factory.mktemp("imagenet")
    cut_off = archives.photograph(6)[:800]
    archives.make(root / "archives", replaced={DAMAGED: cut_off})
    imagenet.prepare(root / "archives", root / "data", partial=True)
    return f"--config.data.data_dir={root / 'data'}"


@pytest.fixture(scope="module")
def labels(data, environment, tmp_path_factory):
    root = tmp_path_factory.mktemp("labels")
    teacher, path = root / "teacher", root / "labels.npy"
    shown = run(environment, "train", *TEACHER, data, f"--workdir={teacher}")
    assert shown.stderr.count(f"unreadable      {DAMAGED}") == 1
    args = [*TEACHER, data, f"--checkpoint={teacher}", f"--output={path}"]
    result = run(environment, "data.token_labels", "make", *args)
    assert "31 label maps of the shape 2×5×4×4; 1 images have none" in result.stdout
    assert LabelMaps(path).num_classes == 1000
    return f"--config.token_labels.path={path}"


@pytest.fixture(scope="module")
def reference(data, labels, environment, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "reference"
    run(environment, "train", *STUDENT, data, labels, f"--workdir={workdir}")
    return workdir


def test_the_run_is_that_of_the_recipe(reference):
    """Two epochs, the loss of every step, and each evaluation over all twelve images."""
    records = records_of(reference)
    losses = [r["train/loss"] for r in records if "train/loss" in r]
    assert len(losses) == STEPS
    assert np.isfinite(losses).all()
    assert [r["eval/count"] for r in records if "eval/count" in r] == [12, 12]


def test_killed_and_started_again_it_is_the_same(reference, data, labels, environment, tmp_path):
    args = [*STUDENT, data, labels, f"--workdir={tmp_path / 'run'}"]
    process = Command(environment, "spvit_jax.train", *args)
    saved = tmp_path / "run" / "checkpoints" / "3"
    wait_until(saved.exists, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    resumed = run(environment, "train", *args)
    assert "the last checkpoint in the workdir" in resumed.stderr
    assert_same_run(tmp_path / "run", reference, STEPS)


def test_evaluation_counts_the_split_exactly(reference, data, environment, tmp_path):
    output = tmp_path / "result.json"
    args = [*STUDENT, data, f"--checkpoint={reference}", "--step=last", f"--json={output}"]
    run(environment, "evaluate", *args, "--config.data.eval_batch_size=5")
    result = json.loads(output.read_text())
    assert result["count"] == 12
    last = [r for r in records_of(reference) if "eval/loss" in r][-1]
    assert result["loss"] == pytest.approx(last["eval/loss"], rel=1e-5)


def test_too_many_damaged_images_end_the_run(data, environment, tmp_path):
    args = [*TEACHER, data, f"--workdir={tmp_path / 'run'}", "--config.data.max_unreadable=0"]
    result = run(environment, "train", *args, check=False)
    assert result.returncode == 2
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: 1 images cannot be read, more than data.max_unreadable=0")
    assert DAMAGED in line
