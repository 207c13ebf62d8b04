"""Times the attention of one SP-SA layer, forward and backward, against two alternatives.

    python -m benchmarks.attention

Three variants of the same layer (SP-ViT-S's width, in one process, alternating): plain attention
without a gain; SP-SA with the gain evaluated once per distinct offset and expanded; and SP-SA
with the gain evaluated for every pair of patches, as its definition reads. Prints the median
times and their ratios.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from flax import nnx

from spvit_jax.models.attention import Attention, attention
from spvit_jax.models.spatial import Grid, SpatialPrior

_DIM, _HEADS = 384, 6


def pairwise_gain(prior: SpatialPrior | None, grid: Grid) -> jax.Array:
    """Returns the gain [H, N, N] by evaluating the prior's network for each pair of patches."""
    assert prior is not None
    h, w = grid
    y, x = jnp.divmod(jnp.arange(h * w), w)
    delta = jnp.stack([x[None, :] - x[:, None], y[None, :] - y[:, None]], -1).astype(jnp.float32)
    hidden = jnp.einsum("nmk,hdk->hdnm", delta, prior.w1[...])
    hidden = jax.nn.relu(hidden + prior.b1[...][:, :, None, None])
    gain = jnp.einsum("hdnm,hd->hnm", hidden, prior.w2[...])
    return gain + prior.b2[...][:, None, None]


def variants(grid: Grid, batch: int) -> dict[str, Callable[[], object]]:
    """Returns the three variants of the layer, compiled, as functions without arguments."""
    layer = Attention(_DIM, _HEADS, qkv_bias=False, spatial_prior=True, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(layer)
    x = jax.random.normal(jax.random.key(1), (batch, grid[0] * grid[1], _DIM))

    def loss(params: nnx.State, x: jax.Array, kind: str) -> jax.Array:
        module = nnx.merge(graphdef, params)
        gain = {
            "plain": lambda: None,
            "table": lambda: module.gain(grid),
            "pairwise": lambda: pairwise_gain(module.prior, grid),
        }[kind]()
        qkv = module.qkv(x).reshape(*x.shape[:-1], 3, _HEADS, -1)
        out = attention(qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :], gain)
        return jnp.sum(module.proj(out.reshape(x.shape)) ** 2)

    def compiled(kind: str) -> Callable[[], object]:
        gradient = jax.jit(jax.grad(lambda params, x: loss(params, x, kind), argnums=(0, 1)))
        run = gradient.lower(params, x).compile()
        return lambda: jax.block_until_ready(run(params, x))

    return {kind: compiled(kind) for kind in ("plain", "table", "pairwise")}


def measure(grid: Grid, batch: int, rounds: int) -> dict[str, float]:
    """Returns the median seconds of each variant; the variants alternate."""
    calls = variants(grid, batch)
    times: dict[str, list[float]] = {kind: [] for kind in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for kind, call in calls.items():
            start = time.perf_counter()
            call()
            times[kind].append(time.perf_counter() - start)
    return {kind: statistics.median(values) for kind, values in times.items()}


def main(argv: list[str]) -> None:
    """Runs `python -m benchmarks.attention`: prints a row for each of two grids."""
    del argv
    logging.set_verbosity(logging.ERROR)  # or JAX says which accelerators it did not find
    print(f"forward and backward, {_HEADS} heads of {_DIM // _HEADS} channels, float32, ", end="")
    print(f"{jax.devices()[0].device_kind}; milliseconds, medians of {flags.FLAGS.rounds}")
    for grid, batch in (((14, 14), 8), ((24, 24), 4)):
        times = measure(grid, batch, flags.FLAGS.rounds)
        row = {
            "grid": f"{grid[0]}×{grid[1]}",
            "images": batch,
            **{kind: round(1e3 * seconds, 1) for kind, seconds in times.items()},
            "table/plain": round(times["table"] / times["plain"], 2),
            "pairwise/table": round(times["pairwise"] / times["table"], 2),
        }
        print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    flags.DEFINE_integer("rounds", 11, "Times that each variant is run.")
    app.run(main)
