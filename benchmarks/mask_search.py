"""Searches for MaiT's masked heads as its paper does, and compares what is found with other masks.

    python -m benchmarks.mask_search

For each of five seeds: `configs/digits.py:mait` is trained for 400 steps with one masked head in
each layer; the attention locality of its heads is measured over the training images, as
`python -m spvit_jax.explain --suggest_masks --split=train` does; with the masks that the paper's
rule gives a model is trained anew, and so is one with as many masked heads chosen by chance. Prints
the accuracies beside those of other schedules, then what was measured and found.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import app, flags
from etils import epath

from benchmarks import experiment
from benchmarks.runs import Run, Runner
from spvit_jax import config as config_lib
from spvit_jax.explain import suggest_masks
from spvit_jax.models.mask_schedule import masked_per_layer

NUM_HEADS = (3, 3, 3, 3)  # heads of the model's layers
SEARCHED = "one head of each layer"  # the variant that is measured
OTHERS = {
    SEARCHED: experiment.seeds("mait", "model.masked_heads=((4,1),)"),
    "thirds": experiment.seeds("mait", "model.masked_heads=thirds"),
    "none: `vit`": experiment.seeds("vit"),
}

Found = dict[str, Any]  # "locality", the score [H] of each layer, and "masked", heads of each


def search(runner: Runner, run: Run) -> Found:
    """Measures how local the heads of a run's model are, and returns the masks that follow."""
    folder = epath.Path(runner.trained(run).absolute())
    recorded = config_lib.find_recorded(folder)
    assert recorded is not None  # as training has written it
    config = config_lib.from_json(recorded)
    suggestion = suggest_masks(config, folder, which="last", split="train")
    return {
        "locality": [[round(float(score), 4) for score in layer] for layer in suggestion.locality],
        "masked": masked_per_layer(suggestion.schedule, NUM_HEADS),
    }


def by_chance(found: Found, seed: int) -> list[list[int]]:
    """Returns the heads of each layer, as many in all as were found, chosen by chance."""
    places = [(layer, head) for layer, heads in enumerate(NUM_HEADS) for head in range(heads)]
    number = sum(map(len, found["masked"]))
    chosen = np.random.default_rng(seed).choice(len(places), number, replace=False)
    chance = {places[index] for index in chosen}
    return [
        [head for head in range(heads) if (layer, head) in chance]
        for layer, heads in enumerate(NUM_HEADS)
    ]


def masked(masked_heads: list[list[int]], seed: int) -> Run:
    """Returns the run of a model with these masked heads of each layer."""
    schedule = tuple((1, tuple(heads)) for heads in masked_heads)
    changes = (f"model.masked_heads={schedule}".replace(" ", ""),)
    return Run("mait", seed, experiment.SHORT, changes)


def searches(found: Mapping[str, Found]) -> str:
    """Returns what was measured and found as a Markdown table."""
    lines = [
        "| seed | locality of the heads, by layer | masked heads found | by chance |",
        "|---|---|---|---|",
    ]
    for seed, search in sorted(found.items()):
        locality = " · ".join(
            " ".join(f"{score:.2f}" for score in layer) for layer in search["locality"]
        )
        schedules = (search["masked"], by_chance(search, int(seed)))
        texts = [
            " · ".join(" ".join(map(str, heads)) or "–" for heads in schedule)
            for schedule in schedules
        ]
        lines.append(f"| {' | '.join([seed, locality, *texts])} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Runs `python -m benchmarks.mask_search`: searches, trains all variants, prints two tables."""
    del argv
    runner, path = experiment.make_runner(), pathlib.Path(flags.FLAGS.found)
    found: dict[str, Found] = json.loads(path.read_text()) if path.exists() else {}
    for run in runner.measure(OTHERS[SEARCHED]):
        if str(run.seed) not in found:
            found[str(run.seed)] = search(runner, run)
            path.write_text(json.dumps(found, indent=1) + "\n")
    variants = {
        "found": [masked(search["masked"], int(seed)) for seed, search in found.items()],
        "as many, by chance": [
            masked(by_chance(search, int(seed)), int(seed)) for seed, search in found.items()
        ],
        **OTHERS,
    }
    records = experiment.measure(runner, variants)
    table = experiment.table(variants, records, "found", "masked heads")
    experiment.write("mask_search", f"{table}\n\n{searches(found)}")


if __name__ == "__main__":
    experiment.define_flags()
    flags.DEFINE_string("found", "docs/claims/masks.json", "File of what was measured and found.")
    app.run(main)
