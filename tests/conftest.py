"""Eight simulated devices for the tests of sharding; the data set that all tests share."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

REPOSITORY = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="session")
def data_dir() -> str:
    """The default data directory: prepared on first use, as by any command."""
    return str(REPOSITORY / "data")
