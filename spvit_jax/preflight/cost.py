"""Cost of a compiled program on a chip: multiply-adds of its products, bytes read and written."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np

from spvit_jax.preflight import kernels
from spvit_jax.preflight.hlo import Array, HloModule, Instruction

_PARTS = frozenset({"dynamic-slice", "slice", "gather", "slice-start"})  # read what they return
_WINDOW = frozenset({"stride", "pad", "lhs_dilate", "rhs_dilate"})


class Cost(NamedTuple):
    """Cost of one step on a chip.

    Attributes:
      macs: multiply-adds of products, those of kernels as their authors count them.
      bytes: bytes that instructions read and write, in any memory, with the padding of tiles.
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
    for instruction, times, _ in program.executed():
        cost = instruction_cost(program, instruction)
        times = times if repeat else 1
        macs += times * cost.macs
        everywhere += times * cost.bytes
        in_hbm += times * cost.hbm_bytes
    return Cost(macs, everywhere, in_hbm)


def instruction_cost(program: HloModule, instruction: Instruction) -> Cost:
    """Returns the cost of running one instruction once."""
    macs = sum(_products(program, inner) for inner in program.fused_instructions(instruction))
    moved = _read(program, instruction) + _written(program, instruction)
    everywhere = sum(move.nbytes for move in moved)
    in_hbm = sum(move.nbytes for move in moved if move.in_hbm)
    estimate = kernels.cost_estimate(instruction)
    if estimate is not None:  # a kernel may read an operand more than once
        macs += estimate.flops // 2
        again = max(estimate.bytes - everywhere, 0)
        everywhere, in_hbm = everywhere + again, in_hbm + again
    return Cost(macs, everywhere, in_hbm)


class _Move(NamedTuple):
    """Bytes of an array that are read or written, and whether it is in HBM."""

    nbytes: int
    in_hbm: bool


def _read(program: HloModule, instruction: Instruction) -> list[_Move]:
    """Returns the bytes that an instruction reads of each array of its operands."""
    if instruction.moves_nothing:
        return []
    moves = []
    operands = list(enumerate(instruction.operands))
    if kernels.is_kernel(instruction):
        # It takes an array once for each kind of block; its own estimate says how often it reads.
        arrays = {_array_of(program, name): (index, name) for index, name in operands}
        operands = list(arrays.values())
    for index, name in operands:
        part = _part_read(program, instruction, index)
        moves += [
            _Move(array.allocated if part is None else min(part, array.allocated), array.in_hbm)
            for array in program.instructions[name].arrays
        ]
    return moves


def _array_of(program: HloModule, name: str) -> str:
    """Returns the name of the instruction whose array another one is, by another shape."""
    while program.instructions[name].opcode == "bitcast":
        name = program.instructions[name].operands[0]
    return name


def _written(program: HloModule, instruction: Instruction) -> list[_Move]:
    """Returns the bytes that an instruction writes of each array of its result."""
    if instruction.moves_nothing:
        return []
    if instruction.opcode == "slice-start":  # its first array is what it reads from
        return [_Move(array.allocated, array.in_hbm) for array in instruction.arrays[1:2]]
    if instruction.opcode.endswith("-start"):
        return [_Move(array.allocated, array.in_hbm) for array in instruction.arrays[:1]]
    sizes = _sizes_written(program, instruction)
    return [
        _Move(size, array.in_hbm) for size, array in zip(sizes, instruction.arrays, strict=True)
    ]


def _part_read(program: HloModule, instruction: Instruction, index: int) -> int | None:
    """Returns how many bytes an instruction reads of an operand that is one array; None for all.

    Loops stack the arrays of all iterations in one. An iteration slices its own out of it, or
    updates it there, often within a fusion.
    """
    if instruction.opcode == "dynamic-update-slice" and index == 0:
        return 0
    if instruction.opcode in _PARTS and index == 0:
        return _returned(instruction).allocated
    if (body := program.fused_computation(instruction)) is None:
        return None
    return _part_used(program, body, _parameter(body, index).name)


def _part_used(program: HloModule, body: list[Instruction], name: str) -> int | None:
    """Returns how many bytes a computation reads of one of its arrays; None for all."""
    total = 0
    for user in body:
        if user.name == name and user.is_root:
            return None  # the array is the result: whoever runs the computation reads it
        for index, operand in enumerate(user.operands):
            if operand != name:
                continue
            if _is_view(program, user, index):
                part = _part_used(program, body, user.name)
            else:
                part = _part_read(program, user, index)
            if part is None:
                return None
            total += part
    return total


def _is_view(program: HloModule, instruction: Instruction, index: int) -> bool:
    """Returns whether an instruction's result is one of its operands in another shape.

    It is a bitcast, or a fusion, inside of another one, of nothing but bitcasts.
    """
    if instruction.opcode == "bitcast":
        return True
    if (body := program.fused_computation(instruction)) is None:
        return False
    views = {_parameter(body, index).name}
    for inner in body:
        if views.intersection(inner.operands) and _is_view(program, inner, 0):
            views.add(inner.name)
    return any(inner.is_root and inner.name in views for inner in body)


def _parameter(body: list[Instruction], index: int) -> Instruction:
    return next(
        inner for inner in body if inner.opcode == "parameter" and inner.attributes == f"({index})"
    )


def _sizes_written(program: HloModule, instruction: Instruction) -> list[int]:
    """Returns the bytes written of each array of a result; those of its update if in place."""
    if instruction.opcode == "dynamic-update-slice":
        return [program.instructions[instruction.operands[1]].arrays[0].allocated]
    whole = [array.allocated for array in instruction.arrays]
    if (body := program.fused_computation(instruction)) is None:
        return whole
    root = next(inner for inner in body if inner.is_root)
    results = [root] if root.opcode != "tuple" else [program.instructions[n] for n in root.operands]
    sizes = []
    for result in results:
        while result.opcode == "bitcast":
            result = program.instructions[result.operands[0]]
        if result.opcode == "dynamic-update-slice" or program.fused_computation(result):
            sizes += _sizes_written(program, result)
        else:
            sizes.append(instruction.arrays[len(sizes)].allocated)
    return sizes if len(sizes) == len(whole) else whole


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
