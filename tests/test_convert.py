"""The whole way on real data: train, to PyTorch, back, to a larger input, and fine-tune there."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

from spvit_jax import config as config_lib
from spvit_jax import weights
from spvit_jax.augment import mix
from spvit_jax.convert import write_checkpoint, write_torch
from spvit_jax.data import datasets, pipeline
from spvit_jax.data.crops import EvalTransform
from spvit_jax.errors import InputError
from spvit_jax.evaluate import evaluate_checkpoint
from spvit_jax.interop import files, to_theirs
from spvit_jax.models import model_config
from spvit_jax.models.complexity import count_parameters
from spvit_jax.models.naming import shapes_of
from spvit_jax.train import train
from spvit_jax.training import sharding
from tests.helpers.commands import CONFIG, SMALL, records_of, run
from tests.helpers.configs import digits
from tests.helpers.torch_models import TorchViT
from tests.helpers.variables import random_variables
from tests.helpers.variables import run as run_model

SIZE_16 = "--config.model.image_size=16"


@pytest.fixture(scope="module")
def trained(environment, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("convert") / "trained"
    run(environment, "train", CONFIG, f"--workdir={workdir}", *SMALL)
    return workdir


@pytest.fixture(scope="module")
def exported(environment, trained):
    path = trained.parent / "digits.pth"
    args = ["--reverse", "--weights=ema", f"--input={trained}", f"--output={path}"]
    result = run(environment, "convert", *args)
    assert "SP-SA in 1 layers" in result.stdout
    return path


def evaluate(environment, *args):
    return json.loads(run(environment, "evaluate", CONFIG, *SMALL, *args).stdout)


def best_of(workdir):
    return max(r["eval/top1"] for r in records_of(workdir) if "eval/top1" in r)


def test_pytorch_predicts_the_same_on_all_test_images(trained, exported, data_dir):
    config = config_lib.from_json(trained / "config.json")
    model = config_lib.model_settings(config, num_classes=10)
    module = TorchViT(model).eval()
    module.load_state_dict(torch.load(exported, weights_only=True)["state_dict"], strict=True)
    source = datasets.load("digits", "test", data_dir)
    transform = EvalTransform(model.image_shape, *config_lib.evaluation_of(config, (12, 12)))
    with pipeline.eval_batches(source, transform, batch_size=500) as batches:
        batch = next(batches)
    images = np.asarray(mix.normalize(jnp.asarray(batch["image"]), (0.5,) * 3, (0.5,) * 3))
    with torch.no_grad():
        theirs = module(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()

    found = weights.find(trained, model)
    ours = np.asarray(run_model(found.load(model, sharding.make_mesh(-1, 1)), jnp.asarray(images)))
    assert ours.shape == (500, 10)
    assert abs(ours - theirs).max() <= 3e-5 * theirs.std()
    np.testing.assert_array_equal(ours.argmax(1), theirs.argmax(1))
    assert (theirs.argmax(1) == batch["label"]).mean() == pytest.approx(best_of(trained))


def test_back_again_it_is_the_same_checkpoint(environment, trained, exported, tmp_path):
    """From a file as the authors would have saved it, which does not say what model it is of."""
    content = torch.load(exported, weights_only=True)
    theirs = {f"module.{name}": value for name, value in content["state_dict"].items()}
    path, output, again = tmp_path / "a.pth.tar", tmp_path / "back", tmp_path / "again.safetensors"
    torch.save({"state_dict": theirs, "args": argparse.Namespace(model="spvit")}, path)
    args = ["convert", CONFIG, *SMALL, f"--input={path}", f"--output={output}"]
    result = run(environment, *args)
    assert "10 classes, 12×12 pixels" in result.stdout
    assert evaluate(environment, f"--checkpoint={output}")["top1"] == pytest.approx(
        best_of(trained)
    )
    run(environment, "convert", "--reverse", f"--input={output}", f"--output={again}")
    arrays = safetensors.numpy.load_file(again)
    assert arrays.keys() == content["state_dict"].keys()
    for name, value in content["state_dict"].items():
        assert arrays[name].tobytes() == value.numpy().tobytes(), name
    refused = run(environment, *args, check=False)
    assert refused.returncode == 2
    assert "exists; choose another --output" in refused.stderr


def evaluate_at_16(path, trained, data_dir):
    config = config_lib.from_json(trained / "config.json")
    config.model.image_size = 16
    config.data.data_dir = data_dir
    config.data.eval_batch_size = 500
    return evaluate_checkpoint(config, path, which="last", weights="auto", split=None)


def test_larger_images_are_evaluated_and_fine_tuned_on(
    environment, trained, exported, data_dir, tmp_path
):
    converted, tuned = tmp_path / "16", tmp_path / "tuned"
    result = run(
        environment, "convert", f"--input={exported}", f"--output={converted}", "--image_size=16"
    )
    assert "from a grid of 6×6 to 8×8 patches" in result.stdout
    before = [evaluate_at_16(path, trained, data_dir) for path in (trained, exported, converted)]
    assert [results["count"] for results in before] == [500] * 3
    assert len({results["top1"] for results in before}) == 1
    assert len({round(results["loss"], 5) for results in before}) == 1
    run(
        environment,
        "train",
        CONFIG,
        *SMALL,
        SIZE_16,
        f"--workdir={tuned}",
        f"--config.init_from={exported}",
        "--config.schedule.total=8 epochs",
        "--config.schedule.warmup=0 steps",
        "--config.optim.ema=0.8",
    )
    assert f"at step 0 of 100, from {exported}" in (tuned / "train.log").read_text()
    after = evaluate_at_16(tuned, trained, data_dir)
    assert after["loss"] < before[0]["loss"]
    assert after["top1"] >= before[0]["top1"]


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb-was-run",)


def bomb(path):
    torch.save({"state_dict": {"head.weight": torch.ones(2, 2)}, "args": Bomb()}, path)


def truncated(path):
    torch.save({"state_dict": {"head.weight": torch.ones(200, 200)}}, path)
    path.write_bytes(path.read_bytes()[:5000])


def other(path):
    module = TorchViT(model_config("deit_ti", depth=2, image_size=32))
    torch.save({"model": module.state_dict()}, path)


def page(path):
    path.write_text("<!doctype html><title>404</title>")


def deeper(path):
    """Of another depth and with more SP-SA layers than --arch has layers."""
    settings = {"dim": 24, "num_heads": 3, "stem_width": 8, "image_size": 32}
    module = TorchViT(model_config("spvit_s", depth=20, spatial_layers=18, **settings))
    torch.save({"model": module.state_dict()}, path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (bomb, "is refused: it asks for posix.mkdir to be run"),
        (truncated, "is damaged or not a file of PyTorch weights"),
        (other, "is of another model. Missing: "),
        (deeper, "is of another model. Missing: "),
        (page, "is a web page"),
    ],
)
def test_a_bad_file_is_one_line_and_leaves_nothing_behind(make, words, environment, tmp_path):
    path = tmp_path / "weights.pth"
    make(path)
    output = tmp_path / "new" / "output"
    args = ["--arch=spvit_s", f"--input={path}", f"--output={output}"]
    result = run(environment, "convert", *args, check=False)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert words in lines[0]
    assert "Traceback" not in result.stderr
    assert os.listdir(tmp_path) == ["weights.pth"]


def random_file(path, config):
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.normal(size=leaf.shape).astype(np.float32)
        for name, leaf in shapes_of(config).items()
    }
    files.write(path, to_theirs(arrays, config), config.to_dict())


def test_a_file_says_whether_it_has_an_average_and_which_was_taken(data_dir, tmp_path, caplog):
    config = digits()
    config.data.data_dir = data_dir
    config.data.eval_batch_size = 500
    small = {"depth": 1, "dim": 24, "num_heads": 3, "image_size": 12, "patch_size": 2}
    config.model = config_lib.base().model
    config.model.update(name="deit_ti", **small)
    model = config_lib.model_settings(config, num_classes=10)
    sets = {}
    for key, seed in (("state_dict", 0), ("state_dict_ema", 1)):
        variables = random_variables("deit_ti", seed=seed, num_classes=10, **small)
        arrays = {name: np.asarray(leaf) for name, leaf in weights.arrays_of(variables).items()}
        theirs = to_theirs(arrays, model)
        sets[key] = {name: torch.from_numpy(array) for name, array in theirs.items()}
    both, plain = tmp_path / "both.pth", tmp_path / "plain.pth"
    torch.save(sets, both)
    torch.save({"state_dict": sets["state_dict"]}, plain)

    def result(path, weights):
        caplog.clear()
        found = evaluate_checkpoint(config, path, which="best", weights=weights, split=None)
        said = [message for message in caplog.messages if "moving average" in message]
        return found["loss"], found["weights"], said

    average, taken, [message] = result(both, "auto")
    assert taken == "ema"
    assert message.startswith(f"note: {both}: its moving average is taken; --weights=model")
    loss, taken, [message] = result(both, "model")
    assert taken == "model"
    assert message == f"note: {both}: the weights themselves are taken, not its moving average"
    assert loss != average
    again, taken, [message] = result(plain, "auto")
    assert taken == "model"
    assert message == f"note: {plain}: it has no moving average; the weights themselves are taken"
    assert again == loss


PEAK = """
import functools, gc, pathlib, sys
from spvit_jax import convert
from spvit_jax.models import model_config

def memory(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))

for source, output in zip(sys.argv[1::2], sys.argv[2::2]):
    gc.collect()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = memory("VmRSS")
    write = convert.write_checkpoint
    if output.endswith(".safetensors"):
        write = functools.partial(convert.write_torch, dialect="authors")
    convert.convert(pathlib.Path(source), pathlib.Path(output), None, write=write)
print(memory("VmHWM") - before)
"""


@pytest.mark.parametrize("direction", ["in", "out"])
def test_a_conversion_takes_twice_the_memory_of_the_file(direction, environment, tmp_path):
    """Beside what JAX's compiler and orbax take of a file of any size, about 40 MB."""
    arguments = []
    for name, dim in (("small", 16), ("large", 512)):  # the small one has everything imported
        variables = random_variables("deit_s", depth=8, image_size=32, dim=dim, num_heads=4)
        config = model_config("deit_s", depth=8, image_size=32, dim=dim, num_heads=4)
        if direction == "in":
            source, output = tmp_path / f"{name}.pth", tmp_path / name
            write_torch(source, variables, config, dialect="authors")
        else:
            source, output = tmp_path / name, tmp_path / f"{name}.safetensors"
            write_checkpoint(source, variables, config)
        arguments += [source, output]
    size = 4 * count_parameters(config)
    assert size > 90e6
    program = [sys.executable, "-c", PEAK, *map(str, arguments)]
    # Otherwise malloc keeps pools for each thread, as full as they happen to be.
    one_pool = environment | {"MALLOC_ARENA_MAX": "1"}
    result = subprocess.run(program, env=one_pool, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    peak = int(result.stdout.splitlines()[-1])
    print(f"{direction}: {peak / size:.2f} of the file")
    assert peak < 2 * size + 64e6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_classes": 7}, "has a head of 7 classes, and 10 are asked for"),
        ({"spatial_layers": 2}, "set config.model.spatial_layers=2 and config.model.class_token"),
        ({"dim": 24}, "Wrong shape: "),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_training(changes, words, data_dir, tmp_path):
    config = digits()
    config.data.data_dir = data_dir
    model = dataclasses.replace(config_lib.model_settings(config, num_classes=10), **changes)
    path = tmp_path / "weights.safetensors"
    random_file(path, model)
    config.init_from = str(path)
    with pytest.raises(InputError) as error:
        train(config, tmp_path / "run")
    assert words in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_function_that_the_weights_do_not_show_is_warned_of(tmp_path, caplog):
    """A checkpoint of masked heads evaluated without them would be wrong without a word."""
    trained = model_config("deit_ti", depth=2, image_size=32, masked_heads=((1, 3), (1, 0)))
    path = tmp_path / "mait.safetensors"
    random_file(path, trained)
    found = weights.find(path, None)
    assert found.config == trained
    caplog.clear()
    found.check(dataclasses.replace(trained, image_size=64, drop_path=0.3, dtype="bfloat16"))
    assert caplog.messages == []
    found.check(dataclasses.replace(trained, masked_heads=None))
    assert caplog.messages == [
        f"warning: {path} was trained with masked_heads ((1, 3), (1, 0)), and None is asked for"
    ]
