"""Blocks as loops: which layers make one, and that nothing but the program's size changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spvit_jax.models.complexity import macs_of
from spvit_jax.models.loop import Segment, find_segments
from spvit_jax.models.naming import named_leaves
from tests.helpers.variables import random_variables

SMALL = {"image_size": 32, "patch_size": 4, "dim": 12, "num_heads": 3, "num_classes": 5}
MODELS = {
    "spvit_s": {"depth": 5, "stem_width": 8, "spatial_layers": 3},
    "mait_t": {"depth": 6, "masked_heads": ((2, 3), (2, 1), (2, 0))},
    "cait_xxs24": {"depth": 3, "layer_scale": 0.1},
    "swin_t": {"depths": (4, 2), "window": 4},
    "mait_pyramid_t": {"depths": (2,), "attention": "local"},
}
IMAGES = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
KEY = jax.random.key(1)


@pytest.mark.parametrize(
    ("kinds", "starts", "expected"),
    [
        ("aaaa", (), [Segment(0, 1, 4)]),
        ("aaab", (), [Segment(0, 1, 3), Segment(3)]),
        ("aaabb", (2,), [Segment(0, 1, 2), Segment(2), Segment(3, 1, 2)]),
        ("abab", (), [Segment(0, 2, 2)]),
        ("ababa", (), [Segment(0, 2, 2), Segment(4)]),
        ("ab", (), [Segment(0), Segment(1)]),
        ("aabab", (0,), [Segment(0, 1, 2), Segment(2), Segment(3), Segment(4)]),
        ("a", (), [Segment(0)]),
    ],
)
def test_layers_are_divided_into_the_longest_loops(kinds, starts, expected):
    assert find_segments(kinds, starts) == expected


def loss_of(name, **execution):
    """A loss on all outputs in train mode, with drop path, as a function of the parameters."""
    variables = random_variables(name, **SMALL, **MODELS[name], drop_path=0.4, **execution)

    def loss(params):
        model = variables.replace(params=params).model(train=True)
        return sum(jnp.square(x).mean() for x in jax.tree.leaves(model.outputs(IMAGES, KEY)))

    return loss, variables.params


@functools.cache
def value_and_gradients(name, **execution):
    loss, params = loss_of(name, **execution)
    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    return {"value": value, **named_leaves(grads)}


@pytest.mark.parametrize("execution", [{}, {"remat": True}], ids=["plain", "remat"])
@pytest.mark.parametrize("name", MODELS)
def test_loops_change_neither_value_nor_gradient(name, execution):
    one_by_one = value_and_gradients(name)
    looped = value_and_gradients(name, scan=True, **execution)
    assert one_by_one.keys() == looped.keys()
    largest = max(np.abs(leaf).max() for leaf in one_by_one.values())
    for leaf, expected in one_by_one.items():
        np.testing.assert_allclose(looped[leaf], expected, 1e-3, 1e-6 * largest, err_msg=leaf)


def macs(name, transform=lambda loss: loss, **execution):
    """The multiply-adds of a loss, or of what `transform` makes of it."""
    loss, params = loss_of(name, **execution)
    return macs_of(transform(loss), params)


@pytest.mark.parametrize("name", MODELS)
def test_loops_compute_as_much(name):
    """As `count_macs` takes for granted, which counts a model as loops."""
    assert macs(name) == macs(name, scan=True) > 0


def test_a_loop_keeps_linear_layers_and_remat_nothing():
    least, looped, most = (
        macs("mait_t", jax.grad, **execution)
        for execution in ({}, {"scan": True}, {"scan": True, "remat": True})
    )
    layers, tokens, dim = 6, len(IMAGES) * 65, SMALL["dim"]
    attention = layers * tokens * 2 * 65 * dim
    linear = layers * tokens * (3 + 1 + 4) * dim**2  # the MLP's result itself is not needed
    assert looped - least == attention
    assert most - looped == linear


def test_loops_hold_each_kind_of_block_once():
    """Products in the program: of a deep model no more than of one with a pair of each kind."""

    def products(**settings):
        variables = random_variables("spvit_s", **SMALL, stem_width=8, scan=True, **settings)
        text = jax.jit(lambda v, x: v.model()(x)).lower(variables, IMAGES).as_text()
        return text.count("dot_general")

    shallow = products(depth=4, spatial_layers=2)
    assert products(depth=9, spatial_layers=5) == shallow > 0
