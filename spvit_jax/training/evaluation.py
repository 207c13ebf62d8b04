"""Evaluation over a whole split, each example counted once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spvit_jax.data.pipeline import BatchIterator
from spvit_jax.training.sharding import put_batch
from spvit_jax.training.state import Variables, means


def evaluate(
    eval_fn: Callable[[Variables, Any], Any], model: Variables, batches: BatchIterator, mesh: Mesh
) -> dict[str, float]:
    """Evaluates a model on all batches.

    Args:
      eval_fn: the jitted `eval_step`.
      model: the weights.
      batches: with a mask over padding; closed on return.
      mesh: over which batches are spread.

    Returns:
      Mean `loss`, `top1` and `top5` over the examples, and their `count`.

    Raises:
      FloatingPointError: logits are not finite numbers, and a rank among them means nothing.
    """
    with batches:
        per_batch = [eval_fn(model, put_batch(batch, mesh)) for batch in batches]
    totals = jax.tree.map(lambda *values: jnp.stack(values).sum(), *per_batch)
    wrong, count = (int(number) for number in totals.pop("nonfinite"))
    if wrong:
        raise FloatingPointError(
            f"the logits of {wrong} of {count} images are not finite numbers, so that there is no "
            "accuracy; look at the weights, at data.mean and data.std, or set model.dtype=float32"
        )
    return means(totals) | {"count": count}
