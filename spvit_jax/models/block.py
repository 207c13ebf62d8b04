"""The pre-norm transformer block of every family: attention and MLP on residual branches."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from spvit_jax.models.attention import Attention
from spvit_jax.models.layers import (
    LayerNorm,
    LayerScale,
    Mlp,
    PosConv,
    accumulation_dtype,
    drop_path,
)
from spvit_jax.models.spatial import Grid


class Block(nnx.Module):
    """Attention, MLP and, for SP-ViT, a position convolution.

    The kind of attention is up to the caller of the constructor.

    Attributes:
      residual_dtype: dtype of the tokens between blocks: that of the computation, but float32 at
        least with LayerScale, whose first branches a bfloat16 sum would round away. Elsewhere
        it would cost memory traffic for nothing.
    """

    def __init__(
        self,
        dim: int,
        make_attention: Callable[[], Attention],
        *,
        mlp_ratio: float,
        norm_eps: float,
        skip_lam: float = 1.0,
        layer_scale: float | None = None,
        pos_conv: bool = False,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        """Creates the block.

        Args:
          dim: channels D.
          make_attention: returns the attention module, on D channels.
          mlp_ratio: hidden width of the MLP over D.
          norm_eps: epsilon of LayerNorm.
          skip_lam: divisor of the residual branches (LV-ViT).
          layer_scale: initial value of LayerScale; None is without.
          pos_conv: whether a position convolution follows (SP-ViT).
          dtype: dtype of the computation.
          rngs: random keys of the initial weights.
        """
        norm = functools.partial(LayerNorm, epsilon=norm_eps, dtype=dtype, rngs=rngs)
        self.norm1 = norm(dim)
        self.attn = make_attention()
        self.norm2 = norm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dtype=dtype, rngs=rngs)
        self.scale1 = LayerScale(dim, layer_scale) if layer_scale is not None else None
        self.scale2 = LayerScale(dim, layer_scale) if layer_scale is not None else None
        self.pos_conv = PosConv(dim, rngs=rngs) if pos_conv else None
        self.skip_lam = skip_lam
        self.residual_dtype = dtype if layer_scale is None else accumulation_dtype(dtype)

    def __call__(
        self,
        x: jax.Array,
        grid: Grid,
        num_prefix: int = 0,
        factors: jax.Array | None = None,
    ) -> jax.Array:
        """Maps tokens [B, P+N, D] of a grid h·w = N behind P prefix tokens.

        In training `factors` [2, B] of `draw_drop_path` say which examples lose which of the two
        residual branches; without them none does.
        """
        first, second = (None, None) if factors is None else factors
        attended = self.attn(self.norm1(x), grid, num_prefix)
        x = x + self._branch(attended, self.scale1, first)
        x = x + self._branch(self.mlp(self.norm2(x)), self.scale2, second)
        if self.pos_conv is not None:
            x = self.pos_conv(x, grid, num_prefix)
        return x

    def _branch(
        self, x: jax.Array, scale: LayerScale | None, factor: jax.Array | None
    ) -> jax.Array:
        if scale is not None:
            x = scale(x)
        return drop_path(x, factor) / self.skip_lam
