"""Augmentation of single images on the host: RandAugment as in timm, 3-Augment, colour jitter.

TensorFlow draws which operations an image goes through from its seed; `apply` does them, with
Pillow's pixels, while other threads hold the GIL. On an accelerator they would cost more than the
model: a warp is a gather, and each image has a branch of its own.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import re
from collections.abc import Callable
from typing import Self

import numpy as np
from ml_collections import ConfigDict

from spvit_jax.data import colors, resampling
from spvit_jax.data.tensorflow import tf
from spvit_jax.errors import InputError

_MAX_MAGNITUDE = 10.0
_SWAP = np.array([1, 0, 2])  # exchanges x and y


class Operation(enum.IntEnum):
    """Operations on the pixels of an image, with their arguments."""

    IDENTITY = 0
    AUTOCONTRAST = 1
    EQUALIZE = 2
    INVERT = 3
    POSTERIZE = 4  # number of bits to keep
    SOLARIZE = 5  # least value to invert
    SOLARIZE_ADD = 6  # amount to add
    COLOR = 7  # factor
    CONTRAST = 8  # factor
    BRIGHTNESS = 9  # factor
    SHARPNESS = 10  # factor
    GRAYSCALE = 11
    GAUSSIAN_BLUR = 12  # standard deviation in pixels
    ROTATE = 13  # degrees, counter-clockwise
    SHEAR_X = 14  # pixels to the left for each one down
    SHEAR_Y = 15  # pixels up for each one to the right
    TRANSLATE_X = 16  # to the left, as a fraction of the width
    TRANSLATE_Y = 17  # up, as a fraction of the height


_COLORS: dict[float, Callable[[np.ndarray, float], np.ndarray]] = {
    Operation.AUTOCONTRAST: lambda image, _: colors.autocontrast(image),
    Operation.EQUALIZE: lambda image, _: colors.equalize(image),
    Operation.INVERT: lambda image, _: colors.invert(image),
    Operation.POSTERIZE: lambda image, bits: colors.posterize(image, int(bits)),
    Operation.SOLARIZE: lambda image, threshold: colors.solarize(image, int(threshold)),
    Operation.SOLARIZE_ADD: lambda image, amount: colors.solarize_add(image, int(amount)),
    Operation.COLOR: colors.color,
    Operation.CONTRAST: colors.contrast,
    Operation.BRIGHTNESS: colors.brightness,
    Operation.SHARPNESS: colors.sharpness,
    Operation.GRAYSCALE: lambda image, _: colors.grayscale(image),
    Operation.GAUSSIAN_BLUR: resampling.gaussian_blur,
}

# RandAugment's operations by timm's names, and their arguments from a level of 0 to 1 and a sign.
RAND_AUGMENT: dict[str, tuple[Operation, Callable[[tf.Tensor, tf.Tensor], tf.Tensor]]] = {
    "AutoContrast": (Operation.AUTOCONTRAST, lambda level, sign: level),
    "Equalize": (Operation.EQUALIZE, lambda level, sign: level),
    "Invert": (Operation.INVERT, lambda level, sign: level),
    "Rotate": (Operation.ROTATE, lambda level, sign: sign * (level * 30)),
    "PosterizeIncreasing": (Operation.POSTERIZE, lambda level, sign: 4 - tf.floor(level * 4)),
    "SolarizeIncreasing": (Operation.SOLARIZE, lambda level, sign: 256 - tf.floor(level * 256)),
    "SolarizeAdd": (Operation.SOLARIZE_ADD, lambda level, sign: tf.floor(level * 110)),
    "ColorIncreasing": (Operation.COLOR, lambda level, sign: _factor(level, sign)),
    "ContrastIncreasing": (Operation.CONTRAST, lambda level, sign: _factor(level, sign)),
    "BrightnessIncreasing": (Operation.BRIGHTNESS, lambda level, sign: _factor(level, sign)),
    "SharpnessIncreasing": (Operation.SHARPNESS, lambda level, sign: _factor(level, sign)),
    "ShearX": (Operation.SHEAR_X, lambda level, sign: sign * (level * 0.3)),
    "ShearY": (Operation.SHEAR_Y, lambda level, sign: sign * (level * 0.3)),
    "TranslateXRel": (Operation.TRANSLATE_X, lambda level, sign: sign * (level * 0.45)),
    "TranslateYRel": (Operation.TRANSLATE_Y, lambda level, sign: sign * (level * 0.45)),
}


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """RandAugment (arXiv 1909.13719) as in timm, with operations that grow with the magnitude.

    Attributes:
      magnitude: mean magnitude of the operations, at most 10.
      std: standard deviation of the magnitude, which is drawn anew for each operation.
      layers: number of operations drawn per image, with replacement.
      probability: probability of applying an operation that was drawn.
      interpolation: interpolation of warps, "bilinear", "bicubic", or "random" for either with
        the same probability.
    """

    magnitude: float = 9.0
    std: float = 0.5
    layers: int = 2
    probability: float = 0.5
    interpolation: str = "random"

    @classmethod
    def parse(cls, text: str, interpolation: str = "random") -> Self:
        """Returns the policy that timm's notation describes, `rand-m9-n3-mstd0.5-inc1`.

        Args:
          text: the policy in timm's notation.
          interpolation: interpolation of warps; timm takes that of the random crop.

        Raises:
          InputError: the text is not of that form, or lacks `inc1`.
        """
        fields = {"m": 10.0, "mstd": 0.0, "n": 2.0, "p": 0.5, "inc": 0.0}
        first, *parts = text.split("-")
        for part in parts:
            match = re.fullmatch(r"(mstd|m|n|p|inc)(\d+\.?\d*)", part)
            if match is None:
                first = ""
                break
            fields[match[1]] = float(match[2])
        known = fields["inc"] == 1 and fields["n"] >= 1 and fields["mstd"] <= 100
        if first != "rand" or not known or fields["m"] > _MAX_MAGNITUDE:
            raise InputError(
                f"augment.rand_augment is {text!r}; expected for example 'rand-m9-mstd0.5-inc1', "
                "with a magnitude m of at most 10, n operations, and inc1"
            )
        return cls(fields["m"], fields["mstd"], int(fields["n"]), fields["p"], interpolation)

    def draw(self, seed: tf.Tensor) -> tf.Tensor:
        """Draws operations float64 [layers, 3] for a seed int64 [2], as `apply` takes them."""
        uniform_seed, normal_seed = _split(seed, 2)
        uniform = tf.random.stateless_uniform([4, self.layers], uniform_seed, dtype=tf.float64)
        normal = tf.random.stateless_normal([self.layers], normal_seed, dtype=tf.float64)
        magnitude = tf.clip_by_value(self.magnitude + self.std * normal, 0, _MAX_MAGNITUDE)
        level, sign = magnitude / _MAX_MAGNITUDE, tf.where(uniform[0] < 0.5, 1.0, -1.0)
        sign = tf.cast(sign, tf.float64)
        codes, arguments = zip(*RAND_AUGMENT.values(), strict=True)
        chosen = tf.cast(uniform[1] * len(codes), tf.int32)
        every = tf.stack([argument(level, sign) for argument in arguments], axis=1)
        operation = tf.gather(tf.constant(codes, tf.float64), chosen)
        bicubic = {"random": 0.5, "bicubic": 1.0}.get(self.interpolation, 0.0)  # its probability
        return tf.stack(
            [
                tf.where(uniform[2] < self.probability, operation, Operation.IDENTITY),
                tf.gather(every, chosen, batch_dims=1),
                tf.cast(uniform[3] < bicubic, tf.float64),
            ],
            axis=1,
        )


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Augmentation of single images; each is off by default, and they follow in this order.

    Attributes:
      three_augment: whether each image is made grey, solarized or blurred (3-Augment of DeiT III,
        arXiv 2204.07118).
      color_jitter: half the range of the factors by which brightness, contrast and saturation are
        scaled in a random order, which are uniform in 1 ± color_jitter and at least 0.
      rand_augment: RandAugment's policy, or None.
      fill: colour of pixels that come from outside the image.
      official_axes: whether the affine maps shear and translate along the other axis than the
        images, as those of label maps do in SP-ViT's authors' code.
    """

    three_augment: bool = False
    color_jitter: float = 0.0
    rand_augment: RandAugment | None = None
    fill: tuple[int, int, int] = (0, 0, 0)
    official_axes: bool = False

    @classmethod
    def of(cls, config: ConfigDict) -> Self:
        """Returns the augmentation of a configuration; the fill is its mean colour."""
        augment = config.augment
        policy = augment.rand_augment
        red, green, blue = (round(255 * value) for value in config.data.mean)
        return cls(
            three_augment=augment.three_augment,
            color_jitter=augment.color_jitter,
            rand_augment=RandAugment.parse(policy, augment.interpolation) if policy else None,
            fill=(red, green, blue),
            official_axes=config.token_labels.official_axes,
        )

    @property
    def moves_pixels(self) -> bool:
        """Whether images may be warped, so that what goes with their pixels has to move too."""
        return self.rand_augment is not None

    def draw(self, seed: tf.Tensor) -> tf.Tensor:
        """Draws operations float64 [n, 3] for a seed int64 [2], as `apply` takes them."""
        three_seed, jitter_seed, policy_seed = _split(seed, 3)
        drawn = [tf.zeros([0, 3], tf.float64)]
        if self.three_augment:
            drawn.append(_draw_three_augment(three_seed))
        if self.color_jitter:
            drawn.append(_draw_color_jitter(jitter_seed, self.color_jitter))
        if self.rand_augment is not None:
            drawn.append(self.rand_augment.draw(policy_seed))
        return tf.concat(drawn, axis=0)

    def apply(self, images: np.ndarray, operations: np.ndarray) -> np.ndarray:
        """Applies operations to a group of images, in place.

        Args:
          images: uint8 [g, h, w, 3].
          operations: float64 [g, n, 3], for each image in order: an `Operation`, its argument, and
            whether a warp interpolates by the bicubic filter, 1 or 0.

        Returns:
          The affine maps float32 [g, 3, 3] from a position (x, y, 1) in an image to that before
          the operations, as fractions of width and height.
        """
        _, height, width, _ = images.shape
        size = np.array([width, height, 1])
        moves = np.zeros((len(images), 3, 3), np.float32) + np.eye(3, dtype=np.float32)
        for i, rows in enumerate(operations.tolist()):
            image, move = images[i], None
            for code, argument, bicubic in rows:
                if color := _COLORS.get(code):
                    image = color(image, argument)
                elif code != Operation.IDENTITY:
                    matrix = affine_map(code, argument, (height, width))
                    fill = np.array(self.fill, np.uint8)
                    image = resampling.warp(image, matrix, bool(bicubic), fill)
                    if self.official_axes and code != Operation.ROTATE:
                        matrix = matrix[_SWAP][:, _SWAP]
                    move = matrix if move is None else move @ matrix
            if image is not images[i]:
                images[i] = image
            if move is not None:
                moves[i] = move * size / size[:, None]
        return moves


def affine_map(operation: float, argument: float, shape: tuple[int, int]) -> np.ndarray:
    """Returns the affine map of a warp float64 [3, 3], as `resampling.warp` takes it.

    Args:
      operation: an `Operation` that is a warp.
      argument: its argument.
      shape: (height, width) of the image.
    """
    height, width = shape
    if operation == Operation.ROTATE:
        angle = -math.radians(argument % 360)
        cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
        x, y = width / 2, height / 2
        rows = (cos, sin, cos * -x + sin * -y + x), (-sin, cos, -sin * -x + cos * -y + y)
    else:
        rows = {
            Operation.SHEAR_X: ((1, argument, 0), (0, 1, 0)),
            Operation.SHEAR_Y: ((1, 0, 0), (argument, 1, 0)),
            Operation.TRANSLATE_X: ((1, 0, argument * width), (0, 1, 0)),
            Operation.TRANSLATE_Y: ((1, 0, 0), (0, 1, argument * height)),
        }[Operation(int(operation))]
    return np.array([*rows, (0, 0, 1)], np.float64)


def _draw_three_augment(seed: tf.Tensor) -> tf.Tensor:
    """Draws one of 3-Augment's operations float64 [1, 3]; the blur's radius is 0.1 to 2 pixels."""
    choice, share = tf.unstack(tf.random.stateless_uniform([2], seed, dtype=tf.float64))
    rows = tf.stack(
        [
            tf.constant([Operation.GRAYSCALE, 0, 0], tf.float64),
            tf.constant([Operation.SOLARIZE, 128, 0], tf.float64),
            tf.stack([tf.constant(Operation.GAUSSIAN_BLUR, tf.float64), 0.1 + 1.9 * share, 0.0]),
        ]
    )
    return rows[tf.cast(3 * choice, tf.int32)][None]


def _draw_color_jitter(seed: tf.Tensor, strength: float) -> tf.Tensor:
    """Draws factors of brightness, contrast and saturation in a random order, float64 [3, 3]."""
    order, share = tf.unstack(tf.random.stateless_uniform([2, 3], seed, dtype=tf.float64))
    low, high = max(0.0, 1 - strength), 1 + strength
    codes = tf.constant([Operation.BRIGHTNESS, Operation.CONTRAST, Operation.COLOR], tf.float64)
    operations = tf.gather(codes, tf.argsort(order))
    return tf.stack([operations, low + (high - low) * share, tf.zeros_like(share)], axis=1)


def _factor(level: tf.Tensor, sign: tf.Tensor) -> tf.Tensor:
    """Returns the factor of a colour operation, at least 0.1; 1 is no change."""
    return tf.maximum(1 + sign * (level * 0.9), 0.1)


def _split(seed: tf.Tensor, count: int) -> list[tf.Tensor]:
    return tf.unstack(tf.random.experimental.stateless_split(seed, count))
