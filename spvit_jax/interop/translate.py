"""Conversion of PyTorch state dicts to the arrays of a model here and back, by tables of names.

Both sides are dictionaries of NumPy arrays; files are read and written in `files.py`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from spvit_jax.errors import InputError, check_shapes, some
from spvit_jax.interop.layouts import Row, Shape
from spvit_jax.interop.tables import DIALECTS, Dialect, rows_of
from spvit_jax.models import ModelConfig, SwinConfig, ViTConfig
from spvit_jax.models.naming import shapes_of
from spvit_jax.models.resize import HEADS

# Buffers that follow from the configuration or are not used here.
_BUFFERS = re.compile(r"(^|\.)(num_batches_tracked|relative_position_index|attn_mask)$")
_BATCH_NORM = re.compile(r"(.*)\.running_mean$")


def to_ours(
    state_dict: Mapping[str, np.ndarray],
    like: ModelConfig,
    where: object = "the state dict",
    *,
    may_lack_heads: bool = False,
) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Converts a PyTorch state dict to a model's configuration and arrays.

    Args:
      state_dict: arrays under the authors' or timm's names.
      like: configuration of the expected model. Its number of classes, resolution and kinds of
        layers are taken from the state dict instead.
      where: name of the state dict in error messages.
      may_lack_heads: whether heads may be missing, as in a backbone.

    Returns:
      The configuration of the state dict's model, and its arrays by name, as in
      `models.naming.arrays_of`.

    Raises:
      InputError: the state dict is of another model (all names that differ are shown together),
        or has values that are no finite floating-point numbers.
    """
    given = {name: array for name, array in state_dict.items() if not _BUFFERS.search(name)}
    config = _recognise({name: array.shape for name, array in given.items()}, like)
    rows = _rows_nearest(config, given)
    if may_lack_heads:
        missing = _missing_heads(rows, given)
        rows = [row for row in rows if _module_of(row) not in missing]
    _check(_their_shapes(config, rows), _shapes(given), config, where)
    _check_values(given, where)
    shapes = shapes_of(config)
    arrays = {}
    for row in rows:
        theirs = tuple(given[name] for name in row.theirs)
        arrays[row.ours] = row.layout.read(theirs, shapes[row.ours].shape)
    return config, arrays


def to_theirs(
    arrays: Mapping[str, np.ndarray], config: ModelConfig, dialect: Dialect = "authors"
) -> dict[str, np.ndarray]:
    """Returns a model's arrays as a PyTorch state dict, the inverse of `to_ours`.

    BatchNorm's counters `num_batches_tracked`, which do not exist here, are 0.
    """
    state_dict = {}
    for row in _rows(config, dialect):
        theirs = row.layout.write(np.asarray(arrays[row.ours]))
        for name, array in zip(row.theirs, theirs, strict=True):
            state_dict[name] = np.array(array, order="C")
            if match := _BATCH_NORM.match(name):
                state_dict[f"{match[1]}.num_batches_tracked"] = np.zeros((), np.int64)
    return state_dict


def _rows(config: ModelConfig, dialect: Dialect) -> list[Row]:
    """Returns the rows of the table of names for the arrays that a model has.

    Raises:
      ValueError: the table lacks one of the arrays.
    """
    shapes = shapes_of(config)
    rows = [row for row in rows_of(config, dialect) if row.ours in shapes]
    unnamed = sorted(shapes.keys() - {row.ours for row in rows})
    if unnamed:
        raise ValueError(f"the table of names lacks {', '.join(unnamed)}; add them")
    return rows


def _rows_nearest(config: ModelConfig, given: Mapping[str, np.ndarray]) -> list[Row]:
    """Returns a model's rows in the dialect with the fewest names that differ from given ones."""

    def distance(rows: list[Row]) -> int:
        return len(given.keys() ^ {name for row in rows for name in row.theirs})

    return min((_rows(config, dialect) for dialect in DIALECTS), key=distance)


def _missing_heads(rows: list[Row], given: Mapping[str, np.ndarray]) -> set[str]:
    """Returns the names of the heads that have no array in a state dict."""
    modules = {_module_of(row) for row in rows if not given.keys().isdisjoint(row.theirs)}
    return set(HEADS) - modules


def _module_of(row: Row) -> str:
    """Returns the name of the top-level module that an array belongs to."""
    return row.ours.partition("/")[0]


def _shapes(arrays: Mapping[str, np.ndarray]) -> dict[str, Shape]:
    return {name: array.shape for name, array in arrays.items()}


def _their_shapes(config: ModelConfig, rows: list[Row]) -> dict[str, Shape]:
    """Returns the shapes of a model's state dict, computed without allocating the arrays."""
    shapes = shapes_of(config)
    expected: dict[str, Shape] = {}
    for row in rows:
        ours = np.broadcast_to(np.float32(0), shapes[row.ours].shape)
        arrays = row.layout.write(ours)
        expected |= {name: array.shape for name, array in zip(row.theirs, arrays, strict=True)}
    return expected


def _check(
    expected: Mapping[str, Shape], given: Mapping[str, Shape], config: ModelConfig, where: object
) -> None:
    """Raises an `InputError` unless a state dict's names and shapes are those expected."""
    names, rows = expected.keys() | given.keys(), _size(given, "pos_embed", axis=1)
    if rows and {name for name in names if expected.get(name) != given.get(name)} == {"pos_embed"}:
        raise InputError(
            f"{where} has a position embedding of {rows} rows, which fits neither a square nor "
            f"the grid of the model, {config.grid[0]}×{config.grid[1]}; give its image_size"
        )
    check_shapes(expected, given, where)


def _check_values(arrays: Mapping[str, np.ndarray], where: object) -> None:
    """Raises an `InputError` unless all values of arrays are finite floating-point numbers."""
    others = [f"{name} {array.dtype}" for name, array in arrays.items() if array.dtype.kind != "f"]
    if others:
        raise InputError(
            f"{where} has weights of another kind than floating-point numbers: {some(others)}"
        )
    # A float64 value may overflow the model's float32.
    with np.errstate(over="ignore"):
        counts = {
            name: array.size - np.count_nonzero(np.isfinite(array.astype(np.float32, copy=False)))
            for name, array in arrays.items()
        }
    if total := sum(counts.values()):
        names = [f"{name} {count}" for name, count in counts.items() if count]
        raise InputError(
            f"{where} has {total} values that are NaN or infinite: {some(names)}; it is damaged or "
            "from a training that diverged, so take an earlier one"
        )


def _recognise(shapes: Mapping[str, Shape], like: ModelConfig) -> ModelConfig:
    """Returns a configuration with the classes, resolution and layers of a state dict."""
    for name in ("head.weight", "head.fc.weight"):
        if classes := _size(shapes, name, axis=0):
            like = dataclasses.replace(like, num_classes=classes)
    if isinstance(like, SwinConfig):
        return _with_window(shapes, like)
    rows = _size(shapes, "pos_embed", axis=1)
    if isinstance(like, ViTConfig):
        like = _with_spatial_layers(shapes, rows, like)
        rows -= 0 if like.class_token_block else like.num_prefix
    return _with_grid(rows, like)


def _with_spatial_layers(shapes: Mapping[str, Shape], rows: int, like: ViTConfig) -> ViTConfig:
    """Returns a configuration with the number of SP-SA layers of a state dict's names.

    The authors' L model has no SP-SA and yet inserts the class token after its first blocks, so
    that only the rows of the position embedding tell it from a model that inserts it before them.
    The grid of the configuration decides if either fits it; otherwise the grid is a square, and of
    two successive numbers only one can be that.
    """
    spatial = sum(f"blocks.{layer}.attn.qk.weight" in shapes for layer in range(like.depth))
    if spatial == like.spatial_layers or spatial >= like.depth:
        return like
    patches, class_token_layer = math.prod(like.grid), None
    fits = rows in (patches, patches + like.num_prefix)
    if spatial == 0 and (rows == patches if fits else _is_square(rows)):
        class_token_layer = like.class_token_block
    return dataclasses.replace(like, spatial_layers=spatial, class_token_layer=class_token_layer)


def _with_grid(rows: int, like: ModelConfig) -> ModelConfig:
    """Returns a configuration with the image size of a position embedding of `rows` patches.

    The grid of the configuration is kept if it has as many; otherwise the number must be a square.
    """
    if rows == math.prod(like.grid) or not _is_square(rows):
        return like
    return dataclasses.replace(like, image_size=math.isqrt(rows) * like.patch_size)


def _with_window(shapes: Mapping[str, Shape], like: SwinConfig) -> SwinConfig:
    """Returns a configuration with the window of the first layer's bias table, and image size."""
    rows = _size(shapes, "layers.0.blocks.0.attn.relative_position_bias_table", axis=0)
    table = shapes_of(like)["blocks/0/attn/position/table"].shape
    if rows == table[1] * table[2] or not _is_square(rows) or rows % 2 == 0:
        return like
    window = (math.isqrt(rows) + 1) // 2
    return dataclasses.replace(like, image_size=32 * window, window=None)


def _size(shapes: Mapping[str, Shape], name: str, axis: int) -> int:
    """Returns one dimension of a named array, or 0 if there is no such array or dimension."""
    shape = shapes.get(name, ())
    return shape[axis] if axis < len(shape) else 0


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number
