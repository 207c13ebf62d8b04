"""Classifies images with trained weights, and prints the likeliest classes of each.

    python -m spvit_jax.predict photo.jpg photos/ --checkpoint=runs/pets
    python -m spvit_jax.predict photo.jpg --checkpoint=hf:timm/deit_small_patch16_224.fb_in1k

A folder stands for all images below it. The model, its classes, and how images are cropped and
normalised are those of the run that the checkpoint belongs to; where that is not known, --config
says it, and otherwise it is as in the model's recipe for ImageNet.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from spvit_jax import atomic, cli, paths
from spvit_jax.data import decode, folders
from spvit_jax.data.crops import EvalTransform
from spvit_jax.errors import InputError, writing
from spvit_jax.inference import Inference
from spvit_jax.training.state import Variables

_BATCH = 32


class Prediction(NamedTuple):
    """Likeliest classes of an image, the first the likeliest.

    Attributes:
      path: path of the image.
      classes: names of the classes, or their numbers where names are not known.
      probabilities: probability of each, the softmax of the model's evaluation logits.
    """

    path: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


def predict(
    images: Sequence[epath.Path],
    checkpoint: epath.Path,
    *,
    config: ConfigDict | None = None,
    which: str = "best",
    weights: str = "auto",
    top: int = 5,
) -> Iterator[Prediction]:
    """Yields the likeliest classes of images, in their order.

    Args:
      images: paths of image files.
      checkpoint: file or folder of the weights, as in `weights.find`.
      config: fields of `spvit_jax.config.base`; None where the weights say what model they are of.
      which: checkpoint of a workdir, as in `weights.find`.
      weights: "model", "ema" or "auto", as in `weights.find`.
      top: number of classes for each image.

    Raises:
      InputError: the weights cannot be used, or a file is no image.
    """
    inference = Inference.of(checkpoint, config, which=which, weights=weights)
    transform, variables = inference.transform, inference.load()

    @jax.jit
    def probabilities(variables: Variables, batch: jax.Array) -> jax.Array:
        return jax.nn.softmax(inference.logits(variables, batch))

    for start in range(0, len(images), _BATCH):
        part = images[start : start + _BATCH]
        batch = np.stack([_read(path, transform) for path in part])
        # One shape, so that one program is compiled; a few images are a smaller batch.
        size = min(_BATCH, 2 ** math.ceil(math.log2(len(images))))
        padded = np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)])
        for path, row in zip(part, np.asarray(probabilities(variables, padded)), strict=False):
            best = np.argsort(-row, kind="stable")[:top]
            yield Prediction(
                str(path),
                tuple(inference.class_name(number) for number in best),
                tuple(float(row[number]) for number in best),
            )


def find_images(operands: Sequence[str]) -> list[epath.Path]:
    """Returns the image files that operands name: themselves, and all below folders.

    Raises:
      InputError: there is no such file or folder, or a folder holds no images.
    """
    images: list[epath.Path] = []
    for path in map(paths.parse, operands):
        if path.is_dir():
            below = folders.images_below(path)
            if not below:
                raise InputError(f"{path} holds no images of {', '.join(decode.FORMATS)}")
            images += below
        elif path.exists():
            images.append(path)
        else:
            raise InputError(f"there is no image {path}")
    return images


def _read(path: epath.Path, transform: EvalTransform) -> np.ndarray:
    """Returns an image uint8 [height, width, 3] as evaluation sees it."""
    try:
        return transform(path.read_bytes()).numpy()
    except Exception as error:  # whatever a damaged file makes TensorFlow or Pillow raise
        raise InputError(
            f"{path} cannot be read as an image; expected {', '.join(decode.FORMATS)}"
        ) from error


def main() -> None:
    """Defines the flags and runs the command."""
    config = cli.config_flag(required=False)
    path = flags.DEFINE_string(
        "checkpoint",
        None,
        "Workdir, a checkpoint in it, a file of PyTorch, or hf:OWNER/REPO.",
        required=True,
    )
    top = flags.DEFINE_integer("top", 5, "Classes to print for each image.", lower_bound=1)
    output = flags.DEFINE_string("json", None, "File to write the predictions to.")
    weights = cli.weights_flags()

    def run(*operands: str) -> None:
        if not operands:
            raise InputError("expected images to classify, or folders of some; see --help")
        target = paths.parse_output(output.value) if output.value else None
        images = find_images(operands)
        results: list[dict[str, Any]] = []
        for found in predict(
            images, paths.parse(path.value), config=config(), top=top.value, **weights()
        ):
            print(found.path)
            for name, probability in zip(found.classes, found.probabilities, strict=True):
                print(f"  {100 * probability:5.1f}%  {name}", flush=True)
            results.append(found._asdict())
        if target is not None:
            with writing(target):
                atomic.write_text(target, json.dumps(results, indent=2) + "\n")

    cli.run(run, operands="IMAGE…")


if __name__ == "__main__":
    main()
