"""Eight simulated devices, programs that compile fast, and the data set that all tests share."""

import logging
import os

from tests.helpers import REPOSITORY

# The one place where environment variables are set: for this process, for the workers of
# pytest-xdist, and for the commands that tests start. Whatever is compiled is compiled once.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(REPOSITORY / ".pytest_cache" / "xla"),
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**31),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # halves the time of most tests


@pytest.fixture(scope="module")
def optimized():
    """Programs of a module's tests are compiled as users compile them."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True)
def log():
    """This project's logger, which a command or a run may have taken over, as it was before."""
    log = logging.getLogger("spvit_jax")
    before = log.level, log.propagate, list(log.handlers)
    yield log
    for handler in log.handlers:
        if handler not in before[2]:
            handler.close()
    log.level, log.propagate, log.handlers[:] = before


@pytest.fixture(scope="session")
def data_dir() -> str:
    """The default data directory: prepared on first use, as by any command."""
    return str(REPOSITORY / "data")


@pytest.fixture(scope="session")
def environment():
    """Of a machine with one device."""
    return dict(os.environ)
