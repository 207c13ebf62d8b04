"""What a launch needs beside a program is looked at without changing anything."""

import pytest
from etils import epath

from spvit_jax import paths, plan
from spvit_jax.errors import InputError
from spvit_jax.preflight import launch_checks
from spvit_jax.preflight.launch_checks import ABSENT, OK, WRONG
from spvit_jax.training.run import DataSize, TrainingRun
from tests.helpers.bucket import serving
from tests.helpers.configs import digits, load


@pytest.fixture(scope="module")
def run():
    config = digits("vit")
    config.model.update({"depth": 1, "dim": 12})
    return plan.training_run(config, DataSize(1297, 500, 10))


def test_digits_are_counted(data_dir):
    config = digits()
    config.data.data_dir = data_dir
    config.data.train_size = "10%"
    facts, checks = launch_checks.check_data(config)
    assert facts == DataSize(130, 500, num_classes=10, class_names=tuple("0123456789"))
    assert [(check.what, check.state) for check in checks] == [("data", OK)]


def test_imagenet_is_planned_with_where_it_is_not(tmp_path):
    config = load("spvit", "s")
    config.data.data_dir = str(tmp_path)
    facts, checks = launch_checks.check_data(config)
    assert (facts.num_train, facts.num_eval, facts.num_classes) == (1_281_167, 50_000, 1000)
    assert facts.class_names[0] == "n01440764"
    assert checks[0].state == ABSENT
    config.data.train_size = 13_000
    config.data.minival, config.data.eval_split = "1%", "minival"
    facts, _ = launch_checks.check_data(config)
    assert (facts.num_train, facts.num_eval) == (13_000, 12_812)
    config.data.train_size = None
    assert launch_checks.check_data(config)[0].num_train == 1_281_167 - 12_812
    assert list(tmp_path.iterdir()) == []


def test_data_of_unknown_size_is_an_error(tmp_path):
    config = load("spvit", "s")
    config.data.data_dir = str(tmp_path)
    config.data.dataset = "cifar10"
    with pytest.raises(InputError, match="its examples cannot be counted"):
        launch_checks.check_data(config)
    config.data.dataset = "imagenet2013"
    with pytest.raises(InputError, match="did you mean"):
        launch_checks.check_data(config)
    config.data.dataset = f"folder:{tmp_path}"
    with pytest.raises(InputError, match="not a folder"):
        launch_checks.check_data(config)


def test_label_maps_that_are_not_here_are_taken_as_published(tmp_path):
    config = load("spvit", "s")
    config.data.data_dir = str(tmp_path)
    config.token_labels.path = str(tmp_path / "labels.npy")
    facts, checks = launch_checks.check_data(config)
    assert facts.label_map == (5, 18, 18)
    assert (checks[1].what, checks[1].state) == ("token labels", WRONG)
    assert "not a file of token labels" in checks[1].words


def test_a_workdir_that_can_be_used(run: TrainingRun, tmp_path):
    (check,) = launch_checks.check_launch(run, tmp_path / "runs" / "one")
    assert check.state == OK
    assert "4 checkpoints take" in check.words
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_that_cannot(run: TrainingRun, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (check,) = launch_checks.check_launch(run, tmp_path / "file" / "run")
    assert check.state == WRONG
    assert "cannot be written to" in check.words
    monkeypatch.setattr(paths.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    (check,) = launch_checks.check_launch(run, tmp_path / "run")
    assert check.state == WRONG
    assert "has no room" in check.words


def test_a_workdir_in_a_bucket(run: TrainingRun):
    with serving("launch") as bucket:
        (check,) = launch_checks.check_launch(run, bucket / "runs" / "one")
        assert check.state == OK
        assert "4 checkpoints take" in check.words
        assert "free" not in check.words
        assert paths.files_below(bucket) == []
        (check,) = launch_checks.check_launch(run, epath.Path("gs://nowhere/run"))
        assert check.state == WRONG
        assert "gs://nowhere/run cannot be written to" in check.words


def test_weights_that_are_not_there(run: TrainingRun, tmp_path):
    run.config.init_from = str(tmp_path / "nowhere")
    (check,) = launch_checks.check_launch(run, None)
    run.config.init_from = None
    assert (check.what, check.state) == ("init_from", WRONG)
    assert "neither a workdir nor a checkpoint" in check.words
