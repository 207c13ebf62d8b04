"""Schedules of MaiT's masked heads: which heads of which layers are masked to a neighbourhood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from spvit_jax.errors import InputError

# One of
#   ((layers, heads), ...)  consecutive layers, that many with these heads; together all layers
#   (heads, ...)            each layer by itself
#   "thirds"                all heads in the first third of the layers, one in the next, then none
#   "stages"                all heads in the first two stages of a pyramid, then half of them
# where heads are a number, which means the first ones, or a tuple of heads counted from 0: in two
# layers ((1, (0, 2)), (1, 1)) and ((0, 2), 1) are the same. Entries that all are pairs of numbers
# are the first kind; only where each layer has two heads is the second to be written otherwise.
Heads = int | tuple[int, ...]
MaskSchedule = tuple[int | tuple[int | tuple[int, ...], ...], ...] | Literal["thirds", "stages"]


def masked_per_layer(
    schedule: MaskSchedule | None, num_heads: Sequence[int], layers_per_stage: Sequence[int] = ()
) -> list[tuple[int, ...]]:
    """Returns the masked heads of each layer, in ascending order.

    Args:
      schedule: a schedule, or None, which masks no head.
      num_heads: number of heads of each layer.
      layers_per_stage: number of layers of each stage of a pyramid; () for other models.

    Raises:
      InputError: the schedule has another number of layers, or heads that a layer has not or that
        are named twice.
    """
    depth = len(num_heads)
    if schedule is None:
        return [()] * depth
    if schedule == "thirds":
        third = depth // 3
        entries: list[Heads] = [*num_heads[:third], *[1] * third, *[0] * (depth - 2 * third)]
    elif schedule == "stages":
        if not layers_per_stage:
            raise InputError(
                "masked_heads is 'stages', and the model has none; expected 'thirds' or heads"
            )
        large = sum(layers_per_stage[:2])
        entries = [*num_heads[:large], *(heads // 2 for heads in num_heads[large:])]
    else:
        entries = _entries(schedule, depth)
    return [
        _heads(entry, layer, available, schedule)
        for layer, (entry, available) in enumerate(zip(entries, num_heads, strict=True))
    ]


def _entries(schedule: Any, depth: int) -> list[Heads]:
    """Returns the heads of each layer, as a schedule of either kind has them."""
    by_runs = all(_is_run(entry) for entry in schedule)
    if by_runs and any(count < 0 for count, _ in schedule):
        raise InputError(f"masked_heads {schedule} has a negative number of layers")
    entries = [heads for count, heads in schedule for _ in range(count)] if by_runs else schedule
    if len(entries) == depth:
        return list(entries)
    advice = "the layer counts must add up to the depth"
    if by_runs and len(schedule) == depth:
        advice += "; the heads of one layer are written (1, (0, 2))"
    elif not by_runs:
        advice = "expected heads for each, or pairs (layers, heads)"
    raise InputError(
        f"masked_heads {schedule} covers {len(entries)} layers, the model has {depth}; {advice}"
    )


def _is_run(entry: Any) -> bool:
    return isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], int)


def _heads(entry: Any, layer: int, available: int, schedule: Any) -> tuple[int, ...]:
    """Returns the heads of a layer, which has `available` of them."""
    if isinstance(entry, int):
        if not 0 <= entry <= available:
            raise InputError(
                f"masked_heads {schedule} asks for {entry} masked heads in layer {layer}, which "
                f"has {available}"
            )
        return tuple(range(entry))
    for head in entry:
        if not isinstance(head, int):
            raise InputError(
                f"masked_heads {schedule} has {entry} for layer {layer}; expected a number of "
                "heads or their numbers, for each layer, or pairs (layers, heads) throughout"
            )
        if not 0 <= head < available:
            raise InputError(
                f"masked_heads {schedule} names head {head} in layer {layer}, which has heads 0 to "
                f"{available - 1}"
            )
    if twice := [head for head in entry if entry.count(head) > 1]:
        raise InputError(f"masked_heads {schedule} names head {twice[0]} twice in layer {layer}")
    return tuple(sorted(entry))
