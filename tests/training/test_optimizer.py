"""Which parameters decay, AdamW against NumPy, and the schedule at its corners."""

import jax.numpy as jnp
import numpy as np
import pytest

from spvit_jax import config as config_lib
from spvit_jax.models.naming import named_leaves
from spvit_jax.training import optimizer
from tests.models.weights import random_variables


def resolved(**changes):
    config = config_lib.base()
    config.schedule.update({"total": "100 steps", "warmup": "10 steps", "cooldown": "20 steps"})
    config.optim.update({"lr": 1e-3, "min_lr": 1e-5, "warmup_lr": 1e-6} | changes)
    return config_lib.resolve(config, num_examples=1000)


def test_what_decays():
    """Matrices do, w1 and w2 among them; vectors, biases, positions and tokens do not."""
    settings = {"image_size": 32, "depth": 2, "spatial_layers": 1, "dim": 12, "num_heads": 3}
    variables = random_variables("spvit_s", **settings, layer_scale=0.1, distilled=True)
    mask = named_leaves(optimizer.decay_mask(variables.params))
    shapes = {k: v.ndim for k, v in named_leaves(variables.params).items()}
    expected = {
        name: shapes[name] > 1 and not name.endswith(("b1", "pos_embed", "cls_token", "dist_token"))
        for name in shapes
    }
    assert mask == expected
    assert mask["blocks/0/attn/prior/w1"]
    assert mask["blocks/0/attn/prior/w2"]


def test_a_parameter_that_no_rule_knows_is_an_error():
    with pytest.raises(ValueError, match="no decay rule matches parameter 'strange'"):
        optimizer.decay_mask({"strange": jnp.ones(3)})


def test_schedule():
    rate = optimizer.make_schedule(resolved())
    values = np.array([float(rate(step)) for step in range(100)])
    assert values[0] == pytest.approx(1e-6, rel=1e-4)
    assert values[5] == pytest.approx((1e-6 + 1e-3) / 2, rel=1e-3)
    assert values[10] == pytest.approx(1e-3)
    assert values[45] == pytest.approx((1e-3 + 1e-5) / 2)  # half way down the cosine
    np.testing.assert_allclose(values[80:], 1e-5, rtol=1e-5)
    assert values.argmax() == 10


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_adamw_is_torchs(clip):
    """Decay times the learning rate, bias-corrected moments, clipping over all parameters."""
    config = resolved(weight_decay=0.1, clip_norm=clip)
    tx = optimizer.make_optimizer(config)
    rate = optimizer.make_schedule(config)
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
    ours = {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}
    opt_state = tx.init(ours)
    moments = dict.fromkeys(params, (0.0, 0.0))
    for step in range(4):
        grads = {k: rng.normal(size=v.shape) for k, v in params.items()}
        updates, opt_state = tx.update(
            {k: jnp.asarray(v, jnp.float32) for k, v in grads.items()}, opt_state, ours
        )
        ours = {k: ours[k] + updates[k] for k in ours}
        if clip:
            norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
            grads = {k: g * min(1, clip / norm) for k, g in grads.items()}
        for k, g in grads.items():
            m, v = moments[k]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            moments[k] = m, v
            m, v = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
            decay = 0.1 * params[k] if k == "kernel" else 0
            params[k] = params[k] - float(rate(step)) * (m / (np.sqrt(v) + 1e-8) + decay)
    for k in params:
        np.testing.assert_allclose(ours[k], params[k], rtol=1e-5, atol=1e-7)
