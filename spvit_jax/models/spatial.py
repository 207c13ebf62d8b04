"""Gain G and bias B of attention, as functions of the offset between two patches.

`SpatialPrior` is SP-ViT's learned gain, `LocalityMask` MaiT's neighbourhood, `RelativePositionBias`
Swin's learned bias. The grid of patches and the number of prefix tokens are arguments, and
never guessed. How G and B enter attention is in `attention.py`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spvit_jax.errors import InputError
from spvit_jax.models.initializers import linear_kernel

Grid = tuple[int, int]  # (h, w): rows and columns of patches


def offsets(grid: Grid) -> np.ndarray:
    """Returns the distinct offsets between two patches of a grid.

    Args:
      grid: rows and columns of patches (h, w).

    Returns:
      [2h-1, 2w-1, 2] float32 of (dx, dy) in whole patches; dy = row - (h-1), dx = column - (w-1).
    """
    h, w = grid
    dy, dx = np.meshgrid(np.arange(1 - h, h), np.arange(1 - w, w), indexing="ij")
    return np.stack([dx, dy], axis=-1).astype(np.float32)


def toeplitz(table: jax.Array) -> jax.Array:
    """Expands a table over offsets to a matrix over pairs of patches, exactly.

    Args:
      table: [H, 2h-1, 2w-1], the value at each offset in the order of `offsets`.

    Returns:
      [H, N, N] with N = h·w and entry [i, j] the value at the offset from patch i to patch j.
    """
    heads, h, w = table.shape[0], (table.shape[1] + 1) // 2, (table.shape[2] + 1) // 2
    rows = jnp.stack([table[..., w - 1 - x : 2 * w - 1 - x] for x in range(w)], axis=2)
    # A query's keys are consecutive in (dy, xj): copies that use all lanes of a TPU.
    rows = rows.swapaxes(1, 2).reshape(heads, w, (2 * h - 1) * w)  # [H, xi, (dy, xj)]
    places = [slice((h - 1 - y) * w, (2 * h - 1 - y) * w) for y in range(h)]
    return jnp.concatenate([rows[..., place] for place in places], axis=1)


def pad_prefix(matrix: jax.Array, num_prefix: int, value: float) -> jax.Array:
    """Adds rows and columns of `value` for prefix tokens: [H, N, N] to [H, P+N, P+N]."""
    if num_prefix == 0:
        return matrix
    width = ((0, 0), (num_prefix, 0), (num_prefix, 0))
    return jnp.pad(matrix, width, constant_values=value)


@jax.jit
def offset_products(w1: jax.Array, offsets: jax.Array) -> jax.Array:
    """Returns the products of weights [H, d, 2] and offsets [2, n]: [H, d, n].

    As sums, since a TPU would round those of matrices to bfloat16; `complexity` counts them.
    """
    return w1[..., :1] * offsets[0] + w1[..., 1:] * offsets[1]


class SpatialPrior(nnx.Module):
    """The learned gain of SP-SA: per head, a two-layer network of the offset (SP-ViT).

    G[h, i, j] = Σ_c w2[h, c] · relu(w1[h, c]·(dx, dy) + b1[h, c]) + b2[h], which starts at 1:
    a fresh layer is plain attention. Parameters w1 [H, d, 2], b1 [H, d], w2 [H, d], b2 [H].
    """

    def __init__(self, num_heads: int, head_dim: int, *, extent: int | None = None, rngs: nnx.Rngs):
        """Creates the prior.

        Args:
          num_heads: number of heads H.
          head_dim: width d of the network of one head.
          extent: if given, offsets are rescaled so that any grid spans what a grid of
            extent × extent spans; None leaves them raw, as in the paper.
          rngs: random keys of the initial w1.
        """
        self.extent = extent
        self.w1 = nnx.Param(linear_kernel(rngs.params(), (num_heads, head_dim, 2), jnp.float32))
        self.b1 = nnx.Param(jnp.zeros((num_heads, head_dim)))
        self.w2 = nnx.Param(jnp.zeros((num_heads, head_dim)))
        self.b2 = nnx.Param(jnp.ones((num_heads,)))

    def table(self, grid: Grid) -> jax.Array:
        """Returns the gain at each distinct offset, [H, 2h-1, 2w-1] float32."""
        delta = offsets(grid)
        if self.extent is not None:
            h, w = grid
            delta = delta * np.array([self.extent / w, self.extent / h])
        w1 = self.w1[...]
        # All offsets on one axis, the last, which fills a TPU's lanes.
        hidden = offset_products(w1, jnp.asarray(delta.reshape(-1, 2).T, w1.dtype))
        hidden = hidden + self.b1[..., None]
        # A sum, as in `offset_products`.
        weighted = (self.w2[..., None] * jax.nn.relu(hidden)).sum(axis=1) + self.b2[..., None]
        return weighted.reshape(-1, *delta.shape[:2])

    def __call__(self, grid: Grid, num_prefix: int = 0) -> jax.Array:
        """Returns the gain G [H, P+N, P+N] float32, with 1 for prefix tokens."""
        return pad_prefix(toeplitz(self.table(grid)), num_prefix, 1.0)


class RelativePositionBias(nnx.Module):
    """Swin's bias (arXiv 2103.14030): per head, one learned number for each offset in a grid.

    Parameter table [H, 2h-1, 2w-1], in the order of `offsets`.
    """

    def __init__(self, num_heads: int, grid: Grid, *, rngs: nnx.Rngs):
        """Creates the bias of a grid, or of a window, of (rows, columns) of patches."""
        h, w = grid
        shape = (num_heads, 2 * h - 1, 2 * w - 1)
        self.table = nnx.Param(linear_kernel(rngs.params(), shape, jnp.float32))

    def __call__(self) -> jax.Array:
        """Returns the bias B [H, N, N] float32 of a grid of N patches."""
        return toeplitz(self.table[...])


@dataclasses.dataclass(frozen=True)
class LocalityMask:
    """MaiT's mask, which restricts some heads of a layer to a neighbourhood of each patch.

    Attributes:
      heads: masked heads, counted from 0, in ascending order.
      radius: radius of the neighbourhood (rows, columns); (1, 1) is 3×3 patches, (1, 2) is 3×5.
      kind: "soft" sets the scores outside to 0 (the paper), "hard" to -inf (its fast variant).
    """

    heads: tuple[int, ...]
    radius: tuple[int, int] = (1, 1)
    kind: str = "soft"

    def __post_init__(self) -> None:
        if self.kind not in ("soft", "hard"):
            raise InputError(f"mask_kind is {self.kind!r}; expected 'soft' or 'hard'")
        if min(self.radius) < 0:
            raise InputError(f"mask_radius is {self.radius}; expected numbers of at least 0")

    def reach(self, grid: Grid) -> tuple[int, int]:
        """Returns the radius of the neighbourhood (rows, columns) where the grid is no smaller."""
        return min(self.radius[0], grid[0] - 1), min(self.radius[1], grid[1] - 1)

    def neighbourhood(self, grid: Grid, num_prefix: int = 0) -> jax.Array:
        """Returns M [P+N, P+N] bool: whether a key is near a query; prefix tokens always are."""
        h, w = grid
        y, x = jnp.divmod(jnp.arange(h * w), w)
        near = (jnp.abs(y[:, None] - y) <= self.radius[0]) & (
            jnp.abs(x[:, None] - x) <= self.radius[1]
        )
        return pad_prefix(near[None], num_prefix, True)[0]

    def gain(self, num_heads: int, grid: Grid, num_prefix: int = 0) -> jax.Array:
        """Returns the soft mask as a gain [H, P+N, P+N] float32: 0 far away in a masked head."""
        return jnp.where(self._removed(num_heads, grid, num_prefix), 0.0, 1.0)

    def bias(self, num_heads: int, grid: Grid, num_prefix: int = 0) -> jax.Array:
        """Returns the hard mask as a bias [H, P+N, P+N] float32: -inf far away, else 0."""
        return jnp.where(self._removed(num_heads, grid, num_prefix), -jnp.inf, 0.0)

    def _removed(self, num_heads: int, grid: Grid, num_prefix: int) -> jax.Array:
        masked = jnp.asarray(np.isin(np.arange(num_heads), self.heads))
        return masked[:, None, None] & ~self.neighbourhood(grid, num_prefix)
