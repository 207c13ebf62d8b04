"""What the tests that compile for TPUs share."""

import importlib.util

import jax
import pytest

from spvit_jax import plan
from spvit_jax.preflight import libtpu
from spvit_jax.preflight.topology import get_topology
from spvit_jax.training.run import DataSize
from tests.helpers.configs import digits

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install -r requirements-tpu.txt",
)

DIGITS = DataSize(num_train=1297, num_eval=500, num_classes=10)
# Wide enough that tiles of TPUs are full and products count, and so many images that their
# activations do not fit in a chip's fast memory; without a kernel, whose operations the compiler
# does not count. Compiled in seconds.
WIDE = {
    "model.dim": 512,
    "model.num_heads": 4,
    "model.depth": 1,
    "model.attention": "xla",
    "data.batch_size": 8192,
}


def one_chip(topology):
    libtpu.prepare()
    return jax.sharding.SingleDeviceSharding(get_topology(topology).devices[0])


def planned(topology, changes, num_slices=1):
    libtpu.prepare()
    devices = get_topology(topology, num_slices).devices
    return plan.training_run(digits("vit"), DIGITS, changes, devices=devices)
