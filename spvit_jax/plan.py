"""From a configuration to what a run is, with every check once; all commands go through here."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from spvit_jax import config as config_lib
from spvit_jax.augment import mix
from spvit_jax.augment.mix import BatchTransform
from spvit_jax.data.crops import EvalTransform, TrainTransform
from spvit_jax.models import ModelConfig
from spvit_jax.training import optimizer, sharding
from spvit_jax.training import run as run_lib
from spvit_jax.training.run import DataSize, TrainingRun
from spvit_jax.training.step import StepSettings


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


def training_run(
    config: ConfigDict,
    data: DataSize,
    changes: Mapping[str, Any] | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
    teacher: ModelConfig | None = None,
) -> TrainingRun:
    """Works out what is computed in a training run.

    Args:
      config: not resolved.
      data: how much there is.
      changes: of fields of the configuration, such as {"model.remat": True}.
      devices: those of this machine if not given; may be descriptions of others.
      teacher: the model that a distilled one learns from.

    Raises:
      InputError: the configuration cannot be used with this data or on these devices.
    """
    config = ConfigDict(copy.deepcopy(config.to_dict()))
    for name, value in (changes or {}).items():
        section, _, field = name.rpartition(".")
        with config.ignore_type():
            config[section][field] = value
    config = config_lib.resolve(config, num_examples=data.num_train)
    model = config_lib.model_settings(config, num_classes=data.num_classes)
    settings = StepSettings.of(
        config, num_classes=data.num_classes, grid=model.grid if data.label_map else None
    )
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    sharding.check_batch_size(config.data.batch_size, mesh, settings.accumulate)
    mix.check_group_size(config)
    return run_lib.build(config, model, settings, mesh, data, teacher)
