"""Eight simulated devices, programs that compile fast, and the data set that all tests share."""

import gc
import logging
import os

from tests.helpers import REPOSITORY

# The one place where environment variables are set: for this process, for the workers of
# pytest-xdist, and for the commands that tests start. Whatever is compiled is compiled once.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".pytest_cache" / "xla"))
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # halves the time of most tests
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    # Another halving: XLA's older emitters, and one module for LLVM rather than 32.
    "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
    # PyTorch's threads wait for each other awake: those of two workers, on two cores, for minutes.
    "OMP_NUM_THREADS": "1",
}

import jax
import pytest

from spvit_jax.data import datasets

jax.config.update("jax_num_cpu_devices", 8)
# Looking for cycles among the millions of objects of JAX's tracing takes a sixth of the time.
gc.set_threshold(100_000, 20, 20)

# Each takes half a minute or more: begun last, it would keep one worker busy and the other waiting.
SLOWEST = (
    "distributed/test_cluster.py",
    "test_end_to_end.py",
    "interop/test_parity.py",
    "training/test_step.py",
    "test_convert.py",
    "test_token_labels.py",
    "test_imagenet.py",
    "preflight/test_command.py",
    "test_train.py",
    "models/test_registry.py",
    "kernels/test_fused.py",
    "test_bucket_run.py",
    "models/test_loop.py",
    "preflight/test_roofline.py",
    "test_package.py",
    "test_tour.py",
)


def pytest_collection_modifyitems(items):
    """Begins with the slowest files."""
    files = [REPOSITORY / "tests" / name for name in SLOWEST]
    items.sort(key=lambda item: files.index(item.path) if item.path in files else len(files))


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
    """The default data directory, with the digits prepared."""
    data_dir = str(REPOSITORY / "data")
    datasets.load("digits", "test", data_dir)
    return data_dir


@pytest.fixture(scope="session")
def environment():
    """Of a machine with one device."""
    return dict(os.environ)
