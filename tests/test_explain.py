"""What is told about a model's heads, for every family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spvit_jax.explain import layer_similarity, learned_priors, locality_scores
from tests.helpers.variables import random_variables

SMALL = {"image_size": 24, "patch_size": 4, "dim": 12, "num_heads": 3, "num_classes": 5}


@pytest.mark.parametrize(
    ("name", "settings", "heads"),
    [
        ("deit_ti", {"depth": 2}, [3, 3]),
        ("cait_xxs24", {"depth": 2}, [3, 3]),
        ("swin_t", {"depths": (1, 2), "window": 3}, [3, 6, 6]),
    ],
)
def test_locality_is_the_share_of_attention_nearby(name, settings, heads):
    """With queries of 0 attention is uniform; hard masks leave nothing outside."""

    def scores(**overrides):
        variables = random_variables(name, **SMALL, **settings, **overrides)
        params = jax.tree.map(jnp.zeros_like, variables.params)
        if name == "cait_xxs24":  # talking heads that pass on what they hear
            for block in params["blocks"].values():
                for mix in ("mix_scores", "mix_weights"):
                    block["attn"][mix]["kernel"].set_value(jnp.eye(3))
        model = variables.replace(params=params).model()
        return locality_scores(model, jnp.ones((2, 24, 24, 3)))

    uniform = scores()
    assert [len(layer) for layer in uniform] == heads
    # A 6×6 grid has (3·6 − 2)² pairs within 3×3; a class token sees and is seen by all.
    expected = {"deit_ti": (16**2 + 73) / 37**2, "cait_xxs24": 16**2 / 36**2, "swin_t": 49 / 81}
    for layer in uniform:
        np.testing.assert_allclose(layer, expected[name], rtol=1e-5)
    masked = scores(masked_heads=((len(heads), 2),), mask_kind="hard")
    for layer in masked:
        np.testing.assert_allclose(layer[:2], 1, rtol=1e-5)
        np.testing.assert_allclose(layer[2:], expected[name], rtol=1e-5)


def test_padding_of_swins_windows_counts_for_nothing():
    """A 6×6 grid in windows of 5×5, padded to 10×10: queries are patches, keys are padding too."""
    settings = SMALL | {"depths": (1, 1), "window": 5}
    variables = random_variables("swin_t", **settings)
    model = variables.replace(params=jax.tree.map(jnp.zeros_like, variables.params)).model()
    images = jax.random.normal(jax.random.key(0), (2, 24, 24, 3))
    # Along an axis 2, 3, 3, 3, 2 of 5 places are near the patches 0 to 4, and 2 of 5 near the last.
    np.testing.assert_allclose(locality_scores(model, images)[0], (15 / 6) ** 2 / 25, rtol=1e-5)
    np.testing.assert_allclose(layer_similarity(model, images)[0, 0], 1, rtol=1e-5)


def test_only_spatial_layers_have_a_learned_prior():
    settings = SMALL | {"depth": 3, "stem_width": 8, "spatial_layers": 2}
    priors = learned_priors(random_variables("spvit_s", **settings).model())
    assert {layer: table.shape for layer, table in priors.items()} == {
        0: (3, 11, 11),
        1: (3, 11, 11),
    }
    assert learned_priors(random_variables("cait_xxs24", **SMALL, depth=1).model()) == {}


@pytest.mark.parametrize(
    ("name", "settings", "comparable"),
    [
        ("spvit_s", {"depth": 3, "stem_width": 8, "spatial_layers": 2}, ["111"] * 3),
        # In the first stage every other layer shifts its windows; the second has one window.
        (
            "swin_t",
            {"depths": (3, 2), "window": 3},
            ["10100", "01000", "10100", "00011", "00011"],
        ),
    ],
)
def test_similarity_is_the_cosine_of_rows_of_attention(name, settings, comparable):
    model = random_variables(name, **SMALL, **settings).model()
    images = jax.random.normal(jax.random.key(0), (2, 24, 24, 3))
    similarity = layer_similarity(model, images)
    assert ["".join(str(int(x)) for x in row) for row in ~np.isnan(similarity)] == comparable
    np.testing.assert_allclose(np.diag(similarity), 1, rtol=1e-5)
    np.testing.assert_array_equal(similarity, similarity.T)

    maps = model.attention_maps(images)
    one, other = (  # the class token is there in the last layer of SP-ViT alone
        np.asarray(maps[layer].weights)[:, :, maps[layer].num_prefix :, maps[layer].num_prefix :]
        for layer in (0, 2)
    )
    norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    expected = ((one * other).sum(-1) / norms).mean()
    assert 0 < expected < 0.999
    np.testing.assert_allclose(similarity[0, 2], expected, rtol=1e-5)
