"""Folders of weights in the hub's format: timm itself loads what is written."""

import json

import numpy as np
import pytest
import torch
from etils import epath

from spvit_jax import config as config_lib
from spvit_jax import weights
from spvit_jax.convert import write_timm_folder
from spvit_jax.errors import InputError
from spvit_jax.models import ViTConfig, model_config, registered_name
from spvit_jax.training.sharding import make_mesh
from tests.helpers.timm_reference import timm
from tests.helpers.torch_models import randomise

NAMES = ("cat", "dog", "owl")


@pytest.mark.parametrize(
    ("name", "image_size", "theirs"),
    [
        ("deit_ti", 64, "deit_tiny_patch16_224"),
        ("deit_ti_distilled", 224, "deit_tiny_distilled_patch16_224"),
    ],
)
def test_timm_loads_it(name, image_size, theirs, tmp_path):
    model = model_config(name, image_size=image_size, num_classes=3)
    module = randomise(timm.create_model(theirs, num_classes=3, img_size=image_size).eval())
    mesh = make_mesh(-1, 1)
    variables = weights.find(module.state_dict(), model).load(model, mesh)
    folder, config = epath.Path(tmp_path / "hub"), config_lib.base()
    config.data.mean = (0.5, 0.4, 0.3)
    write_timm_folder(folder, variables, model, NAMES, config=config)

    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    for key, tensor in module.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], tensor, rtol=0, atol=0)
    assert list(loaded.pretrained_cfg["mean"]) == [0.5, 0.4, 0.3]
    assert list(loaded.pretrained_cfg["input_size"]) == [3, image_size, image_size]
    settings = json.loads((folder / "config.json").read_text())
    assert settings["architecture"] == theirs
    assert settings["label_names"] == list(NAMES)
    assert "cat, dog, owl" in (folder / "README.md").read_text()

    # And it comes back without being told what it is.
    found = weights.find(folder, None)
    assert found.config == model
    ours, again = (weights.arrays_of(tree) for tree in (variables, found.load(model, mesh)))
    for leaf in ours:
        np.testing.assert_array_equal(ours[leaf], again[leaf], err_msg=leaf)


def test_what_timm_has_not(tmp_path):
    for settings, words in (
        (model_config("spvit_s"), "timm has no spvit_s; it has DeiT, CaiT and Swin"),
        (ViTConfig(dim=24, num_heads=3), "timm has no model of these settings"),
    ):
        with pytest.raises(InputError, match=words):
            write_timm_folder(
                epath.Path(tmp_path / "hub"), None, settings, config=config_lib.base()
            )
    assert not (tmp_path / "hub").exists()


def test_names_of_models():
    assert registered_name(model_config("cait_s24", image_size=384, num_classes=7)) == "cait_s24"
    assert registered_name(model_config("spvit_m", dtype="bfloat16", scan=True)) == "spvit_m"
    assert registered_name(model_config("spvit_m", spatial_layers=18)) is None
