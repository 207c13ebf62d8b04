"""Runs the blocks of one kind that follow each other as one loop over their stacked parameters.

A compiler then sees each kind once, whatever the depth. A block's kind is its graph definition:
all that it is but for the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from spvit_jax.models.block import Block

MAX_PERIOD = 2  # Swin's blocks alternate between windows that are shifted and that are not

# What a loop keeps of each block for the backward pass: the linear layers' results. JAX would have
# it write everything out to memory; a compiler that sees all blocks at once does not.
LINEAR_LAYERS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


class Segment(NamedTuple):
    """Layers that follow each other: the same `period` kinds in turn, `repeats` times."""

    start: int
    period: int = 1
    repeats: int = 1

    @property
    def layers(self) -> range:
        """The layers, in order."""
        return range(self.start, self.start + self.period * self.repeats)


def find_segments(kinds: Sequence[Hashable], starts: Collection[int] = ()) -> list[Segment]:
    """Divides a model's layers into segments, each as long as can be; one may be a single layer.

    Args:
      kinds: of each layer.
      starts: layers before which something is done to the tokens; each starts a segment.

    Returns:
      The segments, in order; together they are all layers.
    """
    segments: list[Segment] = []
    start = 0
    while start < len(kinds):
        end = min((layer for layer in starts if layer > start), default=len(kinds))
        loops = [_loop_at(start, kinds[start:end], period) for period in range(1, MAX_PERIOD + 1)]
        segments.append(max(loops, key=lambda segment: len(segment.layers)))
        start = segments[-1].layers.stop
    return segments


def _loop_at(start: int, kinds: Sequence[Hashable], period: int) -> Segment:
    """Returns the longest loop of a period with which `kinds` begins, or one layer alone."""
    turns = [kinds[i : i + period] for i in range(0, len(kinds), period)]
    repeats = next((i for i, turn in enumerate(turns) if turn != turns[0]), len(turns))
    return Segment(start, period, repeats) if repeats > 1 else Segment(start)


def through(
    blocks: Sequence[Block],
    call: Callable[..., jax.Array],
    x: jax.Array,
    *values: Sequence[Any],
    period: int,
    remat: bool,
) -> jax.Array:
    """Takes x through the blocks of a segment.

    Args:
      blocks: of the segment, in order.
      call: (block, x, one of each of `values`) → x of the same shape and dtype.
      x: what enters the first.
      *values: what else `call` is given, one number for each block.
      period: of the segment.
      remat: whether all of each block is computed again in the backward pass.

    Returns:
      What leaves the last.
    """
    graphdefs = [nnx.graphdef(block) for block in blocks[:period]]
    columns = [[nnx.state(block) for block in blocks], *map(list, values)]
    turns = [[column[i : i + period] for column in columns] for i in range(0, len(blocks), period)]
    alone = len(turns) == 1

    def one(graphdef: Any, state: Any, x: jax.Array, *values: Any) -> jax.Array:
        return call(nnx.merge(graphdef, state), x, *values)

    if remat or not alone:
        policy = None if remat else LINEAR_LAYERS
        one = jax.checkpoint(one, static_argnums=0, prevent_cse=alone, policy=policy)

    def turn(x: jax.Array, columns: Any) -> tuple[jax.Array, None]:
        for graphdef, state, *values in zip(graphdefs, *columns, strict=True):
            x = one(graphdef, state, _split_by_example(x), *values)
        return x, None

    if alone:
        return turn(x, turns[0])[0]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *turns)
    return jax.lax.scan(turn, x, stacked)[0]


def _split_by_example(x: jax.Array) -> jax.Array:
    """Keeps a batch split by examples over all devices of the mesh in context, if there is one.

    In a loop over parameters that are split, as in FSDP, XLA would otherwise split channels too,
    and send activations around in every layer.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(mesh.axis_names))
