"""What a configuration asks for by name, checked before any data is looked for."""

from __future__ import annotations

from ml_collections import ConfigDict

from spvit_jax import config as config_lib
from spvit_jax.data.augment import EvalTransform, TrainTransform
from spvit_jax.data.mix import BatchTransform
from spvit_jax.training import optimizer, sharding


def check_names(config: ConfigDict) -> None:
    """Checks that there is what a configuration names, apart from its data.

    Raises:
      InputError: there is no such model, optimizer, preset of shardings, interpolation or policy
        of augmentation; names the nearest.
    """
    model = config_lib.model_settings(config, num_classes=1)
    optimizer.check_name(config.optim.name)
    sharding.check_preset(config.mesh.sharding)
    BatchTransform.of(config)
    TrainTransform.of(config, model.image_shape)
    EvalTransform.of(config, model.image_shape)
