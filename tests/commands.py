"""The project's commands as a user starts them, and a model small enough to train in a test."""

import json
import subprocess
import sys

from tests.conftest import REPOSITORY

CONFIG = "--config=configs/digits.py"
# Small and quick, but with everything that has a state: drop path, BatchNorm, an average.
SMALL = [
    "--config.model.depth=2",
    "--config.model.dim=24",
    "--config.model.spatial_layers=1",
    "--config.model.stem_width=8",
    "--config.data.batch_size=16",
    "--config.data.train_size=200",
    "--config.schedule.total=120 steps",
    "--config.schedule.warmup=10 steps",
    "--config.log_every=7 steps",
    "--config.eval_every=40 steps",
    "--config.checkpoint.every=10 steps",
]


def command(name, *args):
    return [sys.executable, "-m", f"spvit_jax.{name}", *map(str, args)]


def run(environment, name, *args, check=True):
    result = subprocess.run(
        command(name, *args), cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert not check or result.returncode == 0, result.stderr[-3000:]
    return result


def records_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
