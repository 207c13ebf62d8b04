"""Learned spatial priors (SP-SA) as numbers: their gains, how alike they are, how far they reach.

Gains are compared as they act, over all pairs of patches: an offset counts as often as the grid
has pairs with it, and the farthest, which only two corners have, once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from spvit_jax.analysis.attention import map_grid_per_layer
from spvit_jax.models import Model, ModelConfig
from spvit_jax.models.spatial import offsets

Priors = Mapping[int, np.ndarray]  # gain [H, 2h-1, 2w-1] by offset, of each layer that has one


class PriorCosines(NamedTuple):
    """Cosines between the learned priors of all heads.

    Attributes:
      heads: (layer, head) of each prior.
      cosines: [T, T] float64 between the priors, each less its mean over pairs: 1 where two have
        the same shape, 0 where they have nothing in common, -1 where one is large where the other
        is small. NaN where a prior is the same everywhere, or two have other grids.
      within_layer: mean of the absolute cosines between the heads of a layer, by layer; NaN where
        there are none.
      between_layers: mean [L, L] of the absolute cosines between the heads of two layers.
    """

    heads: list[tuple[int, int]]
    cosines: np.ndarray
    within_layer: dict[int, float]
    between_layers: np.ndarray


def learned_priors(model: Model, config: ModelConfig | None = None) -> dict[int, np.ndarray]:
    """Returns the learned gain [H, 2h-1, 2w-1] per head and offset, for each layer with SP-SA.

    Args:
      model: the model.
      config: configuration of the same model at another image size, whose grids to take.
    """
    grids = map_grid_per_layer(model.config if config is None else config)
    tables = {
        layer: block.attn.prior.table(grid)
        for layer, (block, grid) in enumerate(zip(model.blocks, grids, strict=True))
        if block.attn.prior is not None
    }
    return jax.device_get(tables)


def prior_cosines(priors: Priors) -> PriorCosines:
    """Returns the cosines between all heads' priors; there is at least one layer."""
    heads = [(layer, head) for layer, table in priors.items() for head in range(len(table))]
    cosines = np.full((len(heads), len(heads)), np.nan)
    shapes = {table.shape[1:] for table in priors.values()}
    for shape in shapes:
        group = [i for i, (layer, _) in enumerate(heads) if priors[layer].shape[1:] == shape]
        rows = np.stack([priors[heads[i][0]][heads[i][1]] for i in group]).astype(np.float64)
        cosines[np.ix_(group, group)] = _centred_cosines(rows, num_pairs(shape))
    of_layer = {layer: [i for i, head in enumerate(heads) if head[0] == layer] for layer in priors}
    within = {
        layer: _mean(np.abs(cosines[np.ix_(own, own)])[~np.eye(len(own), dtype=bool)])
        for layer, own in of_layer.items()
    }
    between = [
        [_mean(np.abs(cosines[np.ix_(a, b)]).ravel()) for b in of_layer.values()]
        for a in of_layer.values()
    ]
    return PriorCosines(heads, cosines, within, np.array(between))


def gain_by_distance(priors: Priors) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Returns the mean gain of the pairs of patches at each distance, for each layer.

    Returns:
      Distances [K], in patches and rounded to whole ones, and gains [H, K], by layer.
    """
    profiles = {}
    for layer, table in priors.items():
        shape = table.shape[1:]
        grid = (shape[0] + 1) // 2, (shape[1] + 1) // 2
        rounded = np.rint(np.linalg.norm(offsets(grid), axis=-1)).astype(int)
        distances = np.unique(rounded)
        pairs = num_pairs(shape)
        gains = [
            (table * pairs)[:, rounded == each].sum(-1) / pairs[rounded == each].sum()
            for each in distances
        ]
        profiles[layer] = distances, np.stack(gains, axis=-1)
    return profiles


def num_pairs(shape: tuple[int, ...]) -> np.ndarray:
    """Returns for each offset of a table [2h-1, 2w-1] the number of pairs of patches with it."""
    rows, columns = ((side + 1) // 2 - np.abs(np.arange(side) - side // 2) for side in shape)
    return np.outer(rows, columns)


def _centred_cosines(rows: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Returns the cosines [T, T] between tables [T, …], each less its mean, by pairs of patches."""
    share = pairs / pairs.sum()
    centred = rows - (rows * share).sum((1, 2), keepdims=True)
    products = np.einsum("ayx,byx,yx->ab", centred, centred, share)
    norms = np.sqrt(np.diag(products))
    norms[norms < 1e-6] = np.nan  # the same everywhere, up to float32
    return products / np.outer(norms, norms)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
