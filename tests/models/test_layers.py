"""The parts of a block against PyTorch's."""

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

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
