"""Pillow's operations on the pixels of one image, on the device, for RandAugment.

Images and results are float32 [h, w, 3] with whole numbers from 0 to 255. Rounding is Pillow's, so
that recipes made with it carry over. Warps take the matrix from output to input.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_LUMA = (19595, 38470, 7471)  # of red, green and blue, in 65536ths: ITU-R 601-2
_SMOOTH = ((1, 1, 1), (1, 5, 1), (1, 1, 1))


def autocontrast(image: jax.Array) -> jax.Array:
    """Stretches each channel of an image so that its darkest pixel is 0 and its brightest 255."""
    low, high = image.min((0, 1)), image.max((0, 1))
    scale = 255 / jnp.maximum(high - low, 1)
    stretched = jnp.clip(jnp.floor((image - low) * scale + 1e-3), 0, 255)
    return jnp.where(high > low, stretched, image)


def equalize(image: jax.Array) -> jax.Array:
    """Equalizes the histogram of each channel of an image."""
    levels = jnp.arange(256)
    is_level = image[..., None].astype(jnp.int32) == levels  # [h, w, 3, 256]
    histogram = is_level.sum((0, 1))
    brightest = jnp.take_along_axis(histogram, image.max((0, 1)).astype(jnp.int32)[:, None], axis=1)
    step = (histogram.sum(1, keepdims=True) - brightest) // 255
    below = jnp.cumsum(histogram, axis=1) - histogram
    table = jnp.clip((below + step // 2) // jnp.maximum(step, 1), 0, 255)
    table = jnp.where(step > 0, table, levels)
    # A sum over levels instead of a gather, which is slow on an accelerator.
    return jnp.where(is_level, table, 0).sum(-1).astype(image.dtype)


def invert(image: jax.Array) -> jax.Array:
    """Inverts the pixels of an image: x becomes 255 - x."""
    return 255 - image


def posterize(image: jax.Array, bits: jax.Array) -> jax.Array:
    """Keeps the `bits` most significant bits of each pixel, 0 to 8."""
    unit = 2.0 ** (8 - bits)
    return jnp.floor(image / unit) * unit


def solarize(image: jax.Array, threshold: jax.Array) -> jax.Array:
    """Inverts the pixels of an image that are at or above a threshold."""
    return jnp.where(image < threshold, image, 255 - image)


def solarize_add(image: jax.Array, amount: jax.Array) -> jax.Array:
    """Adds an amount to the pixels of an image that are below 128, up to 255."""
    return jnp.where(image < 128, jnp.minimum(image + amount, 255), image)


def grayscale(image: jax.Array) -> jax.Array:
    """Replaces all channels of an image by its luma."""
    weighted = image.astype(jnp.int32) * jnp.array(_LUMA)
    luma = (weighted.sum(-1, keepdims=True) + 0x8000) >> 16
    return jnp.broadcast_to(luma, image.shape).astype(image.dtype)


def color(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Scales the saturation of an image by a factor: 0 is grey, 1 the image itself."""
    return _blend(grayscale(image), image, factor)


def contrast(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Scales the contrast of an image around its mean luma: 0 is flat, 1 the image itself."""
    return _blend(jnp.floor(grayscale(image)[..., 0].mean() + 0.5), image, factor)


def brightness(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Scales the brightness of an image by a factor: 0 is black, 1 the image itself."""
    return _blend(jnp.zeros_like(image), image, factor)


def sharpness(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Scales the sharpness of an image, border pixels excepted: 0 is smooth, 1 the image itself."""
    h, w = image.shape[:2]
    total = sum(
        weight * image[i : h - 2 + i, j : w - 2 + j]
        for i, row in enumerate(_SMOOTH)
        for j, weight in enumerate(row)
    )
    smooth = image.at[1:-1, 1:-1].set(jnp.floor(total / 13 + 0.5))
    return _blend(smooth, image, factor)


def gaussian_blur(image: jax.Array, radius: jax.Array, *, reach: int = 6) -> jax.Array:
    """Blurs an image with a Gaussian of standard deviation `radius`, in pixels.

    Pillow approximates the Gaussian by three box filters; this is the Gaussian itself, up to
    `reach` pixels from the centre. Pixels of the border are repeated outside.
    """
    distance = jnp.arange(-reach, reach + 1)
    weights = jnp.exp(-0.5 * (distance / radius) ** 2)
    weights = weights / weights.sum()
    for axis in (0, 1):
        width = [(reach, reach) if axis == a else (0, 0) for a in range(3)]
        padded, length = jnp.pad(image, width, mode="edge"), image.shape[axis]
        image = sum(
            weight * jax.lax.slice_in_dim(padded, k, k + length, axis=axis)
            for k, weight in enumerate(weights)
        )
    return jnp.floor(image + 0.5)


def warp(image: jax.Array, matrix: jax.Array, fill: jax.Array, *, bicubic: jax.Array) -> jax.Array:
    """Warps an image by an affine map.

    Args:
      image: float32 [h, w, 3].
      matrix: the affine map [3, 3] from (x, y, 1) in the result to that in the image, in pixels,
        with the corner of the image at 0 and the centre of the first pixel at 0.5.
      fill: colour [3] of pixels that come from outside the image.
      bicubic: bool, whether to interpolate by Pillow's bicubic filter (a = -1), not bilinearly.

    Returns:
      The warped image, float32 [h, w, 3].
    """
    h, w = image.shape[:2]
    y, x = jnp.meshgrid(jnp.arange(h) + 0.5, jnp.arange(w) + 0.5, indexing="ij")
    source_x, source_y = (matrix[i, 0] * x + matrix[i, 1] * y + matrix[i, 2] for i in range(2))
    inside = (source_x >= 0) & (source_x < w) & (source_y >= 0) & (source_y < h)

    first_x, weights_x = _taps(source_x, bicubic)
    first_y, weights_y = _taps(source_y, bicubic)
    total = jnp.zeros_like(image)
    for i in range(4):
        row = jnp.clip(first_y + i, 0, h - 1)
        for j in range(4):
            column = jnp.clip(first_x + j, 0, w - 1)
            weight = weights_y[i] * weights_x[j]
            total = total + weight[..., None] * image[row, column]
    return jnp.where(inside[..., None], jnp.clip(jnp.floor(total + 1e-3), 0, 255), fill)


def _taps(position: jax.Array, bicubic: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """Returns the first of four neighbouring pixels along an axis, and the weights of the four."""
    floor = jnp.floor(position - 0.5)
    t = position - 0.5 - floor
    near = 1 - t
    cubic = [
        -t * near**2,
        1 - 2 * t**2 + t**3,
        1 - 2 * near**2 + near**3,
        -near * t**2,
    ]
    linear = [jnp.zeros_like(t), near, t, jnp.zeros_like(t)]
    weights = [jnp.where(bicubic, c, b) for c, b in zip(cubic, linear, strict=True)]
    return floor.astype(jnp.int32) - 1, weights


def _blend(degenerate: jax.Array, image: jax.Array, factor: jax.Array) -> jax.Array:
    """Returns degenerate + factor · (image - degenerate), clipped to 0 … 255 and rounded down."""
    return jnp.clip(jnp.floor(degenerate + factor * (image - degenerate) + 1e-4), 0, 255)
