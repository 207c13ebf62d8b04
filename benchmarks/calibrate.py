"""Compares the speeds that preflight's clock expects of plain ViTs with published ones.

    pip install -r requirements-tpu.txt
    python -m benchmarks.calibrate

Compiles three programs of `benchmarks/plain_vit.py` for TPU v3, on which these speeds were
measured, in three minutes of two CPU cores. No other speed of a plain ViT on a TPU was found that
says on which: LiT's model card (1,200 images/s of two B/16) names no TPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from absl import app
from jax.experimental import topologies

from benchmarks import plain_vit
from spvit_jax.preflight import hlo, libtpu
from spvit_jax.preflight.clock import Clock, read_clock
from spvit_jax.preflight.collectives import collectives
from spvit_jax.preflight.topology import Chip

TOPOLOGY = "v3:2x2"  # eight cores
# A core of TPU v3, half of a chip, by docs.cloud.google.com/tpu/docs/v3: 123 TFLOPs, 32 GiB and 900
# GB/s per chip, and 340 TB/s of all-reduces in 1,024 of them.
CORE = Chip(
    name="v3",
    hbm=16 * 2**30,
    usable_hbm=15.48 * 2**30,
    hbm_bandwidth=450e9,
    flops=61.5e12,
    macs_per_cycle=2 * 128**2,
    ici_bandwidth=340e12 / 2048,
    dcn_bandwidth=None,
    shapes=("2x2",),
    most_chips=1024,
    devices=2,
)


@dataclasses.dataclass(frozen=True)
class Published:
    """A published speed of a plain ViT in float32.

    Attributes:
      what: what is measured, and on how many cores.
      make: function of `plain_vit` that makes the program.
      size: size of the model.
      batch_size: images of a step.
      cores: cores that share them.
      least: images/s, or the least where it is a range.
      most: the most.
      source: where it is published.
    """

    what: str
    make: Callable[..., plain_vit.Program]
    size: str
    batch_size: int
    cores: int
    least: float
    most: float
    source: str


# 90 epochs of 99% of ImageNet-1K's 1,281,167 images in 6 to 7 hours.
_IMAGES = 90 * 0.99 * 1_281_167
PUBLISHED = (
    Published(
        "S/16, training, 8 cores",
        *(plain_vit.train_step, "S", 1024, 8),
        _IMAGES / (7 * 3600),
        _IMAGES / (6 * 3600),
        "google-research/big_vision, configs/vit_s16_i1k.py: 6-7 h for 90 epochs on a TPU-v3-8",
    ),
    Published(
        "B/16, inference, 1 core",
        *(plain_vit.inference, "B", 64, 1),
        861,
        861,
        "MLP-Mixer (arXiv 2105.01601), table 3, images/s/core; from memory",
    ),
    Published(
        "L/16, inference, 1 core",
        *(plain_vit.inference, "L", 64, 1),
        280,
        280,
        "MLP-Mixer (arXiv 2105.01601), table 3, images/s/core; from memory",
    ),
)


def clock_of(program: plain_vit.Program, chip: Chip, devices: int) -> Clock:
    """Returns the expected time of a program that is compiled for devices of one axis."""
    compiled = hlo.parse(program.compile().as_text() or "")
    return read_clock(compiled, chip, collectives(compiled, {"data": devices}))


def main(argv: list[str]) -> None:
    """Runs `python -m benchmarks.calibrate`: a line for each published speed."""
    del argv
    libtpu.prepare()
    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices
    print("| on TPU v3 | expected, images/s | published | published ÷ expected | source |")
    print("|---|---|---|---|---|")
    for one in PUBLISHED:
        program = one.make(
            one.size, devices[: one.cores], batch_size=one.batch_size, dtype="float32"
        )
        expected = one.batch_size / clock_of(program, CORE, one.cores).seconds
        exact = one.least == one.most
        speed = f"{one.least:,.0f}" if exact else f"{one.least:,.0f} to {one.most:,.0f}"
        ratio = f"{one.least / expected:.2f}" + ("" if exact else f" to {one.most / expected:.2f}")
        print(f"| {one.what} | {expected:,.0f} | {speed} | {ratio} | {one.source} |", flush=True)


if __name__ == "__main__":
    app.run(main)
