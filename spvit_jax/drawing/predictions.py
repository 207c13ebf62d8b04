"""Pictures of predictions: the image, where the model looks, and its likeliest classes."""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from matplotlib.figure import Figure

from spvit_jax.drawing.mosaic import at_side, overlay
from spvit_jax.drawing.style import INK, styled, write_png
from spvit_jax.errors import InputError

_MOST_IN_A_FILE = 32
_SIDE = 224  # pixels of a picture's shorter side


class PredictionOnImage(NamedTuple):
    """What is drawn of a prediction.

    Attributes:
      path: path of the image.
      classes: names of its likeliest classes, the first the likeliest.
      probabilities: probability of each.
      pixels: image uint8 [height, width, 3] as the model sees it.
      weights: attention [H, h, w] of each head to each patch.
      meaning: words for what the weights are.
    """

    path: str
    classes: Sequence[str]
    probabilities: Sequence[float]
    pixels: np.ndarray
    weights: np.ndarray
    meaning: str


class PredictionPictures:
    """Pictures of predictions in one PNG file, or in a folder with a file for each image."""

    def __init__(self, target: epath.Path, images: Sequence[epath.Path]):
        """Checks where pictures are to go; writes nothing.

        Args:
          target: path of a PNG file, or of a folder.
          images: paths of the images, in the order of the predictions.

        Raises:
          InputError: the target is another kind of file, or one file would hold too many images.
        """
        self._target, self._drawn = target, list[PredictionOnImage]()
        self._is_file = target.suffix.lower() == ".png"
        if not self._is_file and target.suffix and not target.is_dir():
            raise InputError(
                f"--picture={target} is no PNG file; expected a name that ends in .png, or a folder"
            )
        if self._is_file and len(images) > _MOST_IN_A_FILE:
            raise InputError(
                f"--picture={target} would hold {len(images)} images; one file takes "
                f"{_MOST_IN_A_FILE}: name a folder, and each image gets a file"
            )
        stems = [pathlib.PurePath(image).stem for image in images]
        count = collections.Counter(stems)
        self._names = [
            f"{stem}.png" if count[stem] == 1 else f"{stem}_{number}.png"
            for number, stem in enumerate(stems)
        ]
        self._number = 0

    def add(self, prediction: PredictionOnImage) -> None:
        """Draws the next image's prediction; in a folder it is written at once."""
        if self._is_file:
            self._drawn.append(prediction)
        else:
            write_png(figure_of([prediction]), self._target / self._names[self._number])
        self._number += 1

    def finish(self) -> None:
        """Writes the file, where all images are in one."""
        if self._drawn:
            write_png(figure_of(self._drawn), self._target)


@styled
def figure_of(predictions: Sequence[PredictionOnImage]) -> Figure:
    """Draws predictions, a row for each: image, mean attention of the heads, and classes."""
    rows = len(predictions)
    figure = Figure(figsize=(7.6, 2.4 * rows + 0.2))
    panels = figure.subplots(rows, 3, squeeze=False, width_ratios=(1, 1, 1.1))
    for (image, attention, classes), each in zip(panels, predictions, strict=True):
        picture = at_side(each.pixels, _SIDE)
        image.imshow(picture)
        image.set_title(pathlib.PurePath(each.path).name)
        attention.imshow(overlay(picture, each.weights.mean(0)))
        attention.set_title(f"{each.meaning},\nmean of {len(each.weights)} heads", fontsize=7.5)
        for axes in (image, attention):
            axes.set_axis_off()
        places = np.arange(len(each.classes))
        classes.barh(places, np.ones_like(places), height=0.35, color="#ebedf0")
        classes.barh(places, each.probabilities, height=0.35, color="#3d7edb")
        for place, name, probability in zip(places, each.classes, each.probabilities, strict=True):
            text = f"{name}  {100 * probability:.1f}%"
            classes.text(0, place - 0.24, text, va="bottom", fontsize=8, color=INK)
        classes.set(xlim=(0, 1), ylim=(len(places) - 0.4, -0.8))
        classes.set_axis_off()
    return figure
