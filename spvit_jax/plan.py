"""Plans of runs: from a configuration to data, model, steps and mesh, with every check once.

All commands that run a model on data use them. `training` and `evaluation` plan a run on this
machine's data and devices. `training_run` plans the computation alone, for which neither has to be
on this machine: `preflight` calls it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from spvit_jax import classes, distributed, paths
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
from spvit_jax.models.implementation import check_platform
from spvit_jax.models.resize import check_classes
from spvit_jax.training import checkpoint, optimizer, sharding, writers
from spvit_jax.training import run as run_lib
from spvit_jax.training import state as state_lib
from spvit_jax.training.run import DataSize, TrainingRun
from spvit_jax.training.state import Metrics, TrainState, Variables
from spvit_jax.training.step import ClassCounts, StepSettings, class_step, eval_step
from spvit_jax.weights import Weights


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """A training run with its data and the weights that it starts from.

    Attributes:
      run: the computation: model, steps and mesh.
      class_names: names of the data's classes, by number.
      in_use: whether the workdir holds checkpoints, from which the run continues.
      init_from: weights that a new run starts from; None for random ones.
      teacher: variables of the model that a distilled model learns from, or None.
      train_batches: returns the endless batches of training from a `start_step` on.
      eval_batches: returns the batches of one evaluation.
    """

    run: TrainingRun
    class_names: ClassNames
    in_use: bool
    init_from: Weights | None
    teacher: Variables | None
    train_batches: Callable[..., BatchIterator]
    eval_batches: Callable[[], BatchIterator]

    def create_state(self) -> tuple[TrainState, str]:
        """Returns the train state before the first step, and the origin of its weights."""
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

    def claim(self, workdir: epath.Path) -> None:
        """Creates the workdir and writes the run's configuration and class names to it.

        Raises:
          InputError: the workdir belongs to another run, cannot be written, or is not shared by
            all processes.
        """
        write = distributed.is_primary()
        config_lib.claim_workdir(workdir, self.run.config, in_use=self.in_use, write=write)
        classes.claim_workdir(workdir, self.class_names, in_use=self.in_use, write=write)
        distributed.check_shared(workdir)


@dataclasses.dataclass(frozen=True)
class EvaluationPlan:
    """An evaluation of trained weights, with its data.

    Attributes:
      config: configuration as it was given, not resolved.
      model: configuration of the weights' model, at the image size to evaluate at.
      weights: the weights, not on the mesh yet.
      source: examples of the split, whose classes have the weights' numbers.
      mesh: mesh of the devices.
      eval_step: `step.eval_step` of (variables, batch), jitted.
      class_step: `step.class_step` of (variables, batch), jitted.
    """

    config: ConfigDict
    model: ModelConfig
    weights: Weights
    source: Source
    mesh: Mesh
    eval_step: Callable[[Variables, Any], Metrics]
    class_step: Callable[[Variables, Any], tuple[Metrics, ClassCounts]]

    @property
    def num_batches(self) -> int:
        """Number of the batches of one evaluation."""
        size = sharding.round_up(self.config.data.eval_batch_size, self.mesh)
        return -(-len(self.source) // size)

    def load(self) -> Variables:
        """Reads the weights onto the mesh; raises as `Weights.load`."""
        return self.weights.load(self.model, self.mesh, preset=self.config.mesh.sharding)

    def batches(self, batch_size: int | None = None) -> BatchIterator:
        """Returns the batches of one evaluation, by default of `data.eval_batch_size` images."""
        size = self.config.data.eval_batch_size if batch_size is None else batch_size
        return _eval_batches(self.config, self.model, self.source, self.mesh, size)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Model that a distilled model learns from.

    Attributes:
      weights: weights of the teacher, not on the mesh yet.
      model: configuration of the teacher, at the student's resolution.
    """

    weights: Weights
    model: ModelConfig


def training(config: ConfigDict, workdir: epath.Path) -> TrainingPlan:
    """Plans a training run on this machine's data and devices; writes nothing.

    Args:
      config: configuration, not resolved.
      workdir: folder of the run, which may hold checkpoints.

    Raises:
      InputError: the configuration, the data or the weights cannot be used.
    """
    check_names(config)
    check_paths(config)
    writers.check(config)
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
        init_from = weights_lib.find(paths.parse(config.init_from), run.model)
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
    path: epath.Path,
    *,
    which: str = "best",
    weights: str = "auto",
    split: str | None = None,
) -> EvaluationPlan:
    """Plans the evaluation of trained weights on a split.

    Args:
      config: configuration, whose model must be that of the weights, up to the resolution and the
        kinds of SP-ViT's layers, which are taken from the weights.
      path: file or folder of the weights, as in `weights.find`.
      which: checkpoint of a workdir, as in `weights.find`.
      weights: "model", "ema" or "auto", as in `weights.find`.
      split: split of the data set; the configuration's `data.eval_split` if None. Its classes are
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
    check_platform(model.attention, sharding.platform(mesh))
    settings = StepSettings.of(config, num_classes=source.num_classes)
    return EvaluationPlan(
        config,
        model,
        found,
        source,
        mesh,
        eval_step=jax.jit(sharding.on_mesh(mesh, eval_step, settings=settings)),
        class_step=jax.jit(
            sharding.on_mesh(mesh, class_step, settings=settings),
            out_shardings=NamedSharding(mesh, P()),  # each process has the whole table
        ),
    )


def check_names(config: ConfigDict) -> None:
    """Checks that the names in a configuration exist, and that the place of its data can be.

    Raises:
      InputError: there is no such model, optimizer, preset of shardings, interpolation or policy
        of augmentation, and the nearest is named; or as `paths.parse`.
    """
    paths.parse(config.data.data_dir)
    datasets.folder_of(config.data.dataset)
    model = config_lib.model_settings(config, num_classes=1)
    optimizer.check_name(config.optim.name)
    sharding.check_preset(config.mesh.sharding)
    BatchTransform.of(config)
    TrainTransform.of(config, model.image_shape)
    EvalTransform.of(config, model.image_shape)


def check_paths(config: ConfigDict) -> None:
    """Checks the paths from which a new run starts; whether they hold what they should comes later.

    Raises:
      InputError: as `paths.parse`.
    """
    for path in (config.token_labels.path, config.init_from, config.distill.teacher):
        if path:
            paths.parse(path)


def find_teacher(config: ConfigDict, data: DataSize) -> Teacher | None:
    """Finds the teacher of a distilled model; returns None if the configuration names none.

    Raises:
      InputError: the teacher cannot be read or has other classes, or the model is not distilled.
    """
    if not config.distill.teacher:
        return None
    student = config_lib.model_settings(config, num_classes=data.num_classes)
    if not getattr(student, "distilled", False):
        raise InputError(
            "config.distill.teacher is set, and the model has no distillation token to learn from "
            "it; choose a distilled one, or set config.model.distilled=True"
        )
    found = weights_lib.find(paths.parse(config.distill.teacher), None)
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
    """Plans the computation of a training run: model, steps and mesh.

    Args:
      config: configuration, not resolved.
      data: sizes and classes of the data.
      changes: fields of the configuration to change, such as {"model.remat": True}.
      devices: devices of the mesh, by default this machine's; may be descriptions of others.
      teacher: configuration of the model that a distilled model learns from.

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
    check_platform(model.attention, sharding.platform(mesh))
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
    """Warns if a dense head learns the image's label for every patch, not token labels."""
    is_dense = getattr(run.model, "dense_head", False) and run.settings.dense_weight
    if is_dense and run.data.label_map is None:
        log.warning(
            "warning: %s has a head for each patch and config.token_labels.path is not set: every "
            "patch learns the label of its image, and the papers' accuracy is not to be expected",
            run.config.model.name,
        )
