"""Layers that the TPU's compiler needs to be helped with."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from spvit_jax.models.stem import ConvStem
from tests.helpers.tpu_compiler import needs_libtpu, one_chip

pytestmark = needs_libtpu


@pytest.mark.parametrize("topology", ["v5e:1x1", "v6e:1x1"])
@pytest.mark.parametrize("dim", [128, 256])
def test_the_stem_can_be_trained(topology, dim):
    """libtpu took this process down with it, on v6e with 128 channels."""
    chip = one_chip(topology)
    stem = nnx.eval_shape(lambda: ConvStem(dim, 4, 16, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    graph, weights = nnx.split(stem)
    shapes = weights, *(jnp.empty((8, *shape)) for shape in ((32, 32, 3), (8, 8, dim)))

    @jax.grad
    def gradient(weights, images, direction):
        return (direction * nnx.merge(graph, weights).on_pairs(images)).sum()

    step = jax.jit(gradient, in_shardings=chip, out_shardings=chip)
    compiled = step.lower(*shapes).compile()
    assert compiled.cost_analysis()["flops"] > 0
