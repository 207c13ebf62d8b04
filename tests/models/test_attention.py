"""The one equation, in every dtype, and what its gain and bias do."""

import jax
import jax.numpy as jnp
import numpy as np

from spvit_jax.models.attention import attention, attention_weights
from tests.helpers import numpy_models


def inputs(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (2, 9, 3, 8), dtype) for key in keys]


def test_attention_equals_the_equation():
    q, k, v = inputs()
    rng = np.random.default_rng(0)
    gain, bias = rng.normal(size=(3, 9, 9)), rng.normal(size=(3, 9, 9))
    scores = np.einsum("bnhd,bmhd->bhnm", *(np.asarray(x, np.float64) for x in (q, k))) / 8**0.5
    expected = np.einsum("bhnm,bmhd->bnhd", numpy_models.softmax(gain * scores + bias), v)
    out = attention(q, k, v, jnp.asarray(gain, jnp.float32), jnp.asarray(bias, jnp.float32))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_scores_and_softmax_are_float32_for_bfloat16_inputs():
    q, k, v = inputs(jnp.bfloat16)
    gain = jnp.full((3, 9, 9), 1.001)  # bfloat16 would round this to 1
    weights = attention_weights(q, k, gain)
    assert weights.dtype == jnp.float32
    exact = attention_weights(q.astype(jnp.float32), k.astype(jnp.float32), gain)
    np.testing.assert_allclose(weights, exact, rtol=1e-5)
    assert not jnp.array_equal(weights, attention_weights(q, k))
    assert attention(q, k, v, gain).dtype == jnp.bfloat16


def test_minus_infinity_removes_a_pair_and_a_zero_gain_does_not():
    q, k, _ = inputs()
    far = jnp.arange(9)[None, :] > 4
    hard = attention_weights(q, k, bias=jnp.where(far, -jnp.inf, 0.0))
    soft = attention_weights(q, k, gain=jnp.where(far, 0.0, 1.0))
    assert (hard[..., 5:] == 0).all()
    assert (soft[..., 5:] > 0).all()
    np.testing.assert_allclose(soft[..., 5:], soft[..., 5:6] * jnp.ones(4), rtol=1e-6)
