"""How fresh weights are distributed: as in timm's models and torch's layers."""

import numpy as np
import pytest
import torch
from flax import nnx
from scipy.stats import ks_2samp

from spvit_jax.interop import to_ours
from spvit_jax.interop.files import as_arrays
from spvit_jax.models import model_config
from spvit_jax.models.naming import arrays_of
from tests.helpers.torch_models import TorchViT, build_timm


def assert_same_distributions(ours, theirs):
    """Array by array; those that are constant are equal."""
    drawn = 0
    for name, expected in theirs.items():
        found = np.asarray(ours[name])
        if np.ptp(expected) == 0:
            np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=name)
        else:
            drawn += 1
            test = ks_2samp(found.ravel()[:20_000], expected.ravel()[:20_000])
            assert test.pvalue > 1e-4, (name, found.std(), expected.std())
    assert drawn > 3


def fresh(config):
    return arrays_of(config.build(nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("name", "theirs", "settings"),
    [
        ("deit_ti", "deit_tiny_patch16_224", {"depth": 1}),
        ("cait_xxs24", "cait_xxs24_224", {"depth": 1}),
        ("swin_t", "swin_tiny_patch4_window7_224", {"depths": (1, 1)}),
    ],
)
def test_fresh_weights_are_distributed_as_timms(name, theirs, settings):
    torch.manual_seed(0)
    config = model_config(name, **settings)
    _, expected = to_ours(as_arrays(build_timm(theirs, **settings).state_dict()), config)
    if name == "deit_ti":  # timm's class token starts at 1e-6, that of DeiT's authors at 0.02
        expected["cls_token"] = 0.02 * np.random.default_rng(0).normal(size=(1, 1, 192))
    assert_same_distributions(fresh(config), expected)


def test_fresh_convolutions_are_distributed_as_torchs():
    torch.manual_seed(0)
    config = model_config("spvit_s", depth=2, spatial_layers=1)
    _, expected = to_ours(as_arrays(TorchViT(config).state_dict()), config)
    convolutions = {k: v for k, v in expected.items() if "patch_embed" in k or "pos_conv" in k}
    assert_same_distributions(fresh(config), convolutions)
