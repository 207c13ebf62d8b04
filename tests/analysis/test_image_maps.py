"""Attention on single images, against the maps of the model."""

import jax
import numpy as np
import pytest

from spvit_jax.analysis.image_maps import image_maps, last_attention
from spvit_jax.training import sharding
from tests.helpers.attention import maps_of
from tests.helpers.variables import random_variables, run

SMALL = {"patch_size": 4, "dim": 12, "num_heads": 3, "num_classes": 5}


def test_maps_are_rows_of_attention():
    """Of 4×6 patches, that in row 3 and column 1 is number 19, and token 20 in a DeiT."""
    variables = random_variables("deit_ti", **SMALL, image_size=(16, 24), depth=2)
    images = np.random.default_rng(0).normal(size=(8, 16, 24, 3)).astype(np.float32)
    batch = {"image": images, "mask": np.arange(8) % 2, "index": np.arange(8) + 40}
    batch["label"] = np.arange(8) % 5
    mesh = sharding.make_mesh(-1, 1)
    found = image_maps(variables, [batch], mesh, lambda x: x - 1, [(3, 1), (0, 2)])
    assert [each.index for each in found] == [41, 43, 45, 47]  # the others are padding
    assert [each.label for each in found] == [1, 3, 0, 2]
    logits = run(variables, images - 1)
    maps = maps_of(variables, images - 1)
    for each in found:
        number = each.index - 40
        np.testing.assert_array_equal(each.pixels, images[number])
        probabilities = jax.nn.softmax(logits[number])
        np.testing.assert_allclose(each.probabilities, probabilities, rtol=1e-5)
        for layer, (weights, _, _) in enumerate(maps):
            rows = np.asarray(weights)[number, :, :, 1:].reshape(3, 25, 4, 6)
            np.testing.assert_allclose(each.patches[layer], rows[:, [20, 3]].swapaxes(0, 1), 1e-5)
            np.testing.assert_allclose(each.class_token[layer], rows[:, 0], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("cait_xxs24", {"depth": 1}, "what the class token attends to in layer 2"),
        ("swin_t", {"depths": (1,), "window": 2}, "what patches attend to on average in layer 0"),
    ],
)
def test_the_last_attention(name, settings, words):
    """CaiT has two layers of class attention; what patches of Swin attend to are patches alone."""
    variables = random_variables(name, **SMALL, **settings, image_size=(16, 24))
    images = np.random.default_rng(0).normal(size=(2, 16, 24, 3)).astype(np.float32)
    found = jax.jit(lambda v, x: last_attention(v.model(), x))(variables, images)
    ((meaning, weights),) = found.items()
    assert meaning == words
    assert weights.shape == (2, 3, 4, 6)
    sums = np.asarray(weights).sum((-2, -1))
    if name == "swin_t":
        np.testing.assert_allclose(sums, 1, rtol=1e-5)
    else:  # the rest is on the token itself
        assert ((sums > 0) & (sums < 1)).all()
