"""A training run before its first step: its settings, and its state and steps on a mesh.

`train.py` runs it, and `preflight` compiles it for TPUs that are not there: the same steps, with
the same shardings and the same donation.
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
    """Numbers of the data that a run is planned with.

    Attributes:
      num_train: examples per epoch.
      num_eval: examples of an evaluation.
      num_classes: C.
      label_map: (K, h, w) of the label maps; None without.
      class_names: of the classes by number; None if not known.
    """

    num_train: int
    num_eval: int
    num_classes: int
    label_map: tuple[int, int, int] | None = None
    class_names: ClassNames | None = None


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """Everything that a training run computes, of which nothing has been computed yet.

    Attributes:
      config: resolved.
      model: what is trained.
      settings: static ones of the steps.
      mesh: the devices, which may be those of a description (`preflight.topology.Topology`).
      data: how much there is.
      teacher: the model that a distilled one learns from, or None.
      root: the run's root key, the third argument of `train_step` at every step.
      learning_rate: as a function of the step.
      abstract: the train state as shapes with shardings.
      shardings: of the train state.
      create: makes the state before the first step, jitted.
      train_step: `step.train_step` of (state, batch, root, teacher), jitted; donates the state.
      eval_step: `step.eval_step` of (model, batch), jitted.
      finite_leaves: `state.finite_leaves`, jitted.
      zero_metrics: `state.zero_metrics`, jitted.
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
        """Steps of training."""
        return self.config.schedule.total

    @property
    def eval_batch_size(self) -> int:
        """Images of a step of evaluation."""
        return sharding.round_up(self.config.data.eval_batch_size, self.mesh)

    @property
    def eval_steps(self) -> int:
        """Steps of evaluation in the whole run: at each interval, and at the end."""
        times = -(-self.steps // self.config.eval_every)
        return times * -(-self.data.num_eval // self.eval_batch_size)

    @property
    def has_batch_norm(self) -> bool:
        """Whether the model normalises over the batch."""
        return bool(jax.tree.leaves(self.abstract.model.stats))

    def train_arguments(self) -> dict[str, Any]:
        """Returns the arguments of `train_step` by name, as shapes with shardings."""
        batch = abstract_batch(
            self.config.data.batch_size,
            self.model.image_shape,
            self.mesh,
            train=True,
            label_map=self.data.label_map,
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
    """Returns a run; nothing is computed or allocated on the mesh.

    Args:
      config: resolved.
      model: what is trained.
      settings: static ones of the steps.
      mesh: the devices.
      data: how much there is.
      teacher: the model that a distilled one learns from.

    Raises:
      InputError: the configuration names an optimizer or a preset of shardings that is not there.
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
    """Returns a model's variables as shapes with shardings, and the shardings alone."""
    return sharding.abstract(lambda: Variables.of(model.build(CountedRngs(0))), mesh, preset)


def abstract_batch(
    batch_size: int,
    image_shape: tuple[int, int],
    mesh: Mesh,
    *,
    train: bool,
    label_map: tuple[int, int, int] | None = None,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns a global batch of `data.pipeline` as shapes with shardings.

    Args:
      batch_size: B, over all devices.
      image_shape: (height, width) in pixels.
      mesh: the devices.
      train: whether it is a batch of training; one of evaluation has a mask.
      label_map: (K, h, w) of the label maps that go with training; None without.
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
    place = sharding.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=place)
        for name, (shape, dtype) in leaves.items()
    }
