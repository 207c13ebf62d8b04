"""Trained weights for images outside a data set: `predict` classifies them, `export` writes them.

What a data set would say, how images are cropped and normalised, is said by the configuration of
the run that the weights belong to; where that is not known, by the model's recipe for ImageNet.
"""

from __future__ import annotations

import dataclasses
from typing import Self

import jax
from etils import epath
from ml_collections import ConfigDict

from spvit_jax import config as config_lib
from spvit_jax import weights as weights_lib
from spvit_jax.augment import mix
from spvit_jax.data.crops import EvalTransform
from spvit_jax.models import ModelConfig, registered_name
from spvit_jax.training import sharding
from spvit_jax.training.state import Variables
from spvit_jax.weights import Weights


@dataclasses.dataclass(frozen=True)
class Inference:
    """Trained weights with all that says what they make of an image.

    Attributes:
      config: configuration that says how images are cropped and normalised.
      model: configuration of the weights' model, at the image size to use it at.
      weights: the weights, not read yet.
    """

    config: ConfigDict
    model: ModelConfig
    weights: Weights

    @classmethod
    def of(
        cls,
        path: epath.Path,
        config: ConfigDict | None,
        *,
        which: str = "best",
        weights: str = "auto",
    ) -> Self:
        """Finds weights, and what is known of their images.

        Args:
          path: file or folder of the weights, as in `weights.find`.
          config: fields of `spvit_jax.config.base`; None where the weights say what model they are
            of.
          which: checkpoint of a workdir, as in `weights.find`.
          weights: "model", "ema" or "auto", as in `weights.find`.

        Raises:
          InputError: as `weights.find`, and as `Weights.check`.
        """
        like = None if config is None else config_lib.model_settings(config, num_classes=1000)
        found = weights_lib.find(path, like, which=which, weights=weights)
        if config is None or like is None:
            return cls(_imagenet(found.config), found.config, found)
        like = dataclasses.replace(like, num_classes=found.config.num_classes)
        model = found.adopt_layer_kinds(like)
        found.check(model)
        return cls(config, model, found)

    @property
    def transform(self) -> EvalTransform:
        """Resize and crop of an image in a file, as in evaluation."""
        return EvalTransform.of(self.config, self.model.image_shape)

    def load(self) -> Variables:
        """Reads the weights onto all devices; raises as `Weights.load`."""
        return self.weights.load(self.model, sharding.make_mesh(-1, 1))

    def normalize(self, images: jax.Array) -> jax.Array:
        """Returns cropped images uint8 [B, height, width, 3] as the model takes them, float32."""
        return mix.normalize(images, self.config.data.mean, self.config.data.std)

    def logits(self, variables: Variables, images: jax.Array) -> jax.Array:
        """Returns the evaluation logits [B, C] of cropped images uint8 [B, height, width, 3]."""
        return variables.model().outputs(self.normalize(images)).evaluation_logits()

    def class_name(self, number: int) -> str:
        """Returns the name of a class, or its number where names are not known."""
        names = self.weights.class_names
        return str(number) if names is None else names[number]


def _imagenet(model: ModelConfig) -> ConfigDict:
    """Returns the defaults for ImageNet with the evaluation protocol of a model."""
    config = config_lib.base()
    name = registered_name(model)
    if name is not None:
        config.model.name = name  # otherwise the protocol is that of the default, DeiT
    return config
