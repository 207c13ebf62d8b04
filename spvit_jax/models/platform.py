"""The platform that a program is traced for, by which layers choose how they compute."""

from __future__ import annotations

import jax


def platform() -> str:
    """Returns the platform of the mesh in context, such as "tpu", or else of JAX's devices."""
    # Not of this process's devices alone: `preflight` compiles for TPUs in a process on a CPU.
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
