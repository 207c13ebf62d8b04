"""How the papers' PyTorch code initialises weights, where flax's defaults differ.

timm's "truncated normal 0.02" cuts at ±2, a hundred standard deviations away: it is a normal
distribution. Convolutions are left at torch's default, uniform in ±1/√fan_in.
"""

from __future__ import annotations

import functools
import math

import jax
from flax import nnx

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
