"""Sets up a process on a machine without a TPU for compiling for one."""

from __future__ import annotations

import importlib.util
import os

import jax

from spvit_jax.errors import InputError

# libtpu asks these of the machine it believes to run on, and complains at length without an answer.
_ANSWERS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling holds no TPU, so several processes may
}


def prepare() -> None:
    """Makes JAX compute on the CPU and libtpu ready to compile; call before any array is made.

    Raises:
      InputError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "libtpu, the TPU's compiler, is not installed; it runs on any Linux machine with an "
            "x86 CPU: pip install -r requirements-tpu.txt"
        )
    for name, answer in _ANSWERS.items():
        os.environ.setdefault(name, answer)
    jax.config.update("jax_platforms", "cpu")
