"""Fused attention, softmax(G ⊙ QKᵀ/√d + B) V, as one Pallas program for TPUs, with its gradients.

Scores stay on the chip: a program holds a few heads of a few images, and HBM sees the projection
[B, N, 3D] as it lies, the result [B, N, D], and G and B once. The backward pass computes the
scores again. The readable form of the equation is in `models/attention.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from spvit_jax.kernels import CONTEXT
from spvit_jax.kernels.plan import Plan

HEAD_DIMS = range(8, 129)  # widths of a head that the kernel knows
DTYPES = ("float32", "bfloat16")


def supports(head_dim: int, dtype: jax.typing.DTypeLike) -> bool:
    """Returns whether the kernel knows heads of a width, in a dtype."""
    return head_dim in HEAD_DIMS and jnp.dtype(dtype).name in DTYPES


def fused_attention(
    qkv: jax.Array,
    num_heads: int,
    gain: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    qkv_bias: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Computes self-attention with a gain and a bias, softmax(G ⊙ QKᵀ/√d + B) V.

    On a mesh it is to be called by `mesh.on_each_device`.

    Args:
      qkv: queries, keys and values [B, N, 3D], columns ordered [3, H, d]; float32 or bfloat16.
      num_heads: number of heads H.
      gain: G [H, N, N], float32 or bfloat16; None stands for 1.
      bias: B, as `gain`; None stands for 0. An entry of -inf removes a pair.
      qkv_bias: bias [3D] of the projection, to be added to `qkv` first; None for none. Its
        gradient, a sum over all tokens, costs XLA more than the kernel, which has them at hand.
      interpret: whether to run in Pallas' interpret mode, on any platform.

    Returns:
      [B, N, D] in the dtype of `qkv`.
    """
    return checkpoint_name(_attention(qkv, qkv_bias, gain, bias, num_heads, interpret), CONTEXT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(
    qkv: jax.Array,
    qkv_bias: jax.Array | None,
    gain: jax.Array | None,
    bias: jax.Array | None,
    num_heads: int,
    interpret: bool,
) -> jax.Array:
    plan = Plan.of(qkv, num_heads, sum(x is not None for x in (gain, bias)))
    columns, factor = plan.columns_spec, plan.factor_spec
    padded, shift = plan.pad(qkv), plan.pad_bias(qkv_bias, qkv.dtype)
    shape = (plan.batch, plan.tokens, plan.groups * plan.width)
    out = pl.pallas_call(
        functools.partial(_forward_kernel, plan),
        grid=(plan.groups, plan.batch // plan.images),
        in_specs=[
            *(columns(0), columns(1), columns(2)),
            *(plan.bias_spec(shift), factor(gain), factor(bias)),
        ],
        out_specs=columns(0),
        out_shape=jax.ShapeDtypeStruct(shape, qkv.dtype),
        compiler_params=plan.params(2),
        cost_estimate=plan.cost(2, (qkv, gain, bias, qkv[..., : plan.dim])),
        name="fused_attention",
        interpret=interpret,
    )(padded, padded, padded, shift, gain, bias)
    return plan.unpad(out)


def _forward(
    qkv: CustomVJPPrimal,
    qkv_bias: CustomVJPPrimal | None,
    gain: CustomVJPPrimal | None,
    bias: CustomVJPPrimal | None,
    num_heads: int,
    interpret: bool,
) -> tuple[jax.Array, Any]:
    values = [None if x is None else x.value for x in (qkv, qkv_bias, gain, bias)]
    out = _attention(*values, num_heads, interpret)
    # What is learned is known here and not in `_backward`; a tree without leaves tells it.
    learned = [() if x is not None and x.perturbed else None for x in (gain, bias)]
    return out, (*values, learned)


def _backward(
    num_heads: int, interpret: bool, residuals: Any, grad: jax.Array | SymbolicZero
) -> tuple[jax.Array | None, ...]:
    qkv, qkv_bias, gain, bias, learned = residuals
    if isinstance(grad, SymbolicZero):
        return None, None, None, None
    plan = Plan.of(qkv, num_heads, sum(x is not None for x in (gain, bias)))
    columns, factor = plan.columns_spec, plan.factor_spec
    padded, grad, shift = plan.pad(qkv), plan.pad(grad), plan.pad_bias(qkv_bias, qkv.dtype)
    dshift = None if shift is None else jax.ShapeDtypeStruct(shift.shape, jnp.float32)
    dgain, dbias = (
        None if is_learned is None else jax.ShapeDtypeStruct(x.shape, jnp.float32)
        for x, is_learned in zip((gain, bias), learned, strict=True)
    )
    dqkv, dshift, dgain, dbias = pl.pallas_call(
        functools.partial(_backward_kernel, plan),
        # The third axis writes the gradients of queries, keys and values, one after the other.
        grid=(plan.groups, plan.batch // plan.images, 3),
        in_specs=[
            *(columns(0), columns(1), columns(2)),
            *(plan.bias_spec(shift), factor(gain), factor(bias), columns(0)),
        ],
        out_specs=[plan.parts_spec(), plan.bias_spec(shift), factor(dgain), factor(dbias)],
        out_shape=[jax.ShapeDtypeStruct(padded.shape, qkv.dtype), dshift, dgain, dbias],
        scratch_shapes=[pltpu.VMEM((3, plan.images, plan.tokens, plan.width), qkv.dtype)],
        compiler_params=plan.params(3),
        cost_estimate=plan.cost(5, (qkv, qkv, grad, gain, bias, dgain, dbias)),
        name="fused_attention_backward",
        interpret=interpret,
    )(padded, padded, padded, shift, gain, bias, grad)
    return (
        plan.unpad(dqkv),
        None if dshift is None else plan.unpad_bias(dshift).astype(qkv_bias.dtype),
        None if dgain is None else dgain.astype(gain.dtype),
        None if dbias is None else dbias.astype(bias.dtype),
    )


_attention.defvjp(_forward, _backward, symbolic_zeros=True)


def _forward_kernel(
    plan: Plan,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    shift_ref: Any,
    gain_ref: Any,
    bias_ref: Any,
    out_ref: Any,
) -> None:
    def attend(image: jax.Array) -> None:
        for head, columns in plan.head_slices():
            k = _shifted(k_ref[image, :, columns], shift_ref, 1, columns)
            v = _shifted(v_ref[image, :, columns], shift_ref, 2, columns)
            for rows in plan.query_slices():
                q = _shifted(q_ref[image, rows, columns], shift_ref, 0, columns)
                products = _dot(q, k, (1, 1)) * plan.head_dim**-0.5
                scores = _apply(products, gain_ref, bias_ref, head, rows)
                weights, total = _exponentials(scores)
                out = _dot(weights.astype(v.dtype), v, (1, 0)) / total
                out_ref[image, rows, columns] = out.astype(out_ref.dtype)

    plan.for_each_image(attend)


def _backward_kernel(
    plan: Plan,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    shift_ref: Any,
    gain_ref: Any,
    bias_ref: Any,
    grad_ref: Any,
    out_ref: Any,
    dshift_ref: Any,
    dgain_ref: Any,
    dbias_ref: Any,
    parts_ref: Any,
) -> None:
    part, scale = pl.program_id(2), plan.head_dim**-0.5

    @pl.when((pl.program_id(1) == 0) & (part == 0))
    def _() -> None:
        for ref in (dshift_ref, dgain_ref, dbias_ref):
            if ref is not None:
                ref[...] = jnp.zeros_like(ref)

    def differentiate(image: jax.Array) -> None:
        for head, columns in plan.head_slices():
            k = _shifted(k_ref[image, :, columns], shift_ref, 1, columns)
            v = _shifted(v_ref[image, :, columns], shift_ref, 2, columns)
            dk, dv = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
            for rows in plan.query_slices():
                q = _shifted(q_ref[image, rows, columns], shift_ref, 0, columns)
                grad = grad_ref[image, rows, columns]
                products = _dot(q, k, (1, 1)) * scale
                weights, total = _exponentials(_apply(products, gain_ref, bias_ref, head, rows))
                weights = weights / total
                dweights = _dot(grad, v, (1, 1))
                delta = (weights * dweights).sum(axis=-1, keepdims=True)
                dscores = weights * (dweights - delta)
                if dbias_ref is not None:
                    dbias_ref[head, rows, :] += dscores
                if dgain_ref is not None:
                    dgain_ref[head, rows, :] += dscores * products
                if gain_ref is not None:
                    dscores = dscores * gain_ref[head, rows, :].astype(jnp.float32)
                dproducts = dscores.astype(q.dtype)
                dq = _dot(dproducts, k, (1, 0)) * scale
                parts_ref[0, image, rows, columns] = dq.astype(parts_ref.dtype)
                if dshift_ref is not None:
                    dshift_ref[0, 0:1, columns] += dq.sum(axis=0, keepdims=True)
                dk += _dot(dproducts, q, (0, 0))
                dv += _dot(weights.astype(grad.dtype), grad, (0, 0))
            for index, part_grad in ((1, dk * scale), (2, dv)):
                parts_ref[index, image, :, columns] = part_grad.astype(parts_ref.dtype)
                if dshift_ref is not None:
                    rows = slice(index, index + 1)
                    dshift_ref[0, rows, columns] += part_grad.sum(axis=0, keepdims=True)

    @pl.when(part == 0)
    def _() -> None:
        plan.for_each_image(differentiate)

    out_ref[...] = parts_ref[part]


def _dot(x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Returns the product of two matrices over one axis of each, in float32."""
    dims = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)


def _shifted(x: jax.Array, shift_ref: Any, part: int, columns: slice) -> jax.Array:
    """Returns queries (part 0), keys (1) or values (2) of a head with their bias."""
    return x if shift_ref is None else x + shift_ref[0, part : part + 1, columns].astype(x.dtype)


def _apply(scores: jax.Array, gain_ref: Any, bias_ref: Any, head: int, rows: slice) -> jax.Array:
    """Returns G ⊙ scores + B of some queries."""
    if gain_ref is not None:
        scores = scores * gain_ref[head, rows, :].astype(jnp.float32)
    if bias_ref is not None:
        scores = scores + bias_ref[head, rows, :].astype(jnp.float32)
    return scores


def _exponentials(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns exp(scores), scaled so that the largest of a row is 1, and the sum of each row."""
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights, weights.sum(axis=-1, keepdims=True)
