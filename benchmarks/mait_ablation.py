"""Measures what MaiT's masked heads depend on: the neighbourhood, its border, and where they are.

    python -m benchmarks.mait_ablation

Trains `configs/digits.py:mait` for 400 steps with other masks. The model has four layers of three
heads on 6×6 patches; the recipe masks all heads of the first two layers and one of the third. The
last column is the difference to it, seed by seed.
"""

from __future__ import annotations

from absl import app

from benchmarks import experiment

BASE = "3×3, soft, early"
RADII = {"3×3": "1", "3×5": "(1,2)", "5×5": "(2,2)"}
SCHEDULES = {
    "two layers, late": "((2,0),(2,3))",
    "all heads": "((4,3),)",
    "thirds": "thirds",
    "one head of each layer": "((4,1),)",
    "two heads of each layer": "((4,2),)",
}

VARIANTS = {
    BASE: experiment.seeds("mait"),
    **{
        f"{name}, {kind}, early": experiment.seeds(
            "mait",
            *([] if radius == "1" else [f"model.mask_radius={radius}"]),
            *([] if kind == "soft" else [f"model.mask_kind={kind}"]),
        )
        for kind in ("soft", "hard")
        for name, radius in RADII.items()
        if (name, kind) != ("3×3", "soft")
    },
    **{
        f"3×3, soft, {name}": experiment.seeds("mait", f"model.masked_heads={schedule}")
        for name, schedule in SCHEDULES.items()
    },
    "none: `vit`": experiment.seeds("vit"),
}


def main(argv: list[str]) -> None:
    """Runs `python -m benchmarks.mait_ablation`: trains all variants, prints the table."""
    del argv
    records = experiment.measure(experiment.make_runner(), VARIANTS)
    experiment.write("mait_ablation", experiment.table(VARIANTS, records, BASE, "masked heads"))


if __name__ == "__main__":
    experiment.define_flags()
    app.run(main)
