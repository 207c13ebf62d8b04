"""StableHLO as `jax.export` serializes it, with the weights beside it as safetensors.

Beside rather than inside: the program stays small and compiles without folding constants, weights
of any size fit, and others of the same model can take their place.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import numpy as np
import safetensors.numpy
from jax import export

from spvit_jax.export.program import Program

_PROGRAM, _WEIGHTS = "program.jax_export", "weights.safetensors"


def write(folder: pathlib.Path, program: Program, platforms: tuple[str, ...]) -> None:
    """Writes a program and its weights as two files of a folder."""
    (folder / _PROGRAM).write_bytes(program.lower(platforms).serialize())
    (folder / _WEIGHTS).write_bytes(safetensors.numpy.save(program.weights))


def load(folder: pathlib.Path) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the written program as a function from images to logits."""
    program = export.deserialize(bytearray((folder / _PROGRAM).read_bytes()))
    weights = safetensors.numpy.load_file(folder / _WEIGHTS)
    return lambda images: np.asarray(program.call(weights, images))
