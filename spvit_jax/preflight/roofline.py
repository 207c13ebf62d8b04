"""The roofline of a run on a topology: the memory that it needs, and how fast it can be at best."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from spvit_jax.models.complexity import count_macs
from spvit_jax.preflight.compile import EVAL_STEP, TRAIN_STEP, CompiledStep, compile_step
from spvit_jax.preflight.topology import Chip, Topology
from spvit_jax.training.run import TrainingRun


class Roofline(NamedTuple):
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
class CompiledRun:
    """A run, and its two steps as the compiler made them.

    Attributes:
      run: what was compiled.
      topology: for which.
      train: the train step.
      evaluation: the eval step.
    """

    run: TrainingRun
    topology: Topology
    train: CompiledStep
    evaluation: CompiledStep

    @property
    def chip(self) -> Chip:
        """What it runs on."""
        return self.topology.chip

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
    def roofline(self) -> Roofline:
        """The least time of a step of training."""
        return roofline(self.train, self.chip)

    @property
    def images_per_second(self) -> float:
        """Of training, over all chips, at the bound."""
        return self.run.config.data.batch_size / self.roofline.seconds

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
        evaluation = roofline(self.evaluation, self.chip).seconds * self.run.eval_steps
        return (self.roofline.seconds * self.run.steps + evaluation) / 3600


def roofline(step: CompiledStep, chip: Chip) -> Roofline:
    """Returns the roofline of a step: no chip computes, reads or sends faster."""
    return Roofline(
        compute=step.flops / chip.flops,
        memory=step.hbm_bytes / chip.hbm_bandwidth,
        interconnect=step.sent / chip.ici_bandwidth,
        network=step.sent_to_slices / (chip.dcn_bandwidth or math.inf),
    )


def compile_run(run: TrainingRun, topology: Topology) -> CompiledRun:
    """Compiles both steps of a run whose mesh is of the topology's devices.

    Raises:
      DoesNotFitError: the compiler ran out of the chip's memory.
    """
    return CompiledRun(run, topology, compile_train_step(run), compile_eval_step(run))


def compile_train_step(run: TrainingRun) -> CompiledStep:
    """Compiles the train step of a run; raises as `compile_run`."""
    return compile_step(TRAIN_STEP, run.train_step, run.train_arguments(), run.mesh)


def compile_eval_step(run: TrainingRun) -> CompiledStep:
    """Compiles the eval step of a run; raises as `compile_run`."""
    return compile_step(EVAL_STEP, run.eval_step, run.eval_arguments(), run.mesh)
