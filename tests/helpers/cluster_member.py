"""A process that tests start several of: checks rows and texts, or trains in a special way.

    python -m tests.helpers.cluster_member rows OUTPUT --coordinator=… --num_processes=…
    python -m tests.helpers.cluster_member train OUTPUT --config=… --workdir=… --coordinator=…
    python -m tests.helpers.cluster_member hang OUTPUT --config=… --workdir=… --coordinator=…
    python -m tests.helpers.cluster_member hasty --config=… --workdir=… --coordinator=…

Process 0 writes OUTPUT, a JSON file. `hang` trains, and process 1 waits for ever for the input of
its tenth step, unless there is OUTPUT, which it then makes. `hasty` trains, and gives up on others
sooner than a network allows.
"""

import itertools
import json
import pathlib
import sys
import threading

import jax
import numpy as np
from absl import app
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spvit_jax import cli, distributed, train
from spvit_jax.data.pipeline import BatchShard
from spvit_jax.distributed import agreement, join, liveness
from spvit_jax.training import sharding


def as_held(array, mesh):
    """The whole of a global array, as the devices of all processes hold it."""
    whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))(array)
    return np.asarray(whole).tolist()


def train_and_note_examples(output):
    noted, put_batch = [], sharding.put_batch

    def put_and_note(batch, mesh):
        placed = put_batch(batch, mesh)
        noted.append(as_held(placed["index"], mesh))
        return placed

    sharding.put_batch = put_and_note  # the training loop's; evaluation has its own reference
    try:
        train.main()
    finally:
        if distributed.is_primary():
            output.write_text(json.dumps(noted))


def train_and_hang(output):
    calls, put_batch = itertools.count(1), sharding.put_batch

    def read_from_a_disk_that_hangs():
        output.touch()
        threading.Event().wait()

    def put_or_hang(batch, mesh):
        if next(calls) == 10 and jax.process_index() == 1 and not output.exists():
            read_from_a_disk_that_hangs()
        return put_batch(batch, mesh)

    sharding.put_batch = put_or_hang
    train.main()


def train_hastily():
    agreement._VISIBLE_TIMEOUT = 3
    liveness._SILENCE, join._HEARTBEAT_TIMEOUT = 4, 12
    train.main()


def check_rows(output):
    """Global batches over meshes whose devices of one process do not stand side by side."""
    address = cli.cluster_flags()

    def run(argv):
        del argv
        with distributed.joined(address()):
            devices, size = np.array(jax.devices()), 24
            orders = {
                "as they come": devices.reshape(-1, 2),
                "in turn": devices.reshape(2, -1).T,
                "backwards": devices[::-1].reshape(1, -1),
            }
            held = {}
            for name, order in orders.items():
                mesh = Mesh(order, ("data", "fsdp"), (AxisType.Auto, AxisType.Auto))
                rows = BatchShard(*sharding.local_parts(mesh))
                read = np.asarray(rows.ordinals(np.int64(0), size), np.int32)
                held[name] = as_held(sharding.put_batch({"index": read}, mesh)["index"], mesh)
            texts = [distributed.gather(f"{jax.process_index()} {round}") for round in range(2)]
            if distributed.is_primary():
                output.write_text(json.dumps({"held": held, "texts": texts}))

    app.run(run)


if __name__ == "__main__":
    what = sys.argv.pop(1)
    if what == "hasty":
        train_hastily()
    else:
        modes = {"rows": check_rows, "train": train_and_note_examples, "hang": train_and_hang}
        modes[what](pathlib.Path(sys.argv.pop(1)))
