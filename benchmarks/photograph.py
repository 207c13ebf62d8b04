"""Draws what heads attend to on a photograph, with a model that is trained for it in minutes.

    python -m benchmarks.photograph --output=docs/attention.png

No weights come with this package, and no model of ImageNet can be trained here. So a small SP-ViT
learns to tell crops of scikit-learn's two sample photographs apart, china.jpg and flower.jpg, and
is then shown the first of them whole. That it succeeds says nothing; the picture shows what the
commands draw, and that heads of one layer come to look at different things.
"""

from __future__ import annotations

import pathlib
import shutil

import numpy as np
import sklearn.datasets
from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict

from configs import digits
from spvit_jax import plan as plan_lib
from spvit_jax.drawing.mosaic import Mosaic, at_side, figure_of, of_attention, with_frames
from spvit_jax.drawing.style import write_png
from spvit_jax.explain import maps_on_images
from spvit_jax.train import train

QUERY = (4, 7)  # the patch that looks, in rows and columns
LAYERS = (0, 2, 3)


def configuration(folder: pathlib.Path) -> ConfigDict:
    """Returns the recipe: the digits' SP-ViT on crops of the photographs in a folder."""
    config = digits.get_config("spvit")
    config.model.image_size = "120x180"
    config.model.patch_size = 12
    config.data.update(dataset=f"folder:{folder}", eval_split="train")
    config.data.update(batch_size=16, eval_batch_size=2)
    config.augment.crop_scale = (0.1, 1.0)
    config.augment.crop_ratio = (1.3, 1.7)
    config.augment.flip = 0.5
    config.augment.color_jitter = 0.4
    config.optim.lr = 1e-3
    config.schedule.update(total="300 steps", warmup="30 steps")
    config.log_every = "30 steps"
    config.eval_every = config.checkpoint.every = "150 steps"
    return config


def prepare(folder: pathlib.Path) -> None:
    """Lays scikit-learn's photographs out as a data set of two classes."""
    images = pathlib.Path(sklearn.datasets.__file__).parent / "images"
    for name in ("china", "flower"):
        target = folder / "train" / name / f"{name}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(images / f"{name}.jpg", target)


def draw(config: ConfigDict, workdir: pathlib.Path) -> Mosaic:
    """Returns the photograph with the frame of the patch, and beside it what heads attend to."""
    plan = plan_lib.evaluation(config, epath.Path(workdir))
    (maps,) = maps_on_images(plan, plan.load(), np.array([0]), [QUERY])
    drawn = of_attention(
        maps.pixels,
        {f"layer {layer}": maps.patches[layer][0] for layer in LAYERS},
        queries={f"layer {layer}": QUERY for layer in LAYERS},
        side=maps.pixels.shape[0],
    )
    photograph = with_frames(at_side(maps.pixels, maps.pixels.shape[0]), [QUERY], plan.model.grid)
    tiles = [[photograph if row == 0 else None, *tiles] for row, tiles in enumerate(drawn.tiles)]
    return Mosaic(tiles, drawn.rows, ["photograph", *drawn.columns])


def main(argv: list[str]) -> None:
    """Runs `python -m benchmarks.photograph`: trains, unless that is done, and draws."""
    del argv
    logging.set_verbosity(logging.FATAL)  # of orbax
    workdir = pathlib.Path(flags.FLAGS.workdir)
    prepare(workdir / "photographs")
    config = configuration(workdir / "photographs")
    train(config, epath.Path(workdir / "run"))
    write_png(figure_of(draw(config, workdir / "run")), epath.Path(flags.FLAGS.output))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/photograph", "Folder of the photographs and of the run.")
    flags.DEFINE_string("output", "docs/attention.png", "PNG file to draw.")
    app.run(main)
