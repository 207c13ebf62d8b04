"""RandAugment as in timm, colour jitter and 3-Augment, on the device and inside the step.

Which operations are drawn, and their strengths; the operations themselves are Pillow's, in
`pixels.py`. Each example has a random key of its own, so that its augmentation does not depend on
its batch.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from spvit_jax.augment import pixels
from spvit_jax.errors import InputError

_MAX_MAGNITUDE = 10.0
_POINTWISE: tuple[Callable[[jax.Array, jax.Array, jax.Array], jax.Array], ...] = (
    # Arguments: an image, a level from 0 to 1, and a sign of 1 or -1.
    lambda image, level, sign: pixels.autocontrast(image),
    lambda image, level, sign: pixels.equalize(image),
    lambda image, level, sign: pixels.invert(image),
    lambda image, level, sign: pixels.posterize(image, 4 - _whole(4 * level)),
    lambda image, level, sign: pixels.solarize(image, 256 - _whole(256 * level)),
    lambda image, level, sign: pixels.solarize_add(image, _whole(110 * level)),
    lambda image, level, sign: pixels.color(image, _factor(level, sign)),
    lambda image, level, sign: pixels.contrast(image, _factor(level, sign)),
    lambda image, level, sign: pixels.brightness(image, _factor(level, sign)),
    lambda image, level, sign: pixels.sharpness(image, _factor(level, sign)),
)
POINTWISE = (
    *("AutoContrast", "Equalize", "Invert", "PosterizeIncreasing", "SolarizeIncreasing"),
    *("SolarizeAdd", "ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing"),
    "SharpnessIncreasing",
)
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
OPERATIONS = POINTWISE + GEOMETRIC
_SWAP = np.array([1, 0, 2])  # exchanges x and y


class Draw(NamedTuple):
    """Random draw of one RandAugment layer.

    Attributes:
      operation: int32, index of the operation in `OPERATIONS`.
      active: bool, whether to apply the operation.
      level: float32, strength from 0 to 1.
      sign: float32, 1 or -1.
      bicubic: bool, whether a warp interpolates by bicubic filter.
    """

    operation: jax.Array
    active: jax.Array
    level: jax.Array
    sign: jax.Array
    bicubic: jax.Array


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
        if first != "rand" or fields["inc"] != 1 or fields["n"] < 1 or fields["m"] > _MAX_MAGNITUDE:
            raise InputError(
                f"augment.rand_augment is {text!r}; expected for example 'rand-m9-mstd0.5-inc1', "
                "with a magnitude m of at most 10, n operations, and inc1"
            )
        return cls(fields["m"], fields["mstd"], int(fields["n"]), fields["p"], interpolation)

    def __call__(
        self, images: jax.Array, keys: jax.Array, fill: jax.Array, *, official_axes: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Augments a batch of images.

        Args:
          images: float32 [B, h, w, 3], whole numbers from 0 to 255.
          keys: random keys [B].
          fill: colour [3] of pixels that come from outside the image.
          official_axes: whether the affine maps shear and translate along the other axis than
            the images, as those of label maps do in SP-ViT's authors' code.

        Returns:
          The augmented images [B, h, w, 3], and the affine maps [B, 3, 3] from their pixels to
          the original ones.
        """
        augment = functools.partial(self._augment, fill=fill, official_axes=official_axes)
        return jax.vmap(augment)(images, keys)

    def _augment(
        self, image: jax.Array, key: jax.Array, fill: jax.Array, official_axes: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Augments one image [h, w, 3]; returns also its affine map [3, 3]."""

        def layer(
            index: jax.Array, carry: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            image, total = carry
            draw = self.draw(jax.random.fold_in(key, index))
            changed, matrix = apply(
                image, draw.operation, draw.level, draw.sign, fill, bicubic=draw.bicubic
            )
            if official_axes:
                is_rotation = draw.operation == OPERATIONS.index("Rotate")
                matrix = jnp.where(is_rotation, matrix, matrix[_SWAP][:, _SWAP])
            return (
                jnp.where(draw.active, changed, image),
                jnp.where(draw.active, total @ matrix, total),
            )

        # A loop, so that the operations are compiled once, not for each layer.
        return jax.lax.fori_loop(0, self.layers, layer, (image, jnp.eye(3)))

    def draw(self, key: jax.Array) -> Draw:
        """Draws the operation of one RandAugment layer, and its strength."""
        keys = jax.random.split(key, 5)
        magnitude = self.magnitude + self.std * jax.random.normal(keys[2])
        return Draw(
            operation=jax.random.randint(keys[0], (), 0, len(OPERATIONS)),
            active=jax.random.bernoulli(keys[1], self.probability),
            level=jnp.clip(magnitude, 0, _MAX_MAGNITUDE) / _MAX_MAGNITUDE,
            sign=jax.random.rademacher(keys[3], (), jnp.float32),
            bicubic=(
                jax.random.bernoulli(keys[4])
                if self.interpolation == "random"
                else jnp.array(self.interpolation == "bicubic")
            ),
        )


def apply(
    image: jax.Array,
    operation: jax.Array,
    level: jax.Array,
    sign: jax.Array,
    fill: jax.Array,
    *,
    bicubic: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Applies one of RandAugment's operations to an image.

    Args:
      image: float32 [h, w, 3], whole numbers from 0 to 255.
      operation: int32, index of the operation in `OPERATIONS`.
      level: strength of the operation, from 0 to 1.
      sign: 1 or -1, the direction of a rotation, shear or translation, and whether colour,
        contrast, brightness and sharpness are raised or lowered.
      fill: colour [3] of pixels that come from outside the image.
      bicubic: bool, whether a warp interpolates by the bicubic filter, not bilinearly.

    Returns:
      The image [h, w, 3], and the affine map [3, 3] from its pixels to the original ones.
    """
    geometric = operation - len(POINTWISE)
    matrices = _matrices((image.shape[0], image.shape[1]), level * sign)
    matrix = jnp.where(geometric >= 0, matrices[jnp.maximum(geometric, 0)], jnp.eye(3))
    branches = [
        *_POINTWISE,
        lambda image, level, sign: pixels.warp(image, matrix, fill, bicubic=bicubic),
    ]
    branch = jnp.minimum(operation, len(POINTWISE))
    return jax.lax.switch(branch, branches, image, level, sign), matrix


def _matrices(shape: tuple[int, int], level: jax.Array) -> jax.Array:
    """Returns the affine maps [5, 3, 3] of the geometric operations, from result to image."""
    h, w = shape
    zero, one = jnp.zeros(()), jnp.ones(())
    angle = -jnp.deg2rad(30 * level)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x, y = w / 2, h / 2
    shear = 0.3 * level
    rows = (
        ((cos, sin, x - cos * x - sin * y), (-sin, cos, y + sin * x - cos * y)),
        ((one, shear, zero), (zero, one, zero)),
        ((one, zero, zero), (shear, one, zero)),
        ((one, zero, 0.45 * level * w), (zero, one, zero)),
        ((one, zero, zero), (zero, one, 0.45 * level * h)),
    )
    last = jnp.stack([zero, zero, one])
    return jnp.stack([jnp.stack([jnp.stack(top), jnp.stack(low), last]) for top, low in rows])


def color_jitter(images: jax.Array, keys: jax.Array, strength: float) -> jax.Array:
    """Changes the brightness, contrast and saturation of images at random, in a random order.

    Args:
      images: float32 [B, h, w, 3], whole numbers from 0 to 255.
      keys: random keys [B].
      strength: half the range of the factors, which are uniform in 1 ± strength, at least 0.

    Returns:
      The changed images [B, h, w, 3].
    """
    operations = (pixels.brightness, pixels.contrast, pixels.color)

    def jitter(image: jax.Array, key: jax.Array) -> jax.Array:
        order_key, factor_key = jax.random.split(key)
        low = max(0.0, 1 - strength)
        factors = jax.random.uniform(factor_key, (3,), minval=low, maxval=1 + strength)
        order = jax.random.permutation(order_key, 3)
        for i in range(3):
            image = jax.lax.switch(order[i], operations, image, factors[i])
        return image

    return jax.vmap(jitter)(images, keys)


def three_augment(images: jax.Array, keys: jax.Array) -> jax.Array:
    """Makes each image grey, solarizes it or blurs it (3-Augment of DeiT III, arXiv 2204.07118).

    Arguments and result as in `color_jitter`; the blur's radius is uniform in 0.1 to 2 pixels.
    """

    def augment(image: jax.Array, key: jax.Array) -> jax.Array:
        choice_key, radius_key = jax.random.split(key)
        radius = jax.random.uniform(radius_key, (), minval=0.1, maxval=2.0)
        branches = (
            lambda image: pixels.grayscale(image),
            lambda image: pixels.solarize(image, jnp.float32(128)),
            lambda image: pixels.gaussian_blur(image, radius),
        )
        return jax.lax.switch(jax.random.randint(choice_key, (), 0, 3), branches, image)

    return jax.vmap(augment)(images, keys)


def _whole(value: jax.Array) -> jax.Array:
    """Rounds down to a whole number, allowing for a product such as 0.9 · 10 just below it."""
    return jnp.floor(value + 1e-4)


def _factor(level: jax.Array, sign: jax.Array) -> jax.Array:
    """Returns the factor of a colour operation, at least 0.1; 1 is no change."""
    return jnp.maximum(0.1, 1 + 0.9 * level * sign)
