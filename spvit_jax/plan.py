"""From a configuration to what a run is, with every check once; all commands go through here.

`training` and `evaluation` plan a run on data and weights that are here. `training_run` plans what
is computed in training alone, also with data and on devices that are not here: `preflight` does.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from spvit_jax import classes, distributed
from spvit_jax import config as config_lib
from spvit_jax import weights as weights_lib
from spvit_jax.augment import mix
from spvit_jax.augment.mix import BatchTransform
from spvit_jax.classes import ClassNames
from spvit_jax.data import datasets, pipeline
from spvit_jax.data.crops import EvalTransform, TrainTransform
from spvit_jax.data.pipeline import BatchIterator, BatchShard
from spvit_jax.data.sources import Source
from spvit_jax.data.token_labels.store import open_label_maps
from spvit_jax.errors import InputError
from spvit_jax.logs import log
from spvit_jax.models import ModelConfig
from spvit_jax.models.resize import check_classes
from spvit_jax.training import checkpoint, optimizer, sharding
from spvit_jax.training import run as run_lib
from spvit_jax.training import state as state_lib
from spvit_jax.training.run import DataSize, TrainingRun
from spvit_jax.training.state import Metrics, TrainState, Variables
from spvit_jax.training.step import StepSettings, eval_step
from spvit_jax.weights import Weights


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """A training run with its data and the weights that it starts from.

    Attributes:
      run: what is computed.
      class_names: of the data's classes by number.
      in_use: whether the workdir holds checkpoints, with which the run goes on.
      init_from: the weights that a new run starts from; None for random ones.
      teacher: the weights that a distilled model learns from, or None.
      train_batches: makes the endless batches of training from a `start_step` on.
      eval_batches: makes the batches of one evaluation.
    """

    run: TrainingRun
    class_names: ClassNames
    in_use: bool
    init_from: Weights | None
    teacher: Variables | None
    train_batches: Callable[..., BatchIterator]
    eval_batches: Callable[[], BatchIterator]

    def create_state(self) -> tuple[TrainState, str]:
        """Returns the state before the first step, and where its weights are from."""
        state = self.run.create()
        if self.init_from is None:
            return state, "scratch"
        variables = self.init_from.load(
            self.run.model,
            self.run.mesh,
            preset=self.run.config.mesh.sharding,
            class_names=self.class_names,
        )
        return state_lib.with_variables(state, variables), self.init_from.where

    def claim(self, workdir: pathlib.Path) -> None:
        """Creates the workdir, and writes there what a run must keep to.

        Raises:
          InputError: it belongs to another run, cannot be written, or is not shared by all
            processes.
        """
        write = distributed.is_primary()
        config_lib.claim_workdir(workdir, self.run.config, in_use=self.in_use, write=write)
        classes.claim_workdir(workdir, self.class_names, in_use=self.in_use, write=write)
        distributed.check_shared(workdir)


@dataclasses.dataclass(frozen=True)
class EvaluationPlan:
    """Trained weights, and the data that they are run on.

    Attributes:
      config: as it was given.
      model: that of the weights, at the configuration's resolution.
      weights: where they are, and what they were trained as.
      source: the examples, whose classes have the weights' numbers.
      mesh: the devices.
      eval_step: `step.eval_step` of (variables, batch), jitted.
    """

    config: ConfigDict
    model: ModelConfig
    weights: Weights
    source: Source
    mesh: Mesh
    eval_step: Callable[[Variables, Any], Metrics]

    def load(self) -> Variables:
        """Reads the weights onto the mesh; raises as `Weights.load`."""
        return self.weights.load(self.model, self.mesh, preset=self.config.mesh.sharding)

    def batches(self, batch_size: int | None = None) -> BatchIterator:
        """Returns the batches of one evaluation, of the configuration's size unless said."""
        size = self.config.data.eval_batch_size if batch_size is None else batch_size
        return _eval_batches(self.config, self.model, self.source, self.mesh, size)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """What a distilled model learns from.

    Attributes:
      weights: where they are.
      model: that of the weights, at the student's resolution.
    """

    weights: Weights
    model: ModelConfig


def training(config: ConfigDict, workdir: pathlib.Path) -> TrainingPlan:
    """Plans a training run on the data and devices that are here; writes nothing.

    Args:
      config: not resolved.
      workdir: of the run, which may have been begun.

    Raises:
      InputError: the configuration, the data or the weights cannot be used.
    """
    check_names(config)
    splits = datasets.open_splits(config.data, seed=config.seed)
    label_maps = open_label_maps(config, splits.whole)
    size = DataSize(
        len(splits.train),
        len(splits.evaluation),
        splits.train.num_classes,
        None if label_maps is None else label_maps.shape,
        splits.train.class_names,
    )
    teacher = find_teacher(config, size)
    run = training_run(config, size, teacher=None if teacher is None else teacher.model)
    config, newest = run.config, checkpoint.newest(workdir)
    distributed.agree(
        config_lib.flatten({"config": config.to_dict()})
        | {"examples": (size.num_train, size.num_eval), "start": newest}
        | {"classes": classes.fingerprint(splits.train.class_names)}
    )
    distributed.connect(run.mesh)
    init_from = None
    if config.init_from and newest is None:
        init_from = weights_lib.find(pathlib.Path(config.init_from), run.model)
        init_from.check(
            run.model, new_head=config.init_new_head, class_names=splits.train.class_names
        )
    _warn_of_image_labels(run)
    return TrainingPlan(
        run=run,
        class_names=splits.train.class_names,
        in_use=newest is not None,
        init_from=init_from,
        teacher=None if teacher is None else teacher.weights.load(teacher.model, run.mesh),
        train_batches=functools.partial(
            pipeline.train_batches,
            splits.train,
            TrainTransform.of(config, run.model.image_shape),
            batch_size=config.data.batch_size,
            seed=config.seed,
            repeats=config.augment.repeats,
            label_maps=label_maps,
            shard=BatchShard(*sharding.local_parts(run.mesh)),
            threads=config.data.threads,
            max_unreadable=config.data.max_unreadable,
        ),
        eval_batches=functools.partial(
            _eval_batches,
            config,
            run.model,
            splits.evaluation,
            run.mesh,
            config.data.eval_batch_size,
        ),
    )


def evaluation(
    config: ConfigDict,
    path: pathlib.Path,
    *,
    which: str = "best",
    weights: str = "auto",
    split: str | None = None,
) -> EvaluationPlan:
    """Plans to run trained weights on a split.

    Args:
      config: its model must be that of the weights, up to the resolution and the kinds of SP-ViT's
        layers, which are taken from the weights.
      path: as `weights.find`, as are `which` and `weights`.
      split: of the data set; the configuration's `data.eval_split` if None. Its classes are
        numbered by their names as the weights'; without names there, as the training split's.

    Raises:
      InputError: the configuration, the data or the weights cannot be used.
    """
    check_names(config)
    source = datasets.for_evaluation(config.data, split or config.data.eval_split)
    distributed.agree(
        config_lib.flatten({"config": config.to_dict()})
        | {"classes": classes.fingerprint(source.class_names)}
        | {"examples": len(source), "checkpoint": str(path), "step": which, "weights": weights}
    )
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    distributed.connect(mesh)
    like = config_lib.model_settings(config, num_classes=source.num_classes)
    found = weights_lib.find(path, like, which=which, weights=weights)
    source = datasets.numbered_as_trained(source, config.data, found.class_names, found.where)
    model = config_lib.model_settings(config, num_classes=source.num_classes)
    model = found.adopt_layer_kinds(model)
    found.check(model)
    settings = StepSettings.of(config, num_classes=source.num_classes)
    step = jax.jit(sharding.on_mesh(mesh, eval_step, settings=settings))
    return EvaluationPlan(config, model, found, source, mesh, step)


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


def find_teacher(config: ConfigDict, data: DataSize) -> Teacher | None:
    """Finds the model that a distilled one learns from, if the configuration names one.

    Raises:
      InputError: it cannot be read or has other classes, or the student learns from none.
    """
    if not config.distill.teacher:
        return None
    student = config_lib.model_settings(config, num_classes=data.num_classes)
    if not getattr(student, "distilled", False):
        raise InputError(
            "config.distill.teacher is set, and the model has no distillation token to learn from "
            "it; choose a distilled one, or set config.model.distilled=True"
        )
    found = weights_lib.find(pathlib.Path(config.distill.teacher), None)
    check_classes(found.config, student, found.where, may_replace=False)
    if data.class_names is not None:
        found.check_class_names(data.class_names, "choose a teacher of the same classes")
    return Teacher(found, dataclasses.replace(found.config, image_size=student.image_shape))


def training_run(
    config: ConfigDict,
    data: DataSize,
    changes: Mapping[str, Any] | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
    teacher: ModelConfig | None = None,
) -> TrainingRun:
    """Plans what is computed in a training run.

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


def _eval_batches(
    config: ConfigDict, model: ModelConfig, source: Source, mesh: Mesh, batch_size: int
) -> BatchIterator:
    return pipeline.eval_batches(
        source,
        EvalTransform.of(config, model.image_shape),
        batch_size=sharding.round_up(batch_size, mesh),
        shard=BatchShard(*sharding.local_parts(mesh)),
        threads=config.data.threads,
        max_unreadable=config.data.max_unreadable,
    )


def _warn_of_image_labels(run: TrainingRun) -> None:
    """Warns where a dense head learns each patch to be what the whole image is."""
    is_dense = getattr(run.model, "dense_head", False) and run.settings.dense_weight
    if is_dense and run.data.label_map is None:
        log.warning(
            "warning: %s has a head for each patch and config.token_labels.path is not set: every "
            "patch learns the label of its image, and the papers' accuracy is not to be expected",
            run.config.model.name,
        )
