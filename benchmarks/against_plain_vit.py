"""Compares the expected step of our DeiT-S with that of a plain ViT-S of flax's own parts.

    pip install -r requirements-tpu.txt
    python -m benchmarks.against_plain_vit --topology=v5e:2x2 --depth=4
    python -m benchmarks.against_plain_vit --topology=v6e:2x2 --depth=12

Both in bfloat16, with as many images, without augmentation; ours with its optimizer, moving average
and drop path. Fields of our configuration can be given, such as `--config.model.scan=False`.
"""

from __future__ import annotations

from absl import app, flags
from ml_collections import config_flags

from benchmarks import plain_vit
from benchmarks.calibrate import clock_of
from spvit_jax import plan
from spvit_jax.preflight import launch_checks, libtpu
from spvit_jax.preflight.clock import Clock
from spvit_jax.preflight.roofline import compile_train_step
from spvit_jax.preflight.topology import get_topology

CONFIG = config_flags.DEFINE_config_file("config", "configs/deit.py:s")
TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "Chips to compile for.")
DEPTH = flags.DEFINE_integer("depth", 4, "Number of blocks of both.", 1)
BATCH = flags.DEFINE_integer("batch", 512, "Images of a step, over all chips.", 1)


def line(name: str, clock: Clock) -> str:
    """Returns the line of the table for one model."""
    seconds = clock.seconds
    return f"| {name} | {1000 * seconds:.2f} | {BATCH.value / seconds:,.0f} |"


def main(argv: list[str]) -> None:
    """Runs `python -m benchmarks.against_plain_vit`: a table of two lines, and their ratio."""
    del argv
    libtpu.prepare()
    topology = get_topology(TOPOLOGY.value)
    print(f"{DEPTH.value} blocks, {BATCH.value} images on {topology.name}, bfloat16\n")
    print("| step of | ms expected | images/s |\n|---|---|---|")
    program = plain_vit.train_step(
        "S", topology.devices, batch_size=BATCH.value, dtype="bfloat16", depth=DEPTH.value
    )
    plain = clock_of(program, topology.chip, len(topology.devices))
    print(line("plain ViT-S", plain), flush=True)

    config = CONFIG.value
    data, _ = launch_checks.check_data(config)
    changes = {
        "model.depth": DEPTH.value,
        "model.dtype": "bfloat16",
        "data.batch_size": BATCH.value,
        "augment.rand_augment": "",
        "augment.erase": 0.0,
        "augment.mixup": 0.0,
        "augment.cutmix": 0.0,
    }
    run = plan.training_run(config, data, changes, devices=topology.devices)
    ours = compile_train_step(run, topology.chip).clock
    print(line(config.model.name, ours))
    print(f"\nours is {plain.seconds / ours.seconds:.2f} times as fast; by its parts, ms:")
    for part, seconds in ours.by_part.items():
        print(f"  {part:<28}{1000 * seconds:9.3f}")
    for one in ours.large:
        print(f"  {100 * one.seconds / ours.seconds:.1f}% {one.name}, {one.part}, {one.place}")


if __name__ == "__main__":
    app.run(main)
