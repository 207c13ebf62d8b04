"""Settings that cannot work are refused before the first step, and what a run says is true."""

import json
import os
import re
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spvit_jax import logs
from spvit_jax.errors import InputError
from spvit_jax.evaluate import evaluate_checkpoint
from spvit_jax.explain import explain
from spvit_jax.preflight.__main__ import preflight
from spvit_jax.train import train
from spvit_jax.training import evaluation, step
from spvit_jax.training.timeline import Timeline
from tests.helpers.commands import assert_same_run, newest_step, saved_arrays
from tests.helpers.configs import digits, tiny


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.name": "deit_tiny"}, "unknown model 'deit_tiny'; did you mean 'deit_ti'"),
        ({"model.image_size": 13}, "13×13 is not a multiple of patch_size 2"),
        ({"model.spatial_layers": 4}, "class_token_layer None at depth 4; expected at most 3"),
        ({"model.masked_heads": ((2, 1),)}, "covers 2 layers, the model has 4"),
        ({"model.masked_heads": ((4, 4),)}, "asks for 4 masked heads"),
        ({"model.num_heads": 5}, "dim 48 is not a multiple of num_heads 5"),
        ({"data.batch_size": 60}, "data.batch_size is 60; expected a multiple of 8: 8 devices"),
        ({"optim.accumulate": 3}, "multiple of 24: 8 devices times 3 micro-batches"),
        ({"mesh.data": 3}, "mesh.data=3 and mesh.fsdp=1 do not make up the 8 devices"),
        ({"mesh.sharding": "zero"}, "unknown mesh.sharding 'zero'"),
        ({"data.dataset": "folder:/nowhere"}, "not a folder"),
        ({"data.train_size": 5000}, "expected 1 to 1297"),
        ({"schedule.total": "forever"}, "duration 'forever' cannot be read"),
        ({"init_from": "/nowhere"}, "/nowhere is neither a workdir nor a checkpoint"),
    ],
)
def test_refused_before_the_first_step(changes, words, data_dir, tmp_path):
    config = digits()
    config.data.data_dir = data_dir
    for path, value in changes.items():
        section, _, field = path.rpartition(".")
        target = config[section] if section else config
        target[field] = value
    workdir = tmp_path / "run"
    with pytest.raises(InputError) as error:
        train(config, workdir)
    assert words in str(error.value)
    assert not workdir.exists()


def test_a_teacher_needs_a_token_that_learns_from_it(data_dir, tmp_path):
    config = digits()
    config.data.data_dir = data_dir
    config.distill.teacher = str(tmp_path)
    with pytest.raises(InputError, match="no distillation token to learn from it"):
        train(config, tmp_path / "run")
    config.model.distilled = True
    with pytest.raises(InputError, match="neither a workdir nor a checkpoint"):
        train(config, tmp_path / "run")


def test_a_dry_run_takes_one_step_and_writes_nothing(data_dir, tmp_path, capfd):
    config = digits("vit")
    config.data.data_dir = data_dir
    config.model.update({"depth": 1, "dim": 12})
    config.augment.repeats = 3
    assert train(config, tmp_path / "run", dry_run=True) is False
    assert list(tmp_path.iterdir()) == []
    shown = capfd.readouterr().err
    for words in ('"total": 1600', "1,297 to train on", "dry run         from scratch, loss 2."):
        assert words in shown


@pytest.mark.parametrize(
    "command",
    [
        train,
        lambda config, path: evaluate_checkpoint(
            config, path, which="best", weights="auto", split=None
        ),
        lambda config, path: explain(config, path, path),
        lambda config, path: preflight(config, "v5e:2x2"),
    ],
    ids=["train", "evaluate", "explain", "preflight"],
)
def test_names_are_checked_before_data(command, tmp_path):
    """Where there is none, and a name is wrong, the name is what is said."""
    for path, words in (
        ("model.name", "unknown model 'digit_z'"),
        ("model.dtype", "dtype is 'digit_z'"),
        ("optim.name", "unknown optim.name 'digit_z'"),
        ("mesh.sharding", "unknown mesh.sharding 'digit_z'"),
        ("augment.interpolation", "unknown interpolation 'digit_z'"),
        ("augment.eval_interpolation", "unknown interpolation 'digit_z'"),
        ("augment.rand_augment", "'digit_z'"),
    ):
        config = digits()
        config.data.update(dataset="folder:/nowhere", data_dir=str(tmp_path))
        section, _, field = path.partition(".")
        config[section][field] = "digit_z"
        with pytest.raises(InputError) as error:
            command(config, tmp_path / "run")
        assert words in str(error.value), path
    config = digits()
    config.data.update(dataset="folder:/nowhere", data_dir=str(tmp_path))
    with pytest.raises(InputError, match="/nowhere"):
        command(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("interrupted", "words", "step"), [(False, "complete  ", 2), (True, "SIGTERM: saved", 0)]
)
def test_saved_is_said_when_it_is_true(
    interrupted, words, step, data_dir, tmp_path, monkeypatch, log
):
    """On a disk that takes its time to give a checkpoint its name."""
    config = tiny(data_dir)
    config.schedule.total = config.eval_every = config.checkpoint.every = "2 steps"
    rename, info, found = os.rename, log.info, {}

    def late(source, target):
        time.sleep(1 if "checkpoints" in str(source) else 0)
        rename(source, target)

    def watch(text, *args):
        found[text] = (tmp_path / "checkpoints" / str(step)).is_dir()
        if interrupted and text.startswith("start "):
            os.kill(os.getpid(), signal.SIGTERM)
        info(text, *args)

    monkeypatch.setattr(os, "rename", late)
    monkeypatch.setattr(log, "info", watch)
    assert train(config, tmp_path) is not interrupted
    assert [there for text, there in found.items() if text.startswith(words)] == [True]
    assert [there for text, there in found.items() if text.startswith("start ")] == [False]


def test_a_sigterm_during_an_evaluation_is_seen_between_its_batches(
    data_dir, tmp_path, monkeypatch
):
    """All is saved at once; the same command begins with the evaluation, and ends the same."""
    config = tiny(data_dir)
    config.eval_every, config.data.eval_batch_size = "2 steps", 48
    assert train(config, tmp_path / "whole")
    evaluated, put_batch = [], evaluation.put_batch

    def put_and_terminate(batch, mesh):
        evaluated.append(len(batch["label"]))
        if len(evaluated) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return put_batch(batch, mesh)

    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "put_batch", put_and_terminate)
        assert train(config, tmp_path / "run") is False
        assert evaluated == [48, 48, 48]  # of 500 images
        assert newest_step(tmp_path / "run") == 2
        assert "eval/count" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    saved = tmp_path / "run" / "checkpoints"
    assert not (saved / "2" / "metrics").exists()
    assert train(config, tmp_path / "run")
    assert [(saved / step / "metrics").exists() for step in "1234"] == [False, True, False, True]
    assert_same_run(tmp_path / "run", tmp_path / "whole", step=4, names=("model/", "opt_state/"))

    evaluated.clear()
    monkeypatch.setattr(evaluation, "put_batch", put_and_terminate)
    chosen = {"which": "best", "weights": "auto", "split": None}
    assert evaluate_checkpoint(config, tmp_path / "run", **chosen) is None
    assert evaluated == [48, 48, 48]


def test_the_weights_themselves_are_evaluated_beside_their_average(data_dir, tmp_path, monkeypatch):
    """Under a name of its own, which chooses no checkpoint; a SIGTERM takes neither for done."""
    config = tiny(data_dir)
    config.optim.update(ema=0.5, lr=0.03)
    config.eval_raw, config.eval_every = True, "2 steps"
    assert train(config, tmp_path / "whole")
    chosen = {"which": "last", "split": None}
    last = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    for prefix, weights in (("eval", "ema"), ("eval_raw", "model")):
        found = evaluate_checkpoint(config, tmp_path / "whole", weights=weights, **chosen)
        assert {name: last[f"{prefix}/{name}"] for name in ("loss", "top1", "top5", "count")} == {
            name: found[name] for name in ("loss", "top1", "top5", "count")
        }
    assert last["eval/loss"] != last["eval_raw/loss"]
    metrics = (tmp_path / "whole" / "checkpoints" / "4" / "metrics" / "metrics").read_text()
    assert json.loads(metrics)["loss"] == last["eval/loss"]

    batches, put_batch = [], evaluation.put_batch

    def put_and_terminate(batch, mesh):
        batches.append(batch)
        if len(batches) == 3:  # the first of the weights themselves
            os.kill(os.getpid(), signal.SIGTERM)
        return put_batch(batch, mesh)

    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "put_batch", put_and_terminate)
        assert train(config, tmp_path / "run") is False
    assert "eval" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert train(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole", step=4)


def test_times_add_up_and_a_profile_has_the_parts_of_a_step(data_dir, tmp_path, monkeypatch):
    config = tiny(data_dir)
    config.profile.update(start=1, steps=2)
    timelines = []

    class Kept(Timeline):
        def __init__(self, *args):
            super().__init__(*args)
            timelines.append(self)

    monkeypatch.setattr("spvit_jax.train.Timeline", Kept)
    start = time.monotonic()
    assert train(config, tmp_path)
    wall = time.monotonic() - start
    seconds = timelines[0].seconds()
    assert sum(seconds.values()) == pytest.approx(wall, rel=0.02)
    assert all(seconds[phase] > 0 for phase in ("start", "compile", "step", "evaluation"))
    records = [json.loads(line) for line in (tmp_path / "times.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record in records:
        shares = [value for name, value in record.items() if name.startswith("share_")]
        assert sum(shares) == pytest.approx(1)
        assert "mfu" not in record  # of a CPU no peak is known
    (line,) = re.findall("  *time  .*", (tmp_path / "train.log").read_text())
    assert sum(map(float, re.findall(r"([\d.]+)%", line))) == pytest.approx(100, abs=0.5)

    (trace,) = tmp_path.glob("plugins/profile/step_1-process_0/*.xplane.pb")
    content = trace.read_bytes()
    for part in ("attention", "mlp", "patch_embed", "optimizer", "augment", "heads"):
        assert b"jit(train_step)" in content
        assert f"/{part}/".encode() in content, part
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    steps = [dict(event.stats)["step_num"] for event in events if event.name == "train"]
    assert steps == [1, 2]
    assert {"input", "evaluation", "checkpoint"} <= {event.name for event in events}


def test_a_gradient_that_is_not_a_number_is_never_saved(data_dir, tmp_path, monkeypatch):
    """Though the loss of that step is one; the step is named, and the state before it is kept."""
    config = tiny(data_dir)
    config.eval_every = "4 steps"
    gradients = step._gradients
    poisoned = jax.random.key_data(step.key_for(jax.random.key(config.seed), "drop_path", 2))

    def third_is_nan(model, images, targets, key, settings):
        grads, stats, metrics = gradients(model, images, targets, key, settings)
        wrong = jnp.where((jax.random.key_data(key) == poisoned).all(), jnp.nan, 0)
        return jax.tree.map(lambda grad: grad + wrong, grads), stats, metrics

    with monkeypatch.context() as patched:
        patched.setattr(step, "_gradients", third_is_nan)
        with pytest.raises(FloatingPointError, match="the loss at step 3 or its gradient"):
            train(config, tmp_path)
    assert newest_step(tmp_path) == 2
    for name, array in saved_arrays(tmp_path, 2).items():
        assert np.isfinite(array).all(), name
    assert train(config, tmp_path)


def test_a_state_that_overflows_in_its_last_update_is_never_saved(data_dir, tmp_path, monkeypatch):
    """No later step is there to see it."""
    config = tiny(data_dir)
    config.eval_every = "4 steps"

    def shoot(params, updates):
        return jax.tree.map(lambda old, new: old + jnp.inf * jnp.sign(new), params, updates)

    monkeypatch.setattr(step.optax, "apply_updates", shoot)
    with pytest.raises(FloatingPointError, match="after step 1 the state is not finite, in model/"):
        train(config, tmp_path)
    assert newest_step(tmp_path) == 0


def test_logits_that_are_not_numbers_stop_an_evaluation(data_dir, tmp_path, monkeypatch):
    """That of training, before a checkpoint is made of it, and the command's."""
    config = tiny(data_dir)
    config.schedule.update(total="1 steps", warmup="0 steps")
    assert train(config, tmp_path / "good")
    meshes = []
    eval_step = step.eval_step

    def broken(model, batch, settings):
        meshes.append(jax.sharding.get_abstract_mesh().axis_names)
        params = jax.tree.map(lambda leaf: leaf * jnp.nan, model.params)
        return eval_step(model.replace(params=params), batch, settings=settings)

    monkeypatch.setattr("spvit_jax.training.run.eval_step", broken)
    monkeypatch.setattr("spvit_jax.plan.eval_step", broken)
    words = "the logits of 500 of 500 images are not finite"
    with pytest.raises(FloatingPointError, match=words):
        train(config, tmp_path / "run")
    assert newest_step(tmp_path / "run") == 0
    with pytest.raises(FloatingPointError, match=words):
        evaluate_checkpoint(config, tmp_path / "good", which="best", weights="auto", split=None)
    assert meshes == [("data", "fsdp")] * 2  # both are compiled on the mesh


def test_a_dense_head_without_token_labels_is_said_once(data_dir, tmp_path, capfd, monkeypatch):
    """Before the first step, which is not waited for."""
    monkeypatch.setattr("spvit_jax.train._take_one_step", lambda *_: None)
    words = "has a head for each patch and config.token_labels.path is not set"
    spvit = {"depth": 2, "spatial_layers": 1, "stem_width": 8}
    for model, settings, weight, times in (
        ("spvit", spvit, 1.0, 1),
        ("spvit", spvit, 0.0, 0),
        ("vit", {}, 1.0, 0),
    ):
        config = tiny(data_dir, model, **settings)
        config.loss.dense_weight = weight
        logs.start()  # as all commands do
        train(config, tmp_path / "run", dry_run=True)
        assert capfd.readouterr().err.count(words) == times
