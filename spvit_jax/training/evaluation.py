"""Evaluation over a whole split, each example counted once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spvit_jax.training.sharding import put_batch
from spvit_jax.training.state import Metrics, Variables, means


def evaluate(
    eval_fn: Callable[[Variables, Any], Any],
    model: Variables,
    batches: AbstractContextManager[Iterator[dict[str, np.ndarray]]],
    mesh: Mesh,
    *,
    progress: Callable[[], object] = lambda: None,
    stops: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Evaluates a model on all batches, each example counted once.

    Args:
      eval_fn: the jitted `eval_step`.
      model: weights to evaluate.
      batches: batches as `data.pipeline.eval_batches` makes them; closed on return.
      mesh: devices over which batches are split.
      progress: function to call after each batch.
      stops: function to call after each batch, which says whether to end early.

    Returns:
      Mean `loss`, `top1` and `top5` over the examples, and their `count`; None if ended early.

    Raises:
      FloatingPointError: logits are not finite numbers, so that there is no accuracy.
    """
    with batches as opened:
        per_batch: list[Metrics] = []
        for batch in opened:
            per_batch.append(eval_fn(model, put_batch(batch, mesh)))
            jax.block_until_ready(per_batch[-2:-1])  # one batch ahead of the devices, not all
            progress()
            if stops():
                return None
    totals = jax.tree.map(lambda *values: jnp.stack(values).sum(), *per_batch)
    nonfinite, count = (int(number) for number in totals.pop("nonfinite"))
    if nonfinite:
        raise FloatingPointError(
            f"the logits of {nonfinite} of {count} images are not finite numbers, so that there is "
            "no accuracy; look at the weights, at data.mean and data.std, or set "
            "model.dtype=float32"
        )
    return means(totals) | {"count": count}
