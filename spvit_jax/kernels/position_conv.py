"""Position convolution, x + DWConv3×3(x) + bias, as a Pallas program for TPUs, with its gradients.

A program holds 128 channels of a few images: each array is read or written once. A row of patches
is shifted by one column on the chip, and all else are sums of whole rows. XLA's fusions of the same
shift every array for every weight: on v5e 0.6 ms for SP-ViT-S at 384 pixels, 16 images, forward and
backward; these kernels' instructions take 0.05. The readable form is `PosConv` in
`models/layers.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from spvit_jax.kernels.mesh import on_each_device

Grid = tuple[int, int]  # (h, w): rows and columns of patches

DTYPES = ("float32", "bfloat16")

_LANES = 128  # channels of a program
_MAX_IMAGES = 8  # of a program
_VMEM = 12 * 2**20  # bytes for a program's blocks, of the 16 MiB that a kernel has by default
_BIAS = 9  # row of the bias' gradient, behind those of the nine weights
_GRADIENT_ROWS = 16  # whole tiles


def supports(dim: int, dtype: jax.typing.DTypeLike) -> bool:
    """Returns whether the kernel knows a number of channels, in a dtype."""
    return dim % _LANES == 0 and jnp.dtype(dtype).name in DTYPES


def position_conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    grid: Grid,
    num_prefix: int = 0,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Computes x + DWConv3×3(x) + bias on the patches, with zeros around them.

    Args:
      x: tokens [B, P+N, D] of a grid h·w = N behind P prefix tokens, which stay as they are;
        float32 or bfloat16, D a multiple of 128.
      kernel: [3, 3, 1, D] float32.
      bias: [D] float32.
      grid: rows and columns of patches (h, w).
      num_prefix: number P of prefix tokens.
      interpret: whether to run in Pallas' interpret mode, on any platform.

    Returns:
      [B, P+N, D] in the dtype of `x`; sums are in float32.
    """

    weights = kernel.reshape(9, -1), bias.reshape(1, -1)
    return on_each_device(
        lambda x, weights: _position_conv(x, *weights, grid, num_prefix, interpret), x, weights
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _position_conv(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, grid: Grid, num_prefix: int, interpret: bool
) -> jax.Array:
    programs, tokens, weights = _blocks(x)
    return pl.pallas_call(
        functools.partial(_forward_kernel, grid, num_prefix),
        grid=programs,
        in_specs=[tokens, weights(9), weights(1)],
        out_specs=tokens,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        cost_estimate=_cost(x, 1, 2),
        name="position_conv",
        interpret=interpret,
    )(x, kernel, bias)


def _forward(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, grid: Grid, num_prefix: int, interpret: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _position_conv(x, kernel, bias, grid, num_prefix, interpret), (x, kernel)


def _backward(
    grid: Grid,
    num_prefix: int,
    interpret: bool,
    residuals: tuple[jax.Array, jax.Array],
    grad: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, kernel = residuals
    programs, tokens, weights = _blocks(x)
    dx, dweights = pl.pallas_call(
        functools.partial(_backward_kernel, grid, num_prefix),
        grid=programs,
        in_specs=[tokens, weights(9), tokens],
        out_specs=[tokens, weights(_GRADIENT_ROWS)],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((_GRADIENT_ROWS, x.shape[-1]), jnp.float32),
        ],
        cost_estimate=_cost(x, 2, 3),
        name="position_conv_backward",
        interpret=interpret,
    )(x, kernel, grad)
    return dx, dweights[:_BIAS], dweights[_BIAS][None]


_position_conv.defvjp(_forward, _backward)


def _blocks(x: jax.Array) -> tuple[tuple[int, int], pl.BlockSpec, Any]:
    """Returns the grid of programs, a block of tokens, and a function for one of weights.

    The inner axis of the grid is that of images, so that all add to the same gradient of weights.
    """
    batch, tokens, dim = x.shape
    # At most x, the gradient and its result at once, each in two buffers.
    fit = max(_VMEM // (6 * tokens * _LANES * x.dtype.itemsize), 1)
    images = max(n for n in range(1, min(fit, _MAX_IMAGES) + 1) if batch % n == 0)
    return (
        (dim // _LANES, batch // images),
        pl.BlockSpec((images, tokens, _LANES), lambda channels, images: (images, 0, channels)),
        lambda rows: pl.BlockSpec((rows, _LANES), lambda channels, images: (0, channels)),
    )


def _forward_kernel(
    grid: Grid, num_prefix: int, x_ref: Any, kernel_ref: Any, bias_ref: Any, out_ref: Any
) -> None:
    weights, bias = _rows(kernel_ref, 9), bias_ref[...]

    def convolve(image: jax.Array, _: None) -> None:
        _copy_prefix(x_ref, out_ref, image, num_prefix)
        for patches, rows in _neighbourhoods(x_ref, image, grid, num_prefix):
            out = rows[1][1] + bias
            for row, neighbours in rows.items():
                for column in range(3):
                    out += neighbours[column] * weights[3 * row + column]
            out_ref[image, patches, :] = out.astype(out_ref.dtype)

    jax.lax.fori_loop(0, x_ref.shape[0], convolve, None)


def _backward_kernel(
    grid: Grid,
    num_prefix: int,
    x_ref: Any,
    kernel_ref: Any,
    grad_ref: Any,
    dx_ref: Any,
    dweights_ref: Any,
) -> None:
    weights = _rows(kernel_ref, 9)

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        dweights_ref[...] = jnp.zeros_like(dweights_ref)

    def differentiate(image: jax.Array, sums: list[jax.Array]) -> list[jax.Array]:
        _copy_prefix(grad_ref, dx_ref, image, num_prefix)
        for patches, rows in _neighbourhoods(grad_ref, image, grid, num_prefix):
            x = x_ref[image, patches, :].astype(jnp.float32)
            dx = rows[1][1]
            sums[_BIAS] += dx
            for row, neighbours in rows.items():
                for column in range(3):
                    # What lies below and to the right of a patch saw it above and to the left.
                    weight = 3 * (2 - row) + 2 - column
                    dx += neighbours[column] * weights[weight]
                    sums[weight] += neighbours[column] * x
            dx_ref[image, patches, :] = dx.astype(dx_ref.dtype)
        return sums

    zeros = jnp.zeros((grid[1], _LANES), jnp.float32)
    sums = jax.lax.fori_loop(0, x_ref.shape[0], differentiate, [zeros] * (_BIAS + 1))
    for row, total in enumerate(sums):
        dweights_ref[row, :] += total.sum(axis=0)


def _neighbourhoods(ref: Any, image: jax.Array, grid: Grid, num_prefix: int) -> Any:
    """Yields each row of patches as a slice, and the rows 0 above it, 1 itself and 2 below it.

    A row of an image's is (left neighbours, patches, right neighbours), each [w, 128] float32 with
    0 outside the grid.
    """
    h, w = grid
    slices = [slice(num_prefix + y * w, num_prefix + (y + 1) * w) for y in range(h)]
    rows: list[Any] = []
    for y in range(h):
        while len(rows) < min(y + 2, h):
            rows.append(_shifted(ref[image, slices[len(rows)], :].astype(jnp.float32)))
        yield slices[y], {i: rows[y + i - 1] for i in range(3) if 0 <= y + i - 1 < h}


def _shifted(row: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the left neighbours of a row of patches [w, 128], the row, and the right ones."""
    width = row.shape[0]
    column = jax.lax.broadcasted_iota(jnp.int32, row.shape, 0)
    left = jnp.where(column > 0, pltpu.roll(row, 1, 0), 0)
    right = jnp.where(column < width - 1, pltpu.roll(row, width - 1, 0), 0)
    return left, row, right


def _copy_prefix(source: Any, target: Any, image: jax.Array, num_prefix: int) -> None:
    if num_prefix:
        target[image, :num_prefix, :] = source[image, :num_prefix, :]


def _rows(ref: Any, count: int) -> list[jax.Array]:
    return [ref[row, :][None] for row in range(count)]


def _cost(x: jax.Array, convolutions: int, arrays: int) -> pl.CostEstimate:
    """Returns the cost of depthwise convolutions, and of reading or writing x some times."""
    return pl.CostEstimate(
        flops=2 * 9 * convolutions * x.size,
        transcendentals=0,
        bytes_accessed=arrays * x.size * x.dtype.itemsize,
    )
