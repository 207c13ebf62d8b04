"""Labels of a crop's tokens from the label map of the whole image, by ROI-align on the device.

ROI-align is separable: the labels of a crop are A_y · L · A_xᵀ for two small matrices that follow
from the box, so that on an accelerator it is two products rather than a gather.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from spvit_jax.models.spatial import Grid


@jax.named_scope("label_maps")
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
    """Returns the target probabilities of crops and of their tokens.

    Args:
      maps: label maps [B, 2, K, h, w], the K largest logits on a grid over the image, then their
        classes; the logits of other classes are 0.
      boxes: [B, 4], (y0, x0, y1, x1) of the crops, as fractions of the image's height and width.
      flips: bool [B], whether the crop was flipped from left to right.
      grid: rows and columns of tokens.
      num_classes: number of classes, C.
      moves: RandAugment's affine maps [B, 3, 3], from a position (x, y, 1) in its result to that
        in the flipped crop, as fractions of width and height. None for the identity.
      smoothing: label smoothing, the probability that is spread over all classes.
      official_axes: whether to exchange x and y in the boxes, as the authors' code does.

    Returns:
      The class probabilities of the tokens [B, N, C] and of the whole crops [B, C], float32.
    """
    if official_axes:
        boxes = boxes[:, jnp.array([1, 0, 3, 2])]
    dense = jax.vmap(lambda label_map: scatter(label_map, num_classes))(maps)
    tokens = jax.vmap(lambda logits, box: roi_align(logits, box, grid))(dense, boxes)
    tokens = jnp.where(flips[:, None, None, None], tokens[:, :, ::-1], tokens)
    if moves is not None:
        tokens = jax.vmap(_move)(tokens, moves)
    whole = jax.vmap(lambda logits, box: roi_align(logits, box, (1, 1)))(dense, boxes)

    def probabilities(logits: jax.Array) -> jax.Array:
        return (1 - smoothing) * jax.nn.softmax(logits) + smoothing / num_classes

    tokens = probabilities(tokens).reshape(len(maps), -1, num_classes)
    return tokens, probabilities(whole)[:, 0, 0]


def scatter(label_map: jax.Array, num_classes: int) -> jax.Array:
    """Returns the logits of all classes [h, w, C] float32 from a label map [2, K, h, w]."""
    values, classes = label_map[0].astype(jnp.float32), label_map[1].astype(jnp.int32)
    # A sum over one-hot vectors: on a TPU a scatter is a loop over elements.
    is_class = classes[..., None] == jnp.arange(num_classes)
    return jnp.where(is_class, values[..., None], 0).sum(0)


def roi_align(image: jax.Array, box: jax.Array, grid: Grid) -> jax.Array:
    """Averages an image over the cells of a box (Mask R-CNN's ROI-align, arXiv 1703.06870).

    Each cell averages ⌈cell size⌉ bilinear samples along each axis. Pixel centres are at whole
    numbers, so that the box is shifted by half a pixel.

    Args:
      image: [h, w, C].
      box: [4], (y0, x0, y1, x1) as fractions of height and width.
      grid: numbers of cells, (rows, columns).

    Returns:
      The means of the cells, [rows, columns, C].
    """
    rows = roi_matrix(image.shape[0], box[0], box[2], grid[0])
    columns = roi_matrix(image.shape[1], box[1], box[3], grid[1])
    return jnp.einsum("yh,hwc,xw->yxc", rows, image, columns, precision="highest")


def roi_matrix(length: int, start: jax.Array, stop: jax.Array, cells: int) -> jax.Array:
    """Returns the matrix [cells, length] that applies ROI-align along one axis.

    Args:
      length: number of pixels along the axis.
      start: lower edge of the box, as a fraction of the axis.
      stop: upper edge of the box, likewise.
      cells: number of cells that the box is divided into.
    """
    low = start * length - 0.5
    size = (stop - start) * length / cells
    samples = jnp.ceil(size)
    number = jnp.arange(math.ceil(length / cells))  # no cell has more samples
    position = low + (jnp.arange(cells)[:, None] + (number + 0.5) / jnp.maximum(samples, 1)) * size
    weights = _bilinear(position, length)
    counts = (number < samples)[None, :, None]
    return (weights * counts).sum(1) / jnp.maximum(samples, 1)


def _bilinear(position: jax.Array, length: int) -> jax.Array:
    """Returns bilinear weights [..., length] at positions; 0 more than one pixel outside."""
    inside = (position >= -1) & (position <= length)
    clipped = jnp.clip(position, 0, length - 1)
    weights = jax.nn.relu(1 - jnp.abs(clipped[..., None] - jnp.arange(length)))
    return weights * inside[..., None]


def _move(tokens: jax.Array, move: jax.Array) -> jax.Array:
    """Applies the affine map of the pixels to tokens [h, w, C]; logits from outside are 0."""
    h, w, channels = tokens.shape
    y, x = jnp.meshgrid((jnp.arange(h) + 0.5) / h, (jnp.arange(w) + 0.5) / w, indexing="ij")
    positions = jnp.stack([x, y, jnp.ones_like(x)], -1).reshape(-1, 3) @ move.T
    inside = ((positions[:, :2] >= 0) & (positions[:, :2] < 1)).all(1)
    columns = _bilinear(positions[:, 0] * w - 0.5, w)
    rows = _bilinear(positions[:, 1] * h - 0.5, h) * inside[:, None]
    moved = jnp.einsum("nh,nw,hwc->nc", rows, columns, tokens, precision="highest")
    return moved.reshape(h, w, channels)
