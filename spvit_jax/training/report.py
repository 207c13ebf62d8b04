"""Reports of a run: the summary at its start, the progress bar, and the records of metrics.

In the workdir: `train.log` for reading, `metrics.jsonl` and TensorBoard event files for plotting.
`metrics.jsonl` holds only what is a function of the configuration, so that a run that was killed
and continued leaves the same bytes as one that was not; speed goes to the others. Of several
processes the first one reports, and the others are silent.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
import time
from collections.abc import Iterator
from typing import Self

from clu import parameter_overview
from etils import epath
from tqdm import tqdm

from spvit_jax import atomic, distributed, logs
from spvit_jax import config as config_lib
from spvit_jax.errors import writing
from spvit_jax.growing import GrowingFile
from spvit_jax.logs import log
from spvit_jax.models.complexity import count_macs, count_parameters
from spvit_jax.models.naming import named_leaves
from spvit_jax.training import sharding
from spvit_jax.training.run import TrainingRun
from spvit_jax.training.state import Metrics, means
from spvit_jax.training.tensorboard import EventFile


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

    def __init__(self, workdir: epath.Path, *, start_step: int, total_steps: int, batch_size: int):
        self._path = workdir / "metrics.jsonl"
        self._batch_size = batch_size
        self._total_steps = total_steps
        self._start_step = start_step
        self._stack = contextlib.ExitStack()
        self._records: GrowingFile | None = None  # both of the process that reports
        self._events: EventFile | None = None
        if distributed.is_primary():
            _drop_records_after(self._path, start_step)

    def __enter__(self) -> Self:
        writes = distributed.is_primary()
        if writes:
            with writing(self._path):
                self._records = GrowingFile(self._path)
                self._events = EventFile(self._path.parent)
        self._bar = self._stack.enter_context(
            tqdm(
                total=self._total_steps,
                initial=self._start_step,
                unit="step",
                disable=not writes or not sys.stderr.isatty(),
                dynamic_ncols=True,
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}",
            )
        )
        self._reset_clock(self._start_step)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self.flush()

    def flush(self) -> None:
        """Puts records and log where they survive this machine; for use before a checkpoint.

        Raises:
          WriteError: the records cannot be written.
        """
        for file in (self._records, self._events):
            if file is not None:
                with writing(self._path):
                    file.flush()
        logs.flush()

    def advance(self) -> None:
        """Moves the progress bar by one step."""
        self._bar.update()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time inside from the images per second that are reported."""
        start = time.monotonic()
        yield
        self._clock += time.monotonic() - start

    def train(self, step: int, metrics: Metrics, learning_rate: float) -> None:
        """Reports the training metrics since the last report.

        Args:
          step: number of steps taken.
          metrics: sums and counts since the last report.
          learning_rate: learning rate of the step.
        """
        values = means(metrics) | {"lr": learning_rate}
        speed = (step - self._clock_step) * self._batch_size / (time.monotonic() - self._clock)
        seconds = (self._total_steps - step) * self._batch_size / speed
        left = datetime.timedelta(seconds=round(seconds))
        self._record("train", step, values)
        self._plot(step, {"train/images_per_second": speed})
        text = f"loss {values['loss']:.4f}  top1 {values['top1']:.4f}  {speed:.0f} img/s"
        self._bar.set_postfix_str(f"{text}  left {left}")
        log.debug(
            "step %d/%d  %s  lr %.3g  left %s", step, self._total_steps, text, learning_rate, left
        )
        self._reset_clock(step)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Reports the metrics of an evaluation.

        Args:
          step: number of steps taken.
          values: mean of each metric, by name.
        """
        self._record("eval", step, values)
        texts = {k: str(v) if isinstance(v, int) else f"{v:.4f}" for k, v in values.items()}
        text = "  ".join(f"{name} {value}" for name, value in texts.items())
        log.info("step %d/%d  evaluation: %s", step, self._total_steps, text)

    def _record(self, prefix: str, step: int, values: dict[str, float]) -> None:
        named = {f"{prefix}/{name}": value for name, value in values.items()}
        if self._records is not None:
            with writing(self._path):
                self._records.write((json.dumps({"step": step, **named}) + "\n").encode())
        self._plot(step, named)

    def _plot(self, step: int, values: dict[str, float]) -> None:
        if self._events is not None:
            with writing(self._path.parent):
                self._events.write_scalars(step, values)

    def _reset_clock(self, step: int) -> None:
        self._clock, self._clock_step = time.monotonic(), step


def _drop_records_after(path: epath.Path, step: int) -> None:
    """Drops the records after a step, which a run that goes on from it makes again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break  # cut off by a kill; nothing follows it
        if record["step"] <= step:
            kept.append(line + "\n")
    with writing(path):
        atomic.write_text(path, "".join(kept))
