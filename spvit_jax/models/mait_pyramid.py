"""Hierarchical MaiT: Swin's stages with masked heads in the place of windows (arXiv 2207.03006).

On the large grids of the first two stages all heads are masked, softly: each sees its
neighbourhood and the mean of all patches, at a cost linear in their number, where a window sees
its own patches alone. On the small grids of the others half of the heads are masked and half see
all patches, at the cost that Swin's windows have there. Masks know no direction, and a prior of
offsets can be switched on (`spatial_layers`); by default it is a position embedding of the first
stage that tells patches apart: it costs one addition, where a convolution in each block costs as
much as its masked heads. Named settings are in the registry, `spvit_jax.models`.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from spvit_jax.errors import InputError
from spvit_jax.models.attention import Attention
from spvit_jax.models.base import Outputs, Tokens
from spvit_jax.models.block import Block
from spvit_jax.models.initializers import linear_kernel, token_embedding
from spvit_jax.models.layers import Linear
from spvit_jax.models.mask_schedule import MaskSchedule
from spvit_jax.models.pyramid import Pyramid, PyramidConfig


@dataclasses.dataclass(frozen=True)
class MaiTPyramidConfig(PyramidConfig):
    """Configuration of a hierarchical MaiT."""

    masked_heads: MaskSchedule | None = "stages"
    layer_scale: float | None = None  # initial value of LayerScale; None is without
    pos_conv: bool = False  # whether a position convolution follows each block
    distilled: bool = False  # whether a second head of the mean learns from a teacher

    def __post_init__(self) -> None:
        super().__post_init__()
        multiple = self.patch_size * 2 ** (len(self.depths) - 1)
        height, width = self.image_shape
        if height % multiple or width % multiple:
            below = [max(side // multiple, 1) * multiple for side in (height, width)]
            above = [-(-side // multiple) * multiple for side in (height, width)]
            raise InputError(
                f"image_size {height}×{width} is not a multiple of {multiple}, which patch merging "
                f"needs to halve the grid {len(self.depths) - 1} times; choose "
                f"{below[0]}×{below[1]} or {above[0]}×{above[1]}"
            )

    def build(self, rngs: nnx.Rngs) -> MaiTPyramid:
        """Creates the model of this configuration."""
        return MaiTPyramid(self, rngs=rngs)


class MaiTPyramid(Pyramid):
    """Hierarchical MaiT model: stages of masked and global heads on the whole grid.

    The distilled model's second head is one of the mean, as in LeViT (arXiv 2104.01136): there are
    no prefix tokens that patch merging would have to know of.
    """

    config: MaiTPyramidConfig

    def __init__(self, config: MaiTPyramidConfig, *, rngs: nnx.Rngs):
        super().__init__(config, lambda layer: _block(config, layer, rngs), rngs=rngs)
        (h, w), dtype = config.grid, jnp.dtype(config.dtype)
        self.pos_embed = nnx.Param(token_embedding(rngs.params(), (1, h * w, config.dim)))
        self.dist_head = (
            Linear(
                config.stages()[-1][1],
                config.num_classes,
                kernel_init=linear_kernel,
                dtype=dtype,
                rngs=rngs,
            )
            if config.distilled
            else None
        )

    def to_tokens(self, patches: jax.Array) -> Tokens:
        """Normalises patch tokens [B, h, w, D] and adds their positions."""
        tokens = super().to_tokens(patches)
        return tokens.replace(x=tokens.x + self.pos_embed[...].astype(tokens.x.dtype))

    def classify(self, tokens: jax.Array) -> Outputs:
        """Applies the heads to the mean of normalised tokens [B, N, D]."""
        outputs = super().classify(tokens)
        if self.dist_head is None:
            return outputs
        with jax.named_scope("heads"):
            distilled = self._logits(self.dist_head, tokens.mean(axis=1))
        return dataclasses.replace(outputs, distilled=distilled)


def _block(config: MaiTPyramidConfig, layer: int, rngs: nnx.Rngs) -> Block:
    _, dim, heads = config.stages()[config.stage_of_layers()[layer]]
    dtype = jnp.dtype(config.dtype)
    make_attention = functools.partial(
        Attention,
        dim,
        heads,
        qkv_bias=config.qkv_bias,
        spatial_prior=layer < config.spatial_layers,
        prior_extent=config.prior_extent,
        mask=config.mask(layer),
        implementation=config.attention,
        dtype=dtype,
        rngs=rngs,
    )
    return Block(
        dim,
        make_attention,
        mlp_ratio=config.mlp_ratio,
        norm_eps=config.norm_eps,
        layer_scale=config.layer_scale,
        pos_conv=config.pos_conv,
        dtype=dtype,
        rngs=rngs,
    )
