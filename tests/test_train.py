"""Settings that cannot work are refused before the first step, and before a workdir is made."""

import pytest

from spvit_jax.errors import InputError
from spvit_jax.train import train
from tests.helpers.configs import digits


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.name": "deit_tiny"}, "unknown model 'deit_tiny'; did you mean 'deit_ti'"),
        ({"model.image_size": 13}, "13×13 is not a multiple of patch_size 2"),
        ({"model.spatial_layers": 4}, "class_token_layer None at depth 4; expected at most 3"),
        ({"model.masked_heads": ((2, 1),)}, "covers 2 layers, the model has 4"),
        ({"model.masked_heads": ((4, 4),)}, "asks for 4 masked heads"),
        ({"model.num_heads": 5}, "dim 48 is not a multiple of num_heads 5"),
        ({"data.batch_size": 60}, "data.batch_size is 60; expected a multiple of 8: 8 devices"),
        ({"optim.accumulate": 3}, "multiple of 24: 8 devices times 3 micro-batches"),
        ({"mesh.data": 3}, "mesh.data=3 and mesh.fsdp=1 do not make up the 8 devices"),
        ({"mesh.sharding": "zero"}, "unknown mesh.sharding 'zero'"),
        ({"data.dataset": "folder:/nowhere"}, "not a folder"),
        ({"data.train_size": 5000}, "expected 1 to 1297"),
        ({"schedule.total": "forever"}, "duration 'forever' cannot be read"),
        ({"init_from": "/nowhere"}, "/nowhere is neither a workdir nor a checkpoint"),
    ],
)
def test_refused_before_the_first_step(changes, words, data_dir, tmp_path):
    config = digits()
    config.data.data_dir = data_dir
    for path, value in changes.items():
        section, _, field = path.rpartition(".")
        target = config[section] if section else config
        target[field] = value
    workdir = tmp_path / "run"
    with pytest.raises(InputError) as error:
        train(config, workdir)
    assert words in str(error.value)
    assert not workdir.exists()


def test_a_teacher_needs_a_token_that_learns_from_it(data_dir, tmp_path):
    config = digits()
    config.data.data_dir = data_dir
    config.distill.teacher = str(tmp_path)
    with pytest.raises(InputError, match="no distillation token to learn from it"):
        train(config, tmp_path / "run")
    config.model.distilled = True
    with pytest.raises(InputError, match="neither a workdir nor a checkpoint"):
        train(config, tmp_path / "run")


def test_a_dry_run_takes_one_step_and_writes_nothing(data_dir, tmp_path, capfd):
    config = digits("vit")
    config.data.data_dir = data_dir
    config.model.update({"depth": 1, "dim": 12})
    config.augment.repeats = 3
    assert train(config, tmp_path / "run", dry_run=True) is False
    assert list(tmp_path.iterdir()) == []
    shown = capfd.readouterr().err
    for words in ('"total": 1600', "1,297 to train on", "dry run         from scratch, loss 2."):
        assert words in shown
