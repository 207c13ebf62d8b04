"""Import and export of PyTorch weights: checkpoints of the papers' authors, of DeiT and of timm.

Names, layouts and files of weights; `spvit_jax.weights` loads them into a model.
"""

from __future__ import annotations

from typing import Any

from spvit_jax.interop.tables import DIALECTS, Dialect
from spvit_jax.interop.translate import to_ours, to_theirs
from spvit_jax.models import Model
from spvit_jax.models.naming import arrays_of

__all__ = ["DIALECTS", "Dialect", "to_ours", "to_theirs", "to_torch"]


def to_torch(model: Model, dialect: Dialect = "authors") -> dict[str, Any]:
    """Returns a model's weights as a state dict of NumPy arrays, under the names of PyTorch."""
    return to_theirs(arrays_of(model), model.config, dialect)
