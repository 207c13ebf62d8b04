"""Measures of attention: known answers, NumPy in float64, and means over whatever batches."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spvit_jax.analysis.attention import LayerAttention
from spvit_jax.analysis.measures import distance, entropy, images_per_step, locality, measure
from spvit_jax.errors import InputError
from spvit_jax.models import model_config
from spvit_jax.training import sharding
from tests.helpers.attention import layers_of, maps_of
from tests.helpers.variables import random_variables

SMALL = {"image_size": 24, "patch_size": 4, "dim": 12, "num_heads": 3, "num_classes": 5}
IMAGES = jax.random.normal(jax.random.key(0), (2, 24, 24, 3))


def layer_of(matrix, grid, *, num_prefix=0, stride=1):
    """The layer of one image and one head whose attention is a matrix [P+N, P+N]."""
    patches = np.arange(grid[0] * grid[1])[None]
    weights = jnp.asarray(matrix, jnp.float32)[None, None, None]
    return LayerAttention(weights, patches, grid, grid, num_prefix, stride)


def uniform(size):
    return np.full((size, size), 1 / size)


def test_a_patch_that_looks_at_itself():
    layer = layer_of(np.eye(13), (3, 4), num_prefix=1)
    np.testing.assert_array_equal(locality(layer, (0, 0)), 1)
    np.testing.assert_array_equal(distance(layer), 0)
    np.testing.assert_array_equal(entropy(layer), 0)


def test_a_patch_that_looks_everywhere():
    """The 2×2 patches are 0, 1, 1 and √2 apart; a 14×14 grid has 1,993 pairs that are near."""
    layer = layer_of(uniform(5), (2, 2), num_prefix=1, stride=16)
    np.testing.assert_allclose(distance(layer), 16 * (2 + math.sqrt(2)) / 4, rtol=1e-6)
    np.testing.assert_allclose(entropy(layer), math.log(5), rtol=1e-6)
    layer = layer_of(uniform(197), (14, 14), num_prefix=1)
    np.testing.assert_allclose(locality(layer, (1, 1)), 1993 / 197**2, rtol=1e-5)


def test_attention_on_the_class_token_alone_has_no_distance():
    layer = layer_of(np.ones((5, 1)) * np.eye(5)[0], (2, 2), num_prefix=1)
    np.testing.assert_array_equal(distance(layer), 0)
    np.testing.assert_array_equal(entropy(layer), 0)
    np.testing.assert_array_equal(locality(layer, (0, 0)), 1)


def read(weights, grid, num_prefix, radius, stride):
    """Locality, distance and entropy [B, H] of attention [B, H, P+N, P+N], pair by pair."""
    weights = np.asarray(weights, np.float64)
    queries, width = weights.shape[2], grid[1]
    near, apart, log = (np.zeros(weights.shape[:2]) for _ in range(3))
    for i, j in itertools.product(range(queries), repeat=2):
        a, b = i - num_prefix, j - num_prefix
        dy, dx = a // width - b // width, a % width - b % width
        if min(a, b) < 0 or (abs(dy) <= radius[0] and abs(dx) <= radius[1]):
            near += weights[:, :, i, j]
        if min(a, b) >= 0:
            on_patches = weights[:, :, i, num_prefix:].sum(-1)
            apart += math.hypot(dy, dx) * weights[:, :, i, j] / on_patches
        if a >= 0:
            share = weights[:, :, i, j]
            log -= share * np.log(np.where(share > 0, share, 1))
    num_patches = queries - num_prefix
    return near / queries, stride * apart / num_patches, log / num_patches


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("deit_ti_distilled", {"image_size": (16, 24), "mask_radius": (0, 2), "depth": 1}),
        (
            "mait_pyramid_t",
            {"image_size": (16, 24), "depths": (1, 1), "masked_heads": ((2, 2),)}
            | {"mask_kind": "hard"},
        ),
    ],
)
def test_measures_are_those_of_numpy(name, settings):
    variables = random_variables(name, **(SMALL | settings))
    images = jax.random.normal(jax.random.key(0), (2, 16, 24, 3))
    radius = variables.model().config.mask_shape
    layers = layers_of(variables, images)
    for layer, attention in zip(layers, maps_of(variables, images), strict=True):
        expected = read(*attention, radius, layer.stride)
        for ours, theirs in zip(
            (locality(layer, radius), distance(layer), entropy(layer)), expected, strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=2e-5)


def test_distances_in_windows_are_those_of_the_image(swin):
    """Also across the seam of a shifted window that is padded, where patches are far apart."""
    for layer, matrix in zip(*swin, strict=True):
        on_patches = matrix / matrix.sum(-1, keepdims=True)
        expected = read(on_patches, layer.grid, 0, (1, 1), layer.stride)[1]
        np.testing.assert_allclose(distance(layer), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "heads"),
    [
        ("deit_ti", {"depth": 2}, [3, 3]),
        ("cait_xxs24", {"depth": 2}, [3, 3]),
        ("swin_t", {"depths": (1, 2), "window": 3}, [3, 6, 6]),
    ],
)
def test_locality_of_uniform_and_of_masked_heads(name, settings, heads):
    """With queries of 0 attention is uniform; hard masks leave nothing outside."""

    def scores(**overrides):
        variables = random_variables(name, **SMALL, **settings, **overrides)
        zeros = variables.replace(params=jax.tree.map(jnp.zeros_like, variables.params))
        layers = layers_of(zeros, jnp.ones((2, 24, 24, 3)))
        return [np.asarray(locality(layer, (1, 1))) for layer in layers]

    # A 6×6 grid has (3·6 − 2)² pairs within 3×3; a class token sees and is seen by all.
    expected = {"deit_ti": (16**2 + 73) / 37**2, "cait_xxs24": 16**2 / 36**2, "swin_t": 49 / 81}
    plain, masked = scores(), scores(masked_heads=((len(heads), 2),), mask_kind="hard")
    assert [layer.shape[1] for layer in plain] == heads
    for layer in plain:
        np.testing.assert_allclose(layer, expected[name], rtol=1e-5)
    for layer in masked:
        np.testing.assert_allclose(layer[:, :2], 1, rtol=1e-5)
        np.testing.assert_allclose(layer[:, 2:], expected[name], rtol=1e-5)


def test_padding_of_swins_windows_counts_for_nothing():
    """A 6×6 grid in windows of 5×5, padded to 10×10: queries are patches, keys are padding too."""
    variables = random_variables("swin_t", **SMALL, depths=(1, 1), window=5)
    zeros = variables.replace(params=jax.tree.map(jnp.zeros_like, variables.params))
    first, _ = layers_of(zeros, IMAGES)
    # Along an axis 2, 3, 3, 3, 2 of 5 places are near the patches 0 to 4, and 2 of 5 near the last.
    np.testing.assert_allclose(locality(first, (1, 1)), (15 / 6) ** 2 / 25, rtol=1e-5)
    np.testing.assert_allclose(entropy(first), math.log(25), rtol=1e-5)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(-1, 1)


def batches_of(images, size):
    """Batches as evaluation has them: the last is padded, and its mask 0 there."""
    for start in range(0, len(images), size):
        part = images[start : start + size]
        padding = np.repeat(part[-1:], size - len(part), axis=0)
        mask = np.arange(size) < len(part)
        yield {"image": np.concatenate([part, padding]), "mask": mask.astype(np.float32)}


def test_means_do_not_depend_on_the_batches(mesh):
    """Of eleven images in batches of 8 and of 16, against each image by itself."""
    variables = random_variables("spvit_s", **SMALL, depth=3, stem_width=8, spatial_layers=2)
    images = np.random.default_rng(0).normal(size=(11, 24, 24, 3)).astype(np.float32)
    expected = [
        tuple(part.mean(0) for part in read(*attention, (1, 1), 4))
        for attention in maps_of(variables, images - 1)
    ]
    for size in (8, 16):
        measures = measure(variables, batches_of(images, size), mesh, lambda x: x - 1)
        assert measures.num_images == 11
        for layer, (near, apart, log) in enumerate(expected):
            np.testing.assert_allclose(measures.locality[layer], near, rtol=1e-5)
            np.testing.assert_allclose(measures.distance[layer], apart, rtol=1e-5)
            np.testing.assert_allclose(measures.entropy[layer], log, rtol=1e-5)
        np.testing.assert_allclose(np.diag(measures.similarity), 1, rtol=1e-5)
    with pytest.raises(InputError, match="there are no images"):
        measure(variables, [], mesh, lambda x: x)


def test_weights_that_are_not_finite(mesh):
    variables = random_variables("deit_ti", **SMALL, depth=1)
    variables.params["blocks"][0]["attn"]["qkv"]["kernel"].set_value(jnp.full((12, 36), jnp.nan))
    images = np.zeros((8, 24, 24, 3), np.float32)
    with pytest.raises(FloatingPointError, match="attention in layer 0 is not finite"):
        measure(variables, batches_of(images, 8), mesh, lambda x: x)


def test_memory_is_bounded():
    """At 384 pixels DeiT-S has 12 maps of 6 heads of 577² weights: 92 MiB for an image."""
    assert images_per_step(model_config("deit_s", image_size=384)) == 2
    assert images_per_step(model_config("mait_pyramid_t", image_size=384, depths=(1,))) == 1
    assert images_per_step(model_config("deit_ti", image_size=32, depth=1)) == 64
