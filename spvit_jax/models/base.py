"""Base classes of all models: `ModelConfig`, `Model`, and the `Outputs` of a model in training.

A family is a file beside this one with a subclass of `ModelConfig`, which adds fields, and a
subclass of `Model`, which defines the tokens before, between and after the blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx, struct

from spvit_jax.errors import InputError
from spvit_jax.models import loop, mask_schedule
from spvit_jax.models.block import Block
from spvit_jax.models.fields import check_fields
from spvit_jax.models.implementation import Implementation
from spvit_jax.models.initializers import CountedRngs
from spvit_jax.models.layers import LayerNorm, accumulation_dtype, draw_drop_path
from spvit_jax.models.loop import Segment, find_segments
from spvit_jax.models.mask_schedule import MaskSchedule
from spvit_jax.models.spatial import Grid, LocalityMask
from spvit_jax.models.stem import ConvStem, PatchEmbed


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Configuration of a model of any family; fields are checked on creation.

    Raises:
      InputError: a field has a value from which no model can be built.
    """

    # Input and output.
    image_size: int | tuple[int, int] = 224  # pixels, one number or (height, width)
    num_classes: int = 1000  # number of classes C
    patch_size: int = 16  # pixels

    # Blocks.
    dim: int = 384  # channels D of a token; in Swin of the first stage
    num_heads: int = 6  # heads H of each block; in Swin of the first stage
    mlp_ratio: float = 4.0  # hidden width of the MLP over dim
    qkv_bias: bool = True  # whether queries, keys and values have a bias
    norm_eps: float = 1e-6  # epsilon of LayerNorm
    drop_path: float = 0.0  # rate of stochastic depth, see `drop_path_per_layer`

    # MaiT's masked heads.
    # ((layers, heads), …), ((0, 2), (1,), …) by layer, "thirds", …: see `models/mask_schedule.py`
    masked_heads: MaskSchedule | None = None
    mask_radius: int | tuple[int, int] = 1  # patches, one number or (rows, columns)
    mask_kind: str = "soft"  # outside the neighbourhood scores are 0 (soft) or -inf (hard)

    # Execution.
    # "xla", "local" (masked heads at linear cost), "fused" (a kernel, for TPUs and for GPUs),
    # "fused_interpret" (the same anywhere, slowly, for tests), or "auto" for the fastest on the
    # devices
    attention: Implementation = "auto"
    dtype: str = "float32"  # of the computation, or "bfloat16"; parameters are float32
    remat: bool = False  # recompute each block in the backward pass to save memory
    scan: bool = False  # run like blocks as one loop, which compiles fast at any depth

    def __post_init__(self) -> None:
        check_fields(self)
        height, width = self.image_shape
        if height % self.patch_size or width % self.patch_size:
            raise InputError(
                f"image_size {height}×{width} is not a multiple of patch_size {self.patch_size}; "
                "choose a size that is"
            )
        if self.dim % self.num_heads:
            raise InputError(
                f"dim {self.dim} is not a multiple of num_heads {self.num_heads}; "
                "each head takes an equal share of the channels"
            )
        if int(self.dim * self.mlp_ratio) < 1:
            raise InputError(
                f"mlp_ratio is {self.mlp_ratio} at dim {self.dim}; the MLP would have no channels"
            )
        if not 0 <= self.drop_path < 1:
            raise InputError(f"drop_path is {self.drop_path}; expected a rate in [0, 1)")
        if self.dtype not in ("float32", "bfloat16", "float64"):
            raise InputError(f"dtype is {self.dtype!r}; expected float32, bfloat16 or float64")
        self.masked_per_layer()
        LocalityMask((), self.mask_shape, self.mask_kind)

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return _pair(self.image_size)

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches (h, w) that enter the first block."""
        height, width = self.image_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def mask_shape(self) -> tuple[int, int]:
        """Radius of the masked heads' neighbourhood as (rows, columns)."""
        return _pair(self.mask_radius)

    def layers_per_stage(self) -> tuple[int, ...]:
        """Returns the number of layers of each stage of a pyramid; () for other models."""
        return ()

    def grid_per_layer(self) -> list[Grid]:
        """Returns the grid of patches of each layer."""
        return [self.grid] * len(self.heads_per_layer())

    def heads_per_layer(self) -> list[int]:
        """Returns the number of attention heads of each layer."""
        raise NotImplementedError

    def masked_per_layer(self) -> list[tuple[int, ...]]:
        """Returns the masked heads of each layer, in ascending order."""
        return mask_schedule.masked_per_layer(
            self.masked_heads, self.heads_per_layer(), self.layers_per_stage()
        )

    def drop_path_per_layer(self) -> list[float]:
        """Returns the rate of stochastic depth at each layer: growing from 0 to `drop_path`."""
        depth = len(self.heads_per_layer())
        return [self.drop_path * layer / max(depth - 1, 1) for layer in range(depth)]

    def mask(self, layer: int) -> LocalityMask | None:
        """Returns the locality mask of a layer, or None where no head is masked."""
        masked = self.masked_per_layer()[layer]
        return LocalityMask(masked, self.mask_shape, self.mask_kind) if masked else None

    def build(self, rngs: nnx.Rngs) -> Model:
        """Creates the model of this configuration."""
        raise NotImplementedError

    def abstract(self) -> Model:
        """Returns the model with shapes in the place of arrays; allocates none."""
        return nnx.eval_shape(lambda: self.build(CountedRngs(0)))

    def to_dict(self) -> dict[str, Any]:
        """Returns the family and the fields for JSON; `models.from_dict` is the inverse."""
        return {"family": type(self).__name__, **dataclasses.asdict(self)}


@struct.dataclass
class Outputs:
    """Unnormalised logits of all heads, float32, which a model returns in training.

    Attributes:
      logits: logits [B, C] of the class token or, in Swin, of the mean of all tokens.
      distilled: logits [B, C] of the distillation token; None without one.
      dense: logits [B, N, C] of each patch token; None without a dense head.
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


class Tokens(struct.PyTreeNode):
    """Tokens between two blocks: x [B, P+N, D] of a grid h·w = N behind P prefix tokens.

    The grid and P are static: shapes follow from them.
    """

    x: jax.Array
    grid: Grid = struct.field(pytree_node=False)
    num_prefix: int = struct.field(pytree_node=False)


class AttentionMap(NamedTuple):
    """One layer's attention: weights [B, H, P+N, P+N] over a grid h·w = N.

    In Swin a map is that of one window, and there are B times as many as windows.
    """

    weights: jax.Array
    grid: Grid
    num_prefix: int


class Model(nnx.Module):
    """A vision transformer; created in evaluation mode.

    `model(images)` takes normalised images [B, height, width, 3] and returns evaluation logits
    [B, C]; after `model.train()`, `model(images, key)` returns `Outputs`.

    A family's constructor sets the attributes below; the family defines `to_tokens`, `classify`
    and, where the tokens change between blocks, `before_blocks`.

    Attributes:
      config: configuration that the model was created from.
      deterministic: whether the model is in evaluation mode.
      patch_embed: embedding of images as patch tokens.
      blocks: blocks of the model, one per layer, in order.
      norm: LayerNorm after the last block.
    """

    config: ModelConfig
    patch_embed: PatchEmbed | ConvStem
    blocks: nnx.List[Block]
    norm: LayerNorm

    def __init__(self, config: ModelConfig):
        self.config = config
        self.deterministic = True

    def __call__(self, images: jax.Array, key: jax.Array | None = None) -> jax.Array | Outputs:
        """Classifies images.

        Args:
          images: normalised images [B, height, width, 3], float.
          key: a random key for drop path; needed in train mode when the rate is above 0.

        Returns:
          Evaluation logits [B, C] float32, or `Outputs` in train mode.
        """
        outputs = self.outputs(images, key)
        return outputs.evaluation_logits() if self.deterministic else outputs

    def outputs(self, images: jax.Array, key: jax.Array | None = None) -> Outputs:
        """Returns the logits of all heads, in either mode; arguments as in `__call__`."""
        return self.classify(self.encode(self.embed(images), key))

    @jax.named_scope("patch_embed")
    def embed(self, images: jax.Array) -> jax.Array:
        """Returns the patch tokens [B, h, w, D] of images, without positions."""
        height, width = self.config.image_shape
        if images.shape[1:] != (height, width, 3):
            raise InputError(
                f"images have shape {images.shape}; the model was created for "
                f"[B, {height}, {width}, 3]: pass image_size to create_model"
            )
        return self.patch_embed(images.astype(self.config.dtype))

    def encode(self, patches: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Maps patch tokens [B, h, w, D] through all blocks to normalised tokens [B, P+N, D]."""
        return self.norm(self.through_blocks(patches, key).x)

    def through_blocks(self, patches: jax.Array, key: jax.Array | None = None) -> Tokens:
        """Maps patch tokens [B, h, w, D] through all blocks to the tokens that leave the last."""
        if self.config.scan:
            kinds = [nnx.graphdef(block) for block in self.blocks]
            segments = find_segments(kinds, starts=self.before_blocks)
        else:
            segments = self._single_layers()
        *_, last = self._states(segments, patches, key)
        return last

    def hidden_states(self, patches: jax.Array) -> Iterator[Tokens]:
        """Yields the tokens that enter each block, then those that leave the last."""
        return self._states(self._single_layers(), patches, None)

    def to_tokens(self, patches: jax.Array) -> Tokens:
        """Maps patch tokens [B, h, w, D] to the tokens that enter the first block."""
        raise NotImplementedError

    @property
    def before_blocks(self) -> dict[int, Callable[[Tokens], Tokens]]:
        """Functions that change the tokens between two blocks, by the layer of the second block."""
        # No method: `nnx.tabulate` runs those under `jax.jit`, which can return arrays alone.
        return {}

    def classify(self, tokens: jax.Array) -> Outputs:
        """Applies the heads to normalised tokens [B, P+N, D]."""
        raise NotImplementedError

    def attention_maps(self, images: jax.Array, *, mix_weights: bool = True) -> list[AttentionMap]:
        """Returns each layer's attention on images [B, height, width, 3], float32.

        `mix_weights` as in `Attention.weights`: it makes a difference in CaiT alone.
        """
        states = self.hidden_states(self.embed(images))
        return [
            AttentionMap(
                block.attn.weights(
                    block.norm1(state.x), state.grid, state.num_prefix, mix_weights=mix_weights
                ),
                block.attn.map_grid(state.grid),
                state.num_prefix,
            )
            for block, state in zip(self.blocks, states, strict=False)
        ]

    def class_attention(self, images: jax.Array) -> list[jax.Array]:
        """Returns the attention of layers in which prefix tokens alone are queries, as CaiT's.

        Args:
          images: normalised images [B, height, width, 3].

        Returns:
          Weights [B, H, P, P+N] float32 of each such layer, in order; none in most families.
        """
        return []

    def _single_layers(self) -> list[Segment]:
        """Returns a segment for each layer, for a model that runs without loops."""
        return [Segment(layer) for layer in range(len(self.blocks))]

    def _states(
        self, segments: list[Segment], patches: jax.Array, key: jax.Array | None
    ) -> Iterator[Tokens]:
        """Yields the tokens that enter each segment, then those that leave the last."""
        if self.deterministic or self.config.drop_path == 0:
            key = None
        elif key is None:
            raise ValueError("drop path in train mode needs a random key: model(images, key)")
        rates = self.config.drop_path_per_layer()
        factors = None if key is None else draw_drop_path(key, rates, len(patches))
        tokens = self.to_tokens(patches.astype(self.blocks[0].residual_dtype))
        before_blocks = self.before_blocks
        for segment in segments:
            if segment.start in before_blocks:
                tokens = before_blocks[segment.start](tokens)
            yield tokens
            tokens = self._apply_segment(segment, tokens, factors)
        yield tokens

    def _apply_segment(self, segment: Segment, tokens: Tokens, factors: jax.Array | None) -> Tokens:
        """Maps tokens through the blocks of a segment; `factors` are those of all layers."""

        def call(block: Block, x: jax.Array, factors: jax.Array | None) -> jax.Array:
            return block(x, tokens.grid, tokens.num_prefix, factors)

        x = loop.apply_blocks(
            [self.blocks[layer] for layer in segment.layers],
            call,
            tokens.x,
            [None if factors is None else factors[layer] for layer in segment.layers],
            period=segment.period,
            remat=self.config.remat,
        )
        return tokens.replace(x=x)

    @staticmethod
    def _logits(head: nnx.Linear, tokens: jax.Array) -> jax.Array:
        return head(tokens).astype(accumulation_dtype(tokens.dtype))


def prepend(prefix: list[nnx.Param], x: jax.Array) -> jax.Array:
    """Puts prefix tokens, each [1, 1, D], before the tokens x [B, N, D]."""
    tokens = [token[...].astype(x.dtype) for token in prefix]
    tokens = [jnp.broadcast_to(token, (x.shape[0], *token.shape[1:])) for token in tokens]
    return jnp.concatenate([*tokens, x], axis=1)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
