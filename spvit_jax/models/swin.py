"""Swin: attention inside shifted windows, on a pyramid of grids (arXiv 2103.14030).

A window is the grid of the attention in `attention.py`: its bias B is learned per offset, and -inf
between the parts of a shifted window; MaiT's masked heads are an argument here as elsewhere. Named
settings are in the registry, `spvit_jax.models`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spvit_jax.errors import InputError
from spvit_jax.models.attention import Attention, attention, attention_weights, split_heads
from spvit_jax.models.base import Model, ModelConfig, Outputs, Tokens
from spvit_jax.models.block import Block
from spvit_jax.models.implementation import Implementation, check
from spvit_jax.models.initializers import linear_kernel
from spvit_jax.models.layers import LayerNorm, Linear
from spvit_jax.models.spatial import Grid, LocalityMask, RelativePositionBias
from spvit_jax.models.stem import PatchEmbed


@dataclasses.dataclass(frozen=True)
class SwinConfig(ModelConfig):
    """Configuration of a Swin.

    `dim` and `num_heads` are those of the first stage and double with each; `drop_path` is the
    rate at the last layer, growing linearly from 0 at the first; `masked_heads` counts layers
    through all stages, and its masks restrict heads inside their window.
    """

    patch_size: int = 4  # pixels
    dim: int = 96
    num_heads: int = 3
    norm_eps: float = 1e-5
    depths: tuple[int, ...] = (2, 2, 6, 2)  # layers of each stage
    window: int | None = None  # patches; None: 1/32 of the image's shorter side, 7 at 224 pixels

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.depths:
            raise InputError("depths is (); expected the number of layers of each stage")

    @property
    def window_size(self) -> int:
        """Side of a window in patches, where the grid is not smaller."""
        return self.window or max(min(self.image_shape) // 32, 1)

    def stages(self) -> list[tuple[Grid, int, int]]:
        """Returns each stage's grid (h, w), channels and heads."""
        (h, w), stages = self.grid, []
        for stage in range(len(self.depths)):
            stages.append(((h, w), self.dim * 2**stage, self.num_heads * 2**stage))
            h, w = -(-h // 2), -(-w // 2)
        return stages

    def heads_per_layer(self) -> list[int]:
        """Returns the number of attention heads of each layer."""
        return [
            heads
            for (_, _, heads), depth in zip(self.stages(), self.depths, strict=True)
            for _ in range(depth)
        ]

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
        mask: LocalityMask | None,
        implementation: Implementation = "auto",
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        # Windows are small, and each has a bias of its own: XLA's products are the faster.
        check(implementation, dim // num_heads, dtype, other_scores="the bias of Swin's windows")
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, mask=mask, dtype=dtype, rngs=rngs)
        h, w = grid
        self.window = (min(h, window), min(w, window))
        self.shift = (
            window // 2 if shifted and h > window else 0,
            window // 2 if shifted and w > window else 0,
        )
        self.position = RelativePositionBias(num_heads, self.window, rngs=rngs)

    def gain(self, grid: Grid, num_prefix: int = 0) -> jax.Array | None:
        """Returns G [H, n, n] of a window of n patches, or None where it is 1."""
        return super().gain(self.window, num_prefix)

    def bias(self, grid: Grid, num_prefix: int = 0) -> jax.Array:
        """Returns B [windows, H, n, n] of a grid's windows of n patches."""
        hard = super().bias(self.window, num_prefix)
        bias = self.position() if hard is None else self.position() + hard
        shift_bias = _shift_bias(_padded(grid, self.window), self.window, self.shift)
        return bias + jnp.asarray(shift_bias, bias.dtype)[:, None]

    def map_grid(self, grid: Grid) -> Grid:
        """Returns the grid of a window."""
        return self.window

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

    def weights(self, x: jax.Array, grid: Grid, num_prefix: int = 0) -> jax.Array:
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


class PatchMerging(nnx.Module):
    """Halves the grid: 2×2 patches of D channels become one of 2D, by LayerNorm and a linear map.

    An odd grid is padded with zeros.
    """

    def __init__(self, dim: int, *, norm_eps: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = LayerNorm(4 * dim, epsilon=norm_eps, dtype=dtype, rngs=rngs)
        self.reduction = Linear(
            4 * dim, 2 * dim, use_bias=False, kernel_init=linear_kernel, dtype=dtype, rngs=rngs
        )

    @jax.named_scope("patch_merging")
    def __call__(self, tokens: Tokens) -> Tokens:
        """Maps tokens [B, N, D] of a grid (h, w) to [B, ⌈h/2⌉·⌈w/2⌉, 2D]."""
        x, (h, w) = tokens.x, tokens.grid
        batch, _, dim = x.shape
        image = jnp.pad(x.reshape(batch, h, w, dim), ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))
        h, w = -(-h // 2), -(-w // 2)
        # Four patches side by side, in the order of the authors: down first, then right.
        merged = image.reshape(batch, h, 2, w, 2, dim).transpose(0, 1, 3, 4, 2, 5)
        merged = merged.reshape(batch, h * w, 4 * dim)
        return Tokens(self.reduction(self.norm(merged)), (h, w), 0)


class Swin(Model):
    """Swin model: stages of window attention, each on half the grid of the one before.

    `blocks` are those of all stages in order; `merges[s]` is between stages s and s + 1.
    """

    config: SwinConfig

    def __init__(self, config: SwinConfig, *, rngs: nnx.Rngs):
        dtype, eps, stages = jnp.dtype(config.dtype), config.norm_eps, config.stages()
        last = stages[-1][1]
        super().__init__(config)
        self.patch_embed = PatchEmbed(config.dim, config.patch_size, dtype=dtype, rngs=rngs)
        self.patch_norm = LayerNorm(config.dim, epsilon=eps, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            [
                _block(config, stage, sum(config.depths[:stage]) + index, index % 2 == 1, rngs)
                for stage, depth in enumerate(config.depths)
                for index in range(depth)
            ]
        )
        self.merges = nnx.List(
            [PatchMerging(dim, norm_eps=eps, dtype=dtype, rngs=rngs) for _, dim, _ in stages[:-1]]
        )
        self.norm = LayerNorm(last, epsilon=eps, dtype=dtype, rngs=rngs)
        self.head = Linear(
            last, config.num_classes, kernel_init=linear_kernel, dtype=dtype, rngs=rngs
        )
        self.eval()

    def to_tokens(self, patches: jax.Array) -> Tokens:
        """Normalises patch tokens [B, h, w, D]."""
        batch, h, w, dim = patches.shape
        return Tokens(self.patch_norm(patches.reshape(batch, h * w, dim)), (h, w), 0)

    @property
    def before_blocks(self) -> dict[int, Callable[[Tokens], Tokens]]:
        """Patch merging before the first layer of each stage but the first, by that layer."""
        starts = itertools.accumulate(self.config.depths[:-1])
        return dict(zip(starts, self.merges, strict=True))

    @jax.named_scope("heads")
    def classify(self, tokens: jax.Array) -> Outputs:
        """Applies the head to the mean of normalised tokens [B, N, D]."""
        return Outputs(logits=self._logits(self.head, tokens.mean(axis=1)))


def _block(config: SwinConfig, stage: int, layer: int, shifted: bool, rngs: nnx.Rngs) -> Block:
    grid, dim, heads = config.stages()[stage]
    dtype = jnp.dtype(config.dtype)
    make_attention = functools.partial(
        WindowAttention,
        dim,
        heads,
        grid=grid,
        window=config.window_size,
        shifted=shifted,
        qkv_bias=config.qkv_bias,
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
