"""Bytes of activations that a compiled train step keeps for its backward pass."""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

from spvit_jax.preflight.hlo import HloModule, Instruction

# JAX names what it differentiates `jvp(…)`, and its backward pass `transpose(jvp(…))`.
_FORWARD, _BACKWARD = "jvp(", "transpose("
_INDEX = re.compile(r"\bindex=(\d+)")
_SAME_ARRAYS = frozenset({"tuple", "get-tuple-element", "bitcast", "while"})
# Asynchronous copies (`…-start`): indices in the result of the array read and of that written.
_MOVES = {"copy": (1, 0), "slice": (0, 1)}


class _Buffer(NamedTuple):
    """Memory of one array: the instruction that made it, and the array's index in its result."""

    name: str
    output_index: int


Buffers = dict[
    str, tuple[_Buffer, ...]
]  # by the name of the instruction that has the arrays as result


def kept_bytes(program: HloModule) -> int:
    """Returns the bytes of HBM of activations: the most that is kept at one time.

    Activations are arrays that the forward pass makes and the backward pass reads. Each lives from
    the instruction that makes it to the last that reads it, in the order in which they run.
    """
    return max(_kept_bytes(program, body) for body in program.sequences())


def _kept_bytes(program: HloModule, body: list[Instruction]) -> int:
    buffers = _buffers(body)
    kept = _made_forward(body, buffers) & _read_backward(body, buffers)
    ends: dict[_Buffer, int] = {}
    for time, instruction in enumerate(body):
        ends |= dict.fromkeys(_read(instruction, buffers), time)
    changes = [0] * (len(body) + 1)
    starts = {instruction.name: time for time, instruction in enumerate(body)}
    for buffer in kept:
        maker = program.instructions[buffer.name]
        array = maker.arrays[buffer.output_index]
        if array.in_hbm and maker.opcode not in ("parameter", "constant"):
            changes[starts[buffer.name]] += array.allocated
            changes[ends[buffer] + 1] -= array.allocated
    return max(itertools.accumulate(changes))


def _buffers(body: list[Instruction]) -> Buffers:
    """Returns the buffers of each instruction's result; loops update those of their operand."""
    buffers: Buffers = {}
    for instruction in body:
        own = tuple(_Buffer(instruction.name, index) for index in range(len(instruction.arrays)))
        given = tuple(itertools.chain(*(buffers.get(name, ()) for name in instruction.operands)))
        move, _, stage = instruction.opcode.rpartition("-")
        if instruction.opcode == "get-tuple-element":
            first = int(_INDEX.findall(instruction.attributes)[0])
            own = given[first : first + len(own)]
        elif instruction.opcode in _SAME_ARRAYS:
            own = given
        elif move in _MOVES:
            source, target = _MOVES[move]
            own = given[target : target + 1] if stage == "done" else _put(own, source, given[0])
        buffers[instruction.name] = own
    return buffers


def _put(buffers: tuple[_Buffer, ...], index: int, buffer: _Buffer) -> tuple[_Buffer, ...]:
    return (*buffers[:index], buffer, *buffers[index + 1 :])


def _made_forward(body: list[Instruction], buffers: Buffers) -> set[_Buffer]:
    """Returns the buffers that the forward pass writes, its loops included, and copies of them."""
    made: set[_Buffer] = set()
    for instruction in body:
        is_forward = _FORWARD in instruction.operation and _BACKWARD not in instruction.operation
        is_copy = not (instruction.operation or _is_view(instruction)) and not made.isdisjoint(
            _read(instruction, buffers)
        )
        if is_forward or is_copy:
            made.update(buffers[instruction.name])
    return made


def _read_backward(body: list[Instruction], buffers: Buffers) -> set[_Buffer]:
    """Returns the buffers that the backward pass reads, and those that they are copies of."""
    read: set[_Buffer] = set()
    for instruction in reversed(body):
        is_copied = not instruction.operation and not read.isdisjoint(buffers[instruction.name])
        if (_BACKWARD in instruction.operation or is_copied) and not _is_view(instruction):
            read |= _read(instruction, buffers)
    return read


def _is_view(instruction: Instruction) -> bool:
    """Returns whether an instruction only refers to arrays of its operands."""
    return instruction.opcode in _SAME_ARRAYS - {"while"}


def _read(instruction: Instruction, buffers: Buffers) -> set[_Buffer]:
    return set(itertools.chain(*(buffers.get(name, ()) for name in instruction.operands)))
