"""Trains a model: the whole run in one function.

    python -m spvit_jax.train --config=configs/digits.py --workdir=runs/digits

The same command started again continues the run in that workdir, to the same end, bit for bit.
It exits with code 0 when the run is complete, and with 75 when it has to be started again: after a
SIGTERM, with all of it saved, or because it stood still (`config.stall_timeout`).
"""

from __future__ import annotations

import sys

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from spvit_jax import cli, compilation_cache, distributed, logs, paths
from spvit_jax import plan as plan_lib
from spvit_jax.errors import START_AGAIN
from spvit_jax.logs import log
from spvit_jax.plan import TrainingPlan
from spvit_jax.training import checkpoint, report, sharding
from spvit_jax.training import state as state_lib
from spvit_jax.training.evaluation import evaluate
from spvit_jax.training.timeline import CHECKPOINT, EVALUATION, INPUT, Timeline


def train(config: ConfigDict, workdir: epath.Path, *, dry_run: bool = False) -> bool:
    """Trains the model of a configuration, or continues the run in a workdir.

    Args:
      config: fields of `spvit_jax.config.base`; durations may be texts.
      workdir: folder for checkpoints, metrics and the resolved configuration; created if need be.
      dry_run: whether to check everything, take one step on real data, and write nothing.

    Returns:
      Whether the run is complete; it is not if a SIGTERM came first, or in a dry run.

    Raises:
      InputError: the configuration, the data or the workdir cannot be used.
      FloatingPointError: the loss, the gradient or the state is no longer finite.
      WriteError: the disk is full, or cannot be written to any more.
    """
    timeline = Timeline(config.stall_timeout)
    # ── Plan: the data, the model, the steps, and what they start from ───────────────────────────
    plan = plan_lib.training(config, workdir)
    run, config = plan.run, plan.run.config
    total_steps = run.steps
    if not dry_run:
        plan.claim(workdir)
        compilation_cache.start(config.compilation_cache, workdir)
    logs.start_run(None if dry_run else workdir)
    report.summarize(run)
    if dry_run:
        _take_one_step(plan, workdir)
        return False

    with (
        distributed.Interrupt() as interrupt,
        timeline,
        distributed.Watchdog(timeline.activity),
        checkpoint.Checkpoints(
            workdir,
            run.model,
            plan.class_names,
            keep_last=config.checkpoint.keep_last,
            keep_best=config.checkpoint.keep_best,
        ) as checkpoints,
    ):
        # ── Start: from the own workdir, else from init_from, else from scratch ──────────────────
        state, origin = checkpoints.restore(run.abstract), "the last checkpoint in the workdir"
        if state is None:
            state, origin = plan.create_state()
        step = int(state.step)
        log.info("start           at step %d of %d, from %s", step, total_steps, origin)
        # A SIGTERM may have come during the evaluation at this step, which is then still to come.
        evaluates = run.evaluates_at(step) and not checkpoints.has_metrics(step)

        with (
            plan.train_batches(start_step=step) as batches,
            report.Reporter.of(
                run, workdir, timeline, start_step=step, evaluates=evaluates
            ) as reporter,
        ):
            # ── Steps ────────────────────────────────────────────────────────────────────────────
            while (evaluates or step < total_steps) and not interrupt.requested():
                if not evaluates:
                    with timeline.phase(INPUT):
                        batch = sharding.put_batch(next(batches), run.mesh)
                    with reporter.step():
                        state = run.train_step(state, batch, run.root, plan.teacher)
                    step += 1
                    reporter.advance(state.step)

                    if step % config.log_every == 0 or step == total_steps:
                        state_lib.check_finite(state)
                        reporter.train(state.metrics, float(run.learning_rate(step - 1)))
                        state = state.replace(metrics=run.zero_metrics())

                results = None
                if run.evaluates_at(step):
                    state_lib.check_finite(state)
                    with timeline.phase(EVALUATION):
                        found = [
                            evaluate(
                                run.eval_step,
                                model,
                                plan.eval_batches(),
                                run.mesh,
                                progress=timeline.tick,
                                stops=interrupt.requested,
                            )
                            for model in run.evaluated(state)
                        ]
                    evaluates = None in found
                    if not evaluates:
                        results, *_ = found
                        reporter.evaluation(*filter(None, found))

                if results or step % config.checkpoint.every == 0:
                    state_lib.check_finite(state, run.finite_leaves(state))
                    with timeline.phase(CHECKPOINT):
                        reporter.flush()
                        checkpoints.save(step, state, results)

        # ── End ──────────────────────────────────────────────────────────────────────────────────
        complete = step == total_steps and not evaluates
        with timeline.phase(CHECKPOINT):
            if not complete:
                state_lib.check_finite(state, run.finite_leaves(state))
                checkpoints.save(step, state)
            checkpoints.wait()  # so that the last line is true
        report.log_times(timeline)
        if complete:
            log.info("complete        at step %d, in %s", step, workdir)
        else:
            log.info("SIGTERM: saved at step %d of %d; the same command goes on", step, total_steps)
    return complete


def _take_one_step(plan: TrainingPlan, workdir: epath.Path) -> None:
    """Takes one step of training and one of evaluation on real data, and logs their losses."""
    run = plan.run
    state, origin = plan.create_state()
    with plan.train_batches() as batches, plan.eval_batches() as held_out:
        batch = sharding.put_batch(next(batches), run.mesh)
        state = run.train_step(state, batch, run.root, plan.teacher)
        state_lib.check_finite(state, run.finite_leaves(state))
        metrics = run.eval_step(state.best_model, sharding.put_batch(next(held_out), run.mesh))
    losses = state_lib.means(state.metrics)["loss"], state_lib.means(metrics)["loss"]
    log.info("dry run         from %s, loss %.4f, then %.4f on held-out data", origin, *losses)
    log.info("dry run         nothing was written; without --dry_run it goes to %s", workdir)


def main() -> None:
    """Runs `python -m spvit_jax.train`."""
    config = cli.config_flag()
    workdir = flags.DEFINE_string(
        "workdir", None, "Folder of the run; created if need be.", required=True
    )
    dry_run = flags.DEFINE_bool("dry_run", False, "Check everything, take one step, and end.")
    address = cli.cluster_flags()

    def run() -> None:
        folder = paths.parse(workdir.value)
        with distributed.joined(address(), notices=True):
            complete = train(config(), folder, dry_run=dry_run.value)
        if not complete and not dry_run.value:
            sys.exit(START_AGAIN)

    cli.run(run)


if __name__ == "__main__":
    main()
