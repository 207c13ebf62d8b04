"""ONNX by jax2onnx, with the weights inside; it runs wherever onnxruntime does.

jax2onnx requires an older orbax-checkpoint than this package, which it does not import, so that pip
installs it only without what it requires.
"""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from spvit_jax.errors import InputError, first_line
from spvit_jax.export.program import IMAGES, LOGITS, Program

_FILE = "model.onnx"
_OPSET = 21
_INSTALL = "pip install 'spvit_jax[onnx]' && pip install --no-deps jax2onnx==0.17.1"


def check_installed() -> None:
    """Raises an `InputError` if jax2onnx or a package that it needs is not installed."""
    # It logs the tracebacks of its examples, which it imports too.
    logging.getLogger("jax2onnx").setLevel(logging.ERROR)
    try:
        import jax2onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise InputError(f"ONNX needs {error.name}, which is not installed: {_INSTALL}") from error


def write(folder: pathlib.Path, program: Program, platforms: tuple[str, ...]) -> None:
    """Writes a file with the input `images` and the output `logits`; it is of no platform."""
    del platforms
    import jax2onnx

    weights = {name: jnp.asarray(array) for name, array in program.weights.items()}
    try:
        jax2onnx.to_onnx(
            lambda images: program.function(weights, images),
            [program.images()],
            model_name="spvit_jax",
            opset=_OPSET,
            return_mode="file",
            output_path=folder / _FILE,
            input_names=[IMAGES],
            output_names=[LOGITS],
        )
    except OSError:
        raise
    except Exception as error:  # whatever an operation that it does not know makes it raise
        raise InputError(
            f"jax2onnx cannot write this model: {first_line(error)}; choose another --format"
        ) from error


def load(folder: pathlib.Path) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the written program as a function from images to logits."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / _FILE))
    return lambda images: session.run([LOGITS], {IMAGES: images})[0]
