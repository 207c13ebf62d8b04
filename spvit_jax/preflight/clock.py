"""Expected time of a compiled step: the compiler's own cycles, and estimates of what has none.

Instructions run one after the other; copies that run beside them take no time of their own. How
far that is from what was measured on TPUs is in `docs/preflight.md`.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from spvit_jax.preflight import kernels, parts
from spvit_jax.preflight.collectives import BETWEEN_SLICES, Collective
from spvit_jax.preflight.cost import instruction_cost
from spvit_jax.preflight.hlo import Executed, HloModule, Instruction
from spvit_jax.preflight.topology import Chip

CYCLES, BUNDLES, STATED = "the compiler's cycles", "a kernel's bundles", "a kernel's CostEstimate"
SLICES, LINKS, BYTES = "gathered slices", "bytes over links", "bytes over memory bandwidth"
# By `python -m benchmarks.calibrate`: S/16 in training 0.89 to 1.04, B/16 1.00, L/16 1.47.
CALIBRATION = "plain ViTs on TPU v3 were published with 0.9 to 1.5 times the speed expected of them"
# A gather or scatter is a loop in the scalar unit over its slices; bundles of v5e for each.
_BUNDLES_PER_SLICE = 11
_TRANSCENDENTALS_PER_CYCLE = 8 * 128  # lanes of the unit that computes them
_SENT = frozenset(
    {"all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"}
)
_LARGE = 0.05  # share of a step from which an instruction is worth a warning


@dataclasses.dataclass(frozen=True)
class Timed:
    """Time of one instruction of a program in a step.

    Attributes:
      name: name of the instruction.
      part: part of the step, a value of `parts.SCOPES` or one of its constants.
      seconds: seconds of all times that it runs.
      times: number of times that it runs.
      basis: what the time is from: `CYCLES`, or an estimate.
      computes: whether it has a product or is a kernel.
      operation: JAX's name of the operation.
      place: file and line in Python.
    """

    name: str
    part: str
    seconds: float
    times: int
    basis: str
    computes: bool = False
    operation: str = ""
    place: str = ""


@dataclasses.dataclass(frozen=True)
class Clock:
    """Expected time of a step by its instructions, the longest first."""

    instructions: tuple[Timed, ...]

    @property
    def seconds(self) -> float:
        """Seconds of all instructions in sequence."""
        return sum(one.seconds for one in self.instructions)

    @property
    def by_part(self) -> dict[str, float]:
        """Seconds by part of the step, the longest first."""
        return self._totals("part")

    @property
    def by_basis(self) -> dict[str, float]:
        """Seconds by what they are from, the longest first."""
        return self._totals("basis")

    @property
    def large(self) -> list[Timed]:
        """Instructions that take more than 5% of the step and neither multiply nor communicate."""
        limit = _LARGE * self.seconds
        return [
            one
            for one in self.instructions
            if one.seconds > limit and not one.computes and one.part != parts.COLLECTIVES
        ]

    def _totals(self, field: str) -> dict[str, float]:
        totals: dict[str, float] = collections.defaultdict(float)
        for one in self.instructions:
            totals[getattr(one, field)] += one.seconds
        return dict(sorted(totals.items(), key=lambda item: -item[1]))


def read_clock(
    program: HloModule,
    chip: Chip,
    collectives: Sequence[Collective] = (),
    bundles: Mapping[str, int] | None = None,
) -> Clock:
    """Returns the expected time of a compiled step.

    Args:
      program: a compiled step.
      chip: chip that it is compiled for.
      collectives: its communication.
      bundles: cycles of kernels by their bundles, by the name of their instruction.
    """
    found = [
        timed
        for executed in program.executed()
        if (timed := _timed(program, executed, chip, bundles or {})) is not None
    ]
    for one in collectives:
        between = one.axis == BETWEEN_SLICES
        bandwidth = chip.dcn_bandwidth if between else chip.ici_bandwidth
        assert bandwidth is not None  # a topology of several slices has one
        seconds = one.sent / bandwidth
        name = f"{one.kind} over {one.axis}"
        found.append(Timed(name, parts.COLLECTIVES, seconds, one.count, LINKS))
    return Clock(tuple(sorted(found, key=lambda timed: -timed.seconds)))


def _timed(
    program: HloModule, executed: Executed, chip: Chip, bundles: Mapping[str, int]
) -> Timed | None:
    """Returns the time of an instruction; None if it takes none of its own."""
    instruction, times, _ = executed
    if instruction.moves_nothing or instruction.opcode.endswith("-start"):
        return None
    inner = list(program.fused_instructions(instruction))
    cycles = re.search(r'"estimated_cycles":"?(\d+)', instruction.attributes)
    if cycles:
        basis, seconds = CYCLES, int(cycles[1]) / chip.hertz
    elif kernels.is_kernel(instruction):
        basis, seconds = _kernel(program, instruction, chip, bundles.get(instruction.name))
    elif any(one.opcode.removesuffix("-start") in _SENT for one in inner):
        return None  # among the collectives
    else:
        basis, seconds = BYTES, _memory(program, instruction, chip)
        gathered = sum(_slices(program, one) for one in inner)
        if gathered:
            scalar = gathered * _BUNDLES_PER_SLICE / chip.hertz
            basis, seconds = SLICES, max(scalar, seconds)
    return Timed(
        name=instruction.name,
        part=parts.part_of(program, executed),
        seconds=times * seconds,
        times=times,
        basis=basis,
        computes=kernels.is_kernel(instruction)
        or any(one.opcode == "convolution" for one in inner),
        operation=instruction.operation,
        place=program.place(instruction),
    )


def _kernel(
    program: HloModule, instruction: Instruction, chip: Chip, bundles: int | None
) -> tuple[str, float]:
    """Returns what the time of a kernel is from, and its seconds for one run."""
    stated = kernels.cost_estimate(instruction)
    limits = [_memory(program, instruction, chip)]
    if stated is not None:
        limits.append(stated.flops / chip.flops)
        limits.append(stated.transcendentals / (_TRANSCENDENTALS_PER_CYCLE * chip.hertz))
    if bundles is not None:
        return BUNDLES, max(*limits, bundles / chip.hertz)
    return BYTES if stated is None else STATED, max(limits)


def _memory(program: HloModule, instruction: Instruction, chip: Chip) -> float:
    """Returns the seconds that an instruction's traffic of HBM takes; of faster memory, none."""
    return instruction_cost(program, instruction).hbm_bytes / chip.hbm_bandwidth


def _slices(program: HloModule, instruction: Instruction) -> int:
    """Returns the number of slices that a gather reads or a scatter writes; 0 for all else."""
    attributes = instruction.attributes
    if instruction.opcode == "gather":
        array = instruction.arrays[0]
        found = re.search(r"slice_sizes=\{([\d,]*)\}", attributes)
        sides = [int(side) for side in found[1].split(",") if side] if found else []
    elif instruction.opcode == "scatter":
        array = program.instructions[instruction.operands[-1]].arrays[0]
        found = re.search(r"update_window_dims=\{([\d,]*)\}", attributes)
        axes = [int(axis) for axis in found[1].split(",") if axis] if found else []
        sides = [array.shape[axis] for axis in axes]
    else:
        return 0
    return math.prod(array.shape) // max(math.prod(sides), 1)
