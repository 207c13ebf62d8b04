"""The account of a run on a topology: what it needs, and how fast it can be at best."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from spvit_jax import config as config_lib
from spvit_jax import weights
from spvit_jax.classes import ClassNames
from spvit_jax.data import mix
from spvit_jax.models import ModelConfig
from spvit_jax.models.complexity import count_macs
from spvit_jax.tpu.chips import Chip, Topology
from spvit_jax.tpu.compiled import EVAL_STEP, TRAIN_STEP, Compiled, compile_step
from spvit_jax.training import program as program_lib
from spvit_jax.training import sharding
from spvit_jax.training.program import Program
from spvit_jax.training.step import Recipe


@dataclasses.dataclass(frozen=True)
class DataFacts:
    """What a run's account needs to know of its data.

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
class Run:
    """What `train.py` would run on a topology.

    Attributes:
      config: resolved.
      model: what is trained.
      mesh: of the topology's devices.
      topology: the chips.
      data: how much there is.
      program: state and steps.
      teacher: the model that a distilled one learns from, or None.
    """

    config: ConfigDict
    model: ModelConfig
    mesh: Mesh
    topology: Topology
    data: DataFacts
    program: Program
    teacher: ModelConfig | None

    @property
    def steps(self) -> int:
        """Steps of training."""
        return self.config.schedule.total

    @property
    def has_batch_norm(self) -> bool:
        """Whether the model normalises over the batch."""
        return bool(jax.tree.leaves(self.program.abstract.model.stats))

    @property
    def eval_batch_size(self) -> int:
        """Images of a step of evaluation."""
        return sharding.round_up(self.config.data.eval_batch_size, self.mesh)

    @property
    def eval_steps(self) -> int:
        """Steps of evaluation in the whole run: at each interval, and at the end."""
        times = -(-self.steps // self.config.eval_every)
        return times * -(-self.data.num_eval // self.eval_batch_size)


def plan(
    config: ConfigDict,
    topology: Topology,
    data: DataFacts,
    *,
    changes: Mapping[str, Any] | None = None,
    teacher: ModelConfig | None = None,
) -> Run:
    """Works out what `train.py` would run, with the same checks.

    Args:
      config: not resolved.
      topology: on which.
      data: on what.
      changes: of fields of the configuration, such as {"model.remat": True}.
      teacher: of a distilled model.

    Raises:
      InputError: the configuration cannot be used on the topology.
    """
    config = ConfigDict(copy.deepcopy(config.to_dict()))
    for name, value in (changes or {}).items():
        section, _, field = name.rpartition(".")
        with config.ignore_type():
            config[section][field] = value
    config = config_lib.resolve(config, num_examples=data.num_train)
    model = config_lib.model_settings(config, num_classes=data.num_classes)
    recipe = Recipe.of(
        config, num_classes=data.num_classes, grid=model.grid if data.label_map else None
    )
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, topology.devices)
    sharding.check_batch_size(config.data.batch_size, mesh, recipe.accumulate)
    mix.check_group_size(config)
    program = program_lib.build(config, model, recipe, mesh)
    return Run(config, model, mesh, topology, data, program, teacher)


class Bound(NamedTuple):
    """Seconds that a step takes at least, by what it waits for."""

    compute: float
    memory: float
    interconnect: float
    network: float

    @property
    def seconds(self) -> float:
        """The largest: all four could go on at the same time."""
        return max(self)

    @property
    def by(self) -> str:
        """Which it is."""
        return self._fields[self.index(self.seconds)]


@dataclasses.dataclass(frozen=True)
class Account:
    """A run, and its two steps as the compiler made them.

    Attributes:
      run: what was compiled.
      train: the train step.
      evaluation: the eval step.
    """

    run: Run
    train: Compiled
    evaluation: Compiled

    @property
    def chip(self) -> Chip:
        """What it runs on."""
        return self.run.topology.chip

    @property
    def resident(self) -> int:
        """Bytes of HBM that the train state keeps while the eval step runs on its weights."""
        return sum(
            self.train.memory.get(kind, 0)
            for kind in ("parameters", "moving average", "optimizer", "other state", "teacher")
        ) - self.evaluation.memory.get("weights", 0)

    @property
    def needed(self) -> int:
        """Bytes of HBM that a chip must have: for training, or for evaluation if that is more."""
        return max(self.train.total, self.evaluation.total + self.resident)

    @property
    def too_large(self) -> str | None:
        """Which of the steps a chip has no room for; None if it has."""
        if self.needed <= self.chip.usable_hbm:
            return None
        return TRAIN_STEP if self.train.total > self.chip.usable_hbm else EVAL_STEP

    @property
    def fits(self) -> bool:
        """Whether a chip has room for both steps."""
        return self.too_large is None

    @property
    def bound(self) -> Bound:
        """The least time of a step of training."""
        return bound(self.train, self.chip)

    @property
    def images_per_second(self) -> float:
        """Of training, over all chips, at the bound."""
        return self.run.config.data.batch_size / self.bound.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation at the bound: 6 operations per multiply-add of the model.

        What is computed twice to save memory does not count; a teacher's forward pass does.
        """
        flops = 6 * count_macs(self.run.model)
        if self.run.teacher is not None:
            flops += 2 * count_macs(self.run.teacher)
        return self.images_per_second * flops / (self.chip.flops * self.run.mesh.size)

    @property
    def hours(self) -> float:
        """Of the whole recipe at the bound, its evaluations included."""
        evaluation = bound(self.evaluation, self.chip).seconds * self.run.eval_steps
        return (self.bound.seconds * self.run.steps + evaluation) / 3600


def bound(step: Compiled, chip: Chip) -> Bound:
    """Returns the roofline of a step: no chip computes, reads or sends faster."""
    return Bound(
        compute=step.flops / chip.flops,
        memory=step.hbm_bytes / chip.hbm_bandwidth,
        interconnect=step.sent / chip.ici_bandwidth,
        network=step.sent_to_slices / (chip.dcn_bandwidth or math.inf),
    )


def take(run: Run) -> Account:
    """Compiles both steps of a run.

    Raises:
      DoesNotFitError: the compiler ran out of the chip's memory.
    """
    return Account(run, compile_train_step(run), compile_eval_step(run))


def compile_train_step(run: Run) -> Compiled:
    """Compiles the train step of a run; raises as `take`."""
    batch = program_lib.abstract_batch(
        run.config.data.batch_size,
        run.model.image_shape,
        run.mesh,
        train=True,
        label_map=run.data.label_map,
    )
    program = run.program
    arguments = {"state": program.abstract, "batch": batch, "rng": _abstract_key(program.root)}
    if run.teacher is not None:
        # As `train.py` has it loaded.
        arguments["teacher"], _ = weights.plan(run.teacher, run.mesh, "replicated")
    return compile_step(TRAIN_STEP, program.train_step, arguments, run.mesh)


def compile_eval_step(run: Run) -> Compiled:
    """Compiles the eval step of a run; raises as `take`."""
    batch = program_lib.abstract_batch(
        run.eval_batch_size, run.model.image_shape, run.mesh, train=False
    )
    arguments = {"model": run.program.abstract.best_model, "batch": batch}
    return compile_step(EVAL_STEP, run.program.eval_step, arguments, run.mesh)


def _abstract_key(key: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: key)
