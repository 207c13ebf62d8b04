"""Classifies images with trained weights, and prints the likeliest classes of each.

    python -m spvit_jax.predict photo.jpg photos/ --checkpoint=runs/pets
    python -m spvit_jax.predict photo.jpg --checkpoint=hf:timm/deit_small_patch16_224.fb_in1k
    python -m spvit_jax.predict photo.jpg --checkpoint=runs/pets --picture=attention.png

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
from spvit_jax.analysis.attention import check_has_attention
from spvit_jax.analysis.image_maps import last_attention
from spvit_jax.data import decode, folders
from spvit_jax.data.crops import EvalTransform
from spvit_jax.drawing.predictions import PredictionOnImage, PredictionPictures
from spvit_jax.errors import InputError, writing
from spvit_jax.inference import Inference
from spvit_jax.training.state import Variables

_BATCH = 32


class AttentionOnImage(NamedTuple):
    """Attention of a model's last layer on an image.

    Attributes:
      pixels: image uint8 [height, width, 3] as the model sees it.
      weights: weight [H, h, w] of each patch.
      meaning: words for what the weights are.
    """

    pixels: np.ndarray
    weights: np.ndarray
    meaning: str


class Prediction(NamedTuple):
    """Likeliest classes of an image, the first the likeliest.

    Attributes:
      path: path of the image.
      classes: names of the classes, or their numbers where names are not known.
      probabilities: probability of each, the softmax of the model's evaluation logits.
      attention: where the model looks, if that was asked for.
    """

    path: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    attention: AttentionOnImage | None = None

    def record(self) -> dict[str, Any]:
        """Returns the prediction for JSON."""
        return {name: value for name, value in self._asdict().items() if name != "attention"}


def predict(
    images: Sequence[epath.Path],
    checkpoint: epath.Path,
    *,
    config: ConfigDict | None = None,
    which: str = "best",
    weights: str = "auto",
    top: int = 5,
    attention: bool = False,
) -> Iterator[Prediction]:
    """Yields the likeliest classes of images, in their order.

    Args:
      images: paths of image files.
      checkpoint: file or folder of the weights, as in `weights.find`.
      config: fields of `spvit_jax.config.base`; None where the weights say what model they are of.
      which: checkpoint of a workdir, as in `weights.find`.
      weights: "model", "ema" or "auto", as in `weights.find`.
      top: number of classes for each image.
      attention: whether to return where the model looks, too.

    Raises:
      InputError: the weights cannot be used, a file is no image, or the model has no attention.
    """
    inference = Inference.of(checkpoint, config, which=which, weights=weights)
    if attention:
        check_has_attention(inference.model.abstract())
    transform, variables = inference.transform, inference.load()

    @jax.jit
    def answer(variables: Variables, batch: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        images, module = inference.normalize(batch), variables.model()
        probabilities = jax.nn.softmax(module.outputs(images).evaluation_logits())
        return probabilities, last_attention(module, images) if attention else {}

    for start in range(0, len(images), _BATCH):
        part = images[start : start + _BATCH]
        batch = np.stack([_read(path, transform) for path in part])
        # One shape, so that one program is compiled; a few images are a smaller batch.
        size = min(_BATCH, 2 ** math.ceil(math.log2(len(images))))
        padded = np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)])
        probabilities, maps = jax.device_get(answer(variables, padded))
        for index, path in enumerate(part):
            row = probabilities[index]
            best = np.argsort(-row, kind="stable")[:top]
            yield Prediction(
                str(path),
                tuple(inference.class_name(number) for number in best),
                tuple(float(row[number]) for number in best),
                *(AttentionOnImage(batch[index], each[index], of) for of, each in maps.items()),
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
    path = flags.DEFINE_string("checkpoint", None, cli.CHECKPOINT_HELP, required=True)
    top = flags.DEFINE_integer("top", 5, "Classes to print for each image.", lower_bound=1)
    output = flags.DEFINE_string("json", None, "File to write the predictions to.")
    picture = flags.DEFINE_string(
        "picture",
        None,
        "FILE.png for a picture of all images with the last layer's attention laid over them, or "
        "a folder for one of each.",
    )
    weights = cli.weights_flags()

    def run(*operands: str) -> None:
        if not operands:
            raise InputError("expected images to classify, or folders of some; see --help")
        target = paths.parse_output(output.value) if output.value else None
        images = find_images(operands)
        pictures = None
        if picture.value:
            pictures = PredictionPictures(paths.parse_output(picture.value), images)
        results: list[dict[str, Any]] = []
        for found in predict(
            images,
            paths.parse(path.value),
            config=config(),
            top=top.value,
            attention=pictures is not None,
            **weights(),
        ):
            print(found.path)
            for name, probability in zip(found.classes, found.probabilities, strict=True):
                print(f"  {100 * probability:5.1f}%  {name}", flush=True)
            results.append(found.record())
            if pictures is not None and found.attention is not None:
                shown = found.path, found.classes, found.probabilities, *found.attention
                pictures.add(PredictionOnImage(*shown))
        if pictures is not None:
            pictures.finish()
        if target is not None:
            with writing(target):
                atomic.write_text(target, json.dumps(results, indent=2) + "\n")

    cli.run(run, operands="IMAGE…")


if __name__ == "__main__":
    main()
