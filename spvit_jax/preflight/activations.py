"""What of the forward pass a train step keeps for the backward pass, read from the program."""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

from spvit_jax.preflight.hlo import HloModule, Instruction

# JAX names what it differentiates `jvp(…)`, and its backward pass `transpose(jvp(…))`.
_FORWARD, _BACKWARD = "jvp(", "transpose("
_INDEX = re.compile(r"\bindex=(\d+)")
_SAME_ARRAYS = frozenset({"tuple", "get-tuple-element", "bitcast", "while"})
# What moves an array in the background: the places of what is read and what is written.
_MOVES = {"copy": (1, 0), "slice": (0, 1)}


class _Buffer(NamedTuple):
    """The piece of memory of one array: which instruction made it, and the place in its result."""

    name: str
    place: int


Buffers = dict[str, tuple[_Buffer, ...]]  # of the arrays of each instruction's result


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
    for time, one in enumerate(body):
        ends |= dict.fromkeys(_read(one, buffers), time)
    changes = [0] * (len(body) + 1)
    starts = {one.name: time for time, one in enumerate(body)}
    for buffer in kept:
        maker = program.instructions[buffer.name]
        array = maker.arrays[buffer.place]
        if array.in_hbm and maker.opcode not in ("parameter", "constant"):
            changes[starts[buffer.name]] += array.allocated
            changes[ends[buffer] + 1] -= array.allocated
    return max(itertools.accumulate(changes))


def _buffers(body: list[Instruction]) -> Buffers:
    """Returns the memory of each instruction's result; loops work on that of their operand."""
    buffers: Buffers = {}
    for one in body:
        own = tuple(_Buffer(one.name, place) for place in range(len(one.arrays)))
        given = tuple(itertools.chain(*(buffers.get(name, ()) for name in one.operands)))
        move, _, stage = one.opcode.rpartition("-")
        if one.opcode == "get-tuple-element":
            first = int(_INDEX.findall(one.attributes)[0])
            own = given[first : first + len(own)]
        elif one.opcode in _SAME_ARRAYS:
            own = given
        elif move in _MOVES:
            source, target = _MOVES[move]
            own = given[target : target + 1] if stage == "done" else _put(own, source, given[0])
        buffers[one.name] = own
    return buffers


def _put(buffers: tuple[_Buffer, ...], place: int, buffer: _Buffer) -> tuple[_Buffer, ...]:
    return (*buffers[:place], buffer, *buffers[place + 1 :])


def _made_forward(body: list[Instruction], buffers: Buffers) -> set[_Buffer]:
    """Returns what the forward pass writes, with the loops in it, and copies of that."""
    made: set[_Buffer] = set()
    for one in body:
        is_forward = _FORWARD in one.operation and _BACKWARD not in one.operation
        is_copy = not (one.operation or _is_view(one)) and not made.isdisjoint(_read(one, buffers))
        if is_forward or is_copy:
            made.update(buffers[one.name])
    return made


def _read_backward(body: list[Instruction], buffers: Buffers) -> set[_Buffer]:
    """Returns what the backward pass reads, and what copies of it were made from."""
    read: set[_Buffer] = set()
    for one in reversed(body):
        is_copied = not one.operation and not read.isdisjoint(buffers[one.name])
        if (_BACKWARD in one.operation or is_copied) and not _is_view(one):
            read |= _read(one, buffers)
    return read


def _is_view(one: Instruction) -> bool:
    """Whether an instruction does nothing but name arrays."""
    return one.opcode in _SAME_ARRAYS - {"while"}


def _read(one: Instruction, buffers: Buffers) -> set[_Buffer]:
    return set(itertools.chain(*(buffers.get(name, ()) for name in one.operands)))
