"""CaiT: self-attention among patches, then attention of the class token (arXiv 2103.17239).

Its self-attention is that of `attention.py` with talking heads, so that MaiT's masked heads are an
argument here as elsewhere. Named settings are in the registry, `spvit_jax.models`.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from spvit_jax.models.attention import Attention, attention
from spvit_jax.models.base import Model, ModelConfig, Outputs, Tokens
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
    """Attention in which the class token is the only query, over itself and the patches."""

    def __init__(
        self, dim: int, num_heads: int, *, qkv_bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        linear = functools.partial(
            Linear, dim, dim, kernel_init=linear_kernel, dtype=dtype, rngs=rngs
        )
        self.num_heads = num_heads
        self.q, self.k, self.v = (linear(use_bias=qkv_bias) for _ in range(3))
        self.proj = linear()

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens [B, 1+N, D], the class token first, to its update [B, 1, D]."""

        def heads(x: jax.Array) -> jax.Array:
            return x.reshape(*x.shape[:2], self.num_heads, -1)

        query = x[:, :1]
        with jax.named_scope("qkv"):
            q, k, v = heads(self.q(query)), heads(self.k(x)), heads(self.v(x))
        out = attention(q, k, v)
        with jax.named_scope("proj"):
            return self.proj(out.reshape(query.shape))


class ClassBlock(nnx.Module):
    """Block of class attention and an MLP, which update the class token and not the patches."""

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

    def __call__(self, token: jax.Array, patches: jax.Array) -> jax.Array:
        """Maps the class token [B, 1, D], given the patches [B, N, D]."""
        tokens = jnp.concatenate([token, patches], axis=1)
        token = token + self.scale1(self.attn(self.norm1(tokens)))
        return token + self.scale2(self.mlp(self.norm2(token)))


class CaiT(Model):
    """CaiT model: layers of self-attention among patches, then layers of class attention."""

    config: CaiTConfig

    def __init__(self, config: CaiTConfig, *, rngs: nnx.Rngs):
        dim, dtype, (h, w) = config.dim, jnp.dtype(config.dtype), config.grid
        super().__init__(config)
        self.patch_embed = PatchEmbed(dim, config.patch_size, dtype=dtype, rngs=rngs)
        self.pos_embed = nnx.Param(token_embedding(rngs.params(), (1, h * w, dim)))
        self.cls_token = nnx.Param(token_embedding(rngs.params(), (1, 1, dim)))
        self.blocks = nnx.List([_block(config, layer, rngs) for layer in range(config.depth)])
        self.class_blocks = nnx.List(
            [ClassBlock(config, rngs=rngs) for _ in range(config.class_layers)]
        )
        self.norm = LayerNorm(dim, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.head = Linear(
            dim, config.num_classes, kernel_init=linear_kernel, dtype=dtype, rngs=rngs
        )
        self.eval()

    def to_tokens(self, patches: jax.Array) -> Tokens:
        """Adds positions to patch tokens [B, h, w, D]."""
        batch, h, w, dim = patches.shape
        x = patches.reshape(batch, h * w, dim) + self.pos_embed[...].astype(patches.dtype)
        return Tokens(x, (h, w), 0)

    def encode(self, patches: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Maps patch tokens [B, h, w, D] to normalised tokens [B, 1+N, D]."""
        x = self.through_blocks(patches, key).x
        token = jnp.broadcast_to(self.cls_token[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        for block in self.class_blocks:
            token = block(token, x)
        return self.norm(jnp.concatenate([token, x], axis=1))

    @jax.named_scope("heads")
    def classify(self, tokens: jax.Array) -> Outputs:
        """Applies the head to the class token of normalised tokens [B, 1+N, D]."""
        return Outputs(logits=self._logits(self.head, tokens[:, 0]))


def _block(config: CaiTConfig, layer: int, rngs: nnx.Rngs) -> Block:
    dtype = jnp.dtype(config.dtype)
    make_attention = functools.partial(
        Attention,
        config.dim,
        config.num_heads,
        qkv_bias=config.qkv_bias,
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
