"""Division of the fused kernel's work into programs: their blocks, their memory, their cost."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_LANES = 128  # columns of a tile
_ROWS = 16  # of a tile of bfloat16; two tiles of float32
_QUERY_BLOCK = 640  # largest number of queries whose scores are held at a time
_PROGRAM_TOKENS = 1600  # of all images of a program, about
_UNROLLED_TOKENS = 256  # up to so many, two images at a time: one computes while the other waits
# Bytes of VMEM. What a kernel reserves, XLA cannot use around it; chips have 128 MB or 64.
_VMEM_LIMIT, _LARGEST_VMEM_LIMIT = 40 * 2**20, 60 * 2**20


class Plan(NamedTuple):
    """Division of the work into programs, each of some images and a group of heads.

    Attributes:
      batch: number of images B.
      tokens: number of tokens N.
      dim: channels D of all heads.
      head_dim: width d of a head.
      heads: heads in a group.
      images: images in a program.
      itemsize: bytes of a number of the projection.
      num_factors: number of G and B that there are.
    """

    batch: int
    tokens: int
    dim: int
    head_dim: int
    heads: int
    images: int
    itemsize: int
    num_factors: int

    @classmethod
    def of(cls, qkv: jax.Array, num_heads: int, num_factors: int) -> Plan:
        """Plans the attention of a projection [B, N, 3D] with a number of G and B."""
        batch, tokens, dim = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        most = max(_PROGRAM_TOKENS // tokens, 1)
        images = max(n for n in range(1, min(most, batch) + 1) if batch % n == 0)
        make = functools.partial(
            cls, batch, tokens, dim, dim // num_heads, images=images, num_factors=num_factors
        )
        # Few heads, whose columns are whole tiles as they lie; else all, padded together; else,
        # for G of many tokens, each by itself.
        aligned = [
            n for n in range(1, num_heads) if num_heads % n == 0 == n * dim // num_heads % _LANES
        ]
        plans = [make(heads=n, itemsize=qkv.dtype.itemsize) for n in (*aligned[:1], num_heads, 1)]
        return next((plan for plan in plans if plan.fits), plans[-1])

    @property
    def fits(self) -> bool:
        """Whether a chip's VMEM holds a program."""
        return self.vmem <= _LARGEST_VMEM_LIMIT

    @property
    def vmem(self) -> int:
        """Bytes of VMEM that the backward kernel needs, about."""
        row = -(-self.tokens // _LANES) * _LANES * 4
        tokens = self.images * self.tokens * self.width * self.itemsize
        factor = self.heads * self.tokens * row
        scores = min(self.tokens, _QUERY_BLOCK) * row
        # Blocks of tokens are there twice: the next are read, the last written meanwhile.
        return 13 * tokens + 3 * self.num_factors * factor + 6 * scores

    @property
    def groups(self) -> int:
        """Number of groups of heads; they are the outer loop, so that G is read once."""
        return self.dim // (self.heads * self.head_dim)

    @property
    def width(self) -> int:
        """Columns of a group, whole tiles; those beyond its heads are padding."""
        return -(-self.heads * self.head_dim // _LANES) * _LANES

    def params(self, axes: int) -> pltpu.CompilerParams:
        """Returns the compiler's parameters for a grid with a number of axes."""
        # In sequence, since all images add to one gradient of G.
        return pltpu.CompilerParams(
            dimension_semantics=(pltpu.ARBITRARY,) * axes,
            vmem_limit_bytes=max(self.vmem, _VMEM_LIMIT),
        )

    def cost(self, products: int, arrays: Sequence[Any]) -> pl.CostEstimate:
        """Returns the cost of products of N×N per head, and of reading or writing arrays once."""
        pairs = self.batch * self.tokens**2
        return pl.CostEstimate(
            flops=2 * products * pairs * self.dim,
            transcendentals=pairs * (self.dim // self.head_dim),
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays if x is not None),
        )

    def columns_spec(self, part: int) -> pl.BlockSpec:
        """Returns the block of a group's queries (part 0), keys (1) or values (2)."""
        return pl.BlockSpec(
            (self.images, self.tokens, self.width),
            lambda group, images, *_: (images, 0, part * self.groups + group),
        )

    def parts_spec(self) -> pl.BlockSpec:
        """Returns the block of a group's queries, keys or values, by the third axis of the grid."""
        return pl.BlockSpec(
            (self.images, self.tokens, self.width),
            lambda group, images, part: (images, 0, part * self.groups + group),
        )

    def factor_spec(self, factor: Any) -> pl.BlockSpec | None:
        """Returns the block of a group's G or B, or None if there is none."""
        if factor is None:
            return None
        return pl.BlockSpec(
            (self.heads, self.tokens, self.tokens),
            lambda group, *_: (group, 0, 0),
            # Read once for all images: a second buffer would hold the next group's.
            pipeline_mode=pl.Buffered(1),
        )

    def bias_spec(self, bias: Any) -> pl.BlockSpec | None:
        """Returns the block of a group's bias, as `pad_bias` returns it."""
        if bias is None:
            return None
        return pl.BlockSpec((1, 3, self.width), lambda group, *_: (group, 0, 0))

    def pad_bias(self, bias: jax.Array | None, dtype: jax.typing.DTypeLike) -> jax.Array | None:
        """Pads a projection's bias [3D], rounded to `dtype`, to [groups, 3, width] float32."""
        if bias is None:
            return None
        groups = bias.astype(dtype).astype(jnp.float32).reshape(3, self.groups, -1)
        padding = ((0, 0), (0, 0), (0, self.width - groups.shape[-1]))
        return jnp.pad(groups, padding).swapaxes(0, 1)

    def unpad_bias(self, bias: jax.Array) -> jax.Array:
        """Returns [3D] of [groups, 3, width]; inverse of `pad_bias`."""
        return bias[..., : self.heads * self.head_dim].swapaxes(0, 1).reshape(-1)

    def pad(self, x: jax.Array) -> jax.Array:
        """Pads the columns of each group, in [B, N, parts·D], to whole tiles."""
        columns = self.heads * self.head_dim
        if columns == self.width:
            return x
        groups = x.reshape(self.batch, self.tokens, -1, columns)
        padding = ((0, 0), (0, 0), (0, 0), (0, self.width - columns))
        return jnp.pad(groups, padding).reshape(self.batch, self.tokens, -1)

    def unpad(self, x: jax.Array) -> jax.Array:
        """Removes the padding of `pad`."""
        columns = self.heads * self.head_dim
        if columns == self.width:
            return x
        groups = x.reshape(self.batch, self.tokens, -1, self.width)
        return groups[..., :columns].reshape(self.batch, self.tokens, -1)

    def for_each_image(self, function: Callable[[jax.Array], None]) -> None:
        """Calls a function with the index of each image of a program."""
        unroll = 2 if self.tokens <= _UNROLLED_TOKENS else 1

        def call(image: jax.Array, _: None) -> None:
            function(image)

        jax.lax.fori_loop(0, self.images, call, None, unroll=min(unroll, self.images))

    def head_slices(self) -> Iterator[tuple[int, slice]]:
        """Yields each head of a group with its columns."""
        for head in range(self.heads):
            yield head, slice(head * self.head_dim, (head + 1) * self.head_dim)

    def query_slices(self) -> Iterator[slice]:
        """Yields blocks of queries, about equal and beginning at whole tiles."""
        count = -(-self.tokens // _QUERY_BLOCK)
        size = -(-self.tokens // (count * _ROWS)) * _ROWS
        for start in range(0, self.tokens, size):
            yield slice(start, min(start + size, self.tokens))
