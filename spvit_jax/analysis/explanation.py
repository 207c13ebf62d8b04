"""All numbers about a model's heads together, and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from spvit_jax.analysis.image_maps import ImageMaps, Query
from spvit_jax.analysis.measures import Measures
from spvit_jax.analysis.priors import Priors, gain_by_distance, prior_cosines
from spvit_jax.classes import ClassNames
from spvit_jax.models import ModelConfig
from spvit_jax.models.mask_schedule import MaskSchedule


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What is known of the heads of a model with trained weights.

    Attributes:
      name: name of the model in the registry.
      origin: path of the weights.
      split: data set and split of the images.
      config: configuration of the model, at the image size that was looked at.
      measures: measures of attention over images.
      priors: learned gains by layer; empty without SP-SA.
      trained_priors: the same at the image size of training; None where it is the same size.
      trained_size: height and width of images in training.
      suggestion: masked heads by MaiT's rule; None where no mask would change anything.
      queries: patches whose attention is drawn, in the first layer's grid.
      images: attention on single images.
      class_names: names of the classes by number; None where they are not known.
    """

    name: str
    origin: str
    split: str
    config: ModelConfig
    measures: Measures
    priors: Priors
    trained_priors: Priors | None
    trained_size: tuple[int, int]
    suggestion: MaskSchedule | None
    queries: tuple[Query, ...]
    images: list[ImageMaps]
    class_names: ClassNames | None

    def class_name(self, number: int) -> str:
        """Returns the name of a class, or its number where names are not known."""
        return str(number) if self.class_names is None else self.class_names[number]

    def numbers(self) -> dict[str, Any]:
        """Returns all but the maps on single images, for JSON; NaN is None."""
        measures, config = self.measures, self.config
        numbers: dict[str, Any] = {
            "model": self.name,
            "checkpoint": self.origin,
            "split": self.split,
            "image_size": config.image_shape,
            "num_images": measures.num_images,
            "grids": config.grid_per_layer(),
            "masked_heads": config.masked_per_layer(),
            "suggested_masked_heads": self.suggestion,
            "locality_scores": measures.locality,
            "mean_distance_in_pixels": measures.distance,
            "entropy_in_nats": measures.entropy,
            "layer_similarity": measures.similarity,
            "class_token_similarity": measures.prefix_similarity,
            "priors": self.priors,
        }
        if self.priors:
            cosines = prior_cosines(self.priors)
            numbers["prior_cosines"] = cosines._asdict()
            numbers["gain_by_distance"] = {
                layer: {"distance_in_patches": distances, "gain": gain}
                for layer, (distances, gain) in gain_by_distance(self.priors).items()
            }
        if self.trained_priors is not None:
            numbers["trained_image_size"] = self.trained_size
            numbers["priors_at_trained_image_size"] = self.trained_priors
        return _plain(numbers)

    def maps(self) -> dict[str, Any]:
        """Returns the attention on single images, for JSON; weights have four digits."""
        return _plain(
            {
                "queries": self.queries,
                "images": [
                    {
                        "index": each.index,
                        "label": None if each.label is None else self.class_name(each.label),
                        "predicted": self.class_name(int(each.probabilities.argmax())),
                        "probability": each.probabilities.max(),
                        "layers": [_rounded(maps) for maps in each.patches],
                        "class_token": {
                            layer: _rounded(maps) for layer, maps in each.class_token.items()
                        },
                    }
                    for each in self.images
                ],
            }
        )


def _rounded(weights: np.ndarray) -> np.ndarray:
    """Returns weights, which are at most 1, with four significant digits of the largest."""
    digits = 3 - int(np.floor(np.log10(max(float(weights.max()), 1e-12))))
    return np.round(weights.astype(np.float64), digits)


def _plain(value: Any) -> Any:
    """Returns a value as JSON can have it: lists, numbers, texts; None for NaN."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value
