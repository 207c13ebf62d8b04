"""Swin: attention inside shifted windows, on a pyramid of grids (arXiv 2103.14030).

A window is the grid of the attention in `attention.py`: its bias B is learned per offset, and -inf
between the parts of a shifted window; MaiT's masked heads and SP-ViT's prior are arguments here as
elsewhere. Its stages are those of `pyramid.py`; named settings are in the registry.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spvit_jax.models.attention import Attention, attention, attention_weights, split_heads
from spvit_jax.models.block import Block
from spvit_jax.models.implementation import Implementation, check
from spvit_jax.models.pyramid import Pyramid, PyramidConfig
from spvit_jax.models.spatial import Grid, LocalityMask


@dataclasses.dataclass(frozen=True)
class SwinConfig(PyramidConfig):
    """Configuration of a Swin; masks and priors of its heads are those of a window."""

    window: int | None = None  # patches; None: 1/32 of the image's shorter side, 7 at 224 pixels

    @property
    def window_size(self) -> int:
        """Side of a window in patches, where the grid is not smaller."""
        return self.window or max(min(self.image_shape) // 32, 1)

    def build(self, rngs: nnx.Rngs) -> Swin:
        """Creates the model of this configuration."""
        return Swin(self, rngs=rngs)


class WindowAttention(Attention):
    """Attention of each patch to those in its window, with a bias for each offset.

    Along an axis on which the grid is no larger than the window, one window spans the grid and
    there is no shift. A grid that windows do not divide is shifted, then padded with zeros, which
    take part in attention; shifted windows wrap around the padded grid (as in timm, so that its
    weights give the same).

    Attributes:
      window: (rows, columns) of a window in patches.
      shift: (rows, columns) by which the windows are shifted.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        grid: Grid,
        window: int,
        shifted: bool,
        qkv_bias: bool,
        spatial_prior: bool = False,
        prior_extent: int | None = None,
        mask: LocalityMask | None,
        implementation: Implementation = "auto",
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        # Windows are small, and each has a bias of its own: XLA's products are the faster.
        check(implementation, dim // num_heads, dtype, other_scores="the bias of Swin's windows")
        h, w = grid
        self.window = (min(h, window), min(w, window))
        super().__init__(
            dim,
            num_heads,
            qkv_bias=qkv_bias,
            spatial_prior=spatial_prior,
            prior_extent=prior_extent,
            position_bias=self.window,
            mask=mask,
            dtype=dtype,
            rngs=rngs,
        )
        self.shift = (
            window // 2 if shifted and h > window else 0,
            window // 2 if shifted and w > window else 0,
        )

    def gain(self, grid: Grid, num_prefix: int = 0) -> jax.Array | None:
        """Returns G [H, n, n] of a window of n patches, or None where it is 1."""
        return super().gain(self.window, num_prefix)

    def bias(self, grid: Grid, num_prefix: int = 0) -> jax.Array:
        """Returns B [windows, H, n, n] of a grid's windows of n patches."""
        bias = super().bias(self.window, num_prefix)
        assert bias is not None  # a window has a learned one
        shift_bias = _shift_bias(_padded(grid, self.window), self.window, self.shift)
        return bias + jnp.asarray(shift_bias, bias.dtype)[:, None]

    def map_grid(self, grid: Grid) -> Grid:
        """Returns the grid of a window."""
        return self.window

    def map_patches(self, grid: Grid) -> np.ndarray:
        """Returns the patch at each place of each window, int [windows, n]; -1 is padding."""
        with jax.ensure_compile_time_eval():
            numbers = jnp.arange(1, grid[0] * grid[1] + 1)[None, :, None]
            return np.asarray(self._partition(numbers, grid))[..., 0] - 1

    def __call__(self, x: jax.Array, grid: Grid, num_prefix: int = 0) -> jax.Array:
        """Attends among the tokens x [B, N, D] of a grid h·w = N."""
        with jax.named_scope("windows"):
            windows = self._partition(x, grid)
        q, k, v = split_heads(self._project(windows), self.num_heads)
        out = attention(q, k, v, self.gain(grid), self._bias_of_batch(x.shape[0], grid))
        with jax.named_scope("proj"):
            out = self.proj(out.reshape(windows.shape))
        with jax.named_scope("windows"):
            return self._merge_windows(out, grid)

    def weights(
        self, x: jax.Array, grid: Grid, num_prefix: int = 0, *, mix_weights: bool = True
    ) -> jax.Array:
        """Returns the attention weights A [B·windows, H, n, n] of the tokens x, float32.

        Rows whose query is padding, and no patch, are 0.
        """
        q, k, _ = split_heads(self._project(self._partition(x, grid)), self.num_heads)
        weights = attention_weights(q, k, self.gain(grid), self._bias_of_batch(x.shape[0], grid))
        is_patch = self._partition(jnp.ones((*x.shape[:2], 1), weights.dtype), grid)
        return weights * is_patch[:, None]

    def _bias_of_batch(self, batch: int, grid: Grid) -> jax.Array:
        bias = self.bias(grid)
        return jnp.broadcast_to(bias, (batch, *bias.shape)).reshape(-1, *bias.shape[1:])

    def _partition(self, x: jax.Array, grid: Grid) -> jax.Array:
        """Partitions tokens [B, N, D] into windows [B·windows, n, D]."""
        (h, w), (rows, columns), dim = grid, self.window, x.shape[-1]
        height, width = _padded(grid, self.window)
        image = x.reshape(-1, h, w, dim)
        image = jnp.roll(image, (-self.shift[0], -self.shift[1]), axis=(1, 2))
        image = jnp.pad(image, ((0, 0), (0, height - h), (0, width - w), (0, 0)))
        cut = image.reshape(-1, height // rows, rows, width // columns, columns, dim)
        return cut.swapaxes(2, 3).reshape(-1, rows * columns, dim)

    def _merge_windows(self, windows: jax.Array, grid: Grid) -> jax.Array:
        """Merges windows [B·windows, n, D] into tokens [B, N, D]; inverse of `_partition`."""
        (h, w), (rows, columns), dim = grid, self.window, windows.shape[-1]
        height, width = _padded(grid, self.window)
        cut = windows.reshape(-1, height // rows, width // columns, rows, columns, dim)
        image = cut.swapaxes(2, 3).reshape(-1, height, width, dim)[:, :h, :w]
        return jnp.roll(image, self.shift, axis=(1, 2)).reshape(-1, h * w, dim)


class Swin(Pyramid):
    """Swin model: stages of window attention; in each, every second layer's windows are shifted."""

    config: SwinConfig

    def __init__(self, config: SwinConfig, *, rngs: nnx.Rngs):
        super().__init__(config, lambda layer: _block(config, layer, rngs), rngs=rngs)


def _block(config: SwinConfig, layer: int, rngs: nnx.Rngs) -> Block:
    stage = config.stage_of_layers()[layer]
    grid, dim, heads = config.stages()[stage]
    dtype = jnp.dtype(config.dtype)
    make_attention = functools.partial(
        WindowAttention,
        dim,
        heads,
        grid=grid,
        window=config.window_size,
        shifted=(layer - sum(config.depths[:stage])) % 2 == 1,
        qkv_bias=config.qkv_bias,
        spatial_prior=layer < config.spatial_layers,
        prior_extent=config.prior_extent,
        mask=config.mask(layer),
        implementation=config.attention,
        dtype=dtype,
        rngs=rngs,
    )
    return Block(
        dim,
        make_attention,
        mlp_ratio=config.mlp_ratio,
        norm_eps=config.norm_eps,
        dtype=dtype,
        rngs=rngs,
    )


def _padded(grid: Grid, window: Grid) -> Grid:
    """Returns the smallest grid that contains `grid` and that windows divide."""
    return -(-grid[0] // window[0]) * window[0], -(-grid[1] // window[1]) * window[1]


def _shift_bias(grid: Grid, window: Grid, shift: tuple[int, int]) -> np.ndarray:
    """Returns the bias of shifted windows: -inf between patches that were not neighbours.

    Shifting the windows wraps the first `shift` rows and columns around to the end.

    Args:
      grid: rows and columns of patches (h, w), multiples of the window's.
      window: (rows, columns) of a window in patches.
      shift: (rows, columns) by which the windows are shifted; (0, 0) gives zeros.

    Returns:
      [windows, n, n] with n patches in a window.
    """
    (h, w), (rows, columns) = grid, window
    wrapped_y, wrapped_x = np.arange(h) >= h - shift[0], np.arange(w) >= w - shift[1]
    side = 2 * wrapped_y[:, None] + wrapped_x[None, :]
    cut = side.reshape(h // rows, rows, w // columns, columns).swapaxes(1, 2)
    windows = cut.reshape(-1, rows * columns)
    return np.where(windows[:, :, None] == windows[:, None, :], 0.0, -np.inf)
