"""Fused attention, softmax(G ⊙ QKᵀ/√d + B) V, as one Pallas program for TPUs, with its gradients.

Scores stay on the chip: a program holds a few heads of a few images, and HBM sees the projection
[B, N, 3D] as it lies, the result [B, N, D], and G and B once. The backward pass computes the
scores again. The readable form of the equation is in `models/attention.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from spvit_jax.kernels import CONTEXT

HEAD_DIMS = range(8, 129)  # widths of a head that the kernel knows
DTYPES = ("float32", "bfloat16")

_LANES = 128  # columns of a tile
_ROWS = 16  # of a tile of bfloat16; two tiles of float32
_QUERY_BLOCK = 256  # largest number of queries whose scores are held at a time
_MAX_IMAGES = 8  # of a program
_VMEM_LIMIT = 40 * 2**20  # bytes; what a kernel reserves, XLA cannot use around it


def supports(head_dim: int, dtype: jax.typing.DTypeLike) -> bool:
    """Returns whether the kernel knows heads of a width, in a dtype."""
    return head_dim in HEAD_DIMS and jnp.dtype(dtype).name in DTYPES


def fused_attention(
    qkv: jax.Array,
    num_heads: int,
    gain: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Computes self-attention with a gain and a bias, softmax(G ⊙ QKᵀ/√d + B) V.

    With a mesh in context the batch is split over all its axes, and each device holds G and B.

    Args:
      qkv: queries, keys and values [B, N, 3D], columns ordered [3, H, d]; float32 or bfloat16.
      num_heads: number of heads H.
      gain: G [H, N, N], float32 or bfloat16; None stands for 1.
      bias: B, as `gain`; None stands for 0. An entry of -inf removes a pair.
      interpret: whether to run in Pallas' interpret mode, on any platform.

    Returns:
      [B, N, D] in the dtype of `qkv`.
    """

    def run(qkv: jax.Array, gain: jax.Array | None, bias: jax.Array | None) -> jax.Array:
        return _attention(qkv, gain, bias, num_heads, interpret)

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        split, whole = P(mesh.axis_names), P()
        run = jax.shard_map(run, in_specs=(split, whole, whole), out_specs=split, check_vma=False)
    return checkpoint_name(run(qkv, gain, bias), CONTEXT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attention(
    qkv: jax.Array,
    gain: jax.Array | None,
    bias: jax.Array | None,
    num_heads: int,
    interpret: bool,
) -> jax.Array:
    plan = _Plan.of(qkv.shape, num_heads)
    columns, factor = plan.columns_spec, plan.factor_spec
    padded = plan.pad(qkv)
    out = pl.pallas_call(
        functools.partial(_forward_kernel, plan),
        grid=(plan.groups, plan.batch // plan.images),
        in_specs=[columns(0), columns(1), columns(2), factor(gain), factor(bias)],
        out_specs=columns(0),
        out_shape=jax.ShapeDtypeStruct((plan.batch, plan.tokens, plan.padded_dim), qkv.dtype),
        compiler_params=_params(2),
        cost_estimate=_cost(plan, 2, (qkv, gain, bias, qkv[..., : plan.dim])),
        name="fused_attention",
        interpret=interpret,
    )(padded, padded, padded, gain, bias)
    return out[..., : plan.dim]


def _forward(
    qkv: CustomVJPPrimal,
    gain: CustomVJPPrimal | None,
    bias: CustomVJPPrimal | None,
    num_heads: int,
    interpret: bool,
) -> tuple[jax.Array, Any]:
    values = [None if x is None else x.value for x in (qkv, gain, bias)]
    out = _attention(*values, num_heads, interpret)
    # What is learned is known here and not in `_backward`; a tree without leaves tells it.
    learned = [() if x is not None and x.perturbed else None for x in (gain, bias)]
    return out, (*values, learned)


def _backward(
    num_heads: int, interpret: bool, residuals: Any, grad: jax.Array | SymbolicZero
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
    qkv, gain, bias, learned = residuals
    if isinstance(grad, SymbolicZero):
        return None, None, None
    plan = _Plan.of(qkv.shape, num_heads)
    columns, factor = plan.columns_spec, plan.factor_spec
    padded, grad = plan.pad(qkv), plan.pad(grad)
    dgain, dbias = (
        None if is_learned is None else jax.ShapeDtypeStruct(x.shape, jnp.float32)
        for x, is_learned in zip((gain, bias), learned, strict=True)
    )
    dqkv, dgain, dbias = pl.pallas_call(
        functools.partial(_backward_kernel, plan),
        # The third axis writes the gradients of queries, keys and values, one after the other.
        grid=(plan.groups, plan.batch // plan.images, 3),
        in_specs=[columns(0), columns(1), columns(2), factor(gain), factor(bias), columns(0)],
        out_specs=[plan.parts_spec(), factor(dgain), factor(dbias)],
        out_shape=[jax.ShapeDtypeStruct(padded.shape, qkv.dtype), dgain, dbias],
        scratch_shapes=[pltpu.VMEM((3, plan.images, plan.tokens, plan.width), qkv.dtype)],
        compiler_params=_params(3),
        cost_estimate=_cost(plan, 5, (qkv, qkv, grad, gain, bias, dgain, dbias)),
        name="fused_attention_backward",
        interpret=interpret,
    )(padded, padded, padded, gain, bias, grad)
    return (
        plan.unpad(dqkv),
        None if dgain is None else dgain.astype(gain.dtype),
        None if dbias is None else dbias.astype(bias.dtype),
    )


_attention.defvjp(_forward, _backward, symbolic_zeros=True)


class _Plan(NamedTuple):
    """Division of the work into programs, each of some images and a group of heads.

    Attributes:
      batch: number of images B.
      tokens: number of tokens N.
      dim: channels D of all heads.
      head_dim: width d of a head.
      heads: heads in a group.
      groups: number of groups; groups are the outer loop, so that G is read once.
      width: columns of a group, whole tiles; beyond heads·d they are padding.
      images: images in a program.
    """

    batch: int
    tokens: int
    dim: int
    head_dim: int
    heads: int
    groups: int
    width: int
    images: int

    @classmethod
    def of(cls, shape: tuple[int, ...], num_heads: int) -> _Plan:
        """Plans the attention of a projection [B, N, 3D]."""
        batch, tokens, dim = shape[0], shape[1], shape[2] // 3
        head_dim = dim // num_heads
        heads = next(
            (n for n in range(1, num_heads) if num_heads % n == 0 == n * head_dim % _LANES),
            num_heads,
        )
        images = max(n for n in range(1, _MAX_IMAGES + 1) if batch % n == 0)
        width = -(-heads * head_dim // _LANES) * _LANES
        return cls(batch, tokens, dim, head_dim, heads, num_heads // heads, width, images)

    @property
    def padded_dim(self) -> int:
        """Columns of all groups; more than D only if there is a single group."""
        return self.groups * self.width

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
        return pl.BlockSpec((self.heads, self.tokens, self.tokens), lambda group, *_: (group, 0, 0))

    def pad(self, x: jax.Array) -> jax.Array:
        """Pads the columns of each part of [B, N, parts·D] to whole tiles."""
        if self.padded_dim == self.dim:
            return x
        parts = x.reshape(self.batch, self.tokens, -1, self.dim)
        width = ((0, 0), (0, 0), (0, 0), (0, self.padded_dim - self.dim))
        return jnp.pad(parts, width).reshape(self.batch, self.tokens, -1)

    def unpad(self, x: jax.Array) -> jax.Array:
        """Removes the padding of `pad`."""
        if self.padded_dim == self.dim:
            return x
        parts = x.reshape(self.batch, self.tokens, -1, self.padded_dim)
        return parts[..., : self.dim].reshape(self.batch, self.tokens, -1)

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


def _forward_kernel(
    plan: _Plan, q_ref: Any, k_ref: Any, v_ref: Any, gain_ref: Any, bias_ref: Any, out_ref: Any
) -> None:
    def attend(image: jax.Array, _: None) -> None:
        for head, columns in plan.head_slices():
            k, v = k_ref[image, :, columns], v_ref[image, :, columns]
            for rows in plan.query_slices():
                scores = _dot(q_ref[image, rows, columns], k, (1, 1)) * plan.head_dim**-0.5
                scores = _apply(scores, gain_ref, bias_ref, head, rows)
                weights, total = _exponentials(scores)
                out = _dot(weights.astype(v.dtype), v, (1, 0)) / total
                out_ref[image, rows, columns] = out.astype(out_ref.dtype)

    jax.lax.fori_loop(0, plan.images, attend, None)


def _backward_kernel(
    plan: _Plan,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    gain_ref: Any,
    bias_ref: Any,
    grad_ref: Any,
    out_ref: Any,
    dgain_ref: Any,
    dbias_ref: Any,
    parts_ref: Any,
) -> None:
    part = pl.program_id(2)

    @pl.when((pl.program_id(1) == 0) & (part == 0))
    def _() -> None:
        for ref in (dgain_ref, dbias_ref):
            if ref is not None:
                ref[...] = jnp.zeros_like(ref)

    def differentiate(image: jax.Array, _: None) -> None:
        for head, columns in plan.head_slices():
            k, v = k_ref[image, :, columns], v_ref[image, :, columns]
            dk, dv = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
            for rows in plan.query_slices():
                q, grad = q_ref[image, rows, columns], grad_ref[image, rows, columns]
                products = _dot(q, k, (1, 1)) * plan.head_dim**-0.5
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
                dproducts = (dscores * plan.head_dim**-0.5).astype(q.dtype)
                dq = _dot(dproducts, k, (1, 0))
                parts_ref[0, image, rows, columns] = dq.astype(parts_ref.dtype)
                dk += _dot(dproducts, q, (0, 0))
                dv += _dot(weights.astype(grad.dtype), grad, (0, 0))
            parts_ref[1, image, :, columns] = dk.astype(parts_ref.dtype)
            parts_ref[2, image, :, columns] = dv.astype(parts_ref.dtype)

    @pl.when(part == 0)
    def _() -> None:
        jax.lax.fori_loop(0, plan.images, differentiate, None)

    out_ref[...] = parts_ref[part]


def _dot(x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Returns the product of two matrices over one axis of each, in float32."""
    dims = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)


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


def _params(axes: int) -> pltpu.CompilerParams:
    # In sequence, since all images add to one gradient of G.
    return pltpu.CompilerParams(
        dimension_semantics=(pltpu.ARBITRARY,) * axes, vmem_limit_bytes=_VMEM_LIMIT
    )


def _cost(plan: _Plan, products: int, arrays: Sequence[Any]) -> pl.CostEstimate:
    """Returns the cost of some products of N×N per head, and of reading or writing arrays once."""
    pairs = plan.batch * plan.tokens**2
    return pl.CostEstimate(
        flops=2 * products * pairs * plan.dim,
        transcendentals=pairs * (plan.dim // plan.head_dim),
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays if x is not None),
    )
