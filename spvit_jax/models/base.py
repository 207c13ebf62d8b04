"""What every model shares: the fields of its configuration, how it is called, what it returns.

A family is a file beside this one with a subclass of `ModelConfig`, which says what there is to
choose, and a subclass of `Model`, which says how tokens go from block to block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx, struct

from spvit_jax.errors import InputError
from spvit_jax.models import loop
from spvit_jax.models.block import Block
from spvit_jax.models.fields import check_fields
from spvit_jax.models.initializers import CountedRngs
from spvit_jax.models.layers import ConvStem, PatchEmbed, accumulation_dtype
from spvit_jax.models.loop import Segment, find_segments
from spvit_jax.models.spatial import Grid, LocalityMask

MaskSchedule = tuple[tuple[int, int], ...]  # ((number of layers, masked heads in each), ...)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What defines a model of any family; fields are checked on creation.

    Raises:
      InputError: a field has a value from which no model can be built.
    """

    # Input and output.
    image_size: int | tuple[int, int] = 224  # pixels, one number or (height, width)
    num_classes: int = 1000  # C
    patch_size: int = 16  # pixels

    # Blocks.
    dim: int = 384  # D; in Swin of the first stage
    num_heads: int = 6  # H, of each block; in Swin of the first stage
    mlp_ratio: float = 4.0  # hidden width of the MLP over dim
    qkv_bias: bool = True  # whether queries, keys and values have a bias
    norm_eps: float = 1e-6  # epsilon of LayerNorm
    drop_path: float = 0.0  # rate of stochastic depth, see `drop_path_per_layer`

    # MaiT's masked heads.
    # ((layers, heads masked in each), …), or "thirds": all, one and none
    masked_heads: MaskSchedule | Literal["thirds"] | None = None
    mask_radius: int | tuple[int, int] = 1  # patches, one number or (rows, columns)
    mask_kind: str = "soft"  # outside the neighbourhood scores are 0 (soft) or -inf (hard)

    # Execution.
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
        self._check_masked_heads()
        LocalityMask(0, self.mask_shape, self.mask_kind)

    def _check_masked_heads(self) -> None:
        schedule, heads = self.masked_heads, self.heads_per_layer()
        if schedule is None or schedule == "thirds":
            return
        if min((count for count, _ in schedule), default=0) < 0 or len(heads) != sum(
            n for n, _ in schedule
        ):
            raise InputError(
                f"masked_heads {schedule} covers {sum(n for n, _ in schedule)} layers, the model "
                f"has {len(heads)}; the layer counts must add up to the depth"
            )
        for layer, (masked, available) in enumerate(
            zip(self.masked_per_layer(), heads, strict=True)
        ):
            if not 0 <= masked <= available:
                raise InputError(
                    f"masked_heads {schedule} asks for {masked} masked heads in layer {layer}, "
                    f"which has {available}"
                )

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return _pair(self.image_size)

    @property
    def grid(self) -> Grid:
        """(h, w) in patches, as the first block sees them."""
        height, width = self.image_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def mask_shape(self) -> tuple[int, int]:
        """The neighbourhood's radius as (rows, columns)."""
        return _pair(self.mask_radius)

    def heads_per_layer(self) -> list[int]:
        """Returns the number of attention heads of each layer."""
        raise NotImplementedError

    def masked_per_layer(self) -> list[int]:
        """Returns the number of masked heads of each layer."""
        heads = self.heads_per_layer()
        if self.masked_heads is None:
            return [0] * len(heads)
        if self.masked_heads == "thirds":
            third = len(heads) // 3
            return heads[:third] + [1] * third + [0] * (len(heads) - 2 * third)
        return [masked for count, masked in self.masked_heads for _ in range(count)]

    def drop_path_per_layer(self) -> list[float]:
        """Returns the rate of stochastic depth at each layer: growing from 0 to `drop_path`."""
        depth = len(self.heads_per_layer())
        return [self.drop_path * layer / max(depth - 1, 1) for layer in range(depth)]

    def mask(self, layer: int) -> LocalityMask | None:
        """Returns the mask of a layer, or None where no head is masked."""
        masked = self.masked_per_layer()[layer]
        return LocalityMask(masked, self.mask_shape, self.mask_kind) if masked else None

    def build(self, rngs: nnx.Rngs) -> Model:
        """Creates the model."""
        raise NotImplementedError

    def abstract(self) -> Model:
        """Returns the model with shapes in the place of arrays, of which none is allocated."""
        return nnx.eval_shape(lambda: self.build(CountedRngs(0)))

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields and the family as JSON can hold them; see `models.from_dict`."""
        return {"family": type(self).__name__, **dataclasses.asdict(self)}


@struct.dataclass
class Outputs:
    """What a model returns in training: unnormalised logits, float32.

    Attributes:
      logits: [B, C], from the class token or, in Swin, from the mean of all tokens.
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
    and, where something is done to the tokens between blocks, `before_blocks`.

    Attributes:
      config: what the model was made from.
      deterministic: whether it is in evaluation mode.
      patch_embed: from images to patch tokens.
      blocks: one per layer, in order.
      norm: the LayerNorm after the last.
    """

    config: ModelConfig
    patch_embed: PatchEmbed | ConvStem
    blocks: nnx.List[Block]
    norm: nnx.LayerNorm

    def __init__(self, config: ModelConfig):
        self.config = config
        self.deterministic = True

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
        """Returns the tokens that leave the last block, of patch tokens [B, h, w, D]."""
        if self.config.scan:
            kinds = [nnx.graphdef(block) for block in self.blocks]
            segments = find_segments(kinds, starts=self.before_blocks)
        else:
            segments = self._layers()
        *_, last = self._states(segments, patches, key)
        return last

    def hidden_states(self, patches: jax.Array) -> Iterator[Tokens]:
        """Yields the tokens that enter each block, then those that leave the last."""
        return self._states(self._layers(), patches, None)

    def to_tokens(self, patches: jax.Array) -> Tokens:
        """Makes patch tokens [B, h, w, D] those that enter the first block."""
        raise NotImplementedError

    @property
    def before_blocks(self) -> dict[int, Callable[[Tokens], Tokens]]:
        """What happens to the tokens between two blocks, by the layer of the second."""
        # No method: `nnx.tabulate` runs those under `jax.jit`, which can return arrays alone.
        return {}

    def classify(self, tokens: jax.Array) -> Outputs:
        """Applies the heads to normalised tokens [B, P+N, D]."""
        raise NotImplementedError

    def attention_maps(self, images: jax.Array) -> list[AttentionMap]:
        """Returns each layer's attention on images, float32."""
        states = self.hidden_states(self.embed(images))
        return [
            AttentionMap(
                block.attn.weights(block.norm1(state.x), state.grid, state.num_prefix),
                block.attn.map_grid(state.grid),
                state.num_prefix,
            )
            for block, state in zip(self.blocks, states, strict=False)
        ]

    def _layers(self) -> list[Segment]:
        return [Segment(layer) for layer in range(len(self.blocks))]

    def _states(
        self, segments: list[Segment], patches: jax.Array, key: jax.Array | None
    ) -> Iterator[Tokens]:
        """Yields the tokens that enter each segment, then those that leave the last."""
        if self.deterministic or self.config.drop_path == 0:
            key = None
        elif key is None:
            raise ValueError("drop path in train mode needs a random key: model(images, key)")
        tokens = self.to_tokens(patches.astype(self.blocks[0].residual_dtype))
        before_blocks = self.before_blocks
        for segment in segments:
            if segment.start in before_blocks:
                tokens = before_blocks[segment.start](tokens)
            yield tokens
            tokens = self._through(segment, tokens, key)
        yield tokens

    def _through(self, segment: Segment, tokens: Tokens, key: jax.Array | None) -> Tokens:
        """Takes tokens through a segment; `key` draws the drop path of all layers, if any."""
        rates = self.config.drop_path_per_layer()

        def call(block: Block, x: jax.Array, layer: int, rate: float) -> jax.Array:
            of_layer = None if key is None else jax.random.fold_in(key, layer)
            return block(x, tokens.grid, tokens.num_prefix, of_layer, rate)

        x = loop.through(
            [self.blocks[layer] for layer in segment.layers],
            call,
            tokens.x,
            segment.layers,
            [rates[layer] for layer in segment.layers],
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
