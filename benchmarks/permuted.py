"""Measures what each model owes to the plane of the image: its patches in a fixed random order.

    python -m benchmarks.permuted

Trains the four models of `configs/digits.py` for 400 steps on images as they are, and on images
whose 6×6 patches are permuted, all alike (`benchmarks/permuted_patches.py`). A model that learns
each patch's place from data loses nothing; what a model loses, it owed to its priors of 2D space.
"""

from __future__ import annotations

from absl import app

from benchmarks import experiment
from benchmarks.experiment import Records

MODELS = {"vit": "deit_ti", "lvvit": "lvvit_t", "spvit": "spvit_s", "mait": "mait_t"}
VARIANTS = {
    **{model: experiment.seeds(model) for model in MODELS},
    **{
        f"{model}, permuted": experiment.seeds(
            model, f"model.name=permuted_{name}", package="benchmarks.permuted_patches"
        )
        for model, name in MODELS.items()
    },
}


def table(records: Records) -> str:
    """Returns the accuracies of all models as a Markdown table, in percent."""
    lines = ["| | as they are | permuted | difference |", "|---|---|---|---|"]
    for model in MODELS:
        runs, permuted = VARIANTS[model], VARIANTS[f"{model}, permuted"]
        cells = [
            f"`{model}`",
            *(experiment.cell(experiment.accuracies(some, records)) for some in (runs, permuted)),
            experiment.cell(experiment.differences(permuted, runs, records), sign=True),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Runs `python -m benchmarks.permuted`: trains all models, prints the table."""
    del argv
    records = experiment.measure(experiment.make_runner(), VARIANTS)
    experiment.write("permuted", table(records))


if __name__ == "__main__":
    experiment.define_flags()
    app.run(main)
