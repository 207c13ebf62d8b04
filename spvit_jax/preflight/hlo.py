"""Reads the text of a compiled program: which instructions run on a chip, how often, on what.

The text is XLA's (HLO after all passes). Nothing here knows what the program is for.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_ITEM = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\](?:\{([^{}]*)\})?")  # f32[8,128]{1,0:T(8,128)}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = ")
_OPERAND = re.compile(r"%([\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result.

    Attributes:
      shape: on one chip.
      itemsize: bytes of an element.
      in_hbm: whether it lies in the chip's main memory, not in one of its small fast ones.
      allocated: its bytes in whole tiles of its layout.
    """

    shape: tuple[int, ...]
    itemsize: int
    in_hbm: bool
    allocated: int

    @property
    def nbytes(self) -> int:
        """Its bytes, without the padding of its layout."""
        return math.prod(self.shape) * self.itemsize


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique in the program.
      opcode: such as `all-gather`.
      arrays: of its result.
      operands: names of other instructions.
      attributes: the rest of the line.
      is_root: whether it is the computation's result.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def operation(self) -> str:
        """The name that JAX gave to what it is for, such as `jit(step)/jvp()/add`, or nothing."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, attribute: str) -> str | None:
        """Returns the computation that an attribute such as `body` names."""
        found = re.search(rf"\b{attribute}=%?([\w.-]+)", self.attributes)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class HloModule:
    """The computations of a program, and which of them is run first.

    Attributes:
      computations: instructions in order, under the computation's name.
      entry: name of the first.
    """

    computations: dict[str, list[Instruction]]
    entry: str

    def entered(self, one: Instruction) -> list[str]:
        """Returns the computations that an instruction runs, one after the other."""
        if one.opcode == "while":
            return [one.called("body") or ""]
        if one.opcode == "conditional":  # as if all were taken: not less than what is
            return _branches(one)
        return [one.called("to_apply") or ""] if one.opcode == "call" else []

    def sequences(self, computation: str | None = None) -> Iterator[list[Instruction]]:
        """Yields each computation that a chip runs, its instructions in order."""
        body = self.computations[computation or self.entry]
        yield body
        for name in itertools.chain(*map(self.entered, body)):
            yield from self.sequences(name)

    @functools.cached_property
    def instructions(self) -> dict[str, Instruction]:
        """All instructions under their names."""
        return {one.name: one for body in self.computations.values() for one in body}

    def executed(self, computation: str | None = None, times: int = 1) -> Iterator[Executed]:
        """Yields the instructions that a chip runs, those inside of loops with their number."""
        for one in self.computations[computation or self.entry]:
            entered = self.entered(one)
            if not entered:
                yield Executed(one, times)
            rounds = (self.trips(one) or 1) if one.opcode == "while" else 1
            for name in entered:
                yield from self.executed(name, times * rounds)

    def loops_of_unknown_length(self) -> int:
        """Returns how many loops are counted as if they ran once."""
        loops = [one for one in self.instructions.values() if one.opcode == "while"]
        return sum(self.trips(loop) is None for loop in loops)

    def trips(self, loop: Instruction) -> int | None:
        """Returns how often a loop runs: of one that counts from 0, its limit; else None."""
        known = re.search(r"known_trip_count[^\d}]*(\d+)", loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[loop.called("condition") or ""]
        root = next(one for one in condition if one.is_root)
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        limit = self.instructions[root.operands[1]]
        value = re.match(r"\((\d+)\)", limit.attributes) if limit.opcode == "constant" else None
        return int(value[1]) if value else None

    def inside(self, one: Instruction) -> Iterator[Instruction]:
        """Yields an instruction, or where it is a fusion, what was fused."""
        fused = one.called("calls") if one.opcode == "fusion" else None
        if fused is None:
            yield one
        else:
            for inner in self.computations[fused]:
                yield from self.inside(inner)


class Executed(NamedTuple):
    """An instruction, and how often it runs in one step."""

    instruction: Instruction
    times: int


def parse(text: str) -> HloModule:
    """Reads `compiled.as_text()`."""
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
    return HloModule(computations, entry)


def _instruction(name: re.Match[str], rest: str) -> Instruction:
    """Reads what follows `%name = `: a type, an opcode, operands, attributes."""
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
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place + 1
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
    """Returns how many elements an array takes, major axis first, of which tiles are whole."""
    sides = [1] * (len(tile) - len(sides)) + list(sides)
    for place, side in enumerate(reversed(tile), start=1):
        sides[-place] = math.ceil(sides[-place] / side) * side
    return math.prod(sides)


def _branches(conditional: Instruction) -> list[str]:
    found = re.search(r"branch_computations=\{([^}]*)\}", conditional.attributes)
    if found:
        return _OPERAND.findall(found[1])
    names = [conditional.called(f"{which}_computation") for which in ("true", "false")]
    return [name for name in names if name]
