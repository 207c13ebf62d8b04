"""CaiT: self-attention among patches, then attention of the class token (arXiv 2103.17239).

Its self-attention is that of `attention.py` with talking heads, so that MaiT's masked heads and
SP-ViT's prior are arguments here as elsewhere. Named settings are in the registry.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from spvit_jax.errors import InputError
from spvit_jax.models.attention import Attention, attention, attention_weights
from spvit_jax.models.base import Model, ModelConfig, Outputs, Tokens, prepend
from spvit_jax.models.block import Block
from spvit_jax.models.initializers import linear_kernel, token_embedding
from spvit_jax.models.layers import LayerNorm, LayerScale, Linear, Mlp
from spvit_jax.models.stem import PatchEmbed


@dataclasses.dataclass(frozen=True)
class CaiTConfig(ModelConfig):
    """Configuration of a CaiT.

    `drop_path` is the rate of all layers of patches alike; class attention has none.
    `masked_heads` applies to the layers of patches.
    """

    depth: int = 24  # layers of self-attention among patches
    class_layers: int = 2  # layers of class attention after them
    layer_scale: float = 1e-5  # initial value of LayerScale
    spatial_layers: int = 0  # number of layers of patches with SP-SA, the first ones
    prior_extent: int | None = None  # grid side to which offsets are rescaled; None: unscaled
    distilled: bool = False  # whether DeiT's distillation token is there, with a head of its own

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.spatial_layers <= self.depth:
            raise InputError(
                f"spatial_layers is {self.spatial_layers}; the model has {self.depth} layers of "
                "patches"
            )

    @property
    def num_prefix(self) -> int:
        """Number P of tokens of class attention: the class token and the distillation token."""
        return 2 if self.distilled else 1

    def heads_per_layer(self) -> list[int]:
        """Returns the number of attention heads of each layer of patches."""
        return [self.num_heads] * self.depth

    def drop_path_per_layer(self) -> list[float]:
        """Returns the rate of stochastic depth at each layer of patches."""
        return [self.drop_path] * self.depth

    def build(self, rngs: nnx.Rngs) -> CaiT:
        """Creates the model of this configuration."""
        return CaiT(self, rngs=rngs)


class ClassAttention(nnx.Module):
    """Attention whose only queries are the prefix tokens, over themselves and the patches."""

    def __init__(
        self, dim: int, num_heads: int, *, qkv_bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        linear = functools.partial(
            Linear, dim, dim, kernel_init=linear_kernel, dtype=dtype, rngs=rngs
        )
        self.num_heads = num_heads
        self.q, self.k, self.v = (linear(use_bias=qkv_bias) for _ in range(3))
        self.proj = linear()

    def __call__(self, x: jax.Array, num_prefix: int) -> jax.Array:
        """Maps tokens [B, P+N, D], prefix tokens first, to their update [B, P, D]."""
        query = x[:, :num_prefix]
        with jax.named_scope("qkv"):
            q, k, v = (self._heads(part) for part in (self.q(query), self.k(x), self.v(x)))
        out = attention(q, k, v)
        with jax.named_scope("proj"):
            return self.proj(out.reshape(query.shape))

    def weights(self, x: jax.Array, num_prefix: int) -> jax.Array:
        """Returns the attention weights [B, H, P, P+N] of the tokens x [B, P+N, D], float32."""
        return attention_weights(self._heads(self.q(x[:, :num_prefix])), self._heads(self.k(x)))

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.num_heads, -1)


class ClassBlock(nnx.Module):
    """Block of class attention and an MLP, which update the prefix tokens and not the patches."""

    def __init__(self, config: CaiTConfig, *, rngs: nnx.Rngs):
        dim, dtype = config.dim, jnp.dtype(config.dtype)
        norm = functools.partial(LayerNorm, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.norm1 = norm(dim)
        self.attn = ClassAttention(
            dim, config.num_heads, qkv_bias=config.qkv_bias, dtype=dtype, rngs=rngs
        )
        self.norm2 = norm(dim)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), dtype=dtype, rngs=rngs)
        self.scale1 = LayerScale(dim, config.layer_scale)
        self.scale2 = LayerScale(dim, config.layer_scale)

    def __call__(self, prefix: jax.Array, patches: jax.Array) -> jax.Array:
        """Maps the prefix tokens [B, P, D], given the patches [B, N, D]."""
        tokens = jnp.concatenate([prefix, patches], axis=1)
        prefix = prefix + self.scale1(self.attn(self.norm1(tokens), prefix.shape[1]))
        return prefix + self.scale2(self.mlp(self.norm2(prefix)))


class CaiT(Model):
    """CaiT model: layers of self-attention among patches, then layers of class attention."""

    config: CaiTConfig

    def __init__(self, config: CaiTConfig, *, rngs: nnx.Rngs):
        dim, dtype, (h, w) = config.dim, jnp.dtype(config.dtype), config.grid
        head = functools.partial(
            Linear, dim, config.num_classes, kernel_init=linear_kernel, dtype=dtype, rngs=rngs
        )

        super().__init__(config)
        self.patch_embed = PatchEmbed(dim, config.patch_size, dtype=dtype, rngs=rngs)
        self.pos_embed = nnx.Param(token_embedding(rngs.params(), (1, h * w, dim)))
        self.cls_token = nnx.Param(token_embedding(rngs.params(), (1, 1, dim)))
        self.dist_token = (
            nnx.Param(token_embedding(rngs.params(), (1, 1, dim))) if config.distilled else None
        )
        self.blocks = nnx.List([_block(config, layer, rngs) for layer in range(config.depth)])
        self.class_blocks = nnx.List(
            [ClassBlock(config, rngs=rngs) for _ in range(config.class_layers)]
        )
        self.norm = LayerNorm(dim, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.head = head()
        self.dist_head = head() if config.distilled else None
        self.eval()

    def to_tokens(self, patches: jax.Array) -> Tokens:
        """Adds positions to patch tokens [B, h, w, D]."""
        batch, h, w, dim = patches.shape
        x = patches.reshape(batch, h * w, dim) + self.pos_embed[...].astype(patches.dtype)
        return Tokens(x, (h, w), 0)

    def encode(self, patches: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Maps patch tokens [B, h, w, D] to normalised tokens [B, P+N, D]."""
        x = self.through_blocks(patches, key).x
        *_, prefix = self._prefix_states(x)
        return self.norm(jnp.concatenate([prefix, x], axis=1))

    def class_attention(self, images: jax.Array) -> list[jax.Array]:
        """Returns the attention [B, H, P, P+N] of each layer of class attention, float32."""
        x = self.through_blocks(self.embed(images)).x
        return [
            block.attn.weights(block.norm1(jnp.concatenate([prefix, x], axis=1)), prefix.shape[1])
            for block, prefix in zip(self.class_blocks, self._prefix_states(x), strict=False)
        ]

    def _prefix_states(self, x: jax.Array) -> Iterator[jax.Array]:
        """Yields the prefix tokens [B, P, D] that enter each class block, then the last's.

        The patches x [B, N, D] are the same for all.
        """
        tokens = [self.cls_token] if self.dist_token is None else [self.cls_token, self.dist_token]
        prefix = prepend(tokens, x[:, :0])
        for block in self.class_blocks:
            yield prefix
            prefix = block(prefix, x)
        yield prefix

    @jax.named_scope("heads")
    def classify(self, tokens: jax.Array) -> Outputs:
        """Applies the heads to the prefix tokens of normalised tokens [B, P+N, D]."""
        dist = self.dist_head
        return Outputs(
            logits=self._logits(self.head, tokens[:, 0]),
            distilled=None if dist is None else self._logits(dist, tokens[:, 1]),
        )


def _block(config: CaiTConfig, layer: int, rngs: nnx.Rngs) -> Block:
    dtype = jnp.dtype(config.dtype)
    make_attention = functools.partial(
        Attention,
        config.dim,
        config.num_heads,
        qkv_bias=config.qkv_bias,
        spatial_prior=layer < config.spatial_layers,
        prior_extent=config.prior_extent,
        mask=config.mask(layer),
        talking_heads=True,
        implementation=config.attention,
        dtype=dtype,
        rngs=rngs,
    )
    return Block(
        config.dim,
        make_attention,
        mlp_ratio=config.mlp_ratio,
        norm_eps=config.norm_eps,
        layer_scale=config.layer_scale,
        dtype=dtype,
        rngs=rngs,
    )
