"""Resizes a model's weights to another resolution: position embeddings and Swin's bias tables.

SP-ViT's learned gain is a function of the offset and needs no resizing.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spvit_jax.errors import InputError, check_shapes
from spvit_jax.models.base import ModelConfig
from spvit_jax.models.initializers import linear_kernel
from spvit_jax.models.naming import shapes_of
from spvit_jax.models.spatial import Grid
from spvit_jax.models.swin import SwinConfig

_A = -0.75  # parameter of torch's cubic kernel; jax.image.resize has -0.5
HEADS = ("head", "dist_head", "dense_head")  # names of classifier heads in any family
_NEW_HEAD_ADVICE = (
    "to begin with a new head, say so (--num_classes of the convert command, "
    "config.init_new_head of training, new_head=True in Python)"
)


def bicubic_matrix(old: int, new: int) -> np.ndarray:
    """Returns the matrix [new, old] float64 that resizes a line as torch's bicubic does.

    Half-pixel centres (`align_corners=False`), no antialiasing, the border repeated.
    """
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(centre).astype(int) - 1
    matrix = np.zeros((new, old))
    for tap in range(4):
        distance = abs(centre - (first + tap))
        near = ((_A + 2) * distance - (_A + 3)) * distance**2 + 1
        far = ((distance - 5) * distance + 8) * distance * _A - 4 * _A
        weight = np.where(distance <= 1, near, far)
        np.add.at(matrix, (np.arange(new), np.clip(first + tap, 0, old - 1)), weight)
    return matrix


def bicubic(image: jax.Array, size: Grid) -> jax.Array:
    """Resizes [..., h, w, C] to [..., size, C] as `torch.nn.functional.interpolate` does."""
    rows, columns = (
        jnp.asarray(bicubic_matrix(old, new), image.dtype)
        for old, new in zip(image.shape[-3:-1], size, strict=True)
    )
    return jnp.einsum("...hwc,yh,xw->...yxc", image, rows, columns, precision="highest")


def resize_positions(positions: jax.Array, old: Grid, new: Grid, num_prefix: int = 0) -> jax.Array:
    """Resizes a position embedding [1, P+N, D] from one grid to another.

    The rows of P prefix tokens stay as they are.
    """
    prefix, patches = positions[:, :num_prefix], positions[:, num_prefix:]
    image = bicubic(patches.reshape(1, *old, -1), new)
    return jnp.concatenate([prefix, image.reshape(1, new[0] * new[1], -1)], axis=1)


def resize_offset_table(table: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Resizes Swin's table of biases [H, 2h-1, 2w-1] to another window's shape."""
    return bicubic(table[..., None], (shape[1], shape[2]))[..., 0]


def adapt(
    arrays: Mapping[str, Any],
    source: ModelConfig,
    target: ModelConfig,
    where: str = "the source",
    *,
    new_head: bool = False,
) -> dict[str, jax.Array]:
    """Adapts a model's weights to another resolution or class count.

    Args:
      arrays: arrays of the source, as in `naming.arrays_of`; heads may be missing.
      source: configuration of the model that the arrays are of.
      target: configuration of the model to adapt to; heads that are missing or have another number
        of classes are new, as initialised.
      where: name of the source, for an error.
      new_head: whether heads are new even with the same number of classes.

    Returns:
      Arrays with the names and shapes of the target.

    Raises:
      InputError: the models differ in more than resolution and classes.
    """
    check_adaptable(source, target, where)
    shapes = {name: leaf.shape for name, leaf in shapes_of(target).items()}

    def adapt_array(name: str, array: jax.Array) -> jax.Array:
        shape = shapes[name]
        if is_head(name) and (new_head or array.shape != shape):
            return _new_head(name, shape).astype(array.dtype)
        if name == "pos_embed" and source.grid != target.grid:
            num_prefix = array.shape[1] - source.grid[0] * source.grid[1]
            return resize_positions(array, source.grid, target.grid, num_prefix)
        if name.endswith("position/table") and array.shape != shape:
            return resize_offset_table(array, shape)
        return array

    adapted = {name: adapt_array(name, jnp.asarray(array)) for name, array in arrays.items()}
    missing = {name for name in shapes.keys() - arrays.keys() if is_head(name)}
    return adapted | {name: _new_head(name, shapes[name]) for name in missing}


def check_adaptable(source: ModelConfig, target: ModelConfig, where: str) -> None:
    """Raises an `InputError` unless two models differ in resolution and classes alone."""
    changes: dict[str, Any] = {"image_size": target.image_size, "num_classes": target.num_classes}
    if isinstance(source, SwinConfig) and isinstance(target, SwinConfig):
        changes["window"] = target.window
    expected, given = shapes_of(target), shapes_of(dataclasses.replace(source, **changes))
    check_shapes(
        {name: leaf.shape for name, leaf in expected.items()},
        {name: leaf.shape for name, leaf in given.items()},
        where,
    )


def check_classes(
    source: ModelConfig, target: ModelConfig, where: str, *, may_replace: bool
) -> None:
    """Raises an `InputError` if the class counts of two models differ and heads must be kept."""
    if source.num_classes != target.num_classes and not may_replace:
        raise InputError(
            f"{where} has a head of {source.num_classes} classes, and {target.num_classes} are "
            f"asked for; {_NEW_HEAD_ADVICE}"
        )


def check_heads(missing: Collection[str], where: str, *, may_replace: bool) -> None:
    """Raises an `InputError` if weights lack heads and no new ones are allowed."""
    if missing and not may_replace:
        names = ", ".join(sorted(missing))
        raise InputError(f"{where} lacks the weights of {names}; {_NEW_HEAD_ADVICE}")


def is_head(name: str) -> bool:
    """Returns whether a name is that of an array of a classifier head."""
    return name.partition("/")[0] in HEADS


def _new_head(name: str, shape: tuple[int, ...]) -> jax.Array:
    if name.endswith("bias"):
        return jnp.zeros(shape)
    key = jax.random.fold_in(jax.random.key(0), zlib.crc32(name.encode()))
    return linear_kernel(key, shape, jnp.float32)
