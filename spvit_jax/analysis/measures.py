"""Measures of each head's attention, averaged over any number of images in bounded memory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlogy
from jax.sharding import Mesh

from spvit_jax.analysis.attention import LayerAttention, layer_attention
from spvit_jax.analysis.similarity import similarity_sums
from spvit_jax.errors import InputError
from spvit_jax.models import ModelConfig
from spvit_jax.models.spatial import LocalityMask
from spvit_jax.training.sharding import on_mesh, put_batch
from spvit_jax.training.state import Variables

Normalize = Callable[[jax.Array], jax.Array]  # from pixels uint8 to a model's images

# Attention maps of one step are to take no more than this on a device, in bytes.
_MAPS_BYTES = 256 * 2**20
_MOST_IMAGES = 64


@dataclasses.dataclass(frozen=True)
class Measures:
    """Measures of a model's attention, averaged over images.

    Attributes:
      locality: attention locality score [H] of each layer, as `locality`.
      distance: mean distance of attention in pixels [H] of each layer, as `distance`.
      entropy: entropy in nats [H] of each layer, as `entropy`.
      similarity: cosine between layers [L, L], as `similarity.similarity_sums`.
      prefix_similarity: the same of the rows of prefix tokens alone.
      num_images: number of images.
    """

    locality: list[np.ndarray]
    distance: list[np.ndarray]
    entropy: list[np.ndarray]
    similarity: np.ndarray
    prefix_similarity: np.ndarray
    num_images: int


def locality(layer: LayerAttention, radius: tuple[int, int]) -> jax.Array:
    """Returns the attention locality score of each head and image, [B, H] (MaiT).

    It is the attention inside of the neighbourhood, averaged over queries. Prefix tokens count as
    near: a query's attention to them is local, and so is all of theirs.

    Args:
      layer: attention of a layer.
      radius: radius of the neighbourhood (rows, columns), in patches.
    """
    near = LocalityMask((), radius).neighbourhood(layer.map_grid, layer.num_prefix)
    inside = jnp.where(near, layer.weights, 0).sum((1, 3, 4))
    return inside / (layer.num_patches + layer.num_prefix)


def distance(layer: LayerAttention) -> jax.Array:
    """Returns the mean distance of attention of each head and image, [B, H], in pixels.

    It is the distance from a patch to the patches that it attends to, weighted by its attention,
    averaged over patches (figure 7 of arXiv 2010.11929). Prefix tokens and padding have no place:
    neither their rows count nor the attention to them.
    """
    y, x = np.divmod(layer.patches, layer.grid[1])  # [W, n]
    apart = np.hypot(y[:, :, None] - y[:, None, :], x[:, :, None] - x[:, None, :])
    weights = layer.weights[..., layer.num_prefix :, layer.num_prefix :]
    weights = jnp.where((layer.patches >= 0)[:, None, None, :], weights, 0)
    total = weights.sum(-1)
    mean = jnp.einsum("bwhnm,wnm->bwhn", weights, apart.astype(weights.dtype))
    mean = mean / jnp.where(total > 0, total, 1)
    return layer.stride * mean.sum((1, 3)) / layer.num_patches


def entropy(layer: LayerAttention) -> jax.Array:
    """Returns the entropy of the attention of each head and image, [B, H], in nats.

    It is that of a patch's weights over all tokens, averaged over patches: 0 where each looks at
    one token, the logarithm of their number where it looks at all alike.
    """
    rows = layer.weights[..., layer.num_prefix :, :]
    return -xlogy(rows, rows).sum((1, 3, 4)) / layer.num_patches


@functools.lru_cache(maxsize=8)
def images_per_step(config: ModelConfig) -> int:
    """Returns the number of images on a device whose attention maps fit in bounded memory."""
    image = jax.ShapeDtypeStruct((1, *config.image_shape, 3), jnp.float32)

    def weights(variables: Variables, image: jax.Array) -> list[jax.Array]:
        return [layer.weights for layer in variables.model().attention_maps(image)]

    maps = jax.eval_shape(weights, Variables.of(config.abstract()), image)
    return max(1, min(_MOST_IMAGES, _MAPS_BYTES // sum(4 * each.size for each in maps)))


def measure(
    variables: Variables,
    batches: Iterable[Mapping[str, Any]],
    mesh: Mesh,
    normalize: Normalize,
    *,
    progress: Callable[[], object] = lambda: None,
) -> Measures:
    """Measures a model's attention on all images of some batches, each counted once.

    Args:
      variables: weights of the model, on the mesh.
      batches: batches as `data.pipeline.eval_batches` makes them: `image` and `mask`.
      mesh: devices over which batches are split.
      normalize: function that normalises the pixels of a batch.
      progress: function to call after each batch.

    Returns:
      Means over the images, whatever the size of the batches.

    Raises:
      InputError: there is no image.
      FloatingPointError: attention is not finite numbers.
    """
    step = jax.jit(on_mesh(mesh, _batch_sums, normalize=normalize))
    totals: dict[str, Any] | None = None
    for batch in batches:
        given = put_batch({"image": batch["image"], "mask": batch["mask"]}, mesh)
        sums = jax.tree.map(np.float64, step(variables, given["image"], given["mask"]))
        totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
        progress()
    count = 0 if totals is None else int(totals.pop("count"))
    if totals is None or not count:
        raise InputError("there are no images to measure attention on; expected at least one")
    measures = Measures(**jax.tree.map(lambda total: total / count, totals), num_images=count)
    broken = [i for i, scores in enumerate(measures.entropy) if not np.isfinite(scores).all()]
    if broken:
        raise FloatingPointError(
            f"attention in layer {broken[0]} is not finite numbers; look at the weights, at "
            "data.mean and data.std, or set model.dtype=float32"
        )
    return measures


def _batch_sums(
    variables: Variables, images: jax.Array, mask: jax.Array, *, normalize: Normalize
) -> dict[str, Any]:
    """Returns the sums of all fields of `Measures` over the images [B, …] whose mask is 1."""
    model = variables.model()
    layers = layer_attention(model, normalize(images))

    def summed(measure: Callable[[LayerAttention], jax.Array]) -> list[jax.Array]:
        return [(measure(layer) * mask[:, None]).sum(0) for layer in layers]

    similarity, prefix_similarity = similarity_sums(layers, mask)
    return {
        "locality": summed(functools.partial(locality, radius=model.config.mask_shape)),
        "distance": summed(distance),
        "entropy": summed(entropy),
        "similarity": similarity,
        "prefix_similarity": prefix_similarity,
        "count": mask.sum(),
    }
