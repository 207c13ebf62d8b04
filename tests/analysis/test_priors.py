"""Learned priors as numbers, against the gains [H, N, N] that attention has."""

import jax.numpy as jnp
import numpy as np
import pytest

from spvit_jax.analysis.priors import gain_by_distance, learned_priors, prior_cosines
from tests.helpers.variables import random_variables

SMALL = {"image_size": 24, "patch_size": 4, "dim": 12, "num_heads": 3, "num_classes": 5}

GRIDS = {
    "spvit_s": {"image_size": (16, 24), "depth": 3, "stem_width": 8, "spatial_layers": 2},
    # The second stage has another grid and twice the heads.
    "mait_pyramid_t": {"image_size": (16, 24), "depths": (1, 1), "spatial_layers": 2},
}


@pytest.fixture(scope="module", params=GRIDS)
def gains(request):
    """A model's priors, and the gain [H, N, N] of each layer with its grid."""
    model = random_variables(request.param, **(SMALL | GRIDS[request.param])).model()
    grids = model.config.grid_per_layer()
    whole = {
        layer: (grids[layer], np.asarray(block.attn.prior(grids[layer]), np.float64))
        for layer, block in enumerate(model.blocks)
        if block.attn.prior is not None
    }
    return learned_priors(model), whole


def test_only_layers_with_sp_sa_have_a_prior(gains):
    priors, whole = gains
    assert list(priors) == list(whole) == [0, 1]
    for layer, ((h, w), _) in whole.items():
        assert priors[layer].shape == (3 * 2**layer if h < 4 else 3, 2 * h - 1, 2 * w - 1)
    assert learned_priors(random_variables("cait_xxs24", **SMALL, depth=1).model()) == {}


def test_cosines_are_correlations_over_all_pairs(gains):
    priors, whole = gains
    found = prior_cosines(priors)
    assert found.heads == [(layer, head) for layer in whole for head in range(len(priors[layer]))]
    for i, (a, head) in enumerate(found.heads):
        for j, (b, other) in enumerate(found.heads):
            if whole[a][0] == whole[b][0]:
                expected = np.corrcoef(whole[a][1][head].ravel(), whole[b][1][other].ravel())[0, 1]
                np.testing.assert_allclose(found.cosines[i, j], expected, atol=1e-5)
            else:
                assert np.isnan(found.cosines[i, j])
    for position, layer in enumerate(whole):
        own = [i for i, head in enumerate(found.heads) if head[0] == layer]
        pairs = [abs(found.cosines[i, j]) for i in own for j in own if i != j]
        np.testing.assert_allclose(found.within_layer[layer], np.mean(pairs))
        assert found.between_layers[position, position] > found.within_layer[layer]


def test_gain_by_distance_is_the_mean_over_pairs(gains):
    priors, whole = gains
    for layer, (distances, gain) in gain_by_distance(priors).items():
        (_, width), matrix = whole[layer]
        y, x = np.divmod(np.arange(matrix.shape[1]), width)
        apart = np.hypot(y[:, None] - y, x[:, None] - x).round()
        assert distances.tolist() == np.unique(apart).tolist()
        expected = [matrix[:, apart == each].mean(-1) for each in distances]
        np.testing.assert_allclose(gain, np.transpose(expected), rtol=1e-5)


def test_a_prior_that_is_the_same_everywhere_is_like_no_other():
    table = np.ones((2, 5, 5), np.float32)
    table[1, 0, 0] = 3
    found = prior_cosines({0: table, 2: jnp.asarray(table)})
    assert np.isnan(found.cosines[0]).all()
    np.testing.assert_allclose(found.cosines[1, [1, 3]], 1)
    assert np.isnan(found.within_layer[0])
