"""Stages of blocks on a pyramid of grids, each half of the one before: Swin and hierarchical MaiT.

What a block attends to is up to the family, in `swin.py` and `mait_pyramid.py`; patch embedding,
patch merging and the mean before the classifier are those of Swin (arXiv 2103.14030).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from spvit_jax.errors import InputError
from spvit_jax.models.base import Model, ModelConfig, Outputs, Tokens
from spvit_jax.models.block import Block
from spvit_jax.models.initializers import linear_kernel
from spvit_jax.models.layers import LayerNorm, Linear
from spvit_jax.models.spatial import Grid
from spvit_jax.models.stem import PatchEmbed


@dataclasses.dataclass(frozen=True)
class PyramidConfig(ModelConfig):
    """Configuration of a model of stages.

    `dim` and `num_heads` are those of the first stage and double with each; layers are counted
    through all stages; `drop_path` is the rate at the last layer, growing linearly from 0 at the
    first.
    """

    patch_size: int = 4  # pixels
    dim: int = 96
    num_heads: int = 3
    norm_eps: float = 1e-5
    depths: tuple[int, ...] = (2, 2, 6, 2)  # layers of each stage
    spatial_layers: int = 0  # number of layers with SP-SA, the first ones
    prior_extent: int | None = None  # grid side to which offsets are rescaled; None: unscaled

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.depths:
            raise InputError("depths is (); expected the number of layers of each stage")
        if not 0 <= self.spatial_layers <= sum(self.depths):
            raise InputError(
                f"spatial_layers is {self.spatial_layers}; the model has {sum(self.depths)} layers"
            )

    def stages(self) -> list[tuple[Grid, int, int]]:
        """Returns each stage's grid (h, w), channels and heads."""
        (h, w), stages = self.grid, []
        for stage in range(len(self.depths)):
            stages.append(((h, w), self.dim * 2**stage, self.num_heads * 2**stage))
            h, w = -(-h // 2), -(-w // 2)
        return stages

    def stage_of_layers(self) -> list[int]:
        """Returns the stage that each layer is in."""
        return [stage for stage, depth in enumerate(self.depths) for _ in range(depth)]

    def layers_per_stage(self) -> tuple[int, ...]:
        """Returns the number of layers of each stage."""
        return self.depths

    def heads_per_layer(self) -> list[int]:
        """Returns the number of attention heads of each layer."""
        stages = self.stages()
        return [stages[stage][2] for stage in self.stage_of_layers()]

    def grid_per_layer(self) -> list[Grid]:
        """Returns the grid of patches of each layer."""
        stages = self.stages()
        return [stages[stage][0] for stage in self.stage_of_layers()]


class PatchMerging(nnx.Module):
    """Halves the grid: 2×2 patches of D channels become one of 2D, by LayerNorm and a linear map.

    An odd grid is padded with zeros.
    """

    def __init__(self, dim: int, *, norm_eps: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = LayerNorm(4 * dim, epsilon=norm_eps, dtype=dtype, rngs=rngs)
        self.reduction = Linear(
            4 * dim, 2 * dim, use_bias=False, kernel_init=linear_kernel, dtype=dtype, rngs=rngs
        )

    @jax.named_scope("patch_merging")
    def __call__(self, tokens: Tokens) -> Tokens:
        """Maps tokens [B, N, D] of a grid (h, w) to [B, ⌈h/2⌉·⌈w/2⌉, 2D]."""
        x, (h, w) = tokens.x, tokens.grid
        batch, _, dim = x.shape
        image = jnp.pad(x.reshape(batch, h, w, dim), ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))
        h, w = -(-h // 2), -(-w // 2)
        # Four patches side by side, in the order of the authors: down first, then right.
        merged = image.reshape(batch, h, 2, w, 2, dim).transpose(0, 1, 3, 4, 2, 5)
        merged = merged.reshape(batch, h * w, 4 * dim)
        return Tokens(self.reduction(self.norm(merged)), (h, w), 0)


class Pyramid(Model):
    """Model of stages of blocks on patches alone, which classifies their mean.

    Attributes:
      blocks: those of all stages, in order.
      merges: patch merging before each stage but the first.
    """

    config: PyramidConfig

    def __init__(
        self,
        config: PyramidConfig,
        make_block: Callable[[int], Block],
        *,
        rngs: nnx.Rngs,
    ):
        """Creates the model.

        Args:
          config: configuration of the model.
          make_block: returns the block of a layer.
          rngs: random keys of the initial weights.
        """
        dtype, eps, stages = jnp.dtype(config.dtype), config.norm_eps, config.stages()
        last = stages[-1][1]
        super().__init__(config)
        self.patch_embed = PatchEmbed(config.dim, config.patch_size, dtype=dtype, rngs=rngs)
        self.patch_norm = LayerNorm(config.dim, epsilon=eps, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([make_block(layer) for layer in range(sum(config.depths))])
        self.merges = nnx.List(
            [PatchMerging(dim, norm_eps=eps, dtype=dtype, rngs=rngs) for _, dim, _ in stages[:-1]]
        )
        self.norm = LayerNorm(last, epsilon=eps, dtype=dtype, rngs=rngs)
        self.head = Linear(
            last, config.num_classes, kernel_init=linear_kernel, dtype=dtype, rngs=rngs
        )
        self.eval()

    def to_tokens(self, patches: jax.Array) -> Tokens:
        """Normalises patch tokens [B, h, w, D]."""
        batch, h, w, dim = patches.shape
        return Tokens(self.patch_norm(patches.reshape(batch, h * w, dim)), (h, w), 0)

    @property
    def before_blocks(self) -> dict[int, Callable[[Tokens], Tokens]]:
        """Patch merging before the first layer of each stage but the first, by that layer."""
        starts = itertools.accumulate(self.config.depths[:-1])
        return dict(zip(starts, self.merges, strict=True))

    @jax.named_scope("heads")
    def classify(self, tokens: jax.Array) -> Outputs:
        """Applies the head to the mean of normalised tokens [B, N, D]."""
        return Outputs(logits=self._logits(self.head, tokens.mean(axis=1)))
