"""A training run before its first step: settings, abstract train state and jitted steps on a mesh.

`train.py` runs it, and `preflight` compiles it for TPUs that the machine does not have: the same
steps, with the same shardings and the same donation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from spvit_jax.classes import ClassNames
from spvit_jax.models import ModelConfig
from spvit_jax.models.initializers import CountedRngs
from spvit_jax.training import optimizer, sharding
from spvit_jax.training import state as state_lib
from spvit_jax.training.state import Metrics, TrainState, Variables
from spvit_jax.training.step import StepSettings, eval_step, train_step


@dataclasses.dataclass(frozen=True)
class DataSize:
    """Size of the data of a run: numbers of examples and classes, and shape of label maps.

    Attributes:
      num_train: number of examples per epoch.
      num_eval: number of examples of an evaluation.
      num_classes: number of classes, C.
      label_map: (K, h, w) of the label maps; None without.
      class_names: names of the classes by number; None if unknown.
    """

    num_train: int
    num_eval: int
    num_classes: int
    label_map: tuple[int, int, int] | None = None
    class_names: ClassNames | None = None


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """A training run before anything is computed: settings, shardings and jitted functions.

    Attributes:
      config: resolved configuration.
      model: configuration of the model that is trained.
      settings: static settings of the steps.
      mesh: mesh of the devices, which may be those of a `preflight.topology.Topology`.
      data: size of the data.
      teacher: configuration of the teacher of a distilled model; None without.
      root: root random key, the third argument of `train_step` at every step.
      learning_rate: learning rate as a function of the step.
      abstract: train state as shapes with shardings.
      shardings: shardings of the train state.
      create: jitted function that makes the train state before the first step.
      train_step: jitted `step.train_step` of (state, batch, root, teacher); donates the state.
      eval_step: jitted `step.eval_step` of (model, batch).
      finite_leaves: jitted `state.finite_leaves`.
      zero_metrics: jitted `state.zero_metrics`.
    """

    config: ConfigDict
    model: ModelConfig
    settings: StepSettings
    mesh: Mesh
    data: DataSize
    teacher: ModelConfig | None
    root: jax.Array
    learning_rate: optax.Schedule
    abstract: TrainState
    shardings: TrainState
    create: Callable[[], TrainState]
    train_step: Callable[..., TrainState]
    eval_step: Callable[[Variables, Any], Metrics]
    finite_leaves: Callable[[TrainState], jax.Array]
    zero_metrics: Callable[[], Metrics]

    @property
    def steps(self) -> int:
        """Number of training steps of the run."""
        return self.config.schedule.total

    def evaluates_at(self, step: int) -> bool:
        """Returns whether an evaluation is due after a number of steps: at intervals, and last."""
        return step > 0 and (step % self.config.eval_every == 0 or step == self.steps)

    def evaluated(self, state: TrainState) -> list[Variables]:
        """Returns the weights that an evaluation is of: the best ones, then with `eval_raw` others.

        Those are the weights themselves where the best ones are their moving average.
        """
        has_others = self.config.eval_raw and state.ema is not None
        return [state.best_model, *([state.model] if has_others else [])]

    @property
    def eval_batch_size(self) -> int:
        """Images per eval step: `data.eval_batch_size` rounded up to a multiple of the devices."""
        return sharding.round_up(self.config.data.eval_batch_size, self.mesh)

    @property
    def eval_steps(self) -> int:
        """Number of eval steps in the whole run: evaluations at each interval and at the end."""
        times = -(-self.steps // self.config.eval_every) * len(self.evaluated(self.abstract))
        return times * -(-self.data.num_eval // self.eval_batch_size)

    @property
    def has_batch_norm(self) -> bool:
        """Whether the model has BatchNorm."""
        return bool(jax.tree.leaves(self.abstract.model.stats))

    def train_arguments(self) -> dict[str, Any]:
        """Returns the arguments of `train_step` by name, as shapes with shardings."""
        batch = abstract_batch(
            self.config.data.batch_size,
            self.model.image_shape,
            self.mesh,
            train=True,
            label_map=self.data.label_map,
            moves=bool(self.config.augment.rand_augment),
        )
        key = jax.eval_shape(lambda: self.root)
        arguments = {"state": self.abstract, "batch": batch, "rng": key}
        if self.teacher is not None:
            arguments["teacher"], _ = abstract_variables(self.teacher, self.mesh, "replicated")
        return arguments

    def eval_arguments(self) -> dict[str, Any]:
        """Returns the arguments of `eval_step` by name, as shapes with shardings."""
        batch = abstract_batch(self.eval_batch_size, self.model.image_shape, self.mesh, train=False)
        return {"model": self.abstract.best_model, "batch": batch}


def build(
    config: ConfigDict,
    model: ModelConfig,
    settings: StepSettings,
    mesh: Mesh,
    data: DataSize,
    teacher: ModelConfig | None = None,
) -> TrainingRun:
    """Returns a training run; nothing is computed or allocated on the mesh.

    Args:
      config: resolved configuration.
      model: configuration of the model to train.
      settings: static settings of the steps.
      mesh: mesh of the devices.
      data: size of the data.
      teacher: configuration of the teacher of a distilled model; None without.

    Raises:
      InputError: the configuration names an unknown optimizer or preset of shardings.
    """
    root = jax.random.key(config.seed)
    tx = optimizer.make_optimizer(config)

    def create() -> TrainState:
        module = model.build(CountedRngs(jax.random.fold_in(root, 0)))
        return state_lib.create(module, tx, ema=settings.ema > 0)

    abstract, shardings = sharding.abstract(create, mesh, config.mesh.sharding)
    return TrainingRun(
        config=config,
        model=model,
        settings=settings,
        mesh=mesh,
        data=data,
        teacher=teacher,
        root=root,
        learning_rate=optimizer.make_schedule(config),
        abstract=abstract,
        shardings=shardings,
        create=jax.jit(create, out_shardings=shardings),
        train_step=jax.jit(
            sharding.on_mesh(mesh, train_step, optimizer=tx, settings=settings),
            donate_argnames="state",
            out_shardings=shardings,
        ),
        eval_step=jax.jit(sharding.on_mesh(mesh, eval_step, settings=settings)),
        finite_leaves=jax.jit(state_lib.finite_leaves, out_shardings=NamedSharding(mesh, P())),
        zero_metrics=jax.jit(state_lib.zero_metrics, out_shardings=shardings.metrics),
    )


def abstract_variables(model: ModelConfig, mesh: Mesh, preset: str) -> tuple[Variables, Variables]:
    """Returns a model's variables as shapes with shardings, and the shardings alone.

    Args:
      model: configuration of the model.
      mesh: mesh of the devices.
      preset: name of the rules in `sharding.PRESETS`.
    """
    return sharding.abstract(lambda: Variables.of(model.build(CountedRngs(0))), mesh, preset)


def abstract_batch(
    batch_size: int,
    image_shape: tuple[int, int],
    mesh: Mesh,
    *,
    train: bool,
    label_map: tuple[int, int, int] | None = None,
    moves: bool = False,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns a global batch of `data.pipeline` as shapes with shardings.

    Args:
      batch_size: number of images B over all devices.
      image_shape: (height, width) in pixels.
      mesh: mesh of the devices.
      train: whether the batch is of training; a batch of evaluation has a mask.
      label_map: (K, h, w) of the label maps in a batch of training; None without.
      moves: whether the images of label maps are warped.
    """
    leaves: dict[str, tuple[tuple[int, ...], Any]] = {
        "image": ((*image_shape, 3), jnp.uint8),
        "label": ((), jnp.int32),
        "index": ((), jnp.int32),
    }
    if not train:
        leaves["mask"] = ((), jnp.float32)
    elif label_map is not None:
        leaves["label_map"] = ((2, *label_map), jnp.float16)
        leaves["box"] = ((4,), jnp.float32)
        leaves["flip"] = ((), jnp.bool_)
        if moves:
            leaves["move"] = ((3, 3), jnp.float32)
    batch_sharding = sharding.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=batch_sharding)
        for name, (shape, dtype) in leaves.items()
    }
