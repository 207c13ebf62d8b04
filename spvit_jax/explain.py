"""Plots the spatial priors and the attention that a checkpoint learned, as PNG and as JSON.

    python -m spvit_jax.explain --config=configs/digits.py --checkpoint=runs/digits --output=DIR

`priors.png` has the learned gain of each SP-SA layer and head as a map over the offset from query
to key, `similarity.png` how much alike the layers' attention is; `explain.json` has the same
numbers, and each head's attention locality score.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from spvit_jax import atomic, cli, compilation_cache, paths
from spvit_jax import plan as plan_lib
from spvit_jax.augment import mix
from spvit_jax.models import Model
from spvit_jax.models.spatial import LocalityMask

matplotlib.use("Agg")

from matplotlib import pyplot as plt


def learned_priors(model: Model) -> dict[int, np.ndarray]:
    """Returns the learned gain [H, 2h-1, 2w-1] per head and offset, for each layer with SP-SA."""
    grids = model.config.grid_per_layer()
    return {
        layer: np.asarray(block.attn.prior.table(block.attn.map_grid(grid)))
        for layer, (block, grid) in enumerate(zip(model.blocks, grids, strict=True))
        if block.attn.prior is not None
    }


def locality_scores(model: Model, images: jax.Array) -> list[np.ndarray]:
    """Returns the attention locality score of each layer and head (MaiT).

    Args:
      model: model in evaluation mode.
      images: normalised images [B, height, width, 3].

    Returns:
      Scores [H] for each layer: the attention inside the model's neighbourhood, averaged over
      queries and images. Prefix tokens count as near: a query's attention to them is local.
      Padding of Swin's windows is no query.
    """
    mask = LocalityMask((), model.config.mask_shape)
    scores = []
    for attention, grid, num_prefix in model.attention_maps(images):
        near = mask.neighbourhood(grid, num_prefix)
        inside = jnp.where(near, attention, 0).sum((0, 2, 3))
        scores.append(np.asarray(inside / attention.any(-1).sum((0, 2))))
    return scores


def layer_similarity(model: Model, images: jax.Array) -> np.ndarray:
    """Returns the cosine similarity of any two layers' attention (MaiT, after arXiv 2103.11886).

    Args:
      model: model in evaluation mode.
      images: normalised images [B, height, width, 3].

    Returns:
      [L, L] float32: the cosine between the weights that a patch gives to all patches in the one
      layer and in the other, averaged over images, heads and patches; 1 on the diagonal. NaN where
      two layers have another grid, other heads or other windows. Prefix tokens, which not all
      layers have, are left out.
    """
    maps = [
        (attention[:, :, num_prefix:, num_prefix:], (grid, getattr(block.attn, "shift", None)))
        for block, (attention, grid, num_prefix) in zip(
            model.blocks, model.attention_maps(images), strict=True
        )
    ]
    norms = [jnp.linalg.norm(rows, axis=-1, keepdims=True) for rows, _ in maps]
    # The rows that are 0 are padding of Swin's windows.
    unit = [rows / jnp.where(norm, norm, 1) for (rows, _), norm in zip(maps, norms, strict=True)]
    similarity = np.full((len(maps), len(maps)), np.nan, np.float32)
    for (a, first), (b, second) in itertools.product(enumerate(unit), repeat=2):
        if maps[a][1] == maps[b][1] and first.shape == second.shape:
            similarity[a, b] = (first * second).sum() / jnp.count_nonzero(norms[a])
    return similarity


def plot_similarity(similarity: np.ndarray, path: epath.Path) -> None:
    """Draws the similarity [L, L] of the layers' attention as a PNG file; NaN is white."""
    side = 3 + 0.15 * len(similarity)
    figure, axis = plt.subplots(figsize=(side + 1, side), layout="constrained")
    image = axis.imshow(similarity, vmin=0, vmax=1, cmap="viridis")
    axis.set(xlabel="layer", ylabel="layer", title="similarity of attention")
    figure.colorbar(image, ax=axis, shrink=0.8, label="cosine")
    with atomic.replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def plot_priors(priors: dict[int, np.ndarray], path: epath.Path) -> None:
    """Draws the learned gains, a row per layer and a column per head, as a PNG file."""
    heads = max(tables.shape[0] for tables in priors.values())  # they double in each stage
    spread = max(float(np.abs(table - 1).max()) for table in priors.values())
    figure, axes = plt.subplots(
        len(priors),
        heads,
        figsize=(2.2 * heads + 1, 2.2 * len(priors) + 0.6),
        squeeze=False,
        layout="constrained",
    )
    for row, (layer, tables) in zip(axes, priors.items(), strict=True):
        for axis in row[len(tables) :]:
            axis.set_axis_off()
        for head, (axis, table) in enumerate(zip(row, tables, strict=False)):
            dy, dx = table.shape[0] // 2, table.shape[1] // 2
            image = axis.imshow(
                table,
                extent=(-dx - 0.5, dx + 0.5, dy + 0.5, -dy - 0.5),
                cmap="RdBu_r",
                vmin=1 - spread,
                vmax=1 + spread,
            )
            axis.set_title(f"layer {layer}, head {head}", fontsize=9)
            axis.tick_params(labelsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("dx in patches", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("dy in patches", fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.8, label="gain G (1 is plain attention)")
    with atomic.replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def explain(
    config: ConfigDict,
    path: epath.Path,
    output: epath.Path,
    *,
    which: str = "best",
    weights: str = "auto",
) -> dict[str, Any]:
    """Writes `explain.json`, `similarity.png` and, with SP-SA, `priors.png` into a folder.

    Args:
      config: fields of `spvit_jax.config.base`; its model must be the checkpoint's.
      path: a workdir of training, one checkpoint in it, or a `.pth` or `.safetensors` file.
      output: folder to write to; created if need be.
      which: checkpoint of a workdir, as in `weights.find`.
      weights: "model", "ema" or "auto", as in `weights.find`.

    Returns:
      The contents of `explain.json`.

    Raises:
      InputError: the configuration, the data or the checkpoint cannot be used.
    """
    plan = plan_lib.evaluation(config, path, which=which, weights=weights)
    model = plan.load().model()
    with plan.batches(min(len(plan.source), config.data.eval_batch_size)) as batches:
        batch = next(batches)
    images = jnp.asarray(batch["image"][batch["mask"] > 0])
    images = mix.normalize(images, config.data.mean, config.data.std)

    priors = learned_priors(model)
    similarity = layer_similarity(model, images)
    result = {
        "layer_similarity": [
            [None if np.isnan(value) else float(value) for value in row] for row in similarity
        ],
        "locality_scores": [scores.tolist() for scores in locality_scores(model, images)],
        "priors": {str(layer): table.tolist() for layer, table in priors.items()},
    }
    output.mkdir(parents=True, exist_ok=True)
    atomic.write_text(output / "explain.json", json.dumps(result) + "\n")
    plot_similarity(similarity, output / "similarity.png")
    if priors:
        plot_priors(priors, output / "priors.png")
    return result


def main() -> None:
    """Runs `python -m spvit_jax.explain`."""
    config = cli.config_flag()
    path = flags.DEFINE_string(
        "checkpoint", None, "Workdir, a checkpoint in it, .pth or .safetensors.", required=True
    )
    output = flags.DEFINE_string(
        "output", None, "Folder for the pictures and the JSON file.", required=True
    )
    weights = cli.weights_flags()

    def run() -> None:
        compilation_cache.start(config().compilation_cache)
        folder = paths.parse_output(output.value)
        result = explain(config(), paths.parse(path.value), folder, **weights())
        print("attention locality score of each head (1: only its neighbourhood)")
        for layer, scores in enumerate(result["locality_scores"]):
            print(f"  layer {layer}: " + "  ".join(f"{score:.2f}" for score in scores))
        print(f"similarity of layers: {folder / 'similarity.png'}")
        if result["priors"]:
            print(f"learned priors: {folder / 'priors.png'}")

    cli.run(run)


if __name__ == "__main__":
    main()
