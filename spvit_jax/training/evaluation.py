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
from spvit_jax.training.step import ClassCounts


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


class ClassCounter:
    """An `eval_fn` of `evaluate` that adds up what `class_step` counts in each batch."""

    def __init__(self, class_fn: Callable[[Variables, Any], tuple[Metrics, ClassCounts]]):
        """Begins to count; `class_fn` is the jitted `class_step`."""
        self._class_fn = class_fn
        self._counts: ClassCounts | None = None

    def __call__(self, model: Variables, batch: Any) -> Metrics:
        metrics, counts = self._class_fn(model, batch)
        total = self._counts
        self._counts = counts if total is None else jax.tree.map(jnp.add, total, counts)
        return metrics

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns `ClassCounts.confusion` and `ClassCounts.top5` over all batches so far."""
        assert self._counts is not None, "no batch was evaluated"
        return np.asarray(self._counts.confusion), np.asarray(self._counts.top5)
