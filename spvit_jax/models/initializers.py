"""Initializers of the papers' PyTorch code, where flax's defaults differ.

timm's "truncated normal 0.02" cuts at ±2, a hundred standard deviations away: it is a normal
distribution. Convolutions are left at torch's default, uniform in ±1/√fan_in.
"""

from __future__ import annotations

import functools
import math

import jax
from flax import nnx


class CountedRngs(nnx.Rngs):
    """Keys of `nnx.Rngs` for parameters, counted in Python, so that tracing is fast.

    `nnx.Rngs` counts in arrays. Where JAX traces the creation of a model, Flax 0.12 asks each of
    them for its sharding, and JAX 0.10 looks through the whole trace for an answer: in all it takes
    seconds for a large model, more than the rest.
    """

    def __init__(self, seed: int | jax.Array):
        super().__init__(seed)
        self.used = 0

    def params(self) -> jax.Array:
        """Returns the next key for a parameter."""
        key = jax.random.fold_in(self.default.key.get_value(), self.used)
        self.used += 1
        return key


linear_kernel = nnx.initializers.normal(0.02)
token_embedding = nnx.initializers.normal(0.02)
conv_kernel = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@functools.cache
def conv_bias(fan_in: int) -> nnx.initializers.Initializer:
    """Returns torch's default initializer for the bias of a convolution, U(±1/√fan_in)."""
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
