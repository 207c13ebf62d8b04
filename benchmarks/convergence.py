"""Measures how fast models learn: test accuracy over the epochs, in a short and a long schedule.

    python -m benchmarks.convergence

Trains the four models of `configs/digits.py` for 400 and for 1,600 steps (20 and 79 epochs), and
evaluates the moving average of the weights and the weights themselves ten times each. Prints a
table of the last evaluations, and draws the means over the seeds, with a band of one standard error
to either side.
"""

from __future__ import annotations

import pathlib

import matplotlib
import numpy as np
from absl import app, flags

from benchmarks import experiment
from benchmarks.experiment import LONG, SHORT, Records, Variants

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

MODELS = ("vit", "lvvit", "spvit", "mait")
SCHEDULES = (SHORT, LONG)
VARIANTS = {
    f"{model}, {steps} steps": experiment.seeds(model, steps=steps)
    for steps in SCHEDULES
    for model in MODELS
}
_EPOCH = 1297 / 64  # steps


def draw(variants: Variants, records: Records, steps: int, axis: Axes, *, raw: bool) -> None:
    """Draws the accuracy of each model over the epochs, in a schedule of some steps."""
    for index, model in enumerate(MODELS):
        runs = variants[f"{model}, {steps} steps"]
        found = [records[run] for run in runs if run in records]
        if not found:
            continue
        epochs = np.array(found[0].steps) / _EPOCH
        values = 100 * np.array([record.raw if raw else record.top1 for record in found])
        mean = values.mean(axis=0)
        label = f"{model}, {len(found)} seeds" if len(found) < len(runs) else model
        axis.plot(epochs, mean, color=f"C{index}", marker=".", label=label)
        if len(found) > 1:
            error = values.std(axis=0, ddof=1) / len(found) ** 0.5
            band = mean - error, mean + error
            axis.fill_between(epochs, *band, color=f"C{index}", alpha=0.2, linewidth=0)
    kind = "weights themselves" if raw else "moving average"
    axis.set(title=f"{steps} steps, {kind}", xlabel="epoch", ylabel="test accuracy in percent")
    axis.set(ylim=(0, 100), yticks=range(0, 101, 10))
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=8)


def plot(variants: Variants, records: Records, path: pathlib.Path) -> None:
    """Draws a row for each schedule that has been begun as a PNG file: average and weights."""
    begun = {run.steps for runs in variants.values() for run in runs if run in records}
    rows = max(len(begun), 1)
    figure, axes = plt.subplots(
        rows, 2, figsize=(9, 4 * rows), sharey=True, squeeze=False, layout="constrained"
    )
    for row, steps in zip(axes, sorted(begun), strict=False):
        for axis, raw in zip(row, (False, True), strict=True):
            draw(variants, records, steps, axis, raw=raw)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(variants: Variants, records: Records) -> str:
    """Returns the accuracies after the last steps as a Markdown table, in percent."""
    head, lines = ["model"], []
    for steps in SCHEDULES:
        head += [f"{steps} steps", "of the weights themselves"]
    for model in MODELS:
        cells = [f"`{model}`"]
        for steps in SCHEDULES:
            runs = variants[f"{model}, {steps} steps"]
            for raw in (False, True):
                cells.append(experiment.cell(experiment.accuracies(runs, records, raw=raw)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines])


def main(argv: list[str]) -> None:
    """Runs `python -m benchmarks.convergence`: trains all models, prints the table, draws them."""
    del argv
    runner = experiment.make_runner()
    for steps in map(int, flags.FLAGS.schedules):
        scheduled = {name: runs for name, runs in VARIANTS.items() if runs[0].steps == steps}
        experiment.measure(runner, scheduled)
    records = runner.records()
    experiment.write("convergence", table(VARIANTS, records))
    plot(VARIANTS, records, pathlib.Path(flags.FLAGS.picture))


if __name__ == "__main__":
    experiment.define_flags()
    flags.DEFINE_list("schedules", list(map(str, SCHEDULES)), "Schedules to train, in steps.")
    flags.DEFINE_string("picture", "docs/claims/convergence.png", "File of the picture.")
    app.run(main)
