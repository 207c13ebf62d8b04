"""Heat maps and curves of numbers for each head, layer or distance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from spvit_jax.analysis.priors import PriorCosines
from spvit_jax.drawing.style import DIVERGING, INK, SEQUENTIAL, styled

_MOST_NUMBERS = 160  # cells with a number in each; more would not be readable


@styled
def head_scores(
    scores: Sequence[np.ndarray],
    label: str,
    *,
    scale: tuple[float, float] | None = None,
    masked: Sequence[Sequence[int]] = (),
) -> Figure:
    """Draws a number of each head as a heat map, a column for each layer.

    Args:
      scores: numbers [H] of each layer; layers may have different numbers of heads.
      label: what the numbers are, with their unit.
      scale: ends of the scale of colours; the smallest and the largest number if None.
      masked: masked heads of each layer, which get a frame.

    Returns:
      The figure.
    """
    table = np.full((max(map(len, scores)), len(scores)), np.nan)
    for layer, values in enumerate(scores):
        table[: len(values), layer] = values
    rows, columns = table.shape
    figure = Figure(figsize=(1.9 + 0.42 * columns, 0.9 + 0.36 * rows))
    axes = figure.add_subplot()
    least, most = (np.nanmin(table), np.nanmax(table)) if scale is None else scale
    _heat_map(axes, table, label, least, most)
    axes.set(xlabel="layer", ylabel="head")
    for layer, heads in enumerate(masked):
        for head in heads:
            corner = layer - 0.42, head - 0.42
            frame = Rectangle(corner, 0.84, 0.84, fill=False, edgecolor="#ffffff", linewidth=1.2)
            frame.set_path_effects([withStroke(linewidth=3, foreground="#000000")])
            axes.add_patch(frame)
    return figure


@styled
def layer_similarity(similarity: np.ndarray, prefix_similarity: np.ndarray) -> Figure:
    """Draws the similarity [L, L] of layers' attention, and that of prefix tokens if there is any.

    What cannot be compared, NaN, is left empty.
    """
    panels = {"all tokens": similarity, "the class token": prefix_similarity}
    if np.isfinite(prefix_similarity).sum() < 2:  # one layer, at most, has a class token
        del panels["the class token"]
    side = 1.6 + 0.26 * len(similarity)
    figure = Figure(figsize=(side * len(panels) + 0.9, side), layout="compressed")
    for index, (name, table) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), index + 1)
        _heat_map(axes, table, "cosine" if index == len(panels) - 1 else None, 0, 1)
        axes.set(xlabel="layer", ylabel="layer", title=name, aspect="equal")
    return figure


@styled
def prior_cosines(cosines: PriorCosines) -> Figure:
    """Draws the cosines between all heads' priors; lines part the layers."""
    number = len(cosines.heads)
    side = 1.6 + min(0.34 * number, 7)
    figure = Figure(figsize=(side + 0.9, side), layout="compressed")
    axes = figure.add_subplot()
    _heat_map(axes, cosines.cosines, "cosine", -1, 1, DIVERGING)
    layers = [layer for layer, _ in cosines.heads]
    starts = [i for i in range(number) if i == 0 or layers[i] != layers[i - 1]]
    ends = [*starts[1:], number]
    for start in starts[1:]:
        axes.axhline(start - 0.5, color=INK, linewidth=0.8)
        axes.axvline(start - 0.5, color=INK, linewidth=0.8)
    middles = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)]
    names = [str(layers[start]) for start in starts]
    axes.set_xticks(middles, names)
    axes.set_yticks(middles, names)
    axes.set(xlabel="layer, its heads side by side", ylabel="layer", aspect="equal")
    return figure


@styled
def gain_by_distance(profiles: Mapping[int, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Draws the mean gain [H, K] at each distance [K] in patches, a panel for each layer."""
    columns = min(len(profiles), 4)
    rows = -(-len(profiles) // columns)
    figure = Figure(figsize=(0.6 + 2.3 * columns, 0.4 + 1.9 * rows))
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in panels.flat[len(profiles) :]:
        axes.set_axis_off()
    for axes, (layer, (distances, gains)) in zip(panels.flat, profiles.items(), strict=False):
        axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
        for head, gain in enumerate(gains):
            axes.plot(distances, gain, label=f"head {head}")
        axes.set_title(f"layer {layer}")
        axes.set_xlabel("distance in patches")
    for axes in panels[:, 0]:
        axes.set_ylabel("mean gain")
    heads = max(len(gains) for _, gains in profiles.values())
    if heads <= 10:
        widest = next(i for i, (_, g) in enumerate(profiles.values()) if len(g) == heads)
        panels.flat[widest].legend(handlelength=1)
    return figure


def _heat_map(
    axes: Axes,
    table: np.ndarray,
    label: str | None,
    least: float,
    most: float,
    name: str = SEQUENTIAL,
) -> None:
    """Draws a table as coloured cells, with numbers where there is room; NaN is left empty."""
    rows, columns = table.shape
    cells = axes.pcolormesh(
        np.arange(columns + 1) - 0.5,
        np.arange(rows + 1) - 0.5,
        np.ma.masked_invalid(table),
        cmap=name,
        vmin=least,
        vmax=most,
    )
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    for axis, number in ((axes.xaxis, columns), (axes.yaxis, rows)):
        axis.set_ticks(range(0, number, max(1, number // 24)))
        axis.set_tick_params(length=0)
    if label is not None:
        bar = axes.figure.colorbar(cells, ax=axes, label=label, aspect=max(10, 1.8 * rows))
        bar.outline.set_visible(False)
    if table.size <= _MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(table):
            if not np.isnan(value):
                colour = "#ffffff" if _is_dark(cells.to_rgba(value)) else "#000000"
                digits = 2 if most < 10 else 0
                text = f"{round(float(value), digits) + 0.0:.{digits}f}"  # no minus before 0.00
                axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)


def _is_dark(colour: np.ndarray) -> bool:
    """Returns whether white is easier to read on a colour than black, by its luminance."""
    red, green, blue = (float(part) for part in colour[:3])
    return 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 < 0.18
