"""The real commands on the real digits: killed, stopped, damaged, and run to the end."""

import contextlib
import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import termios
import threading
import time

import numpy as np
import pytest

from spvit_jax import config as config_lib
from spvit_jax.evaluate import evaluate_checkpoint
from tests.helpers import REPOSITORY
from tests.helpers.commands import (
    CONFIG,
    SMALL,
    Command,
    assert_same_run,
    command,
    newest_step,
    records_of,
    run,
    saved_arrays,
    truncate_checkpoint,
    wait_until,
)


def start(environment, workdir):
    return Command(environment, "spvit_jax.train", CONFIG, f"--workdir={workdir}", *SMALL)


def run_on_a_terminal(environment, *args):
    """Runs a command whose standard error is a terminal; returns what it showed there."""
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (40, 140))
    shown = []

    def read():
        with contextlib.suppress(OSError):  # the terminal is gone when the command has ended
            while chunk := os.read(controller, 4096):
                shown.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    result = subprocess.run(command(*args), cwd=REPOSITORY, env=environment, stderr=terminal)
    os.close(terminal)
    reader.join()
    os.close(controller)
    text = b"".join(shown).decode(errors="replace")
    assert result.returncode == 0, text[-3000:]
    return text


@pytest.fixture(scope="module")
def reference(environment, tmp_path_factory):
    """A run that nothing disturbed, watched on a terminal."""
    workdir = tmp_path_factory.mktemp("runs") / "reference"
    shown = run_on_a_terminal(environment, "train", CONFIG, f"--workdir={workdir}", *SMALL)
    (workdir / "terminal.txt").write_bytes(shown.encode())
    return workdir


def test_what_a_person_sees(reference):
    shown = (reference / "terminal.txt").read_bytes().decode()
    bar = r"\r100%\|█+\| 120/120, loss \d\.\d+  top1 \d\.\d+  \d+ img/s  left 0:00:00"
    assert re.search(bar, shown)
    assert "step 70/120  loss" not in shown  # the bar stands for the lines of the log
    log = (reference / "train.log").read_text()
    for words in (
        '"total": 120',
        "blocks/0/attn/prior/w1",
        "parameters,",
        "GFLOPs per image",
        "per 1024 images",
        "a horizon of",
        "from scratch",
        "step 70/120  loss",
        "complete",
    ):
        assert words in log
    assert json.loads((reference / "config.json").read_text())["schedule"]["total"] == 120
    records = records_of(reference)
    assert [r["step"] for r in records if "train/loss" in r] == [*range(7, 120, 7), 120]
    assert [r["step"] for r in records if "eval/top1" in r] == [40, 80, 120]
    assert list(reference.glob("events.out.tfevents.*"))
    kept = sorted(int(path.name) for path in (reference / "checkpoints").iterdir())
    assert kept[-2:] == [110, 120]
    best = max((r for r in records if "eval/top1" in r), key=lambda r: r["eval/top1"])["step"]
    assert best in kept
    assert len(kept) <= 3


@pytest.mark.slow
def test_killed_three_times_it_ends_the_same(environment, reference, tmp_path):
    """Twice at a random moment and once while a checkpoint is being written."""
    rng = random.Random()
    for kill in range(3):
        process = start(environment, tmp_path)
        folder, before = tmp_path / "checkpoints", newest_step(tmp_path)
        if kill == 1:
            pattern = "*orbax-checkpoint-tmp*"
            wait_until(lambda: newest_step(tmp_path) > before, process)  # noqa: B023
            wait_until(lambda: any(folder.glob(pattern)), process)  # noqa: B023
        else:
            wait_until(lambda: newest_step(tmp_path) > before, process)  # noqa: B023
            time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.wait()
        assert newest_step(tmp_path) < 120
    run(environment, "train", CONFIG, f"--workdir={tmp_path}", *SMALL)
    assert_same_run(tmp_path, reference)


def test_sigterm_saves_and_the_same_command_goes_on(environment, reference, tmp_path):
    process = start(environment, tmp_path)
    wait_until(lambda: newest_step(tmp_path) >= 10, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75
    stopped = newest_step(tmp_path)
    assert f"SIGTERM: saved at step {stopped} of 120" in (tmp_path / "train.log").read_text()
    run(environment, "train", CONFIG, f"--workdir={tmp_path}", *SMALL)
    assert_same_run(tmp_path, reference)


def test_truncated_checkpoint_falls_back_to_the_one_before(environment, reference, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    truncate_checkpoint(workdir, 120)
    result = run(environment, "train", CONFIG, f"--workdir={workdir}", *SMALL)
    assert "checkpoint 120 cannot be read and was moved to" in result.stderr
    assert "at step 110 of 120" in result.stderr
    assert (workdir / "corrupt-checkpoints" / "120").is_dir()
    assert_same_run(workdir, reference)


def test_loss_that_is_not_a_number_stops_the_run(environment, tmp_path):
    settings = ["--config.optim.lr=1e38", "--config.checkpoint.every=1 steps"]
    result = run(
        environment, "train", CONFIG, f"--workdir={tmp_path}", *SMALL, *settings, check=False
    )
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("error: the loss at step ")
    step = int(message.split()[5])
    assert 0 < newest_step(tmp_path) < step
    for name, array in saved_arrays(tmp_path, newest_step(tmp_path)).items():
        assert np.isfinite(array).all(), name


def test_evaluate_repeats_the_best_result_of_training(environment, reference, tmp_path):
    path = tmp_path / "result.json"
    args = [CONFIG, *SMALL, f"--checkpoint={reference}", f"--json={path}", "--split=test"]
    result = run(environment, "evaluate", *args)
    assert json.loads(result.stdout) == json.loads(path.read_text())
    results = json.loads(result.stdout)
    assert results["count"] == 500
    assert results["images_per_second"] > 0
    best = max(r["eval/top1"] for r in records_of(reference) if "eval/top1" in r)
    assert results["top1"] == pytest.approx(best)


def test_evaluation_depends_on_weights_and_split_but_not_on_the_batch(reference, data_dir):
    config = config_lib.from_json(reference / "config.json")
    config.data.data_dir = data_dir

    def evaluate(batch_size=250, **settings):
        config.data.eval_batch_size = batch_size
        settings = {"which": "last", "weights": "auto", "split": None} | settings
        return evaluate_checkpoint(config, reference, **settings)

    results = [evaluate(batch_size) for batch_size in (500, 96, 7)]
    assert [r["count"] for r in results] == [500] * 3
    assert len({r["top1"] for r in results}) == len({r["top5"] for r in results}) == 1
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], rel=1e-5)
    assert evaluate(weights="ema")["loss"] == pytest.approx(results[0]["loss"], rel=1e-6)
    assert evaluate(weights="model")["loss"] != pytest.approx(results[0]["loss"], rel=1e-3)
    assert evaluate(split="train")["count"] == 1297


def test_a_run_can_start_from_another_ones_weights(environment, reference, tmp_path):
    still = ["optim.lr", "optim.min_lr", "optim.warmup_lr"]
    run(
        environment,
        "train",
        CONFIG,
        *SMALL,
        f"--workdir={tmp_path}",
        f"--config.init_from={reference / 'checkpoints' / '120'}",
        *(f"--config.{name}=1e-30" for name in still),
        "--config.schedule.total=1 steps",
        "--config.schedule.warmup=0 steps",
    )
    assert f"from {reference / 'checkpoints' / '120'}" in (tmp_path / "train.log").read_text()
    ours, theirs = saved_arrays(tmp_path, 1), saved_arrays(reference, 120)
    names = [name for name in ours if name.startswith("model/params")]
    assert len(names) > 40
    for name in names:
        source = theirs[name.replace("model/", "ema/", 1)]
        np.testing.assert_allclose(ours[name], source, rtol=1e-6, err_msg=name)


def test_explain_draws_the_priors(environment, reference, tmp_path):
    result = run(
        *(environment, "explain", CONFIG, *SMALL),
        *(f"--checkpoint={reference}", "--weights=ema", f"--output={tmp_path}"),
    )
    assert "priors.png" in result.stdout
    assert (tmp_path / "explain.html").exists()
    for name in ("priors.png", "similarity.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    explained = json.loads((tmp_path / "explain.json").read_text())
    assert np.shape(explained["priors"]["0"]) == (3, 11, 11)
    assert not np.allclose(explained["priors"]["0"], 1, atol=1e-3)  # it has learned something
    scores = np.array(explained["locality_scores"])
    assert scores.shape == (2, 3)
    assert ((scores > 0) & (scores < 1)).all()


def test_explain_suggests_masks(environment, reference):
    """As the last line, an argument that a run takes as it stands there."""
    chosen = (f"--checkpoint={reference}", "--suggest_masks", "--images=40")
    result = run(environment, "explain", CONFIG, *SMALL, *chosen)
    *scores, argument = result.stdout.splitlines()
    assert scores[0].endswith("40 images")
    assert len(scores) == 3
    assert re.fullmatch(r"--config\.model\.masked_heads='\(\(\d, \(.*\)\),?\)'", argument)


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("train", ["--workdir={tmp}", "--config.optim.lrr=1"], "did you mean 'optim.lr'?"),
        ("train", ["--workdir={tmp}", "--config.model.name=spvit_z"], "did you mean 'spvit_"),
        ("train", ["--workdir={reference}", *SMALL, "--config.seed=1"], "seed: 0 → 1"),
        ("evaluate", ["--checkpoint={tmp}"], "neither a workdir nor a checkpoint"),
        ("evaluate", ["--checkpoint={reference}", *SMALL, "--step=77"], "its steps are"),
        ("evaluate", ["--checkpoint={reference}"], "is of another model. Missing: "),
        ("explain", ["--checkpoint={reference}"], "--output must be given, or --suggest_masks"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    name, args, words, environment, reference, tmp_path
):
    before = {path: path.stat().st_mtime_ns for path in reference.rglob("*") if path.is_file()}
    args = [arg.format(tmp=tmp_path / "new", reference=reference) for arg in args]
    result = run(environment, name, CONFIG, *args, check=False)
    assert result.returncode == 2
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert words in line
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "new").exists()
    after = {path: path.stat().st_mtime_ns for path in reference.rglob("*") if path.is_file()}
    assert after == before


def test_config_file_that_does_not_exist(environment, tmp_path):
    result = run(
        environment, "train", "--config=configs/digit.py", f"--workdir={tmp_path}", check=False
    )
    assert result.returncode == 2
    assert "error: there is no config file configs/digit.py" in result.stderr


@pytest.mark.slow
def test_learns_digits(environment, tmp_path):
    """The embedded default, cut to a fifth of its length, is far from chance already."""
    run(
        # As users compile it: it runs longer than it compiles.
        environment | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""},
        "train",
        CONFIG,
        f"--workdir={tmp_path}",
        "--config.schedule.total=280 steps",
        "--config.checkpoint.every=280 steps",
    )
    records = records_of(tmp_path)
    assert [r["eval/top1"] for r in records if "eval/top1" in r][-1] > 0.9
