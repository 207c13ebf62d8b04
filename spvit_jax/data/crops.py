"""Transforms of single images on the host: decoding, cropping, resizing, flipping, augmentation.

All random numbers are drawn from a seed that is passed in, so that an example looks the same
whenever and wherever it is read. TensorFlow draws and decodes; what follows is compiled code with
the pixels of Pillow, which published recipes are trained and evaluated with. Augmentation of whole
batches is in `augment/`, on the device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import NamedTuple, Self

import numpy as np
from ml_collections import ConfigDict

from spvit_jax import config as config_lib
from spvit_jax.data import resampling
from spvit_jax.data.augmentation import Augmentation
from spvit_jax.data.decode import decode_other
from spvit_jax.data.tensorflow import tf
from spvit_jax.errors import InputError, nearest

Box = tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]  # top, left, height, width; int32

_CROP_ATTEMPTS = 10  # torchvision's
_DCT_METHOD = "INTEGER_ACCURATE"  # decodes JPEG to the same pixels as Pillow
_CROP_MODES = ("center", "squash")
_INTERPOLATIONS = ("bilinear", "bicubic")


class TrainImage(NamedTuple):
    """A training image, and where its pixels are in the original one.

    Attributes:
      image: uint8 [height, width, 3].
      box: float32 [4], (y0, x0, y1, x1) of the crop, as fractions of the original image's height
        and width.
      flip: bool [], whether the crop was flipped.
      move: float32 [3, 3], affine map from a position (x, y, 1) in the image to that in the flipped
        crop, as fractions of width and height; the identity without RandAugment.
    """

    image: tf.Tensor
    box: tf.Tensor
    flip: tf.Tensor
    move: tf.Tensor


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Random crop, resize, flip and augmentation of a training image.

    Attributes:
      size: (height, width) of the result, in pixels.
      scale: range of the crop's area as a fraction of the image's; (1, 1) is the whole image.
      ratio: range of the crop's width over its height.
      flip: probability of a horizontal flip.
      interpolation: "bilinear", "bicubic", or "random" for either with the same probability.
      augmentation: what follows on the single image.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    interpolation: str = "bicubic"
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        """Raises an `InputError` if the interpolation is unknown."""
        _check_interpolation(self.interpolation, (*_INTERPOLATIONS, "random"))

    @classmethod
    def of(cls, config: ConfigDict, size: tuple[int, int]) -> Self:
        """Returns the training transform of a configuration; `size` is the model's image size."""
        augment = config.augment
        return cls(
            size=size,
            scale=tuple(augment.crop_scale),
            ratio=tuple(augment.crop_ratio),
            flip=augment.flip,
            interpolation=augment.interpolation,
            augmentation=Augmentation.of(config),
        )

    def __call__(self, encoded: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Returns the training image uint8 [height, width, 3] for a seed int64 [2]."""
        return self.with_geometry(encoded, seed).image

    def with_geometry(self, encoded: tf.Tensor, seed: tf.Tensor) -> TrainImage:
        """Returns a training image as `__call__` does, with where its pixels are from."""
        group = {name: value[None] for name, value in self.prepare(encoded, seed).items()}
        finished = self.finish(group)
        return TrainImage(**{name: finished[name][0] for name in TrainImage._fields})

    def prepare(self, encoded: tf.Tensor, seed: tf.Tensor) -> dict[str, tf.Tensor]:
        """Decodes a crop of an image, and draws what `finish` does with it.

        Returns:
          `pixels` uint8 [h·w·3] of the crop and its `shape` int64 [2]; whether to resize it by the
          bicubic filter, `bicubic` bool []; `operations` float64 [n, 3] as `Augmentation.draw`
          returns them; `box` and `flip` as in `TrainImage`.
        """
        seeds = tf.random.experimental.stateless_split(seed, 4)
        crop_seed, flip_seed, interpolation_seed, augmentation_seed = tf.unstack(seeds)
        crop, box = self.crop(encoded, crop_seed)
        bicubic = {"random": 0.5, "bicubic": 1.0}.get(self.interpolation, 0.0)  # its probability
        return {
            "pixels": tf.reshape(crop, [-1]),
            "shape": tf.shape(crop, out_type=tf.int64)[:2],
            "bicubic": tf.random.stateless_uniform([], interpolation_seed) < bicubic,
            "operations": self.augmentation.draw(augmentation_seed),
            "box": box,
            "flip": tf.random.stateless_uniform([], flip_seed) < self.flip,
        }

    def finish(self, group: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Resizes, flips and augments a group of crops.

        Args:
          group: what `prepare` returns, with a first axis of length g; `pixels` padded.

        Returns:
          `image`, `box`, `flip` and `move` as in `TrainImage`, with a first axis of length g, and
          all else that is in the group.
        """
        rest = dict(group)
        names = ("pixels", "shape", "bicubic", "operations")
        inputs = [rest.pop(name) for name in names]
        # One call for several images: TensorFlow's own part of each is done under the GIL.
        image, move = tf.numpy_function(
            self._resize_and_augment, [*inputs, group["flip"]], (tf.uint8, tf.float32), False
        )
        image = tf.ensure_shape(image, (None, *self.size, 3))
        return rest | {"image": image, "move": tf.ensure_shape(move, (None, 3, 3))}

    def crop(self, encoded: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns a random crop uint8 [h, w, 3] before resizing, and its box float32 [4]."""
        return _decode_crop(
            encoded, lambda shape: random_crop_box(shape, seed, self.scale, self.ratio)
        )

    def _resize_and_augment(
        self,
        pixels: np.ndarray,
        shapes: np.ndarray,
        bicubic: np.ndarray,
        operations: np.ndarray,
        flips: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns `TrainImage.image` and `TrainImage.move` of a group of crops."""
        height, width = self.size
        images = resampling.resize_crops(pixels, shapes, height, width, bicubic, flips)
        return images, self.augmentation.apply(images, operations)


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """Resize and centre crop of an evaluation image, pixel for pixel as in timm.

    Attributes:
      size: (height, width) of the result, in pixels.
      crop: fraction of the resized image's side that the centre crop keeps, in (0, 1].
      interpolation: "bilinear" or "bicubic".
      crop_mode: timm's crop mode: "center" keeps the image's aspect ratio, "squash" changes it
        to the result's.
    """

    size: tuple[int, int]
    crop: float = 1.0
    interpolation: str = "bicubic"
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        """Raises an `InputError` if the crop, interpolation or crop mode is invalid."""
        _check_interpolation(self.interpolation, _INTERPOLATIONS)
        if self.crop_mode not in _CROP_MODES:
            known = nearest(self.crop_mode, _CROP_MODES)
            raise InputError(f"unknown augment.eval_crop_mode {self.crop_mode!r}{known}")
        if not 0 < self.crop <= 1:
            raise InputError(
                f"augment.eval_crop is {self.crop}; expected the share of the side that the crop "
                "keeps, more than 0 and at most 1"
            )

    @classmethod
    def of(cls, config: ConfigDict, size: tuple[int, int]) -> Self:
        """Returns the evaluation transform of a configuration, or the model's where it has none.

        Args:
          config: a configuration with the fields of `spvit_jax.config.base`.
          size: the model's image size, (height, width).
        """
        return cls(size, *config_lib.evaluation_of(config, size))

    def __call__(self, encoded: tf.Tensor) -> tf.Tensor:
        """Returns the evaluation image uint8 [height, width, 3] of an encoded image."""
        image = _decode(encoded)
        resized = self._resized_shape(tf.shape(image)[:2])
        image = _resize(image, resized, bicubic=self.interpolation == "bicubic")
        # Half an odd margin is rounded to even, as by Python's `round` in torchvision.
        corner = tf.cast(tf.round((resized - self.size) / 2), tf.int32)
        return tf.image.crop_to_bounding_box(image, *tf.unstack(corner), *self.size)

    def _resized_shape(self, shape: tf.Tensor) -> tf.Tensor:
        """Returns the shape int32 [2] that an image of a shape int32 [2] is resized to."""
        target = tuple(math.floor(side / self.crop) for side in self.size)
        if self.crop_mode == "squash":
            return tf.constant(target)
        if target[0] == target[1]:  # torchvision's `Resize`
            return target[0] * shape // tf.reduce_min(shape)
        sides = tf.cast(shape, tf.float64)  # timm's `ResizeKeepRatio`
        return tf.cast(tf.round(sides / tf.reduce_min(sides / target)), tf.int32)


@dataclasses.dataclass(frozen=True)
class WholeTransform:
    """Resize of a whole image for a teacher, whatever that does to its aspect ratio.

    Attributes:
      size: (height, width) of the result, in pixels.
    """

    size: tuple[int, int]

    def __call__(self, encoded: tf.Tensor) -> tf.Tensor:
        """Returns the whole image, resized, uint8 [height, width, 3], of an encoded image."""
        return _resize(_decode(encoded), self.size, bicubic=True)


def random_crop_box(
    shape: tf.Tensor,
    seed: tf.Tensor,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Box:
    """Draws the box of a RandomResizedCrop (Inception's, with torchvision's distributions).

    Args:
      shape: int32 [2], the image's height and width.
      seed: seed [2] of the draws.
      scale: range of the box's area as a fraction of the image's, drawn uniformly.
      ratio: range of the box's width over its height, its logarithm drawn uniformly.

    Returns:
      (top, left, height, width), int32 scalars. Of ten draws the first that fits is taken;
      if none does, the largest centred box with an allowed ratio.
    """
    seeds = tf.random.experimental.stateless_split(seed, 4)
    height, width = tf.unstack(tf.cast(shape, tf.float32))
    area = height * width * tf.random.stateless_uniform([_CROP_ATTEMPTS], seeds[0], *scale)
    log_ratio = tf.math.log(tf.constant(ratio, tf.float32))
    aspect = tf.exp(tf.random.stateless_uniform([_CROP_ATTEMPTS], seeds[1], *tf.unstack(log_ratio)))

    # The fallback is appended as a last draw, which always fits.
    whole = width / height
    fallback_w = tf.where(whole > ratio[1], height * ratio[1], width)
    fallback_h = tf.where(whole < ratio[0], width / ratio[0], height)
    box_w = tf.round(tf.concat([tf.sqrt(area * aspect), [fallback_w]], 0))
    box_h = tf.round(tf.concat([tf.sqrt(area / aspect), [fallback_h]], 0))
    fits = (box_w > 0) & (box_w <= width) & (box_h > 0) & (box_h <= height)
    fits = tf.concat([fits[:-1], [True]], 0)
    chosen = tf.argmax(fits)  # the first that is true
    box_h, box_w = box_h[chosen], box_w[chosen]

    spare_h, spare_w = height - box_h, width - box_w
    random_top = tf.floor(tf.random.stateless_uniform([], seeds[2]) * (spare_h + 1))
    random_left = tf.floor(tf.random.stateless_uniform([], seeds[3]) * (spare_w + 1))
    is_fallback = chosen == _CROP_ATTEMPTS
    top = tf.where(is_fallback, tf.floor(spare_h / 2), tf.minimum(random_top, spare_h))
    left = tf.where(is_fallback, tf.floor(spare_w / 2), tf.minimum(random_left, spare_w))
    as_int = [tf.cast(value, tf.int32) for value in (top, left, box_h, box_w)]
    return as_int[0], as_int[1], as_int[2], as_int[3]


def _check_interpolation(name: str, known: Collection[str]) -> None:
    if name not in known:
        raise InputError(f"unknown interpolation {name!r}{nearest(name, known)}")


def _decode(encoded: tf.Tensor) -> tf.Tensor:
    """Decodes an image of any format to uint8 [height, width, 3]; grey images become RGB."""
    return tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: tf.io.decode_jpeg(encoded, channels=3, dct_method=_DCT_METHOD),
        lambda: decode_other(encoded),
    )


def _decode_crop(
    encoded: tf.Tensor, draw_box: Callable[[tf.Tensor], Box]
) -> tuple[tf.Tensor, tf.Tensor]:
    """Decodes a crop of an image; of a JPEG, only the crop is decoded.

    Args:
      encoded: an encoded image of any format.
      draw_box: function from the image's (height, width) int32 [2] to the crop's box.

    Returns:
      The crop uint8 [height, width, 3]; and its box, (y0, x0, y1, x1) float32 [4] as fractions of
      the image's height and width.
    """

    def jpeg() -> tuple[tf.Tensor, tf.Tensor]:
        shape = tf.io.extract_jpeg_shape(encoded)[:2]
        box = tf.stack(draw_box(shape))
        image = tf.image.decode_and_crop_jpeg(encoded, box, channels=3, dct_method=_DCT_METHOD)
        return image, normalize(box, shape)

    def other() -> tuple[tf.Tensor, tf.Tensor]:
        image = decode_other(encoded)
        shape = tf.shape(image)[:2]
        box = tf.stack(draw_box(shape))
        return tf.image.crop_to_bounding_box(image, *tf.unstack(box)), normalize(box, shape)

    def normalize(box: tf.Tensor, shape: tf.Tensor) -> tf.Tensor:
        corners = tf.concat([box[:2], box[:2] + box[2:]], 0)
        return tf.cast(corners / tf.concat([shape, shape], 0), tf.float32)

    return tf.cond(tf.io.is_jpeg(encoded), jpeg, other)


def _resize(image: tf.Tensor, size: tf.Tensor | tuple[int, int], *, bicubic: bool) -> tf.Tensor:
    """Resizes an image uint8 [h, w, 3] to (height, width)."""

    def resize(image: np.ndarray, size: np.ndarray) -> np.ndarray:
        height, width = size.tolist()
        return resampling.resize(image, height, width, bicubic)

    inputs = [image, tf.cast(size, tf.int32)]
    resized = tf.numpy_function(resize, inputs, tf.uint8, stateful=False)
    known = size if isinstance(size, tuple) else (None, None)
    return tf.ensure_shape(resized, (*known, 3))
