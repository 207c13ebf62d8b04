"""Sharding: the mesh (data, fsdp), and the rules that place every leaf of the train state.

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

# (pattern of a leaf's name, placement): "split" over the fsdp axis as `_split` does it, or
# "replicate" on every device. The rules must match every leaf.
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
    """Returns a mesh of two axes, data and fsdp, with the slices of a pod along data.

    Args:
      data: size of the axis over which parameters are replicated; -1 for devices / fsdp.
      fsdp: size of the axis over which parameters are split.
      devices: devices of the mesh; all of this run's if not given.

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
    """Returns the number of slices of a pod that a mesh spans."""
    return len({slice_of(device) for device in mesh.devices.flat})


def platform(mesh: Mesh) -> str:
    """Returns the platform of a mesh's devices, such as "tpu"."""
    return mesh.devices.flat[0].platform


def slice_of(device: Any) -> int:
    """Returns the index of the slice that a device is in; 0 on machines without slices."""
    return getattr(device, "slice_index", None) or 0


def check_preset(preset: str) -> None:
    """Raises an `InputError` if there is no such preset of shardings."""
    if preset not in PRESETS:
        raise InputError(f"unknown mesh.sharding {preset!r}{nearest(preset, PRESETS)}")


def state_shardings(state: Any, mesh: Mesh, preset: str) -> Any:
    """Returns the shardings of a pytree's leaves, as a pytree like it.

    Args:
      state: pytree of arrays or of their shapes, with leaf names as in `naming.leaf_name`.
      mesh: mesh from `make_mesh`.
      preset: name of the rules in `PRESETS`.

    Raises:
      InputError: there is no such preset.
      ValueError: a leaf matches none of the preset's rules.
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
    """Returns the result of `create` as shapes with shardings, and the shardings alone.

    Args:
      create: function that returns a pytree of arrays; only traced.
      mesh: mesh from `make_mesh`.
      preset: name of the rules in `PRESETS`.

    Raises:
      InputError, ValueError: as `state_shardings`.
    """
    shapes = jax.eval_shape(create)
    shardings = state_shardings(shapes, mesh, preset)
    placed = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
    return placed, shardings


def bytes_held(state: Any, mesh: Mesh) -> tuple[int, int]:
    """Returns the bytes of `state` on a device: of leaves split over all of fsdp, and of others.

    Args:
      state: pytree of arrays, or of shapes with shardings as `abstract` returns them.
      mesh: mesh from `make_mesh`.
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
    """Returns a line of text with the bytes of `state` per device; arguments as `bytes_held`."""
    split, rest = bytes_held(state, mesh)
    total = f"{(split + rest) / 1e6:,.1f} MB on each device"
    fsdp = mesh.shape["fsdp"]
    if fsdp == 1:
        return f"{total}, nothing split: mesh.fsdp=1"
    return f"{total}: {split / 1e6:,.1f} split by {fsdp}, {rest / 1e6:,.1f} by less or not at all"


def on_mesh(mesh: Mesh, step: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """Returns a function of a step's positional arguments, to be traced in the context of a mesh.

    Args:
      mesh: mesh that the step sees as `jax.sharding.get_abstract_mesh()`.
      step: function of arrays and of settings.
      **settings: keyword arguments of the step.
    """

    @functools.wraps(step)
    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(*args, **settings)

    return traced


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: examples over all devices."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def local_parts(mesh: Mesh) -> tuple[tuple[int, ...], int]:
    """Returns the parts of a batch that this process's devices hold, and the number of parts.

    A batch is split into one part per device. In a pod's mesh the devices of a process need not be
    adjacent, and then its parts are not either.
    """
    here = jax.process_index()
    owners = [device.process_index for device in mesh.devices.flat]
    return tuple(part for part, owner in enumerate(owners) if owner == here), mesh.size


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns the global batch from the rows that each process has read, its `local_parts`."""
    sharding = batch_sharding(mesh)
    return {
        key: jax.make_array_from_process_local_data(sharding, array) for key, array in batch.items()
    }


def round_up(batch_size: int, mesh: Mesh) -> int:
    """Returns a batch size rounded up to a multiple of the number of devices."""
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
    """Returns a sharding of the largest dimension divisible by the fsdp axis, the first of equals.

    Where none is, as 384 is not by 256, the axis itself is factored, one factor for each dimension
    that shares one; the array is replicated over the rest of the axis.
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
