"""Weights of PyTorch, in and out: the checkpoints of the papers' authors, of DeiT and of timm.

model = create_model("spvit_s", image_size=384)
load_torch(model, "spvit_s_224.pth.tar")
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from spvit_jax.interop import files
from spvit_jax.interop.tables import DIALECTS, Dialect
from spvit_jax.interop.translate import to_ours, to_theirs
from spvit_jax.models import Model
from spvit_jax.models.naming import arrays_of, set_arrays
from spvit_jax.models.resize import adapt, check_classes

__all__ = ["DIALECTS", "Dialect", "load_torch", "to_ours", "to_theirs", "to_torch"]


def load_torch(
    model: Model,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    weights: str = "auto",
    new_head: bool = False,
) -> None:
    """Puts PyTorch's weights into a model, resized to its resolution.

    Args:
      model: of the same architecture.
      source: a `.pth`, `.pth.tar` or `.safetensors` file, or a state dict of tensors or arrays.
      weights: "model" for the weights themselves, "ema" for their moving average, or "auto" for
        the average where the file holds one.
      new_head: whether heads for another number of classes are replaced by new ones.

    Raises:
      InputError: the file cannot be read or is of another model; the model is left as it was.
    """
    if isinstance(source, Mapping):
        where, state_dict = "the state dict", files.as_arrays(source)
    else:
        where = str(source)
        state_dict = files.read(pathlib.Path(source), weights=weights).state_dict
    config, arrays = to_ours(state_dict, model.config, where)
    check_classes(config, model.config, where, may_replace=new_head)
    set_arrays(model, adapt(arrays, config, model.config, where))


def to_torch(model: Model, dialect: Dialect = "authors") -> dict[str, Any]:
    """Returns a model's weights as a state dict of NumPy arrays, under the names of PyTorch."""
    return to_theirs(arrays_of(model), model.config, dialect)
