"""A run compiled for a topology: memory needed per chip, the least and the expected step time."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import NamedTuple

from spvit_jax.models.complexity import count_macs
from spvit_jax.preflight.compile import EVAL_STEP, TRAIN_STEP, CompiledStep, compile_step
from spvit_jax.preflight.topology import Chip, Topology
from spvit_jax.training.run import TrainingRun


class Roofline(NamedTuple):
    """Least seconds of a step by each limit.

    Attributes:
      compute: seconds of its FLOPs at the chip's peak.
      memory: seconds of its HBM traffic.
      interconnect: seconds of its communication within a slice (ICI).
      network: seconds of its communication between slices (DCN).
    """

    compute: float
    memory: float
    interconnect: float
    network: float

    @property
    def seconds(self) -> float:
        """Least seconds of a step: the largest of the four, which may overlap."""
        return max(self)

    @property
    def by(self) -> str:
        """Name of the limit that takes longest."""
        return self._fields[self.index(self.seconds)]


@dataclasses.dataclass(frozen=True)
class CompiledRun:
    """A run with both of its steps compiled for a topology.

    Attributes:
      run: the run.
      topology: the chips that it is compiled for.
      train: the compiled train step.
      evaluation: the compiled eval step.
    """

    run: TrainingRun
    topology: Topology
    train: CompiledStep
    evaluation: CompiledStep

    @property
    def chip(self) -> Chip:
        """Peak figures of the topology's chips."""
        return self.topology.chip

    @property
    def resident(self) -> int:
        """HBM bytes per chip of the train state that stay allocated while the eval step runs."""
        return sum(
            self.train.memory.get(kind, 0)
            for kind in ("parameters", "moving average", "optimizer", "other state", "teacher")
        ) - self.evaluation.memory.get("weights", 0)

    @property
    def needed(self) -> int:
        """HBM bytes per chip that the run needs: those of training or of evaluation, if more."""
        return max(self.train.total, self.evaluation.total + self.resident)

    @property
    def too_large(self) -> str | None:
        """The step that does not fit in a chip's memory; None if both do."""
        if self.needed <= self.chip.usable_hbm:
            return None
        return TRAIN_STEP if self.train.total > self.chip.usable_hbm else EVAL_STEP

    @property
    def fits(self) -> bool:
        """Whether both steps fit in the chips' memory."""
        return self.too_large is None

    @property
    def roofline(self) -> Roofline:
        """Roofline of the train step."""
        return roofline(self.train, self.chip)

    @property
    def at_best(self) -> Speed:
        """Speed at the roofline of both steps, which no run exceeds."""
        return self._speed(lambda step: roofline(step, self.chip).seconds)

    @property
    def expected(self) -> Speed:
        """Speed by the compiler's cycles of both steps."""
        return self._speed(lambda step: expected_seconds(step, self.chip))

    def _speed(self, seconds: Callable[[CompiledStep], float]) -> Speed:
        return Speed(self.run, self.topology, seconds(self.train), seconds(self.evaluation))


@dataclasses.dataclass(frozen=True)
class Speed:
    """Speed of a run whose steps take known times.

    Attributes:
      run: the run.
      topology: the chips that it is on.
      step: seconds of a train step.
      eval_step: seconds of an eval step.
    """

    run: TrainingRun
    topology: Topology
    step: float
    eval_step: float

    @property
    def images_per_second(self) -> float:
        """Training images per second over all chips."""
        return self.run.config.data.batch_size / self.step

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: 6 FLOPs per multiply-add of the model, of the chips' peak.

        Recomputation (remat) does not count; a teacher's forward pass does.
        """
        flops = 6 * count_macs(self.run.model)
        if self.run.teacher is not None:
            flops += 2 * count_macs(self.run.teacher)
        return self.images_per_second * flops / (self.topology.chip.flops * self.run.mesh.size)

    @property
    def hours(self) -> float:
        """Hours of the whole run, its evaluations included."""
        return (self.step * self.run.steps + self.eval_step * self.run.eval_steps) / 3600

    @property
    def chip_hours(self) -> float:
        """Hours of the whole run times the number of chips."""
        return self.hours * self.topology.chips


def roofline(step: CompiledStep, chip: Chip) -> Roofline:
    """Returns the roofline of a step on a chip: the least time by each of its peak figures."""
    return Roofline(
        compute=step.flops / chip.flops,
        memory=step.hbm_bytes / chip.hbm_bandwidth,
        interconnect=step.sent / chip.ici_bandwidth,
        network=step.sent_to_slices / (chip.dcn_bandwidth or math.inf),
    )


def expected_seconds(step: CompiledStep, chip: Chip) -> float:
    """Returns the expected time of a step: by its instructions, and at least its roofline."""
    return max(step.clock.seconds, roofline(step, chip).seconds)


def compile_train_step(
    run: TrainingRun, chip: Chip, bundles: pathlib.Path | None = None
) -> CompiledStep:
    """Compiles the train step of a run for its mesh of such chips; as `compile.compile_step`."""
    arguments = run.train_arguments()
    return compile_step(TRAIN_STEP, run.train_step, arguments, run.mesh, chip, bundles)


def compile_eval_step(
    run: TrainingRun, chip: Chip, bundles: pathlib.Path | None = None
) -> CompiledStep:
    """Compiles the eval step of a run for its mesh of such chips; as `compile.compile_step`."""
    return compile_step(EVAL_STEP, run.eval_step, run.eval_arguments(), run.mesh, chip, bundles)
