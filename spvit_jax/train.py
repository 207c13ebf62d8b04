"""Trains a model: the whole run on one page.

    python -m spvit_jax.train --config=configs/digits.py --workdir=runs/digits

The same command started again continues the run in that workdir, to the same end, bit for bit.
It exits with code 0 when the run is complete, and with 75 when it has to be started again, after
all of it has been saved.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from spvit_jax import classes, cli, distributed, logs, plan, weights
from spvit_jax import config as config_lib
from spvit_jax.augment import mix
from spvit_jax.classes import ClassNames
from spvit_jax.data import datasets, pipeline
from spvit_jax.data.crops import EvalTransform, TrainTransform
from spvit_jax.data.sources import Source
from spvit_jax.data.token_labels.store import LabelMaps
from spvit_jax.errors import InputError
from spvit_jax.logs import log
from spvit_jax.models import ModelConfig
from spvit_jax.models.resize import check_classes
from spvit_jax.training import checkpoint, report, sharding
from spvit_jax.training import run as run_lib
from spvit_jax.training import state as state_lib
from spvit_jax.training.evaluation import evaluate
from spvit_jax.training.step import StepSettings


def train(config: ConfigDict, workdir: pathlib.Path, *, dry_run: bool = False) -> bool:
    """Trains, or continues to train, what a configuration describes.

    Args:
      config: as `spvit_jax.config.base`; durations may be texts.
      workdir: receives checkpoints, records and the resolved configuration; created if need be.
      dry_run: whether to check everything, take one step on real data, and write nothing.

    Returns:
      Whether the run is complete; it is not if a SIGTERM came first, or in a dry run.

    Raises:
      InputError: the configuration, the data or the workdir cannot be used.
      FloatingPointError: the loss, the gradient or the state is no longer finite.
      WriteError: the disk is full, or cannot be written to any more.
    """
    plan.check_names(config)
    # ── Data: what there is ──────────────────────────────────────────────────────────────────────
    whole = datasets.load(config.data.dataset, config.data.train_split, config.data.data_dir)
    label_maps = _open_label_maps(config, whole)
    train_source = datasets.for_training(whole, config.data, seed=config.seed)
    class_names = train_source.class_names
    eval_source = datasets.numbered(
        datasets.for_evaluation(config.data, config.data.eval_split),
        class_names,
        "the training data",
    )

    # ── Configuration: durations become steps, and everything is checked ─────────────────────────
    config = config_lib.resolve(config, num_examples=len(train_source))
    model_config = config_lib.model_settings(config, num_classes=train_source.num_classes)
    settings = StepSettings.of(
        config,
        num_classes=train_source.num_classes,
        grid=None if label_maps is None else model_config.grid,
    )
    distributed.agree(
        config_lib.flatten({"config": config.to_dict()})
        | {"examples": (len(train_source), len(eval_source)), "start": checkpoint.newest(workdir)}
        | {"classes": classes.fingerprint(class_names)}
    )
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    distributed.connect(mesh)
    batch_size, total_steps = config.data.batch_size, config.schedule.total
    eval_batch_size = sharding.round_up(config.data.eval_batch_size, mesh)
    sharding.check_batch_size(batch_size, mesh, settings.accumulate)
    mix.check_group_size(config)
    share = pipeline.BatchShard(*sharding.local_parts(mesh))
    in_use = checkpoint.newest(workdir) is not None
    init_from = None
    if config.init_from and not in_use:
        init_from = weights.find(pathlib.Path(config.init_from), model_config)
        init_from.check(model_config, new_head=config.init_new_head, class_names=class_names)
    teacher = None
    if config.distill.teacher:
        teacher = _load_teacher(
            pathlib.Path(config.distill.teacher), model_config, class_names, mesh
        )

    # ── Model, optimizer and steps ───────────────────────────────────────────────────────────────
    size = run_lib.DataSize(len(train_source), len(eval_source), train_source.num_classes)
    run = run_lib.build(config, model_config, settings, mesh, size)
    root, abstract, shardings = run.root, run.abstract, run.shardings
    train_fn, eval_fn = run.train_step, run.eval_step

    def fresh() -> tuple[state_lib.TrainState, str]:
        """Returns the state before the first step, and where its weights are from."""
        state = run.create()
        if init_from is None:
            return state, "scratch"
        variables = init_from.load(
            model_config, mesh, preset=config.mesh.sharding, class_names=class_names
        )
        return state_lib.with_variables(state, variables), init_from.where

    train_batches = functools.partial(
        pipeline.train_batches,
        train_source,
        TrainTransform.of(config, model_config.image_shape),
        batch_size=batch_size,
        seed=config.seed,
        repeats=config.augment.repeats,
        label_maps=label_maps,
        shard=share,
        threads=config.data.threads,
        max_unreadable=config.data.max_unreadable,
    )
    eval_batches = functools.partial(
        pipeline.eval_batches,
        eval_source,
        EvalTransform.of(config, model_config.image_shape),
        batch_size=eval_batch_size,
        shard=share,
        threads=config.data.threads,
        max_unreadable=config.data.max_unreadable,
    )

    if not dry_run:
        write = distributed.is_primary()
        config_lib.claim_workdir(workdir, config, in_use=in_use, write=write)
        classes.claim_workdir(workdir, class_names, in_use=in_use, write=write)
        distributed.check_shared(workdir)
    logs.start_run(None if dry_run else workdir)
    report.summarize(
        config,
        model_config,
        abstract,
        num_train=len(train_source),
        num_eval=len(eval_source),
        mesh=mesh,
    )
    if label_maps is None and settings.dense_weight and getattr(model_config, "dense_head", False):
        log.warning(
            "warning: %s has a head for each patch and config.token_labels.path is not set: every "
            "patch learns the label of its image, and the papers' accuracy is not to be expected",
            config.model.name,
        )

    # ── A dry run ends here, after one step ──────────────────────────────────────────────────────
    if dry_run:
        trial, origin = fresh()
        with train_batches() as batches, eval_batches() as held_out:
            trial = train_fn(trial, sharding.put_batch(next(batches), mesh), root, teacher)
            state_lib.check_finite(trial, run.finite_leaves(trial))
            first = eval_fn(trial.best_model, sharding.put_batch(next(held_out), mesh))
        losses = state_lib.means(trial.metrics)["loss"], state_lib.means(first)["loss"]
        log.info("dry run         from %s, loss %.4f, then %.4f on held-out data", origin, *losses)
        log.info("dry run         nothing was written; without --dry_run it goes to %s", workdir)
        return False

    with (
        distributed.Interrupt() as interrupt,
        checkpoint.Checkpoints(
            workdir,
            model_config,
            class_names,
            keep_last=config.checkpoint.keep_last,
            keep_best=config.checkpoint.keep_best,
        ) as checkpoints,
    ):
        # ── Start: from the own workdir, else from init_from, else from scratch ──────────────────
        state, origin = checkpoints.restore(abstract), "the last checkpoint in the workdir"
        if state is None:
            state, origin = fresh()
        step = int(state.step)
        log.info("start           at step %d of %d, from %s", step, total_steps, origin)

        with (
            train_batches(start_step=step) as batches,
            report.Reporter(
                workdir, start_step=step, total_steps=total_steps, batch_size=batch_size
            ) as reporter,
        ):
            # ── Steps ────────────────────────────────────────────────────────────────────────────
            while step < total_steps and not interrupt.requested(step):
                state = train_fn(state, sharding.put_batch(next(batches), mesh), root, teacher)
                step += 1
                reporter.advance()

                if step % config.log_every == 0 or step == total_steps:
                    state_lib.check_finite(state)
                    reporter.train(step, state.metrics, float(run.learning_rate(step - 1)))
                    state = state.replace(
                        metrics=jax.jit(state_lib.zero_metrics, out_shardings=shardings.metrics)()
                    )

                results = None
                if step % config.eval_every == 0 or step == total_steps:
                    state_lib.check_finite(state)
                    with reporter.pause():
                        results = evaluate(eval_fn, state.best_model, eval_batches(), mesh)
                    reporter.evaluation(step, results)

                if results or step % config.checkpoint.every == 0:
                    state_lib.check_finite(state, run.finite_leaves(state))
                    checkpoints.save(step, state, results)

        # ── End ──────────────────────────────────────────────────────────────────────────────────
        if step < total_steps:
            state_lib.check_finite(state, run.finite_leaves(state))
            checkpoints.save(step, state)
        checkpoints.wait()  # what is said now is true
        if step < total_steps:
            log.info("SIGTERM: saved at step %d of %d; the same command goes on", step, total_steps)
        else:
            log.info("complete        at step %d, in %s", step, workdir)
    return step == total_steps


def _open_label_maps(config: ConfigDict, source: Source) -> LabelMaps | None:
    """Opens the token labels that the configuration names, if it does."""
    if not config.token_labels.path:
        return None
    if config.augment.mixup or config.augment.cutmix:
        raise InputError(
            "token labels follow crops and not MixUp or CutMix; set config.augment.mixup=0 and "
            "config.augment.cutmix=0, and augment.mix_token for MixToken"
        )
    label_maps = LabelMaps(pathlib.Path(config.token_labels.path))
    label_maps.check(len(source), source.class_names)
    return label_maps


def _load_teacher(
    path: pathlib.Path, student: ModelConfig, class_names: ClassNames, mesh: Mesh
) -> state_lib.Variables:
    """Reads the model whose labels a distilled one learns, at the student's resolution."""
    if not getattr(student, "distilled", False):
        raise InputError(
            "config.distill.teacher is set, and the model has no distillation token to learn from "
            "it; choose a distilled one, or set config.model.distilled=True"
        )
    found = weights.find(path, None)
    model = dataclasses.replace(found.config, image_size=student.image_shape)
    check_classes(found.config, student, found.where, may_replace=False)
    found.check_class_names(class_names, "choose a teacher of the same classes")
    return found.load(model, mesh)


def main() -> None:
    """Defines the flags and runs the command."""
    config = cli.config_flag()
    workdir = flags.DEFINE_string(
        "workdir", None, "Folder of the run; created if need be.", required=True
    )
    dry_run = flags.DEFINE_bool("dry_run", False, "Check everything, take one step, and end.")
    address = cli.cluster_flags()

    def run() -> None:
        with distributed.joined(address(), notices=True):
            complete = train(config(), pathlib.Path(workdir.value), dry_run=dry_run.value)
        if not complete and not dry_run.value:
            sys.exit(cli.STOPPED_EARLY)

    cli.run(run)


if __name__ == "__main__":
    main()
