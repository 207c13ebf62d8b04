"""All pictures of an explanation, each with the words that say what it means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from spvit_jax.analysis import masks
from spvit_jax.analysis.attention import map_grid_per_layer, patch_at
from spvit_jax.analysis.explanation import Explanation
from spvit_jax.analysis.image_maps import ImageMaps
from spvit_jax.analysis.priors import gain_by_distance, prior_cosines
from spvit_jax.drawing import charts, mosaic
from spvit_jax.drawing.mosaic import Mosaic


class Picture(NamedTuple):
    """A drawing and what it means.

    Attributes:
      name: name of its file, without an ending.
      title: what is drawn, in a few words.
      meaning: how to read it, in a sentence or two.
      drawing: the drawing.
      code: command or argument that belongs to it; empty for none.
    """

    name: str
    title: str
    meaning: str
    drawing: Figure | Mosaic
    code: str = ""


class Section(NamedTuple):
    """Pictures of one kind, under a title and a text that introduces them."""

    title: str
    text: str
    pictures: list[Picture]


def gallery(
    explanation: Explanation,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> list[Section]:
    """Draws all that is known of a model's heads.

    Args:
      explanation: the numbers.
      layers: layers whose attention on images is drawn; all if None.
      heads: heads that are drawn there; all if None.
    """
    return [
        _locality(explanation),
        _priors(explanation),
        _similarity(explanation),
        _on_images(explanation, layers, heads),
    ]


def _locality(explanation: Explanation) -> Section:
    config, measures = explanation.config, explanation.measures
    rows, columns = (2 * radius + 1 for radius in config.mask_shape)
    masked = config.masked_per_layer()
    frames = " Frames mark the masked heads of the model." if any(masked) else ""
    if explanation.suggestion is None:
        advice, code = " Here that spans the whole grid, and masks would change nothing.", ""
    else:
        advice = " MaiT's rule makes of these scores a schedule of masked heads:"
        code = masks.as_text(explanation.suggestion)
    tokens = config.grid[0] * config.grid[1]
    pictures = [
        Picture(
            "locality",
            "Attention locality score",
            f"The share of a head's attention that stays within the {rows}×{columns} patches "
            "around the one that looks: 1 for a head that looks nowhere else, near 0 for one that "
            f"looks far away.{frames}{advice}",
            charts.head_scores(measures.locality, "locality score", scale=(0, 1), masked=masked),
            code,
        ),
        Picture(
            "distance",
            "Mean distance of attention",
            "How far away, in pixels, the patches are that a patch attends to, weighted by its "
            "attention. 0 is a head that looks at the patch itself.",
            charts.head_scores(measures.distance, "pixels", masked=masked),
        ),
        Picture(
            "entropy",
            "Entropy of attention",
            "How widely a head spreads its attention, in nats: 0 if a patch looks at one token, "
            f"{math.log(tokens):.2f} if at {tokens} patches alike; e to this power is about the "
            "number of tokens that it looks at.",
            charts.head_scores(measures.entropy, "nats", masked=masked),
        ),
    ]
    text = f"Averages over {measures.num_images} images, a column for each layer."
    return Section("How far each head looks", text, pictures)


def _priors(explanation: Explanation) -> Section:
    title, priors = "What the heads have learned about space", explanation.priors
    if not priors:
        text = "The model has no layer with SP-SA, and so no learned prior to draw."
        return Section(title, text, [])
    pictures = [
        Picture(
            "priors",
            "Learned priors",
            "The factor by which a head multiplies its scores, by where the key lies from the "
            "query, which is in the middle: white is 1, as in plain attention; red weighs the "
            "scores of that direction more, blue less.",
            mosaic.of_priors(priors),
        ),
        Picture(
            "gain_by_distance",
            "Gain by distance",
            "The mean of that factor over all pairs of patches at a distance, a line for each "
            "head. A line that falls is a head that has learned to look nearby.",
            charts.gain_by_distance(gain_by_distance(priors)),
        ),
        Picture(
            "prior_cosines",
            "How complementary the priors are",
            "The cosine between any two heads' priors, each less its mean: 1 for the same shape, "
            "0 for shapes that have nothing in common, −1 where the one is large as the other is "
            "small. Within a layer, values far from 1 are heads that complement one another.",
            charts.prior_cosines(prior_cosines(priors)),
        ),
    ]
    if explanation.trained_priors is not None:
        both = explanation.trained_size, explanation.config.image_shape
        sizes = ["×".join(map(str, size)) for size in both]
        drawing = mosaic.of_priors_side_by_side(
            {sizes[0]: explanation.trained_priors, sizes[1]: priors}
        )
        pictures.append(
            Picture(
                "prior_sizes",
                f"Priors at {sizes[0]} and at {sizes[1]} pixels",
                "The same heads on the grid of training and on that of the images here, on one "
                "scale of colours. Unscaled offsets continue the prior beyond what was trained.",
                drawing,
            )
        )
    text = "Layers with SP-SA, whose heads learn a function of the offset between two patches."
    return Section(title, text, pictures)


def _similarity(explanation: Explanation) -> Section:
    measures = explanation.measures
    picture = Picture(
        "similarity",
        "Similarity of layers",
        "The cosine between what a token attends to in the one layer and in the other, averaged "
        "over heads, tokens and images. Where many layers are alike, depth adds little to where "
        "the model looks. Empty cells cannot be compared: their grids, windows or heads differ.",
        charts.layer_similarity(measures.similarity, measures.prefix_similarity),
    )
    return Section("How alike the layers are", "", [picture])


def _on_images(
    explanation: Explanation, layers: Sequence[int] | None, heads: Sequence[int] | None
) -> Section:
    config = explanation.config
    grids = config.grid_per_layer()
    pictures = []
    for each in explanation.images:
        chosen = range(len(grids)) if layers is None else layers
        for number, (row, column) in enumerate(explanation.queries):
            places = {
                layer: divmod(patch_at(row, column, config.grid, grids[layer]), grids[layer][1])
                for layer in chosen
            }
            drawing = mosaic.of_attention(
                each.pixels,
                {f"layer {layer}": each.patches[layer][number] for layer in chosen},
                queries={f"layer {layer}": place for layer, place in places.items()},
                heads=heads,
            )
            name = f"attention_{each.index}_patch_{row}_{column}"
            title = f"{_describe(explanation, each)}: the patch in row {row}, column {column}"
            meaning = "What the framed patch attends to, head by head."
            pictures.append(Picture(name, title, meaning, drawing))
        # Layers of class attention, behind the others, are always drawn.
        with_token = [i for i in each.class_token if i in chosen or i >= len(grids)]
        if with_token:
            drawing = mosaic.of_attention(
                each.pixels,
                {f"layer {layer}": each.class_token[layer] for layer in with_token},
                heads=heads,
            )
            name, title = f"attention_{each.index}_class", _describe(explanation, each)
            meaning = "What the class token attends to, in the layers that have one."
            pictures.append(Picture(name, f"{title}: the class token", meaning, drawing))
    text = (
        "Each square is one head of one layer, over the image in grey. The brighter a patch, the "
        "more attention it gets; each square has a scale of its own, from nothing to its largest "
        "weight. Rows and columns of patches count from 0, at the top left."
    )
    if config.layers_per_stage():
        text += " In later stages patches are larger; the frame is around the one that holds it."
    if list(map_grid_per_layer(config)) != grids:
        text += " A patch sees its own window alone: outside of it the image is dark."
    return Section("What the heads look at", text, pictures)


def _describe(explanation: Explanation, image: ImageMaps) -> str:
    best = int(image.probabilities.argmax())
    answer = f"predicted {explanation.class_name(best)}, {100 * image.probabilities[best]:.1f}%"
    label = "" if image.label is None else f"class {explanation.class_name(image.label)}, "
    return f"Image {image.index} ({label}{answer})"
