"""What is kept for the backward pass, of programs of which that is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spvit_jax.preflight import hlo
from spvit_jax.preflight.activations import kept_bytes
from tests.helpers.tpu_compiler import needs_libtpu, one_chip

pytestmark = [needs_libtpu, pytest.mark.usefixtures("lightly_optimized")]

LAYERS, ROWS, COLUMNS = 4, 65536, 512  # arrays larger than a chip's fast memory
ARRAY = 4 * ROWS * COLUMNS
# The backward pass of a layer needs the two exponentials and the input. A loop keeps all three, the
# input perhaps in half the bytes; without a loop the input is the layer's before it.
KEPT = {
    "in a loop": (2.5 * LAYERS, 3 * LAYERS),
    "in a loop, recomputed": (0.5 * LAYERS, LAYERS),
    "one by one": (2 * LAYERS - 1, 2 * LAYERS),
}


@pytest.fixture(scope="module")
def device():
    return one_chip("v5e:2x2")


def network(kind):
    """The loss of a network of layers, of its weights and rows that it is given."""

    def layer(rows, weights):
        for one in weights:
            rows = jnp.exp(rows @ one)
        return rows, None

    def loss(weights, rows):
        body = jax.checkpoint(layer) if "recomputed" in kind else layer
        unroll = LAYERS if kind == "one by one" else 1
        return jax.lax.scan(body, rows, weights, unroll=unroll)[0].sum()

    return loss


def compiled(device, function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, np.float32, sharding=device) for shape in shapes]
    return hlo.parse(jax.jit(function).lower(*arguments).compile().as_text())


SHAPES = (LAYERS, 2, COLUMNS, COLUMNS), (ROWS, COLUMNS)


@pytest.mark.parametrize("kind", KEPT)
def test_the_arrays_that_the_backward_pass_reads_are_counted(device, kind):
    program = compiled(device, jax.grad(network(kind)), *SHAPES)
    least, most = KEPT[kind]
    assert least <= kept_bytes(program) / ARRAY <= 1.02 * most  # weights are small beside it


def test_without_a_backward_pass_nothing_is_kept(device):
    assert kept_bytes(compiled(device, network("in a loop"), *SHAPES)) == 0
