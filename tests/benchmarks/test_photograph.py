"""What is drawn on the README's photograph is what models have."""

import numpy as np

from benchmarks.photograph import GRID, QUERY, gain, masked_head, shifted_window
from spvit_jax.analysis.priors import learned_priors
from tests.helpers.variables import random_variables


def test_gains_are_those_of_the_query():
    """On the photograph's grid, by the model's own function, though read from the digits' table."""
    settings = {"image_size": 12, "patch_size": 2, "dim": 12, "num_heads": 3, "stem_width": 4}
    model = random_variables("spvit_s", **settings, depth=2, spatial_layers=1).model()
    whole = np.asarray(model.blocks[0].attn.prior(GRID))[:, QUERY[0] * GRID[1] + QUERY[1]]
    for head in range(3):
        drawn = gain(learned_priors(model), 0, head)
        np.testing.assert_allclose(drawn, whole[head].reshape(GRID), rtol=1e-5)


def test_masks_are_around_the_query():
    """Shifted by 2, windows of 4×4 begin at rows and columns 2, 6 and 10."""
    near, window = np.zeros(GRID, bool), np.zeros(GRID, bool)
    near[3:6, 4:7] = True
    window[2:6, 2:6] = True
    np.testing.assert_array_equal(masked_head(), near)
    np.testing.assert_array_equal(shifted_window(), window)
