"""Masked heads at linear cost: the numbers and gradients of the equation with its matrices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spvit_jax.kernels import local
from spvit_jax.kernels.local import local_attention
from spvit_jax.models.complexity import macs_of
from tests.helpers import numpy_models

HEADS, WIDTH, BATCH = 2, 4, 2

# Grid, prefix tokens, radius.
CASES = {
    "no_prefix": ((4, 5), 0, (1, 1)),
    "class_token": ((5, 4), 1, (1, 1)),
    "two_tokens_3x5": ((4, 7), 2, (1, 2)),
    "narrower_than_the_neighbourhood": ((4, 2), 1, (1, 4)),
}


def inputs(case, dtype=np.float64):
    """Queries, keys and values [H, d, B, P+N], and a gain by offset."""
    (h, w), num_prefix, (rows, columns) = CASES[case]
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, HEADS, WIDTH, BATCH, num_prefix + h * w))
    gain = rng.normal(1, 0.5, (HEADS, 2 * rows + 1, 2 * columns + 1))
    return [jnp.asarray(array, dtype) for array in (q, k, v, gain)]


def settings_of(case, kind):
    grid, num_prefix, radius = CASES[case]
    return {"grid": grid, "num_prefix": num_prefix, "radius": radius, "kind": kind}


def dense(q, k, v, gain, *, grid, num_prefix, radius, kind):
    """The equation as it reads, over all pairs of tokens."""
    (_, w), patches = grid, grid[0] * grid[1]
    near = numpy_models.neighbourhood(grid, radius, num_prefix)
    offsets = np.zeros((2, *near.shape), int)
    for i, j in np.argwhere(near[num_prefix:, num_prefix:]):
        pair = (num_prefix + i, num_prefix + j)
        offsets[:, *pair] = radius[0] + j // w - i // w, radius[1] + j % w - i % w
    gains = gain[:, *offsets].at[:, :num_prefix].set(1).at[:, :, :num_prefix].set(1)
    scores = jnp.einsum("hdbn,hdbm->bhnm", q, k) / math.sqrt(WIDTH) * gains
    scores = jnp.where(near, scores, 0 if kind == "soft" else -jnp.inf)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    assert len(near) == num_prefix + patches
    return jnp.einsum("bhnm,hdbm->hdbn", weights, v)


def with_gradients(function, arrays, direction):
    """The value, and the gradient of its product with a direction."""

    def value(*arrays):
        out = function(*arrays)
        return (out * direction).sum(), out

    grads, out = jax.jit(jax.grad(value, tuple(range(len(arrays))), has_aux=True))(*arrays)
    return out, *grads


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("case", CASES)
def test_local_attention_equals_the_matrices(case, kind):
    settings = settings_of(case, kind)
    with jax.enable_x64(True):
        arrays = inputs(case)
        direction = np.random.default_rng(1).normal(size=arrays[0].shape)

        def by_gain(q, k, v, gain):
            return local_attention(q, k, v, gain=gain, **settings)

        ours = with_gradients(by_gain, arrays, direction)
        theirs = with_gradients(lambda *x: dense(*x, **settings), arrays, direction)
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_scores_from_minus_80_to_80_keep_the_precision_of_float32(kind):
    """They are multiples of 1/4 here, which float32 has exactly; it has no e⁸⁰ twice."""
    settings = settings_of("class_token", kind)
    q, k, v, gain = inputs("class_token", np.float32)
    q, k = jnp.round(2 * q), jnp.round(3 * k)
    q = q * (160 // abs(jnp.einsum("hdbn,hdbm->bhnm", q, k) / 2).max()) / 2
    assert 60 < abs(jnp.einsum("hdbn,hdbm->bhnm", q, k) / 2).max() <= 80
    direction = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
    ours = with_gradients(lambda *x: local_attention(*x, **settings), (q, k, v), direction)
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(x), jnp.float64) for x in (q, k, v)]
        ones = jnp.ones(gain.shape)
        out, *grads = with_gradients(lambda *x: dense(*x, ones, **settings), exact, direction)
    assert ours[0].dtype == jnp.float32
    np.testing.assert_allclose(ours[0], out, rtol=1e-6, atol=1e-6)
    # A weight near 1 takes the mean gradient from its own: 0 but for the rounding of both.
    for one, other in zip(ours[1:], grads, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-6 * abs(other).max())


def test_sums_by_channel_and_by_offset_are_the_same():
    """The one is for CPUs, the other for accelerators."""
    x, padded = np.random.default_rng(0).normal(size=(2, 2, 5, 3, 6, 7))
    with jax.enable_x64(True):
        x = jnp.asarray(x[..., 1:-1, 2:-2])
        by_channel = local._products_by_channel(x, padded, (1, 2))
        by_offset = local._products_by_offset(x, padded, (1, 2))
    assert by_channel.shape == (15, 2, 3, 4, 3)
    np.testing.assert_allclose(by_channel, by_offset, rtol=1e-12)


def test_bfloat16_is_summed_in_float32():
    settings = settings_of("class_token", "soft")
    rounded = [x.astype(jnp.bfloat16) for x in inputs("class_token", np.float32)[:3]]
    apply = jax.jit(lambda *x: local_attention(*x, **settings))
    out, exact = apply(*rounded), apply(*(x.astype(jnp.float32) for x in rounded))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=2**-8, atol=1e-3)


def test_memory_is_linear_in_the_number_of_tokens():
    """What the compiled gradient needs beside its arguments, for a grid and its double."""

    def memory(side):
        shape = jax.ShapeDtypeStruct((HEADS, 8, 1, 1 + side * side), jnp.float32)

        def loss(q, k, v):
            return local_attention(q, k, v, (side, side), 1).sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(56) < 4.2 * memory(28)


def test_multiply_adds_are_those_of_the_neighbours():
    """Scores and values of 9 neighbours and a prefix token, the token's row, the sum of all."""
    settings = settings_of("class_token", "soft")
    arrays = inputs("class_token", np.float32)[:3]
    macs = macs_of(lambda *x: local_attention(*x, **settings), *arrays)
    tokens, width = 21, HEADS * WIDTH * BATCH
    assert macs == width * (20 * 2 * (9 + 1) + 2 * tokens + tokens)
