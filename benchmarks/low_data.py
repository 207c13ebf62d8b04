"""Measures the papers' claim that a spatial prior helps most where there is little data.

    python -m benchmarks.low_data

Trains `configs/digits.py` for each model, training size and seed, by the very command that a user
types but for 640 steps, and prints the test accuracy after the last step as a table: mean ±
standard error over the seeds. The seed decides the weights, the order and which images are drawn.
"""

from __future__ import annotations

from absl import app

from benchmarks import experiment
from benchmarks.experiment import Records, Variants

MODELS = ("vit", "lvvit", "spvit", "mait")
SIZES = (100, 300, 1297)
STEPS = 640  # training steps of 64 images, whatever the training size

VARIANTS = {
    f"{model}, {size} images": experiment.seeds(f"{model},{size}", steps=STEPS)
    for size in SIZES
    for model in MODELS
}


def table(variants: Variants, records: Records) -> str:
    """Returns the accuracies of all runs as a Markdown table, in percent."""
    lines = ["| images | " + " | ".join(f"`{model}`" for model in MODELS) + " |"]
    lines.append("|---" * (1 + len(MODELS)) + "|")
    for size in SIZES:
        rows = (variants[f"{model}, {size} images"] for model in MODELS)
        cells = [experiment.cell(experiment.accuracies(runs, records)) for runs in rows]
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Runs `python -m benchmarks.low_data`: trains all models, prints and writes the table."""
    del argv
    records = experiment.measure(experiment.make_runner(), VARIANTS)
    experiment.write("low_data", table(VARIANTS, records))


if __name__ == "__main__":
    experiment.define_flags()
    app.run(main)
