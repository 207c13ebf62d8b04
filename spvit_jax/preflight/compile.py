"""Compiles a run's steps for a topology, and reads memory and cost from the compiled programs."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from spvit_jax.models.naming import named_leaves
from spvit_jax.preflight import hlo
from spvit_jax.preflight.activations import kept_bytes
from spvit_jax.preflight.collectives import BETWEEN_SLICES, Collective, collectives
from spvit_jax.preflight.cost import count_cost
from spvit_jax.preflight.topology import GIB
from spvit_jax.training import sharding

ACTIVATIONS, TEMPORARIES = "activations", "temporaries"
TRAIN_STEP, EVAL_STEP = "train step", "eval step"
# (pattern of an argument's leaf name, kind of memory); the first that matches decides.
_KINDS = (
    (r"^state/model/params/", "parameters"),
    (r"^state/ema/", "moving average"),
    (r"^state/opt_state/", "optimizer"),
    (r"^model/", "weights"),
    (r"^teacher/", "teacher"),
    (r"^batch/", "batch"),
    (r"", "other state"),
)


class DoesNotFitError(Exception):
    """A step that the compiler found too large for a chip's HBM.

    Attributes:
      needed: bytes of HBM per chip that the compiler asks for; nan if it does not say.
      step: `TRAIN_STEP` or `EVAL_STEP`.
    """

    def __init__(self, needed: float, step: str):
        super().__init__(f"the {step} needs {needed / GIB:.2f} GiB")
        self.needed, self.step = needed, step


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """Memory and cost of one compiled step on one chip.

    Attributes:
      memory: bytes of HBM by kind; together they are the compiler's own total.
      flops: FLOPs of the products in the compiled program, two per multiply-add.
      hbm_bytes: bytes that instructions read from HBM and write there.
      collectives: communication with other chips.
      compiler: the compiler's own figures, for comparison: its sizes, and its analysis of
        operations and bytes, in which a loop counts once and fast memory like HBM.
      unknown_loops: number of loops that are counted as if they ran once.
      seconds: compile time.
    """

    memory: dict[str, int]
    flops: float
    hbm_bytes: float
    collectives: list[Collective]
    compiler: dict[str, float]
    unknown_loops: int
    seconds: float

    @property
    def total(self) -> int:
        """Bytes of HBM per chip that the step needs."""
        return sum(self.memory.values())

    @property
    def sent(self) -> float:
        """Bytes that a chip sends to others of its slice in a step."""
        return sum(
            collective.sent for collective in self.collectives if collective.axis != BETWEEN_SLICES
        )

    @property
    def sent_to_slices(self) -> float:
        """Bytes that a chip sends to other slices in a step."""
        return sum(
            collective.sent for collective in self.collectives if collective.axis == BETWEEN_SLICES
        )


def compile_step(name: str, step: Any, arguments: Mapping[str, Any], mesh: Mesh) -> CompiledStep:
    """Compiles a jitted step and reads memory and cost from the compiled program.

    Args:
      name: `TRAIN_STEP` or `EVAL_STEP`.
      step: jitted step of a `TrainingRun`.
      arguments: arguments of the step in order, as shapes with shardings; `CompiledStep.memory`
        is sorted by their names.
      mesh: mesh of the devices of a `topology.Topology`.

    Raises:
      DoesNotFitError: the compiler ran out of the chip's memory.
    """
    start = time.monotonic()
    try:
        compiled = step.lower(*arguments.values()).compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error))
        if needed is None:
            raise
        raise DoesNotFitError(needed, name) from error
    seconds = time.monotonic() - start
    program = hlo.parse(compiled.as_text())
    cost = count_cost(program)
    num_slices = sharding.num_slices(mesh)
    in_a_slice = {**mesh.shape, "data": mesh.shape["data"] // num_slices}
    sizes, analysis = compiled.memory_analysis(), compiled.cost_analysis()
    return CompiledStep(
        memory=_memory(compiled.input_formats[0], arguments, sizes, kept_bytes(program)),
        flops=2.0 * cost.macs,
        hbm_bytes=float(cost.hbm_bytes),
        collectives=collectives(program, in_a_slice, num_slices),
        compiler={
            "arguments": sizes.argument_size_in_bytes,
            "outputs": sizes.output_size_in_bytes,
            "aliased": sizes.alias_size_in_bytes,
            "temporaries": sizes.temp_size_in_bytes,
            "code": sizes.generated_code_size_in_bytes,
            "flops": analysis["flops"],
            "bytes": analysis["bytes accessed"],
        },
        unknown_loops=program.loops_of_unknown_length(),
        seconds=seconds,
    )


def _memory(
    formats: Any, arguments: Mapping[str, Any], sizes: Any, activations: int
) -> dict[str, int]:
    """Returns the bytes of HBM by kind: arguments in their layouts, outputs, temporaries, code."""
    memory = {kind: 0 for _, kind in _KINDS}
    placed = dict(zip(arguments, formats, strict=True))
    layouts = {name: leaf.layout for name, leaf in named_leaves(placed).items() if leaf is not None}
    for name, leaf in named_leaves(dict(arguments)).items():
        kind = next(kind for pattern, kind in _KINDS if re.search(pattern, name))
        if layouts.get(name) is not None:  # it has none where the program does not use it
            memory[kind] += _padded_bytes(leaf, layouts[name])
    memory["outputs"] = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    memory[ACTIVATIONS] = activations
    memory[TEMPORARIES] = sizes.temp_size_in_bytes - activations
    memory["code"] = sizes.generated_code_size_in_bytes
    return {kind: size for kind, size in memory.items() if size}


def _padded_bytes(leaf: jax.ShapeDtypeStruct, layout: Any) -> int:
    """Returns the bytes of one chip's shard of an array, padded to whole tiles of its layout."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    itemsize = leaf.dtype.itemsize
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raw = jax.eval_shape(jax.random.key_data, leaf)
        shape, itemsize = raw.shape, raw.dtype.itemsize
    sides = [shape[axis] for axis in layout.major_to_minor]
    return hlo.padded_size(sides, layout.tiling[0] if layout.tiling else ()) * itemsize


def _needed(message: str) -> float | None:
    """Returns the bytes of HBM that a compiler error says are needed; None for other errors."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM", message)
    if found is None:
        found = re.search(r"[Uu]sed ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
    if found is None:
        return math.nan
    return float(found[1]) * 1024.0 ** " KMGT".index(found[2] or " ")
