"""Measures what SP-ViT's gain over LV-ViT and over DeiT depends on, part by part.

    python -m benchmarks.spvit_ablation

Trains `configs/digits.py:spvit` for 400 steps: SP-SA in the first three of four layers, the class
token before the fourth, a position convolution behind each; then with one of these changed, then
`vit` with SP-SA or with Swin's learned bias, and last models that go on at 20×20 pixels, 10×10
patches in place of 6×6, with offsets raw or rescaled. The last column is the difference to the
first row of each table, seed by seed.
"""

from __future__ import annotations

from absl import app

from benchmarks import experiment

_NO_PRIOR = ("model.spatial_layers=0", "model.class_token_layer=3")
_BIAS = "model.position_bias_layers=3"
_EARLY = "model.class_token_layer=0"

SPVIT = {
    "`spvit`: SP-SA in 3 layers": experiment.seeds("spvit"),
    "SP-SA in 2 layers": experiment.seeds("spvit", "model.spatial_layers=2"),
    "SP-SA in 1 layer": experiment.seeds("spvit", "model.spatial_layers=1"),
    "no SP-SA": experiment.seeds("spvit", "model.spatial_layers=0"),
    "no SP-SA, class token late as with it": experiment.seeds("spvit", *_NO_PRIOR),
    "class token from the start": experiment.seeds("spvit", _EARLY),
    "no position convolution": experiment.seeds("spvit", "model.pos_conv=False"),
    "neither SP-SA nor position convolution": experiment.seeds(
        "spvit", "model.pos_conv=False", *_NO_PRIOR
    ),
    "learned bias in place of SP-SA": experiment.seeds("spvit", _BIAS, *_NO_PRIOR),
    "learned bias beside SP-SA": experiment.seeds("spvit", _BIAS),
}
VIT = {
    "`vit`": experiment.seeds("vit"),
    "SP-SA in 3 layers": experiment.seeds("vit", "model.spatial_layers=3", _EARLY),
    "SP-SA in 3 layers, class token behind them as in SP-ViT": experiment.seeds(
        "vit", "model.spatial_layers=3"
    ),
    "learned bias in 3 layers": experiment.seeds("vit", _BIAS),
    "position convolution": experiment.seeds("vit", "model.pos_conv=True"),
}
_LARGER = ("model.image_size=20", "optim.lr=5e-4", "schedule.warmup=0 steps")
LARGER = {
    "raw offsets": experiment.seeds("spvit", *_LARGER, steps=60, start=experiment.seeds("spvit")),
    "rescaled to 6×6": experiment.seeds(
        "spvit", *_LARGER, "model.prior_extent=6", steps=60, start=experiment.seeds("spvit")
    ),
}
EXPERIMENTS = {
    "spvit_ablation": ("from SP-ViT", SPVIT),
    "sp_sa_on_deit": ("from a plain ViT", VIT),
    "offsets_at_a_larger_size": ("at 20×20 pixels", LARGER),
}


def main(argv: list[str]) -> None:
    """Runs `python -m benchmarks.spvit_ablation`: trains all variants, prints three tables."""
    del argv
    experiment.measure_each(EXPERIMENTS)


if __name__ == "__main__":
    experiment.define_flags()
    app.run(main)
