"""Report of an evaluation by class: accuracies and confusions, as JSON and as pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spvit_jax import atomic

_IN_FULL = 40  # largest number of classes that are drawn one by one
_DRAWN = 30  # classes, or pairs of them, that are drawn where there are more
_CONFUSIONS = 100  # most frequent ones in the JSON


class Confusion(NamedTuple):
    """Examples of a class that were taken for another.

    Attributes:
      label: number of the examples' class.
      predicted: number of the class that they were taken for.
      examples: number of examples.
      share: their share of all examples of the class.
    """

    label: int
    predicted: int
    examples: int
    share: float


class ClassReport:
    """Accuracies and confusions by class, of counts over a whole split."""

    def __init__(self, confusion: np.ndarray, top5: np.ndarray, names: Sequence[str]):
        """Takes the counts.

        Args:
          confusion: int [C, C], number of examples of each label (rows) with each most probable
            class (columns).
          top5: int [C], number of examples of each label that is among the five most probable.
          names: names of the classes by number.
        """
        self._confusion, self._names = confusion, names
        self._top5_count = top5
        self._count, self._predicted = confusion.sum(axis=1), confusion.sum(axis=0)
        self._right = np.diagonal(confusion)

    def top1(self) -> np.ndarray:
        """Returns each class's accuracy (recall) float64 [C]; NaN for a class without examples."""
        return _share(self._right, self._count)

    def confusions(self) -> list[Confusion]:
        """Returns all confusions, the most frequent first."""
        errors = self._confusion.copy()
        np.fill_diagonal(errors, 0)
        labels, predicted = np.nonzero(errors)
        counts = errors[labels, predicted]
        order = np.argsort(-counts, kind="stable")
        return [
            Confusion(
                int(labels[i]),
                int(predicted[i]),
                int(counts[i]),
                float(counts[i] / self._count[labels[i]]),
            )
            for i in order
        ]

    def to_dict(self) -> dict[str, Any]:
        """Returns the report for JSON; None stands where a class has no examples."""
        top1, top5 = self.top1(), _share(self._top5_count, self._count)
        precision = _share(self._right, self._predicted)
        classes = [
            {
                "name": name,
                "count": int(self._count[number]),
                "top1": _number(top1[number]),
                "top5": _number(top5[number]),
                "predicted": int(self._predicted[number]),
                "precision": _number(precision[number]),
            }
            for number, name in enumerate(self._names)
        ]
        confusions = [
            {
                "label": self._names[each.label],
                "predicted": self._names[each.predicted],
                "count": each.examples,
                "share": each.share,
            }
            for each in self.confusions()[:_CONFUSIONS]
        ]
        return {
            "count": int(self._count.sum()),
            "top1": float(self._right.sum() / self._count.sum()),
            "mean_class_top1": float(np.nanmean(top1)),
            "classes": classes,
            "confusions": confusions,
            "confusion": self._confusion.tolist(),
        }

    def write(self, folder: epath.Path) -> None:
        """Writes `report.json`, `classes.png` and `confusion.png`; creates the folder if need be.

        Raises:
          OSError: they cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_text(folder / "report.json", json.dumps(self.to_dict()) + "\n")
        for name, figure in (
            ("classes", self.draw_classes()),
            ("confusion", self.draw_confusion()),
        ):
            with atomic.replacing(folder / f"{name}.png") as temporary:
                figure.savefig(temporary, dpi=120)

    def draw_classes(self) -> Figure:
        """Draws the accuracy of each class, or of the worst ones beside a histogram of all."""
        top1 = self.top1()
        known = np.flatnonzero(self._count)
        worst_first = known[np.argsort(top1[known], kind="stable")]
        if len(self._names) <= _IN_FULL:
            figure, axis = _figure(len(known))
            shown, title = worst_first, "accuracy of each class"
        else:
            shown = worst_first[:_DRAWN]
            title = f"the {len(shown)} classes of lowest accuracy"
            figure = Figure(figsize=(13, _height(len(shown))), layout="constrained")
            histogram, axis = figure.subplots(1, 2)
            histogram.hist(top1[known], bins=20, range=(0, 1), color="tab:blue")
            histogram.set(xlabel="top-1 accuracy", ylabel="classes", title="all classes")
        texts = [f"{top1[i]:.1%} of {self._count[i]}" for i in shown]
        _bars(axis, [self._names[i] for i in shown], top1[shown], texts)
        axis.set(xlim=(0, 1.25), xlabel="top-1 accuracy", title=title)
        return figure

    def draw_confusion(self) -> Figure:
        """Draws the confusion matrix, or the most frequent confusions where there are many."""
        if len(self._names) <= _IN_FULL:
            return self._draw_matrix()
        most = self.confusions()[:_DRAWN]
        figure, axis = _figure(len(most))
        names = [f"{self._names[each.label]} → {self._names[each.predicted]}" for each in most]
        counts = np.array([each.examples for each in most])
        texts = [f"{each.examples}, {each.share:.0%} of the class" for each in most]
        _bars(axis, names, counts, texts)
        axis.set(
            xlim=(0, 1.4 * max(counts, default=1)),
            xlabel="examples",
            title="most frequent confusions: class → taken for",
        )
        return figure

    def _draw_matrix(self) -> Figure:
        """Draws all of the confusion matrix, its colours by the share of each class."""
        classes = len(self._names)
        side = 2.5 + 0.42 * classes
        figure = Figure(figsize=(side + 1, side), layout="constrained")
        axis = figure.subplots()
        shares = np.nan_to_num(_share(self._confusion, self._count[:, None]))
        image = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
        for (row, column), count in np.ndenumerate(self._confusion):
            if count:
                color = "white" if shares[row, column] > 0.5 else "black"
                axis.text(column, row, count, ha="center", va="center", color=color, fontsize=8)
        names = [_shortened(name, 24) for name in self._names]
        axis.set_xticks(range(classes), names, rotation=90)
        axis.set_yticks(range(classes), names)
        axis.set(xlabel="taken for", ylabel="class", title="confusion of classes")
        figure.colorbar(image, ax=axis, shrink=0.8, label="share of the class")
        return figure


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Returns part / whole, NaN where the whole is 0."""
    return np.where(whole, part / np.maximum(whole, 1), np.nan)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _height(rows: int) -> float:
    return 1.2 + 0.26 * max(rows, 1)


def _figure(rows: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, _height(rows)), layout="constrained")
    return figure, figure.subplots()


def _bars(axis: Axes, names: Sequence[str], values: np.ndarray, texts: Sequence[str]) -> None:
    """Draws a row for each name, from the top down, with a text behind each bar."""
    bars = axis.barh(range(len(names)), values, color="tab:blue")
    axis.set_yticks(range(len(names)), [_shortened(name) for name in names], fontsize=8)
    axis.bar_label(bars, texts, padding=3, fontsize=8)
    axis.invert_yaxis()


def _shortened(name: str, most: int = 60) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
