"""Training losses: cross-entropy on the class token, and on every patch token of a dense head."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct

from spvit_jax.errors import InputError, nearest
from spvit_jax.models import Outputs


class Targets(struct.PyTreeNode):
    """Targets of a model's outputs: class probabilities.

    Attributes:
      label: [B, C], targets of the image.
      distilled: [B, C], targets of the distillation token; None for those of the image.
      dense: [B, N, C], targets of each patch token; None for those of the image.
    """

    label: jax.Array
    distilled: jax.Array | None = None
    dense: jax.Array | None = None


# (outputs, targets, dense_weight) → the loss of a batch, a float32 scalar.
Loss = Callable[[Outputs, Targets, float], jax.Array]


def smooth_labels(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """Returns smoothed targets [B, C] of labels int [B]: `smoothing` is spread over all classes."""
    return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), smoothing)


def hard_labels(logits: jax.Array) -> jax.Array:
    """Returns one-hot targets [B, C] of a teacher's top class (DeiT's hard distillation)."""
    return jax.nn.one_hot(logits.argmax(-1), logits.shape[-1])


@jax.named_scope("loss")
def classification_loss(outputs: Outputs, targets: Targets, dense_weight: float) -> jax.Array:
    """Returns the training loss, a scalar: the mean over the batch.

    Args:
      outputs: outputs of the model in train mode.
      targets: targets of the outputs.
      dense_weight: weight of the dense head's loss (LV-ViT, arXiv 2104.10858), the mean over batch
        and tokens, where there is such a head.

    A distillation head has the weight of the class token's head.
    """
    loss = optax.softmax_cross_entropy(outputs.logits, targets.label).mean()
    if outputs.distilled is not None:
        distilled = targets.label if targets.distilled is None else targets.distilled
        loss = (loss + optax.softmax_cross_entropy(outputs.distilled, distilled).mean()) / 2
    if outputs.dense is not None:
        labels = targets.label[:, None] if targets.dense is None else targets.dense
        dense = optax.softmax_cross_entropy(outputs.dense, labels)
        loss = loss + dense_weight * dense.mean()
    return jnp.asarray(loss, jnp.float32)


_LOSSES: dict[str, Loss] = {"cross_entropy": classification_loss}


def register_loss(name: str, loss: Loss) -> None:
    """Adds a training loss, which `loss.name` then names.

    Args:
      name: name of the loss.
      loss: function of (outputs, targets, dense_weight) that JAX can trace and differentiate, as
        `classification_loss`.
    """
    _LOSSES[name] = loss


def find_loss(name: str) -> Loss:
    """Returns the loss of a name; raises an `InputError` if there is none."""
    if name not in _LOSSES:
        raise InputError(f"unknown loss {name!r} in loss.name{nearest(name, _LOSSES)}")
    return _LOSSES[name]
