"""Figures of TPU chips, and topologies by names such as `v5e:16x16`."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from spvit_jax.errors import InputError, nearest
from spvit_jax.training.sharding import slice_of

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one TPU chip, or of one device where a chip is several.

    Attributes:
      name: kind of chip, the first part of a topology's name.
      hbm: bytes of HBM, by the documentation.
      usable_hbm: bytes of HBM that the compiler gives to a program; the runtime keeps the rest.
      hbm_bandwidth: bytes/s between HBM and the chip.
      flops: bfloat16 FLOPs/s, two per multiply-add.
      macs_per_cycle: multiply-adds of all matrix units in one cycle.
      ici_bandwidth: bytes/s that leave the chip over all its links to other chips together.
      dcn_bandwidth: bytes/s that leave the chip for other slices, over the data center's network;
        None where it is not known.
      shapes: shapes of slices, in chips.
      most_chips: chips in the largest slice; slices of cubes of 4×4×4 come in more shapes than
        `shapes`.
      options: options of the compiler with which one device is one chip.
      devices: devices of a chip; all other figures are of one of them.
    """

    name: str
    hbm: float
    usable_hbm: float
    hbm_bandwidth: float
    flops: float
    macs_per_cycle: int
    ici_bandwidth: float
    dcn_bandwidth: float | None
    shapes: tuple[str, ...]
    most_chips: int
    options: tuple[tuple[str, str], ...] = ()
    devices: int = 1

    @property
    def hertz(self) -> float:
        """Cycles per second: those with which all matrix units together do `flops`."""
        return self.flops / (2 * self.macs_per_cycle)


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")

# From "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x" in Google's documentation of Cloud TPU
# (docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p-training, /v6e, /tpu7x), read in November 2026.
# ICI: half of the "bidirectional bandwidth per chip"; for v4, which has none there, of six links of
# 50 GB/s (arXiv 2304.01433); TPU7x's is from memory. DCN: of v5p the figure per chip, 50 Gbit/s; of
# v5e and v6e that of a pod, 6.4 and 25.6 Tbit/s, over its 256 chips. Usable memory: what libtpu
# 0.0.42 names as available when a program needs more. Multiply-adds per cycle: by the compiler's
# own cycles, which for a product of 8192³ come to 70% (v6e), 80% (TPU7x) and 88 to 93% of these;
# v6e's two units of 256×256, as Google counts them, could not do what the compiler says of them.
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            *("v4", 32 * GIB, 30.75 * GIB, 1.2e12, 275e12, 8 * 128**2, 300e9, None, _CUBIC, 4096),
            (("chip_config_name", "megacore"),),
        ),
        Chip(
            *("v5e", 16 * GIB, 15.75 * GIB, 819e9, 197e12, 4 * 128**2, 200e9, 3.125e9, _FLAT, 256)
        ),
        Chip(
            *("v5p", 95 * GIB, 95.73 * GIB, 2765e9, 459e12, 8 * 128**2, 600e9, 6.25e9),
            *(_CUBIC, 6144),
        ),
        Chip(
            *("v6e", 32 * GIB, 31.24 * GIB, 1638e9, 918e12, 4 * 256**2, 400e9, 12.5e9, _FLAT, 256)
        ),
        Chip(  # a chip is two devices: half of its figures each
            *("tpu7x", 96 * GIB, 94.75 * GIB, 3690e9, 1153.5e12, 4 * 256**2, 300e9, None),
            *(_CUBIC, 9216),
            devices=2,
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or several TPU slices as the compiler describes them.

    Attributes:
      name: name with the number of slices, such as `v5e:16x16`, or `2 slices of v5e:16x16`.
      chip: peak figures of each chip.
      devices: descriptions of the chips, of which a mesh can be made.
      hosts: number of machines, as the compiler counts them: four chips each.
      slice_name: name of one of the slices.
      num_slices: number of slices.
    """

    name: str
    chip: Chip
    devices: Sequence[jax.Device]
    hosts: int
    slice_name: str
    num_slices: int = 1

    @property
    def chips(self) -> int:
        """Number of chips."""
        return len(self.devices) // self.chip.devices


def get_topology(name: str, num_slices: int = 1) -> Topology:
    """Returns the topology of a name.

    Args:
      name: a chip and a shape in chips, such as `v5e:16x16` or `v5p:2x2x2`.
      num_slices: number of such slices, connected by the data center's network alone.

    Raises:
      InputError: there is no such topology.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        known = [f"{chip.name}:{shape}" for chip in CHIPS.values() for shape in chip.shapes]
        raise InputError(
            f"unknown topology {name!r}; expected one of {', '.join(CHIPS)} and a shape in chips"
            + nearest(name, known)
        )
    chip = CHIPS[kind]
    if shape not in chip.shapes and not _of_cubes(chip, shape):
        closest = min(chip.shapes, key=lambda known: abs(_count(known) - _count(shape)))
        raise InputError(
            f"unknown topology {name!r}; {kind} comes in {', '.join(chip.shapes)}"
            + (", and in more cubes of 4x4x4" if chip.shapes is _CUBIC else "")
            + f"; did you mean '{kind}:{closest}'?"
        )
    if num_slices > 1 and chip.dcn_bandwidth is None:
        raise InputError(
            f"the bandwidth between slices of {kind} is not known; plan one slice of it, or take "
            + ", ".join(other.name for other in CHIPS.values() if other.dcn_bandwidth is not None)
        )
    options: dict[str, Any] = dict(chip.options)
    if _count(shape) == 1:  # a host has four chips otherwise
        options["chips_per_host_bounds"] = (1, 1, 1)
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=name, num_slices=num_slices, **options
    )
    devices: list[Any] = list(described.devices)
    hosts = len({(slice_of(device), device.process_index) for device in devices})
    full_name = f"{num_slices} slices of {name}" if num_slices > 1 else name
    return Topology(full_name, chip, devices, hosts, name, num_slices)


def _of_cubes(chip: Chip, shape: str) -> bool:
    """Returns whether a shape is made of cubes of 4×4×4 chips, and the chip comes in them."""
    if chip.shapes is not _CUBIC or not re.fullmatch(r"\d+x\d+x\d+", shape):
        return False
    whole = all(int(side) % 4 == 0 for side in shape.split("x"))
    return whole and 0 < _count(shape) <= chip.most_chips


def _count(shape: str) -> int:
    """Returns the number of chips of a shape such as `16x16`, also of text that is no shape."""
    return math.prod(int(side) for side in re.findall(r"\d+", shape))
