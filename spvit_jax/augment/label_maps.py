"""From the label map of a whole image to the labels of a crop's tokens, on the device.

ROI-align is separable: the labels of a crop are A_y · L · A_xᵀ for two small matrices that follow
from the box, so that on an accelerator it is two products rather than a gather.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from spvit_jax.models.spatial import Grid


def align(
    maps: jax.Array,
    boxes: jax.Array,
    flips: jax.Array,
    grid: Grid,
    num_classes: int,
    *,
    moves: jax.Array | None = None,
    smoothing: float = 0.0,
    official_axes: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns the targets of crops.

    Args:
      maps: [B, 2, K, h, w], the K largest logits on a grid over the image, then their classes;
        other classes count as 0.
      boxes: [B, 4], (y0, x0, y1, x1) of the crop, as shares of the image's height and width.
      flips: bool [B], whether the crop was flipped from left to right.
      grid: of the tokens.
      num_classes: C.
      moves: [B, 3, 3], where RandAugment has moved the crop's pixels: from a place (x, y, 1) in
        the result, as shares of width and height, to that in the crop. None for nowhere.
      smoothing: share of each target that is spread over all classes.
      official_axes: whether to take x for y in the box, as the authors' code does.

    Returns:
      The tokens' class probabilities [B, N, C], and the whole crop's [B, C], float32.
    """
    if official_axes:
        boxes = boxes[:, jnp.array([1, 0, 3, 2])]
    dense = jax.vmap(lambda one: scatter(one, num_classes))(maps)
    tokens = jax.vmap(lambda one, box: roi_align(one, box, grid))(dense, boxes)
    tokens = jnp.where(flips[:, None, None, None], tokens[:, :, ::-1], tokens)
    if moves is not None:
        tokens = jax.vmap(_move)(tokens, moves)
    whole = jax.vmap(lambda one, box: roi_align(one, box, (1, 1)))(dense, boxes)

    def probabilities(logits: jax.Array) -> jax.Array:
        return (1 - smoothing) * jax.nn.softmax(logits) + smoothing / num_classes

    tokens = probabilities(tokens).reshape(len(maps), -1, num_classes)
    return tokens, probabilities(whole)[:, 0, 0]


def scatter(label_map: jax.Array, num_classes: int) -> jax.Array:
    """Returns a label map [2, K, h, w] as logits of all classes [h, w, C] float32."""
    values, classes = label_map[0].astype(jnp.float32), label_map[1].astype(jnp.int32)
    _, h, w = values.shape
    y, x = jnp.meshgrid(jnp.arange(h), jnp.arange(w), indexing="ij")
    return jnp.zeros((h, w, num_classes)).at[y, x, classes].add(values)


def roi_align(image: jax.Array, box: jax.Array, grid: Grid) -> jax.Array:
    """Averages an image over the cells of a box (Mask R-CNN's ROI-align, arXiv 1703.06870).

    Each cell averages ⌈cell⌉ bilinear samples along each axis; pixels have their centres at whole
    numbers, and the box is moved by half a pixel for it.

    Args:
      image: [h, w, C].
      box: [4], (y0, x0, y1, x1) as shares of height and width.
      grid: the cells, (rows, columns).

    Returns:
      [rows, columns, C].
    """
    rows = roi_matrix(image.shape[0], box[0], box[2], grid[0])
    columns = roi_matrix(image.shape[1], box[1], box[3], grid[1])
    return jnp.einsum("yh,hwc,xw->yxc", rows, image, columns, precision="highest")


def roi_matrix(length: int, start: jax.Array, stop: jax.Array, cells: int) -> jax.Array:
    """Returns the matrix [cells, length] of ROI-align along one axis.

    Args:
      length: pixels of the axis.
      start: where the box begins, as a share of the axis.
      stop: where it ends.
      cells: into which it is cut.
    """
    low = start * length - 0.5
    size = (stop - start) * length / cells
    samples = jnp.ceil(size)
    number = jnp.arange(math.ceil(length / cells))  # no cell has more samples
    place = low + (jnp.arange(cells)[:, None] + (number + 0.5) / jnp.maximum(samples, 1)) * size
    weights = _bilinear(place, length)
    counts = (number < samples)[None, :, None]
    return (weights * counts).sum(1) / jnp.maximum(samples, 1)


def _bilinear(place: jax.Array, length: int) -> jax.Array:
    """Returns the weights [..., length] of pixels at places; the border reaches one pixel out."""
    inside = (place >= -1) & (place <= length)
    clipped = jnp.clip(place, 0, length - 1)
    weights = jax.nn.relu(1 - jnp.abs(clipped[..., None] - jnp.arange(length)))
    return weights * inside[..., None]


def _move(tokens: jax.Array, move: jax.Array) -> jax.Array:
    """Moves tokens [h, w, C] as pixels were moved; nothing is known of what comes from outside."""
    h, w, channels = tokens.shape
    y, x = jnp.meshgrid((jnp.arange(h) + 0.5) / h, (jnp.arange(w) + 0.5) / w, indexing="ij")
    places = jnp.stack([x, y, jnp.ones_like(x)], -1).reshape(-1, 3) @ move.T
    inside = ((places[:, :2] >= 0) & (places[:, :2] < 1)).all(1)
    columns = _bilinear(places[:, 0] * w - 0.5, w)
    rows = _bilinear(places[:, 1] * h - 0.5, h) * inside[:, None]
    moved = jnp.einsum("nh,nw,hwc->nc", rows, columns, tokens, precision="highest")
    return moved.reshape(h, w, channels)
