"""A plain ViT of flax's own parts (Linen), its train step and its inference, to compare with.

Like the ViT of github.com/google-research/big_vision (arXiv 2205.01580): fixed sine and cosine
positions, no class token, the mean of all tokens, parameters and LayerNorm in float32, the rest in
the dtype of the products.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Width and heads of the sizes; each is twelve blocks deep, L twenty-four (arXiv 2010.11929).
WIDTHS = {"S": (384, 6, 12), "B": (768, 12, 12), "L": (1024, 16, 24)}
NUM_CLASSES = 1000


class Block(nn.Module):
    """A pre-norm transformer block, [B, N, D] to the same."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.LayerNorm()(x)
        x += nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype)(y, y)
        y = nn.LayerNorm()(x)
        y = nn.gelu(nn.Dense(4 * x.shape[-1], dtype=self.dtype)(y))
        return x + nn.Dense(x.shape[-1], dtype=self.dtype)(y)


class PlainViT(nn.Module):
    """A ViT with patches of 16×16 pixels, images [B, h, w, 3] to logits [B, C]."""

    width: int
    heads: int
    depth: int
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.Conv(self.width, (16, 16), (16, 16), "VALID", dtype=self.dtype)(images)
        positions = _positions(x.shape[1:3], self.width).astype(self.dtype)
        x = x.reshape(x.shape[0], -1, self.width) + positions
        for _ in range(self.depth):
            x = Block(self.heads, self.dtype)(x)
        x = nn.tanh(nn.Dense(self.width)(nn.LayerNorm()(x).mean(1)))
        return nn.Dense(NUM_CLASSES)(x)


def _positions(grid: Sequence[int], width: int) -> np.ndarray:
    """Returns the sines and cosines of each position of a grid, float32 [h·w, D]."""
    rows, columns = np.mgrid[: grid[0], : grid[1]].reshape(2, -1, 1)
    rates = 10_000.0 ** -np.linspace(0, 1, width // 4)
    waves = [wave(at * rates) for at in (columns, rows) for wave in (np.sin, np.cos)]
    return np.concatenate(waves, axis=1).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function, and its arguments as shapes with shardings."""

    function: Any
    arguments: tuple[Any, ...]

    def compile(self) -> jax.stages.Compiled:
        """Compiles the program for the devices of its arguments."""
        return self.function.lower(*self.arguments).compile()


def inference(size: str, devices: Sequence[Any], *, batch_size: int, dtype: str) -> Program:
    """Returns the classification of a batch of images of 224 pixels.

    Args:
      size: "S", "B" or "L".
      devices: devices that share the batch; each has all weights.
      batch_size: images over all devices.
      dtype: dtype of the products.
    """
    model = PlainViT(*WIDTHS[size], jnp.dtype(dtype))
    whole, split = _shardings(devices)
    arguments = _placed(_parameters(model), whole), _images(batch_size, split)
    return Program(jax.jit(model.apply, out_shardings=split), arguments)


def train_step(
    size: str, devices: Sequence[Any], *, batch_size: int, dtype: str, depth: int | None = None
) -> Program:
    """Returns a step of training at 224 pixels: gradients, their norm clipped, Adam.

    Args:
      size: "S", "B" or "L".
      devices: devices that share the batch; each has all weights.
      batch_size: images over all devices.
      dtype: dtype of the products.
      depth: number of blocks; the size's own if None.
    """
    width, heads, own_depth = WIDTHS[size]
    model = PlainViT(width, heads, depth or own_depth, jnp.dtype(dtype))
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(mu_dtype=jnp.bfloat16),
        optax.add_decayed_weights(1e-4),
        optax.scale(-1e-3),
    )

    def step(params: Any, state: Any, images: jax.Array, targets: jax.Array) -> tuple[Any, ...]:
        def loss_of(params: Any) -> jax.Array:
            logits = model.apply(params, images)
            return optax.softmax_cross_entropy(logits, targets).mean()

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    whole, split = _shardings(devices)
    params = _parameters(model)
    state = _placed(jax.eval_shape(optimizer.init, params), whole)
    targets = jax.ShapeDtypeStruct((batch_size, NUM_CLASSES), jnp.float32, sharding=split)
    arguments = _placed(params, whole), state, _images(batch_size, split), targets
    return Program(jax.jit(step, donate_argnums=(0, 1), out_shardings=whole), arguments)


def _parameters(model: PlainViT) -> Any:
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))


def _images(batch_size: int, split: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch_size, 224, 224, 3), jnp.float32, sharding=split)


def _shardings(devices: Sequence[Any]) -> tuple[NamedSharding, NamedSharding]:
    mesh = Mesh(np.array(devices), ("data",))
    return NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))


def _placed(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
