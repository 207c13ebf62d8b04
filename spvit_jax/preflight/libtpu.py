"""Setup of libtpu for compiling on a machine without a TPU."""

from __future__ import annotations

import importlib.util
import os

import jax

from spvit_jax.errors import InputError

# libtpu asks a TPU host for these, and logs pages of errors where they are not set.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling holds no TPU, so several processes may
}


def prepare() -> None:
    """Sets JAX to the CPU and libtpu up for compiling; to be called before any array is made.

    Raises:
      InputError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "libtpu, the TPU's compiler, is not installed; it runs on any Linux machine with an "
            "x86 CPU: pip install 'spvit_jax[tpu]'"
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
