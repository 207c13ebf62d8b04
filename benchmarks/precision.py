"""Measures whether models learn as well in bfloat16 as in float32.

    python -m benchmarks.precision

Trains `spvit` and `lvvit` of `configs/digits.py` for 400 steps in both. ImageNet recipes compute in
bfloat16; parameters, their average and the optimizer's state are float32 either way.
"""

from __future__ import annotations

from absl import app

from benchmarks import experiment

EXPERIMENTS = {
    f"precision_of_{model}": (
        f"`{model}` in",
        {
            "float32": experiment.seeds(model),
            "bfloat16": experiment.seeds(model, "model.dtype=bfloat16"),
        },
    )
    for model in ("spvit", "lvvit")
}


def main(argv: list[str]) -> None:
    """Runs `python -m benchmarks.precision`: trains all variants, prints a table for each model."""
    del argv
    experiment.measure_each(EXPERIMENTS)


if __name__ == "__main__":
    experiment.define_flags()
    app.run(main)
