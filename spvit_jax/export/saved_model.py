"""A SavedModel of TensorFlow: the program's StableHLO as one operation, the weights as variables.

The operation is the one that `jax.experimental.jax2tf` uses. That itself writes StableHLO of JAX's
version, which the latest release of TensorFlow does not read.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import numpy as np
from jax import export
from jax.extend.mlir import ir, passmanager
from jax.extend.mlir.dialects import chlo, stablehlo
from tensorflow.compiler.mlir.stablehlo import stablehlo as tensorflow_stablehlo
from tensorflow.compiler.tf2xla.python import xla

from spvit_jax.data.tensorflow import tf
from spvit_jax.export.program import IMAGES, LOGITS, Program

_SIGNATURE = "serving_default"


def write(folder: pathlib.Path, program: Program, platforms: tuple[str, ...]) -> None:
    """Writes a folder with the signature `serving_default`, from `images` to `logits`."""
    exported = program.lower(platforms)
    module = _for_tensorflow(exported)
    variables = [tf.Variable(weights, trainable=False) for weights in program.weights.values()]
    images = tf.TensorSpec((None, *program.image_shape, 3), tf.uint8, name=IMAGES)

    @tf.function(autograph=False, input_signature=[images])
    def serve(images: tf.Tensor) -> dict[str, tf.Tensor]:
        arguments = [*variables, images]
        logits = xla.call_module(
            [arguments[index] for index in exported.module_kept_var_idx],
            version=exported.calling_convention_version,
            module=module,
            Tout=[tf.float32],
            Sout=[(None, program.num_classes)],
            platforms=[platform.upper() for platform in exported.platforms],
            use_shardy_partitioner=True,
        )
        return {LOGITS: logits[0]}

    model = tf.Module()
    model.variables_of_model, model.serve = variables, serve
    tf.saved_model.save(model, str(folder), signatures={_SIGNATURE: serve})


def load(folder: pathlib.Path) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the written program as a function from images to logits."""
    model = tf.saved_model.load(str(folder))

    def logits(images: np.ndarray) -> np.ndarray:
        # The model has the variables; its signature alone would not keep them.
        serve = model.signatures[_SIGNATURE]
        return serve(**{IMAGES: tf.constant(images)})[LOGITS].numpy()

    return logits


def _for_tensorflow(exported: export.Exported) -> bytes:
    """Returns a program's StableHLO in the version that the installed TensorFlow reads."""
    stablehlo.register_stablehlo_passes()
    with ir.Context() as context:
        for dialect in (stablehlo, chlo):
            dialect.register_dialect(context)
        module = stablehlo.deserialize_portable_artifact(context, exported.mlir_module_serialized)
        # TensorFlow finds out the shapes of a batch inside calls, but not inside composites, as
        # erf is one.
        calls = "builtin.module(func.func(stablehlo-legalize-composite-to-call))"
        passmanager.PassManager.parse(calls).run(module.operation)
        version = tensorflow_stablehlo.get_current_version()
        return stablehlo.serialize_portable_artifact(module, version)
