"""Gains, masks and their layout against definitions that go from pair to pair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spvit_jax.errors import InputError
from spvit_jax.models.spatial import LocalityMask, SpatialPrior, offsets, toeplitz
from tests.helpers import numpy_models
from tests.helpers.variables import random_variables

GRIDS = [(14, 14), (15, 15), (10, 16)]


def random_prior(heads=3, width=8, extent=None):
    prior = SpatialPrior(heads, width, extent=extent, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for name in ("w1", "b1", "w2", "b2"):
        value = getattr(prior, name)
        value[...] = jnp.asarray(rng.normal(size=value.shape), jnp.float32)
    return prior


def weights(prior):
    return [np.asarray(p[...], np.float64) for p in (prior.w1, prior.b1, prior.w2, prior.b2)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("extent", [None, 14])
def test_gain_equals_the_pairwise_definition(grid, extent):
    prior = random_prior(extent=extent)
    expected = numpy_models.pairwise_gain(*weights(prior), grid, extent)
    np.testing.assert_allclose(prior(grid), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (4, 1), (3, 5)])
def test_toeplitz_places_each_offset_exactly(grid):
    h, w = grid
    table = np.arange(2 * (2 * h - 1) * (2 * w - 1), dtype=np.float32)
    table = table.reshape(2, 2 * h - 1, 2 * w - 1)
    matrix = np.asarray(toeplitz(jnp.asarray(table)))
    for i in range(h * w):
        for j in range(h * w):
            dy, dx = j // w - i // w, j % w - i % w
            assert (matrix[:, i, j] == table[:, dy + h - 1, dx + w - 1]).all()
            assert (offsets(grid)[dy + h - 1, dx + w - 1] == (dx, dy)).all()


def test_gradient_of_the_table_is_that_of_the_pairs():
    grid, prior = (4, 5), random_prior()
    weight = jax.random.normal(jax.random.key(0), (3, 20, 20))
    table = prior.table(grid)
    gradient = jax.grad(lambda t: (toeplitz(t) * weight).sum())(table)
    expected = np.zeros_like(table)
    for i in range(20):
        for j in range(20):
            expected[:, j // 5 - i // 5 + 3, j % 5 - i % 5 + 4] += weight[:, i, j]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_fresh_prior_is_plain_attention():
    prior = SpatialPrior(3, 8, rngs=nnx.Rngs(0))
    assert (prior((5, 7)) == 1).all()


def test_prefix_tokens_have_gain_one():
    gain = random_prior()((3, 4), num_prefix=2)
    assert gain.shape == (3, 14, 14)
    assert (gain[:, :2] == 1).all()
    assert (gain[:, :, :2] == 1).all()
    np.testing.assert_array_equal(gain[:, 2:, 2:], random_prior()((3, 4)))


def test_prior_of_a_block_can_be_called_alone_on_any_grid():
    settings = {"image_size": 64, "depth": 4, "spatial_layers": 3, "dim": 24, "num_heads": 3}
    model = random_variables("spvit_s", **settings).model()
    assert model.blocks[2].attn.prior((14, 14)).shape == (3, 196, 196)
    assert model.blocks[3].attn.prior is None


@pytest.mark.parametrize("grid", [*GRIDS, (3, 2)])
@pytest.mark.parametrize("radius", [(1, 1), (1, 2), (2, 2), (0, 0), (20, 20)])
@pytest.mark.parametrize("num_prefix", [0, 2])
def test_neighbourhood_equals_its_definition(grid, radius, num_prefix):
    mask = LocalityMask((0,), radius)
    expected = numpy_models.neighbourhood(grid, radius, num_prefix)
    np.testing.assert_array_equal(mask.neighbourhood(grid, num_prefix), expected)


def test_uniform_attention_has_the_known_locality():
    near = LocalityMask((0,)).neighbourhood((14, 14), num_prefix=1)
    assert near.sum() == 1993
    assert near.mean() == pytest.approx(0.05135, abs=5e-6)


def test_only_the_first_heads_are_masked():
    mask = LocalityMask((0, 1), (1, 1))
    near = np.asarray(mask.neighbourhood((4, 4), 1))
    gain = mask.gain(3, (4, 4), 1)
    np.testing.assert_array_equal(gain[:2], np.stack([near, near]))
    assert (gain[2] == 1).all()
    bias = LocalityMask((0, 1), (1, 1), "hard").bias(3, (4, 4), 1)
    np.testing.assert_array_equal(bias[0], np.where(near, 0, -np.inf))
    assert (bias[2] == 0).all()


@pytest.mark.parametrize(("radius", "kind"), [((-1, 1), "soft"), ((1, 1), "fuzzy")])
def test_masks_that_mean_nothing_are_refused(radius, kind):
    with pytest.raises(InputError, match="mask_"):
        LocalityMask((0,), radius, kind)
