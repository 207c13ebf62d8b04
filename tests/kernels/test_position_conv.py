"""The position convolution by XLA and by its kernel, in interpret mode, against torch's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from spvit_jax.kernels import position_conv as kernels
from spvit_jax.models.layers import PosConv

GRIDS = [((3, 5), 2), ((1, 4), 1), ((4, 1), 0)]
INTERPRETED = functools.partial(kernels.position_conv, interpret=True)


def by_module(x, kernel, bias, grid, num_prefix):
    layer = PosConv(x.shape[-1], rngs=nnx.Rngs(0))
    layer.kernel[...], layer.bias[...] = kernel, bias
    return layer(x, grid, num_prefix)


def by_torch(x, kernel, bias, grid, num_prefix):
    patches = x[:, num_prefix:]
    image = patches.transpose(1, 2).unflatten(2, grid)
    weight = kernel.permute(3, 2, 0, 1)
    conv = torch.nn.functional.conv2d(image, weight, bias, padding=1, groups=len(weight))
    return torch.cat([x[:, :num_prefix], patches + conv.flatten(2).transpose(1, 2)], dim=1)


@pytest.mark.parametrize(("grid", "num_prefix"), GRIDS)
@pytest.mark.parametrize("convolve", [by_module, INTERPRETED], ids=["xla", "kernel"])
def test_values_and_gradients_are_torchs(convolve, grid, num_prefix):
    """Two programs of channels, and three of images, which add to one gradient of weights."""
    rng, dim, tokens = np.random.default_rng(0), 256, num_prefix + grid[0] * grid[1]
    shapes = (21, tokens, dim), (3, 3, 1, dim), (dim,), (21, tokens, dim)
    *inputs, direction = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    ours, pullback = jax.vjp(lambda *args: convolve(*args, grid, num_prefix), *inputs)
    theirs = [torch.from_numpy(value).double().requires_grad_() for value in inputs]
    expected = by_torch(*theirs, grid, num_prefix)
    expected.backward(torch.from_numpy(direction).double())
    np.testing.assert_allclose(ours, expected.detach(), rtol=1e-5, atol=1e-5)
    for gradient, their in zip(pullback(jnp.asarray(direction)), theirs, strict=True):
        np.testing.assert_allclose(gradient, their.grad, rtol=1e-5, atol=1e-4)


def test_bfloat16_is_rounded_once():
    grid, dim = (2, 3), 128
    x, kernel, bias = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(2, 6, dim), (3, 3, 1, dim), (dim,)])
    )
    x = x.astype(jnp.bfloat16)
    exact = by_module(x.astype(jnp.float32), kernel, bias, grid, 0)
    ours = INTERPRETED(x, kernel, bias, grid)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


def test_widths_and_dtypes_that_the_kernel_knows():
    assert kernels.supports(384, jnp.bfloat16)
    assert not kernels.supports(240, jnp.bfloat16)
    assert not kernels.supports(384, jnp.float64)
