"""A run of which nothing is on this machine: prepared, trained, killed, continued, evaluated and
converted in a bucket, to the same bits as on a disk."""

import json
import os

from etils import epath

from spvit_jax import config as config_lib
from spvit_jax.training import checkpoint
from tests.helpers import REPOSITORY
from tests.helpers.bucket import serving
from tests.helpers.commands import Command, assert_same_run, run, wait_until

CONFIG = [
    "--config=configs/digits.py:vit",
    "--config.model.depth=1",
    "--config.model.dim=12",
    "--config.data.batch_size=16",
    "--config.data.train_size=100",
    "--config.schedule.total=12 steps",
    "--config.schedule.warmup=1 steps",
    "--config.log_every=1 steps",
    "--config.eval_every=6 steps",
    "--config.checkpoint.every=2 steps",
]


def test_the_whole_journey(tmp_path):
    with serving("journey") as bucket:
        there, here = bucket / "run", epath.Path(tmp_path / "run")
        environment = dict(os.environ)  # with the bucket's server in it
        run(environment, "data.prepare", "--dataset=digits", f"--data_dir={bucket}/data")
        config = [*CONFIG, f"--config.data.data_dir={bucket}/data"]

        process = Command(environment, "spvit_jax.train", *config, f"--workdir={there}")
        wait_until(lambda: checkpoint.newest(there) is not None, process)
        process.kill()
        process.wait()
        stopped = checkpoint.newest(there)
        assert stopped < 12
        run(environment, "train", *config, f"--workdir={there}")
        log = (there / "train.log").read_text()
        assert "from scratch" in log  # of the first process
        assert f"start           at step {stopped} of 12" in log
        assert "complete        at step 12, in gs://journey/run" in log
        assert len(list(there.glob("events.out.tfevents.*"))) == 2

        run(environment, "train", *CONFIG, f"--workdir={here}")
        assert_same_run(there, here, 12)
        ours, theirs = (config_lib.from_json(path / "config.json") for path in (there, here))
        assert config_lib.differences(ours, theirs) == []

        written = []
        for where in (there, here):
            result, weights = where / "out" / "result.json", where / "weights.safetensors"
            run(environment, "evaluate", *config, f"--checkpoint={where}", f"--json={result}")
            run(environment, "convert", "--reverse", f"--input={where}", f"--output={weights}")
            results = json.loads(result.read_text())
            del results["images_per_second"]
            written.append((results, weights.read_bytes()))
        assert written[0] == written[1]
        run(environment, "convert", f"--input={there}", f"--output={there}/again")
        assert checkpoint.newest(there / "again") == 0
    assert not (REPOSITORY / "gs:").exists()
