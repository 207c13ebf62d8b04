"""The train state as a pytree: weights, moving average, optimizer state and metrics."""

from __future__ import annotations

from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct

from spvit_jax.models import Model
from spvit_jax.models.naming import named_leaves

Metrics = dict[str, tuple[jax.Array, jax.Array]]  # (sum, count) of each metric, by name


class Variables(struct.PyTreeNode):
    """A model split into its arrays, as pytrees, and its structure, as static data.

    Attributes:
      params: parameters, which the optimizer changes.
      stats: BatchNorm's running statistics.
      graphdef: structure of the model, without arrays.
    """

    params: nnx.State
    stats: nnx.State
    graphdef: nnx.GraphDef = struct.field(pytree_node=False)

    @classmethod
    def of(cls, model: Model) -> Self:
        """Returns the variables of a model."""
        graphdef = nnx.graphdef(model)
        params, stats = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
        return cls(params=params, stats=stats, graphdef=graphdef)

    def model(self, *, train: bool = False) -> Model:
        """Returns the model with these variables, in eval mode or in train mode."""
        # A copy, so that BatchNorm's update inside a differentiated function stays there.
        model = nnx.merge(self.graphdef, self.params, self.stats, copy=True)
        model.train() if train else model.eval()
        return model


class TrainState(struct.PyTreeNode):
    """The state of training; all of it is saved, and nothing else is needed to resume.

    Attributes:
      step: number of steps taken, int32.
      model: weights being trained.
      ema: moving average of the weights, BatchNorm's statistics included; None if it is off.
      opt_state: state of the optimizer.
      metrics: sums and counts of the metrics since the last report.
      nan_step: int32, the first step that was not finite in its loss, its gradient or BatchNorm's
        statistics, or -1.
    """

    step: jax.Array
    model: Variables
    ema: Variables | None
    opt_state: optax.OptState
    metrics: Metrics
    nan_step: jax.Array

    @property
    def best_model(self) -> Variables:
        """Weights to evaluate: the moving average where there is one."""
        return self.model if self.ema is None else self.ema


def with_variables(state: TrainState, variables: Variables) -> TrainState:
    """Returns a train state with other weights, in the moving average too."""
    ema = None if state.ema is None else jax.tree.map(jnp.copy, variables)
    return state.replace(model=variables, ema=ema)


def check_finite(state: TrainState, finite: jax.Array | None = None) -> None:
    """Raises a `FloatingPointError` if a step or the state is not finite; names the step.

    Args:
      state: train state after a step.
      finite: result of `finite_leaves`, to check the state itself as well, as before it is saved:
        a last update may overflow after a loss and a gradient that were finite.
    """
    advice = (
        "the last good checkpoint is kept. Lower optim.lr, lengthen schedule.warmup or set "
        "optim.clip_norm"
    )
    step = int(state.nan_step)
    if step >= 0:
        raise FloatingPointError(
            f"the loss at step {step} or its gradient, or a statistic of BatchNorm, is not a "
            f"finite number; {advice}"
        )
    if finite is None:
        return
    names = [name for name, ok in zip(_floating(state), np.asarray(finite), strict=True) if not ok]
    if names:
        rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise FloatingPointError(
            f"after step {int(state.step)} the state is not finite, in {names[0]}{rest}; {advice}"
        )


def finite_leaves(state: TrainState) -> jax.Array:
    """Returns for each floating leaf of a state whether all of it is finite, bool [leaves]."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in _floating(state).values()])


def _floating(state: TrainState) -> dict[str, jax.Array]:
    leaves = named_leaves(state)
    return {k: v for k, v in leaves.items() if jnp.issubdtype(v.dtype, jnp.floating)}


METRICS = ("loss", "top1", "grad_norm")


def zero_metrics() -> Metrics:
    """Returns metrics with sums and counts of zero, as after a report."""
    return {name: (jnp.zeros(()), jnp.zeros(())) for name in METRICS}


def means(metrics: Metrics) -> dict[str, float]:
    """Returns the mean of each metric, sum over count, by name."""
    return {name: float(total) / float(count) for name, (total, count) in metrics.items()}


def create(model: Model, optimizer: optax.GradientTransformation, *, ema: bool) -> TrainState:
    """Returns the train state before the first step.

    Args:
      model: model with its initial weights.
      optimizer: optimizer of `make_optimizer`.
      ema: whether to keep a moving average of the weights.
    """
    variables = Variables.of(model)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        model=variables,
        ema=jax.tree.map(jnp.copy, variables) if ema else None,
        opt_state=optimizer.init(variables.params),
        metrics=zero_metrics(),
        nan_step=jnp.full((), -1, jnp.int32),
    )
