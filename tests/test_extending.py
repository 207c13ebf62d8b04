"""The example of docs/extending.md, run as it stands there."""

import copy
import json
import re
import shlex

import pytest

from spvit_jax import models
from spvit_jax.errors import InputError
from spvit_jax.models import (
    EvaluationProtocol,
    ViTConfig,
    evaluation_protocol,
    from_dict,
    model_config,
    register_model,
)
from spvit_jax.training import losses
from tests.helpers import REPOSITORY
from tests.helpers.commands import records_of, run

TEXT = (REPOSITORY / "docs" / "extending.md").read_text()
# The example's model, a step at a time.
QUICK = [
    *("--config.data.batch_size=16", "--config.data.eval_batch_size=64"),
    *("--config.model.depth=2", "--config.model.dim=24", "--config.model.spatial_layers=1"),
    "--config.model.stem_width=8",
    "--config.schedule.total=2 steps",
    "--config.schedule.warmup=0 steps",
]


@pytest.fixture
def registry(monkeypatch):
    """What a test registers is gone after it."""
    for name in ("_MODELS", "_OWN_PROTOCOLS", "FAMILIES"):
        monkeypatch.setattr(models, name, copy.copy(getattr(models, name)))


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A folder with the example's module."""
    folder = tmp_path_factory.mktemp("mine")
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    (folder / "mine.py").write_text(code)
    return folder


def test_the_example_trains_and_evaluates(mine, environment, tmp_path):
    (lines,) = re.findall(r"^    (spvit-jax train.*?)\n\n", TEXT, re.DOTALL | re.MULTILINE)
    commands = [shlex.split(line) for line in lines.replace("\\\n", "").splitlines()]
    assert [words[1] for words in commands] == ["train", "evaluate"]
    found = environment | {"PYTHONPATH": str(mine)}
    for _, name, *args in commands:
        args = [arg.replace("runs/stripes", str(tmp_path / "run")) for arg in args]
        result = run(found, name, *args, *QUICK)
    assert json.loads(result.stdout)["count"] == 64
    # The writer was given what the records have.
    rows = [row.split("\t") for row in (tmp_path / "run" / "metrics.tsv").read_text().splitlines()]
    written = {(int(step), name): float(value) for step, name, value in rows}
    for record in records_of(tmp_path / "run"):
        step = record.pop("step")
        assert record == {name: written[step, name] for name in record}
    # Binary cross-entropy is summed over two classes: above 1, where cross-entropy is ln 2 or so.
    losses_seen = [r["train/loss"] for r in records_of(tmp_path / "run") if "train/loss" in r]
    assert losses_seen[0] > 1


def test_a_module_that_is_not_there_is_one_line(environment):
    args = ("--import=nowhere", "--config=digits", "--workdir=w")
    result = run(environment, "train", *args, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: --import=nowhere: No module named 'nowhere'; expected")


def test_unknown_writer(mine, environment, tmp_path):
    args = ("--import=mine", "--config=digits", f"--workdir={tmp_path}/run")
    found = environment | {"PYTHONPATH": str(mine)}
    result = run(found, "train", *args, "--config.writers=tabel", check=False)
    assert (result.returncode, result.stderr) == (
        2,
        "error: unknown writer 'tabel' in config.writers; did you mean 'table'?; --import=MODULE "
        "names the module that registers it\n",
    )


def test_unknown_loss():
    with pytest.raises(
        InputError, match=r"unknown loss 'cross_entropi' in loss.name; did you mean"
    ):
        losses.find_loss("cross_entropi")


@pytest.mark.usefixtures("registry")
def test_names_that_are_taken():
    register_model("spvit_s", model_config("spvit_s"))  # the same again is no mistake
    assert evaluation_protocol("spvit_s", (224, 224)).crop == 0.9
    with pytest.raises(InputError, match="there is a model 'deit_s' already"):
        register_model("deit_s", model_config("deit_b"))

    class ViTConfigOfMine(ViTConfig):
        pass

    ViTConfigOfMine.__name__ = "ViTConfig"
    with pytest.raises(InputError, match="there is a family 'ViTConfig' already"):
        register_model("vit_of_mine", ViTConfigOfMine())


@pytest.mark.usefixtures("registry")
def test_a_registered_family_is_read_back():
    """From what a checkpoint says of its model; its protocol holds at every size."""

    class Other(ViTConfig):
        pass

    config = Other(dim=24, num_heads=3)
    protocol = EvaluationProtocol(0.5, "bilinear")
    register_model("other", config, protocol)
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert evaluation_protocol("other", (384, 384)) == protocol
