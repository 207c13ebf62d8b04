"""What a compiled program does on a chip: its products, and what it reads and writes."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np

from spvit_jax.preflight.hlo import Array, HloModule, Instruction

_FREE = frozenset(
    {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional"}
)  # what moves no data, or is counted inside
_PARTS = frozenset({"dynamic-slice", "slice", "gather", "slice-start"})  # read what they return
_WINDOW = frozenset({"stride", "pad", "lhs_dilate", "rhs_dilate"})


class Cost(NamedTuple):
    """What a chip does in one step, loops included.

    Attributes:
      macs: multiply-adds of products.
      bytes: read and written by instructions, wherever the operands lie.
      hbm_bytes: those of them that lie in HBM.
    """

    macs: int
    bytes: int
    hbm_bytes: int


def count_cost(program: HloModule, *, repeat: bool = True) -> Cost:
    """Counts what a program does; without `repeat` a loop counts once, as in XLA's analysis."""
    macs, everywhere, in_hbm = 0, 0, 0
    for one, times in program.executed():
        times = times if repeat else 1
        macs += times * sum(_products(program, inner) for inner in program.inside(one))
        moved = _read(program, one) + _written(program, one)
        everywhere += times * sum(move.nbytes for move in moved)
        in_hbm += times * sum(move.nbytes for move in moved if move.in_hbm)
    return Cost(macs, everywhere, in_hbm)


class _Move(NamedTuple):
    """Bytes that are read or written, and whether they lie in HBM."""

    nbytes: int
    in_hbm: bool


def _read(program: HloModule, one: Instruction) -> list[_Move]:
    """Returns what an instruction reads of each array of its operands."""
    if _moves_nothing(one):
        return []
    moves = []
    for place, name in enumerate(one.operands):
        part = _part_read(program, one, place)
        moves += [
            _Move(array.nbytes if part is None else min(part, array.nbytes), array.in_hbm)
            for array in program.instructions[name].arrays
        ]
    return moves


def _written(program: HloModule, one: Instruction) -> list[_Move]:
    """Returns what an instruction writes of each array of its result."""
    if _moves_nothing(one):
        return []
    if one.opcode == "slice-start":  # its first array is what it reads from
        return [_Move(array.nbytes, array.in_hbm) for array in one.arrays[1:2]]
    if one.opcode.endswith("-start"):
        return [_Move(array.nbytes, array.in_hbm) for array in one.arrays[:1]]
    sizes = _sizes_written(program, one)
    return [_Move(size, array.in_hbm) for size, array in zip(sizes, one.arrays, strict=True)]


def _moves_nothing(one: Instruction) -> bool:
    return (
        one.opcode in _FREE
        or one.opcode.endswith("-done")
        or 'custom_call_target="AllocateBuffer"' in one.attributes
    )


def _part_read(program: HloModule, one: Instruction, place: int) -> int | None:
    """Returns how many bytes are read of an operand that is one array; None: all.

    Loops keep the arrays of all rounds in one. A round takes its own out of it, or puts it in,
    often within a fusion.
    """
    if one.opcode == "dynamic-update-slice" and place == 0:
        return 0
    if one.opcode in _PARTS and place == 0:
        return _returned(one).nbytes
    body = program.computations.get(one.called("calls") or "")
    if one.opcode != "fusion" or body is None:
        return None
    inner = next(
        inner for inner in body if inner.opcode == "parameter" and inner.attributes == f"({place})"
    )
    return _part_used(program, body, inner.name)


def _part_used(program: HloModule, body: list[Instruction], name: str) -> int | None:
    """Returns how many bytes a computation uses of one of its arrays; None: all."""
    total = 0
    for user in body:
        for place, operand in enumerate(user.operands):
            if operand != name:
                continue
            if user.opcode == "bitcast":
                part = _part_used(program, body, user.name)
            else:
                part = _part_read(program, user, place)
            if part is None:
                return None
            total += part
    return total


def _sizes_written(program: HloModule, one: Instruction) -> list[int]:
    """Returns the bytes written of each array of a result; an update in place is as its update."""
    if one.opcode == "dynamic-update-slice":
        return [program.instructions[one.operands[1]].arrays[0].nbytes]
    body = program.computations.get(one.called("calls") or "")
    if one.opcode != "fusion" or body is None:
        return [array.nbytes for array in one.arrays]
    root = next(inner for inner in body if inner.is_root)
    results = [root] if root.opcode != "tuple" else [program.instructions[n] for n in root.operands]
    sizes = []
    for result in results:
        while result.opcode == "bitcast":
            result = program.instructions[result.operands[0]]
        sizes += _sizes_written(program, result)
    return sizes if len(sizes) == len(one.arrays) else [array.nbytes for array in one.arrays]


def _returned(one: Instruction) -> Array:
    """Returns the array that a part of another becomes."""
    return one.arrays[1] if one.opcode == "slice-start" else one.arrays[0]


def _products(program: HloModule, one: Instruction) -> int:
    """Returns the multiply-adds of a product; on TPUs all of them are convolutions.

    The batch of a batched product is a spatial axis there, with a window as large as itself in
    which one place alone is not padding; so only places inside the operand are counted.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    if one.opcode != "convolution" or labels is None:
        return 0
    left, right = (program.instructions[name].arrays[0].shape for name in one.operands[:2])
    result = one.arrays[0].shape
    count = result[labels[3].index("b")] * result[labels[3].index("f")]
    count *= right[labels[2].index("i")]
    window = dict(re.findall(r"(\w+)=([\d_x-]+)", one.attributes.partition("window={")[2]))
    for axis in range(len(result) - 2):
        name = str(axis)
        count *= _places(
            left[labels[1].index(name)],
            right[labels[2].index(name)],
            result[labels[3].index(name)],
            {key: value.split("x")[axis] for key, value in window.items() if key in _WINDOW},
        )
    groups = re.search(r"batch_group_count=(\d+)", one.attributes)
    return count // int(groups[1]) if groups else count


def _places(size: int, kernel: int, results: int, window: dict[str, str]) -> int:
    """Returns how often, along one axis, a place of the kernel meets one of the operand.

    That is, for how many results r and places k of the kernel stride·r + spread·k - before is a
    multiple of `apart` from 0 to that of the last element.
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
