"""Traffic and operations of programs of which they are known by hand, compiled for one chip."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from spvit_jax.preflight import hlo
from spvit_jax.preflight.cost import count_cost
from tests.helpers.tpu_compiler import needs_libtpu, one_chip

pytestmark = needs_libtpu

N = 8192
SQUARE, HALF = (N, N), (N // 2, N // 2)
FLOAT, BFLOAT = np.dtype("float32"), np.dtype(jnp.bfloat16)
MATRIX = 4 * N * N  # bytes in float32


def scan(x):
    return jax.lax.scan(lambda carry, one: (carry, 2 * one), 0, x)[1]


def put(x, row):
    return x.at[3000:3001].set(row)


def take(x, rows):
    return jnp.take(x, rows, axis=0, mode="clip")


# Function, its arguments, those that are donated, and the bytes that it must move by hand.
PROGRAMS = {
    "a product": (jnp.matmul, [(SQUARE, BFLOAT)] * 2, (), 3 * MATRIX / 2),
    "a product in part from fast memory": (jnp.matmul, [(HALF, BFLOAT)] * 2, (), 3 * MATRIX / 8),
    "element by element": (lambda x: 2 * x + 1, [(SQUARE, FLOAT)], (), 2 * MATRIX),
    "two results": (lambda x: (2 * x, x + 1), [(SQUARE, FLOAT)], (), 3 * MATRIX),
    "an operand read at two places": (lambda x: x[1:] + x[:-1], [(SQUARE, FLOAT)], (), 2 * MATRIX),
    "softmax, in two passes": (jax.nn.softmax, [(SQUARE, FLOAT)], (), 4 * MATRIX),
    # Tiles are of 8×128 elements: 100 becomes 104, and 197 becomes 200.
    "tiles": (lambda x: 2 * x, [((2**18, 100), FLOAT)], (), 2 * 4 * 2**18 * 104),
    "tiles of scores": (
        *(lambda x: 2 * x, [((384, 6, 197, 197), FLOAT)], ()),
        2 * 4 * 384 * 6 * 197 * 200,
    ),
    "rounds that stack their results": (scan, [((8, *HALF), FLOAT)], (), 4 * MATRIX),
    "a row put in place": (put, [(SQUARE, FLOAT), ((1, N), FLOAT)], (0,), 2 * 4 * N),
    "a row put in a copy": (put, [(SQUARE, FLOAT), ((1, N), FLOAT)], (), 2 * MATRIX),
    "rows taken": (take, [(SQUARE, FLOAT), ((1024,), np.int32)], (), 2 * MATRIX / 8),
}


@pytest.fixture(scope="module")
def device():
    return one_chip("v5e:2x2")


def compiled(device, function, arguments, donated=()):
    shapes = [jax.ShapeDtypeStruct(*argument, sharding=device) for argument in arguments]
    lowered = jax.jit(function, donate_argnums=donated).lower(*shapes)
    return hlo.parse(lowered.compile().as_text())


@pytest.mark.parametrize("name", PROGRAMS)
def test_traffic_of_known_programs(device, name):
    function, arguments, donated, expected = PROGRAMS[name]
    counted = count_cost(compiled(device, function, arguments, donated)).hbm_bytes
    assert counted == pytest.approx(expected, rel=1e-3, abs=0.5e6)


def test_a_kernel_counts_as_its_author_says(device):
    def kernel(x, out):
        out[...] = 2 * x[...]

    stated = pl.CostEstimate(flops=10**9, transcendentals=0, bytes_accessed=10**8)
    block = pl.BlockSpec((256, 256), lambda row: (row, 0))
    call = functools.partial(
        pl.pallas_call,
        kernel,
        out_shape=jax.ShapeDtypeStruct((1024, 256), np.float32),
        grid=(4,),
        in_specs=[block],
        out_specs=block,
    )
    for estimate, macs, moved in ((None, 0, 2 * 4 * 1024 * 256), (stated, 10**9 // 2, 10**8)):
        cost = count_cost(compiled(device, call(cost_estimate=estimate), [((1024, 256), FLOAT)]))
        assert cost.macs == macs
        assert cost.bytes == pytest.approx(moved, rel=0.01)


def test_a_kernel_that_takes_an_array_twice_reads_it_once(device):
    """As queries and as keys, say, of one projection, here by two names of two shapes."""

    def kernel(x, y, out):
        out[...] = x[0] + y[...]

    def function(x):
        block = pl.BlockSpec((256, 256), lambda row: (row, 0))
        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((1024, 256), np.float32),
            grid=(4,),
            in_specs=[pl.BlockSpec((1, 256, 256), lambda row: (0, row, 0)), block],
            out_specs=block,
        )(x[None], x)

    cost = count_cost(compiled(device, function, [((1024, 256), FLOAT)]))
    assert cost.bytes == pytest.approx(2 * 4 * 1024 * 256, rel=0.01)
