"""Masked heads of MaiT at linear cost as Pallas programs for TPUs, with their gradients.

The mathematics are those of `local.py`, which reads more easily. Images lie along the lanes and
channels along the sublanes, as XLA lays out a pyramid's large grids, so that the neighbour at an
offset is a matter of addresses. A program holds one head of some rows of patches, and of keys and
values the rows around them: HBM sees each array about once, where XLA's fusions of the same read
keys and values for every neighbour.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from spvit_jax.kernels import CONTEXT
from spvit_jax.kernels.local import Grid, Radius
from spvit_jax.kernels.local_plan import LANES, LocalPlan, Patch

DTYPES = ("float32", "bfloat16")

_ROWS = 16  # of a tile of bfloat16; two tiles of float32


def supports(grid: Grid, radius: Radius, head_dim: int, dtype: jax.typing.DTypeLike) -> bool:
    """Returns whether the kernel knows heads of a width on a grid, in a dtype."""
    if jnp.dtype(dtype).name not in DTYPES or head_dim % _ROWS or min(radius) < 1:
        return False
    return LocalPlan(grid, radius, "soft", head_dim, LANES, jnp.dtype(dtype).itemsize).rows > 0


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
    lanes = min(batch, LANES)
    plan = LocalPlan(grid, radius, kind, head_dim, lanes, qkv.dtype.itemsize)
    laid_out = qkv.transpose(1, 2, 4, 3, 0).reshape(3, num_heads, *grid, head_dim, batch)
    out = _attention(laid_out, plan, interpret)
    out = out.reshape(num_heads, -1, head_dim, batch).transpose(3, 0, 2, 1)
    return checkpoint_name(out, CONTEXT)


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
def _attention(qkv: jax.Array, plan: LocalPlan, interpret: bool) -> jax.Array:
    """Computes [H, h, w, d, B] of [3, H, h, w, d, B]."""
    d = plan.head_dim
    (queries, *_), keys, values = (plan.specs(d, part) for part in range(3))
    return pl.pallas_call(
        functools.partial(_forward_kernel, plan),
        grid=plan.programs(qkv),
        in_specs=[queries, *keys, *values, plan.sum_spec()],
        out_specs=plan.specs(d)[0],
        out_shape=jax.ShapeDtypeStruct(qkv.shape[1:], qkv.dtype),
        scratch_shapes=[plan.padded(d)] * 2,
        compiler_params=plan.params(pltpu.PARALLEL),
        cost_estimate=plan.cost(qkv, products=2, arrays=4),
        name="fused_local_attention",
        interpret=interpret,
    )(qkv, *[qkv] * 3, *[qkv] * 3, _sum_of_values(qkv))


def _forward(qkv: jax.Array, plan: LocalPlan, interpret: bool) -> tuple[jax.Array, jax.Array]:
    return _attention(qkv, plan, interpret), qkv


def _backward(
    plan: LocalPlan, interpret: bool, qkv: jax.Array, grad: jax.Array
) -> tuple[jax.Array]:
    d, count = plan.head_dim, len(plan.offsets)
    (queries, *_), keys, values = (plan.specs(d, part) for part in range(3))
    here, *_ = plan.specs(d)
    weights = jax.ShapeDtypeStruct((*grad.shape[:3], count, grad.shape[-1]), jnp.float32)
    everywhere = _sum_of_values(qkv)
    dq, dscores, excess, from_far = pl.pallas_call(
        functools.partial(_query_gradient_kernel, plan),
        grid=plan.programs(qkv),
        in_specs=[queries, *keys, *values, plan.sum_spec(), here],
        out_specs=[here, *[plan.specs(count)[0]] * 2, plan.sum_spec()],
        out_shape=[jax.ShapeDtypeStruct(grad.shape, qkv.dtype), weights, weights, everywhere],
        scratch_shapes=[plan.padded(d)] * 2,
        compiler_params=plan.params(pltpu.ARBITRARY),  # since all rows add to one sum
        cost_estimate=plan.cost(qkv, products=3, arrays=6),
        name="fused_local_attention_dq",
        interpret=interpret,
    )(qkv, *[qkv] * 3, *[qkv] * 3, everywhere, grad)
    dk, dv = pl.pallas_call(
        functools.partial(_neighbour_gradient_kernel, plan),
        grid=plan.programs(qkv),
        in_specs=[
            *plan.specs(d, 0),
            *plan.specs(d),
            *plan.specs(count),
            *plan.specs(count),
            plan.sum_spec(),
        ],
        out_specs=[here] * 2,
        out_shape=[jax.ShapeDtypeStruct(grad.shape, qkv.dtype)] * 2,
        scratch_shapes=[*[plan.padded(d)] * 2, *[plan.padded(count)] * 2],
        compiler_params=plan.params(pltpu.PARALLEL),
        cost_estimate=plan.cost(qkv, products=2, arrays=5),
        name="fused_local_attention_dkv",
        interpret=interpret,
    )(*[qkv] * 3, *[grad] * 3, *[dscores] * 3, *[excess] * 3, from_far)
    return (jnp.stack([dq, dk, dv]),)


_attention.defvjp(_forward, _backward)


def _forward_kernel(plan: LocalPlan, q_ref: Any, *refs: Any) -> None:
    *around, everywhere_ref, out_ref, keys_ref, values_ref = refs
    plan.fill(keys_ref, *around[:3])
    plan.fill(values_ref, *around[3:])
    everywhere, scale = everywhere_ref[...], plan.head_dim**-0.5

    def attend(patch: Patch, neighbours: list[list[jax.Array]]) -> None:
        keys, values = neighbours
        q = q_ref[patch.y, patch.x].astype(jnp.float32) * scale
        excess, far, share = _softmax(plan, q, keys, patch)
        out = far * everywhere
        for weight, value in zip(excess, values, strict=True):
            out += weight * value
        out_ref[patch.y, patch.x] = (out * share).astype(out_ref.dtype)

    plan.for_each_patch((keys_ref, values_ref), attend)


def _query_gradient_kernel(plan: LocalPlan, q_ref: Any, *refs: Any) -> None:
    """Gradients of queries, and of the scores and the weights of their neighbours."""
    *around, everywhere_ref, grad_ref = refs[:8]
    dq_ref, dscores_ref, weights_ref, from_far_ref, keys_ref, values_ref = refs[8:]
    plan.fill(keys_ref, *around[:3])
    plan.fill(values_ref, *around[3:])
    everywhere, scale = everywhere_ref[...], plan.head_dim**-0.5

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        from_far_ref[...] = jnp.zeros_like(from_far_ref)

    def differentiate(patch: Patch, neighbours: list[list[jax.Array]]) -> None:
        keys, values = neighbours
        q = q_ref[patch.y, patch.x].astype(jnp.float32) * scale
        grad = grad_ref[patch.y, patch.x].astype(jnp.float32)
        excess, far, share = _softmax(plan, q, keys, patch)
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

    plan.for_each_patch((keys_ref, values_ref), differentiate)


def _neighbour_gradient_kernel(plan: LocalPlan, *refs: Any) -> None:
    """Gradients of keys and values, from those of the scores and weights of their neighbours."""
    from_far_ref, dk_ref, dv_ref, *buffers = refs[12:]
    for index, buffer in enumerate(buffers):
        plan.fill(buffer, *refs[3 * index : 3 * index + 3])
    from_far = from_far_ref[...]

    def differentiate(patch: Patch, neighbours: list[list[jax.Array]]) -> None:
        dk, dv = jnp.zeros_like(from_far), from_far
        # The neighbour at an offset has this patch at the opposite one: the last is the first's.
        for index, (query, grad, dscores, weights) in enumerate(zip(*neighbours, strict=True)):
            row = slice(-1 - index, dscores.shape[0] - index)
            dk += dscores[row] * query
            dv += weights[row] * grad
        dk_ref[patch.y, patch.x] = dk.astype(dk_ref.dtype)
        dv_ref[patch.y, patch.x] = dv.astype(dv_ref.dtype)

    plan.for_each_patch(buffers, differentiate)


def _softmax(plan: LocalPlan, q: jax.Array, keys: Sequence[jax.Array], patch: Patch) -> _Softmax:
    """Returns the weights of a patch's row for its query [d, lanes] and its neighbours' keys.

    What is outside of the grid has the key 0, and so the score 0.
    """
    scores = [_channel_sum(q * key) for key in keys]
    if plan.kind == "hard":
        inside = plan.are_inside(patch)
        scores = [jnp.where(i, s, -jnp.inf) for i, s in zip(inside, scores, strict=True)]
    largest = functools.reduce(jnp.maximum, scores)
    far = jnp.zeros_like(largest)
    if plan.kind == "soft":
        largest = jnp.maximum(largest, 0.0)
        far = jnp.exp(-largest)
    # What is outside of the grid weighs `far`, and nothing beyond it.
    excess = [jnp.exp(score - largest) - far for score in scores]
    total = far * (plan.grid[0] * plan.grid[1])
    return _Softmax(excess, far, 1 / functools.reduce(jnp.add, excess, total))


def _channel_sum(x: jax.Array) -> jax.Array:
    return x.sum(axis=0, keepdims=True)


def _sum_of_values(qkv: jax.Array) -> jax.Array:
    """Returns the sum over all patches of the values, [H, d, B] float32."""
    return qkv[2].astype(jnp.float32).sum((1, 2))
