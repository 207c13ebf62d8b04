"""The level at which most tests of this folder let the TPU's compiler optimise."""

import os

import jax
import pytest

# Takes a third of the time of the level that users get. What a program has to keep, send, and
# compute does not depend on it; where time or traffic is what is tested, all is optimised.
LEVEL = "O1"


@pytest.fixture(scope="module")
def lightly_optimized():
    """The level of this process, and of those that it starts."""
    os.environ["JAX_OPTIMIZATION_LEVEL"] = LEVEL
    jax.config.update("jax_optimization_level", LEVEL)
    yield
    del os.environ["JAX_OPTIMIZATION_LEVEL"]
    jax.config.update("jax_optimization_level", "UNKNOWN")
