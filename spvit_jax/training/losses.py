"""What is minimised: cross-entropy on the class token, and on every patch token of a dense head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import struct

from spvit_jax.models import Outputs


class Targets(struct.PyTreeNode):
    """What a model's outputs should be: class probabilities.

    Attributes:
      label: [B, C], of the image.
      distilled: [B, C], of the distillation token; None for the image's label.
      dense: [B, N, C], of each patch token; None for the image's label.
    """

    label: jax.Array
    distilled: jax.Array | None = None
    dense: jax.Array | None = None


def smooth_labels(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """Returns targets [B, C] for labels int [B]: a share `smoothing` is spread over all classes."""
    return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), smoothing)


def hard_labels(logits: jax.Array) -> jax.Array:
    """Returns a teacher's targets [B, C]: its most probable class (DeiT's hard distillation)."""
    return jax.nn.one_hot(logits.argmax(-1), logits.shape[-1])


def classification_loss(outputs: Outputs, targets: Targets, dense_weight: float) -> jax.Array:
    """Returns the training loss, a scalar: the mean over the batch.

    Args:
      outputs: of the model in train mode.
      targets: for each of them.
      dense_weight: of the dense head's loss (LV-ViT, arXiv 2104.10858), the mean over batch and
        tokens, where there is such a head.

    A distillation head weighs as much as the class token's.
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
