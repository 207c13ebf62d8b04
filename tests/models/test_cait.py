"""Talking heads and their masks against the definition, head by head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spvit_jax.models.attention import Attention
from spvit_jax.models.naming import named_leaves
from spvit_jax.models.spatial import LocalityMask
from tests.helpers import numpy_models
from tests.helpers.variables import random_variables, run


@pytest.mark.parametrize("kind", [None, "soft", "hard"])
def test_talking_heads_mix_scores_then_weights_and_masks_act_between(kind):
    dim, heads, grid = 12, 3, (3, 5)
    mask = LocalityMask((0, 1), (1, 1), kind) if kind else None
    with jax.enable_x64(True):
        module = Attention(
            dim,
            heads,
            qkv_bias=True,
            mask=mask,
            talking_heads=True,
            dtype=jnp.dtype("float64"),
            rngs=nnx.Rngs(0),
        )
        rng = np.random.default_rng(0)
        state = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), nnx.state(module))
        nnx.update(module, state)
        x = rng.normal(size=(2, 15, dim))
        p = {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}
        q, k, v = np.split(numpy_models.linear(x, p, "qkv"), 3, -1)
        split = [part.reshape(2, 15, heads, 4).transpose(0, 2, 1, 3) for part in (q, k, v)]
        scores = split[0] @ split[1].transpose(0, 1, 3, 2) / 2
        mixed = sum(scores[:, [h]] * p["mix_scores/kernel"][h][:, None, None] for h in range(heads))
        mixed = mixed + p["mix_scores/bias"][:, None, None]
        near = numpy_models.neighbourhood(grid, (1, 1), 0)
        if mask:
            far = 0.0 if kind == "soft" else -np.inf
            mixed[:, :2] = np.where(near, mixed[:, :2], far)
        weights = numpy_models.softmax(mixed)
        if kind == "hard":
            assert (weights[:, :2][:, :, ~near] == 0).all()
        weights = sum(
            weights[:, [h]] * p["mix_weights/kernel"][h][:, None, None] for h in range(heads)
        )
        weights = weights + p["mix_weights/bias"][:, None, None]
        np.testing.assert_allclose(module.weights(jnp.asarray(x), grid), weights, atol=1e-12)
        out = (weights @ split[2]).transpose(0, 2, 1, 3).reshape(2, 15, dim)
        expected = numpy_models.linear(out, p, "proj")
        np.testing.assert_allclose(module(jnp.asarray(x), grid), expected, atol=1e-12)


def test_the_class_token_does_not_change_the_patches():
    small = {"image_size": 32, "dim": 12, "num_heads": 3, "depth": 1, "num_classes": 5}
    variables = random_variables("cait_xxs24", **small)
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))

    @jax.jit
    def parts(variables):
        model = variables.model()
        tokens = model.encode(model.embed(images))
        *_, last = model.hidden_states(model.embed(images))
        return tokens, model.norm(last.x), model.head(tokens[:, 0])

    tokens, patches, logits = parts(variables)
    assert tokens.shape == (2, 1 + 4, 12)
    np.testing.assert_allclose(tokens[:, 1:], patches, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run(variables, images), logits, atol=1e-4)
