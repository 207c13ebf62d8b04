"""Kernels on a mesh: each device runs them on its part of the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P


def on_each_device(
    function: Callable[[jax.Array, Any], jax.Array], batch: jax.Array, shared: Any
) -> jax.Array:
    """Applies a function to a batch, split over all axes of the mesh in context, if there is one.

    Args:
      function: (part of the batch, `shared`) → array of as many examples.
      batch: [B, ...], with B a multiple of the number of devices.
      shared: pytree of arrays that every device has whole. Devices add up its gradient and not
        those of what `function` makes of it, so it is best small.

    Returns:
      The function's result, [B, ...].
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(batch, shared)
    split = P(mesh.axis_names)
    return jax.shard_map(function, in_specs=(split, P()), out_specs=split, check_vma=False)(
        batch, shared
    )
