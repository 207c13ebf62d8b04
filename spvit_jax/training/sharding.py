"""Where arrays live: the mesh (data, fsdp) and the rules that place every leaf of the state.

The batch is split over both axes; a parameter, and with it its moments and its average, is split
over `fsdp` or replicated, as the first matching rule says. Model code knows of none of this, but
for one line in `models/loop.py` that keeps a batch split by examples.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spvit_jax.errors import InputError, nearest
from spvit_jax.models.naming import map_named

# (pattern of a leaf's name, placement): "split" is over the fsdp axis as `_split` does it,
# "replicate" every device. The rules must match every leaf.
Rules = Sequence[tuple[str, str]]

PRESETS: dict[str, Rules] = {
    "replicated": ((r".*", "replicate"),),
    "fsdp": (
        (r"(^|/)(step|nan_step|count|metrics/.*)$", "replicate"),
        (r"(^|/)(mean|var)$", "replicate"),
        (r"(^|/)(kernel|bias|scale|gamma|w1|b1|w2|b2|table)$", "split"),
        (r"(^|/)(pos_embed|cls_token|dist_token)$", "split"),
    ),
}


def make_mesh(data: int, fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges the devices in a mesh of two axes, data over the slices of a pod.

    Args:
      data: size of the axis over which parameters are replicated; -1 for all that fsdp leaves.
      fsdp: size of the axis over which parameters are split.
      devices: all of this run's if not given.

    Raises:
      InputError: data · fsdp is not the number of devices, or fsdp does not divide a slice.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if data == -1 and fsdp > 0 and count % fsdp == 0:
        data = count // fsdp
    if data < 1 or data * fsdp != count:
        raise InputError(
            f"mesh.data={data} and mesh.fsdp={fsdp} do not make up the {count} devices; "
            "their product must, and mesh.data=-1 takes what fsdp leaves"
        )
    axis_types = (AxisType.Auto, AxisType.Auto)
    return Mesh(_arrange(devices, data, fsdp), ("data", "fsdp"), axis_types)


def _arrange(devices: Sequence[Any], data: int, fsdp: int) -> np.ndarray:
    """Returns the devices as [data, fsdp], each slice of a pod in rows of its own.

    Between slices there is only the network of the data center, which carries the gradients, once
    per step; parameters, which are gathered in each layer, stay on the links within a slice.

    Raises:
      InputError: an fsdp axis would span slices.
    """
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(slice_of(device), []).append(device)
    sizes = {len(members) for members in slices.values()}
    if len(sizes) > 1 or sizes.pop() % fsdp:
        described = ", ".join(str(len(members)) for _, members in sorted(slices.items()))
        raise InputError(
            f"mesh.fsdp={fsdp} does not fit into the {len(slices)} slices, which have {described} "
            "devices; it must divide each, and all must have as many"
        )
    rows = [
        mesh_utils.create_device_mesh(
            (data // len(slices), fsdp), members, allow_split_physical_axes=True
        )
        for _, members in sorted(slices.items())
    ]
    return np.concatenate(rows)


def num_slices(mesh: Mesh) -> int:
    """Returns over how many slices of a pod a mesh goes."""
    return len({slice_of(device) for device in mesh.devices.flat})


def slice_of(device: Any) -> int:
    """Returns the number of the slice that a device is in; 0 on machines that know of none."""
    return getattr(device, "slice_index", None) or 0


def check_preset(preset: str) -> None:
    """Raises an `InputError` if there is no such preset of shardings."""
    if preset not in PRESETS:
        raise InputError(f"unknown mesh.sharding {preset!r}{nearest(preset, PRESETS)}")


def state_shardings(state: Any, mesh: Mesh, preset: str) -> Any:
    """Returns a pytree of shardings like `state`.

    Args:
      state: a pytree of arrays or of their shapes, with leaf names as in `naming.leaf_name`.
      mesh: from `make_mesh`.
      preset: one of `PRESETS`.

    Raises:
      InputError: there is no such preset.
      ValueError: a leaf matches none of its rules.
    """
    check_preset(preset)
    rules = PRESETS[preset]

    def place(name: str, leaf: Any) -> NamedSharding:
        for pattern, placement in rules:
            if re.search(pattern, name):
                is_split = placement == "split" and mesh.shape["fsdp"] > 1
                return _split(leaf.shape, mesh) if is_split else NamedSharding(mesh, P())
        raise ValueError(f"no sharding rule of preset {preset!r} matches {name!r}; add one")

    return map_named(place, state)


def abstract(create: Callable[[], Any], mesh: Mesh, preset: str) -> tuple[Any, Any]:
    """Returns what `create` would make, as shapes with shardings, and the shardings alone."""
    shapes = jax.eval_shape(create)
    shardings = state_shardings(shapes, mesh, preset)
    placed = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        shardings,
    )
    return placed, shardings


def bytes_held(state: Any, mesh: Mesh) -> tuple[int, int]:
    """Returns the bytes of `state` on a device: of leaves split over all of fsdp, and of others.

    Args:
      state: a pytree of arrays, or of shapes with shardings as `plan` returns them.
      mesh: from `make_mesh`.
    """
    split = rest = 0
    for leaf in jax.tree.leaves(state):
        held = math.prod(leaf.sharding.shard_shape(leaf.shape))
        nbytes = held * leaf.dtype.itemsize
        if held * mesh.shape["fsdp"] == leaf.size:
            split += nbytes
        else:
            rest += nbytes
    return split, rest


def describe(state: Any, mesh: Mesh) -> str:
    """Returns in words how many bytes of `state` a device holds; arguments as of `bytes_held`."""
    split, rest = bytes_held(state, mesh)
    total = f"{(split + rest) / 1e6:,.1f} MB on each device"
    fsdp = mesh.shape["fsdp"]
    if fsdp == 1:
        return f"{total}, nothing split: mesh.fsdp=1"
    return f"{total}: {split / 1e6:,.1f} split by {fsdp}, {rest / 1e6:,.1f} by less or not at all"


def on_mesh(mesh: Mesh, step: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """Returns a step with some settings which, where JAX traces it, has the mesh as context."""

    @functools.wraps(step)
    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(*args, **settings)

    return traced


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: examples over all devices."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def local_parts(mesh: Mesh) -> tuple[tuple[int, ...], int]:
    """Returns the parts of a batch that this process's devices hold, and how many parts there are.

    A batch is cut into a part per device. In a pod's mesh the devices of a process need not stand
    next to each other, and then its parts do not either.
    """
    here = jax.process_index()
    owners = [device.process_index for device in mesh.devices.flat]
    return tuple(part for part, owner in enumerate(owners) if owner == here), mesh.size


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes the global batch of what each process has read: the rows of its `local_parts`."""
    sharding = batch_sharding(mesh)
    return {
        key: jax.make_array_from_process_local_data(sharding, array) for key, array in batch.items()
    }


def round_up(batch_size: int, mesh: Mesh) -> int:
    """Returns the smallest batch size from `batch_size` on that splits over the devices."""
    return -(-max(batch_size, 1) // mesh.size) * mesh.size


def check_batch_size(batch_size: int, mesh: Mesh, accumulate: int) -> None:
    """Raises an `InputError` if a batch cannot be split evenly over the devices."""
    parts = mesh.size * accumulate
    if batch_size < 1 or batch_size % parts:
        raise InputError(
            f"data.batch_size is {batch_size}; expected a multiple of {parts}: {mesh.size} devices"
            + (f" times {accumulate} micro-batches" if accumulate > 1 else "")
        )


def _split(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Splits the largest dimension that divides over the fsdp axis, the first of equals.

    Where none does, as 384 does not by 256, the axis itself is cut in factors, one for each
    dimension, as many as there are; over what is then left of it the array is replicated.
    """
    parts = mesh.shape["fsdp"]
    dimensions = sorted(range(len(shape)), key=lambda dimension: -shape[dimension])
    factors = {d: parts for d in dimensions if shape[d] and shape[d] % parts == 0}
    if factors:
        return NamedSharding(mesh, P(*(None,) * next(iter(factors)), "fsdp"))
    if len(shape) < 2:  # gathering a part of a vector takes longer than memory for it is worth
        return NamedSharding(mesh, P())
    for dimension in dimensions:
        factor = math.gcd(shape[dimension], parts)
        if factor > 1:
            factors[dimension] = factor
            parts //= factor
    names = {dimension: f"fsdp{dimension}" for dimension in factors}
    devices = mesh.devices.reshape(mesh.shape["data"], *factors.values(), parts)
    axis_types = (AxisType.Auto,) * devices.ndim
    finer = Mesh(devices, ("data", *names.values(), "fsdp_rest"), axis_types=axis_types)
    return NamedSharding(finer, P(*map(names.get, range(max(factors, default=-1) + 1))))
