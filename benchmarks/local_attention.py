"""Times masked heads at linear cost against the N×N matrix, on grids that double.

    python -m benchmarks.local_attention

One layer of soft masked heads on images with a class token, as many as have 56×56 patches in all,
once with `attention="local"` and once with "xla". Prints the CPU time (of all threads, which other
programs do not change as they change the time on the clock) and the multiply-adds per token of
each, and how many times faster the one is. Linear cost is the same number per token on every grid.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from flax import nnx

from spvit_jax.models.attention import Attention
from spvit_jax.models.complexity import macs_of
from spvit_jax.models.implementation import Implementation
from spvit_jax.models.spatial import Grid, LocalityMask

_DIM, _HEADS = 96, 3  # of the first stage of Swin-T, whose grid is 56×56 at 224 pixels


def layer(
    grid: Grid, implementation: Implementation
) -> tuple[Callable[..., jax.Array], nnx.State, jax.Array]:
    """Returns attention of masked heads as a function of its parameters and tokens, and both."""
    module = Attention(
        _DIM,
        _HEADS,
        qkv_bias=True,
        mask=LocalityMask(tuple(range(_HEADS))),
        implementation=implementation,
        rngs=nnx.Rngs(0),
    )
    graphdef, params = nnx.split(module)
    images = 56 * 56 // (grid[0] * grid[1])
    x = jax.random.normal(jax.random.key(0), (images, 1 + grid[0] * grid[1], _DIM))
    return lambda params, x: nnx.merge(graphdef, params)(x, grid, 1), params, x


def seconds(call: Callable[[], object], rounds: int) -> float:
    """Returns the median CPU time of a call, after a first one."""
    call()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times)


def measure(grid: Grid, implementation: Implementation, rounds: int) -> dict[str, float]:
    """Returns the times and the multiply-adds per token of a layer on a grid."""
    function, params, x = layer(grid, implementation)
    forward = jax.jit(function)
    backward = jax.jit(jax.grad(lambda *args: jnp.sum(function(*args) ** 2), argnums=(0, 1)))
    return {
        "forward": seconds(lambda: jax.block_until_ready(forward(params, x)), rounds),
        "both": seconds(lambda: jax.block_until_ready(backward(params, x)), rounds),
        "macs": macs_of(function, params, x) / (x.shape[0] * x.shape[1]),
    }


def main(argv: list[str]) -> None:
    """Runs `python -m benchmarks.local_attention`: prints a row for each grid."""
    del argv
    logging.set_verbosity(logging.ERROR)  # or JAX says which accelerators it did not find
    print(f"{_HEADS} masked heads of {_DIM // _HEADS} channels, {jax.devices()[0].device_kind}")
    print("µs per token forward and with backward, MACs per token; of each: local, xla")
    for side in (14, 28, 56):
        kinds: tuple[Implementation, ...] = ("local", "xla")
        rows = {name: measure((side, side), name, flags.FLAGS.rounds) for name in kinds}
        tokens = (1 + side * side) * (56 * 56 // side**2)
        cells = [
            f"{rows[name][what] * (1 if what == 'macs' else 1e6 / tokens):10.1f}"
            for what in ("forward", "both", "macs")
            for name in rows
        ]
        faster = rows["xla"]["forward"] / rows["local"]["forward"]
        both = rows["xla"]["both"] / rows["local"]["both"]
        print(f"{side}×{side}  {' '.join(cells)}   {faster:.1f} and {both:.1f} times faster")


if __name__ == "__main__":
    flags.DEFINE_integer("rounds", 7, "Times that each is run; the median counts.")
    app.run(main)
