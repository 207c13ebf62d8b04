"""Isotropic vision transformers from one kind of block: DeiT, LV-ViT, SP-ViT and MaiT.

`ViTConfig` has a field for each of their differences, so that any combines with any other
(a masked SP-ViT, a DeiT with LayerScale). Their named settings are in the registry,
`spvit_jax.models`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from spvit_jax.errors import InputError
from spvit_jax.models.attention import Attention
from spvit_jax.models.base import Model, ModelConfig, Outputs, Tokens, prepend
from spvit_jax.models.block import Block
from spvit_jax.models.initializers import linear_kernel, token_embedding
from spvit_jax.models.layers import LayerNorm, Linear
from spvit_jax.models.stem import ConvStem, PatchEmbed


@dataclasses.dataclass(frozen=True)
class ViTConfig(ModelConfig):
    """Configuration of an isotropic vision transformer: DeiT, LV-ViT, SP-ViT or MaiT.

    `drop_path` is the rate at the last layer, growing linearly from 0 at the first.
    """

    depth: int = 12  # number of blocks
    stem_width: int = 0  # channels of LV-ViT's convolutional stem; 0 is a linear embedding
    batch_norm_group: int | None = None  # images that the stem normalises together in training
    skip_lam: float = 1.0  # divisor of each residual branch
    layer_scale: float | None = None  # initial value of LayerScale; None is without

    # SP-ViT's spatial structure.
    spatial_layers: int = 0  # number of layers with SP-SA, the first ones
    class_token_layer: int | None = None  # layer that the class token enters; None: spatial_layers
    prior_extent: int | None = None  # grid side to which offsets are rescaled; None: unscaled
    pos_conv: bool = False  # whether a position convolution follows each block
    position_bias_layers: int = 0  # number of layers with Swin's learned bias, the first ones

    # Heads.
    dense_head: bool = False  # whether LV-ViT's classifier of every patch token is there
    distilled: bool = False  # whether DeiT's distillation token is there, with a head of its own

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stem_width and self.patch_size % 2:
            raise InputError(
                f"patch_size is {self.patch_size}; the convolutional stem (stem_width="
                f"{self.stem_width}) halves the image first and needs an even one"
            )
        if self.batch_norm_group is not None and not (
            self.stem_width and self.batch_norm_group > 0
        ):
            raise InputError(
                f"batch_norm_group is {self.batch_norm_group} with stem_width={self.stem_width}; "
                "expected at least 1 image, in a model with BatchNorm: a convolutional stem's"
            )
        if (
            not 0 <= self.spatial_layers <= self.depth
            or not 0 <= self.class_token_block < self.depth
        ):
            raise InputError(
                f"spatial_layers is {self.spatial_layers} and class_token_layer "
                f"{self.class_token_layer} at depth {self.depth}; expected at most "
                f"{self.depth - 1}: the class token enters at the latest before the last layer"
            )

        if not 0 <= self.position_bias_layers <= self.depth:
            raise InputError(
                f"position_bias_layers is {self.position_bias_layers}; the model has {self.depth} "
                "layers"
            )
        if self.attention == "local" and any(self.masked_per_layer()[: self.position_bias_layers]):
            raise InputError(
                "attention is 'local', which knows no learned bias of masked heads "
                f"(position_bias_layers={self.position_bias_layers}); choose 'auto' or 'xla'"
            )

    @property
    def class_token_block(self) -> int:
        """Layer that the prefix tokens enter; they have a position embedding if it is 0."""
        token = self.class_token_layer
        return self.spatial_layers if token is None else token

    @property
    def num_prefix(self) -> int:
        """Number P of prefix tokens: the class token and, if distilled, the distillation token."""
        return 2 if self.distilled else 1

    @property
    def num_positions(self) -> int:
        """Rows of the position embedding: patches, and prefix tokens if they enter layer 0."""
        return self.grid[0] * self.grid[1] + (0 if self.class_token_block else self.num_prefix)

    def heads_per_layer(self) -> list[int]:
        """Returns the number of attention heads of each layer."""
        return [self.num_heads] * self.depth

    def build(self, rngs: nnx.Rngs) -> ViT:
        """Creates the model of this configuration."""
        return ViT(self, rngs=rngs)


class ViT(Model):
    """Isotropic vision transformer: prefix tokens and the same grid of patches in all layers."""

    config: ViTConfig

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        dim, dtype = config.dim, jnp.dtype(config.dtype)
        head = functools.partial(
            Linear, dim, config.num_classes, kernel_init=linear_kernel, dtype=dtype, rngs=rngs
        )

        super().__init__(config)
        if config.stem_width:
            self.patch_embed = ConvStem(
                dim,
                config.patch_size,
                config.stem_width,
                batch_norm_group=config.batch_norm_group,
                dtype=dtype,
                rngs=rngs,
            )
        else:
            self.patch_embed = PatchEmbed(dim, config.patch_size, dtype=dtype, rngs=rngs)
        self.pos_embed = nnx.Param(token_embedding(rngs.params(), (1, config.num_positions, dim)))
        self.cls_token = nnx.Param(token_embedding(rngs.params(), (1, 1, dim)))
        self.dist_token = (
            nnx.Param(token_embedding(rngs.params(), (1, 1, dim))) if config.distilled else None
        )
        self.blocks = nnx.List([_block(config, layer, rngs) for layer in range(config.depth)])
        self.norm = LayerNorm(dim, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.head = head()
        self.dist_head = head() if config.distilled else None
        self.dense_head = head() if config.dense_head else None
        self.eval()

    def to_tokens(self, patches: jax.Array) -> Tokens:
        """Adds positions to patch tokens [B, h, w, D], and to prefix tokens that enter layer 0."""
        batch, h, w, dim = patches.shape
        tokens = Tokens(patches.reshape(batch, h * w, dim), (h, w), 0)
        if not self.config.class_token_block:
            tokens = self._prepend_prefix(tokens)
        return tokens.replace(x=tokens.x + self.pos_embed[...].astype(patches.dtype))

    @property
    def before_blocks(self) -> dict[int, Callable[[Tokens], Tokens]]:
        """Prepending of the prefix tokens by layer, if not 0: without position, as in SP-ViT."""
        layer = self.config.class_token_block
        return {layer: self._prepend_prefix} if layer else {}

    def _prepend_prefix(self, tokens: Tokens) -> Tokens:
        prefix = [self.cls_token] if self.dist_token is None else [self.cls_token, self.dist_token]
        return Tokens(prepend(prefix, tokens.x), tokens.grid, len(prefix))

    @jax.named_scope("heads")
    def classify(self, tokens: jax.Array) -> Outputs:
        """Applies the heads to normalised tokens [B, P+N, D]."""
        dist, dense = self.dist_head, self.dense_head
        return Outputs(
            logits=self._logits(self.head, tokens[:, 0]),
            distilled=None if dist is None else self._logits(dist, tokens[:, 1]),
            dense=None
            if dense is None
            else self._logits(dense, tokens[:, self.config.num_prefix :]),
        )


def _block(config: ViTConfig, layer: int, rngs: nnx.Rngs) -> Block:
    dtype = jnp.dtype(config.dtype)
    make_attention = functools.partial(
        Attention,
        config.dim,
        config.num_heads,
        qkv_bias=config.qkv_bias,
        spatial_prior=layer < config.spatial_layers,
        prior_extent=config.prior_extent,
        position_bias=config.grid if layer < config.position_bias_layers else None,
        mask=config.mask(layer),
        implementation=config.attention,
        dtype=dtype,
        rngs=rngs,
    )
    return Block(
        config.dim,
        make_attention,
        mlp_ratio=config.mlp_ratio,
        norm_eps=config.norm_eps,
        skip_lam=config.skip_lam,
        layer_scale=config.layer_scale,
        pos_conv=config.pos_conv,
        dtype=dtype,
        rngs=rngs,
    )
