"""Layouts of a layer's arrays in PyTorch and here, as pairs of inverse functions.

A row of a table of names (`tables.py`) is one array of ours and the PyTorch arrays it is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """Conversion between one array of ours and the PyTorch arrays that it is made of.

    Attributes:
      read: function from PyTorch's arrays and the shape of ours to our array.
      write: function from our array to PyTorch's.
    """

    read: Callable[[tuple[np.ndarray, ...], Shape], np.ndarray]
    write: Callable[[np.ndarray], tuple[np.ndarray, ...]]


class Row(NamedTuple):
    """Names and layout of one array.

    Attributes:
      ours: name of the array here.
      theirs: names of the PyTorch arrays that it is made of.
      layout: conversion between them.
    """

    ours: str
    theirs: tuple[str, ...]
    layout: Layout


def _offset_table_to_theirs(table: np.ndarray) -> tuple[np.ndarray, ...]:
    # Theirs is indexed by query minus key, ours by key minus query.
    return (table[:, ::-1, ::-1].reshape(table.shape[0], -1).T,)


def _offset_table_to_ours(arrays: tuple[np.ndarray, ...], shape: Shape) -> np.ndarray:
    return arrays[0].T.reshape(shape)[:, ::-1, ::-1]


SAME = Layout(lambda arrays, shape: arrays[0], lambda array: (array,))
# [in, out] here, [out, in] there.
MATRIX = Layout(lambda arrays, shape: arrays[0].T, lambda array: (array.T,))
# [out, in, h, w] there, [h, w, in, out] here; a depthwise kernel likewise.
KERNEL = Layout(
    lambda arrays, shape: arrays[0].transpose(2, 3, 1, 0),
    lambda array: (array.transpose(3, 2, 0, 1),),
)
# SP-SA has one matrix for queries and keys, and one for values.
QK_AND_V = Layout(
    lambda arrays, shape: np.concatenate([array.T for array in arrays], axis=1),
    lambda array: (array[:, : array.shape[0] * 2].T, array[:, array.shape[0] * 2 :].T),
)
QK_AND_V_BIAS = Layout(
    lambda arrays, shape: np.concatenate(arrays),
    lambda array: (array[: len(array) // 3 * 2], array[len(array) // 3 * 2 :]),
)
# [H, d, ...] here, [H·d, ...] there.
HEADS = Layout(
    lambda arrays, shape: arrays[0].reshape(shape),
    lambda array: (array.reshape(-1, *array.shape[2:]),),
)
HEADS_AS_COLUMN = Layout(
    lambda arrays, shape: arrays[0].reshape(shape), lambda array: (array.reshape(-1, 1),)
)
OFFSET_TABLE = Layout(_offset_table_to_ours, _offset_table_to_theirs)


def linear(ours: str, theirs: str) -> Iterator[Row]:
    """Yields the rows of a linear layer's kernel and bias."""
    yield Row(f"{ours}/kernel", (f"{theirs}.weight",), MATRIX)
    yield Row(f"{ours}/bias", (f"{theirs}.bias",), SAME)


def conv(ours: str, theirs: str) -> Iterator[Row]:
    """Yields the rows of a convolution's kernel and bias."""
    yield Row(f"{ours}/kernel", (f"{theirs}.weight",), KERNEL)
    yield Row(f"{ours}/bias", (f"{theirs}.bias",), SAME)


def norm(ours: str, theirs: str) -> Iterator[Row]:
    """Yields the rows of a LayerNorm's or BatchNorm's parameters and running statistics."""
    yield Row(f"{ours}/scale", (f"{theirs}.weight",), SAME)
    yield Row(f"{ours}/bias", (f"{theirs}.bias",), SAME)
    yield Row(f"{ours}/mean", (f"{theirs}.running_mean",), SAME)
    yield Row(f"{ours}/var", (f"{theirs}.running_var",), SAME)
