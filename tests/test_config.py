"""Durations, arguments, overrides and their errors."""

import dataclasses
import errno
import inspect
import json
import os
import pathlib
import re

import numpy as np
import pytest

from spvit_jax import config as config_lib
from spvit_jax.augment import mix
from spvit_jax.data.crops import TrainTransform
from spvit_jax.errors import InputError
from spvit_jax.models import FAMILIES, list_models
from spvit_jax.models.complexity import count_parameters
from spvit_jax.training import optimizer
from spvit_jax.training.step import StepSettings
from tests.helpers.configs import digits, load


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        ("10 epochs", 200),
        ("1 epoch", 20),
        ("7 steps", 7),
        ("1.28e3 examples", 26),
        (5, 5),
        ("5", 5),
    ],
)
def test_durations(duration, steps):
    assert config_lib.steps_of(duration, batch_size=50, num_examples=1000) == steps


@pytest.mark.parametrize("duration", ["ten epochs", "10 days", "", "-1 steps", "nan steps"])
def test_durations_that_cannot_be_read(duration):
    with pytest.raises(InputError, match="cannot be read; expected for example"):
        config_lib.steps_of(duration, batch_size=50, num_examples=1000)


def test_schedule_longer_than_the_run():
    config = digits()
    config.schedule.total = "10 steps"
    with pytest.raises(InputError, match=r"lengthen schedule\.total"):
        config_lib.resolve(config, num_examples=1297)


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ({"lr": 1e-6}, r"optim\.min_lr is 1e-05, above optim\.lr=1e-06: .*would rise.*set"),
        ({"lr": 1e-5, "warmup_lr": 1e-3}, r"optim\.warmup_lr is 0\.001, above optim\.lr=1e-05"),
        ({"min_lr": -1e-5}, r"optim\.min_lr is -1e-05"),
        ({"lr": 0.0}, r"optim\.lr is 0; expected a number above 0"),
        ({"lr": float("nan")}, r"optim\.lr is nan"),
        ({"lr": float("inf")}, r"optim\.lr is inf"),
        ({"warmup_lr": float("nan")}, r"optim\.warmup_lr is nan"),
    ],
)
def test_learning_rates_that_contradict_each_other(rates, words):
    config = digits()
    config.optim.update(rates)
    with pytest.raises(InputError, match=words):
        config_lib.resolve(config, num_examples=1297)


def test_a_constant_learning_rate_is_said_as_the_refusal_tells():
    config = digits()
    config.optim.update(lr=1e-6, min_lr=1e-6, warmup_lr=1e-6)
    rate = optimizer.make_schedule(config_lib.resolve(config, num_examples=1297))
    np.testing.assert_allclose([float(rate(step)) for step in range(0, 1700, 50)], 1e-6, rtol=1e-6)
    config.schedule.warmup = "0 steps"  # without one, its rate plays no part
    config.optim.warmup_lr = 1.0
    rate = optimizer.make_schedule(config_lib.resolve(config, num_examples=1297))
    np.testing.assert_allclose([float(rate(step)) for step in range(0, 1700, 50)], 1e-6, rtol=1e-6)


@pytest.mark.parametrize(("group", "accumulate"), [(128, 1), (64, 8), (1024, 1), (4096, 2)])
def test_groups_of_batchnorm_divide_a_micro_batch_or_are_all_of_it(group, accumulate):
    config = load("spvit", "s")
    config.model.batch_norm_group, config.optim.accumulate = group, accumulate
    resolved = config_lib.resolve(config, num_examples=1000)
    assert config_lib.model_settings(resolved, num_classes=10).batch_norm_group == group
    config.model.batch_norm_group, config.optim.accumulate = 96, 2
    with pytest.raises(InputError, match="is 96, which does not divide the 512 images"):
        config_lib.resolve(config, num_examples=1000)


@pytest.mark.parametrize(("name", "group"), [("deit", 8), ("spvit", 0)])
def test_groups_of_batchnorm_need_images_and_a_stem(name, group):
    config = load(name, "s")
    config.model.batch_norm_group = group
    with pytest.raises(InputError, match=f"batch_norm_group is {group} with stem_width="):
        config_lib.resolve(config, num_examples=1000)


def test_resolving_leaves_the_original_alone_and_is_idempotent():
    config = digits()
    once = config_lib.resolve(config, num_examples=1297)
    assert config.schedule.total == "1600 steps"
    assert once.schedule.total == 1600
    assert config_lib.resolve(once, num_examples=5).to_dict() == once.to_dict()


def test_every_field_has_a_comment():
    lines = inspect.getsource(config_lib.base).splitlines()
    fields = [line for line in lines if re.match(r"\s+(config|\w+)\.\w+ = ", line)]
    uncommented = [line for line in fields if "ConfigDict()" not in line and "  # " not in line]
    assert len(fields) > 70
    assert uncommented == []


def test_every_field_of_the_model_can_be_set():
    fields = {field.name for family in FAMILIES for field in dataclasses.fields(family)}
    assert set(config_lib.base().model) == fields - {"num_classes"} | {"name"}


def test_models_of_the_digits_config_are_near_equal_in_size():
    counts = {
        model: count_parameters(config_lib.model_settings(digits(f"model={model}"), num_classes=10))
        for model in ("vit", "lvvit", "spvit", "mait")
    }
    assert max(counts.values()) / min(counts.values()) < 1.03
    recipes = [digits(f"model={model}").to_dict() for model in counts]
    for recipe in recipes:
        del recipe["model"]
    assert all(recipe == recipes[0] for recipe in recipes)


@pytest.mark.parametrize(
    ("name", "size", "batch_size", "lr", "batch_size_384", "group_384", "ema_384", "crop"),
    [
        ("spvit", "s", 1024, 1.6e-3, 256, 32, 0.0, 0.9),
        ("spvit", "m", 1024, 1.6e-3, 128, 16, 0.0, 1.0),
        ("spvit", "l", 800, 6e-4, 512, 16, 0.99992, 1.0),
        ("lvvit", "s", 1024, 1.6e-3, 512, 64, 0.0, 0.9),
        ("lvvit", "m", 1024, 1.6e-3, 512, 64, 0.0, 1.0),
        ("lvvit", "l", 1024, 1e-3, 512, 64, 0.0, 1.0),
    ],
)
def test_token_labelling_recipes(
    name, size, batch_size, lr, batch_size_384, group_384, ema_384, crop
):
    config = load(name, size)
    assert config.augment.mix_group_size == batch_size / 8
    assert (
        config.augment.rand_augment == ("rand-n3-" if size == "l" else "rand-") + "m9-mstd0.5-inc1"
    )
    assert (config.data.batch_size, config.optim.lr, config.optim.min_lr) == (batch_size, lr, 1e-5)
    assert (config.optim.weight_decay, config.optim.ema) == (0.05, 0.99992)
    tuned = config_lib.resolve(load(name, f"{size},384"), num_examples=1_281_167)
    assert tuned.augment.mix_group_size == group_384
    assert tuned.model.image_size == 384
    assert (tuned.data.batch_size, tuned.optim.ema) == (batch_size_384, ema_384)
    assert (tuned.optim.lr, tuned.optim.min_lr, tuned.optim.weight_decay) == (5e-6, 5e-6, 1e-8)
    assert tuned.schedule.total == round(30 * 1_281_167 / batch_size_384)
    assert tuned.augment.eval_crop == crop


RECIPES = [
    *[("spvit", f"{size},{pixels}") for size in "sml" for pixels in (224, 384)],
    *[("lvvit", f"{size},{pixels}") for size in "tsml" for pixels in (224, 384)],
    *[("deit", arg) for arg in ("ti", "s", "b", "s,distilled=1", "b,1")],
    *[("mait", size) for size in ("xt", "t", "xs", "s", "s_layerscale")],
    *[("cait", size) for size in ("xxs24", "xxs36", "xs24", "s24", "s36", "m36", "m48")],
    *[("swin", size) for size in "tsb"],
]


@pytest.mark.parametrize(("name", "arg"), RECIPES)
def test_every_recipe_resolves_to_what_can_be_trained(name, arg):
    """At ImageNet's size: its model, its augmentation, its optimizer, its learning rate."""
    config = config_lib.resolve(load(name, arg), num_examples=1_281_167)
    model = config_lib.model_settings(config, num_classes=1000)
    assert config.model.name.startswith(f"{name}_{arg.partition(',')[0]}")
    assert model.image_shape == ((384, 384) if "384" in arg else (224, 224))
    transform = StepSettings.of(config, num_classes=1000).transform
    augmentation = TrainTransform.of(config, model.image_shape).augmentation
    assert augmentation.rand_augment.std == 0.5
    assert augmentation.fill == (124, 116, 104)
    mix.check_group_size(config)
    assert transform.mix_group_size == config.augment.mix_group_size
    optimizer.make_optimizer(config)
    rate = optimizer.make_schedule(config)
    assert float(rate(config.schedule.warmup)) == pytest.approx(config.optim.lr, rel=0.1)
    epochs = config.schedule.total * config.data.batch_size / 1_281_167
    expected = {"spvit": 310, "lvvit": 310, "deit": 300, "mait": 400, "cait": 400, "swin": 300}
    assert epochs == pytest.approx(30 if "384" in arg else expected[name], rel=1e-3)


@pytest.mark.parametrize("name", ["lvvit", "deit", "mait", "cait", "swin"])
def test_a_size_that_a_recipe_has_not(name):
    with pytest.raises(InputError, match="expected a size of"):
        load(name, "xxl")


@pytest.mark.parametrize("arg", ["x", "s,385", "s,image_size=384,384"])
def test_spvit_recipes_that_there_are_not(arg):
    with pytest.raises(InputError, match="config argument"):
        load("spvit", arg)


@pytest.mark.parametrize("name", list_models())
def test_any_model_has_an_evaluation_on_imagenet(name):
    config = load("imagenet", f"{name},384")
    crop, interpolation, mode = config_lib.evaluation_of(config, (384, 384))
    assert crop in (0.875, 0.9, 1.0)
    assert interpolation == "bicubic"
    assert mode == ("squash" if name.startswith("swin") else "center")
    config.augment.eval_crop = 0.5
    assert config_lib.evaluation_of(config, (384, 384)) == (0.5, "bicubic", mode)
    config.augment.update(eval_interpolation="bilinear", eval_crop_mode="center")
    expected = (0.5, "bilinear", "center")
    assert config_lib.evaluation_of(config, (384, 384)) == expected
    resolved = config_lib.resolve(config, num_examples=1_281_167).augment
    assert expected == (resolved.eval_crop, resolved.eval_interpolation, resolved.eval_crop_mode)


def test_arguments_of_a_config():
    config = digits("model=mait,train_size=200")
    assert config.model.name == "mait_t"
    assert config.data.train_size == 200
    assert digits().model.name == "spvit_s"


@pytest.mark.parametrize(
    ("arg", "words"),
    [
        ("model=spvti", "did you mean 'spvit'"),
        ("modl=spvit", "did you mean 'model'"),
        ("train_size=many", "of type int"),
        ("spvit,200,3", "not KEY=VALUE"),
    ],
)
def test_wrong_arguments(arg, words):
    with pytest.raises(InputError, match=words):
        digits(arg)


def test_json_round_trip(tmp_path):
    config = config_lib.resolve(digits("model=mait"), num_examples=1297)
    path = tmp_path / "config.json"
    path.write_text(config_lib.to_json(config))
    loaded = config_lib.from_json(path)
    assert config_lib.differences(loaded, config) == []
    assert config_lib.model_settings(loaded, num_classes=10) == config_lib.model_settings(
        config, num_classes=10
    )


def test_workdir_of_another_run(tmp_path):
    config = config_lib.resolve(digits(), num_examples=1297)
    config_lib.claim_workdir(tmp_path, config, in_use=False)
    config.optim.lr = 1.0
    config.mesh.fsdp = 2  # where it runs may change
    with pytest.raises(InputError, match=r"\(optim.lr: 0.003 → 1.0\); choose another --workdir"):
        config_lib.claim_workdir(tmp_path, config, in_use=True)
    config_lib.claim_workdir(tmp_path, config, in_use=False)  # nothing there to lose


@pytest.mark.parametrize("text", ["", "{", '{"seed": 0', "[1, 2]", "null", "\x00\xff", "é\n"])
def test_a_broken_record_of_the_settings_is_said_and_does_not_stop_the_run(text, tmp_path, caplog):
    config = config_lib.resolve(digits(), num_examples=1297)
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    config_lib.claim_workdir(tmp_path, config, in_use=True)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"warning: {path} cannot be read (")
    assert "\n" not in caplog.messages[0]
    assert config_lib.differences(config_lib.from_json(path), config) == []


def test_a_write_that_fails_leaves_the_old_settings(tmp_path, monkeypatch):
    """Whatever part of it the disk took."""
    config = config_lib.resolve(digits(), num_examples=1297)
    config_lib.claim_workdir(tmp_path, config, in_use=False)
    before = (tmp_path / "config.json").read_bytes()
    config.seed = 5

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, full)
            with pytest.raises(InputError, match="No space left on device"):
                config_lib.claim_workdir(tmp_path, config, in_use=False)
        assert (tmp_path / "config.json").read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("workdir", ["/proc/run", "/dev/null/run", "/dev/null"])
def test_a_workdir_that_cannot_be_written(workdir):
    config = config_lib.resolve(digits(), num_examples=1297)
    with pytest.raises(InputError, match=f"cannot write to workdir {workdir}: "):
        config_lib.claim_workdir(pathlib.Path(workdir), config, in_use=False)


def test_a_run_from_before_there_was_a_field_goes_on(tmp_path):
    """Its value then was the default; another is another run."""
    config = config_lib.resolve(digits(), num_examples=1297)
    path = tmp_path / "config.json"
    tree = config.to_dict()
    del tree["augment"]["eval_crop_mode"], tree["model"]["batch_norm_group"]
    path.write_text(json.dumps(tree))
    config_lib.claim_workdir(tmp_path, config, in_use=True, write=False)
    config.model.batch_norm_group = 8
    with pytest.raises(InputError, match=r"\(model.batch_norm_group: None → 8\)"):
        config_lib.claim_workdir(tmp_path, config, in_use=True, write=False)
