"""Bytes that chips send each other in a step, by kind of collective and axis of the mesh."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import numpy as np

from spvit_jax.preflight.hlo import HloModule, Instruction

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BETWEEN_SLICES = "slices"
Groups = frozenset[frozenset[int]]


@dataclasses.dataclass(frozen=True)
class Collective:
    """All communication of a step of one kind along one axis.

    Attributes:
      kind: collective, such as "all-gather".
      axis: axis of the mesh: "data", "fsdp", "data×fsdp" for both at once, or "other", all within a
        slice; `BETWEEN_SLICES` for what goes to other slices.
      count: number of these collectives in a step.
      sent: bytes that a chip sends in a step, in the ring that needs the least: (n-1)/n of the
        array in a group of n chips, for an all-reduce twice that.
    """

    kind: str
    axis: str
    count: int
    sent: float


def collectives(
    program: HloModule, mesh_shape: dict[str, int], num_slices: int = 1
) -> list[Collective]:
    """Returns the communication of a program, the largest first.

    Args:
      program: a step compiled for a mesh.
      mesh_shape: size of each axis in a slice; partitions are numbered along the last one first.
      num_slices: number of slices, over which the first axis continues.
    """
    totals: dict[tuple[str, str], tuple[int, float]] = {}

    def add(kind: str, axis: str, times: int, nbytes: float) -> None:
        count, sent = totals.get((kind, axis), (0, 0.0))
        totals[kind, axis] = count + times, sent + times * nbytes

    for kind, instruction, times in _found(program):
        groups = _groups(instruction, int(np.prod(list(mesh_shape.values()))))
        size = max((len(group) for group in groups), default=1)
        axis = _axis_of(groups, mesh_shape, pairs=kind == "collective-permute")
        add(kind, axis, times, _sent(kind, instruction, size))
    for instruction, times, _ in program.executed():
        if instruction.opcode == "send" and "xla_megascale_runtime" in instruction.attributes:
            kind, nbytes = _sent_to_slices(instruction, num_slices)
            add(kind, BETWEEN_SLICES, times, nbytes)
    found = [Collective(*key, *value) for key, value in totals.items()]
    return sorted(found, key=lambda collective: -collective.sent)


def _found(program: HloModule) -> Iterator[tuple[str, Instruction, int]]:
    """Yields each collective once, as its kind, its instruction, and the times that it runs.

    A collective that is asynchronous may be spread over several fusions with other
    operations; its pieces have the same channel. A fusion of an all-reduce with a slice of its
    result is a reduce-scatter.
    """
    seen = set()
    for instruction, times, _ in program.executed():
        fused = instruction.opcode == "fusion"
        scatters = fused and (instruction.called("calls") or "").startswith("all-reduce-scatter")
        for inner in program.fused_instructions(instruction):
            kind = inner.opcode.removesuffix("-start")
            if kind not in _KINDS:
                continue
            channel = re.search(r"channel_id=(\d+)", inner.attributes)
            if fused and channel:
                if (kind, channel[1]) in seen:
                    continue
                seen.add((kind, channel[1]))
            yield ("reduce-scatter" if scatters else kind), inner, times


def _sent(kind: str, instruction: Instruction, size: int) -> float:
    """Returns the bytes that a chip in a group of `size` sends for one collective."""
    arrays = [
        array.nbytes for array in instruction.arrays if array.shape or len(instruction.arrays) == 1
    ]
    if instruction.opcode.endswith("-start"):  # (operands, results, flags)
        largest = max(array.nbytes for array in instruction.arrays)
        total = largest if kind != "all-reduce" else sum(arrays)
    else:
        total = sum(arrays)
    fraction = (size - 1) / size
    if kind == "collective-permute":
        return float(total)
    if instruction.opcode == "reduce-scatter":  # its result is a part
        return float(total * (size - 1))
    return total * fraction * (2 if kind == "all-reduce" else 1)


def _sent_to_slices(instruction: Instruction, num_slices: int) -> tuple[str, float]:
    """Returns the kind of an exchange between slices, and the bytes that a chip sends for it.

    The chip hands an array to a runtime that does it; `num_slices` take part.
    """
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    kind = found[1].lower().replace("_", "-") if found else ""
    times = {
        "all-reduce": 2 * (num_slices - 1) / num_slices,
        "reduce-scatter": (num_slices - 1) / num_slices,
        "all-to-all": (num_slices - 1) / num_slices,
        "all-gather": num_slices - 1,
        "one-to-one": 1,
    }
    if kind not in times:
        raise ValueError(
            f"cannot read what is sent to other slices: {instruction.attributes[:300]}"
        )
    return kind, times[kind] * instruction.arrays[0].nbytes


def _groups(instruction: Instruction, chips: int) -> list[list[int]]:
    """Returns the groups of chips of a collective, or the pairs (from, to) of a permutation."""
    text = instruction.attributes
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", text)
    if listed:
        groups = re.findall(r"\{([\d,]+)\}", listed[1])
        return [[int(chip) for chip in group.split(",")] for group in groups]
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        return _iota(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2])).tolist()
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\]"
        r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}",
        text,
    )
    if named and ":" not in named[4]:
        sides = {name: int(side) for name, side in re.findall(r"'([^']+)'=(\d+)", named[1])}
        names, chosen = list(sides), re.findall(r"'([^']+)'", named[4])
        positions = _along(sides, [name for name in names if name in chosen])
        ids = _iota(named[2] or str(chips), named[3]).ravel()
        return [[int(ids[position]) for position in group] for group in positions]
    if "replica_groups={}" in text:
        return [list(range(chips))]
    raise ValueError(
        f"cannot read the groups of {instruction.opcode} {instruction.name}: {text[:300]}"
    )


def _iota(sides: str, order: str | None) -> np.ndarray:
    """Returns the ids of an iota list such as `[2,4]T(1,0)`: those of an array, transposed."""
    shape = [int(side) for side in sides.split(",")]
    axes = [int(axis) for axis in order.split(",")] if order else range(len(shape))
    return np.arange(np.prod(shape)).reshape(shape).transpose(axes)


def _along(sides: dict[str, int], axes: list[str]) -> list[list[int]]:
    """Returns the groups of chips that differ in their coordinates along some axes alone."""
    names = list(sides)
    ids = np.arange(int(np.prod(list(sides.values())))).reshape(list(sides.values()))
    order = [names.index(name) for name in names if name not in axes]
    order += [names.index(name) for name in axes]
    length = int(np.prod([sides[name] for name in axes], dtype=int))
    return ids.transpose(order).reshape(-1, length).tolist()


def _axis_of(groups: list[list[int]], mesh_shape: dict[str, int], *, pairs: bool) -> str:
    """Returns the mesh axis along which groups, or pairs, lie: the smallest that fits."""
    axes = [name for name, side in mesh_shape.items() if side > 1]
    candidates = [[axis] for axis in axes] + ([axes] if len(axes) > 1 else [])
    for candidate in candidates:
        along = [frozenset(group) for group in _along(mesh_shape, candidate)]
        if pairs:
            if all(any(set(pair) <= group for group in along) for pair in groups):
                return "×".join(candidate)
        elif {frozenset(group) for group in groups} == set(along):
            return "×".join(candidate)
    return "other"
