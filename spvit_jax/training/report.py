"""Reports of a run: the summary at its start, the progress bar, and the records of metrics.

In the workdir: `train.log` for reading, `metrics.jsonl` and TensorBoard event files for plotting.
`metrics.jsonl` holds only what is a function of the configuration, so that a run that was killed
and continued leaves the same bytes as one that was not; speed and times go to the others, and to
`times.jsonl`. Of several processes the first one reports, and the others are silent.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Self

import jax
from clu import parameter_overview
from etils import epath
from tqdm import tqdm

from spvit_jax import atomic, distributed, logs
from spvit_jax import config as config_lib
from spvit_jax.append_only import AppendOnlyFile
from spvit_jax.errors import writing
from spvit_jax.logs import log
from spvit_jax.models.complexity import count_macs, count_parameters
from spvit_jax.models.naming import named_leaves
from spvit_jax.training import sharding, writers
from spvit_jax.training.profile import Profiler
from spvit_jax.training.run import TrainingRun
from spvit_jax.training.state import Metrics, means
from spvit_jax.training.timeline import INPUT, REPORT, STEP, Timeline, spread
from spvit_jax.training.utilization import peak_images_per_second
from spvit_jax.training.writers import MetricWriter


def summarize(run: TrainingRun) -> None:
    """Logs a run's resolved configuration, its parameters, and figures that follow from them."""
    config, model, mesh, state = run.config, run.model, run.mesh, run.abstract
    num_train, num_eval = run.data.num_train, run.data.num_eval
    steps_per_epoch = num_train / config.data.batch_size
    per_1024 = config.optim.lr * 1024 / config.data.batch_size
    if config.optim.ema:
        horizon = 1 / (1 - config.optim.ema) / steps_per_epoch
        average = f"decay {config.optim.ema:g}, a horizon of {horizon:.3g} epochs"
    else:
        average = "off"
    table = parameter_overview.get_parameter_overview(
        named_leaves(state.model.params), include_stats=False
    )
    lines = [
        "configuration\n" + config_lib.to_json(config),
        f"parameters\n{table}",
        f"model           {config.model.name} at {'×'.join(map(str, model.image_shape))} pixels, "
        f"{count_parameters(model):,} parameters, {2e-9 * count_macs(model):.4g} GFLOPs per image",
        f"data            {config.data.dataset}: {num_train:,} to train on, {num_eval:,} to "
        "evaluate on",
        f"devices         {mesh.size} × {mesh.devices.flat[0].device_kind} as data "
        f"{mesh.shape['data']} × fsdp {mesh.shape['fsdp']}",
        f"state           {sharding.describe(state, mesh)}",
        f"schedule        {config.schedule.total:,} steps of {config.data.batch_size} images, "
        f"{config.schedule.total / steps_per_epoch:.4g} epochs",
        f"learning rate   {config.optim.lr:g}, which is {per_1024:.4g} per 1024 images",
        f"moving average  {average}",
    ]
    log.info("%s", "\n".join(lines))


class Reporter:
    """Reporter of a run's progress on the terminal and in its records; a context manager."""

    def __init__(
        self,
        workdir: epath.Path,
        timeline: Timeline,
        profiler: Profiler,
        *,
        start_step: int,
        total_steps: int,
        batch_size: int,
        full_speed: float | None = None,
        evaluates: bool = False,
        open_writers: Callable[[], Sequence[MetricWriter]] = tuple,
    ):
        """Drops the records that this run will make again.

        Args:
          workdir: folder of the run.
          timeline: times of the run.
          profiler: profiler of its steps.
          start_step: number of steps taken before.
          total_steps: number of steps of the run.
          batch_size: images per step.
          full_speed: images per second at which MFU is 1; None if unknown.
          evaluates: whether the evaluation at `start_step` is still to come.
          open_writers: function that opens further writers of metrics; of the first process only.
        """
        self._path, self._times_path = workdir / "metrics.jsonl", workdir / "times.jsonl"
        self._timeline, self._profiler = timeline, profiler
        self._step, self._total_steps = start_step, total_steps
        self._batch_size, self._full_speed = batch_size, full_speed
        self._open_writers = open_writers
        self._writers: Sequence[MetricWriter] = ()
        # Both None in the processes that do not report.
        self._records: AppendOnlyFile | None = None
        self._times: AppendOnlyFile | None = None
        self._stack = contextlib.ExitStack()
        if distributed.is_primary():
            _drop_records_after(self._path, start_step, evaluates=evaluates)

    @classmethod
    def of(
        cls,
        run: TrainingRun,
        workdir: epath.Path,
        timeline: Timeline,
        *,
        start_step: int,
        evaluates: bool,
    ) -> Self:
        """Returns the reporter of a training run, with the writers that its configuration names."""
        config = run.config
        return cls(
            workdir,
            timeline,
            Profiler(workdir, start=config.profile.start, steps=config.profile.steps),
            start_step=start_step,
            total_steps=run.steps,
            batch_size=config.data.batch_size,
            full_speed=peak_images_per_second(run.model, run.mesh),
            evaluates=evaluates,
            open_writers=lambda: list(writers.open_all(workdir, config)),
        )

    def __enter__(self) -> Self:
        writes = distributed.is_primary()
        self._stack.enter_context(self._profiler)
        if writes:
            self._records, self._times = map(self._open, (self._path, self._times_path))
            self._writers = self._open_writers()
        for writer in self._writers:
            self._stack.callback(writer.close)
        self._bar = self._stack.enter_context(
            tqdm(
                total=self._total_steps,
                initial=self._step,
                unit="step",
                disable=not writes or not sys.stderr.isatty(),
                dynamic_ncols=True,
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}",
            )
        )
        self._timeline.begin_steps(self._step)
        self._reset()
        return self

    def __exit__(self, *_: object) -> None:
        with writing(self._path):
            self._stack.close()
        self._flush_records()

    def flush(self) -> None:
        """Puts all reports where they survive this machine; for use before a checkpoint.

        Raises:
          WriteError: the records cannot be written.
        """
        self._flush_records()
        for writer in self._writers:
            writer.flush()
        logs.flush()

    def step(self) -> AbstractContextManager[object]:
        """Returns a context in which the next step is to begin, for profiles."""
        return self._profiler.step(self._step)

    def advance(self, counter: jax.Array) -> None:
        """Notes that a step has begun.

        Args:
          counter: scalar of the state that the step computes.
        """
        self._step += 1
        self._timeline.follow(counter)
        if self._profiler.ends_at(self._step):
            jax.block_until_ready(counter)  # the devices take a step after it has begun
            with self._timeline.phase(REPORT):
                self._profiler.end()
        self._bar.update()

    def train(self, metrics: Metrics, learning_rate: float) -> None:
        """Reports the training metrics since the last report.

        Args:
          metrics: sums and counts since the last report.
          learning_rate: learning rate of the last step.
        """
        values = means(metrics) | {"lr": learning_rate}  # waits for the steps to end
        with self._timeline.phase(REPORT):
            times = self._measure()
            speed = times["images_per_second"]
            seconds = (self._total_steps - self._step) * self._batch_size / speed
            left = datetime.timedelta(seconds=round(seconds))
            self._record({f"train/{name}": value for name, value in values.items()})
            self._write(self._times, {"step": self._step, "time": time.time(), **times})
            self._plot({f"train/{name}": value for name, value in times.items()})
            text = f"loss {values['loss']:.4f}  top1 {values['top1']:.4f}  {speed:.0f} img/s"
            self._bar.set_postfix_str(f"{text}  left {left}")
            mfu = f"  MFU {times['mfu']:.1%}" if "mfu" in times else ""
            log.debug(
                "step %d/%d  %s  lr %.3g  left %s  step %.3g s (p90 %.3g, max %.3g)%s",
                *(*self._place, text, learning_rate, left),
                *(times[f"step_seconds_{name}"] for name in ("median", "p90", "max")),
                mfu,
            )
            self._profiler.look()
        self._reset()

    def evaluation(self, values: dict[str, float], raw: dict[str, float] | None = None) -> None:
        """Reports the metrics of an evaluation.

        Args:
          values: mean of each metric, by name.
          raw: the same of the weights themselves, where `values` are those of their average.
        """
        with self._timeline.phase(REPORT):
            named = {f"eval/{name}": value for name, value in values.items()}
            named |= {f"eval_raw/{name}": value for name, value in (raw or {}).items()}
            self._record(named)
            log.info("step %d/%d  evaluation: %s", *self._place, _as_text(values))
            if raw:
                log.info("step %d/%d  of the weights themselves: %s", *self._place, _as_text(raw))

    def _measure(self) -> dict[str, float]:
        """Returns speed and times of steps since the last report, and shares of all time so far."""
        seconds = self._timeline.seconds()
        spent = sum(seconds[name] - self._before[name] for name in (STEP, INPUT))
        speed = (self._step - self._reported) * self._batch_size / spent
        taken = spread(self._timeline.take_step_seconds() or [spent])
        total = sum(seconds.values())
        return {
            "images_per_second": speed,
            **({} if self._full_speed is None else {"mfu": speed / self._full_speed}),
            **{f"step_seconds_{name}": value for name, value in taken.items()},
            **{f"share_{name}": value / total for name, value in seconds.items()},
            "seconds": total,
        }

    @property
    def _place(self) -> tuple[int, int]:
        return self._step, self._total_steps

    def _record(self, named: dict[str, float]) -> None:
        self._write(self._records, {"step": self._step, **named})
        self._plot(named)

    def _write(self, file: AppendOnlyFile | None, record: dict[str, float]) -> None:
        if file is not None:
            with writing(file.path):
                file.write((json.dumps(record) + "\n").encode())

    def _flush_records(self) -> None:
        for file in (self._records, self._times):
            if file is not None:
                with writing(file.path):
                    file.flush()

    def _plot(self, values: dict[str, float]) -> None:
        for writer in self._writers:
            writer.write_scalars(self._step, values)

    def _open(self, path: epath.Path) -> AppendOnlyFile:
        with writing(path):
            return AppendOnlyFile(path)

    def _reset(self) -> None:
        self._before, self._reported = self._timeline.seconds(), self._step


def _as_text(values: dict[str, float]) -> str:
    """Returns metrics by name as words of a line."""
    texts = {k: str(v) if isinstance(v, int) else f"{v:.4f}" for k, v in values.items()}
    return "  ".join(f"{name} {value}" for name, value in texts.items())


def log_times(timeline: Timeline) -> None:
    """Logs a run's time in all and the share of each phase."""
    seconds = timeline.seconds()
    total = sum(seconds.values())
    shares = ", ".join(f"{name} {value / total:.1%}" for name, value in seconds.items())
    log.info("time            %s: %s", datetime.timedelta(seconds=round(total)), shares)


def _drop_records_after(path: epath.Path, step: int, *, evaluates: bool) -> None:
    """Drops the records after a step, which a run that goes on from it makes again.

    So is that of the evaluation at the step, if it `evaluates` there.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break  # cut off by a kill; nothing follows it
        again = evaluates and record["step"] == step and "eval/count" in record
        if record["step"] <= step and not again:
            kept.append(line + "\n")
    with writing(path):
        atomic.write_text(path, "".join(kept))
