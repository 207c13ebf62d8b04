"""What is minimised: cross-entropy on the class token, and on every patch token of a dense head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from spvit_jax.models import Outputs


def smooth_labels(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """Returns targets [B, C] for labels int [B]: a share `smoothing` is spread over all classes."""
    return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), smoothing)


def classification_loss(outputs: Outputs, targets: jax.Array, dense_weight: float) -> jax.Array:
    """Returns the training loss, a scalar: the mean over the batch.

    Args:
      outputs: of the model in train mode.
      targets: [B, C] class probabilities.
      dense_weight: of the dense head's loss (LV-ViT, arXiv 2104.10858), the mean over batch and
        tokens, where there is such a head; each token's target is the image's.

    A distillation head without a teacher learns the same targets, at equal weight.
    """
    loss = optax.softmax_cross_entropy(outputs.logits, targets).mean()
    if outputs.distilled is not None:
        loss = (loss + optax.softmax_cross_entropy(outputs.distilled, targets).mean()) / 2
    if outputs.dense is not None:
        dense = optax.softmax_cross_entropy(outputs.dense, targets[:, None, :])
        loss = loss + dense_weight * dense.mean()
    return jnp.asarray(loss, jnp.float32)
