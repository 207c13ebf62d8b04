"""timm's names, each held against timm's own model of that name."""

import pytest
import torch

from spvit_jax.errors import InputError
from spvit_jax.models import evaluation_protocol, model_config
from spvit_jax.models.aliases import ALIASES, timm_name
from spvit_jax.models.complexity import count_parameters
from tests.helpers.timm_reference import timm


@pytest.mark.parametrize("name", ALIASES)
def test_timm_has_the_name_and_the_size(name):
    assert timm.is_model(name)
    settings = timm.models.get_pretrained_cfg(name)
    assert model_config(name).image_shape == settings.input_size[1:]


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_384", "deit_small_distilled_patch16_224", "cait_xxs24_384"]
)
def test_the_model_is_timms(name):
    with torch.device("meta"):
        theirs = timm.create_model(name)
    assert count_parameters(model_config(name)) == sum(p.numel() for p in theirs.parameters())


def test_names_with_what_they_were_trained_on():
    assert model_config("deit_base_patch16_384.fb_in1k") == model_config("deit_b", image_size=384)
    assert model_config("swin_base_patch4_window12_384", image_size=224).image_size == 224
    assert evaluation_protocol("cait_s24_384", (384, 384)).crop == 1.0
    assert timm_name("deit_b", (384, 384)) == "deit_base_patch16_384"
    assert timm_name("deit_b", (160, 160)) == "deit_base_patch16_224"
    assert timm_name("spvit_s", (224, 224)) is None


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(InputError, match="did you mean 'deit_small_patch16_224'"):
        model_config("deit_smal_patch16_224")
