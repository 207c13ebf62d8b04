"""Similarity of layers: the cosine between what a token attends to in one layer and in another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spvit_jax.analysis.attention import LayerAttention


def similarity_sums(
    layers: Sequence[LayerAttention], mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns how alike the attention of any two layers is, summed over images.

    It is the cosine between the weights of a token in the one layer and in the other, averaged over
    heads and tokens (MaiT, after arXiv 2103.11886), prefix tokens included; where one of the two
    layers has none, as in SP-ViT, over patches and their weights on patches.

    Args:
      layers: attention of each layer on B images.
      mask: float [B], 1 for an image that counts, else 0.

    Returns:
      Similarity [L, L], and that of the prefix tokens' rows alone [L, L]; float32. NaN where two
      layers have another grid, other heads or other windows, or no prefix tokens.
    """
    similarity = jnp.full((len(layers), len(layers)), jnp.nan)
    of_prefix = similarity
    for alike in _alike(layers):
        with_prefix = [i for i in alike if layers[i].num_prefix]
        if len(with_prefix) < len(alike):
            similarity = _set(similarity, alike, layers, mask, _patch_rows)
        if with_prefix:
            similarity = _set(similarity, with_prefix, layers, mask, _all_rows)
            of_prefix = _set(of_prefix, with_prefix, layers, mask, _prefix_rows)
    return similarity, of_prefix


def _alike(layers: Sequence[LayerAttention]) -> list[list[int]]:
    """Returns the layers in groups of the same grid, windows and number of heads."""
    groups: dict[object, list[int]] = {}
    for index, layer in enumerate(layers):
        heads = layer.weights.shape[2]
        groups.setdefault((layer.grid, layer.patches.tobytes(), heads), []).append(index)
    return list(groups.values())


def _set(
    similarity: jax.Array,
    group: Sequence[int],
    layers: Sequence[LayerAttention],
    mask: jax.Array,
    rows_of: Callable[[LayerAttention], jax.Array],
) -> jax.Array:
    """Sets the entries of a group of layers to the mean cosine of some rows, summed over images."""
    rows = jnp.stack([rows_of(layers[index]) for index in group])  # [L, B, W, H, rows, columns]
    norms = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    unit = rows / jnp.where(norms > 0, norms, 1)  # rows of padding are 0
    first = (unit * mask[:, None, None, None, None]).reshape(len(group), -1)
    cosines = jnp.matmul(first, unit.reshape(len(group), -1).T, precision="highest")
    per_image = jnp.count_nonzero(norms[0, 0])
    return similarity.at[np.ix_(group, group)].set(cosines / per_image)


def _all_rows(layer: LayerAttention) -> jax.Array:
    return layer.weights


def _patch_rows(layer: LayerAttention) -> jax.Array:
    return layer.weights[..., layer.num_prefix :, layer.num_prefix :]


def _prefix_rows(layer: LayerAttention) -> jax.Array:
    return layer.weights[..., : layer.num_prefix, :]
