"""Compiles a run's steps for a topology, and reads memory, cost and time from the programs."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from spvit_jax.errors import first_line
from spvit_jax.models.naming import named_leaves
from spvit_jax.preflight import hlo, kernels
from spvit_jax.preflight.activations import kept_bytes
from spvit_jax.preflight.bundles import read_folder
from spvit_jax.preflight.clock import Clock, read_clock
from spvit_jax.preflight.collectives import BETWEEN_SLICES, Collective, collectives
from spvit_jax.preflight.cost import count_cost
from spvit_jax.preflight.topology import GIB, Chip
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

    def __reduce__(self) -> tuple[Any, ...]:
        return DoesNotFitError, (self.needed, self.step)  # pickled by its arguments


class CompilerError(Exception):
    """The compiler failed, or what it made cannot be read; the message is one line."""


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """Memory and cost of one compiled step on one chip.

    Attributes:
      memory: bytes of HBM by kind; together they are the compiler's own total.
      flops: FLOPs of the products in the compiled program, two per multiply-add.
      hbm_bytes: bytes that instructions read from HBM and write there.
      collectives: communication with other chips.
      clock: expected time, by the compiler's cycles.
      compiler: the compiler's own figures, for comparison: its sizes, and its analysis of
        operations and bytes, in which a loop counts once and fast memory like HBM.
      unknown_loops: number of loops that are counted as if they ran once.
      seconds: compile time.
    """

    memory: dict[str, int]
    flops: float
    hbm_bytes: float
    collectives: list[Collective]
    clock: Clock
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


def compile_step(
    name: str,
    step: Any,
    arguments: Mapping[str, Any],
    mesh: Mesh,
    chip: Chip,
    bundles: pathlib.Path | None = None,
) -> CompiledStep:
    """Compiles a jitted step and reads memory, cost and time from the compiled program.

    Args:
      name: `TRAIN_STEP` or `EVAL_STEP`.
      step: jitted step of a `TrainingRun`.
      arguments: arguments of the step in order, as shapes with shardings; `CompiledStep.memory`
        is sorted by their names.
      mesh: mesh of the devices of a `topology.Topology`.
      chip: its chips.
      bundles: folder that libtpu writes instruction bundles to, where it was told to.

    Raises:
      DoesNotFitError: the compiler ran out of the chip's memory.
      CompilerError: the compiler failed, or what it made cannot be read.
    """
    start = time.monotonic()
    try:
        compiled = step.lower(*arguments.values()).compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error))
        if needed is None:
            raise CompilerError(
                f"the compiler failed at the {name}: {first_line(error)}"
            ) from error
        raise DoesNotFitError(needed, name) from error
    seconds = time.monotonic() - start
    text = compiled.as_text()
    try:
        return _read(text, compiled, arguments, mesh, chip, bundles, seconds)
    except Exception as error:  # the text is libtpu's, and changes with its versions
        kept = pathlib.Path(tempfile.mkdtemp(prefix="preflight-")) / f"{name.replace(' ', '-')}.txt"
        kept.write_text(text)
        raise CompilerError(
            f"cannot read the compiled {name}, kept in {kept}: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


def _read(
    text: str,
    compiled: Any,
    arguments: Mapping[str, Any],
    mesh: Mesh,
    chip: Chip,
    bundles: pathlib.Path | None,
    seconds: float,
) -> CompiledStep:
    """Reads memory, cost and time of a compiled step, whose text is given too."""
    program = hlo.parse(text)
    cost = count_cost(program)
    num_slices = sharding.num_slices(mesh)
    in_a_slice = {**mesh.shape, "data": mesh.shape["data"] // num_slices}
    communication = collectives(program, in_a_slice, num_slices)
    names = [one.name for one in program.instructions.values() if kernels.is_kernel(one)]
    cycles = {} if bundles is None else read_folder(bundles, names)
    sizes, analysis = compiled.memory_analysis(), compiled.cost_analysis()
    return CompiledStep(
        memory=_memory(compiled.input_formats[0], arguments, sizes, kept_bytes(program)),
        flops=2.0 * cost.macs,
        hbm_bytes=float(cost.hbm_bytes),
        collectives=communication,
        clock=read_clock(program, chip, communication, cycles),
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
