"""Models that see the patches of an image in another order, the same for all images.

With `--import=benchmarks.permuted_patches` any command knows `permuted_spvit_s` and the others, so
that `--config.model.name=permuted_spvit_s` trains it. The permutation leaves nothing of the image's
plane but its patches, of `patch_size`; it is made of the normalised pixels, before the stem, in
training and in evaluation.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from flax import nnx

from spvit_jax.models import ViT, ViTConfig, model_config, register_model
from spvit_jax.models.spatial import Grid

MODELS = ("deit_ti", "lvvit_t", "spvit_s", "mait_t")


@dataclasses.dataclass(frozen=True)
class PermutedViTConfig(ViTConfig):
    """Configuration of an isotropic vision transformer on permuted patches."""

    permutation_seed: int = 0  # seed of the permutation, whatever that of the run

    def build(self, rngs: nnx.Rngs) -> PermutedViT:
        """Creates the model of this configuration."""
        return PermutedViT(self, rngs=rngs)


class PermutedViT(ViT):
    """Isotropic vision transformer on permuted patches."""

    config: PermutedViTConfig

    def embed(self, images: jax.Array) -> jax.Array:
        """Returns the patch tokens [B, h, w, D] of images whose patches are permuted."""
        return super().embed(permute(images, self.config.grid, self.config.permutation_seed))


def permute(images: jax.Array, grid: Grid, seed: int) -> jax.Array:
    """Permutes the patches of images [B, height, width, 3], all alike, for a grid (h, w)."""
    (h, w), (batch, height, width, channels) = grid, images.shape
    patches = images.reshape(batch, h, height // h, w, width // w, channels).swapaxes(2, 3)
    order = np.random.default_rng(seed).permutation(h * w)
    shuffled = patches.reshape(batch, h * w, -1)[:, order].reshape(patches.shape)
    return shuffled.swapaxes(2, 3).reshape(images.shape)


for _name in MODELS:
    _fields = dataclasses.fields(ViTConfig)
    _base = model_config(_name)
    register_model(
        f"permuted_{_name}",
        PermutedViTConfig(**{field.name: getattr(_base, field.name) for field in _fields}),
    )
