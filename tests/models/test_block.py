"""Drop path through a whole model: what is drawn, how often, and for whom."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spvit_jax.models.naming import map_named
from tests.helpers.timm_reference import timm
from tests.helpers.torch_models import build_timm
from tests.helpers.variables import random_variables

RATE = 0.6
# The model here, and timm's, whose rates are the yardstick.
FAMILIES = {
    "deit_ti": ({"depth": 4}, "deit_tiny_patch16_224", {"depth": 4}),
    "cait_xxs24": ({"depth": 4}, "cait_xxs24_224", {"depth": 4}),
    "swin_t": ({"depths": (4,), "window": 2}, "swin_tiny_patch4_window7_224", {"depths": (4,)}),
    "mait_pyramid_t": ({"depths": (4,)}, "swin_tiny_patch4_window7_224", {"depths": (4,)}),
}


def branches(name, examples, **settings):
    """What each branch adds [B, 2·depth] where each writes 1 into a channel of its own."""
    small = {"image_size": 8, "patch_size": 4, "dim": 12, "num_heads": 3, "num_classes": 2}
    variables = random_variables(name, **small, **settings, drop_path=RATE)

    def write_one(path, leaf):
        if last := re.fullmatch(r"blocks/(\d)/(attn/proj|mlp/fc2)/(kernel|bias)", path):
            channel = 2 * int(last[1]) + (last[2] == "mlp/fc2")
            return leaf * 0 if last[3] == "kernel" else jnp.eye(len(leaf))[channel]
        if path.endswith("gamma"):
            return jnp.ones_like(leaf)
        return leaf * (path not in ("pos_embed", "patch_norm/bias"))  # so that 0 comes in

    variables = variables.replace(params=map_named(write_one, variables.params))
    patches = jnp.zeros((examples, 2, 2, 12))

    @jax.jit
    def last_tokens(variables, key):
        return variables.model(train=True).through_blocks(patches, key).x[:, -1]

    return np.asarray(last_tokens(variables, jax.random.key(0)))[:, :8]


def rates_of(module):
    """Of the layers of patches of one of timm's models."""
    blocks = module.layers[0].blocks if hasattr(module, "layers") else module.blocks
    drops = timm.layers.DropPath
    found = ([m.drop_prob for m in block.modules() if isinstance(m, drops)] for block in blocks)
    return np.array([rates[0] if rates else 0.0 for rates in found])


@pytest.mark.parametrize("name", FAMILIES)
def test_each_branch_of_each_layer_is_dropped_by_itself_at_timms_rate(name):
    settings, theirs, their_settings = FAMILIES[name]
    rates = np.repeat(rates_of(build_timm(theirs, **their_settings, drop_path_rate=RATE)), 2)
    assert rates.max() == pytest.approx(RATE)
    added = branches(name, 4096, **settings)
    kept = added != 0
    np.testing.assert_allclose(added, kept / (1 - rates), rtol=1e-5)
    deviation = np.sqrt(rates * (1 - rates) / len(kept))
    assert (abs(kept.mean(0) - (1 - rates)) <= 5 * deviation).all()
    together = np.corrcoef(kept[:, rates > 0].T)
    np.testing.assert_allclose(together, np.eye(len(together)), atol=5 / len(kept) ** 0.5)
