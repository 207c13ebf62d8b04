"""Runs consecutive blocks of the same kind as one `scan` over their stacked parameters.

A compiler then sees each kind once, whatever the depth. A block's kind is its graph definition:
everything but its parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from spvit_jax.kernels import CONTEXT
from spvit_jax.models.block import Block

MAX_PERIOD = 2  # Swin's blocks alternate between windows that are shifted and not shifted

# Residuals that a loop saves of each block for the backward pass: the linear layers' results, and
# those of attention's kernels. By default a scan writes all of them to memory; a compiler that sees
# all blocks at once does not.
SAVED = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(CONTEXT),
)


class Segment(NamedTuple):
    """Consecutive layers of a model: `period` kinds of blocks, repeated `repeats` times.

    Attributes:
      start: first layer.
      period: number of layers until the kinds repeat.
      repeats: number of periods.
    """

    start: int
    period: int = 1
    repeats: int = 1

    @property
    def layers(self) -> range:
        """Layers of the segment, in order."""
        return range(self.start, self.start + self.period * self.repeats)


def find_segments(kinds: Sequence[Hashable], starts: Collection[int] = ()) -> list[Segment]:
    """Divides a model's layers into segments, each as long as possible, or of a single layer.

    Args:
      kinds: kind of each layer.
      starts: layers before which the tokens are changed; each starts a segment.

    Returns:
      The segments, in order; together they are all layers.
    """
    segments: list[Segment] = []
    start = 0
    while start < len(kinds):
        end = min((layer for layer in starts if layer > start), default=len(kinds))
        options = [
            _segment_at(start, kinds[start:end], period) for period in range(1, MAX_PERIOD + 1)
        ]
        segments.append(max(options, key=lambda segment: len(segment.layers)))
        start = segments[-1].layers.stop
    return segments


def _segment_at(start: int, kinds: Sequence[Hashable], period: int) -> Segment:
    """Returns the longest segment of a period with which `kinds` begins, or a single layer."""
    periods = [kinds[i : i + period] for i in range(0, len(kinds), period)]
    repeats = next((i for i, each in enumerate(periods) if each != periods[0]), len(periods))
    return Segment(start, period, repeats) if repeats > 1 else Segment(start)


def apply_blocks(
    blocks: Sequence[Block],
    call: Callable[..., jax.Array],
    x: jax.Array,
    *values: Sequence[Any],
    period: int,
    remat: bool,
) -> jax.Array:
    """Applies the blocks of a segment one after the other to an array.

    Args:
      blocks: blocks of the segment, in order.
      call: (block, x, value of each of `values`) → x of the same shape and dtype.
      x: input of the first block.
      *values: further arguments of `call`, each with one value per block.
      period: number of layers until the kinds of blocks repeat.
      remat: whether each block is recomputed in the backward pass.

    Returns:
      The output of the last block.
    """
    graphdefs = [nnx.graphdef(block) for block in blocks[:period]]
    columns = [[nnx.state(block) for block in blocks], *map(list, values)]
    periods = [
        [column[i : i + period] for column in columns] for i in range(0, len(blocks), period)
    ]
    is_loop = len(periods) > 1

    def apply_block(graphdef: Any, state: Any, x: jax.Array, *values: Any) -> jax.Array:
        return call(nnx.merge(graphdef, state), x, *values)

    if remat or is_loop:
        policy = None if remat else SAVED
        apply_block = jax.checkpoint(
            apply_block, static_argnums=0, prevent_cse=not is_loop, policy=policy
        )

    def apply_period(x: jax.Array, columns: Any) -> tuple[jax.Array, None]:
        for graphdef, state, *values in zip(graphdefs, *columns, strict=True):
            x = apply_block(graphdef, state, _split_by_example(x), *values)
        return x, None

    if not is_loop:
        return apply_period(x, periods[0])[0]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *periods)
    return jax.lax.scan(apply_period, x, stacked)[0]


def _split_by_example(x: jax.Array) -> jax.Array:
    """Keeps a batch split by examples over all devices of the mesh in context, if there is one.

    In a loop over parameters that are split, as in FSDP, XLA would otherwise split channels too,
    and communicate activations in every layer.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(mesh.axis_names))
