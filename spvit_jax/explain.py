"""Shows what the heads of trained weights do: pictures, their numbers, and a page with all of it.

    python -m spvit_jax.explain --config=configs/digits.py --checkpoint=runs/digits --output=DIR
    python -m spvit_jax.explain --checkpoint=runs/digits --suggest_masks

The first writes `explain.html`, which needs no network, each of its pictures as PNG, and the
numbers as `explain.json` and `attention.json`: what heads attend to on images, how far they look,
what SP-SA has learned about space, and how alike layers are. The second prints which heads to mask
by MaiT's rule, from their attention on a whole split.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from spvit_jax import atomic, cli, compilation_cache, logs, page, paths
from spvit_jax import plan as plan_lib
from spvit_jax.analysis import masks
from spvit_jax.analysis.attention import check_has_attention
from spvit_jax.analysis.explanation import Explanation
from spvit_jax.analysis.image_maps import ImageMaps, Query, image_maps
from spvit_jax.analysis.measures import Measures, Normalize, images_per_step, measure
from spvit_jax.analysis.priors import learned_priors
from spvit_jax.analysis.selection import (
    check_numbers,
    check_queries,
    default_queries,
    evenly,
    parse_numbers,
    parse_queries,
)
from spvit_jax.augment import mix
from spvit_jax.data.sources import Subset
from spvit_jax.drawing.gallery import Section, gallery
from spvit_jax.drawing.mosaic import Mosaic, figure_of
from spvit_jax.drawing.style import write_png
from spvit_jax.errors import InputError, writing
from spvit_jax.models.complexity import count_parameters
from spvit_jax.models.mask_schedule import MaskSchedule
from spvit_jax.plan import EvaluationPlan
from spvit_jax.training import sharding
from spvit_jax.training.state import Variables

_NUM_IMAGES, _NUM_SHOWN = 256, 4  # by default


class MaskSuggestion(NamedTuple):
    """Masked heads that MaiT's rule gives for trained weights.

    Attributes:
      schedule: runs of (layers, heads), as `ModelConfig.masked_heads` takes them.
      locality: attention locality score [H] of each layer.
      num_images: number of images that the score is averaged over.
    """

    schedule: MaskSchedule
    locality: list[np.ndarray]
    num_images: int


def suggest_masks(
    config: ConfigDict,
    path: epath.Path,
    *,
    which: str = "best",
    weights: str = "auto",
    split: str | None = None,
    num_images: int | None = None,
) -> MaskSuggestion:
    """Suggests masked heads by how local the attention of trained weights is over a split (MaiT).

    Args:
      config: fields of `spvit_jax.config.base`; its model must be that of the weights.
      path: file or folder of the weights, as in `weights.find`.
      which: checkpoint of a workdir, as in `weights.find`.
      weights: "model", "ema" or "auto", as in `weights.find`.
      split: split of the data set; the configuration's `data.eval_split` if None.
      num_images: number of images to measure on, evenly from the split; all if None.

    Raises:
      InputError: the configuration, the data or the weights cannot be used; the model has no
        attention among patches, or no mask would change it.
    """
    plan = plan_lib.evaluation(config, path, which=which, weights=weights, split=split)
    check_has_attention(plan.model.abstract())
    masks.check_masks_matter(plan.model)
    chosen = evenly(len(plan.source), num_images)
    measures = measure_attention(plan, plan.load(), chosen)
    schedule = masks.choose_masks(plan.model, measures.locality)
    assert schedule is not None  # as checked
    return MaskSuggestion(schedule, measures.locality, measures.num_images)


def measure_attention(plan: EvaluationPlan, variables: Variables, indices: np.ndarray) -> Measures:
    """Measures attention on images of a plan's split, by their indices in it."""
    plan, size = _part(plan, indices)
    with (
        plan.batches(size) as batches,
        logs.Progress("attention", -(-len(indices) // size), "batch") as progress,
    ):
        return measure(variables, batches, plan.mesh, _normalize(plan), progress=progress.advance)


def maps_on_images(
    plan: EvaluationPlan, variables: Variables, indices: np.ndarray, queries: Sequence[Query]
) -> list[ImageMaps]:
    """Returns attention on images of a plan's split, by their indices in it."""
    part, size = _part(plan, indices)
    with part.batches(size) as batches:
        found = image_maps(variables, batches, plan.mesh, _normalize(plan), queries)
    return [dataclasses.replace(each, index=int(indices[each.index])) for each in found]


def explain(
    config: ConfigDict,
    path: epath.Path,
    output: epath.Path,
    *,
    which: str = "best",
    weights: str = "auto",
    split: str | None = None,
    num_images: int | None = None,
    shown: Sequence[int] | None = None,
    queries: Sequence[Query] | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Writes what the heads of trained weights do into a folder: page, pictures and numbers.

    Args:
      config: fields of `spvit_jax.config.base`; its model must be that of the weights.
      path: file or folder of the weights, as in `weights.find`.
      output: folder to write to; created if need be.
      which: checkpoint of a workdir, as in `weights.find`.
      weights: "model", "ema" or "auto", as in `weights.find`.
      split: split of the data set; the configuration's `data.eval_split` if None.
      num_images: number of images that measures are averaged over, evenly from the split; by
        default 256, or all where there are fewer.
      shown: indices in the split of the images on which attention is drawn; by default four.
      queries: patches whose attention is drawn, (row, column) in the first layer's grid; by default
        one in the middle and one above it to the left.
      layers: layers whose attention on images is drawn; all if None.
      heads: heads that are drawn there; all if None.

    Returns:
      The contents of `explain.json`.

    Raises:
      InputError: the configuration, the data or the weights cannot be used; there is no such image,
        patch, layer or head.
    """
    plan = plan_lib.evaluation(config, path, which=which, weights=weights, split=split)
    check_has_attention(plan.model.abstract())
    total, model = len(plan.source), plan.model
    measured = evenly(total, min(_NUM_IMAGES, total) if num_images is None else num_images)
    shown = evenly(total, min(_NUM_SHOWN, total)).tolist() if shown is None else shown
    check_numbers("image", shown, total, "the split")
    num_heads = model.heads_per_layer()
    check_numbers("layer", layers or (), len(num_heads), "the model")
    drawn = num_heads if layers is None else [num_heads[layer] for layer in layers]
    check_numbers("head", heads or (), max(drawn), "the largest layer that is drawn")
    queries = default_queries(model) if queries is None else queries
    check_queries(queries, model)

    variables = plan.load()
    measures = measure_attention(plan, variables, measured)
    priors = learned_priors(variables.model())
    trained = plan.weights.config
    explanation = Explanation(
        name=config.model.name,
        origin=plan.weights.where,
        split=f"{config.data.dataset}, {split or config.data.eval_split}",
        config=model,
        measures=measures,
        priors=priors,
        trained_priors=learned_priors(variables.model(), trained)
        if priors and trained.image_shape != model.image_shape
        else None,
        trained_size=trained.image_shape,
        suggestion=masks.choose_masks(model, measures.locality),
        queries=tuple(queries),
        images=maps_on_images(plan, variables, np.array(shown, np.int64), queries),
        class_names=plan.source.class_names,
    )
    numbers = explanation.numbers()
    sections = gallery(explanation, layers=layers, heads=heads)
    output.mkdir(parents=True, exist_ok=True)
    _write_json(output / "explain.json", numbers)
    _write_json(output / "attention.json", explanation.maps())
    for picture in (picture for section in sections for picture in section.pictures):
        drawing = picture.drawing
        figure = figure_of(drawing, picture.title) if isinstance(drawing, Mosaic) else drawing
        write_png(figure, output / f"{picture.name}.png")
    with writing(output / "explain.html"):
        atomic.write_text(output / "explain.html", _page(explanation, sections))
    return numbers


def _part(plan: EvaluationPlan, indices: np.ndarray) -> tuple[EvaluationPlan, int]:
    """Returns a plan with some examples alone, and the batch size whose attention fits."""
    size = min(len(indices), plan.mesh.size * images_per_step(plan.model))
    part = dataclasses.replace(plan, source=Subset(plan.source, indices))
    return part, sharding.round_up(size, plan.mesh)


def _normalize(plan: EvaluationPlan) -> Normalize:
    data = plan.config.data
    return functools.partial(mix.normalize, mean=data.mean, std=data.std)


def _page(explanation: Explanation, sections: list[Section]) -> str:
    """Returns the page of an explanation as HTML."""
    config, height_width = explanation.config, explanation.config.image_shape
    grids = dict.fromkeys("×".join(map(str, grid)) for grid in config.grid_per_layer())
    heads = dict.fromkeys(map(str, config.heads_per_layer()))
    facts = {
        "weights": explanation.origin,
        "images": f"{explanation.measures.num_images} of {explanation.split}",
        "image size": "×".join(map(str, height_width)),
        "patches": ", ".join(grids),
        "layers": str(len(config.heads_per_layer())),
        "heads": ", ".join(heads),
        "parameters": f"{count_parameters(config):,}",
    }
    footer = (
        "The same pictures are beside this page as PNG files, and their numbers in explain.json "
        "and attention.json."
    )
    return page.render(f"What the heads of {explanation.name} do", facts, sections, footer)


def _write_json(path: epath.Path, numbers: dict[str, Any]) -> None:
    with writing(path):
        atomic.write_text(path, json.dumps(numbers) + "\n")


def _print_scores(locality: Sequence[Sequence[float]], num_images: int) -> None:
    print(f"attention locality score of each head (1: only its neighbourhood), {num_images} images")
    for layer, scores in enumerate(locality):
        print(f"  layer {layer}: " + "  ".join(f"{score:.2f}" for score in scores))


def main() -> None:
    """Defines the flags and runs the command."""
    config = cli.config_flag()
    path = flags.DEFINE_string(
        "checkpoint", None, "Workdir, file or hf:OWNER/REPO of the weights.", required=True
    )
    output = flags.DEFINE_string("output", None, "Folder for the page, pictures and numbers.")
    suggest = flags.DEFINE_bool(
        "suggest_masks", False, "Print which heads to mask by MaiT's rule, and draw nothing."
    )
    split = flags.DEFINE_string("split", None, "Split of the data set; default data.eval_split.")
    images = flags.DEFINE_integer(
        "images",
        None,
        f"Images to measure on, evenly from the split; default {_NUM_IMAGES}, or all to suggest "
        "masks.",
    )
    shown = flags.DEFINE_list(
        "shown", None, "Images to draw attention on, by number in the split; default four."
    )
    queries = flags.DEFINE_string(
        "queries", None, "Patches whose attention is drawn, by row and column: '3,5;7,7'."
    )
    layers = flags.DEFINE_list("layers", None, "Layers to draw on images; default all.")
    heads = flags.DEFINE_list("heads", None, "Heads to draw on images; default all.")
    weights = cli.weights_flags()

    def numbers(flag: flags.FlagHolder[list[str] | None]) -> tuple[int, ...] | None:
        return None if flag.value is None else parse_numbers(flag.name, flag.value)

    def run() -> None:
        compilation_cache.start(config().compilation_cache)
        checkpoint = paths.parse(path.value)
        chosen: dict[str, Any] = {"split": split.value, "num_images": images.value, **weights()}
        if suggest.value:
            suggestion = suggest_masks(config(), checkpoint, **chosen)
            _print_scores([each.tolist() for each in suggestion.locality], suggestion.num_images)
            print(masks.as_text(suggestion.schedule))
            return
        if output.value is None:
            raise InputError("--output must be given, or --suggest_masks; --help shows an example")
        folder = paths.parse_output(output.value)
        result = explain(
            config(),
            checkpoint,
            folder,
            shown=numbers(shown),
            queries=None if queries.value is None else parse_queries(queries.value),
            layers=numbers(layers),
            heads=numbers(heads),
            **chosen,
        )
        _print_scores(result["locality_scores"], result["num_images"])
        if result["priors"]:
            print(f"learned priors: {folder / 'priors.png'}")
        print(f"all pictures on one page: {folder / 'explain.html'}")

    cli.run(run)


if __name__ == "__main__":
    main()
