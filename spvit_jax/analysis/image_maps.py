"""Attention on single images: of chosen patches and of the class token, in every layer and head."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spvit_jax.analysis.attention import (
    LayerAttention,
    attention_of_patches,
    attention_of_prefix,
    attention_received,
    layer_attention,
    patch_at,
)
from spvit_jax.analysis.measures import Normalize
from spvit_jax.models import Model
from spvit_jax.models.spatial import Grid
from spvit_jax.training.sharding import on_mesh, put_batch
from spvit_jax.training.state import Variables

Query = tuple[int, int]  # row and column of a patch in the first layer's grid


@dataclasses.dataclass(frozen=True)
class ImageMaps:
    """A model's attention on one image.

    Attributes:
      index: index of the image in its split.
      label: its class, or None where an image may have several.
      pixels: image uint8 [height, width, 3], as the model sees it.
      probabilities: probability float32 [C] of each class.
      patches: attention [Q, H, h, w] of the queries to all patches, of each layer.
      class_token: attention [H, h, w] of the class token to all patches, by layer; CaiT's layers
        of class attention are counted on after the others.
    """

    index: int
    label: int | None
    pixels: np.ndarray
    probabilities: np.ndarray
    patches: list[np.ndarray]
    class_token: dict[int, np.ndarray]


def image_maps(
    variables: Variables,
    batches: Iterable[Mapping[str, Any]],
    mesh: Mesh,
    normalize: Normalize,
    queries: Sequence[Query],
) -> list[ImageMaps]:
    """Returns a model's attention on each image of some batches.

    Args:
      variables: weights of the model, on the mesh.
      batches: batches as `data.pipeline.eval_batches` makes them.
      mesh: devices over which batches are split.
      normalize: function that normalises the pixels of a batch.
      queries: patches that look.
    """
    step = jax.jit(on_mesh(mesh, _batch_maps, normalize=normalize, queries=tuple(queries)))
    found = []
    for batch in batches:
        pixels = put_batch({"image": batch["image"]}, mesh)["image"]
        maps = jax.device_get(step(variables, pixels))
        for i in np.flatnonzero(batch["mask"]):
            label = batch["label"][i]
            found.append(
                ImageMaps(
                    index=int(batch["index"][i]),
                    label=int(label) if np.ndim(label) == 0 else None,
                    pixels=batch["image"][i],
                    **jax.tree.map(lambda array, i=i: array[i], maps),
                )
            )
    return found


def _batch_maps(
    variables: Variables,
    pixels: jax.Array,
    *,
    normalize: Normalize,
    queries: tuple[Query, ...],
) -> dict[str, Any]:
    """Returns the fields of `ImageMaps` that a model computes, for a batch of images."""
    model = variables.model()
    images = normalize(pixels)
    layers = layer_attention(model, images)
    first = model.config.grid
    return {
        "probabilities": jax.nn.softmax(model.outputs(images).evaluation_logits()),
        "patches": [
            attention_of_patches(
                layer, [patch_at(*query, first=first, layer=layer.grid) for query in queries]
            )
            for layer in layers
        ],
        "class_token": _class_token(model, images, layers),
    }


def last_attention(model: Model, images: jax.Array) -> dict[str, jax.Array]:
    """Returns the attention to patches in the last layer, by the words for whose it is.

    Args:
      model: model in evaluation mode.
      images: normalised images [B, height, width, 3].

    Returns:
      One entry: weights [B, H, h, w], those of the class token, or, in models without one, what a
      patch receives from all patches on average.
    """
    layers = layer_attention(model, images)
    of_token = _class_token(model, images, layers)
    if of_token:
        last = max(of_token)
        return {f"what the class token attends to in layer {last}": of_token[last]}
    received = attention_received(layers[-1])
    return {f"what patches attend to on average in layer {len(layers) - 1}": received}


def _class_token(
    model: Model, images: jax.Array, layers: Sequence[LayerAttention]
) -> dict[int, jax.Array]:
    """Returns the class token's attention [B, H, h, w] by layer."""
    maps = {
        index: attention_of_prefix(layer)[:, 0]
        for index, layer in enumerate(layers)
        if layer.num_prefix
    }
    for index, weights in enumerate(model.class_attention(images), len(layers)):
        maps[index] = _on_grid(weights, model.config.grid)
    return maps


def _on_grid(weights: jax.Array, grid: Grid) -> jax.Array:
    """Lays the first token's weights on patches out on the grid: [B, H, P, P+N] to [B, H, h, w]."""
    return jnp.reshape(weights[:, :, 0, weights.shape[2] :], (*weights.shape[:2], *grid))
