"""Measures the accuracy gained by token labels of a teacher that is trained here, on digits.

    python -m benchmarks.token_labels

For each of five seeds: a teacher with a dense head is trained on the digits, it labels the tokens
of the training images, and two students of its kind are trained with MixToken, one with these
labels and one with the images' own for every token. Prints the test accuracy after the last step,
mean ± standard error over the seeds.
"""

from __future__ import annotations

import pathlib

from absl import app

from benchmarks import experiment
from benchmarks.runs import Run, Runner

STEPS = 640  # training steps of 64 images
MIX_TOKEN = ("augment.mix_token=True", "augment.mix_group_size=16")


def student(teacher: Run, labels: pathlib.Path) -> Run:
    """Returns the run of a student that learns from a file of labels."""
    changes = (*MIX_TOKEN, f"token_labels.path={labels}")
    return Run(teacher.recipe, teacher.seed, STEPS, changes)


def make_labels(runner: Runner, teacher: Run, labels: pathlib.Path) -> None:
    """Labels the tokens of the training images by a trained teacher, unless that is done."""
    if not labels.exists():
        arguments = [f"--config=configs/digits.py:{teacher.recipe}", f"--output={labels}"]
        arguments.append(f"--checkpoint={runner.trained(teacher)}")
        runner.command("data.token_labels.__main__", ["make", *arguments])


def main(argv: list[str]) -> None:
    """Runs `python -m benchmarks.token_labels`: trains all models, prints and writes the table."""
    del argv
    runner = experiment.make_runner()
    teachers = experiment.seeds("spvit", steps=STEPS)
    labels = {teacher: runner.output / f"{teacher.folder}.npy" for teacher in teachers}
    variants = {
        "teacher": teachers,
        "with token labels": [student(teacher, labels[teacher]) for teacher in teachers],
        "without": experiment.seeds("spvit", *MIX_TOKEN, steps=STEPS),
    }
    trained = runner.measure(teachers)
    missing = [
        teacher for teacher in trained if student(teacher, labels[teacher]) not in runner.records()
    ]
    runner.each(lambda teacher: make_labels(runner, teacher, labels[teacher]), missing)
    students = [student(teacher, labels[teacher]) for teacher in trained]
    records = trained | runner.measure([*students, *variants["without"]])
    experiment.write("token_labels", experiment.table(variants, records, base="without"))


if __name__ == "__main__":
    experiment.define_flags()
    app.run(main)
