"""Collects runs: a table and a picture of accuracy against parameters and multiply-adds.

    python -m benchmarks.collect runs/deit runs/spvit … --output=runs/collected

Takes workdirs of any recipes, complete or not. Runs that differ in their seed alone are one point,
the mean ± standard error of their last evaluations. Each point is named by the fields in which the
configurations differ.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import sys
from collections.abc import Sequence

import matplotlib
from absl import app, flags
from etils import epath
from ml_collections import ConfigDict

from spvit_jax import config as config_lib
from spvit_jax.errors import InputError
from spvit_jax.models.complexity import count_macs, count_parameters

matplotlib.use("Agg")

from matplotlib import pyplot as plt


@dataclasses.dataclass(frozen=True)
class Collected:
    """What a workdir says of its run.

    Attributes:
      config: resolved configuration.
      num_classes: number of classes of its data.
      step: number of steps before its last evaluation.
      top1: accuracy then, between 0 and 1.
    """

    config: ConfigDict
    num_classes: int
    step: int
    top1: float

    @classmethod
    def of(cls, workdir: pathlib.Path) -> Collected:
        """Reads a workdir.

        Raises:
          InputError: the folder is not that of a run, or the run has not been evaluated yet.
        """
        try:
            config = config_lib.from_json(epath.Path(workdir / "config.json"))
            num_classes = len(json.loads((workdir / "classes.json").read_text()))
            lines = (workdir / "metrics.jsonl").read_text().splitlines()
        except (OSError, ValueError) as error:
            raise InputError(f"{workdir} is not the folder of a run: {error}") from error
        evaluations = [json.loads(line) for line in lines if '"eval/top1"' in line]
        if not evaluations:
            raise InputError(f"{workdir}: the run has not been evaluated yet; leave it out")
        return cls(config, num_classes, evaluations[-1]["step"], evaluations[-1]["eval/top1"])


@dataclasses.dataclass(frozen=True)
class Point:
    """Runs that differ in their seed alone.

    Attributes:
      name: what differs from the other points.
      parameters: number of parameters.
      macs: multiply-adds for one image, as this machine computes it.
      top1: accuracy of each run in percent.
      step: number of steps before the earliest of their last evaluations.
      total: number of steps of the whole run.
    """

    name: str
    parameters: int
    macs: int
    top1: list[float]
    step: int
    total: int

    @property
    def mean(self) -> float:
        """Mean accuracy in percent."""
        return statistics.mean(self.top1)

    @property
    def error(self) -> float | None:
        """Standard error of the mean in percent; None for one run."""
        if len(self.top1) == 1:
            return None
        return statistics.stdev(self.top1) / len(self.top1) ** 0.5


def without_seed(config: ConfigDict) -> ConfigDict:
    """Returns a configuration with seed 0."""
    copy = config.copy_and_resolve_references()
    copy.seed = 0
    return copy


def points(runs: Sequence[Collected]) -> list[Point]:
    """Returns the points of runs, in the order of their first ones."""
    groups: list[list[Collected]] = []
    for run in runs:
        like = (
            group
            for group in groups
            if not config_lib.differences(*(without_seed(x.config) for x in (group[0], run)))
        )
        group = next(like, None)
        groups.append([run]) if group is None else group.append(run)

    first = without_seed(groups[0][0].config)
    changed = {
        difference.partition(":")[0]
        for group in groups[1:]
        for difference in config_lib.differences(first, without_seed(group[0].config))
    }
    return [_point(group, sorted(changed)) for group in groups]


def _point(group: Sequence[Collected], changed: Sequence[str]) -> Point:
    config = group[0].config
    model = config_lib.model_settings(config, num_classes=group[0].num_classes)
    values = config_lib.flatten(config.to_dict())
    words = [
        f"{field.rpartition('.')[2]} {values[field]}"
        for field in changed
        if field != "model.name" and values[field] is not None
    ]
    return Point(
        name=", ".join([config.model.name, *words]),
        parameters=count_parameters(model),
        macs=count_macs(model),
        top1=[100 * run.top1 for run in group],
        step=min(run.step for run in group),
        total=config.schedule.total,
    )


def table(found: Sequence[Point]) -> str:
    """Returns points as a Markdown table."""
    lines = ["| run | seeds | parameters | GMACs | top-1 |", "|---|---|---|---|---|"]
    for point in found:
        accuracy = f"{point.mean:.1f}"
        if point.error is not None:
            accuracy += f" ± {point.error:.1f}"
        if point.step < point.total:
            accuracy += f", after {point.step} of {point.total} steps"
        cells = [
            point.name,
            str(len(point.top1)),
            f"{point.parameters:,}",
            f"{point.macs / 1e9:.3g}",
            accuracy,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: Sequence[Point], path: pathlib.Path) -> None:
    """Draws accuracy against parameters and against multiply-adds as a PNG file."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    for index, point in enumerate(found):
        for axis, x in zip(axes, (point.parameters / 1e6, point.macs / 1e9), strict=True):
            axis.errorbar(
                x,
                point.mean,
                yerr=point.error,
                fmt="osD^v<>Pph"[index // 10 % 10],
                color=f"C{index % 10}",
                capsize=3,
                label=point.name,
            )
    axes[0].set(xlabel="parameters in millions", ylabel="top-1 in percent")
    axes[1].set(xlabel="GMACs for one image")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str]) -> None:
    """Runs `python -m benchmarks.collect`: prints the table, and draws the picture."""
    if len(argv) < 2:
        sys.exit("error: expected folders of runs: python -m benchmarks.collect runs/digits")
    try:
        found = points([Collected.of(pathlib.Path(folder)) for folder in argv[1:]])
    except InputError as error:
        sys.exit(f"error: {error}")
    output = pathlib.Path(flags.FLAGS.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "collected.md").write_text(table(found) + "\n")
    records = [dataclasses.asdict(point) for point in found]
    (output / "collected.json").write_text(json.dumps(records, indent=2) + "\n")
    plot(found, output / "collected.png")
    print(table(found))


if __name__ == "__main__":
    flags.DEFINE_string("output", "runs/collected", "Folder of the table and of the picture.")
    app.run(main)
