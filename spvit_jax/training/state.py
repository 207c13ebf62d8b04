"""What training carries from step to step, as pytrees, and how their leaves are named."""

from __future__ import annotations

from typing import Self

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

from spvit_jax.models import Model

Metrics = dict[str, tuple[jax.Array, jax.Array]]  # (sum, count) under each name


class Variables(struct.PyTreeNode):
    """A model taken apart: its arrays as pytrees, its structure as static data.

    Attributes:
      params: what the optimizer changes.
      stats: BatchNorm's running statistics.
      graphdef: everything about the model that is not an array.
    """

    params: nnx.State
    stats: nnx.State
    graphdef: nnx.GraphDef = struct.field(pytree_node=False)

    @classmethod
    def of(cls, model: Model) -> Self:
        """Takes a model apart."""
        graphdef = nnx.graphdef(model)
        params, stats = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
        return cls(params=params, stats=stats, graphdef=graphdef)

    def model(self, *, train: bool = False) -> Model:
        """Puts the model together again, in evaluation or in train mode."""
        # A copy, so that BatchNorm's update inside a differentiated function stays there.
        model = nnx.merge(self.graphdef, self.params, self.stats, copy=True)
        model.train() if train else model.eval()
        return model


class TrainState(struct.PyTreeNode):
    """The state of training; all of it is saved, and nothing else is needed to go on.

    Attributes:
      step: int32, how many steps have been taken.
      model: the weights being trained.
      ema: their moving average, BatchNorm's statistics included; None if it is off.
      opt_state: the optimizer's.
      metrics: sums and counts since the last report.
      nan_step: int32, the first step whose loss was not finite, or -1.
    """

    step: jax.Array
    model: Variables
    ema: Variables | None
    opt_state: optax.OptState
    metrics: Metrics
    nan_step: jax.Array

    @property
    def best_model(self) -> Variables:
        """The weights to evaluate: the moving average where there is one."""
        return self.model if self.ema is None else self.ema


def with_variables(state: TrainState, variables: Variables) -> TrainState:
    """Returns the state with other weights, in the moving average too."""
    ema = None if state.ema is None else jax.tree.map(jnp.copy, variables)
    return state.replace(model=variables, ema=ema)


def check_finite(state: TrainState) -> None:
    """Raises a `FloatingPointError` that names the first step whose loss was not a number."""
    step = int(state.nan_step)
    if step >= 0:
        raise FloatingPointError(
            f"the loss at step {step} is not a finite number; the last good checkpoint is kept. "
            "Lower optim.lr, lengthen schedule.warmup or set optim.clip_norm"
        )


METRICS = ("loss", "top1", "grad_norm")


def zero_metrics() -> Metrics:
    """Returns the sums and counts of a report that has just been made."""
    return {name: (jnp.zeros(()), jnp.zeros(())) for name in METRICS}


def means(metrics: Metrics) -> dict[str, float]:
    """Returns sum over count of each metric."""
    return {name: float(total) / float(count) for name, (total, count) in metrics.items()}


def create(model: Model, optimizer: optax.GradientTransformation, *, ema: bool) -> TrainState:
    """Returns the state before the first step."""
    variables = Variables.of(model)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        model=variables,
        ema=jax.tree.map(jnp.copy, variables) if ema else None,
        opt_state=optimizer.init(variables.params),
        metrics=zero_metrics(),
        nan_step=jnp.full((), -1, jnp.int32),
    )
