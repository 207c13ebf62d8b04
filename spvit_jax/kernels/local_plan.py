"""Division of the local kernel's work into programs: their rows, their blocks, their neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from spvit_jax.kernels.local import Grid, Radius, neighbour_offsets

LANES = 128  # images of a program, at most
_VMEM = 60 * 2**20  # bytes that a program may use; chips have 128 MB or 64
_BLOCKS = 44 * 2**20  # of these for blocks and buffers; the compiler needs some for itself


class Patch(NamedTuple):
    """Place of a patch: its row in a program, its column, and its row in the grid."""

    y: jax.Array
    x: jax.Array
    row: jax.Array


class LocalPlan(NamedTuple):
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
        row = self.head_dim * LANES * width
        weights = 2 * -(-len(self.offsets) // 8) * 8 * LANES * (width + 2 * sideways)
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

    def sum_spec(self) -> pl.BlockSpec:
        """Returns the block of a sum over all patches [H, d, B]."""
        return pl.BlockSpec(
            (None, self.head_dim, self.lanes), lambda head, images, group: (head, 0, images)
        )

    def params(self, rows: Any) -> pltpu.CompilerParams:
        """Returns the compiler's parameters, with the semantics of the grid's axis of rows."""
        return pltpu.CompilerParams(
            dimension_semantics=(pltpu.PARALLEL, pltpu.PARALLEL, rows), vmem_limit_bytes=_VMEM
        )

    def cost(self, qkv: jax.Array, *, products: int, arrays: int) -> pl.CostEstimate:
        """Returns the cost of products with every neighbour, and of arrays moved once."""
        part, offsets = qkv.size // 3, len(self.offsets)
        return pl.CostEstimate(
            flops=2 * products * offsets * part,
            transcendentals=(offsets + 1) * part // self.head_dim,
            bytes_accessed=arrays * part * qkv.dtype.itemsize,
        )

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
        self, buffers: Sequence[Any], function: Callable[[Patch, list[list[jax.Array]]], None]
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
                function(Patch(y, first + x, first_row + y), neighbours)

        def call_row(y: jax.Array, _: None) -> None:
            jax.lax.fori_loop(0, per_row, lambda group, _: call(y, group), None)

        jax.lax.fori_loop(0, self.rows, call_row, None)

    def are_inside(self, patch: Patch) -> list[Any]:
        """Returns whether the neighbour of a patch at each offset is on the grid."""
        (height, width), (_, x, y) = self.grid, patch
        return [
            (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
            for dy, dx in self.offsets
        ]
