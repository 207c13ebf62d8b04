"""Accuracies and confusions by class, drawn so that ten classes and a thousand can be read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spvit_jax.drawing.style import styled

IN_FULL = 40  # largest number of classes that are drawn one by one
_SHOWN = 30  # classes, or pairs of them, that are shown where there are more


@styled
def draw_accuracies(top1: np.ndarray, count: np.ndarray, names: Sequence[str]) -> Figure:
    """Draws the accuracy of each class, or of the worst ones beside a histogram of all.

    Args:
      top1: accuracy [C] of each class.
      count: number of examples [C] of each class; one without examples is left out.
      names: names of the classes.
    """
    known = np.flatnonzero(count)
    shown = known[np.argsort(top1[known], kind="stable")]
    if len(names) <= IN_FULL:
        figure, axis = _figure(len(shown))
        axis.set_title("accuracy of each class")
    else:
        shown = shown[:_SHOWN]
        figure = Figure(figsize=(13, _height(len(shown))))
        histogram, axis = figure.subplots(1, 2)
        histogram.hist(top1[known], bins=20, range=(0, 1))
        histogram.set(xlabel="top-1 accuracy", ylabel="classes", title="all classes")
        axis.set_title(f"the {len(shown)} classes of lowest accuracy")
    texts = [f"{top1[i]:.1%} of {count[i]}" for i in shown]
    _bars(axis, [names[i] for i in shown], top1[shown], texts)
    axis.set(xlim=(0, 1.25), xlabel="top-1 accuracy", xticks=np.linspace(0, 1, 6))
    return figure


@styled
def draw_pairs(pairs: Sequence[tuple[str, str, int, float]]) -> Figure:
    """Draws the most frequent confusions.

    Args:
      pairs: (class, class that it was taken for, number of examples, share of the class), the
        most frequent first.
    """
    pairs = pairs[:_SHOWN]
    figure, axis = _figure(len(pairs))
    counts = np.array([count for _, _, count, _ in pairs])
    names = [f"{label} → {predicted}" for label, predicted, _, _ in pairs]
    _bars(axis, names, counts, [f"{count}, {share:.0%} of the class" for *_, count, share in pairs])
    most = max(counts, default=1)
    axis.set(xlim=(0, 1.4 * most), xlabel="examples", title="most frequent: class → taken for")
    return figure


@styled
def draw_matrix(confusion: np.ndarray, names: Sequence[str]) -> Figure:
    """Draws a confusion matrix [C, C] with classes in rows, its colours by the share of a row."""
    side = 2.5 + 0.42 * len(names)
    figure = Figure(figsize=(side + 1, side))
    axis = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    image = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    for (row, column), count in np.ndenumerate(confusion):
        if count:
            color = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, count, ha="center", va="center", color=color, fontsize=8)
    shown = [_shortened(name, 24) for name in names]
    axis.set_xticks(range(len(names)), shown, rotation=90)
    axis.set_yticks(range(len(names)), shown)
    axis.set(xlabel="taken for", ylabel="class", title="confusion of classes")
    figure.colorbar(image, ax=axis, shrink=0.8, label="share of the class")
    return figure


def _height(rows: int) -> float:
    return 1.2 + 0.26 * max(rows, 1)


def _figure(rows: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, _height(rows)))
    return figure, figure.subplots()


def _bars(axis: Axes, names: Sequence[str], values: np.ndarray, texts: Sequence[str]) -> None:
    """Draws a bar for each name, from the top down, with a text behind it."""
    bars = axis.barh(range(len(names)), values)
    axis.set_yticks(range(len(names)), [_shortened(name) for name in names])
    axis.bar_label(bars, texts, padding=3, fontsize=8)
    axis.invert_yaxis()


def _shortened(name: str, most: int = 60) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
