"""Compares the speeds that preflight's clock expects of hierarchical MaiT and of our Swin on TPUs.

    pip install -r requirements-tpu.txt
    python -m benchmarks.pyramid_clock --sizes=t --pixels=224 --topology=v5e:2x2

Compiles, for one chip, the inference of a batch or the gradient of all weights (`--gradient`) in
bfloat16, and prints the expected time and images per second of each, and MaiT's over Swin's.
MaiT's kernels count by their `CostEstimate`; what their instruction bundles add is in docs/mait.md.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.calibrate import clock_of
from benchmarks.plain_vit import Program
from spvit_jax.models import model_config
from spvit_jax.preflight import libtpu
from spvit_jax.preflight.topology import get_topology
from spvit_jax.training import sharding

MODELS = ("mait_pyramid", "swin")


def expected_seconds(
    name: str, pixels: int, batch: int, topology_name: str, *, gradient: bool
) -> float:
    """Returns the expected seconds of a model on one chip of a topology.

    Args:
      name: name of the model.
      pixels: side of the images.
      batch: number of images.
      topology_name: chips that the first of is compiled for.
      gradient: whether to compile the gradient of the logits' mean square, or the logits.
    """
    topology = get_topology(topology_name)
    mesh = sharding.make_mesh(1, 1, devices=topology.devices[:1])
    whole = NamedSharding(mesh, P())
    graphdef, params = nnx.split(model_config(name, image_size=pixels, dtype="bfloat16").abstract())

    def shape_of(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)

    def logits(params: nnx.State, images: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params).outputs(images).logits

    def loss(params: nnx.State, images: jax.Array) -> jax.Array:
        return jnp.mean(logits(params, images) ** 2)

    images = shape_of(jax.ShapeDtypeStruct((batch, pixels, pixels, 3), jnp.bfloat16))
    with jax.set_mesh(mesh):
        function = jax.jit(jax.grad(loss) if gradient else logits)
        program = Program(function, (jax.tree.map(shape_of, params), images))
        return clock_of(program, topology.chip, 1).seconds


def main(argv: list[str]) -> None:
    """Runs `python -m benchmarks.pyramid_clock`: a line for each size and resolution."""
    del argv
    args = flags.FLAGS
    libtpu.prepare()
    jax.config.update("jax_enable_compilation_cache", False)
    what = "gradient" if args.gradient else "inference"
    print(f"{what} of {args.batch} images on a chip of {args.topology}, bfloat16\n")
    print("| | MaiT, ms | images/s | Swin, ms | images/s | MaiT / Swin |")
    print("|---|---|---|---|---|---|", flush=True)
    for size, pixels in itertools.product(args.sizes, map(int, args.pixels)):
        seconds = [
            expected_seconds(
                f"{model}_{size}", pixels, args.batch, args.topology, gradient=args.gradient
            )
            for model in MODELS
        ]
        cells = [f"{1000 * s:.1f} | {args.batch / s:,.0f}" for s in seconds]
        ratio = seconds[1] / seconds[0]
        print(f"| {size}, {pixels} | {' | '.join(cells)} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    flags.DEFINE_list("sizes", ["t"], "Sizes of the models: t, s, b.")
    flags.DEFINE_list("pixels", ["224", "384"], "Sides of the images.")
    flags.DEFINE_string("topology", "v5e:2x2", "Chips of which one is compiled for.")
    flags.DEFINE_integer("batch", 128, "Images on the chip.", 1)
    flags.DEFINE_bool("gradient", False, "Compile the gradient in place of the inference.")
    app.run(main)
