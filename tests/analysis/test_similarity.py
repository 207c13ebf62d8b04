"""Similarity of layers against NumPy in float64."""

import jax
import numpy as np
import pytest

from spvit_jax.analysis.similarity import similarity_sums
from tests.helpers.attention import layers_of, maps_of
from tests.helpers.variables import random_variables

SMALL = {"image_size": 24, "patch_size": 4, "dim": 12, "num_heads": 3, "num_classes": 5}
IMAGES = jax.random.normal(jax.random.key(0), (2, 24, 24, 3))


def cosine(one, other):
    """The mean cosine of rows [B, H, rows, columns], but those of padding."""
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    real = norms > 0
    return ((one * other).sum(-1)[real] / norms[real]).mean()


@pytest.mark.parametrize(
    ("name", "settings", "comparable"),
    [
        ("deit_ti_distilled", {"depth": 2}, ["11"] * 2),
        # The class token is there from layer 2 on.
        ("spvit_s", {"depth": 4, "stem_width": 8, "spatial_layers": 2}, ["1111"] * 4),
        # In the first stage every other layer shifts its windows, and two layers that do not are
        # alike; so is it with padding. The second stage has one window.
        ("swin_t", {"depths": (3, 2), "window": 4}, ["10100", "01000", "10100", *["00011"] * 2]),
    ],
)
def test_similarity_is_the_cosine_of_rows_of_attention(name, settings, comparable):
    variables = random_variables(name, **SMALL, **settings)
    sums = similarity_sums(layers_of(variables, IMAGES), np.ones(2, np.float32))
    similarity, of_prefix = (np.asarray(part) / 2 for part in sums)
    assert ["".join(str(int(x)) for x in row) for row in ~np.isnan(similarity)] == comparable
    np.testing.assert_allclose(np.diag(similarity), 1, rtol=1e-5)

    maps = maps_of(variables, IMAGES)
    for a, b in np.argwhere(~np.isnan(similarity)):
        one, other = maps[a], maps[b]
        both = min(one.num_prefix, other.num_prefix)
        parts = [each.weights[:, :, each.num_prefix - both :] for each in (one, other)]
        parts = [
            part[..., each.num_prefix - both :]
            for part, each in zip(parts, (one, other), strict=True)
        ]
        np.testing.assert_allclose(similarity[a, b], cosine(*parts), rtol=1e-5)
        assert np.isnan(of_prefix[a, b]) == (both == 0)
        if both:
            parts = [each.weights[:, :, :both] for each in (one, other)]
            np.testing.assert_allclose(of_prefix[a, b], cosine(*parts), rtol=1e-5)
    off_diagonal = similarity[~np.eye(len(similarity), dtype=bool)]
    assert np.nanmin(off_diagonal) < 0.999


def test_images_that_do_not_count():
    variables = random_variables("deit_ti", **SMALL, depth=2)
    images = jax.random.normal(jax.random.key(1), (4, 24, 24, 3))
    masked, _ = similarity_sums(layers_of(variables, images), np.array([0.0, 1, 0, 1]))
    alone, _ = similarity_sums(layers_of(variables, images[1::2]), np.ones(2))
    np.testing.assert_allclose(masked, alone, rtol=1e-6)
    np.testing.assert_allclose(np.diag(masked), 2, rtol=1e-5)
