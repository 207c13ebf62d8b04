"""Attention with a gain and a bias, softmax(G ⊙ QKᵀ/√d + B) V, and the module around it.

The gain G and the bias B are computed in `spatial.py`; blocks are stacked in `vit.py`, `cait.py`
and `swin.py`. Every attention of every model is `attention` below, or a kernel that computes the
same faster (`implementation.py` says which).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spvit_jax.kernels.fused_local import fused_local_attention
from spvit_jax.kernels.local import local_attention
from spvit_jax.kernels.mesh import on_each_device
from spvit_jax.models.implementation import (
    Implementation,
    check,
    choose,
    fused_kernel,
    is_local,
    runs_fused_local,
)
from spvit_jax.models.initializers import linear_kernel
from spvit_jax.models.layers import Linear, accumulation_dtype
from spvit_jax.models.spatial import (
    Grid,
    LocalityMask,
    RelativePositionBias,
    SpatialPrior,
    pad_prefix,
)

Factors = tuple[jax.Array | None, jax.Array | None]  # G and B, or None where they are 1 and 0
Learned = tuple[SpatialPrior | None, RelativePositionBias | None]  # what G and B are made of
Mix = Callable[[jax.Array], jax.Array]  # a map over the heads of [B, H, n, m]


def attention_weights(
    q: jax.Array,
    k: jax.Array,
    gain: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    mix_scores: Mix | None = None,
    mix_weights: Mix | None = None,
) -> jax.Array:
    """Computes A = softmax(G ⊙ QKᵀ/√d + B), in float32 at least, whatever the inputs' dtype.

    Args:
      q: queries [B, n, H, d].
      k: keys [B, m, H, d].
      gain: G, [H, n, m] or anything that broadcasts to [B, H, n, m]; None stands for 1.
      bias: B, of a shape as that of G; None stands for 0. An entry of -inf removes a pair.
      mix_scores: map of QKᵀ/√d over the heads (talking heads); G and B act on its result, so that
        a head that is masked stays so.
      mix_weights: map of the weights over the heads, after the softmax (talking heads).

    Returns:
      Attention weights [B, H, n, m], float32 or float64, each row summing to 1 (before
      `mix_weights`).
    """
    scores = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=accumulation_dtype(q.dtype))
    scores = scores * q.shape[-1] ** -0.5
    if mix_scores is not None:
        scores = mix_scores(scores)
    if gain is not None:
        scores = scores * gain
    if bias is not None:
        scores = scores + bias
    weights = jax.nn.softmax(scores, axis=-1)
    return weights if mix_weights is None else mix_weights(weights)


@jax.named_scope("attention")
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gain: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    mix_scores: Mix | None = None,
    mix_weights: Mix | None = None,
) -> jax.Array:
    """Computes attention with a gain and a bias, softmax(G ⊙ QKᵀ/√d + B) V.

    With G learned this is SP-ViT's attention (arXiv 2206.07662), with G binary a masked head of
    MaiT (arXiv 2207.03006).

    Args:
      q: queries [B, n, H, d].
      k: keys [B, m, H, d].
      v: values [B, m, H, d].
      gain: G, as in `attention_weights`.
      bias: B, as in `attention_weights`.
      mix_scores: as in `attention_weights`.
      mix_weights: as in `attention_weights`.

    Returns:
      [B, n, H, d] in the dtype of `v`.
    """
    weights = attention_weights(q, k, gain, bias, mix_scores=mix_scores, mix_weights=mix_weights)
    return jnp.einsum("bhnm,bmhd->bnhd", weights.astype(v.dtype), v)


class TalkingHeads(nnx.Module):
    """A linear map over the heads of scores or weights [B, H, n, m] (CaiT, arXiv 2103.17239).

    Parameters kernel [H, H], from old heads to new ones, and bias [H].
    """

    def __init__(self, num_heads: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(linear_kernel(rngs.params(), (num_heads, num_heads), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((num_heads,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        mixed = jnp.einsum("bhnm,hg->bgnm", x, self.kernel[...])
        return mixed + self.bias[...][:, None, None]


class Attention(nnx.Module):
    """Multi-head self-attention over prefix tokens and a grid of patches.

    Attributes:
      prior: learned gain of SP-SA, or None for a layer without one.
      position: learned relative-position bias, or None for a layer without one.
      mask: neighbourhood to which some heads are masked, or None.
      mix_scores: talking heads before the softmax, or None.
      mix_weights: talking heads after the softmax, or None.
      implementation: implementation of the attention, or "auto".
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool,
        spatial_prior: bool = False,
        prior_extent: int | None = None,
        position_bias: Grid | None = None,
        mask: LocalityMask | None = None,
        talking_heads: bool = False,
        implementation: Implementation = "auto",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        other_scores = "talking heads" if talking_heads else None
        check(implementation, dim // num_heads, dtype, other_scores=other_scores)
        self.num_heads = num_heads
        self.implementation: Implementation = "xla" if talking_heads else implementation
        self.qkv = Linear(
            dim, 3 * dim, use_bias=qkv_bias, kernel_init=linear_kernel, dtype=dtype, rngs=rngs
        )
        self.proj = Linear(dim, dim, kernel_init=linear_kernel, dtype=dtype, rngs=rngs)
        self.prior = (
            SpatialPrior(num_heads, dim // num_heads, extent=prior_extent, rngs=rngs)
            if spatial_prior
            else None
        )
        self.position = (
            None
            if position_bias is None
            else RelativePositionBias(num_heads, position_bias, rngs=rngs)
        )
        self.mask = mask
        self.mix_scores = TalkingHeads(num_heads, rngs=rngs) if talking_heads else None
        self.mix_weights = TalkingHeads(num_heads, rngs=rngs) if talking_heads else None

    def gain(self, grid: Grid, num_prefix: int = 0) -> jax.Array | None:
        """Returns G [H, P+N, P+N] (the prior times the soft mask), or None where it is 1."""
        return self._gain(self.prior, grid, num_prefix)

    @jax.named_scope("gain")
    def _gain(self, prior: SpatialPrior | None, grid: Grid, num_prefix: int) -> jax.Array | None:
        factors = []
        if prior is not None:
            factors.append(prior(grid, num_prefix))
        if self.mask is not None and self.mask.kind == "soft":
            factors.append(self.mask.gain(self.num_heads, grid, num_prefix))
        if not factors:
            return None
        return factors[0] if len(factors) == 1 else factors[0] * factors[1]

    def bias(self, grid: Grid, num_prefix: int = 0) -> jax.Array | None:
        """Returns B [H, P+N, P+N] (learned, and -inf outside a hard mask), or None for 0."""
        return self._bias(self.position, grid, num_prefix)

    @jax.named_scope("gain")
    def _bias(
        self, position: RelativePositionBias | None, grid: Grid, num_prefix: int
    ) -> jax.Array | None:
        terms = []
        if position is not None:
            terms.append(pad_prefix(position(), num_prefix, 0.0))
        if self.mask is not None and self.mask.kind == "hard":
            terms.append(self.mask.bias(self.num_heads, grid, num_prefix))
        if not terms:
            return None
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]

    def __call__(self, x: jax.Array, grid: Grid, num_prefix: int = 0) -> jax.Array:
        """Attends among the tokens x [B, P+N, D] of a grid h·w = N behind P prefix tokens."""
        has_bias = self.position is not None
        if self.mask is not None and not has_bias and is_local(self.implementation, x.shape[1]):
            return self._attend_locally(x, grid, num_prefix, self.mask)
        with jax.named_scope("qkv"):
            dtype, bias = self.qkv.dtype, self.qkv.bias
            qkv = x.astype(dtype) @ self.qkv.kernel[...].astype(dtype)
            qkv_bias = None if bias is None else bias[...].astype(dtype)

        def factors(learned: Learned) -> Factors:
            prior, position = learned
            return self._gain(prior, grid, num_prefix), self._bias(position, grid, num_prefix)

        out = self._attend_heads(qkv, self.num_heads, factors, qkv_bias)
        with jax.named_scope("proj"):
            return self.proj(out)

    def _attend_heads(
        self,
        qkv: jax.Array,
        num_heads: int,
        factors: Callable[[Learned], Factors],
        qkv_bias: jax.Array | None,
    ) -> jax.Array:
        """Returns softmax(G ⊙ QKᵀ/√d + B) V [B, n, H·d] of some heads H.

        Args:
          qkv: projection [B, n, 3·H·d] of the heads, without its bias.
          num_heads: number H of the heads.
          factors: returns G and B of the heads for a given prior and learned bias.
          qkv_bias: bias [3·H·d] of the projection, or None.
        """
        learned = self.prior, self.position
        num_factors = sum(factor is not None for factor in (*learned, self.mask))
        match choose(self.implementation, qkv, num_heads, num_factors):
            case "fused" | "fused_interpret" as name:
                graphdef, state = nnx.split(learned)
                kernel, interpret = fused_kernel(), name == "fused_interpret"

                def attend(qkv: jax.Array, shared: Any) -> jax.Array:
                    state, qkv_bias = shared
                    gain, bias = factors(nnx.merge(graphdef, state))
                    return kernel.fused_attention(
                        qkv, num_heads, gain, bias, qkv_bias=qkv_bias, interpret=interpret
                    )

                # Devices add up the gradients of the parameters, and not those of G and B.
                with jax.named_scope("attention"):
                    return on_each_device(attend, qkv, (state, qkv_bias))
            case _:
                with jax.named_scope("qkv"):
                    qkv = qkv if qkv_bias is None else qkv + qkv_bias
                gain, bias = factors(learned)
                mix = {"mix_scores": self.mix_scores, "mix_weights": self.mix_weights}
                q, k, v = split_heads(qkv, num_heads)
                out = attention(q, k, v, gain, bias, **mix)
                return out.reshape(*qkv.shape[:-1], -1)

    def _attend_locally(
        self, x: jax.Array, grid: Grid, num_prefix: int, mask: LocalityMask
    ) -> jax.Array:
        """Computes `__call__` with the masked heads at linear cost, the others as elsewhere.

        Each kind has its own part of the weights, so that neither is laid out for the other: the
        tokens of local heads lie behind their channels.
        """
        others = tuple(head for head in range(self.num_heads) if head not in mask.heads)
        local_gain = None
        if self.prior is not None:
            table, reach = self.prior.table(grid), mask.reach(grid)
            rows, columns = (slice(n - 1 - r, n + r) for n, r in zip(grid, reach, strict=True))
            local_gain = _take(table[:, rows, columns], mask.heads, axis=0)

        dim, dtype = x.shape[-1], self.qkv.dtype
        heads = (3, self.num_heads, dim // self.num_heads)
        kernel = self.qkv.kernel[...].astype(dtype).reshape(dim, *heads)
        bias = None if self.qkv.bias is None else self.qkv.bias[...].astype(dtype).reshape(heads)
        out_kernel = self.proj.kernel[...].astype(dtype).reshape(*heads[1:], dim)

        with jax.named_scope("qkv"):
            qkv = jnp.einsum("bnc,cthd->bthdn", x, _take(kernel, mask.heads, axis=2))
            if bias is not None:
                qkv += _take(bias, mask.heads, axis=1)[..., None]
        local = _attend_nearby(qkv, grid, num_prefix, mask, local_gain)
        with jax.named_scope("proj"):
            out = jnp.einsum("bhdn,hdc->bnc", local, _take(out_kernel, mask.heads, axis=0))
            out += self.proj.bias[...].astype(dtype)  # type: ignore[index]  # it has one
        if not others:
            return out

        with jax.named_scope("qkv"):
            qkv = x @ _take(kernel, others, axis=2).reshape(dim, -1)
            other_bias = None if bias is None else _take(bias, others, axis=1).reshape(-1)

        def factors(learned: Learned) -> Factors:
            prior, _ = learned
            return None if prior is None else _take(prior(grid, num_prefix), others, axis=0), None

        attended = self._attend_heads(qkv, len(others), factors, other_bias)
        with jax.named_scope("proj"):
            return out + attended @ _take(out_kernel, others, axis=0).reshape(-1, dim)

    def weights(
        self, x: jax.Array, grid: Grid, num_prefix: int = 0, *, mix_weights: bool = True
    ) -> jax.Array:
        """Returns the attention weights A [B, H, P+N, P+N] of the tokens x, float32.

        Talking heads mix the heads once more after the softmax, and rows of A need not sum to 1
        then; `mix_weights` False leaves that out: the heads on which masks and priors act.
        """
        q, k, _ = split_heads(self._project(x), self.num_heads)
        mix = {"mix_scores": self.mix_scores}
        mix["mix_weights"] = self.mix_weights if mix_weights else None
        gain, bias = self.gain(grid, num_prefix), self.bias(grid, num_prefix)
        return attention_weights(q, k, gain, bias, **mix)

    def map_grid(self, grid: Grid) -> Grid:
        """Returns the grid (h, w) that attention maps cover, for tokens on a given grid."""
        return grid

    def map_patches(self, grid: Grid) -> np.ndarray:
        """Returns the patches that the attention maps of an image cover, for tokens on a grid.

        Returns:
          int [maps, n]: for each place of a map the index of its patch in the grid, row by row, or
          -1 where there is padding.
        """
        return np.arange(grid[0] * grid[1])[None]

    @jax.named_scope("qkv")
    def _project(self, x: jax.Array) -> jax.Array:
        """Projects x [B, n, D] to queries, keys and values [B, n, 3D], columns [3, H, d]."""
        return self.qkv(x)


@jax.named_scope("qkv")
def split_heads(qkv: jax.Array, num_heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Splits a projection [B, n, 3·H·d] into queries, keys and values [B, n, H, d]."""
    qkv = qkv.reshape(*qkv.shape[:-1], 3, num_heads, -1)
    return qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]


def _attend_nearby(
    qkv: jax.Array, grid: Grid, num_prefix: int, mask: LocalityMask, gain: jax.Array | None
) -> jax.Array:
    """Returns the masked heads' attention [B, H, d, P+N], at linear cost.

    Args:
      qkv: queries, keys and values of the masked heads [B, 3, H, d, P+N].
      grid: rows and columns of patches.
      num_prefix: number P of prefix tokens.
      mask: neighbourhood of the heads.
      gain: learned gain [H, offsets, offsets] in the neighbourhood, or None.
    """
    reach, kind = mask.reach(grid), mask.kind
    if gain is None and runs_fused_local(qkv, grid, num_prefix, reach):

        def attend(qkv: jax.Array, _: None) -> jax.Array:
            return fused_local_attention(qkv, grid, radius=reach, kind=kind)

        return on_each_device(attend, qkv, None)
    q, k, v = qkv.transpose(1, 2, 3, 0, 4)
    out = local_attention(q, k, v, grid, num_prefix, radius=reach, kind=kind, gain=gain)
    return out.transpose(2, 0, 1, 3)


def _take(array: jax.Array, heads: Sequence[int], *, axis: int) -> jax.Array:
    """Takes some heads from an axis of all, by slices rather than by a gather."""
    if len(heads) == array.shape[axis]:
        return array
    slices = [jax.lax.slice_in_dim(array, head, head + 1, axis=axis) for head in heads]
    return jnp.concatenate(slices, axis=axis)
