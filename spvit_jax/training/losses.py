"""Training losses: cross-entropy on the class token, and on every patch token of a dense head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import struct

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
