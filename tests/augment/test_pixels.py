"""Operation by operation against Pillow, on photographs and at several strengths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from sklearn.datasets import load_sample_images

from spvit_jax.augment import pixels, randaugment
from tests.helpers.timm_reference import auto_augment

FILL = (124, 116, 104)
LEVELS = (0.0, 0.25, 0.5, 0.9, 1.0)


@functools.cache
def photographs():
    """Two photographs and a grey one with a narrow range, 64×96 pixels."""
    colour = [Image.fromarray(p).resize((96, 64)) for p in load_sample_images().images]
    dull = colour[0].convert("L").point(lambda v: 100 + v // 8).convert("RGB")
    return [*colour, dull]


def differences(ours, theirs):
    """Mean absolute difference to Pillow's result, for each photograph."""
    ours = jax.jit(ours)
    results = []
    for photograph in photographs():
        found = np.asarray(ours(jnp.asarray(np.asarray(photograph), jnp.float32)))
        results.append(abs(found - np.asarray(theirs(photograph), float)).mean())
    return results


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (pixels.autocontrast, ImageOps.autocontrast),
        (pixels.equalize, ImageOps.equalize),
        (pixels.invert, ImageOps.invert),
        (pixels.grayscale, lambda p: p.convert("L").convert("RGB")),
    ],
)
def test_without_a_strength(ours, theirs):
    assert max(differences(ours, theirs)) < 0.01


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.55, 1.0, 1.45, 1.9])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (pixels.color, ImageEnhance.Color),
        (pixels.contrast, ImageEnhance.Contrast),
        (pixels.brightness, ImageEnhance.Brightness),
        (pixels.sharpness, ImageEnhance.Sharpness),
    ],
)
def test_enhancements(ours, theirs, factor):
    found = differences(lambda p: ours(p, jnp.float32(factor)), lambda p: theirs(p).enhance(factor))
    assert max(found) < 0.05


def test_a_gaussian_blur_is_near_the_boxes_of_pillow():
    """Pillow's three box filters are an approximation, and a coarse one of small radii."""
    for radius in (0.5, 1.0, 2.0):
        found = differences(
            lambda p: pixels.gaussian_blur(p, jnp.float32(radius)),  # noqa: B023
            lambda p: p.filter(ImageFilter.GaussianBlur(radius)),  # noqa: B023
        )
        assert max(found) < 1


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("name", "bicubic"),
    [
        *[(name, False) for name in randaugment.OPERATIONS],
        *[(name, True) for name in randaugment.GEOMETRIC],
    ],
)
def test_rand_augments_operations_are_timms(name, level, sign, bicubic, monkeypatch):
    monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value: sign * value)
    resample = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    settings = {"img_mean": FILL, "interpolation": resample}
    theirs = auto_augment.AugmentOp(name, prob=1.0, magnitude=10 * level, hparams=settings)
    operation = randaugment.OPERATIONS.index(name)

    def ours(image):
        arguments = (jnp.float32(level), jnp.float32(sign), jnp.array(FILL, jnp.float32))
        return randaugment.apply(image, operation, *arguments, bicubic=bicubic)[0]

    assert max(differences(ours, theirs)) < 0.05
