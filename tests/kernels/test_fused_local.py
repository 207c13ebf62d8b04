"""Masked heads as a kernel for TPUs, in Pallas' interpret mode, against XLA's path by slices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spvit_jax.kernels.fused_local import fused_local_attention, supports
from spvit_jax.kernels.local import local_attention
from spvit_jax.kernels.local_plan import LocalPlan
from spvit_jax.models import model_config
from spvit_jax.models.attention import Attention
from spvit_jax.models.spatial import LocalityMask
from spvit_jax.training import sharding
from tests.helpers.tpu_compiler import needs_libtpu, one_chip

HEADS, WIDTH = 2, 16

# Grid, radius, kind, images. Interpreted, a program takes seconds to compile for each patch of its
# columns, which are few where they do not divide the width.
CASES = {
    "soft": ((4, 2), (1, 1), "soft", 2),
    "hard, rows in pairs": ((4, 5), (2, 1), "hard", 1),
}


def inputs(grid, images, dtype=np.float32):
    rng = np.random.default_rng(0)
    qkv, direction = (
        rng.normal(size=(images, *parts, HEADS, WIDTH, grid[0] * grid[1])) for parts in ((3,), ())
    )
    return jnp.asarray(2 * qkv, dtype), jnp.asarray(direction, np.float32)


def by_slices(qkv, grid, **kind):
    q, k, v = qkv.transpose(1, 2, 3, 0, 4)
    return local_attention(q, k, v, grid, **kind).transpose(2, 0, 1, 3)


def with_gradient(function, qkv, direction):
    def value(qkv):
        out = function(qkv)
        return (out * direction).sum(), out

    (_, out), grad = jax.jit(jax.value_and_grad(value, has_aux=True))(qkv)
    return out, grad


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_equals_the_slices(case, monkeypatch):
    """In programs of fewer rows than the grid has, so that neighbours lie in others."""
    grid, radius, kind, images = CASES[case]
    monkeypatch.setattr(LocalPlan, "rows", radius[0])
    qkv, direction = inputs(grid, images)
    ours = functools.partial(fused_local_attention, interpret=True)
    results = [
        with_gradient(functools.partial(f, grid=grid, radius=radius, kind=kind), qkv, direction)
        for f in (ours, by_slices)
    ]
    for actual, expected in zip(*results, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6 * abs(expected).max())


def test_bfloat16_is_summed_in_float32():
    settings = {"grid": (2, 5), "radius": (1, 2)}
    qkv, direction = inputs(settings["grid"], 1, jnp.bfloat16)
    ours = functools.partial(fused_local_attention, interpret=True, **settings)
    out, grad = with_gradient(ours, qkv, direction)
    assert out.dtype == grad.dtype == jnp.bfloat16
    slices = functools.partial(by_slices, **settings)
    exact = with_gradient(slices, qkv.astype("float32"), direction)
    for actual, expected in zip((out, grad), exact, strict=True):
        tolerance = 2**-8 * abs(expected).max()
        np.testing.assert_allclose(actual.astype("float32"), expected, rtol=2**-7, atol=tolerance)


def test_programs_divide_the_grids_of_the_pyramid():
    for pixels in (224, 384):
        for name in ("mait_pyramid_t", "mait_pyramid_b"):
            for grid, dim, heads in model_config(name, image_size=pixels).stages()[:2]:
                assert supports(grid, (1, 1), dim // heads, "bfloat16"), (name, grid)


def test_what_the_kernel_does_not_know():
    assert not supports((8, 8), (1, 1), 24, "bfloat16")
    assert not supports((8, 8), (1, 1), 32, "float64")
    assert not supports((1, 900), (0, 1), 32, "float32")
    assert not supports((7, 8), (2, 2), 32, "float32")  # rows in pairs
    assert not supports((1024, 1024), (1, 1), 64, "float32")  # a row of patches is too long


@needs_libtpu
def test_a_layer_of_the_pyramid_compiles_for_a_tpu():
    """With a chip's batch; XLA's own layout of the projection is the kernel's, with no copy."""
    grid, dim, images = (28, 28), 96, 128
    layer = functools.partial(
        Attention, dim, 3, qkv_bias=True, mask=LocalityMask((0, 1, 2)), dtype=jnp.bfloat16
    )
    graphdef, params = nnx.split(nnx.eval_shape(lambda: layer(rngs=nnx.Rngs(0))))
    mesh = sharding.make_mesh(1, 1, devices=list(one_chip("v5e:2x2").device_set))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def shape_of(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)

    def gradient(params, x):
        return jax.grad(lambda params: nnx.merge(graphdef, params)(x, grid).sum())(params)

    x, few = (
        shape_of(jax.ShapeDtypeStruct((count, grid[0] * grid[1], dim), jnp.bfloat16))
        for count in (images, 8)
    )
    with jax.set_mesh(mesh):
        assert "pallas_call" not in str(jax.make_jaxpr(gradient)(params, few))
        compiled = jax.jit(gradient).lower(jax.tree.map(shape_of, params), x).compile()
    lines = compiled.as_text().splitlines()
    kernels = {line.split("%")[1].split(".")[0] for line in lines if "tpu_custom_call" in line}
    name = "fused_local_attention"
    assert kernels == {name, f"{name}_dq", f"{name}_dkv"}
    assert not [line for line in lines if " copy(" in line and "bf16[3,3," in line]
