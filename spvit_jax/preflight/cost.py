"""Cost of a compiled program on a chip: multiply-adds of its products, bytes read and written."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np

from spvit_jax.preflight.hlo import Array, HloModule, Instruction

_FREE = frozenset(
    {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional"}
)  # move no data, or their computations are counted
_PARTS = frozenset({"dynamic-slice", "slice", "gather", "slice-start"})  # read what they return
_WINDOW = frozenset({"stride", "pad", "lhs_dilate", "rhs_dilate"})


class Cost(NamedTuple):
    """Cost of one step on a chip.

    Attributes:
      macs: multiply-adds of products.
      bytes: bytes that instructions read and write, in any memory.
      hbm_bytes: bytes that instructions read from HBM and write there.
    """

    macs: int
    bytes: int
    hbm_bytes: int


def count_cost(program: HloModule, *, repeat: bool = True) -> Cost:
    """Returns the cost of a program.

    Args:
      program: a compiled step.
      repeat: whether a loop counts as often as it runs; else once, as in XLA's analysis.
    """
    macs, everywhere, in_hbm = 0, 0, 0
    for instruction, times in program.executed():
        times = times if repeat else 1
        macs += times * sum(
            _products(program, inner) for inner in program.fused_instructions(instruction)
        )
        moved = _read(program, instruction) + _written(program, instruction)
        everywhere += times * sum(move.nbytes for move in moved)
        in_hbm += times * sum(move.nbytes for move in moved if move.in_hbm)
    return Cost(macs, everywhere, in_hbm)


class _Move(NamedTuple):
    """Bytes of an array that are read or written, and whether it is in HBM."""

    nbytes: int
    in_hbm: bool


def _read(program: HloModule, instruction: Instruction) -> list[_Move]:
    """Returns the bytes that an instruction reads of each array of its operands."""
    if _moves_nothing(instruction):
        return []
    moves = []
    for index, name in enumerate(instruction.operands):
        part = _part_read(program, instruction, index)
        moves += [
            _Move(array.nbytes if part is None else min(part, array.nbytes), array.in_hbm)
            for array in program.instructions[name].arrays
        ]
    return moves


def _written(program: HloModule, instruction: Instruction) -> list[_Move]:
    """Returns the bytes that an instruction writes of each array of its result."""
    if _moves_nothing(instruction):
        return []
    if instruction.opcode == "slice-start":  # its first array is what it reads from
        return [_Move(array.nbytes, array.in_hbm) for array in instruction.arrays[1:2]]
    if instruction.opcode.endswith("-start"):
        return [_Move(array.nbytes, array.in_hbm) for array in instruction.arrays[:1]]
    sizes = _sizes_written(program, instruction)
    return [
        _Move(size, array.in_hbm) for size, array in zip(sizes, instruction.arrays, strict=True)
    ]


def _moves_nothing(instruction: Instruction) -> bool:
    return (
        instruction.opcode in _FREE
        or instruction.opcode.endswith("-done")
        or 'custom_call_target="AllocateBuffer"' in instruction.attributes
    )


def _part_read(program: HloModule, instruction: Instruction, index: int) -> int | None:
    """Returns how many bytes an instruction reads of an operand that is one array; None for all.

    Loops stack the arrays of all iterations in one. An iteration slices its own out of it, or
    updates it there, often within a fusion.
    """
    if instruction.opcode == "dynamic-update-slice" and index == 0:
        return 0
    if instruction.opcode in _PARTS and index == 0:
        return _returned(instruction).nbytes
    body = program.computations.get(instruction.called("calls") or "")
    if instruction.opcode != "fusion" or body is None:
        return None
    inner = next(
        inner for inner in body if inner.opcode == "parameter" and inner.attributes == f"({index})"
    )
    return _part_used(program, body, inner.name)


def _part_used(program: HloModule, body: list[Instruction], name: str) -> int | None:
    """Returns how many bytes a computation reads of one of its arrays; None for all."""
    total = 0
    for user in body:
        for index, operand in enumerate(user.operands):
            if operand != name:
                continue
            if user.opcode == "bitcast":
                part = _part_used(program, body, user.name)
            else:
                part = _part_read(program, user, index)
            if part is None:
                return None
            total += part
    return total


def _sizes_written(program: HloModule, instruction: Instruction) -> list[int]:
    """Returns the bytes written of each array of a result; those of its update if in place."""
    if instruction.opcode == "dynamic-update-slice":
        return [program.instructions[instruction.operands[1]].arrays[0].nbytes]
    body = program.computations.get(instruction.called("calls") or "")
    if instruction.opcode != "fusion" or body is None:
        return [array.nbytes for array in instruction.arrays]
    root = next(inner for inner in body if inner.is_root)
    results = [root] if root.opcode != "tuple" else [program.instructions[n] for n in root.operands]
    sizes = []
    for result in results:
        while result.opcode == "bitcast":
            result = program.instructions[result.operands[0]]
        sizes += _sizes_written(program, result)
    return (
        sizes
        if len(sizes) == len(instruction.arrays)
        else [array.nbytes for array in instruction.arrays]
    )


def _returned(instruction: Instruction) -> Array:
    """Returns the result of an instruction that takes a part of an array."""
    return instruction.arrays[1] if instruction.opcode == "slice-start" else instruction.arrays[0]


def _products(program: HloModule, instruction: Instruction) -> int:
    """Returns the multiply-adds of an instruction: 0 unless it is a convolution.

    On TPUs all products are convolutions. The batch of a batched product is a spatial axis there,
    with a window as large as itself in which one position alone is not padding; so only positions
    inside the operand are counted.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if instruction.opcode != "convolution" or labels is None:
        return 0
    left, right = (program.instructions[name].arrays[0].shape for name in instruction.operands[:2])
    result = instruction.arrays[0].shape
    count = result[labels[3].index("b")] * result[labels[3].index("f")]
    count *= right[labels[2].index("i")]
    window = dict(re.findall(r"(\w+)=([\d_x-]+)", instruction.attributes.partition("window={")[2]))
    for axis in range(len(result) - 2):
        name = str(axis)
        count *= _places(
            left[labels[1].index(name)],
            right[labels[2].index(name)],
            result[labels[3].index(name)],
            {key: value.split("x")[axis] for key, value in window.items() if key in _WINDOW},
        )
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    return count // int(groups[1]) if groups else count


def _places(size: int, kernel: int, results: int, window: dict[str, str]) -> int:
    """Returns how often, along one axis, a position of the kernel meets an element of the operand.

    That is the number of results r and positions k of the kernel for which
    stride·r + spread·k - before is a multiple of `apart` from 0 to that of the last element.
    """
    stride, apart, spread = (
        int(window.get(key, 1)) for key in ("stride", "lhs_dilate", "rhs_dilate")
    )
    offset = spread * np.arange(kernel) - int(window.get("pad", "0_0").split("_")[0])
    first = np.maximum(-(offset // stride), 0)
    last = np.minimum(((size - 1) * apart - offset) // stride, results - 1)
    common = math.gcd(stride, apart)
    period = apart // common
    # Among the results from the first to the last, one in `period` meets an element.
    phase = (-(offset // common) * pow(stride // common, -1, period)) % period
    met = (last - phase) // period - (first - 1 - phase) // period
    return int(np.where((offset % common == 0) & (last >= first), met, 0).sum())
