"""The models against PyTorch on real photographs: timm's where timm has them, else our own.

Weights go through the tables of names, so that these tests are about them too.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from spvit_jax.interop import files, to_ours
from spvit_jax.models import model_config
from spvit_jax.models.naming import map_named
from tests.helpers.photographs import photographs
from tests.helpers.torch_models import TorchViT, build_timm, randomise
from tests.helpers.variables import abstract_variables, run

pytestmark = pytest.mark.usefixtures("optimized")  # rounding is what is measured here

MIXED = ((4, 3), (4, 1), (4, 2), (12, 0))

# Name here, timm's name or None for our own module, pixels, overrides.
FULL = {
    "spvit_s": ("spvit_s", None, 224, {}),
    "spvit_s_384": ("spvit_s", None, 384, {}),
    "spvit_s_240": ("spvit_s", None, 240, {}),
    "spvit_m": ("spvit_m", None, 224, {}),
    "spvit_l": ("spvit_l", None, 224, {}),
    "lvvit_s": ("lvvit_s", None, 224, {}),
    "deit_s": ("deit_s", "deit_small_patch16_224", 224, {}),
    "deit_s_distilled": ("deit_s_distilled", "deit_small_distilled_patch16_224", 224, {}),
    "cait_xxs24": ("cait_xxs24", "cait_xxs24_224", 224, {}),
    "swin_t": ("swin_t", "swin_tiny_patch4_window7_224", 224, {}),
    "mait_t_soft": ("mait_t", None, 224, {"masked_heads": MIXED}),
    "mait_t_hard": ("mait_t", None, 224, {"masked_heads": MIXED, "mask_kind": "hard"}),
}
# Layer by layer, as recipes run it, and the small ones; the others as loops, which compile in a
# fifth of the time.
UNROLLED = "spvit_s"

SHAPE = {"image_size": (48, 64), "num_classes": 7, "num_heads": 3, "dim": 24}
TIMM_SHAPE = {"img_size": (48, 64), "num_classes": 7, "num_heads": 3, "embed_dim": 24}
SMALL = {
    "deit": ("deit_s", "deit_small_patch16_224", {"depth": 3}, {"depth": 3}),
    "deit_distilled": (
        "deit_s_distilled",
        "deit_small_distilled_patch16_224",
        {"depth": 3},
        {"depth": 3},
    ),
    "mait_layerscale": (
        "mait_s_layerscale",
        None,
        {"depth": 3, "masked_heads": ((1, 2), (2, 1))},
        {},
    ),
    "mait_hard": ("mait_s", None, {"depth": 3, "mask_kind": "hard", "mask_radius": (1, 2)}, {}),
    "lvvit": ("lvvit_s", None, {"depth": 3, "stem_width": 8}, {}),
    "spvit": ("spvit_s", None, {"depth": 4, "stem_width": 8, "spatial_layers": 3}, {}),
    "spvit_masked": (
        "spvit_s",
        None,
        {"depth": 3, "stem_width": 8, "spatial_layers": 2, "masked_heads": ((3, 2),)},
        {},
    ),
    "cait": ("cait_xxs24", "cait_xxs24_224", {"depth": 3}, {"depth": 3}),
    "swin": (
        "swin_t",
        "swin_tiny_patch4_window7_224",
        {"image_size": (64, 96), "depths": (2, 2), "window": 4},
        {"img_size": (64, 96), "depths": (2, 2), "window_size": 4, "num_heads": (3, 6)},
    ),
    # Windows of 7, which timm has at any size, divide neither 64×80 patches nor 32×40.
    "swin_padded": (
        "swin_t",
        "swin_tiny_patch4_window7_224",
        {"image_size": (256, 320), "depths": (2, 2), "window": 7},
        {"img_size": (256, 320), "depths": (2, 2), "num_heads": (3, 6)},
    ),
}


def torch_module(config, timm_name, dtype, **settings):
    module = build_timm(timm_name, **settings) if timm_name else TorchViT(config).eval()
    return randomise(module.to(dtype))


def torch_logits(module, images):
    with torch.no_grad():
        tensor = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        return module(tensor).numpy()


def difference(module, config, images, theirs, **execution):
    """The largest of our logits from `theirs`, over the standard deviation of theirs."""
    dtype = images.dtype
    found, arrays = to_ours(files.as_arrays(module.state_dict()), config)
    assert found == config
    variables = map_named(
        lambda name, _: jnp.asarray(arrays[name.partition("/")[2]], dtype),
        abstract_variables(dataclasses.replace(config, **execution)),
    )
    ours = np.asarray(run(variables, jnp.asarray(images)))
    assert ours.dtype == dtype
    return abs(ours - theirs).max() / theirs.std()


@pytest.mark.parametrize("case", FULL)
def test_full_models_in_float32(case):
    name, timm_name, size, overrides = FULL[case]
    config = model_config(name, image_size=size, **overrides)
    images = photographs(size).astype(np.float32)
    module = torch_module(config, timm_name, torch.float32)
    theirs = torch_logits(module, images)
    measured = difference(module, config, images, theirs, scan=case != UNROLLED)
    print(f"{case}: {measured:.1e} of the logits' standard deviation")
    assert measured <= 3e-5


@pytest.mark.parametrize("case", SMALL)
def test_small_models_in_float64(case):
    name, timm_name, overrides, settings = SMALL[case]
    config = model_config(name, dtype="float64", **(SHAPE | overrides))
    module = torch_module(config, timm_name, torch.float64, **(TIMM_SHAPE | settings))
    images = photographs(config.image_shape)
    with jax.enable_x64(True):
        assert difference(module, config, images, torch_logits(module, images)) <= 1e-9


@pytest.fixture(scope="module")
def masked_spvit():
    """A module of PyTorch, its configuration, images and their logits."""
    config = model_config("spvit_s", masked_heads=((8, 1), (8, 0)))
    module = torch_module(config, None, torch.float32)
    images = photographs(224).astype(np.float32)
    return module, config, images, torch_logits(module, images)


@pytest.mark.parametrize("change", [{"norm_eps": 1e-6}, {"mask_kind": "hard"}, {"skip_lam": 2.01}])
def test_the_tolerance_of_float32_sees_a_wrong_model(change, masked_spvit):
    """The smallest of the known mistakes is LayerNorm's epsilon."""
    module, config, images, theirs = masked_spvit
    wrong = dataclasses.replace(config, **change)
    assert difference(module, wrong, images, theirs, scan=True) > 3e-5
