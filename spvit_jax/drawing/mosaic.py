"""Tables of small pictures: of learned priors, or of attention laid over an image."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from spvit_jax.analysis.priors import Priors
from spvit_jax.drawing.style import DIVERGING, colours, mappable, styled

_HEAT = "inferno"
_QUERY = (64, 224, 255)  # frame of the patch that looks


class Scale(NamedTuple):
    """What colours mean: values from `least` to `most` in a colour map of matplotlib."""

    label: str
    name: str
    least: float
    most: float


@dataclasses.dataclass(frozen=True)
class Mosaic:
    """A table of pictures of one size.

    Attributes:
      tiles: pictures uint8 [h, w, 3], row by row; None leaves a place empty.
      rows: label of each row.
      columns: label of each column.
      scale: what the colours mean, where it is the same in all tiles.
    """

    tiles: list[list[np.ndarray | None]]
    rows: list[str]
    columns: list[str]
    scale: Scale | None = None

    def image(self) -> np.ndarray:
        """Returns all tiles as one image uint8 [height, width, 4], whose gaps are transparent.

        Each tile has the same share of it, with its part of the gap around.
        """
        h, w = next(tile for row in self.tiles for tile in row if tile is not None).shape[:2]
        gap = max(1, round(0.03 * min(h, w)))
        height, width = h + 2 * gap, w + 2 * gap
        table = np.zeros((len(self.rows) * height, len(self.columns) * width, 4), np.uint8)
        for i, row in enumerate(self.tiles):
            for j, tile in enumerate(row):
                if tile is not None:
                    y, x = i * height + gap, j * width + gap
                    table[y : y + h, x : x + w, :3] = tile
                    table[y : y + h, x : x + w, 3] = 255
        return table


@styled
def figure_of(mosaic: Mosaic, title: str = "") -> Figure:
    """Draws a mosaic with its labels as a figure."""
    image = mosaic.image()
    rows, columns = len(mosaic.rows), len(mosaic.columns)
    tile_h, tile_w = image.shape[0] / rows, image.shape[1] / columns
    width = 0.85 * max(1.0, tile_w / tile_h)
    height = width * tile_h / tile_w
    bar = 0 if mosaic.scale is None else 0.9
    figure = Figure(figsize=(0.9 + bar + width * columns, 0.6 + height * rows))
    axes = figure.add_subplot()
    axes.imshow(image, interpolation="nearest")
    axes.set_xticks((np.arange(columns) + 0.5) * tile_w - 0.5, mosaic.columns)
    axes.set_yticks((np.arange(rows) + 0.5) * tile_h - 0.5, mosaic.rows)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if title:
        axes.set_title(textwrap.fill(title, int(13 * figure.get_figwidth())))
    if mosaic.scale is not None:
        label, name, least, most = mosaic.scale
        scale = mappable(name, least, most)
        figure.colorbar(scale, ax=axes, label=label, aspect=16, shrink=0.8)
    return figure


def of_priors(
    priors: Priors, *, spread: float | None = None, size: tuple[int, int] | None = None
) -> Mosaic:
    """Returns the learned gains [H, 2h-1, 2w-1] of each layer, a row per layer.

    Args:
      priors: gain by offset, by layer.
      spread: difference from 1, plain attention, that has the full colour; by default the largest.
      size: width and height of a tile; by default the largest table's, or a multiple of it.

    Returns:
      A mosaic of tiles of one size, with white for 1, red above and blue below; the offset 0 is in
      the middle.
    """
    spread = largest_spread(priors) if spread is None else spread
    heads = max(len(table) for table in priors.values())
    if size is None:
        height, width = (max(table.shape[axis] for table in priors.values()) for axis in (1, 2))
        scale = max(1, -(-64 // max(height, width)))
        size = width * scale, height * scale
    tiles: list[list[np.ndarray | None]] = []
    for tables in priors.values():
        pictures = [colours(table, DIVERGING, 1 - spread, 1 + spread) for table in tables]
        resized = [_resize(picture, size) for picture in pictures]
        tiles.append([*resized, *[None] * (heads - len(resized))])
    rows = [f"layer {layer}" for layer in priors]
    scale_of_colours = Scale("gain", DIVERGING, 1 - spread, 1 + spread)
    return Mosaic(tiles, rows, [f"head {head}" for head in range(heads)], scale_of_colours)


def of_priors_side_by_side(priors: Mapping[str, Priors]) -> Mosaic:
    """Returns the same heads' gains under several circumstances, by their labels, side by side."""
    spread = max(map(largest_spread, priors.values()))
    # Tables of different sizes become tiles of one.
    mosaics = [of_priors(each, spread=spread, size=(144, 144)) for each in priors.values()]
    tiles = [
        [tile for of_head in zip(*rows, strict=True) for tile in of_head]
        for rows in zip(*(each.tiles for each in mosaics), strict=True)
    ]
    columns = [f"{head}\n{label}" for head in mosaics[0].columns for label in priors]
    return Mosaic(tiles, mosaics[0].rows, columns, mosaics[0].scale)


def largest_spread(priors: Priors) -> float:
    """Returns the largest difference of a gain from 1, and 1e-3 at least."""
    return max(1e-3, *(float(np.abs(table - 1).max()) for table in priors.values()))


def of_attention(
    image: np.ndarray,
    maps: Mapping[str, np.ndarray],
    *,
    queries: Mapping[str, tuple[int, int]] | None = None,
    heads: Sequence[int] | None = None,
    side: int = 112,
) -> Mosaic:
    """Returns attention laid over an image, a row per layer and a column per head.

    Args:
      image: image uint8 [height, width, 3].
      maps: weights [H, h, w] of each patch, by the label of the layer.
      queries: row and column in the grid of the patch that looks, by the layer's label; it gets a
        frame. None where it is a token without a place.
      heads: heads to draw; all if None.
      side: length in pixels of a tile's shorter side, about.

    Returns:
      A mosaic, in which each map has the whole range of colours: its largest weight is brightest.
    """
    picture = at_side(image, side)
    chosen = range(max(map(len, maps.values()))) if heads is None else heads
    tiles: list[list[np.ndarray | None]] = []
    for label, weights in maps.items():
        query = None if queries is None else queries[label]
        tiles.append(
            [overlay(picture, weights[h], query) if h < len(weights) else None for h in chosen]
        )
    return Mosaic(tiles, list(maps), [f"head {head}" for head in chosen])


def at_side(image: np.ndarray, side: int) -> np.ndarray:
    """Returns an image whose shorter side is `side` pixels; a small one has whole pixels of it."""
    height, width = image.shape[:2]
    if min(height, width) < side:
        scale = -(-side // min(height, width))
        return _resize(image, (width * scale, height * scale))
    size = round(width * side / min(height, width)), round(height * side / min(height, width))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def overlay(
    picture: np.ndarray, weights: np.ndarray, query: tuple[int, int] | None = None
) -> np.ndarray:
    """Returns an image with a map of weights laid over it, uint8 [height, width, 3].

    Args:
      picture: image uint8 [height, width, 3].
      weights: weight [h, w] of each patch, at least 0.
      query: row and column of a patch that gets a frame, or None.
    """
    height, width = picture.shape[:2]
    strength = weights / max(float(weights.max()), 1e-12)
    heat = _resize(colours(strength, _HEAT, 0, 1), (width, height)).astype(np.float32)
    share = _resize((255 * strength).astype(np.uint8), (width, height))[..., None] / 255
    grey = picture.astype(np.float32) @ (0.299, 0.587, 0.114)
    share = 0.35 + 0.5 * share
    laid = (1 - share) * grey[..., None] + share * heat
    laid = np.clip(np.rint(laid), 0, 255).astype(np.uint8)
    if query is not None:
        _frame(laid, query, weights.shape)
    return laid


def with_frames(
    picture: np.ndarray, patches: Sequence[tuple[int, int]], grid: tuple[int, int]
) -> np.ndarray:
    """Returns an image with frames around some patches of a grid."""
    framed = picture.copy()
    for patch in patches:
        _frame(framed, patch, grid)
    return framed


def _frame(picture: np.ndarray, patch: tuple[int, int], grid: tuple[int, ...]) -> None:
    """Draws a frame around a patch, inside of it, into the image."""
    (row, column), (height, width) = patch, picture.shape[:2]
    top, bottom = (round(each * height / grid[0]) for each in (row, row + 1))
    left, right = (round(each * width / grid[1]) for each in (column, column + 1))
    line = max(1, min(bottom - top, right - left) // 8)
    inside = picture[top:bottom, left:right].copy()
    picture[top:bottom, left:right] = _QUERY
    if min(bottom - top, right - left) > 2 * line:
        picture[top + line : bottom - line, left + line : right - line] = inside[
            line : bottom - top - line, line : right - left - line
        ]


def _resize(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns a picture at a size (width, height), each pixel of it a copy of the nearest."""
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.NEAREST))
