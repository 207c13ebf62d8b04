"""Names of the arrays of a model, or of any pytree, such as `blocks/3/attn/qkv/kernel`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from spvit_jax.models.base import Model, ModelConfig


def leaf_name(path: tuple[Any, ...]) -> str:
    """Returns the name of a leaf at its path, such as `model/params/blocks/3/attn/prior/w1`."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a pytree by name."""
    return {leaf_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def map_named(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """Maps `function(name, leaf)` over a pytree."""
    return jax.tree.map_with_path(lambda path, leaf: function(leaf_name(path), leaf), tree)


def arrays_of(model: Model) -> dict[str, Any]:
    """Returns a model's parameters and running statistics by name."""
    return named_leaves(nnx.state(model, (nnx.Param, nnx.BatchStat)))


def set_arrays(model: Model, arrays: Mapping[str, Any]) -> None:
    """Replaces a model's arrays by others of the names and shapes of `arrays_of`."""
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    nnx.update(model, map_named(lambda name, _: arrays[name], state))


@functools.lru_cache(maxsize=4)
def shapes_of(config: ModelConfig) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of a model's `arrays_of`, by name; allocates nothing."""
    return arrays_of(config.abstract())
