"""Masked heads of MaiT at a cost linear in the number of tokens (arXiv 2207.03006).

With a soft mask the softmax of a patch runs over all tokens, but the scores outside its
neighbourhood are 0 and their weights equal, so that one sum over all tokens and a correction
inside the neighbourhood give what the N×N matrix does. Neighbours are slices of padded arrays,
never a gather. Channels come before tokens here, [H, d, B, h, w], so that everything is elementwise
over rows of patches.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from spvit_jax.kernels import CONTEXT

Grid = tuple[int, int]  # (h, w): rows and columns of patches
Radius = tuple[int, int]  # (rows, columns) of a neighbourhood around its centre


@jax.named_scope("attention")
def local_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    grid: Grid,
    num_prefix: int = 0,
    *,
    radius: Radius = (1, 1),
    kind: str = "soft",
    gain: jax.Array | None = None,
) -> jax.Array:
    """Computes softmax(G ⊙ QKᵀ/√d + B) V of masked heads, without an N×N matrix.

    Between patches, with M the neighbourhood and g a gain by their offset, G is g·M and B is 0
    (soft), or G is g and B is 0 inside M and -inf outside (hard). In the rows and columns of prefix
    tokens G is 1 and B is 0.

    Args:
      q: queries [H, d, B, P+N], those of P prefix tokens first.
      k: keys [H, d, B, P+N].
      v: values [H, d, B, P+N].
      grid: rows and columns of patches, h·w = N.
      num_prefix: number P of prefix tokens.
      radius: (rows, columns) of the neighbourhood; (1, 2) is 3×5 patches.
      kind: "soft" or "hard".
      gain: g [H, 2·rows+1, 2·columns+1] at each offset (dy, dx) from query to key, no offset in the
        middle; None stands for 1.

    Returns:
      [H, d, B, P+N] in the dtype of `v`. Time and memory, the gradient's too, are linear in N.
    """
    if gain is not None:
        gain = gain.reshape(gain.shape[0], -1).T
    out = _patch_rows(_Shape(grid, num_prefix, radius, kind), q, k, v, gain)
    out = out.reshape(*out.shape[:3], -1)
    if num_prefix:
        out = jnp.concatenate([_prefix_rows(q[..., :num_prefix], k, v), out], axis=-1)
    return checkpoint_name(out, CONTEXT)


def _prefix_rows(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Computes plain attention of the prefix tokens' queries [H, d, B, P] over all tokens."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("hdbp,hdbm->hbpm", q, k, preferred_element_type=dtype)
    weights = jax.nn.softmax(scores * q.shape[1] ** -0.5, axis=-1)
    return jnp.einsum("hbpm,hdbm->hdbp", weights.astype(v.dtype), v)


class _Shape(NamedTuple):
    """Static arguments of `_patch_rows`, as in `local_attention`."""

    grid: Grid
    num_prefix: int
    radius: Radius
    kind: str

    def split(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Splits tokens [H, d, B, P+N] into prefix tokens [H, d, B, P] and patches [..., h, w]."""
        prefix, patches = x[..., : self.num_prefix], x[..., self.num_prefix :]
        return prefix, patches.reshape(*x.shape[:-1], *self.grid)

    def join(self, prefix: jax.Array, patches: jax.Array) -> jax.Array:
        """Returns the tokens [H, d, B, P+N] of `split`."""
        return jnp.concatenate([prefix, patches.reshape(*prefix.shape[:-1], -1)], axis=-1)


class _Softmax(NamedTuple):
    """Weights of the patches' rows before their division by `total`; each ends in [H, B, h, w].

    Attributes:
      near: weight of each neighbour [offsets, ...].
      prefix: weight of each prefix token [P, ...].
      far: weight of a patch outside of the neighbourhood [...]; 0 if the mask is hard.
      total: sum of the weights of all tokens [...].
    """

    near: jax.Array
    prefix: jax.Array
    far: jax.Array
    total: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _patch_rows(
    shape: _Shape, q: jax.Array, k: jax.Array, v: jax.Array, gain: jax.Array | None
) -> jax.Array:
    """Computes the patches' rows [H, d, B, h, w] of tokens [H, d, B, P+N], gain [offsets, H]."""
    return _forward(shape, q, k, v, gain)[0]


def _forward(
    shape: _Shape, q: jax.Array, k: jax.Array, v: jax.Array, gain: jax.Array | None
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    """Returns `_patch_rows` and what its gradient needs."""
    (_, queries), (prefix_keys, keys) = shape.split(q), shape.split(k)
    prefix_values, values = shape.split(v)
    scale = q.shape[1] ** -0.5
    scores = scale * neighbour_products(queries, keys, shape.radius)
    prefix_scores = scale * _prefix_products(queries, prefix_keys)

    weights = _softmax(shape, scores, prefix_scores, gain)
    far = weights.far
    # Every token at the weight `far`, and what neighbours and prefix tokens have beyond it. A
    # product with ones, as XLA on a CPU would fuse a sum with all that follows to a slow loop.
    everywhere = v.astype(far.dtype) @ jnp.ones(v.shape[-1], far.dtype)
    out = far[:, None] * everywhere[..., None, None]
    out += neighbour_sum(weights.near - far, values, shape.radius)
    out += jnp.einsum("phbyx,hdbp->hdbyx", weights.prefix - far, prefix_values.astype(far.dtype))
    out = (out / weights.total[:, None]).astype(v.dtype)
    return out, (q, k, v, gain, everywhere, scores, prefix_scores)


def _backward(
    shape: _Shape, saved: tuple[Any, ...], grad: jax.Array
) -> tuple[jax.Array | None, ...]:
    """Returns the gradients of `_patch_rows` with respect to q, k, v and the gain.

    A score outside of the neighbourhood has none: it is 0 whatever q and k are.
    """
    q, k, v, gain, everywhere, scores, prefix_scores = saved
    (_, queries), (prefix_keys, keys) = shape.split(q), shape.split(k)
    prefix_values, values = shape.split(v)
    scale = q.shape[1] ** -0.5
    weights = _softmax(shape, scores, prefix_scores, gain)
    near, prefix, far = (each / weights.total for each in weights[:3])

    # Of each weight, and their mean over all tokens, by the same two sums as in `_forward`.
    d_near = neighbour_products(grad, values, shape.radius)
    d_prefix = _prefix_products(grad, prefix_values)
    d_all = neighbour_products(
        grad, jnp.broadcast_to(everywhere[..., None, None], grad.shape), (0, 0)
    )
    mean = far * d_all[0] + ((near - far) * d_near).sum(0) + ((prefix - far) * d_prefix).sum(0)

    d_scores = near * (d_near - mean)
    d_prefix = scale * prefix * (d_prefix - mean)
    d_gain = None
    if gain is not None:
        d_gain = (d_scores * scores).sum((2, 3, 4)).astype(gain.dtype)
        d_scores = d_scores * gain[..., None, None, None]
    d_scores = scale * d_scores

    d_queries = neighbour_sum(d_scores, keys, shape.radius)
    d_queries += jnp.einsum("phbyx,hdbp->hdbyx", d_prefix, prefix_keys.astype(d_prefix.dtype))
    d_keys = neighbour_sum(_reflect(d_scores, shape.radius), queries, shape.radius)
    d_values = neighbour_sum(_reflect(near - far, shape.radius), grad, shape.radius)
    from_far = (grad * far[:, None]).reshape(*v.shape[:3], -1)
    d_values += (from_far @ jnp.ones(from_far.shape[-1], far.dtype))[..., None, None]
    d_prefix_keys, d_prefix_values = (
        jnp.einsum("phbyx,hdbyx->hdbp", weight, x.astype(weight.dtype))
        for weight, x in ((d_prefix, queries), (prefix, grad))
    )
    return (
        shape.join(jnp.zeros_like(d_prefix_keys), d_queries).astype(q.dtype),
        shape.join(d_prefix_keys, d_keys).astype(k.dtype),
        shape.join(d_prefix_values, d_values).astype(v.dtype),
        d_gain,
    )


_patch_rows.defvjp(_forward, _backward)


def _softmax(
    shape: _Shape, scores: jax.Array, prefix_scores: jax.Array, gain: jax.Array | None
) -> _Softmax:
    """Returns the weights that belong to scores [offsets, ...] times their gain [offsets, H]."""
    if gain is not None:
        scores = scores * gain[..., None, None, None]
    if shape.kind == "hard":
        scores = scores + _outside_bias(shape.grid, shape.radius).astype(scores.dtype)
    largest = functools.reduce(jnp.maximum, [*scores, *prefix_scores])
    far = jnp.zeros_like(largest)
    if shape.kind == "soft":
        largest = jnp.maximum(largest, 0)
        far = jnp.exp(-largest)
    near, prefix = jnp.exp(scores - largest), jnp.exp(prefix_scores - largest)
    # Zeros that surround the grid score 0: they weigh nothing beyond `far`.
    tokens = shape.num_prefix + shape.grid[0] * shape.grid[1]
    total = functools.reduce(operator.add, [*(near - far), *(prefix - far)], far * tokens)
    return _Softmax(near, prefix, far, total)


def _prefix_products(x: jax.Array, prefix: jax.Array) -> jax.Array:
    """Returns Σ_d of patches [H, d, B, h, w] times prefix tokens [H, d, B, P]: [P, H, B, h, w]."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("hdbyx,hdbp->phbyx", x, prefix, preferred_element_type=dtype)


@functools.partial(jax.jit, static_argnums=2)
def neighbour_products(x: jax.Array, y: jax.Array, radius: Radius) -> jax.Array:
    """Returns the product of each patch with its neighbours, Σ_d x[…, i] · y[…, i + offset].

    Args:
      x: [H, d, B, h, w].
      y: [H, d, B, h, w]; zeros surround it.
      radius: (rows, columns) of the neighbourhood.

    Returns:
      [offsets, H, B, h, w], summed in float32 at least.
    """
    return jax.lax.platform_dependent(
        x,
        _pad(y, radius),
        cpu=functools.partial(_products_by_channel, radius=radius),
        default=functools.partial(_products_by_offset, radius=radius),
    )


def _products_by_offset(x: jax.Array, padded: jax.Array, radius: Radius) -> jax.Array:
    """Computes `neighbour_products` as one sum over channels for each offset."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    x, padded = x.astype(dtype), padded.astype(dtype)
    return jnp.stack([(x * y).sum(1) for y in _neighbours(padded, radius)])


def _products_by_channel(x: jax.Array, padded: jax.Array, radius: Radius) -> jax.Array:
    """Computes `neighbour_products` one channel after the other.

    On a CPU XLA vectorizes what is elementwise and not a sum inside of a fusion: a layer of 56×56
    patches takes a fiftieth of the time of `_products_by_offset`.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)

    def add_channel(channel: jax.Array, sums: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        a, b = (
            jax.lax.dynamic_index_in_dim(array, channel, 1, keepdims=False).astype(dtype)
            for array in (x, padded)
        )
        return tuple(total + a * y for total, y in zip(sums, _neighbours(b, radius), strict=True))

    zeros = jnp.zeros((x.shape[0], *x.shape[2:]), dtype)
    sums = (zeros,) * len(neighbour_offsets(radius))
    return jnp.stack(jax.lax.fori_loop(0, x.shape[1], add_channel, sums, unroll=4))


@functools.partial(jax.jit, static_argnums=2)
def neighbour_sum(weights: jax.Array, y: jax.Array, radius: Radius) -> jax.Array:
    """Returns the weighted sum of neighbours, Σ_offset weights[offset, …, i] · y[…, i + offset].

    Args:
      weights: [offsets, H, B, h, w].
      y: [H, d, B, h, w]; zeros surround it.
      radius: (rows, columns) of the neighbourhood.

    Returns:
      [H, d, B, h, w] in the dtype of the weights.
    """
    neighbours = _neighbours(_pad(y, radius).astype(weights.dtype), radius)
    terms = [weight[:, None] * x for weight, x in zip(weights, neighbours, strict=True)]
    return functools.reduce(operator.add, terms)


def _reflect(weights: jax.Array, radius: Radius) -> jax.Array:
    """Exchanges the ends of each pair: at (offset, i) what was at (-offset, i + offset)."""
    padded = _pad(weights[::-1], radius)
    return jnp.stack([_neighbours(each, radius)[o] for o, each in enumerate(padded)])


def neighbour_offsets(radius: Radius) -> list[tuple[int, int]]:
    """Returns the offsets (dy, dx) of a neighbourhood, row by row."""
    rows, columns = radius
    return [(dy, dx) for dy in range(-rows, rows + 1) for dx in range(-columns, columns + 1)]


def _pad(x: jax.Array, radius: Radius) -> jax.Array:
    """Surrounds a grid [..., h, w] with as many zeros as a neighbourhood reaches beyond it."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(r, r) for r in radius])


def _neighbours(padded: Any, radius: Radius) -> list[Any]:
    """Returns what lies at each offset from the patches, [..., h, w] each, of a padded grid."""
    (rows, columns), (height, width) = radius, padded.shape[-2:]
    h, w = height - 2 * rows, width - 2 * columns
    return [
        padded[..., rows + dy : rows + dy + h, columns + dx : columns + dx + w]
        for dy, dx in neighbour_offsets(radius)
    ]


def reaches_neighbour(grid: Grid, radius: Radius) -> np.ndarray:
    """Returns whether the neighbour of each patch at each offset is on the grid [offsets, h, w]."""
    inside = np.pad(np.ones(grid, bool), [(r, r) for r in radius])
    return np.stack(_neighbours(inside, radius))


def _outside_bias(grid: Grid, radius: Radius) -> np.ndarray:
    """Returns -inf where a neighbour lies outside of the grid, else 0: [offsets, 1, 1, h, w]."""
    return np.where(reaches_neighbour(grid, radius), 0, -np.inf)[:, None, None]
