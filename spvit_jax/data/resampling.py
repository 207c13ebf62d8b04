"""Resizing, warps and blurs of images with Pillow's pixels, bit for bit, and without the GIL.

Images and results are uint8 [h, w, 3]. All is done along rows, which are contiguous, so that it
becomes vector code; columns are rows of the transposed image.
"""

from __future__ import annotations

import math

import numpy as np

from spvit_jax.data.compiled import compiled

_BITS = 22  # of the fractions in a resizing filter's weights
_BLUR_BITS = 24  # of those in a box filter's
_BLUR_PASSES = 3  # box filters that stand for a Gaussian
_PADDING = 2  # pixels around an image, so that each place in it has four neighbours on each axis


@compiled
def resize(image: np.ndarray, height: int, width: int, bicubic: bool) -> np.ndarray:
    """Resizes an image by Pillow's bicubic filter or its bilinear one, both antialiased."""
    h, w, _ = image.shape
    if w == width:
        resized = image.copy()
    else:
        columns = _resize_rows(_transposed(image).reshape(w, 3 * h), width, bicubic)
        resized = _transposed(columns.reshape(width, h, 3))
    if h == height:
        return resized
    rows = _resize_rows(resized.reshape(h, 3 * width), height, bicubic)
    return rows.reshape(height, width, 3)


@compiled
def resize_crops(
    pixels: np.ndarray,
    shapes: np.ndarray,
    height: int,
    width: int,
    bicubic: np.ndarray,
    flips: np.ndarray,
) -> np.ndarray:
    """Resizes a group of crops to one size, and flips some of them.

    Args:
      pixels: uint8 [g, n], in each row the h·w·3 values of a crop, and then anything.
      shapes: int64 [g, 2], the crops' heights and widths.
      height: height of the results.
      width: width of the results.
      bicubic: bool [g], as in `resize`.
      flips: bool [g], whether to flip each from left to right.

    Returns:
      The images uint8 [g, height, width, 3].
    """
    images = np.empty((len(pixels), height, width, 3), np.uint8)
    for i in range(len(pixels)):
        h, w = shapes[i]
        crop = pixels[i, : 3 * h * w].reshape((h, w, 3))
        image = resize(crop, height, width, bicubic[i])
        images[i] = flip(image) if flips[i] else image
    return images


@compiled
def flip(image: np.ndarray) -> np.ndarray:
    """Flips an image from left to right."""
    h, w, _ = image.shape
    result = np.empty_like(image)
    for y in range(h):
        for x in range(w):
            for c in range(3):
                result[y, x, c] = image[y, w - 1 - x, c]
    return result


@compiled
def warp(image: np.ndarray, matrix: np.ndarray, bicubic: bool, fill: np.ndarray) -> np.ndarray:
    """Warps an image by an affine map.

    Args:
      image: uint8 [h, w, 3].
      matrix: float64 [3, 3], from (x, y, 1) in the result to the same in the image, in pixels,
        with the corner of the image at 0 and the centre of the first pixel at 0.5.
      bicubic: whether to interpolate by Pillow's bicubic filter (a = -1), not bilinearly.
      fill: uint8 [3], colour of pixels that come from outside the image.
    """
    h = image.shape[0]
    if matrix[1, 0] == 0 and matrix[1, 1] == 1 and matrix[1, 2] == 0:
        return _warp_along_rows(image, matrix, bicubic, fill)
    if matrix[0, 0] == 1 and matrix[0, 1] == 0 and matrix[0, 2] == 0:
        swapped = np.eye(3)
        swapped[0] = matrix[1, 1], matrix[1, 0], matrix[1, 2]
        return _transposed(_warp_along_rows(_transposed(image), swapped, bicubic, fill))
    source, result = _padded(image), np.empty_like(image)
    for y in range(h):
        _warp_row(source, matrix, bicubic, fill, y, result)
    return result


@compiled
def gaussian_blur(image: np.ndarray, deviation: float) -> np.ndarray:
    """Blurs an image by three box filters along each axis, whose radius has a fraction.

    Args:
      image: uint8 [h, w, 3].
      deviation: standard deviation of the Gaussian that they approximate, in pixels. The radius
        follows from it as in Gwosdek et al., "Theoretical foundations of Gaussian convolution by
        extended box filtering" (SSVM 2011), in float32.
    """
    one, two, three, six = np.float32(1), np.float32(2), np.float32(3), np.float32(6)
    variance = np.float32(deviation) * np.float32(deviation) / np.float32(_BLUR_PASSES)
    length = np.float32(math.sqrt(12.0 * variance + 1.0))
    whole = np.float32(math.floor((length - 1.0) / 2.0))
    fraction = (two * whole + one) * (whole * (whole + one) - three * variance)
    radius = whole + fraction / (six * (variance - (whole + one) * (whole + one)))

    h, w, _ = image.shape
    columns = _transposed(image).reshape(w, 3 * h)
    for _ in range(_BLUR_PASSES):
        columns = _box_blur_rows(columns, radius)
    rows = _transposed(columns.reshape(w, h, 3)).reshape(h, 3 * w)
    for _ in range(_BLUR_PASSES):
        rows = _box_blur_rows(rows, radius)
    return rows.reshape(h, w, 3)


@compiled
def _resize_rows(rows: np.ndarray, count: int, bicubic: bool) -> np.ndarray:
    """Resizes uint8 [n, m] to [count, m] along its first axis."""
    length, width = rows.shape
    starts, stops, weights = _filter_weights(length, count, bicubic)
    result = np.empty((count, width), np.uint8)
    sums = np.empty(width, np.int32)
    for y in range(count):
        sums[:] = 1 << (_BITS - 1)
        for source in range(starts[y], stops[y]):
            weight = weights[y, source - starts[y]]
            for x in range(width):
                sums[x] += weight * rows[source, x]
        for x in range(width):
            result[y, x] = min(max(sums[x] >> _BITS, 0), 255)
    return result


@compiled
def _filter_weights(
    length: int, count: int, bicubic: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the weights by which `length` rows are resized to `count`.

    Returns:
      The first row that counts for each result and the one behind the last, int64 [count] each;
      and the weights of the rows from the first on, int32 [count, taps], in units of 2**-_BITS.
    """
    scale = length / count
    stretch = max(scale, 1.0)
    reach = (2.0 if bicubic else 1.0) * stretch
    taps = 2 * math.ceil(reach) + 1
    starts, stops = np.empty(count, np.int64), np.empty(count, np.int64)
    weights, values = np.empty((count, taps), np.int32), np.empty(taps)
    for y in range(count):
        centre = (y + 0.5) * scale
        starts[y] = max(int(centre - reach + 0.5), 0)
        stops[y] = min(int(centre + reach + 0.5), length)
        total = 0.0
        for k in range(stops[y] - starts[y]):
            distance = abs((starts[y] + k - centre + 0.5) * (1.0 / stretch))
            values[k] = _bicubic_filter(distance) if bicubic else max(1.0 - distance, 0.0)
            total += values[k]
        for k in range(stops[y] - starts[y]):
            weights[y, k] = math.floor(values[k] / total * (1 << _BITS) + 0.5)
    return starts, stops, weights


@compiled
def _bicubic_filter(x: float) -> float:
    """Returns the bicubic filter (a = -0.5) at a distance, at least 0."""
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2:
        return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return 0.0


@compiled
def _warp_row(
    source: np.ndarray,
    matrix: np.ndarray,
    bicubic: bool,
    fill: np.ndarray,
    y: int,
    result: np.ndarray,
) -> None:
    """Fills a row of `result` by a map into the image whose padded form is `source`."""
    h, w, _ = result.shape
    for x in range(w):
        source_x = matrix[0, 0] * (x + 0.5) + matrix[0, 1] * (y + 0.5) + matrix[0, 2]
        source_y = matrix[1, 0] * (x + 0.5) + matrix[1, 1] * (y + 0.5) + matrix[1, 2]
        inside = 0 <= source_x < w and 0 <= source_y < h
        left, top = math.floor(source_x - 0.5), math.floor(source_y - 0.5)
        dx, dy = source_x - 0.5 - left, source_y - 0.5 - top
        i, j = top + _PADDING, left + _PADDING
        for c in range(3):
            if not inside:
                result[y, x, c] = fill[c]
                continue
            value = _between(source, i, j, c, dx, bicubic)
            below = _between(source, i + 1, j, c, dx, bicubic)
            if bicubic:
                above = _between(source, i - 1, j, c, dx, bicubic)
                last = _between(source, i + 2, j, c, dx, bicubic)
                value = _cubic(above, value, below, last, dy)
            else:
                value += (below - value) * dy
            result[y, x, c] = _pixel(value)


@compiled
def _warp_along_rows(
    image: np.ndarray, matrix: np.ndarray, bicubic: bool, fill: np.ndarray
) -> np.ndarray:
    """Warps an image as `warp` does, by a map that leaves each pixel in its row, as vector code."""
    h, w, _ = image.shape
    source, result = _padded(image), np.empty_like(image)
    shares = np.empty(3 * w)  # of the way to the next pixel, for each value of a row
    for y in range(h):
        start, stop, shift, is_uniform = w, 0, 0, True
        for x in range(w):
            source_x = matrix[0, 0] * (x + 0.5) + matrix[0, 1] * (y + 0.5) + matrix[0, 2]
            if 0 <= source_x < w:
                left = math.floor(source_x - 0.5)
                if stop == 0:
                    start, shift = x, left - x
                stop = x + 1
                is_uniform &= left - x == shift
                for c in range(3):
                    shares[3 * x + c] = source_x - 0.5 - left
            else:
                for c in range(3):
                    result[y, x, c] = fill[c]
        if not is_uniform:  # a share of 0 was rounded to one just below 1
            _warp_row(source, matrix, bicubic, fill, y, result)
        elif stop:
            first = start + shift + _PADDING - 1
            row = source[y + _PADDING, first:].reshape(-1)
            line, ts = result[y, start:].reshape(-1), shares[3 * start :]
            for i in range(3 * (stop - start)):
                near, far = float(row[i + 3]), float(row[i + 6])
                if bicubic:
                    line[i] = _pixel(_cubic(float(row[i]), near, far, float(row[i + 9]), ts[i]))
                else:
                    line[i] = _pixel(near + (far - near) * ts[i])
    return result


@compiled
def _between(source: np.ndarray, i: int, j: int, c: int, t: float, bicubic: bool) -> float:
    """Interpolates in row i of a padded image between columns j and j + 1, at a share t."""
    # Unsigned indices spare the check for negative ones, which count from the end.
    near = float(source[np.uintp(i), np.uintp(j), c])
    far = float(source[np.uintp(i), np.uintp(j + 1), c])
    if not bicubic:
        return near + (far - near) * t
    before = float(source[np.uintp(i), np.uintp(j - 1), c])
    return _cubic(before, near, far, float(source[np.uintp(i), np.uintp(j + 2), c]), t)


@compiled
def _pixel(value: float) -> int:
    """Rounds a value down and clips it to 0 … 255."""
    return int(min(max(value, 0.0), 255.0))


@compiled
def _cubic(v0: float, v1: float, v2: float, v3: float, t: float) -> float:
    """Interpolates between v1 and v2 by the cubic through four neighbours (a = -1)."""
    return v1 + t * (-v0 + v2 + t * (2 * (v0 - v1) + v2 - v3 + t * (-v0 + v1 - v2 + v3)))


@compiled
def _padded(image: np.ndarray) -> np.ndarray:
    """Repeats the border of an image outside it."""
    h, w, _ = image.shape
    result = np.empty((h + 2 * _PADDING, w + 2 * _PADDING, 3), np.uint8)
    for i in range(h + 2 * _PADDING):
        for j in range(w + 2 * _PADDING):
            y, x = min(max(i - _PADDING, 0), h - 1), min(max(j - _PADDING, 0), w - 1)
            for c in range(3):
                result[i, j, c] = image[y, x, c]
    return result


@compiled
def _box_blur_rows(rows: np.ndarray, radius: np.float32) -> np.ndarray:
    """Averages each row of uint8 [n, m] with those up to a radius away; the last are repeated."""
    count, width = rows.shape
    reach = int(radius)
    weight = int(np.float32(1 << _BLUR_BITS) / (radius * np.float32(2) + np.float32(1)))
    edge = ((1 << _BLUR_BITS) - (2 * reach + 1) * weight) // 2
    result = np.empty_like(rows)
    sums = np.empty(width, np.uint32)
    for y in range(count):
        sums[:] = 1 << (_BLUR_BITS - 1)
        for i in range(-reach - 1, reach + 2):
            source = min(max(y + i, 0), count - 1)
            factor = weight if abs(i) <= reach else edge
            for x in range(width):
                sums[x] += factor * rows[source, x]
        for x in range(width):
            result[y, x] = sums[x] >> _BLUR_BITS
    return result


@compiled
def _transposed(image: np.ndarray) -> np.ndarray:
    """Exchanges rows and columns of an image [h, w, 3]."""
    h, w, _ = image.shape
    result = np.empty((w, h, 3), np.uint8)
    for y in range(h):
        for x in range(w):
            for c in range(3):
                result[x, y, c] = image[y, x, c]
    return result
