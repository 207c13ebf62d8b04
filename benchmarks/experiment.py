"""What benchmarks that train on digits share: their flags, and tables of accuracies.

An experiment is a dictionary of variants, each with a run per seed. Its records and those of the
others are lines of one file, so that what two experiments have in common is trained once; its table
stands in a Markdown file between marks that have its name.
"""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence

from absl import flags

from benchmarks import markdown
from benchmarks.runs import SEEDS, Record, Run, Runner

SHORT, LONG = 400, 1600  # steps; the second is the recipe's own number

Variants = Mapping[str, Sequence[Run]]  # runs of a variant, at most one for each seed, by name
Records = Mapping[Run, Record]


def seeds(
    recipe: str,
    *changes: str,
    steps: int = SHORT,
    package: str | None = None,
    start: Sequence[Run] | None = None,
) -> list[Run]:
    """Returns the runs of a variant; `start` are those that they start from, by seed."""
    return [
        Run(recipe, seed, steps, changes, package, None if start is None else start[index])
        for index, seed in enumerate(SEEDS)
    ]


def define_flags() -> None:
    """Defines the flags of an experiment."""
    flags.DEFINE_string("output", "runs/digits", "Folder of the runs' folders.")
    flags.DEFINE_string("records", "docs/claims/runs.jsonl", "File of the records of all runs.")
    flags.DEFINE_string("document", "docs/claims.md", "Markdown file with the marks of the table.")
    flags.DEFINE_float("minutes", None, "Time after which no further run begins.")


def make_runner() -> Runner:
    """Returns the runner that the flags describe."""
    args = flags.FLAGS
    return Runner(pathlib.Path(args.output), pathlib.Path(args.records), minutes=args.minutes)


def measure(runner: Runner, variants: Variants) -> dict[Run, Record]:
    """Trains all variants, a seed after the other, and returns the records that there are."""
    runs = [run for runs in variants.values() for run in runs]
    return runner.measure(sorted(runs, key=lambda run: run.seed))


def write(name: str, text: str) -> None:
    """Prints an experiment's table, and writes it to the document."""
    print(text)
    markdown.replace_between(markdown.marks(name), text, pathlib.Path(flags.FLAGS.document))


def measure_each(experiments: Mapping[str, tuple[str, Variants]]) -> None:
    """Trains the variants of experiments and writes a table for each, against its first variant.

    Args:
      experiments: head of the first column and variants of each experiment, by name.
    """
    runner = make_runner()
    for name, (head, variants) in experiments.items():
        records = measure(runner, variants)
        write(name, table(variants, records, next(iter(variants)), head))


def table(variants: Variants, records: Records, base: str, head: str = "") -> str:
    """Returns a Markdown table of variants, each against one of them, seed by seed, in percent.

    Args:
      variants: variants, in the order of the rows.
      records: records of the runs that are complete.
      base: name of the variant that the others are compared with.
      head: head of the first column.
    """
    lines = [
        f"| {head} | top-1 | of the weights themselves | against {base} |",
        "|---|---|---|---|",
    ]
    for name, runs in variants.items():
        cells = [
            name,
            cell(accuracies(runs, records)),
            cell(accuracies(runs, records, raw=True)),
            "" if name == base else cell(differences(runs, variants[base], records), sign=True),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def accuracies(runs: Iterable[Run], records: Records, *, raw: bool = False) -> list[float]:
    """Returns the test accuracy after the last step of each run that there is a record of.

    Args:
      runs: the runs.
      records: records of runs.
      raw: whether it is that of the weights themselves rather than of their moving average.
    """
    found = [records[run] for run in runs if run in records]
    return [(record.raw if raw else record.top1)[-1] for record in found]


def differences(runs: Sequence[Run], others: Sequence[Run], records: Records) -> list[float]:
    """Returns how much more accurate runs are than others of the same seeds, between 0 and 1."""
    base = {run.seed: records[run] for run in others if run in records}
    return [
        records[run].top1[-1] - base[run.seed].top1[-1]
        for run in runs
        if run in records and run.seed in base
    ]


def cell(values: Sequence[float], *, sign: bool = False) -> str:
    """Returns the mean ± standard error of accuracies in percent, as a cell of a table.

    Args:
      values: accuracies, of the seeds that have been run.
      sign: whether they are differences, which have a sign.
    """
    if not values:
        return "not run yet"
    text = f"{100 * statistics.mean(values):{'+' if sign else ''}.1f}"
    if len(values) > 1:
        text += f" ± {100 * statistics.stdev(values) / len(values) ** 0.5:.1f}"
    return text if len(values) == len(SEEDS) else f"{text} ({len(values)} of {len(SEEDS)} seeds)"
