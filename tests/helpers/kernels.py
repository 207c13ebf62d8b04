"""Attention by kernels and by XLA, with the gradients of both, to be compared."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend import core

from spvit_jax.models.attention import Attention, attention
from spvit_jax.models.naming import named_leaves
from spvit_jax.models.spatial import LocalityMask
from spvit_jax.training import sharding
from tests.helpers.variables import random_variables

SOFT, HARD = LocalityMask((0,), (1, 1), "soft"), LocalityMask((0, 1), (1, 2), "hard")
SMALL = {"image_size": 16, "patch_size": 4, "dim": 32, "num_heads": 2, "num_classes": 5}


def module(heads, head_dim, implementation, **kind):
    """A layer of attention with weights far from its initial ones, scores about 1."""
    made = Attention(
        heads * head_dim,
        heads,
        qkv_bias=True,
        implementation=implementation,
        rngs=nnx.Rngs(0),
        **kind,
    )
    rng = np.random.default_rng(1)
    scale = (heads * head_dim) ** -0.5

    def draw(x):
        return jnp.asarray(scale * rng.normal(size=x.shape), jnp.float32)

    nnx.update(made, jax.tree.map(draw, nnx.state(made)))
    return made


def weighted_sum(x):
    """A scalar of which every element of x has a gradient of its own."""
    return (x * np.random.default_rng(3).normal(size=x.shape)).sum()


def by_kernel_and_by_xla(grid, num_prefix, heads, head_dim, batch, kind):
    """By name a layer's result and the gradients of its input and parameters, from each."""
    rng = np.random.default_rng(0)
    tokens = grid[0] * grid[1] + num_prefix
    x = jnp.asarray(rng.normal(size=(batch, tokens, heads * head_dim)), jnp.float32)

    def results(implementation):
        graphdef, state = nnx.split(module(heads, head_dim, implementation, **kind))

        def value(state, x):
            out = nnx.merge(graphdef, state)(x, grid, num_prefix)
            return weighted_sum(out), out

        (_, out), grads = jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))(state, x)
        return {"out": out, "x": grads[1], **named_leaves(grads[0])}

    return results("fused_interpret"), results("xla")


def on_a_mesh_and_on_one_device(head_dim):
    """By name the gradients of a layer with everything, on each, and the shapes that are summed.

    Of 2 heads, and 4×4 patches.
    """
    mesh = sharding.make_mesh(2, 4)
    kind = {"spatial_prior": True, "position_bias": (4, 4), "mask": HARD}
    graphdef, state = nnx.split(module(2, head_dim, "fused_interpret", **kind))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 16, 2 * head_dim)), jnp.float32)

    def value(state, x):
        return weighted_sum(nnx.merge(graphdef, state)(x, (4, 4), 0))

    gradient = jax.value_and_grad(value, (0, 1))
    split = jax.jit(sharding.on_mesh(mesh, gradient))
    split = split.lower(state, jax.device_put(x, sharding.batch_sharding(mesh))).compile()
    (_, expected), (_, grads) = jax.jit(gradient)(state, x), split(state, x)
    summed = re.findall(r"= (.*?) all-reduce\(", split.as_text())
    return named_leaves(grads), named_leaves(expected), summed


def loss_of_layers(images, **execution):
    """A loss of SP-ViT with layers of both kinds, as a function of its parameters, and those."""
    variables = random_variables(
        "spvit_s", **SMALL, depth=3, spatial_layers=2, stem_width=0, drop_path=0.0, **execution
    )

    def loss(params):
        outputs = variables.replace(params=params).model(train=True).outputs(images)
        return sum(jnp.square(x).mean() for x in jax.tree.leaves(outputs))

    return loss, variables.params


def assert_close(actual, expected, tolerance):
    """Checks arrays by name, each to a tolerance relative to its largest element."""
    assert actual.keys() == expected.keys()
    for name, leaf in expected.items():
        scale = np.abs(leaf).max()
        assert scale > 0, name
        np.testing.assert_allclose(actual[name], leaf, 0, tolerance * scale, err_msg=name)


def reference(qkv, gain, bias, heads):
    """The readable attention, on a projection as kernels take it."""
    q, k, v = jnp.moveaxis(qkv.reshape(*qkv.shape[:2], 3, heads, -1), 2, 0)
    return attention(q, k, v, gain, bias).reshape(*qkv.shape[:2], -1)


def factors(*, batch=8, tokens=19, heads=4, head_dim=32, dtype=jnp.float32):
    """A projection, a gain and a bias, as the arguments of `reference`."""
    rng = np.random.default_rng(2)
    qkv = jnp.asarray(rng.normal(size=(batch, tokens, 3 * heads * head_dim)), dtype)
    gain, bias = jnp.asarray(1 + rng.normal(size=(2, heads, tokens, tokens)), jnp.float32)
    return qkv, gain, bias


def gradients(function, arguments):
    """By name the result of a function of a projection, a gain and a bias, and its gradients."""

    def value(*arguments):
        out = function(*arguments)
        return weighted_sum(out.astype(jnp.float32)), out

    grads, out = jax.jit(jax.grad(value, (0, 1, 2), has_aux=True))(*arguments)
    return dict(zip(("out", "qkv", "gain", "bias"), (out, *grads), strict=True))


def distance(result, exact):
    """Norm of the difference of two arrays."""
    return np.linalg.norm(np.asarray(result, np.float32) - exact)


def kernels_of_a_gradient(**kind):
    """The `kernels` of the gradient of a layer's parameters."""
    graphdef, state = nnx.split(module(2, 32, "fused_interpret", **kind))
    x = jnp.zeros((2, 9, 64))
    return kernels(jax.grad(lambda s: nnx.merge(graphdef, s)(x, (3, 3)).sum()), state)


def kernels(function, *arguments):
    """Names of the kernels in a function's program, each with the number of its results."""

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "pallas_call":
                yield eqn.params["name"], len(eqn.outvars)
            else:
                for inner in core.jaxprs_in_params(eqn.params):
                    yield from walk(inner)

    return sorted(walk(jax.make_jaxpr(function)(*arguments).jaxpr))
