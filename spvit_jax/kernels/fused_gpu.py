"""Fused attention, softmax(G ⊙ QKᵀ/√d + B) V, as Pallas programs for GPUs, with its gradients.

Written for Triton: a program holds a tile of queries or of keys of one head of one image, and
passes over the tiles of the other, so that scores stay in registers. The backward pass computes
them again, in a program each for queries, for keys and values, and for G and B; those of the last
add up images, and XLA adds up their sums. The readable form of the equation is in
`models/attention.py`, the kernel for TPUs in `fused.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from spvit_jax.kernels import CONTEXT

# Widths of a head that the kernel knows: Triton's arrays are powers of two, its products of 16 at
# least; 128 would spill registers and need more shared memory than smaller cards have.
HEAD_DIMS = (16, 32, 64)
# In float32 exact products do without tensor cores, and Triton's TF32 is not float32.
DTYPES = ("bfloat16",)

_TILE = 64  # queries, or keys
_MAX_SUMS = 8  # partial sums over images of the gradients of G and B
_WARPS, _STAGES = 4, 2
# Score of no pair, finite: a row of which all pairs so far are removed has no NaN.
_LEAST = float(jnp.finfo(jnp.float32).min)


def supports(head_dim: int, dtype: jax.typing.DTypeLike) -> bool:
    """Returns whether the kernel knows heads of a width, in a dtype."""
    return head_dim in HEAD_DIMS and jnp.dtype(dtype).name in DTYPES


def runs_on_these_devices() -> bool:
    """Returns whether this process's GPUs run the kernel: NVIDIA's, of Ampere or newer.

    Where a process has no GPU, as one that lowers for others', it is taken for granted.
    """
    try:
        capability = str(jax.local_devices(backend="gpu")[0].compute_capability)
    except RuntimeError:
        return True
    major = capability.split(".")[0]  # of "9.0"; AMD's are as "gfx942"
    return major.isdecimal() and int(major) >= 8


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

    On a mesh it is to be called by `mesh.on_each_device`. What the backward pass needs of the
    result is named for `jax.checkpoint`, as `kernels.CONTEXT`.

    Args:
      qkv: queries, keys and values [B, N, 3D], columns ordered [3, H, d]; bfloat16, or float32 to
        compare with.
      num_heads: number of heads H.
      gain: G [H, N, N], float32 or bfloat16; None stands for 1.
      bias: B, as `gain`; None stands for 0. An entry of -inf removes a pair.
      qkv_bias: bias [3D] of the projection, to be added to `qkv` first; None for none.
      interpret: whether to run in Pallas' interpret mode, on any platform.

    Returns:
      [B, N, D] in the dtype of `qkv`.
    """
    if qkv_bias is not None:
        qkv = qkv + qkv_bias.astype(qkv.dtype)
    batch, tokens, columns = qkv.shape
    heads = qkv.reshape(batch, tokens, 3, num_heads, -1)
    return _attention(heads, gain, bias, interpret).reshape(batch, tokens, columns // 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attention(
    qkv: jax.Array, gain: jax.Array | None, bias: jax.Array | None, interpret: bool
) -> jax.Array:
    return _attend(qkv, gain, bias, interpret)[0]


# Where a loop has kept the results JAX drops a function, which it does not do with a kernel.
@functools.partial(jax.jit, static_argnums=3)
def _attend(
    qkv: jax.Array, gain: jax.Array | None, bias: jax.Array | None, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns the result [B, N, H, d] and the logarithm of each row's sum [B, H, whole tiles]."""
    shape = _Shape.of(qkv)
    return shape.call(
        "fused_attention",
        _forward_kernel,
        (shape.tiles, shape.heads, shape.batch),
        [shape.result(qkv.dtype), shape.per_query()],
        (qkv, shape.pad_factor(gain), shape.pad_factor(bias)),
        interpret,
    )


def _forward(
    qkv: CustomVJPPrimal,
    gain: CustomVJPPrimal | None,
    bias: CustomVJPPrimal | None,
    interpret: bool,
) -> tuple[jax.Array, Any]:
    values: list[Any] = [None if x is None else x.value for x in (qkv, gain, bias)]
    out, log_sums = _attend(values[0], values[1], values[2], interpret)
    out, log_sums = checkpoint_name(out, CONTEXT), checkpoint_name(log_sums, CONTEXT)
    # What is learned is known here and not in `_backward`; a tree without leaves tells it.
    learned = [() if x is not None and x.perturbed else None for x in (gain, bias)]
    return out, (*values, out, log_sums, learned)


def _backward(
    interpret: bool, residuals: Any, grad: jax.Array | SymbolicZero
) -> tuple[jax.Array | None, ...]:
    qkv, gain, bias, out, log_sums, learned = residuals
    if isinstance(grad, SymbolicZero):
        return None, None, None
    shape = _Shape.of(qkv)
    delta = (out.astype(jnp.float32) * grad.astype(jnp.float32)).sum(axis=-1).swapaxes(1, 2)
    delta = jnp.pad(delta, ((0, 0), (0, 0), (0, shape.padding)))
    factors = shape.pad_factor(gain), shape.pad_factor(bias)
    inputs = (qkv, *factors, grad, log_sums, delta)
    call = functools.partial(shape.call, inputs=inputs, interpret=interpret)
    programs, of_part = (shape.tiles, shape.heads, shape.batch), shape.result(qkv.dtype)
    (dq,) = call("fused_attention_dq", _query_kernel, programs, [of_part])
    dk, dv = call("fused_attention_dkv", _key_kernel, programs, [of_part, of_part])
    sums: list[Any] = [None if is_learned is None else shape.sums() for is_learned in learned]
    if any(x is not None for x in sums):
        programs = (shape.tiles**2, shape.heads, shape.num_sums)
        sums = call("fused_attention_dfactors", _factor_kernel, programs, sums)
    dgain, dbias = (
        None if x is None else x.sum(axis=0)[:, : shape.tokens, : shape.tokens].astype(like.dtype)
        for x, like in zip(sums, (gain, bias), strict=True)
    )
    return jnp.stack([dq, dk, dv], axis=2), dgain, dbias


_attention.defvjp(_forward, _backward, symbolic_zeros=True)


class _Shape(NamedTuple):
    """Shape of queries, keys and values [B, N, 3, H, d], and of the programs for it.

    Attributes:
      batch: number of images B.
      tokens: number of tokens N.
      heads: number of heads H.
      head_dim: width d of a head.
    """

    batch: int
    tokens: int
    heads: int
    head_dim: int

    @classmethod
    def of(cls, qkv: jax.Array) -> _Shape:
        batch, tokens, _, heads, head_dim = qkv.shape
        return cls(batch, tokens, heads, head_dim)

    @property
    def tiles(self) -> int:
        """Number of tiles of queries, or of keys; the last is padded."""
        return -(-self.tokens // _TILE)

    @property
    def padding(self) -> int:
        """Number of tokens that the last tile lacks."""
        return self.tiles * _TILE - self.tokens

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def num_sums(self) -> int:
        """Number of partial sums over images of the gradient of G or B: a divisor of B."""
        return max(n for n in range(1, _MAX_SUMS + 1) if self.batch % n == 0)

    def result(self, dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.batch, self.tokens, self.heads, self.head_dim), dtype)

    def per_query(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.batch, self.heads, self.tiles * _TILE), jnp.float32)

    def sums(self) -> jax.ShapeDtypeStruct:
        width = self.tiles * _TILE
        return jax.ShapeDtypeStruct((self.num_sums, self.heads, width, width), jnp.float32)

    def pad_factor(self, factor: jax.Array | None) -> jax.Array | None:
        """Pads G or B [H, N, N] to whole tiles, in float32."""
        if factor is None:
            return None
        padding = (0, self.padding)
        return jnp.pad(factor.astype(jnp.float32), ((0, 0), padding, padding))

    def call(
        self,
        name: str,
        kernel: Any,
        grid: tuple[int, ...],
        results: Sequence[jax.ShapeDtypeStruct | None],
        inputs: Sequence[Any],
        interpret: bool,
    ) -> Any:
        return pl.pallas_call(
            functools.partial(kernel, self),
            grid=grid,
            out_shape=list(results),
            compiler_params=plt.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
            name=name,
            interpret=interpret,
        )(*inputs)


def _forward_kernel(
    shape: _Shape, qkv_ref: Any, gain_ref: Any, bias_ref: Any, out_ref: Any, log_sums_ref: Any
) -> None:
    tile, head, image = (pl.program_id(axis) for axis in range(3))
    q = _load(shape, qkv_ref, image, tile, 0, head)

    def attend(keys: jax.Array, carry: Any) -> Any:
        largest, total, out = carry
        k = _load(shape, qkv_ref, image, keys, 1, head)
        v = _load(shape, qkv_ref, image, keys, 2, head)
        gain, bias = (_factor(ref, head, tile, keys) for ref in (gain_ref, bias_ref))
        scores = _apply(_dot(q, k, trans_b=True) * shape.scale, gain, bias)
        scores = jnp.where(_exist(shape, keys)[None, :], scores, -jnp.inf)
        new_largest = jnp.maximum(largest, scores.max(axis=1))
        weights = jnp.exp(scores - new_largest[:, None])
        shrink = jnp.exp(largest - new_largest)
        total = total * shrink + weights.sum(axis=1)
        out = out * shrink[:, None] + _dot(weights.astype(v.dtype), v)
        return new_largest, total, out

    zeros = jnp.zeros(_TILE, jnp.float32)
    carry = zeros + _LEAST, zeros, jnp.zeros((_TILE, shape.head_dim), jnp.float32)
    largest, total, out = jax.lax.fori_loop(0, shape.tiles, attend, carry)
    _store(shape, out_ref, image, tile, head, out / total[:, None])
    log_sums_ref[image, head, _slice(tile)] = largest + jnp.log(total)


def _query_kernel(shape: _Shape, *refs: Any) -> None:
    *inputs, dq_ref = refs
    tile, head, image = (pl.program_id(axis) for axis in range(3))

    def differentiate(keys: jax.Array, dq: jax.Array) -> jax.Array:
        pair = _Pair.of(shape, inputs, image, head, tile, keys)
        return dq + _dot(pair.dproducts.astype(pair.k.dtype), pair.k)

    zeros = jnp.zeros((_TILE, shape.head_dim), jnp.float32)
    dq = jax.lax.fori_loop(0, shape.tiles, differentiate, zeros)
    _store(shape, dq_ref, image, tile, head, dq * shape.scale)


def _key_kernel(shape: _Shape, *refs: Any) -> None:
    *inputs, dk_ref, dv_ref = refs
    tile, head, image = (pl.program_id(axis) for axis in range(3))

    def differentiate(queries: jax.Array, carry: Any) -> Any:
        dk, dv = carry
        pair = _Pair.of(shape, inputs, image, head, queries, tile)
        dk += _dot(pair.dproducts.astype(pair.q.dtype), pair.q, trans_a=True)
        dv += _dot(pair.weights.astype(pair.grad.dtype), pair.grad, trans_a=True)
        return dk, dv

    zeros = jnp.zeros((_TILE, shape.head_dim), jnp.float32)
    dk, dv = jax.lax.fori_loop(0, shape.tiles, differentiate, (zeros, zeros))
    _store(shape, dk_ref, image, tile, head, dk * shape.scale)
    _store(shape, dv_ref, image, tile, head, dv)


def _factor_kernel(shape: _Shape, *refs: Any) -> None:
    *inputs, dgain_ref, dbias_ref = refs
    tiles, head, part = (pl.program_id(axis) for axis in range(3))
    queries, keys = tiles // shape.tiles, tiles % shape.tiles
    images = shape.batch // shape.num_sums

    def differentiate(index: jax.Array, carry: Any) -> Any:
        dgain, dbias = carry
        pair = _Pair.of(shape, inputs, part * images + index, head, queries, keys)
        return (
            None if dgain is None else dgain + pair.dscores * pair.products,
            None if dbias is None else dbias + pair.dscores,
        )

    zeros = jnp.zeros((_TILE, _TILE), jnp.float32)
    carry = tuple(None if ref is None else zeros for ref in (dgain_ref, dbias_ref))
    sums = jax.lax.fori_loop(0, images, differentiate, carry)
    for ref, total in zip((dgain_ref, dbias_ref), sums, strict=True):
        if ref is not None:
            ref[part, head, _slice(queries), _slice(keys)] = total


class _Pair(NamedTuple):
    """A tile of queries and one of keys, and the derivatives of the loss by their scores.

    Attributes:
      q: queries [tile, d].
      k: keys [tile, d].
      grad: gradient of the queries' results [tile, d].
      products: QKᵀ/√d [tile, tile], float32.
      weights: softmax(G ⊙ QKᵀ/√d + B), float32.
      dscores: gradient of G ⊙ QKᵀ/√d + B, float32.
      dproducts: gradient of QKᵀ/√d, float32.
    """

    q: jax.Array
    k: jax.Array
    grad: jax.Array
    products: jax.Array
    weights: jax.Array
    dscores: jax.Array
    dproducts: jax.Array

    @classmethod
    def of(
        cls,
        shape: _Shape,
        inputs: Sequence[Any],
        image: jax.Array,
        head: jax.Array,
        queries: jax.Array,
        keys: jax.Array,
    ) -> _Pair:
        qkv_ref, gain_ref, bias_ref, grad_ref, log_sums_ref, delta_ref = inputs
        q = _load(shape, qkv_ref, image, queries, 0, head)
        k = _load(shape, qkv_ref, image, keys, 1, head)
        v = _load(shape, qkv_ref, image, keys, 2, head)
        exist = _exist(shape, queries)[:, None]
        rows = _slice(queries)
        grad = plt.load(grad_ref.at[image, rows, head, :], mask=exist, other=0.0)
        products = _dot(q, k, trans_b=True) * shape.scale
        gain, bias = (_factor(ref, head, queries, keys) for ref in (gain_ref, bias_ref))
        scores = _apply(products, gain, bias)
        weights = jnp.exp(scores - log_sums_ref[image, head, rows][:, None])
        weights = jnp.where(_exist(shape, keys)[None, :] & exist, weights, 0.0)
        dweights = _dot(grad, v, trans_b=True)
        dscores = weights * (dweights - delta_ref[image, head, rows][:, None])
        dproducts = dscores if gain is None else dscores * gain
        return cls(q, k, grad, products, weights, dscores, dproducts)


def _slice(tile: jax.Array) -> Any:
    return pl.ds(tile * _TILE, _TILE)


def _exist(shape: _Shape, tile: jax.Array) -> jax.Array:
    """Returns bool [tile]: which of a tile's tokens there are."""
    return tile * _TILE + jnp.arange(_TILE) < shape.tokens


def _load(
    shape: _Shape, ref: Any, image: jax.Array, tile: jax.Array, part: int, head: jax.Array
) -> jax.Array:
    """Returns a tile of queries (part 0), keys (1) or values (2), 0 beyond the last token."""
    rows = ref.at[image, _slice(tile), jnp.int32(part), head, :]
    return plt.load(rows, mask=_exist(shape, tile)[:, None], other=0.0)


def _store(
    shape: _Shape, ref: Any, image: jax.Array, tile: jax.Array, head: jax.Array, value: jax.Array
) -> None:
    rows = ref.at[image, _slice(tile), head, :]
    plt.store(rows, value.astype(ref.dtype), mask=_exist(shape, tile)[:, None])


def _dot(x: jax.Array, y: jax.Array, **transposed: bool) -> jax.Array:
    """Returns the product of two matrices in float32, exact if they are."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return plt.dot(x, y, precision=precision, **transposed)


def _factor(ref: Any, head: jax.Array, queries: jax.Array, keys: jax.Array) -> jax.Array | None:
    """Returns G or B of a tile of queries and one of keys, or None if there is none."""
    return None if ref is None else ref[head, _slice(queries), _slice(keys)]


def _apply(products: jax.Array, gain: jax.Array | None, bias: jax.Array | None) -> jax.Array:
    """Returns G ⊙ products + B."""
    if gain is not None:
        products = products * gain
    return products if bias is None else products + bias
