"""Evaluates a checkpoint on a split, each example counted once.

    python -m spvit_jax.evaluate --config=configs/digits.py --checkpoint=runs/digits --json=out.json

The results go to the standard output as JSON, and to the file if one is named.
"""

from __future__ import annotations

import functools
import json
import pathlib
import sys
import time

import jax
from absl import flags
from ml_collections import ConfigDict

from spvit_jax import cli
from spvit_jax import config as config_lib
from spvit_jax.data import datasets, pipeline
from spvit_jax.data.augment import EvalTransform
from spvit_jax.training import checkpoint, sharding
from spvit_jax.training.evaluation import evaluate
from spvit_jax.training.step import Recipe, eval_step


def evaluate_checkpoint(
    config: ConfigDict, path: pathlib.Path, *, which: str, weights: str, split: str | None
) -> dict[str, float]:
    """Evaluates a checkpoint.

    Args:
      config: as `spvit_jax.config.base`; its model must be the checkpoint's.
      path: a workdir of training, or one checkpoint in it.
      which: "best", "last" or a step, where the path is a workdir.
      weights: "ema", "model", or "auto" for the moving average where there is one.
      split: of the data set; the configuration's `data.eval_split` if None.

    Returns:
      `top1`, `top5`, `loss`, `count`, and `images_per_second` once compiled.

    Raises:
      InputError: the configuration, the data or the checkpoint cannot be used.
    """
    data = config.data
    source = datasets.load(data.dataset, split or data.eval_split, data.data_dir)
    model_config = config_lib.model_settings(config, num_classes=source.num_classes)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    variables = checkpoint.load_model(
        path, model_config, mesh, preset=config.mesh.sharding, which=which, weights=weights
    )
    recipe = Recipe.of(config, num_classes=source.num_classes)
    eval_fn = jax.jit(functools.partial(eval_step, recipe=recipe))

    def batches() -> pipeline.BatchIterator:
        return pipeline.eval_batches(
            source,
            EvalTransform.of(config, model_config.image_shape),
            batch_size=sharding.round_up(data.eval_batch_size, mesh),
            share=pipeline.Share(jax.process_index(), jax.process_count()),
            threads=data.threads,
        )

    with batches() as first:  # compiles, so that it does not count
        jax.block_until_ready(eval_fn(variables, sharding.put_batch(next(first), mesh)))
    start = time.monotonic()
    results = evaluate(eval_fn, variables, batches(), mesh)
    return results | {"images_per_second": results["count"] / (time.monotonic() - start)}


def main() -> None:
    """Defines the flags and runs the command."""
    config = cli.config_flag()
    path = flags.DEFINE_string(
        "checkpoint", None, "Workdir of training, or a checkpoint in it.", required=True
    )
    which = flags.DEFINE_string("step", "best", "Of a workdir: best, last, or a number.")
    weights = flags.DEFINE_enum("weights", "auto", ["auto", "ema", "model"], "Which weights.")
    split = flags.DEFINE_string("split", None, "Split of the data set; default data.eval_split.")
    output = flags.DEFINE_string("json", None, "File to write the results to.")

    def run() -> None:
        results = evaluate_checkpoint(
            config(),
            pathlib.Path(path.value),
            which=which.value,
            weights=weights.value,
            split=split.value,
        )
        text = json.dumps(results, indent=2) + "\n"
        if output.value:
            pathlib.Path(output.value).write_text(text)
        sys.stdout.write(text)

    cli.run(run)


if __name__ == "__main__":
    main()
