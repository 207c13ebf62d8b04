"""Draws on a photograph what heads are told about space: the picture of the README.

    bash launch/quickstart.sh
    python -m benchmarks.photograph --checkpoint=runs/quickstart --output=docs/photograph.png

For the framed patch of scikit-learn's china.jpg: which patches a masked head of MaiT and a shifted
window of Swin leave it, and the gains that three heads of the quickstart's SP-ViT have learned.
They have learned them on digits, and no model has seen the photograph: these are G and B of the
equation, by offset, and not attention. The photograph is cut into 8×11 patches, so that no offset
is larger than those of the digits' 6×6.
"""

from __future__ import annotations

import numpy as np
import sklearn.datasets
from absl import app, flags, logging
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spvit_jax import weights
from spvit_jax.analysis.priors import Priors, learned_priors
from spvit_jax.drawing.mosaic import at_side, largest_spread, with_frames
from spvit_jax.drawing.style import DIVERGING, colours, mappable, styled, write_png
from spvit_jax.models import create_model
from spvit_jax.models.spatial import LocalityMask
from spvit_jax.training import sharding

GRID, QUERY = (8, 11), (4, 5)  # rows and columns of patches, and the patch that looks
HEADS = ((0, 0), (1, 1), (2, 0))  # layers and heads of SP-ViT that are drawn
SIDE = 320  # pixels of a picture's height


def photograph() -> np.ndarray:
    """Returns the photograph uint8 [h, w, 3], cut to the proportions of the grid."""
    image = sklearn.datasets.load_sample_image("china.jpg")
    width = round(image.shape[0] * GRID[1] / GRID[0])
    return at_side(image[:, :width], SIDE)


def masked_head() -> np.ndarray:
    """Returns whether a patch [h, w] is in the neighbourhood of the query, for MaiT."""
    near = LocalityMask((0,)).neighbourhood(GRID)
    return np.asarray(near)[QUERY[0] * GRID[1] + QUERY[1]].reshape(GRID)


def shifted_window() -> np.ndarray:
    """Returns whether a patch [h, w] is left to the query by a shifted window of 4×4, for Swin."""
    height, width = (4 * side for side in GRID)
    swin = create_model("swin_t", image_size=(height, width), depths=(2,), dim=6, window=4)
    attention = swin.blocks[1].attn
    patches = attention.map_patches(GRID)
    ((window, place),) = np.argwhere(patches == QUERY[0] * GRID[1] + QUERY[1])
    allowed = np.isfinite(np.asarray(attention.bias(GRID))[window, 0, place])
    return np.isin(np.arange(GRID[0] * GRID[1]), patches[window][allowed]).reshape(GRID)


def gain(priors: Priors, layer: int, head: int) -> np.ndarray:
    """Returns the learned gain [h, w] of each patch for the query."""
    table = priors[layer][head]
    top, left = (size // 2 - at for size, at in zip(table.shape, QUERY, strict=True))
    return table[top : top + GRID[0], left : left + GRID[1]]


@styled
def draw(priors: Priors) -> Figure:
    """Draws the photograph as it is, with the fixed factors, and with learned gains."""
    figure = Figure(figsize=(9.2, 4.6), layout="compressed")
    panels = figure.subplots(2, 3)
    picture = photograph()
    everything = np.ones(GRID, bool)
    fixed = {
        "ViT, DeiT, CaiT: all patches alike": everything,
        "MaiT: a masked head's 3×3 patches": masked_head(),
        "Swin: a shifted window of 4×4": shifted_window(),
    }
    for axes, (title, seen) in zip(panels[0], fixed.items(), strict=True):
        dark = 0.25 * picture @ np.full((3, 3), 1 / 3)
        _show(axes, np.where(_by_patch(seen)[..., None], picture, dark), title)
    spread = largest_spread({layer: priors[layer][[head]] for layer, head in HEADS})
    for axes, (layer, head) in zip(panels[1], HEADS, strict=True):
        tint = colours(_by_patch(gain(priors, layer, head)), DIVERGING, 1 - spread, 1 + spread)
        grey = picture @ np.full((3, 3), 1 / 3)
        _show(axes, 0.4 * grey + 0.6 * tint, f"SP-ViT: learned, layer {layer}, head {head}")
    scale = mappable(DIVERGING, 1 - spread, 1 + spread)
    figure.colorbar(scale, ax=panels[1], label="gain G", aspect=12, shrink=0.85)
    return figure


def _by_patch(values: np.ndarray) -> np.ndarray:
    """Returns for each pixel of the photograph the value [h, w] of its patch."""
    height, width = photograph().shape[:2]
    rows, columns = (np.arange(height) * GRID[0] // height, np.arange(width) * GRID[1] // width)
    return values[rows][:, columns]


def _show(axes: Axes, image: np.ndarray, title: str) -> None:
    axes.imshow(with_frames(np.clip(image, 0, 255).astype(np.uint8), [QUERY], GRID))
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def main(argv: list[str]) -> None:
    """Runs `python -m benchmarks.photograph`."""
    del argv
    logging.set_verbosity(logging.FATAL)  # of orbax
    found = weights.find(epath.Path(flags.FLAGS.checkpoint).resolve(), None)
    variables = found.load(found.config, sharding.make_mesh(-1, 1))
    write_png(draw(learned_priors(variables.model())), epath.Path(flags.FLAGS.output), dpi=96)


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", "runs/quickstart", "Workdir of the quickstart.")
    flags.DEFINE_string("output", "docs/photograph.png", "PNG file to draw.")
    app.run(main)
