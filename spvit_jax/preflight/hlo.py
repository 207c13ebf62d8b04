"""Parser of compiled HLO: the instructions that a chip runs, how often, and on which arrays.

The text is XLA's, after all passes. Nothing here knows what the program is for. The lines of Python
that instructions come from are in `stack_frames.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from spvit_jax.preflight import stack_frames

_ITEM = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\](?:\{([^{}]*)\})?")  # f32[8,128]{1,0:T(8,128)}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = ")
_OPERAND = re.compile(r"%([\w.-]+)")
_FREE = frozenset(
    {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional"}
)
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast")  # memory, and parts that lie side by side in it


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result.

    Attributes:
      shape: shape on one chip.
      itemsize: bytes per element.
      in_hbm: whether the array is in HBM, not in one of the chip's smaller and faster memories.
      allocated: bytes of the array with the padding of its layout, in whole tiles.
    """

    shape: tuple[int, ...]
    itemsize: int
    in_hbm: bool
    allocated: int

    @property
    def nbytes(self) -> int:
        """Bytes of the array without the padding of its layout."""
        return math.prod(self.shape) * self.itemsize


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One HLO instruction: a line of a computation.

    Attributes:
      name: name of the instruction, unique in the program.
      opcode: HLO opcode, such as `all-gather`.
      arrays: arrays of the result.
      operands: names of the instructions whose results are read.
      attributes: the rest of the line, after the operands.
      is_root: whether the computation returns this instruction's result.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @functools.cached_property
    def operation(self) -> str:
        """JAX's name of the operation (`op_name`), such as `jit(step)/jvp()/add`; may be empty."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def moves_nothing(self) -> bool:
        """Whether the instruction neither computes nor moves data, or what it calls does so."""
        return (
            self.opcode in _FREE
            or self.opcode.endswith("-done")
            or any(f'custom_call_target="{name}"' in self.attributes for name in _FREE_CALLS)
        )

    def called(self, attribute: str) -> str | None:
        """Returns the name of the computation in an attribute such as `body`; None without it."""
        found = re.search(rf"\b{attribute}=%?([\w.-]+)", self.attributes)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class HloModule:
    """The computations of a compiled program, and the name of its entry computation.

    Attributes:
      computations: instructions of each computation in order, by its name.
      entry: name of the entry computation.
      places: file and line in Python of each of the text's stack frames, by its number.
    """

    computations: dict[str, list[Instruction]]
    entry: str
    places: dict[str, str] = dataclasses.field(default_factory=dict)

    def called_computations(self, instruction: Instruction) -> list[str]:
        """Returns the names of the computations that an instruction runs, in order."""
        if instruction.opcode == "while":
            return [instruction.called("body") or ""]
        if instruction.opcode == "conditional":  # all branches: an upper bound
            return _branches(instruction)
        return [instruction.called("to_apply") or ""] if instruction.opcode == "call" else []

    def sequences(self, computation: str | None = None) -> Iterator[list[Instruction]]:
        """Yields the instructions of each computation that a chip runs, in order.

        Args:
          computation: computation to start from; the entry computation if not given.
        """
        body = self.computations[computation or self.entry]
        yield body
        for name in itertools.chain(*map(self.called_computations, body)):
            yield from self.sequences(name)

    @functools.cached_property
    def instructions(self) -> dict[str, Instruction]:
        """All instructions of the program by name."""
        return {
            instruction.name: instruction
            for body in self.computations.values()
            for instruction in body
        }

    def executed(
        self,
        computation: str | None = None,
        times: int = 1,
        loops: tuple[Instruction, ...] = (),
    ) -> Iterator[Executed]:
        """Yields the instructions that a chip runs, each with the number of times that it runs.

        Args:
          computation: computation to start from; the entry computation if not given.
          times: number of times the computation runs.
          loops: loops that the computation is in.
        """
        for instruction in self.computations[computation or self.entry]:
            called = self.called_computations(instruction)
            if not called:
                yield Executed(instruction, times, loops)
            is_loop = instruction.opcode == "while"
            iterations = (self.trip_count(instruction) or 1) if is_loop else 1
            within = (*loops, instruction) if is_loop else loops
            for name in called:
                yield from self.executed(name, times * iterations, within)

    def place(self, instruction: Instruction) -> str:
        """Returns the file and line in Python that an instruction comes from; may be empty."""
        found = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        return self.places.get(found[1], "") if found else ""

    def loops_of_unknown_length(self) -> int:
        """Returns the number of loops without a known trip count, which count as one iteration."""
        loops = [
            instruction
            for instruction in self.instructions.values()
            if instruction.opcode == "while"
        ]
        return sum(self.trip_count(loop) is None for loop in loops)

    def trip_count(self, loop: Instruction) -> int | None:
        """Returns the trip count of a loop: XLA's, or the constant that it counts to; else None."""
        known = re.search(r"known_trip_count[^\d}]*(\d+)", loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[loop.called("condition") or ""]
        root = next(instruction for instruction in condition if instruction.is_root)
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        limit = self.instructions[root.operands[1]]
        value = re.match(r"\((\d+)\)", limit.attributes) if limit.opcode == "constant" else None
        return int(value[1]) if value else None

    def fused_computation(self, instruction: Instruction) -> list[Instruction] | None:
        """Returns the instructions of a fusion, in which others may be; None for all else."""
        if instruction.opcode != "fusion":
            return None
        return self.computations[instruction.called("calls") or ""]

    def fused_instructions(self, instruction: Instruction) -> Iterator[Instruction]:
        """Yields the instructions inside a fusion; any other instruction as it is."""
        fused = self.fused_computation(instruction)
        if fused is None:
            yield instruction
        else:
            for inner in fused:
                yield from self.fused_instructions(inner)


class Executed(NamedTuple):
    """An instruction, the number of times that it runs in one step, and the loops around it."""

    instruction: Instruction
    times: int
    loops: tuple[Instruction, ...] = ()


def parse(text: str) -> HloModule:
    """Parses the text of a compiled program.

    Args:
      text: result of `compiled.as_text()`.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header:
                current = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        else:
            name = _NAME.match(line)
            if name:
                current.append(_instruction(name, line[name.end() :]))
    if not entry:
        raise ValueError("not the text of a program: it has no ENTRY")
    return HloModule(computations, entry, stack_frames.read(text))


def _instruction(name: re.Match[str], rest: str) -> Instruction:
    """Parses an instruction from what follows `%name = `: type, opcode, operands, attributes."""
    end = _end_of_type(rest)
    opcode, _, tail = rest[end:].lstrip().partition("(")
    operands, _, attributes = tail.partition(")")
    if opcode in ("constant", "parameter"):
        attributes = f"({operands})"
    return Instruction(
        name=name[2],
        opcode=opcode,
        arrays=tuple(_array(item) for item in _ITEM.finditer(rest[:end])),
        operands=tuple(_OPERAND.findall(operands)),
        attributes=attributes,
        is_root=name[1] is not None,
    )


def _end_of_type(text: str) -> int:
    if not text.startswith("("):
        return text.index(" ")
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return index + 1
    raise ValueError(f"cannot read {text[:200]!r}")


def _array(item: re.Match[str]) -> Array:
    kind, bits, sides, layout = item.groups()
    shape = tuple(int(side) for side in sides.split(",")) if sides else ()
    itemsize = max(int(bits) // 8, 1) if bits else 1  # pred has no number
    order, _, tiling = (layout or "").partition(":")
    sides = [shape[int(axis)] for axis in reversed(order.split(","))] if order else []
    found = re.search(r"T\(([\d,]+)\)", tiling)
    tile = [int(side) for side in found[1].split(",")] if found else []
    in_hbm = kind != "token" and not re.search(r"S\(\d", tiling)
    return Array(shape, itemsize, in_hbm, itemsize * padded_size(sides, tile))


def padded_size(sides: Sequence[int], tile: Sequence[int]) -> int:
    """Returns the number of elements of an array padded to whole tiles.

    Args:
      sides: sizes of the axes, the major one first.
      tile: sizes of a tile along the last axes; empty for none.
    """
    sides = [1] * (len(tile) - len(sides)) + list(sides)
    for index, side in enumerate(reversed(tile), start=1):
        sides[-index] = math.ceil(sides[-index] / side) * side
    return math.prod(sides)


def _branches(conditional: Instruction) -> list[str]:
    found = re.search(r"branch_computations=\{([^}]*)\}", conditional.attributes)
    if found:
        return _OPERAND.findall(found[1])
    names = [conditional.called(f"{which}_computation") for which in ("true", "false")]
    return [name for name in names if name]
