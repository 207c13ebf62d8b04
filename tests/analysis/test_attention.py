"""Attention with its places in the image: of windows, of prefix tokens, of pyramids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spvit_jax.analysis.attention import (
    attention_of_patches,
    attention_of_prefix,
    attention_received,
    check_has_attention,
    patch_at,
    stride_per_layer,
)
from spvit_jax.errors import InputError
from spvit_jax.models import model_config
from tests.helpers.attention import layers_of, maps_of
from tests.helpers.variables import random_variables

SMALL = {"image_size": 24, "patch_size": 4, "dim": 12, "num_heads": 3, "num_classes": 5}
IMAGES = jax.random.normal(jax.random.key(0), (2, 24, 24, 3))


@pytest.mark.parametrize("layer", range(3))
def test_windows_are_put_together(swin, layer):
    layers, matrices = swin
    given, matrix = layers[layer], matrices[layer]
    h, w = given.grid
    assert given.stride == (4, 4, 8)[layer]
    maps = attention_of_patches(given, range(h * w))
    expected = matrix.reshape(*matrix.shape[:3], h, w).swapaxes(1, 2)
    np.testing.assert_allclose(maps, expected, atol=1e-7)
    received = attention_received(given)
    np.testing.assert_allclose(received.reshape(2, -1, h * w), matrix.mean(2), atol=1e-6)
    assert (np.asarray(maps[:, h * w // 2]) == 0).any() == (layer < 2)  # out of its window


def test_prefix_tokens_and_patches_are_apart():
    """In a distilled DeiT, tokens 0 and 1 are no patches, and patch 0 is token 2."""
    variables = random_variables("deit_ti_distilled", **SMALL, depth=1)
    weights = np.asarray(maps_of(variables, IMAGES)[0].weights)
    (layer,) = layers_of(variables, IMAGES)
    expected = weights[:, :, :2, 2:].reshape(2, 3, 2, 6, 6).swapaxes(1, 2)
    np.testing.assert_allclose(attention_of_prefix(layer), expected, atol=1e-6)
    maps = attention_of_patches(layer, [0, 35, 7])
    expected = weights[:, :, [2, 37, 9], 2:].reshape(2, 3, 3, 6, 6).swapaxes(1, 2)
    np.testing.assert_allclose(maps, expected, atol=1e-6)


def test_talking_heads_are_those_before_the_second_mix():
    """Rows are distributions, which those that multiply the values are not."""
    variables = random_variables("cait_xxs24", **SMALL, depth=2)
    for layer in layers_of(variables, IMAGES):
        np.testing.assert_allclose(layer.weights.sum(-1), 1, rtol=1e-5)
        assert (np.asarray(layer.weights) >= 0).all()
    sums = maps_of(variables, IMAGES)[0].weights.sum(-1)
    assert np.abs(np.asarray(sums) - 1).max() > 0.01


def test_class_attention_is_what_weighs_the_values():
    model = random_variables("cait_xxs24", **SMALL, depth=1, distilled=True).model()
    maps = model.class_attention(IMAGES)
    assert [each.shape for each in maps] == [(2, 3, 2, 38)] * 2
    patches = model.through_blocks(model.embed(IMAGES)).x
    prefix = jnp.broadcast_to(
        jnp.concatenate([model.cls_token[...], model.dist_token[...]], axis=1), (2, 2, 12)
    )
    for block, weights in zip(model.class_blocks, maps, strict=True):
        tokens = block.norm1(jnp.concatenate([prefix, patches], axis=1))
        values = block.attn.v(tokens).reshape(2, 38, 3, 4)
        out = np.einsum("bhnm,bmhd->bnhd", weights, values).reshape(2, 2, 12)
        expected = block.attn(tokens, 2)
        np.testing.assert_allclose(block.attn.proj(jnp.asarray(out)), expected, atol=1e-5)
        prefix = block(prefix, patches)
    assert random_variables("deit_ti", **SMALL, depth=1).model().class_attention(IMAGES) == []


def test_a_patch_is_found_in_each_stage():
    """Of 7×5 patches, the one in row 6 and column 3 is in the last row of 4×3 and of 2×2."""
    assert [patch_at(6, 3, (7, 5), grid) for grid in ((7, 5), (4, 3), (2, 2))] == [33, 10, 2]
    assert stride_per_layer(model_config("swin_t", depths=(1, 2))) == [4, 8, 8]
    assert stride_per_layer(model_config("deit_ti", depth=2)) == [16, 16]


def test_a_model_without_attention_is_refused():
    model = random_variables("deit_ti", **SMALL, depth=2).model()
    check_has_attention(model)
    model.blocks[1].attn = model.blocks[1].norm1
    with pytest.raises(InputError, match=r"ViT has no attention among patches.*layer 1 has none"):
        check_has_attention(model)
    del model.blocks
    with pytest.raises(InputError, match="it has no blocks; expected a model whose blocks"):
        check_has_attention(model)
