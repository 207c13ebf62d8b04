"""The columnar family from one block: DeiT, LV-ViT, SP-ViT and MaiT.

`ViTConfig` holds every choice in which they differ, so that any of them combines with any other
(a masked SP-ViT, a DeiT with LayerScale). Their named settings are in the registry,
`spvit_jax.models`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx, struct

from spvit_jax.errors import InputError
from spvit_jax.models.attention import Attention
from spvit_jax.models.initializers import linear_kernel, token_embedding
from spvit_jax.models.layers import (
    ConvStem,
    LayerScale,
    Mlp,
    PatchEmbed,
    PosConv,
    accumulation_dtype,
    drop_path,
)
from spvit_jax.models.spatial import Grid, LocalityMask

MaskSchedule = tuple[tuple[int, int], ...]  # ((number of layers, masked heads in each), ...)


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Everything that defines a columnar model; fields are checked on creation.

    Raises:
      InputError: a field has a value from which no model can be built.
    """

    # Input and output.
    image_size: int | tuple[int, int] = 224  # pixels, one number or (height, width)
    num_classes: int = 1000
    patch_size: int = 16  # pixels; even with a convolutional stem
    stem_width: int = 0  # channels of LV-ViT's convolutional stem; 0 is a linear embedding

    # Shape of the encoder.
    dim: int = 384  # D
    depth: int = 12
    num_heads: int = 6  # H
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    norm_eps: float = 1e-6
    skip_lam: float = 1.0  # each residual branch is divided by this
    layer_scale: float | None = None  # initial value of LayerScale; None is without
    drop_path: float = 0.0  # at the last layer, growing linearly from 0 at the first

    # Spatial structure.
    spatial_layers: int = 0  # the first layers use SP-SA, on patches alone
    prior_extent: int | None = None  # grid side to which offsets are rescaled; None is raw
    pos_conv: bool = False  # a position convolution after each block
    masked_heads: MaskSchedule | Literal["thirds"] | None = None  # "thirds": all, one, none
    mask_radius: int | tuple[int, int] = 1  # of the neighbourhood; (rows, columns) if not square
    mask_kind: str = "soft"  # outside the neighbourhood scores are 0 (soft) or -inf (hard)

    # Heads.
    dense_head: bool = False  # LV-ViT's classifier on every patch token
    distilled: bool = False  # DeiT's second prefix token with a head of its own

    # Execution.
    dtype: str = "float32"  # of the computation; parameters are float32
    remat: bool = False  # recompute each block in the backward pass

    def __post_init__(self) -> None:
        height, width = self.image_shape
        if self.patch_size < 1 or height % self.patch_size or width % self.patch_size:
            raise InputError(
                f"image_size {height}×{width} is not a multiple of patch_size {self.patch_size}; "
                "choose a size that is"
            )
        if self.stem_width and self.patch_size % 2:
            raise InputError(
                f"patch_size is {self.patch_size}; the convolutional stem (stem_width="
                f"{self.stem_width}) halves the image first and needs an even one"
            )
        if self.dim % self.num_heads:
            raise InputError(
                f"dim {self.dim} is not a multiple of num_heads {self.num_heads}; "
                "each head takes an equal share of the channels"
            )
        if self.spatial_layers and not 0 < self.spatial_layers < self.depth:
            raise InputError(
                f"spatial_layers is {self.spatial_layers} at depth {self.depth}; expected at most "
                f"{self.depth - 1}: the class token enters after the spatial layers"
            )
        if not 0 <= self.drop_path < 1:
            raise InputError(f"drop_path is {self.drop_path}; expected a rate in [0, 1)")
        if self.dtype not in ("float32", "bfloat16", "float64"):
            raise InputError(f"dtype is {self.dtype!r}; expected float32, bfloat16 or float64")
        self._check_masked_heads()
        LocalityMask(0, self.mask_shape, self.mask_kind)

    def _check_masked_heads(self) -> None:
        if isinstance(self.masked_heads, str):
            if self.masked_heads != "thirds":
                raise InputError(f"masked_heads is {self.masked_heads!r}; the one name is 'thirds'")
            return
        layers = sum(count for count, _ in self.masked_heads or ((self.depth, 0),))
        if layers != self.depth:
            raise InputError(
                f"masked_heads {self.masked_heads} covers {layers} layers, the model has "
                f"{self.depth}; the layer counts must add up to the depth"
            )
        for count, heads in self.masked_heads or ():
            if not 0 <= heads <= self.num_heads or count < 0:
                raise InputError(
                    f"masked_heads {self.masked_heads} asks for {heads} masked heads in {count} "
                    f"layers; a layer has {self.num_heads} heads"
                )

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def grid(self) -> Grid:
        """(h, w) in patches."""
        height, width = self.image_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def mask_shape(self) -> tuple[int, int]:
        """The neighbourhood's radius as (rows, columns)."""
        radius = self.mask_radius
        return (radius, radius) if isinstance(radius, int) else (radius[0], radius[1])

    @property
    def num_prefix(self) -> int:
        """P: the class token and, if distilled, the distillation token."""
        return 2 if self.distilled else 1

    def masked_per_layer(self) -> list[int]:
        """Returns the number of masked heads of each layer."""
        if self.masked_heads is None:
            return [0] * self.depth
        if self.masked_heads == "thirds":
            third = self.depth // 3
            return [self.num_heads] * third + [1] * third + [0] * (self.depth - 2 * third)
        return [heads for count, heads in self.masked_heads for _ in range(count)]

    def build(self, rngs: nnx.Rngs) -> ViT:
        """Creates the model."""
        return ViT(self, rngs=rngs)


@struct.dataclass
class Outputs:
    """What a model returns in training: unnormalised logits, float32.

    Attributes:
      logits: [B, C], from the class token.
      distilled: [B, C], from the distillation token; None without one.
      dense: [B, N, C], from each patch token; None without a dense head.
    """

    logits: jax.Array
    distilled: jax.Array | None = None
    dense: jax.Array | None = None

    def evaluation_logits(self) -> jax.Array:
        """Returns the logits [B, C] of the family's evaluation rule.

        A distilled model averages its two heads (DeiT); a dense head adds half its maximum
        over the tokens, class by class (LV-ViT, in the authors' code).
        """
        logits = self.logits
        if self.distilled is not None:
            logits = (logits + self.distilled) / 2
        if self.dense is not None:
            logits = logits + 0.5 * self.dense.max(axis=1)
        return logits


class Block(nnx.Module):
    """A pre-norm transformer block: attention, MLP and, for SP-ViT, a position convolution."""

    def __init__(self, config: ViTConfig, layer: int, *, rngs: nnx.Rngs):
        dim, dtype = config.dim, jnp.dtype(config.dtype)
        masked = config.masked_per_layer()[layer]
        norm = functools.partial(nnx.LayerNorm, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        scale = config.layer_scale

        self.norm1 = norm(dim)
        self.attn = Attention(
            dim,
            config.num_heads,
            qkv_bias=config.qkv_bias,
            spatial_prior=layer < config.spatial_layers,
            prior_extent=config.prior_extent,
            mask=LocalityMask(masked, config.mask_shape, config.mask_kind) if masked else None,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm2 = norm(dim)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), dtype=dtype, rngs=rngs)
        self.scale1 = LayerScale(dim, scale) if scale is not None else None
        self.scale2 = LayerScale(dim, scale) if scale is not None else None
        self.pos_conv = PosConv(dim, dtype=dtype, rngs=rngs) if config.pos_conv else None
        self.skip_lam = config.skip_lam
        self.drop_path = config.drop_path * layer / max(config.depth - 1, 1)

    def __call__(
        self, x: jax.Array, grid: Grid, num_prefix: int, key: jax.Array | None = None
    ) -> jax.Array:
        """Maps tokens [B, P+N, D]; `key` draws the drop path in training, None is evaluation."""
        key1, key2 = (None, None) if key is None else jax.random.split(key)
        x = x + self._branch(self.attn(self.norm1(x), grid, num_prefix), self.scale1, key1)
        x = x + self._branch(self.mlp(self.norm2(x)), self.scale2, key2)
        if self.pos_conv is not None:
            x = self.pos_conv(x, grid, num_prefix)
        return x

    def _branch(self, x: jax.Array, scale: LayerScale | None, key: jax.Array | None) -> jax.Array:
        if scale is not None:
            x = scale(x)
        return drop_path(x, self.drop_path, key) / self.skip_lam


class ViT(nnx.Module):
    """A columnar vision transformer; created in evaluation mode.

    `model(images)` takes normalised images [B, height, width, 3] and returns evaluation logits
    [B, C]; after `model.train()`, `model(images, key)` returns `Outputs`.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        dim, dtype = config.dim, jnp.dtype(config.dtype)
        num_patches = config.grid[0] * config.grid[1]
        num_positions = num_patches + (0 if config.spatial_layers else config.num_prefix)
        head = functools.partial(
            nnx.Linear, dim, config.num_classes, kernel_init=linear_kernel, dtype=dtype, rngs=rngs
        )

        self.config = config
        self.deterministic = True
        if config.stem_width:
            self.patch_embed: PatchEmbed | ConvStem = ConvStem(
                dim, config.patch_size, config.stem_width, dtype=dtype, rngs=rngs
            )
        else:
            self.patch_embed = PatchEmbed(dim, config.patch_size, dtype=dtype, rngs=rngs)
        self.pos_embed = nnx.Param(token_embedding(rngs.params(), (1, num_positions, dim)))
        self.cls_token = nnx.Param(token_embedding(rngs.params(), (1, 1, dim)))
        self.dist_token = (
            nnx.Param(token_embedding(rngs.params(), (1, 1, dim))) if config.distilled else None
        )
        self.blocks = nnx.List([Block(config, i, rngs=rngs) for i in range(config.depth)])
        self.norm = nnx.LayerNorm(dim, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.head = head()
        self.dist_head = head() if config.distilled else None
        self.dense_head = head() if config.dense_head else None
        self.eval()

    def __call__(self, images: jax.Array, key: jax.Array | None = None) -> jax.Array | Outputs:
        """Classifies images.

        Args:
          images: [B, height, width, 3] float, normalised.
          key: a random key for drop path; needed in train mode when the rate is above 0.

        Returns:
          Evaluation logits [B, C] float32, or `Outputs` in train mode.
        """
        outputs = self.outputs(images, key)
        return outputs.evaluation_logits() if self.deterministic else outputs

    def outputs(self, images: jax.Array, key: jax.Array | None = None) -> Outputs:
        """Returns the logits of all heads, in either mode; arguments as in a call."""
        return self.classify(self.encode(self.embed(images), key))

    def embed(self, images: jax.Array) -> jax.Array:
        """Returns the patch tokens [B, h, w, D] of images, without positions."""
        if images.shape[1:] != (*self.config.image_shape, 3):
            raise InputError(
                f"images have shape {images.shape}; the model was created for "
                f"[B, {self.config.image_shape[0]}, {self.config.image_shape[1]}, 3]: "
                "pass image_size to create_model"
            )
        return self.patch_embed(images.astype(self.config.dtype))

    def encode(self, patches: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Maps patch tokens [B, h, w, D] through all blocks to normalised tokens [B, P+N, D]."""
        *_, x = self.hidden_states(patches, key)
        return self.norm(x)

    def hidden_states(
        self, patches: jax.Array, key: jax.Array | None = None
    ) -> Iterator[jax.Array]:
        """Yields the tokens [B, P+N, D] that enter each block, then those that leave the last.

        P is 0 in the spatial layers: the prefix tokens, without a position, are prepended right
        after them. Without spatial layers they are there, with a position, from the start.
        """
        if self.deterministic:
            key = None
        elif key is None and self.config.drop_path > 0:
            raise ValueError("drop path in train mode needs a random key: model(images, key)")
        batch, *grid, dim = patches.shape
        positions = self.pos_embed[...].astype(patches.dtype)
        late = self.config.spatial_layers

        x = patches.reshape(batch, -1, dim)
        x = x + positions if late else self._prepend_prefix(x) + positions
        for layer, block in enumerate(self.blocks):
            if late and layer == late:
                x = self._prepend_prefix(x)
            yield x
            num_prefix = self.config.num_prefix if layer >= late else 0
            block_key = None if key is None else jax.random.fold_in(key, layer)
            x = self._run(block, x, (grid[0], grid[1]), num_prefix, block_key)
        yield x

    def attention_maps(self, images: jax.Array) -> list[jax.Array]:
        """Returns each layer's attention weights [B, H, P+N, P+N] float32 on images."""
        maps, grid = [], self.config.grid
        for block, x in zip(self.blocks, self.hidden_states(self.embed(images)), strict=False):
            num_prefix = x.shape[1] - grid[0] * grid[1]
            maps.append(block.attn.weights(block.norm1(x), grid, num_prefix))
        return maps

    def classify(self, tokens: jax.Array) -> Outputs:
        """Applies the heads to normalised tokens [B, P+N, D]."""
        prefix = self.config.num_prefix
        precise = accumulation_dtype(tokens.dtype)
        logits = self.head(tokens[:, 0]).astype(precise)
        distilled = dense = None
        if self.dist_head is not None:
            distilled = self.dist_head(tokens[:, 1]).astype(precise)
        if self.dense_head is not None:
            dense = self.dense_head(tokens[:, prefix:]).astype(precise)
        return Outputs(logits, distilled, dense)

    def _prepend_prefix(self, x: jax.Array) -> jax.Array:
        prefix = [self.cls_token] if self.dist_token is None else [self.cls_token, self.dist_token]
        tokens = [token[...].astype(x.dtype) for token in prefix]
        tokens = [jnp.broadcast_to(token, (x.shape[0], *token.shape[1:])) for token in tokens]
        return jnp.concatenate([*tokens, x], axis=1)

    def _run(
        self, block: Block, x: jax.Array, grid: Grid, num_prefix: int, key: jax.Array | None
    ) -> jax.Array:
        if not self.config.remat:
            return block(x, grid, num_prefix, key)
        run = nnx.remat(lambda block, x, key: block(x, grid, num_prefix, key))
        return run(block, x, key)
