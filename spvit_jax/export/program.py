"""What all formats of export share: a model as one function of its weights and of images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from spvit_jax import weights as weights_lib
from spvit_jax.inference import Inference

IMAGES, LOGITS = "images", "logits"  # names of the argument and of the result, where they have one
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")  # that `jax.export` lowers for


@dataclasses.dataclass(frozen=True)
class Program:
    """A model that is exported, before it has a format.

    Attributes:
      function: function of (weights by name, images uint8 [B, height, width, 3]) that JAX can
        trace; returns the evaluation logits [B, C] float32.
      weights: the weights by name, float32.
      image_shape: (height, width) in pixels.
      num_classes: number of classes C.
    """

    function: Callable[[Mapping[str, jax.Array], jax.Array], jax.Array]
    weights: dict[str, np.ndarray]
    image_shape: tuple[int, int]
    num_classes: int

    @classmethod
    def of(cls, inference: Inference) -> Self:
        """Reads the weights of a model and returns its program; raises as `Weights.load`."""
        variables = inference.load()
        structure = jax.eval_shape(lambda: variables)  # without the arrays

        def function(weights: Mapping[str, jax.Array], images: jax.Array) -> jax.Array:
            given = weights_lib.with_arrays(structure, weights)
            return inference.logits(given, images).astype(jnp.float32)

        arrays = weights_lib.arrays_of(variables)
        return cls(
            function,
            {name: np.asarray(arrays[name]) for name in sorted(arrays)},
            inference.model.image_shape,
            inference.model.num_classes,
        )

    def lower(self, platforms: tuple[str, ...]) -> export.Exported:
        """Returns the program as StableHLO for some platforms and a batch of any size."""
        shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in self.weights.items()}
        return export.export(jax.jit(self.function), platforms=platforms)(shapes, self.images())

    def images(self) -> jax.ShapeDtypeStruct:
        """Returns the shape of images, with a batch of any size."""
        (batch,) = export.symbolic_shape("batch")
        return jax.ShapeDtypeStruct((batch, *self.image_shape, 3), jnp.uint8)
