"""Colour operations on images with Pillow's pixels, bit for bit, and without the GIL.

Images and results are uint8 [h, w, 3].
"""

from __future__ import annotations

import numpy as np

from spvit_jax.data.compiled import compiled

_LUMA = (19595, 38470, 7471)  # of red, green and blue, in 65536ths: ITU-R 601-2


@compiled
def autocontrast(image: np.ndarray) -> np.ndarray:
    """Stretches each channel of an image so that its darkest pixel is 0 and its brightest 255."""
    counts, table = _histogram(image), np.empty((3, 256), np.uint8)
    for c in range(3):
        low, high = 0, 255
        while not counts[c, low]:
            low += 1
        while not counts[c, high]:
            high -= 1
        scale = 255.0 / max(high - low, 1)
        for value in range(256):
            stretched = int(value * scale - low * scale)
            table[c, value] = min(max(stretched, 0), 255) if high > low else value
    return _look_up(image, table)


@compiled
def equalize(image: np.ndarray) -> np.ndarray:
    """Equalizes the histogram of each channel of an image."""
    counts, table = _histogram(image), np.empty((3, 256), np.uint8)
    for c in range(3):
        brightest = 255
        while not counts[c, brightest]:
            brightest -= 1
        step = (image.shape[0] * image.shape[1] - counts[c, brightest]) // 255
        below = step // 2
        for value in range(256):
            table[c, value] = min(below // step, 255) if step else value
            below += counts[c, value]
    return _look_up(image, table)


@compiled
def invert(image: np.ndarray) -> np.ndarray:
    """Inverts the pixels of an image: x becomes 255 - x."""
    return solarize(image, 0)


@compiled
def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """Keeps the `bits` most significant bits of each pixel, 0 to 8."""
    table = np.empty((3, 256), np.uint8)
    for value in range(256):
        table[:, value] = value >> (8 - bits) << (8 - bits)
    return _look_up(image, table)


@compiled
def solarize(image: np.ndarray, threshold: int) -> np.ndarray:
    """Inverts the pixels of an image that are at or above a threshold."""
    table = np.empty((3, 256), np.uint8)
    for value in range(256):
        table[:, value] = value if value < threshold else 255 - value
    return _look_up(image, table)


@compiled
def solarize_add(image: np.ndarray, amount: int) -> np.ndarray:
    """Adds an amount to the pixels of an image that are below 128, up to 255."""
    table = np.empty((3, 256), np.uint8)
    for value in range(256):
        table[:, value] = min(value + amount, 255) if value < 128 else value
    return _look_up(image, table)


@compiled
def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Scales the brightness of an image by a factor: 0 is black, 1 the image itself."""
    return _blend_with_value(0, image, factor)


@compiled
def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Scales the contrast of an image around its mean luma: 0 is flat, 1 the image itself."""
    total, count = 0, image.shape[0] * image.shape[1]
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            total += _luma(image, y, x)
    return _blend_with_value(int(total / count + 0.5), image, factor)


@compiled
def color(image: np.ndarray, factor: float) -> np.ndarray:
    """Scales the saturation of an image by a factor: 0 is grey, 1 the image itself."""
    return _blend(grayscale(image), image, factor)


@compiled
def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Scales the sharpness of an image, border pixels excepted: 0 is smooth, 1 the image itself."""
    smooth = image.copy()
    for y in range(1, image.shape[0] - 1):
        for x in range(1, image.shape[1] - 1):
            for c in range(3):
                total = 4 * image[y, x, c]  # the centre counts five times
                for i in range(-1, 2):
                    for j in range(-1, 2):
                        total += image[y + i, x + j, c]
                smooth[y, x, c] = (2 * total + 13) // 26  # the mean, rounded
    return _blend(smooth, image, factor)


@compiled
def grayscale(image: np.ndarray) -> np.ndarray:
    """Replaces all channels of an image by its luma."""
    result = np.empty_like(image)
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            luma = _luma(image, y, x)
            for c in range(3):
                result[y, x, c] = luma
    return result


@compiled
def _luma(image: np.ndarray, y: int, x: int) -> int:
    total = 0x8000
    for c in range(3):
        total += _LUMA[c] * image[y, x, c]
    return total >> 16


@compiled
def _look_up(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Replaces each value of an image by that in its channel's table, uint8 [3, 256]."""
    result = np.empty_like(image)
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            for c in range(3):
                result[y, x, c] = table[c, image[y, x, c]]
    return result


@compiled
def _histogram(image: np.ndarray) -> np.ndarray:
    """Returns the number of pixels of each value by channel, int64 [3, 256]."""
    counts = np.zeros((3, 256), np.int64)
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            for c in range(3):
                counts[c, image[y, x, c]] += 1
    return counts


@compiled
def _blend_with_value(degenerate: int, image: np.ndarray, factor: float) -> np.ndarray:
    """Blends a value and an image as `_blend` does."""
    table = np.empty((3, 256), np.uint8)
    for value in range(256):
        table[:, value] = _blended(np.float32(degenerate), np.float32(value), np.float32(factor))
    return _look_up(image, table)


@compiled
def _blend(degenerate: np.ndarray, image: np.ndarray, factor: float) -> np.ndarray:
    """Blends two images: a factor of 0 gives the first, 1 the second; above 1 it extrapolates."""
    result = np.empty_like(image)
    starts, values, blended = degenerate.reshape(-1), image.reshape(-1), result.reshape(-1)
    for i in range(len(values)):
        start, value = np.float32(starts[i]), np.float32(values[i])
        blended[i] = _blended(start, value, np.float32(factor))
    return result


@compiled
def _blended(start: np.float32, value: np.float32, factor: np.float32) -> int:
    """Returns start + factor · (value - start) within 0 … 255, rounded down."""
    blended = start + factor * (value - start)
    return int(min(max(blended, np.float32(0)), np.float32(255)))
