"""Measures the papers' claim that a spatial prior helps most where there is little data.

    python -m benchmarks.low_data --output=runs/low_data

Trains `configs/digits.py` for each model, training size and seed, by the very command that a user
types but for 640 steps, and prints the test accuracy after the last step as a table: mean ±
standard error over the seeds. The seed decides the weights, the order and which images are drawn.
Runs that are complete are not repeated.
"""

from __future__ import annotations

import functools
import itertools
import json
import pathlib

from absl import app, flags

from benchmarks import runs

MODELS = ("vit", "lvvit", "spvit", "mait")
SIZES = (100, 300, 1297)
SEEDS = (0, 1, 2, 3, 4)
STEPS = 640  # training steps of 64 images, whatever the training size

Run = tuple[str, int, int]  # model, training size, seed


def accuracy(output: pathlib.Path, run: Run, core: int) -> float:
    """Trains one model, unless its run is complete, and returns its final test accuracy."""
    model, size, seed = run
    config = f"--config=configs/digits.py:model={model},train_size={size}"
    workdir = output / f"{model}-{size}-{seed}"
    return runs.train([config, f"--config.seed={seed}"], workdir, STEPS, core)


def table(results: dict[Run, float]) -> str:
    """Returns the accuracies of all runs as a Markdown table, in percent."""
    lines = ["| images | " + " | ".join(MODELS) + " |", "|---|" + "---|" * len(MODELS)]
    for size in SIZES:
        cells = []
        for model in MODELS:
            cells.append(runs.mean_and_error([results[model, size, seed] for seed in SEEDS]))
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Runs `python -m benchmarks.low_data`: trains all models, prints and writes the table."""
    del argv
    output = pathlib.Path(flags.FLAGS.output)
    output.mkdir(parents=True, exist_ok=True)
    wanted = list(itertools.product(MODELS, SIZES, SEEDS))
    results = runs.measure(wanted, functools.partial(accuracy, output))
    rows = [{"model": m, "size": n, "seed": s, "top1": v} for (m, n, s), v in results.items()]
    (output / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    (output / "table.md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    flags.DEFINE_string("output", "runs/low_data", "Folder of the runs and of their results.")
    app.run(main)
