"""Resizing against torch's own bicubic, and weights at another resolution."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from spvit_jax.errors import InputError
from spvit_jax.interop import to_ours
from spvit_jax.interop.files import as_arrays
from spvit_jax.models import model_config
from spvit_jax.models.naming import shapes_of
from spvit_jax.models.resize import adapt, resize_offset_table, resize_positions
from tests.helpers.torch_models import TorchViT, build_timm, randomise


def torch_bicubic(image, size):
    """Of [h, w, C], in float64."""
    tensor = torch.from_numpy(np.asarray(image, np.float64)).permute(2, 0, 1)[None]
    resized = F.interpolate(tensor, size=size, mode="bicubic", align_corners=False)
    return resized[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        *[((14, 14), (24, 24)), ((24, 24), (14, 14)), ((14, 14), (15, 15)), ((14, 14), (10, 16))],
        *[((10, 16), (24, 24)), ((1, 1), (3, 3)), ((2, 3), (1, 7)), ((14, 14), (14, 14))],
    ],
)
@pytest.mark.parametrize("num_prefix", [0, 2])
def test_positions_are_resized_as_torch_does(old, new, num_prefix):
    rng = np.random.default_rng(0)
    positions = rng.normal(size=(1, num_prefix + old[0] * old[1], 5)).astype(np.float32)
    resized = resize_positions(jnp.asarray(positions), old, new, num_prefix)
    np.testing.assert_array_equal(resized[:, :num_prefix], positions[:, :num_prefix])
    expected = torch_bicubic(positions[0, num_prefix:].reshape(*old, 5), new)
    np.testing.assert_allclose(resized[0, num_prefix:], expected.reshape(-1, 5), rtol=0, atol=1e-6)


def test_a_whole_model_goes_from_224_to_384():
    small = {"dim": 24, "num_heads": 3, "depth": 2, "stem_width": 8, "spatial_layers": 1}
    source = model_config("spvit_s", **small)
    module = randomise(TorchViT(source))
    found, arrays = to_ours(as_arrays(module.state_dict()), model_config("spvit_s", **small))
    target = dataclasses.replace(found, image_size=384)
    adapted = adapt(arrays, found, target)
    assert {name: a.shape for name, a in adapted.items()} == {
        name: leaf.shape for name, leaf in shapes_of(target).items()
    }
    expected = torch_bicubic(arrays["pos_embed"].reshape(14, 14, 24), (24, 24))
    np.testing.assert_allclose(adapted["pos_embed"][0], expected.reshape(576, 24), atol=1e-6)
    for name, array in arrays.items():
        if name != "pos_embed":
            np.testing.assert_array_equal(adapted[name], array)


def test_swins_tables_go_from_window_7_to_12_in_every_stage():
    settings = {"depths": (1, 1, 1, 1), "dim": 12}
    module = build_timm("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=12)
    found, arrays = to_ours(
        as_arrays(randomise(module).state_dict()), model_config("swin_t", **settings)
    )
    adapted = adapt(arrays, found, model_config("swin_t", image_size=384, **settings))
    for stage, heads in enumerate((3, 6, 12, 24)):
        theirs = module.state_dict()[f"layers.{stage}.blocks.0.attn.relative_position_bias_table"]
        expected = torch_bicubic(theirs.reshape(13, 13, heads), (23, 23))
        # Theirs runs from key to query, ours from query to key.
        expected = expected[::-1, ::-1].transpose(2, 0, 1)
        ours = adapted[f"blocks/{stage}/attn/position/table"]
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)


def test_a_table_for_another_window_need_not_be_square():
    table = np.random.default_rng(0).normal(size=(3, 13, 13)).astype(np.float32)
    resized = resize_offset_table(jnp.asarray(table), (3, 9, 23))
    expected = torch_bicubic(table.transpose(1, 2, 0), (9, 23)).transpose(2, 0, 1)
    np.testing.assert_allclose(resized, expected, rtol=0, atol=1e-6)


def test_only_resolution_and_classes_may_differ():
    source = model_config("deit_ti", depth=2)
    arrays = {name: np.zeros(leaf.shape) for name, leaf in shapes_of(source).items()}
    with pytest.raises(
        InputError, match=r"Missing: blocks/2/.*Unexpected: none.*Wrong shape: none"
    ):
        adapt(arrays, source, model_config("deit_ti", depth=3))
    with pytest.raises(InputError, match=r"Wrong shape: .*kernel 192×576 instead of 384×1152"):
        adapt(arrays, source, model_config("deit_s", depth=2))


def test_a_new_head_is_small_and_the_rest_is_kept():
    source = model_config("deit_ti_distilled", depth=1, num_classes=3)
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=leaf.shape) for name, leaf in shapes_of(source).items()}
    adapted = adapt(arrays, source, dataclasses.replace(source, num_classes=5))
    for head in ("head", "dist_head"):
        assert 0.01 < adapted[f"{head}/kernel"].std() < 0.03
        assert (adapted[f"{head}/bias"] == 0).all()
    assert not jnp.array_equal(adapted["head/kernel"], adapted["dist_head/kernel"])
    for name in arrays.keys() - {
        f"{h}/{p}" for h in ("head", "dist_head") for p in ("kernel", "bias")
    }:
        np.testing.assert_array_equal(adapted[name], arrays[name].astype(np.float32))
