"""Exports a trained model as a program that runs without this package.

    python -m spvit_jax.export --checkpoint=runs/digits --format=stablehlo --output=exported
    python -m spvit_jax.export --checkpoint=hf:timm/deit_small_patch16_224.fb_in1k \
        --format=onnx --output=exported

The program takes a batch of any size of images uint8 [B, height, width, 3] that have been resized
and cropped, normalises them, and returns the logits [B, C] of evaluation. `export.json` beside it
says how images are resized and cropped, and the names of the classes. What was written is read
again and its logits compared with the model's; docs/export.md shows how to run each format.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict

import spvit_jax
from spvit_jax import atomic, cli, paths
from spvit_jax.errors import InputError, nearest, writing
from spvit_jax.export.program import IMAGES, LOGITS, PLATFORMS, Program
from spvit_jax.inference import Inference
from spvit_jax.models.implementation import Implementation

DESCRIPTION = "export.json"
_MODULES = {"stablehlo": "stablehlo", "tf_saved_model": "saved_model", "onnx": "onnx"}
# Largest difference of logits from the model's, in their standard deviations, by dtype. Compilers
# order sums differently; a mistake is as large as the logits themselves.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}


class Format(Protocol):
    """Module of a format."""

    def write(self, folder: pathlib.Path, program: Program, platforms: tuple[str, ...]) -> None:
        """Writes a program to a folder."""

    def load(self, folder: pathlib.Path) -> Callable[[np.ndarray], np.ndarray]:
        """Returns a written program as a function from images to logits."""


class Export(NamedTuple):
    """What was exported.

    Attributes:
      inference: the weights and their model.
      difference: largest difference of the written program's logits from the model's on random
        images, in standard deviations of the logits.
    """

    inference: Inference
    difference: float


def export(
    checkpoint: epath.Path,
    output: epath.Path,
    format: str,
    *,
    config: ConfigDict | None = None,
    which: str = "best",
    weights: str = "auto",
    dtype: str = "float32",
    platforms: tuple[str, ...] = ("cpu", "cuda", "tpu"),
) -> Export:
    """Writes a trained model as a program, completely or not at all.

    Args:
      checkpoint: file or folder of the weights, as in `weights.find`.
      output: folder to write, which must not exist.
      format: "stablehlo", "tf_saved_model" or "onnx".
      config: fields of `spvit_jax.config.base`; None where the weights say what model they are of.
      which: checkpoint of a workdir, as in `weights.find`.
      weights: "model", "ema" or "auto", as in `weights.find`.
      dtype: dtype that the program computes in, "float32" or "bfloat16".
      platforms: platforms that the program runs on, of `program.PLATFORMS`; ONNX is of none.

    Raises:
      InputError: the weights cannot be used, the output exists, or a package is not installed.
      WriteError: the output cannot be written.
      FloatingPointError: the written program gives other logits than the model.
    """
    if output.exists():
        raise InputError(f"{output} exists; choose another --output or remove it")
    module = _module(format)
    inference = Inference.of(checkpoint, config, which=which, weights=weights)
    # On the CPU that traces it "auto" is plain XLA, for any device. jax2onnx does not know the
    # loops that compute masked heads at linear cost.
    attention: Implementation = "xla" if format == "onnx" else "auto"
    model = dataclasses.replace(
        inference.model, dtype=dtype, attention=attention, scan=False, remat=False
    )
    inference = dataclasses.replace(inference, model=model)
    program = Program.of(inference)
    with writing(output), _new_folder(output) as folder:
        module.write(folder, program, platforms)
        (folder / DESCRIPTION).write_text(json.dumps(_describe(inference, format), indent=2) + "\n")
        difference = _difference(module.load(folder), program)
        if not difference < _TOLERANCE[dtype]:
            raise FloatingPointError(
                f"the {format} program's logits differ from the model's by {difference:.2g} of "
                "their standard deviation; nothing was written. Try another --format"
            )
    return Export(inference, difference)


def _module(format: str) -> Format:
    """Returns the module of a format, with what it imports.

    Raises:
      InputError: the format is unknown, or a package that it needs is not installed.
    """
    if format not in _MODULES:
        raise InputError(f"unknown format {format!r}{nearest(format, _MODULES)}")
    module: Any = importlib.import_module(f"spvit_jax.export.{_MODULES[format]}")
    if format == "onnx":
        module.check_installed()
    return module


@contextlib.contextmanager
def _new_folder(output: epath.Path) -> Iterator[pathlib.Path]:
    """Yields a folder of this machine that becomes `output`, on this machine or in a bucket."""
    if paths.is_remote(output):
        with tempfile.TemporaryDirectory(prefix="spvit_jax-") as folder:
            yield pathlib.Path(folder)
            paths.put_folder(pathlib.Path(folder), output, last=(DESCRIPTION,))
        return
    with atomic.making_folder(output) as temporary:
        temporary.mkdir()
        yield pathlib.Path(temporary)


def _difference(written: Callable[[np.ndarray], np.ndarray], program: Program) -> float:
    """Returns the largest difference of logits on three images of noise, in their deviations."""
    shape = (3, *program.image_shape, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = np.asarray(jax.jit(program.function)(program.weights, images))
    return float(abs(written(images) - expected).max() / max(expected.std(), 1e-6))


def _describe(inference: Inference, format: str) -> dict[str, Any]:
    """Returns what somebody who runs the program has to know, for JSON."""
    height, width = inference.model.image_shape
    crop = inference.transform
    return {
        "format": format,
        IMAGES: {
            "dtype": "uint8",
            "shape": ["batch", height, width, 3],
            "channels": "RGB",
            "crop": crop.crop,
            "crop_mode": crop.crop_mode,
            "interpolation": crop.interpolation,
        },
        LOGITS: {"dtype": "float32", "shape": ["batch", inference.model.num_classes]},
        "class_names": inference.weights.class_names,
        "weights": inference.weights.where,
        "is_average": inference.weights.is_average,
        "model": inference.model.to_dict(),
        "spvit_jax": spvit_jax.__version__,
        "jax": jax.__version__,
    }


def main() -> None:
    """Defines the flags and runs the command."""
    config = cli.config_flag(required=False)
    path = flags.DEFINE_string("checkpoint", None, cli.CHECKPOINT_HELP, required=True)
    output = flags.DEFINE_string("output", None, "Folder to write; must not exist.", required=True)
    format = flags.DEFINE_enum("format", None, list(_MODULES), "Format to write.", required=True)
    dtype = flags.DEFINE_enum(
        "dtype", "float32", list(_TOLERANCE), "What the program computes in; logits are float32."
    )
    platforms = flags.DEFINE_multi_enum(
        "platform",
        ["cpu", "cuda", "tpu"],
        PLATFORMS,
        "Platform that a program of StableHLO or TensorFlow runs on.",
    )
    weights = cli.weights_flags()

    def run() -> None:
        # Whatever this machine has, a program is traced for no device in particular.
        jax.config.update("jax_platforms", "cpu")
        # Nor does it say in which folder the code was.
        jax.config.update("jax_hlo_source_file_canonicalization_regex", ".*/")
        folder = paths.parse_output(output.value)
        done = export(
            paths.parse(path.value),
            folder,
            format.value,
            config=config(),
            dtype=dtype.value,
            platforms=tuple(platforms.value),
            **weights(),
        )
        height, width = done.inference.model.image_shape
        print(
            f"read      {done.inference.weights.where}",
            f"checked   logits as the model's to {done.difference:.1e} of their deviation",
            f"wrote     {folder}: images uint8 [batch, {height}, {width}, 3] to logits "
            f"[batch, {done.inference.model.num_classes}]",
            sep="\n",
        )

    cli.run(run)


if __name__ == "__main__":
    main()
