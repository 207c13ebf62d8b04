"""Layers against PyTorch's, and the stem on pairs of pixels against that on pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from spvit_jax.models.layers import Linear
from spvit_jax.models.stem import ConvStem


def test_batch_norm_is_torchs():
    """What it returns in training, and what it keeps, from statistics that are not the first."""
    stem = ConvStem(12, 4, 8, dtype=jnp.float32, rngs=nnx.Rngs(0))
    stem.train()
    rng = np.random.default_rng(0)
    # So small that epsilon matters.
    features = (0.01 * (rng.normal(size=(4, 12, 12, 8)) + rng.normal(size=8))).astype(np.float32)
    for ours in (stem.bn1, stem.bn2, stem.bn3):
        theirs = torch.nn.BatchNorm2d(8).train()
        theirs.running_mean += torch.arange(8) / 8
        theirs.running_var += torch.arange(8) / 8
        ours.mean[...] = jnp.asarray(theirs.running_mean.numpy())
        ours.var[...] = jnp.asarray(theirs.running_var.numpy())
        expected = theirs(torch.from_numpy(features).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        np.testing.assert_allclose(ours(jnp.asarray(features)), expected.detach(), atol=1e-4)
        np.testing.assert_allclose(ours.mean[...], theirs.running_mean, rtol=1e-5)
        # Torch's divides by one pixel less than there are, which moves the last digits.
        np.testing.assert_allclose(ours.var[...], theirs.running_var, rtol=1e-5)


@pytest.mark.parametrize("group", [None, 2])
def test_pairs_of_pixels_change_nothing(group):
    """Neither tokens, nor gradients, nor running statistics; nor tokens in evaluation."""
    made = ConvStem(12, 8, 6, batch_norm_group=group, dtype=jnp.float32, rngs=nnx.Rngs(0))
    made.train()
    graphdef, state = nnx.split(made)
    state = jax.tree.map(lambda leaf: leaf + 0.1, state)
    images, direction = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(4, 16, 24, 3), (4, 2, 3, 12)])
    )

    def run(state, embed):
        stem = nnx.merge(graphdef, state, copy=True)
        tokens = getattr(stem, embed)(images)
        stats = nnx.state(stem, nnx.BatchStat)
        stem.eval()
        return (tokens * direction).sum(), (tokens, stats, getattr(stem, embed)(images))

    compiled = jax.jit(jax.value_and_grad(run, has_aux=True), static_argnums=1)
    pixels, pairs = (jax.tree.leaves(compiled(state, embed)) for embed in ("on_pixels", "on_pairs"))
    for expected, actual in zip(pixels, pairs, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=1e-4)


def test_pairs_are_for_stems_that_leave_lanes_idle():
    def has_pairs(patch_size, width):
        return ConvStem(4, patch_size, width, dtype=jnp.float32, rngs=nnx.Rngs(0)).has_pairs

    assert has_pairs(16, 64)
    assert not has_pairs(16, 128)  # a pair has more channels than lanes
    assert not has_pairs(6, 64)  # a patch's row of half the resolution is no whole pairs


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_biass_gradient_is_summed_in_float32(dtype):
    """Of 4,112 tokens, a number that bfloat16 does not have."""
    layer = Linear(2, 3, dtype=dtype, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(layer)
    x = jnp.ones((16, 257, 2))
    weights = jnp.array([1.0, -3.0, 0.5])

    def loss(state):
        return (nnx.merge(graphdef, state)(x).astype(jnp.float32) * weights).sum()

    gradients = jax.grad(loss)(state)
    assert gradients["bias"][...].dtype == jnp.float32
    np.testing.assert_array_equal(gradients["bias"][...], 4112 * weights)
    expected = layer.kernel[...].sum(axis=0) + layer.bias[...]
    np.testing.assert_allclose(layer(x)[0, 0].astype(jnp.float32), expected, rtol=2e-2, atol=1e-2)
