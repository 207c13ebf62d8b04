"""Masked heads of MaiT at linear cost as Pallas programs for TPUs, with their gradients.

The mathematics are those of `local.py`, which reads more easily. Images lie along the lanes and
channels along the sublanes, as XLA lays out a pyramid's large grids, so that the neighbour at an
offset is a matter of addresses. A program holds one head of some rows of patches, and of keys and
values the rows around them: HBM sees each array about once, where XLA's fusions of the same read
keys and values for every neighbour.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from spvit_jax.kernels.local import Grid, Radius, neighbour_offsets

DTYPES = ("float32", "bfloat16")

_LANES = 128  # images of a program, at most
_ROWS = 16  # of a tile of bfloat16; two tiles of float32
_VMEM = 60 * 2**20  # bytes that a program may use; chips have 128 MB or 64
_BLOCKS = 44 * 2**20  # of these for blocks and buffers; the compiler needs some for itself


def supports(grid: Grid, radius: Radius, head_dim: int, dtype: jax.typing.DTypeLike) -> bool:
    """Returns whether the kernel knows heads of a width on a grid, in a dtype."""
    if jnp.dtype(dtype).name not in DTYPES or head_dim % _ROWS or min(radius) < 1:
        return False
    return _Blocks(grid, radius, "soft", head_dim, _LANES, jnp.dtype(dtype).itemsize).rows > 0


@jax.named_scope("attention")
def fused_local_attention(
    qkv: jax.Array,
    grid: Grid,
    *,
    radius: Radius = (1, 1),
    kind: str = "soft",
    interpret: bool = False,
) -> jax.Array:
    """Computes softmax(G ⊙ QKᵀ/√d + B) V of masked heads, without an N×N matrix.

    G and B are those of `local.local_attention`, without a learned gain and without prefix tokens.
    On a mesh it is to be called by `mesh.on_each_device`.

    Args:
      qkv: queries, keys and values [B, 3, H, d, N]; float32 or bfloat16.
      grid: rows and columns of patches (h, w), h·w = N.
      radius: (rows, columns) of the neighbourhood.
      kind: "soft" or "hard".
      interpret: whether to run in Pallas' interpret mode, on any platform.

    Returns:
      [B, H, d, N] in the dtype of `qkv`; sums are in float32.
    """
    batch, _, num_heads, head_dim, _ = qkv.shape
    lanes = min(batch, _LANES)
    blocks = _Blocks(grid, radius, kind, head_dim, lanes, qkv.dtype.itemsize)
    laid_out = qkv.transpose(1, 2, 4, 3, 0).reshape(3, num_heads, *grid, head_dim, batch)
    out = _attention(laid_out, blocks, interpret)
    return out.reshape(num_heads, -1, head_dim, batch).transpose(3, 0, 2, 1)


class _Blocks(NamedTuple):
    """Static arguments of the kernels, and the division of the work into programs."""

    grid: Grid
    radius: Radius
    kind: str
    head_dim: int
    lanes: int
    itemsize: int

    @property
    def rows(self) -> int:
        """Rows of patches in a program, which divide the grid's; 0 where no number fits."""
        (height, width), (reach, sideways) = self.grid, self.radius
        row = self.head_dim * _LANES * width
        weights = 2 * -(-len(self.offsets) // 8) * 8 * _LANES * (width + 2 * sideways)
        for rows in range(height, 0, -1):
            # Five arrays as blocks, two of each; two with their neighbours in float32.
            blocks = 10 * rows * row * self.itemsize + 4 * 2 * rows * weights
            buffers = 2 * 4 * (rows + 2 * reach) * row + 4 * (rows + 2 * reach) * weights
            # The rows around a program are blocks of `reach` rows, which have to divide its own.
            if height % rows == 0 == rows % reach and blocks + buffers <= _BLOCKS:
                return rows
        return 0

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """Offsets (dy, dx) of the neighbourhood."""
        return neighbour_offsets(self.radius)

    def programs(self, laid_out: jax.Array) -> tuple[int, int, int]:
        """Returns the grid of programs: heads, groups of images, groups of rows."""
        return laid_out.shape[-5], -(-laid_out.shape[-1] // self.lanes), self.grid[0] // self.rows

    def padded(self, channels: int) -> Any:
        """Returns a float32 buffer of a program's rows, with neighbours on all sides."""
        (reach, sideways), width = self.radius, self.grid[1]
        shape = (self.rows + 2 * reach, width + 2 * sideways, channels, self.lanes)
        return pltpu.VMEM(shape, jnp.float32)

    def specs(self, channels: int, part: int | None = None) -> list[pl.BlockSpec]:
        """Returns the blocks of a program's rows of an array, of those before, and those behind.

        Args:
          channels: size of the array's axis before the last: [H, h, w, channels, B].
          part: index on an axis before all others; None where there is none.
        """
        reach, width = self.radius[0], self.grid[1]
        per_program, last = self.rows // reach, self.grid[0] // reach - 1
        own = () if part is None else (part,)
        squeezed = (None,) * (1 + len(own))

        def spec(rows: int, place: Callable[[jax.Array], Any]) -> pl.BlockSpec:
            return pl.BlockSpec(
                (*squeezed, rows, width, channels, self.lanes),
                lambda head, images, group: (*own, head, place(group), 0, 0, images),
            )

        return [
            spec(self.rows, lambda group: group),
            spec(reach, lambda group: jnp.maximum(group * per_program - 1, 0)),
            spec(reach, lambda group: jnp.minimum((group + 1) * per_program, last)),
        ]

    def fill(self, buffer: Any, here: Any, before: Any, behind: Any) -> None:
        """Copies a program's rows and their neighbours to a buffer, and zeros around the grid."""
        (reach, sideways), width = self.radius, self.grid[1]
        group = pl.program_id(2)
        inner = slice(sideways, sideways + width)
        for columns in (slice(0, sideways), slice(sideways + width, None)):
            buffer[:, columns] = jnp.zeros_like(buffer[:, columns])
        buffer[reach : reach + self.rows, inner] = here[...].astype(jnp.float32)
        is_inside = (group > 0, group < pl.num_programs(2) - 1)
        places = (slice(0, reach), slice(reach + self.rows, None))
        for rows, ref, exists in zip(places, (before, behind), is_inside, strict=True):
            buffer[rows, inner] = jnp.where(exists, ref[...].astype(jnp.float32), 0.0)

    @property
    def columns(self) -> int:
        """Patches side by side that are worked on together, so that they share neighbours."""
        return next(columns for columns in (4, 3, 2, 1) if self.grid[1] % columns == 0)

    def for_each_patch(
        self, buffers: Sequence[Any], function: Callable[[_Patch, list[list[jax.Array]]], None]
    ) -> None:
        """Calls a function with each of a program's patches and its neighbours in some buffers.

        Of each buffer these are arrays [channels, lanes] at each offset; zeros are outside of the
        grid.
        """
        (reach, sideways), per_row = self.radius, self.grid[1] // self.columns
        first_row = pl.program_id(2) * self.rows

        def call(y: jax.Array, group: jax.Array) -> None:
            first = group * self.columns
            around = [
                {
                    (dy, x): buffer[reach + y + dy, sideways + first + x]
                    for dy in range(-reach, reach + 1)
                    for x in range(-sideways, self.columns + sideways)
                }
                for buffer in buffers
            ]
            for x in range(self.columns):
                neighbours = [[each[dy, x + dx] for dy, dx in self.offsets] for each in around]
                function(_Patch(y, first + x, first_row + y), neighbours)

        def call_row(y: jax.Array, _: None) -> None:
            jax.lax.fori_loop(0, per_row, lambda group, _: call(y, group), None)

        jax.lax.fori_loop(0, self.rows, call_row, None)

    def are_inside(self, patch: _Patch) -> list[Any]:
        """Returns whether the neighbour of a patch at each offset is on the grid."""
        (height, width), (_, x, y) = self.grid, patch
        return [
            (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
            for dy, dx in self.offsets
        ]

    def softmax(self, q: jax.Array, keys: Sequence[jax.Array], patch: _Patch) -> _Softmax:
        """Returns the weights of a patch's row for its query [d, lanes] and its neighbours' keys.

        What is outside of the grid has the key 0, and so the score 0.
        """
        scores = [_channel_sum(q * key) for key in keys]
        if self.kind == "hard":
            inside = self.are_inside(patch)
            scores = [jnp.where(i, s, -jnp.inf) for i, s in zip(inside, scores, strict=True)]
        largest = functools.reduce(jnp.maximum, scores)
        far = jnp.zeros_like(largest)
        if self.kind == "soft":
            largest = jnp.maximum(largest, 0.0)
            far = jnp.exp(-largest)
        # What is outside of the grid weighs `far`, and nothing beyond it.
        excess = [jnp.exp(score - largest) - far for score in scores]
        total = far * (self.grid[0] * self.grid[1])
        return _Softmax(excess, far, 1 / functools.reduce(jnp.add, excess, total))


class _Patch(NamedTuple):
    """Place of a patch: its row in a program, its column, and its row in the grid."""

    y: jax.Array
    x: jax.Array
    row: jax.Array


class _Softmax(NamedTuple):
    """Weights of a row before they are multiplied by `share`, [1, lanes] each.

    Attributes:
      excess: weight of the neighbour at each offset beyond `far`.
      far: weight of any patch beside; 0 if the mask is hard.
      share: 1 / sum of the weights of all patches.
    """

    excess: list[jax.Array]
    far: jax.Array
    share: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attention(qkv: jax.Array, blocks: _Blocks, interpret: bool) -> jax.Array:
    """Computes [H, h, w, d, B] of [3, H, h, w, d, B]."""
    d = blocks.head_dim
    (queries, *_), keys, values = (blocks.specs(d, part) for part in range(3))
    return pl.pallas_call(
        functools.partial(_forward_kernel, blocks),
        grid=blocks.programs(qkv),
        in_specs=[queries, *keys, *values, _sum_spec(blocks)],
        out_specs=blocks.specs(d)[0],
        out_shape=jax.ShapeDtypeStruct(qkv.shape[1:], qkv.dtype),
        scratch_shapes=[blocks.padded(d)] * 2,
        compiler_params=_params(pltpu.PARALLEL),
        cost_estimate=_cost(blocks, qkv, products=2, arrays=4),
        name="fused_local_attention",
        interpret=interpret,
    )(qkv, *[qkv] * 3, *[qkv] * 3, _sum_of_values(qkv))


def _forward(qkv: jax.Array, blocks: _Blocks, interpret: bool) -> tuple[jax.Array, jax.Array]:
    return _attention(qkv, blocks, interpret), qkv


def _backward(
    blocks: _Blocks, interpret: bool, qkv: jax.Array, grad: jax.Array
) -> tuple[jax.Array]:
    d, count = blocks.head_dim, len(blocks.offsets)
    (queries, *_), keys, values = (blocks.specs(d, part) for part in range(3))
    here, *_ = blocks.specs(d)
    weights = jax.ShapeDtypeStruct((*grad.shape[:3], count, grad.shape[-1]), jnp.float32)
    everywhere = _sum_of_values(qkv)
    dq, dscores, excess, from_far = pl.pallas_call(
        functools.partial(_query_gradient_kernel, blocks),
        grid=blocks.programs(qkv),
        in_specs=[queries, *keys, *values, _sum_spec(blocks), here],
        out_specs=[here, *[blocks.specs(count)[0]] * 2, _sum_spec(blocks)],
        out_shape=[jax.ShapeDtypeStruct(grad.shape, qkv.dtype), weights, weights, everywhere],
        scratch_shapes=[blocks.padded(d)] * 2,
        compiler_params=_params(pltpu.ARBITRARY),  # since all rows add to one sum
        cost_estimate=_cost(blocks, qkv, products=3, arrays=6),
        name="fused_local_attention_dq",
        interpret=interpret,
    )(qkv, *[qkv] * 3, *[qkv] * 3, everywhere, grad)
    dk, dv = pl.pallas_call(
        functools.partial(_neighbour_gradient_kernel, blocks),
        grid=blocks.programs(qkv),
        in_specs=[
            *blocks.specs(d, 0),
            *blocks.specs(d),
            *blocks.specs(count),
            *blocks.specs(count),
            _sum_spec(blocks),
        ],
        out_specs=[here] * 2,
        out_shape=[jax.ShapeDtypeStruct(grad.shape, qkv.dtype)] * 2,
        scratch_shapes=[*[blocks.padded(d)] * 2, *[blocks.padded(count)] * 2],
        compiler_params=_params(pltpu.PARALLEL),
        cost_estimate=_cost(blocks, qkv, products=2, arrays=5),
        name="fused_local_attention_dkv",
        interpret=interpret,
    )(*[qkv] * 3, *[grad] * 3, *[dscores] * 3, *[excess] * 3, from_far)
    return (jnp.stack([dq, dk, dv]),)


_attention.defvjp(_forward, _backward)


def _forward_kernel(blocks: _Blocks, q_ref: Any, *refs: Any) -> None:
    *around, everywhere_ref, out_ref, keys_ref, values_ref = refs
    blocks.fill(keys_ref, *around[:3])
    blocks.fill(values_ref, *around[3:])
    everywhere, scale = everywhere_ref[...], blocks.head_dim**-0.5

    def attend(patch: _Patch, neighbours: list[list[jax.Array]]) -> None:
        keys, values = neighbours
        q = q_ref[patch.y, patch.x].astype(jnp.float32) * scale
        excess, far, share = blocks.softmax(q, keys, patch)
        out = far * everywhere
        for weight, value in zip(excess, values, strict=True):
            out += weight * value
        out_ref[patch.y, patch.x] = (out * share).astype(out_ref.dtype)

    blocks.for_each_patch((keys_ref, values_ref), attend)


def _query_gradient_kernel(blocks: _Blocks, q_ref: Any, *refs: Any) -> None:
    """Gradients of queries, and of the scores and the weights of their neighbours."""
    *around, everywhere_ref, grad_ref = refs[:8]
    dq_ref, dscores_ref, weights_ref, from_far_ref, keys_ref, values_ref = refs[8:]
    blocks.fill(keys_ref, *around[:3])
    blocks.fill(values_ref, *around[3:])
    everywhere, scale = everywhere_ref[...], blocks.head_dim**-0.5

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        from_far_ref[...] = jnp.zeros_like(from_far_ref)

    def differentiate(patch: _Patch, neighbours: list[list[jax.Array]]) -> None:
        keys, values = neighbours
        q = q_ref[patch.y, patch.x].astype(jnp.float32) * scale
        grad = grad_ref[patch.y, patch.x].astype(jnp.float32)
        excess, far, share = blocks.softmax(q, keys, patch)
        excess, far = [weight * share for weight in excess], far * share
        # Of each weight, and their mean over all patches.
        dweights = [_channel_sum(grad * value) for value in values]
        mean = far * _channel_sum(grad * everywhere)
        for weight, dweight in zip(excess, dweights, strict=True):
            mean += weight * dweight
        dq = jnp.zeros_like(q)
        for index, (weight, dweight, key) in enumerate(zip(excess, dweights, keys, strict=True)):
            row = slice(index, index + 1)
            dscore = (weight + far) * (dweight - mean) * scale
            dq += dscore * key  # 0 outside of the grid
            dscores_ref[patch.y, patch.x, row] = dscore
            weights_ref[patch.y, patch.x, row] = weight
        dq_ref[patch.y, patch.x] = dq.astype(dq_ref.dtype)
        from_far_ref[...] += far * grad

    blocks.for_each_patch((keys_ref, values_ref), differentiate)


def _neighbour_gradient_kernel(blocks: _Blocks, *refs: Any) -> None:
    """Gradients of keys and values, from those of the scores and weights of their neighbours."""
    from_far_ref, dk_ref, dv_ref, *buffers = refs[12:]
    for index, buffer in enumerate(buffers):
        blocks.fill(buffer, *refs[3 * index : 3 * index + 3])
    from_far = from_far_ref[...]

    def differentiate(patch: _Patch, neighbours: list[list[jax.Array]]) -> None:
        dk, dv = jnp.zeros_like(from_far), from_far
        # The neighbour at an offset has this patch at the opposite one: the last is the first's.
        for index, (query, grad, dscores, weights) in enumerate(zip(*neighbours, strict=True)):
            row = slice(-1 - index, dscores.shape[0] - index)
            dk += dscores[row] * query
            dv += weights[row] * grad
        dk_ref[patch.y, patch.x] = dk.astype(dk_ref.dtype)
        dv_ref[patch.y, patch.x] = dv.astype(dv_ref.dtype)

    blocks.for_each_patch(buffers, differentiate)


def _channel_sum(x: jax.Array) -> jax.Array:
    return x.sum(axis=0, keepdims=True)


def _sum_of_values(qkv: jax.Array) -> jax.Array:
    """Returns the sum over all patches of the values, [H, d, B] float32."""
    return qkv[2].astype(jnp.float32).sum((1, 2))


def _sum_spec(blocks: _Blocks) -> pl.BlockSpec:
    """Returns the block of a sum over all patches [H, d, B]."""
    return pl.BlockSpec(
        (None, blocks.head_dim, blocks.lanes), lambda head, images, group: (head, 0, images)
    )


def _params(rows: Any) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=(pltpu.PARALLEL, pltpu.PARALLEL, rows), vmem_limit_bytes=_VMEM
    )


def _cost(blocks: _Blocks, qkv: jax.Array, *, products: int, arrays: int) -> pl.CostEstimate:
    """Returns the cost of products with every neighbour, and of arrays read or written once."""
    part, offsets = qkv.size // 3, len(blocks.offsets)
    return pl.CostEstimate(
        flops=2 * products * offsets * part,
        transcendentals=(offsets + 1) * part // blocks.head_dim,
        bytes_accessed=arrays * part * qkv.dtype.itemsize,
    )
