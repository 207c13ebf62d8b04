"""What the real commands say on the standard error: warnings, and one line for what is wrong."""

import resource
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags
from PIL import Image

from spvit_jax import cli
from spvit_jax import config as config_lib
from spvit_jax.models.initializers import CountedRngs
from spvit_jax.training import checkpoint
from spvit_jax.training.state import Variables
from tests.helpers import REPOSITORY
from tests.helpers.commands import command, newest_step, run
from tests.helpers.configs import tiny

TINY = ["--config=configs/digits.py:vit", "--config.model.depth=1", "--config.model.dim=12"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of images, of which the first of each split is damaged."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for number in range(8):
            path = folder / split / "ab"[number % 2] / f"{split}{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (12, 12, 3)).astype(np.uint8)).save(path)
        damaged = folder / split / "a" / f"{split}0.png"
        damaged.write_bytes(damaged.read_bytes()[:60])
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights that were trained with another divisor of the residual branches."""
    config = tiny("data")
    model = config_lib.model_settings(config, num_classes=2)
    workdir = tmp_path_factory.mktemp("weights")
    checkpoint.save_variables(
        workdir, Variables.of(model.build(CountedRngs(jax.random.key(0)))), model
    )
    return workdir


def test_warnings_are_on_the_standard_error(environment, photographs, weights, tmp_path):
    """Of weights, of images and of a run's own record; of training in its log too."""
    settings = [
        *TINY,
        f"--config.data.dataset=folder:{photographs}",
        "--config.model.skip_lam=2.0",
    ]
    evaluated = run(environment, "evaluate", *settings, f"--checkpoint={weights}")
    trained = "was trained with skip_lam 1.0, and 2.0 is asked for"
    assert evaluated.stderr.count(trained) == 1
    assert "unreadable      test0.png" in evaluated.stderr

    workdir = tmp_path / "run"
    result = run(
        environment,
        "train",
        *settings,
        f"--workdir={workdir}",
        f"--config.init_from={weights}",
        "--config.data.batch_size=8",
        "--config.schedule.total=1 steps",
        "--config.schedule.warmup=0 steps",
    )
    log = (workdir / "train.log").read_text()
    assert result.stderr.count(trained) == log.count(trained) == 1
    for words in ("unreadable      train0.png", "unreadable      test0.png"):
        assert words in result.stderr
        assert words in log


def test_a_full_disk_is_one_line(environment, data_dir, tmp_path):
    """Files above 50 kB cannot be written: those that hold a checkpoint's arrays."""
    args = [
        "--config=configs/digits.py:vit",
        "--config.model.depth=1",
        "--config.data.train_size=64",
        "--config.schedule.total=1 steps",
        "--config.schedule.warmup=0 steps",
        f"--workdir={tmp_path}",
    ]
    result = subprocess.run(
        command("train", *args),
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert result.returncode == 1, result.stderr[-3000:]
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith(f"error: a checkpoint in {tmp_path} cannot be written: File too large; ")
    assert "Traceback" not in result.stderr
    assert " complete  " not in result.stderr
    assert newest_step(tmp_path) == 0


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("def get_config():\n    return base(\n", ":2: SyntaxError: '(' was never closed"),
        ("import nothing_of_this_name\n", ":1: ModuleNotFoundError: No module named 'nothing_of"),
        ("\ndef get_config():\n    open('/nowhere/x')\n", ":3: FileNotFoundError: "),
        ("\ndef get_config():\n    raise ValueError('a\\nb')\n", ":3: ValueError: a b"),
        ("\ndef get_config():\n    return {}['key']\n", ":3: KeyError: 'key'"),
        ("settings = 1\n", ": AttributeError: module"),
        ("def get_config():\n    return {}\n", ": its get_config() does not give a configuration"),
    ],
)
def test_a_config_file_that_raises_is_one_line_with_the_place(
    text, place, tmp_path, capsys, monkeypatch
):
    path = tmp_path / "mine.py"
    path.write_text(text)
    monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    config_flags.DEFINE_config_file("config", flag_values=flags.FLAGS)
    with pytest.raises(SystemExit) as ended:
        cli._parse(["train", f"--config={path}"], cli)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"error: {path}{place}")
    assert len(lines) == 1
