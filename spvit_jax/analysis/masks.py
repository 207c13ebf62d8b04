"""MaiT's choice of masked heads, by how local the attention of a trained model is."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from spvit_jax.analysis.attention import map_grid_per_layer
from spvit_jax.errors import InputError
from spvit_jax.models import ModelConfig
from spvit_jax.models.mask_schedule import MaskSchedule

# "Near 1", "near 0.5" and "near 0" are the nearest of the three.
_LOCAL, _GLOBAL = 0.75, 0.25


def choose_masks(config: ModelConfig, locality: Sequence[np.ndarray]) -> MaskSchedule | None:
    """Returns the schedule of masked heads that MaiT's rule gives (arXiv 2207.03006).

    The paper masks one head of every layer, trains, and measures the attention locality score of
    each layer, here the mean of its heads. Where it is nearest to 1, all heads are masked but those
    whose own score is nearest to 0; where it is nearest to 0.5, one is, here the most local; else
    none. Masks are left out where the neighbourhood spans the grid and they would change nothing.

    Args:
      config: configuration of the model that was measured.
      locality: score [H] of the heads of each layer.

    Returns:
      Runs of (layers, heads), heads by number, as `ModelConfig.masked_heads` takes them; None where
      the neighbourhood spans the grid in all layers.
    """
    spanned = _spanned(config)
    if all(spanned):
        return None
    heads = [
        () if spans else _masked(np.asarray(scores))
        for scores, spans in zip(locality, spanned, strict=True)
    ]
    return tuple((len(list(run)), masked) for masked, run in itertools.groupby(heads))


def check_masks_matter(config: ModelConfig) -> None:
    """Checks that a mask would change some layer of a model.

    Raises:
      InputError: the neighbourhood spans the grid in all layers.
    """
    if all(_spanned(config)):
        rows, columns = (2 * radius + 1 for radius in config.mask_shape)
        h, w = config.grid
        raise InputError(
            f"the neighbourhood of {rows}×{columns} patches spans all that heads can see of the "
            f"{h}×{w} patches, in every layer, so that no mask would change anything; measure at a "
            "larger image_size or with a smaller mask_radius"
        )


def _spanned(config: ModelConfig) -> list[bool]:
    """Returns for each layer whether the neighbourhood of any patch is all that heads can see."""
    return [
        all(side - 1 <= radius for side, radius in zip(grid, config.mask_shape, strict=True))
        for grid in map_grid_per_layer(config)
    ]


def _masked(scores: np.ndarray) -> tuple[int, ...]:
    """Returns the heads to mask in a layer with these scores [H]."""
    if scores.mean() >= _LOCAL:
        return tuple(int(head) for head in np.flatnonzero(scores >= _GLOBAL))
    return (int(scores.argmax()),) if scores.mean() >= _GLOBAL else ()


def as_text(schedule: MaskSchedule) -> str:
    """Returns a schedule as an argument of the command line, for a shell."""
    return f"--config.model.masked_heads='{schedule}'"
