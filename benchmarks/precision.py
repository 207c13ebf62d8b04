"""Measures whether models learn as well in bfloat16 as in float32.

    python -m benchmarks.precision

Trains `spvit` and `lvvit` of `configs/digits.py` for 400 steps in both. ImageNet recipes compute in
bfloat16; parameters, their average and the optimizer's state are float32 either way.
"""

from __future__ import annotations

from absl import app

from benchmarks import experiment

EXPERIMENTS: dict[str, experiment.Variants] = {
    model: {
        "float32": experiment.seeds(model),
        "bfloat16": experiment.seeds(model, "model.dtype=bfloat16"),
    }
    for model in ("spvit", "lvvit")
}


def main(argv: list[str]) -> None:
    """Runs `python -m benchmarks.precision`: trains all variants, prints a table for each model."""
    del argv
    runner = experiment.make_runner()
    for model, variants in EXPERIMENTS.items():
        records = experiment.measure(runner, variants)
        text = experiment.table(variants, records, "float32", f"`{model}` in")
        experiment.write(f"precision_of_{model}", text)


if __name__ == "__main__":
    experiment.define_flags()
    app.run(main)
