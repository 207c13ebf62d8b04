"""Evaluates weights on a split, each example counted once.

    python -m spvit_jax.evaluate --checkpoint=runs/digits --json=out.json
    python -m spvit_jax.evaluate --config=configs/spvit.py:s,384 --checkpoint=spvit_s.pth.tar

A checkpoint of a run needs no --config: that of the run is taken. Weights are resized to the
configuration's `model.image_size`, and images are cropped as the model's authors did. The results
go to the standard output as JSON, and to the file if one is named. --report=DIR writes accuracies
and confusions by class, as JSON and as pictures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from spvit_jax import atomic, cli, compilation_cache, distributed, logs, paths
from spvit_jax import plan as plan_lib
from spvit_jax.class_report import ClassReport
from spvit_jax.errors import START_AGAIN, InputError, writing
from spvit_jax.training import sharding
from spvit_jax.training.evaluation import ClassCounter, evaluate
from spvit_jax.training.timeline import EVALUATION, Timeline


def evaluate_checkpoint(
    config: ConfigDict,
    path: epath.Path,
    *,
    which: str = "best",
    weights: str = "auto",
    split: str | None = None,
    report: epath.Path | None = None,
) -> dict[str, Any] | None:
    """Evaluates a checkpoint on a split of the configuration's data set.

    Args:
      config: fields of `spvit_jax.config.base`; its model must be the checkpoint's, up to the
        resolution and the kinds of SP-ViT's layers, which are taken from the checkpoint.
      path: a workdir of training, one checkpoint in it, or a `.pth` or `.safetensors` file.
      which: checkpoint of a workdir, as in `weights.find`.
      weights: "model", "ema" or "auto", as in `weights.find`.
      split: split of the data set; the configuration's `data.eval_split` if None. Its classes are
        numbered by their names as the checkpoint's; without names there, the training split's.
      report: folder to write a report by class to, as `ClassReport.write` does; None for none.

    Returns:
      `top1`, `top5`, `loss`, `count`, `images_per_second` after compilation, and `weights`:
      which were taken, "ema" or "model". None if a SIGTERM came first.

    Raises:
      InputError: the configuration, the data or the checkpoint cannot be used.
      FloatingPointError: logits are not finite numbers.
      WriteError: the report cannot be written.
    """
    timeline = Timeline(config.stall_timeout)
    plan = plan_lib.evaluation(config, path, which=which, weights=weights, split=split)
    if report is not None and plan.source.several_labels:
        raise InputError(
            f"data set {config.data.dataset!r} has several labels for an image, and a report by "
            "class needs one; leave --report out"
        )
    step: Callable[..., Any] = plan.eval_step if report is None else plan.class_step
    counter = ClassCounter(plan.class_step)
    with (
        distributed.Interrupt() as interrupt,
        timeline,
        distributed.Watchdog(timeline.activity),
    ):
        variables = plan.load()
        with plan.batches() as first:  # compiles, so that compilation is not timed
            batch = sharding.put_batch(next(first), plan.mesh)
            jax.block_until_ready(step(variables, batch))
        with (
            timeline.phase(EVALUATION),
            logs.Progress("evaluation", plan.num_batches, "batch") as progress,
        ):

            def advance() -> None:
                timeline.tick()
                progress.advance()

            results = evaluate(
                plan.eval_step if report is None else counter,
                variables,
                plan.batches(),
                plan.mesh,
                progress=advance,
                stops=interrupt.requested,
            )
        if results is None:
            return None
        if report is not None and distributed.is_primary():
            ClassReport(*counter.counts(), plan.source.class_names).write(report)
        return results | {
            "images_per_second": results["count"] / timeline.seconds()[EVALUATION],
            "weights": "ema" if plan.weights.is_average else "model",
        }


def main() -> None:
    """Runs `python -m spvit_jax.evaluate`."""
    config = cli.config_flag()
    path = flags.DEFINE_string("checkpoint", None, cli.CHECKPOINT_HELP, required=True)
    weights = cli.weights_flags()
    split = flags.DEFINE_string("split", None, "Split of the data set; default data.eval_split.")
    output = flags.DEFINE_string("json", None, "File to write the results to.")
    report = flags.DEFINE_string(
        "report", None, "Folder to write accuracies and confusions by class to."
    )
    address = cli.cluster_flags()

    def run() -> None:
        target = paths.parse_output(output.value) if output.value else None
        folder = paths.parse_output(report.value) if report.value else None
        with distributed.joined(address(), notices=True):
            compilation_cache.start(config().compilation_cache)
            results = evaluate_checkpoint(
                config(),
                paths.parse(path.value),
                split=split.value,
                report=folder,
                **weights(),
            )
            text = json.dumps(results, indent=2) + "\n"
            if distributed.is_primary() and results is not None:
                sys.stdout.write(text)
                if target is not None:
                    with writing(target):
                        atomic.write_text(target, text)
        if results is None:
            cli.fail("SIGTERM came before the evaluation was complete", START_AGAIN)

    cli.run(run)


if __name__ == "__main__":
    main()
