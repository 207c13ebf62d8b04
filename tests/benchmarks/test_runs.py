"""Runs of benchmarks: each is trained once, by the real command, and goes on where it stopped."""

import json
import os

import pytest

from benchmarks.runs import Record, Run, Runner, read_records
from tests.helpers.commands import records_of

TINY = ("model.depth=1", "model.dim=12", "data.batch_size=16", "schedule.warmup=1 steps")


@pytest.fixture
def one_core(monkeypatch):
    core = min(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {core})


class Pretended(Runner):
    """A runner whose training is a file with the metrics that it would leave."""

    def command(self, name, arguments):
        fields = dict(argument.lstrip("-").split("=", 1) for argument in arguments)
        self.commands = [*getattr(self, "commands", []), fields]
        steps = int(fields["config.schedule.total"].split()[0])
        folder = self.output / os.path.basename(fields["workdir"])
        folder.mkdir(exist_ok=True)
        top1 = 0.5 + 0.01 * int(fields["config.seed"])
        lines = [{"step": steps // 2, "train/loss": 2.0}]
        for step, value in ((steps // 2, 0.4), (steps, top1)):
            lines.append({"step": step, "eval/top1": value, "eval_raw/top1": value - 0.1})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def runner(tmp_path, one_core):
    return Pretended(tmp_path / "runs", tmp_path / "records" / "runs.jsonl")


def test_the_real_command_is_run_once(tmp_path, one_core, data_dir, capfd):
    """What is recorded is what the command has written, and it trained what was asked for."""
    runner = Runner(tmp_path / "runs", tmp_path / "runs.jsonl")
    run = Run("vit,100", 1, 2, (*TINY, f"data.data_dir={data_dir}"))
    records = runner.measure([run])
    folder = runner.output / run.folder
    evaluations = [line for line in records_of(folder) if "eval/top1" in line]
    assert [line["step"] for line in evaluations] == list(records[run].steps) == [1, 2]
    assert tuple(line["eval/top1"] for line in evaluations) == records[run].top1
    assert tuple(line["eval_raw/top1"] for line in evaluations) == records[run].raw
    config = json.loads((folder / "config.json").read_text())
    assert (config["seed"], config["model"]["dim"], config["data"]["train_size"]) == (1, 12, 100)

    capfd.readouterr()
    assert runner.measure([run]) == records
    assert capfd.readouterr().out == ""
    with pytest.raises(RuntimeError, match=r"model.dim=13.*what it said is at the end of .*log"):
        runner.measure([Run("vit", 0, 2, ("model.dim=13",))])
    said = (runner.output / "commands.log").read_text()
    assert "dim 13 is not a multiple of num_heads 3" in said.splitlines()[-1]


def test_what_has_a_record_is_not_repeated(runner, tmp_path):
    """Whatever other runs there are, and in whatever folder it was trained."""
    runs = [Run("spvit", seed, 4, ("model.spatial_layers=2",)) for seed in range(3)]
    first = runner.measure(runs[:2])
    assert [record.top1[-1] for record in first.values()] == [0.5, 0.51]
    assert len(runner.commands) == 2
    again = runner.measure([*runs, runs[0]])
    assert len(runner.commands) == 3
    assert {run: again[run] for run in runs[:2]} == first
    assert read_records(tmp_path / "records" / "runs.jsonl") == again
    others = [
        Run("spvit", 0, 4),
        Run("spvit", 0, 8, runs[0].changes),
        Run("spvit", 0, 4, runs[0].changes, package="mine"),
        Run("spvit", 0, 4, runs[0].changes, start=Run("spvit", 0, 4)),
    ]
    assert not any(run in again for run in others)
    assert len({run.folder for run in (runs[0], *others)}) == 4  # a package names another model


def test_a_run_comes_after_the_one_that_it_starts_from(runner):
    start = Run("spvit", 0, 4)
    run = Run("spvit", 0, 2, start=start)
    runner.measure([run])
    assert [fields["workdir"] for fields in runner.commands] == [
        str(runner.output / start.folder),
        str(runner.output / run.folder),
    ]
    assert runner.commands[1]["config.init_from"] == runner.commands[0]["workdir"]
    assert runner.trained(start) == runner.output / start.folder
    assert len(runner.commands) == 2  # it was there
    (runner.output / start.folder / "metrics.jsonl").write_text('{"step": 2, "eval/top1": 0.4, "ev')
    runner.trained(start)
    assert len(runner.commands) == 3  # cut off, it was not complete


def test_no_run_begins_too_late(tmp_path, one_core):
    runner = Pretended(tmp_path, tmp_path / "runs.jsonl", minutes=0)
    assert runner.measure([Run("vit", 0, 4)]) == {}
    assert not hasattr(runner, "commands")


def test_two_do_not_train_in_one_folder(runner, tmp_path):
    with pytest.raises(SystemExit, match="another benchmark trains in"):
        Pretended(tmp_path / "runs", tmp_path / "other.jsonl")


def test_a_record_is_read_as_it_was_written():
    start = Run("spvit,100", 3, 4, ("model.pos_conv=False",), "mine")
    run = Run("spvit", 3, 2, ("model.image_size=20",), start=start)
    record = Record(run, (1, 2), (0.1, 0.25), (0.2, 0.3), 12.5, "abc")
    assert Record.from_json(record.to_json()) == record
