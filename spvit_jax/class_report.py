"""Report of an evaluation by class: accuracies and confusions, as JSON and as pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from matplotlib.figure import Figure

from spvit_jax import atomic
from spvit_jax.drawing import classes
from spvit_jax.drawing.style import write_png
from spvit_jax.errors import writing

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
        by_class = [
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
            "classes": by_class,
            "confusions": confusions,
            "confusion": self._confusion.tolist(),
        }

    def write(self, folder: epath.Path) -> None:
        """Writes `report.json`, `classes.png` and `confusion.png`; creates the folder if need be.

        Raises:
          WriteError: they cannot be written.
        """
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            atomic.write_text(folder / "report.json", json.dumps(self.to_dict()) + "\n")
        write_png(self.draw_accuracies(), folder / "classes.png")
        write_png(self.draw_confusions(), folder / "confusion.png")

    def draw_accuracies(self) -> Figure:
        """Draws the accuracy of each class, or of the worst ones where there are many."""
        return classes.draw_accuracies(self.top1(), self._count, self._names)

    def draw_confusions(self) -> Figure:
        """Draws the confusion matrix, or the most frequent confusions where there are many."""
        if len(self._names) <= classes.IN_FULL:
            return classes.draw_matrix(self._confusion, self._names)
        return classes.draw_pairs(
            [
                (self._names[each.label], self._names[each.predicted], each.examples, each.share)
                for each in self.confusions()
            ]
        )


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Returns part / whole, NaN where the whole is 0."""
    return np.where(whole, part / np.maximum(whole, 1), np.nan)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
