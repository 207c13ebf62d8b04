"""Logits that are not numbers are counted, and are no accuracy."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from spvit_jax.augment.mix import BatchTransform
from spvit_jax.training import sharding, step
from spvit_jax.training.evaluation import evaluate

SETTINGS = step.StepSettings(
    num_classes=4, transform=BatchTransform(mean=(0.5,) * 3, std=(0.5,) * 3)
)


class Batches(list):
    """What an iterator over batches is to `evaluate`."""

    def __enter__(self):
        return iter(self)

    def __exit__(self, *_):
        pass


def evaluated(logits, mask, labels):
    """Evaluates what a model says, eight images at a time."""
    said = iter(np.split(np.float32(logits), len(logits) // 8))
    outputs = types.SimpleNamespace(evaluation_logits=lambda: jnp.asarray(next(said)))
    model = types.SimpleNamespace(
        model=lambda: types.SimpleNamespace(outputs=lambda images: outputs)
    )
    batches = Batches(
        {
            "image": np.zeros((8, 2, 2, 3), np.uint8),
            "label": labels[start : start + 8],
            "mask": np.float32(mask[start : start + 8]),
        }
        for start in range(0, len(logits), 8)
    )
    mesh = sharding.make_mesh(-1, 1)
    return evaluate(
        lambda model, batch: step.eval_step(model, batch, settings=SETTINGS), model, batches, mesh
    )


@pytest.mark.parametrize("several_labels", [False, True])
def test_images_without_finite_logits_are_counted(several_labels):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(16, 4)), rng.integers(0, 4, 16).astype(np.int32)
    mask = np.ones(16)
    mask[13:] = 0
    if several_labels:
        labels = np.eye(4, dtype=np.uint8)[labels]
    results = evaluated(logits, mask, labels)
    assert results.keys() == {"loss", "top1", "top5", "count"}
    assert results["count"] == 13

    logits[0, 1] = np.nan
    logits[5, 2] = np.inf
    logits[9] = -np.inf
    logits[10] = 3e38, -3e38, 3e38, -3e38  # finite, with an infinite loss for two of the classes
    labels[10] = np.eye(4)[1] if several_labels else 1
    logits[14] = np.nan  # padding
    with pytest.raises(FloatingPointError, match="the logits of 4 of 13 images are not finite"):
        evaluated(logits, mask, labels)
