"""A run of which nothing is on this machine: prepared, trained, killed, continued, evaluated and
converted in a bucket, to the same bits as on a disk."""

import json
import os
import signal
import subprocess

import pytest
from etils import epath

from spvit_jax import config as config_lib
from spvit_jax.training import checkpoint
from tests.helpers import REPOSITORY
from tests.helpers.bucket import serving
from tests.helpers.commands import CONFIG, SMALL, assert_same_run, command, run, wait_until

SHORT = [
    *SMALL,
    "--config.schedule.total=24 steps",
    "--config.log_every=2 steps",
    "--config.eval_every=12 steps",
    "--config.checkpoint.every=4 steps",
]


@pytest.fixture(scope="module")
def bucket():
    with serving("journey") as bucket:
        yield bucket


def outputs(where, environment, config):
    """What evaluation and conversion of the run in a folder write there, apart from the speed."""
    run(environment, "evaluate", *config, f"--checkpoint={where}", f"--json={where}/result.json")
    results = json.loads((where / "result.json").read_text())
    del results["images_per_second"]
    weights = where / "weights.safetensors"
    run(environment, "convert", "--reverse", f"--input={where}", f"--output={weights}")
    run(environment, "convert", f"--input={weights}", f"--output={where}/again")
    return results, weights.read_bytes(), checkpoint.newest(where / "again")


def test_the_whole_journey(bucket, tmp_path):
    environment = dict(os.environ)  # with the bucket's server in it
    there, here = bucket / "run", epath.Path(tmp_path / "run")
    run(environment, "data.prepare", "--dataset=digits", f"--data_dir={bucket}/data")
    config = [CONFIG, *SHORT, f"--config.data.data_dir={bucket}/data"]

    process = subprocess.Popen(
        command("train", *config, f"--workdir={there}"), cwd=REPOSITORY, env=environment
    )
    wait_until(lambda: (checkpoint.newest(there) or 0) >= 8, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped = checkpoint.newest(there)
    assert stopped < 24
    run(environment, "train", *config, f"--workdir={there}")
    log = (there / "train.log").read_text()
    assert "from scratch" in log  # of the first process
    assert f"start           at step {stopped} of 24" in log
    assert "complete        at step 24, in gs://journey/run" in log
    assert len(list(there.glob("events.out.tfevents.*"))) == 2

    run(environment, "train", CONFIG, *SHORT, f"--workdir={here}")
    assert_same_run(there, here, 24)
    ours, theirs = (config_lib.from_json(path / "config.json") for path in (there, here))
    assert config_lib.differences(ours, theirs) == []
    assert outputs(there, environment, config) == outputs(here, environment, config)
    assert not (REPOSITORY / "gs:").exists()
