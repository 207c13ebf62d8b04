"""The command, as a user starts it on a machine without a TPU."""

import json
import os

import pytest

from spvit_jax.errors import InputError
from spvit_jax.preflight import search
from spvit_jax.preflight.__main__ import preflight, sweep
from spvit_jax.preflight.topology import GIB
from tests.helpers.commands import run
from tests.helpers.configs import digits
from tests.helpers.tpu_compiler import needs_libtpu

pytestmark = [needs_libtpu, pytest.mark.usefixtures("lightly_optimized")]

SMALL = {"depth": 1, "dim": 12}


def small(data_dir, **model):
    config = digits("vit")
    config.data.data_dir = data_dir
    config.model.update(SMALL | model)
    return config


@pytest.fixture(scope="module")
def trials():
    return {}


@pytest.fixture
def _compile_once(trials, monkeypatch):
    """Lets tests that differ in what is beside the program share it."""
    compile_trial = search.compile_trial

    def remembered(replan, topology, changes, **options):
        key = str(replan({}, devices=topology.devices).config), topology.name, str(changes)
        if key not in trials:
            trials[key] = compile_trial(replan, topology, changes, **options)
        return trials[key]

    monkeypatch.setattr(search, "compile_trial", remembered)


@pytest.mark.usefixtures("_compile_once")
def test_a_launch_that_is_ready(data_dir, tmp_path, capfd):
    ready, result = preflight(
        small(data_dir), "v5e:2x2", workdir=tmp_path / "run", show_shardings=True
    )
    assert ready
    account = result["account"]
    assert (account["chips"], account["mesh"]) == (4, {"data": 4, "fsdp": 1})
    assert account["train_step"]["total_bytes"] == sum(
        account["train_step"]["memory_bytes"].values()
    )
    assert json.loads(json.dumps(result)) == result
    captured = capfd.readouterr()
    for words in (
        "topology        v5e:2x2, 4 chips with 1 host; mesh data 4 × fsdp 1",
        "data            ok: digits",
        "workdir         ok: ",
        "blocks/0/attn/qkv/kernel",
        "fits: a chip of v5e:2x2 needs",
        "the whole recipe",
    ):
        assert words in captured.out
    assert not (tmp_path / "run").exists()


def test_a_run_that_does_not_fit_is_refused_with_a_way_that_does(environment, tmp_path):
    # Of 147,456 images on a chip one layer keeps more than 15.75 GiB, of half of them less.
    args = (
        *("--config=configs/digits.py:vit", "--topology=v5e:2x2", "--ways=1"),
        *("--config.model.depth=1", "--config.data.batch_size=589824"),
        f"--json={tmp_path / 'account.json'}",
    )
    level = {"JAX_OPTIMIZATION_LEVEL": os.environ["JAX_OPTIMIZATION_LEVEL"]}
    result = run(environment | level, "preflight", *args, check=False)
    assert result.returncode == 1, result.stderr[-3000:]
    assert "does not fit: a chip of v5e:2x2 needs 23." in result.stdout
    assert "of the 15.75 that a program can use" in result.stdout
    assert "--config.optim.accumulate=2 " in result.stdout.partition("the fastest first:")[2]
    assert result.stderr.splitlines() == ["error: not ready to launch; see above"]
    record = json.loads((tmp_path / "account.json").read_text())
    assert record["needed_bytes"] > 15.75 * GIB
    (way,) = record["ways"]
    assert way["fits"]
    assert way["needed_bytes"] < 15.75 * GIB


def test_a_sweep_is_a_table(data_dir, capfd):
    result = sweep(small(data_dir), "v5e:2x2", batch_sizes=[64, 66], remats=[True], fsdps=[4])
    fits, refused = result["trials"]
    assert fits["account"]["remat"]
    assert fits["account"]["mesh"] == {"data": 1, "fsdp": 4}
    assert "66; expected a multiple of 4" in refused["reason"]
    table = capfd.readouterr().out.splitlines()[-2:]
    assert table[0].startswith("| 64 | True | 4 | 0.0")


@pytest.mark.usefixtures("_compile_once")
def test_something_wrong_with_the_launch_is_not_ready(data_dir, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    ready, result = preflight(small(data_dir), "v5e:2x2", workdir=tmp_path / "file" / "run")
    assert result["fits"]
    assert not ready
    assert "workdir         wrong: " in capfd.readouterr().out


@pytest.mark.parametrize(
    ("changes", "topology", "words"),
    [
        ({}, "v5e:3x3", "unknown topology 'v5e:3x3'; v5e comes in 1x1, 2x2, .* mean 'v5e:2x4'"),
        ({"data.batch_size": 66}, "v5e:2x2", "data.batch_size is 66; expected a multiple of 4: 4"),
        ({"optim.accumulate": 3}, "v5e:2x2", "multiple of 12: 4 devices times 3 micro-batches"),
        ({"mesh.fsdp": 3}, "v5e:2x2", "mesh.fsdp=3 do not make up the 4 devices"),
        ({"model.num_heads": 5}, "v5e:2x2", "dim 12 is not a multiple of num_heads 5"),
        ({"data.dataset": "folder:/nowhere"}, "v5e:2x2", "not a folder"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_compiled(changes, topology, words, data_dir):
    config = small(data_dir)
    for path, value in changes.items():
        section, _, field = path.rpartition(".")
        config[section][field] = value
    with pytest.raises(InputError, match=words):
        preflight(config, topology)


def test_flags_are_checked(environment):
    args = ("--config=configs/digits.py", "--topology=v5e:2x2", "--sweep", "--sweep_fsdp=two")
    result = run(environment, "preflight", *args, check=False)
    assert result.returncode == 2
    assert result.stderr == "error: --sweep_fsdp=two: expected numbers such as 1024,2048\n"
