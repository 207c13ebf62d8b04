"""Records on a full disk, and what of a run's time is reported where."""

import contextlib
import json

import jax.numpy as jnp
import pytest

from spvit_jax.errors import WriteError
from spvit_jax.training.profile import Profiler
from spvit_jax.training.report import Reporter
from spvit_jax.training.timeline import Timeline

METRICS = {name: (jnp.ones(()), jnp.ones(())) for name in ("loss", "top1")}


def reporter_in(workdir, timeline=None, **settings):
    profiler = Profiler(workdir, start=None, steps=1)
    settings = {"start_step": 0, "total_steps": 4, "batch_size": 8} | settings
    return Reporter(workdir, timeline or Timeline(), profiler, **settings)


def test_records_that_cannot_be_written_end_the_run(tmp_path):
    reporter = reporter_in(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    with pytest.raises(WriteError) as error, reporter:
        reporter.evaluation({"top1": 0.5})
    assert str(error.value) == f"cannot write {path}: No space left on device"


class Writer:
    """What a writer of metrics is to the reporter."""

    def __init__(self):
        self.scalars, self.closed = {}, False

    def write_scalars(self, step, scalars):
        self.scalars.setdefault(step, {}).update(scalars)

    def close(self):
        self.closed = True


def test_speed_and_times_go_to_writers_and_not_to_the_metrics(tmp_path):
    """Two steps of 8 images in 4 seconds, one second of them for input; evaluation of 10 apart."""
    now = [0.0]
    timeline, writers = Timeline(clock=lambda: now[0]), [Writer(), Writer()]

    def spend(seconds, phase=None):
        with timeline.phase(phase) if phase else contextlib.nullcontext():
            now[0] += seconds

    spend(5)  # before the first step
    with reporter_in(tmp_path, timeline, full_speed=40.0, open_writers=lambda: writers) as reporter:
        for _ in range(2):
            spend(0.5, "input")
            reporter.advance(jnp.ones(()))
            spend(1.5)
            timeline.wait_for_steps()
        spend(10, "evaluation")
        reporter.evaluation({"top1": 0.5, "count": 3})
        reporter.train(METRICS, 0.1)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records == [
        {"step": 2, "eval/top1": 0.5, "eval/count": 3},
        {"step": 2, "train/loss": 1.0, "train/top1": 1.0, "train/lr": 0.1},
    ]
    (times,) = [json.loads(line) for line in (tmp_path / "times.jsonl").read_text().splitlines()]
    assert times["images_per_second"] == pytest.approx(4.0)
    assert times["mfu"] == pytest.approx(0.1)
    assert times["step_seconds_median"] == times["step_seconds_max"] == pytest.approx(2.0)
    assert times["seconds"] == pytest.approx(19.0)
    for phase, seconds in (("start", 5), ("input", 1), ("step", 3), ("evaluation", 10)):
        assert times[f"share_{phase}"] == pytest.approx(seconds / 19), phase
    for writer in writers:
        assert writer.closed
        assert writer.scalars[2]["train/images_per_second"] == times["images_per_second"]
        assert writer.scalars[2]["eval/top1"] == 0.5


def test_an_evaluation_that_is_made_again_leaves_one_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = ['{"step": 2, "eval/count": 3}\n', '{"step": 4, "train/loss": 1.0}\n']
    dropped = ['{"step": 4, "eval/count": 3}\n', '{"step": 5, "train/loss": 1.0}\n']
    path.write_text("".join(kept + dropped))
    reporter_in(tmp_path, start_step=4)
    assert path.read_text() == "".join([*kept, dropped[0]])
    reporter_in(tmp_path, start_step=4, evaluates=True)
    assert path.read_text() == "".join(kept)
