"""Attention of each layer with the places of its patches in the image, windows put together."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spvit_jax.errors import InputError
from spvit_jax.models import Model, ModelConfig
from spvit_jax.models.attention import Attention
from spvit_jax.models.spatial import Grid


@dataclasses.dataclass(frozen=True)
class LayerAttention:
    """One layer's attention on a batch of images.

    Each row of a query that is no padding sums to 1. In CaiT these are the heads between the two
    maps of talking heads, on which masks and priors act.

    Attributes:
      weights: weights [B, W, H, P+n, P+n] float32 of the W maps of an image, which are windows in
        Swin, and one in other models; rows of padding are 0.
      patches: int [W, n], the patch at each place of a map, counted row by row; -1 is padding.
      grid: rows and columns of patches (h, w) in this layer.
      map_grid: rows and columns of places in a map.
      num_prefix: number P of prefix tokens.
      stride: pixels from a patch to the next one.
    """

    weights: jax.Array
    patches: np.ndarray
    grid: Grid
    map_grid: Grid
    num_prefix: int
    stride: int

    @property
    def num_patches(self) -> int:
        """Number N of patches in the grid."""
        return self.grid[0] * self.grid[1]

    def on_grid(self, rows: jax.Array, map_index: int) -> jax.Array:
        """Lays rows [..., n] of a map out on the grid: [..., h, w], and 0 outside of the map."""
        # Padding goes to one more place, which is cut off.
        places = np.where(self.patches[map_index] < 0, self.num_patches, self.patches[map_index])
        laid_out = jnp.zeros((*rows.shape[:-1], self.num_patches + 1), rows.dtype)
        laid_out = laid_out.at[..., places].set(rows)[..., : self.num_patches]
        return laid_out.reshape(*rows.shape[:-1], *self.grid)


def check_has_attention(model: Model) -> None:
    """Checks that a model's layers have attention among patches, as every family here has.

    Raises:
      InputError: a layer has none, as may be in a family of one's own.
    """
    blocks = getattr(model, "blocks", ())
    without = [i for i, block in enumerate(blocks) if not _has_attention(block)]
    if not blocks or without:
        where = f"layer {without[0]} has none" if without else "it has no blocks"
        raise InputError(
            f"{type(model).__name__} has no attention among patches to look at: {where}; expected "
            "a model whose blocks have `attn`, as all families of spvit_jax.models"
        )


def _has_attention(block: object) -> bool:
    return isinstance(getattr(block, "attn", None), Attention)


def stride_per_layer(config: ModelConfig) -> list[int]:
    """Returns the pixels from a patch to the next one in each layer; they double with a stage."""
    depths = config.layers_per_stage() or (len(config.heads_per_layer()),)
    return [
        config.patch_size * 2**stage for stage, depth in enumerate(depths) for _ in range(depth)
    ]


@functools.lru_cache(maxsize=8)
def map_grid_per_layer(config: ModelConfig) -> tuple[Grid, ...]:
    """Returns the grid that attention spans in each layer: the image's, or in Swin a window's."""
    layers = zip(config.abstract().blocks, config.grid_per_layer(), strict=True)
    return tuple(block.attn.map_grid(grid) for block, grid in layers)


def layer_attention(model: Model, images: jax.Array) -> list[LayerAttention]:
    """Returns each layer's attention on normalised images [B, height, width, 3]."""
    layers = zip(
        model.blocks,
        model.attention_maps(images, mix_weights=False),
        model.config.grid_per_layer(),
        stride_per_layer(model.config),
        strict=True,
    )
    return [
        LayerAttention(
            weights=attention.weights.reshape(len(images), -1, *attention.weights.shape[1:]),
            patches=block.attn.map_patches(grid),
            grid=grid,
            map_grid=attention.grid,
            num_prefix=attention.num_prefix,
            stride=stride,
        )
        for block, attention, grid, stride in layers
    ]


def attention_of_patches(layer: LayerAttention, queries: Sequence[int]) -> jax.Array:
    """Returns the attention of some patches to all patches of the image.

    Args:
      layer: attention of a layer.
      queries: patches of the layer's grid, counted row by row.

    Returns:
      [B, Q, H, h, w]: for each query the weight of each patch, 0 outside of its window.
    """
    maps = []
    for query in queries:
        ((map_index, place),) = np.argwhere(layer.patches == query)
        rows = layer.weights[:, map_index, :, layer.num_prefix + place, layer.num_prefix :]
        maps.append(layer.on_grid(rows, map_index))
    return jnp.stack(maps, axis=1)


def attention_of_prefix(layer: LayerAttention) -> jax.Array:
    """Returns the attention of the P prefix tokens to patches, [B, P, H, h, w]."""
    rows = layer.weights[:, 0, :, : layer.num_prefix, layer.num_prefix :]
    return layer.on_grid(rows.swapaxes(1, 2), 0)


def attention_received(layer: LayerAttention) -> jax.Array:
    """Returns the attention that each patch receives from a patch on average, [B, H, h, w]."""
    weights = layer.weights[..., layer.num_prefix :, layer.num_prefix :]
    received = weights.sum(axis=-2) / layer.num_patches
    maps = [layer.on_grid(received[:, i], i) for i in range(len(layer.patches))]
    return jnp.stack(maps).sum(0)


def patch_at(row: int, column: int, first: Grid, layer: Grid) -> int:
    """Returns the patch of a layer's grid that holds a patch of the first layer's grid.

    Args:
      row: row of the patch in the first layer's grid.
      column: its column.
      first: rows and columns of patches in the first layer.
      layer: rows and columns of patches in the layer; each stage of a pyramid halves them.

    Returns:
      Number of the patch, counted row by row.
    """
    while first != layer:
        first = -(-first[0] // 2), -(-first[1] // 2)
        row, column = row // 2, column // 2
    return row * layer[1] + column
