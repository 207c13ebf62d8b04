"""Measures the accuracy gained by token labels of a teacher that is trained here, on digits.

    python -m benchmarks.token_labels --output=runs/token_labels

For each of five seeds: a teacher with a dense head is trained on the digits, it labels the tokens
of the training images, and two students of its kind are trained with MixToken, one with these
labels and one with the images' own for every token. Prints the test accuracy after the last step,
mean ± standard error over the seeds. Runs that are complete are not repeated.
"""

from __future__ import annotations

import functools
import itertools
import json
import pathlib

from absl import app, flags

from benchmarks import runs

SEEDS = (0, 1, 2, 3, 4)
STEPS = 640  # training steps of 64 images
CONFIG = "--config=configs/digits.py:model=spvit"
STUDENTS = ("with token labels", "without")

Run = tuple[str, int]  # "teacher" or the kind of student, seed


def accuracy(output: pathlib.Path, run: Run, core: int) -> float:
    """Trains a teacher, which then labels tokens, or a student; returns the test accuracy."""
    kind, seed = run
    labels = output / f"labels-{seed}.npy"
    args = [CONFIG, f"--config.seed={seed}"]
    if kind != "teacher":
        args += ["--config.augment.mix_token=True", "--config.augment.mix_group_size=16"]
    if kind == "with token labels":
        args.append(f"--config.token_labels.path={labels}")
    workdir = output / f"{kind.replace(' ', '-')}-{seed}"
    value = runs.train(args, workdir, STEPS, core)
    if kind == "teacher" and not labels.exists():
        arguments = [CONFIG, f"--checkpoint={workdir}", f"--output={labels}"]
        runs.command("data.token_labels", ["make", *arguments], core)
    return value


def main(argv: list[str]) -> None:
    """Runs `python -m benchmarks.token_labels`: trains all models, prints and writes the table."""
    del argv
    output = pathlib.Path(flags.FLAGS.output)
    output.mkdir(parents=True, exist_ok=True)
    train = functools.partial(accuracy, output)
    results = runs.measure([("teacher", seed) for seed in SEEDS], train)
    results |= runs.measure(list(itertools.product(STUDENTS, SEEDS)), train)
    rows = [{"model": kind, "seed": seed, "top1": v} for (kind, seed), v in results.items()]
    (output / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    lines = ["| | top-1 |", "|---|---|"]
    for kind in ("teacher", *STUDENTS):
        values = [results[kind, seed] for seed in SEEDS]
        lines.append(f"| {kind} | {runs.mean_and_error(values)} |")
    (output / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    flags.DEFINE_string("output", "runs/token_labels", "Folder of the runs and of their results.")
    app.run(main)
