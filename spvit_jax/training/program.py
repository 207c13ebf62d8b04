"""What a run executes: the state and the jitted steps for one configuration on one mesh.

`train.py` runs it and `preflight.py` compiles it for a TPU that is not there: the same steps, with
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

from spvit_jax.models import ModelConfig
from spvit_jax.models.initializers import CountedRngs
from spvit_jax.training import optimizer, sharding
from spvit_jax.training import state as state_lib
from spvit_jax.training.state import Metrics, TrainState, Variables
from spvit_jax.training.step import Recipe, eval_step, train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """The state and the steps of a run.

    Attributes:
      root: the run's root key, the third argument of `train_step` at every step.
      learning_rate: as a function of the step.
      abstract: the train state as shapes with shardings.
      shardings: of the train state.
      create: makes the state before the first step, jitted.
      train_step: `step.train_step` of (state, batch, root, teacher), jitted; donates the state.
      eval_step: `step.eval_step` of (model, batch), jitted.
      finite_leaves: `state.finite_leaves`, jitted.
    """

    root: jax.Array
    learning_rate: optax.Schedule
    abstract: TrainState
    shardings: TrainState
    create: Callable[[], TrainState]
    train_step: Callable[..., TrainState]
    eval_step: Callable[[Variables, Any], Metrics]
    finite_leaves: Callable[[TrainState], jax.Array]


def build(config: ConfigDict, model: ModelConfig, recipe: Recipe, mesh: Mesh) -> Program:
    """Returns the program of a run; nothing is computed or allocated on the mesh yet.

    Args:
      config: resolved.
      model: what is trained.
      recipe: static settings of the steps.
      mesh: the devices, which may be those of a description (`tpu.chips.Topology`).

    Raises:
      InputError: the configuration names an optimizer or a preset of shardings that is not there.
    """
    root = jax.random.key(config.seed)
    tx = optimizer.make_optimizer(config)

    def create() -> TrainState:
        module = model.build(CountedRngs(jax.random.fold_in(root, 0)))
        return state_lib.create(module, tx, ema=recipe.ema > 0)

    abstract, shardings = sharding.plan(create, mesh, config.mesh.sharding)
    return Program(
        root=root,
        learning_rate=optimizer.make_schedule(config),
        abstract=abstract,
        shardings=shardings,
        create=jax.jit(create, out_shardings=shardings),
        train_step=jax.jit(
            sharding.on_mesh(mesh, train_step, optimizer=tx, recipe=recipe),
            donate_argnames="state",
            out_shardings=shardings,
        ),
        eval_step=jax.jit(sharding.on_mesh(mesh, eval_step, recipe=recipe)),
        finite_leaves=jax.jit(state_lib.finite_leaves, out_shardings=NamedSharding(mesh, P())),
    )


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
