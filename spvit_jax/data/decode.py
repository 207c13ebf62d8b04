"""Detection and decoding of image formats by content."""

from __future__ import annotations

import io

import numpy as np
from etils import epath
from PIL import Image, UnidentifiedImageError
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from spvit_jax.data.tensorflow import tf

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")
_SUFFIXES = frozenset(
    (".jpeg", ".jpg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tiff", ".tif")
)

# Formats that TensorFlow does not decode or, as BMP's palettes, decodes to other colours, and the
# first bytes of their files.
_BY_PILLOW = ("BMP", "WEBP", "TIFF")
_FIRST_BYTES = (b"BM", b"RIFF", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# The decoders refuse images of this many pixels or more.
_TENSORFLOW_LIMIT = 2**29
_PILLOW_LIMIT = 178_956_971  # 2 · Image.MAX_IMAGE_PIXELS + 1
_PIXEL_LIMITS = {
    JpegImageFile: _TENSORFLOW_LIMIT,
    PngImageFile: _TENSORFLOW_LIMIT,
    GifImageFile: _TENSORFLOW_LIMIT,
    BmpImageFile: _PILLOW_LIMIT,
    WebPImageFile: _PILLOW_LIMIT,
    TiffImageFile: _PILLOW_LIMIT,
}


def is_image(path: epath.Path) -> bool:
    """Returns whether a file is an image, by its suffix, or by its content if that is unknown.

    A known suffix is enough because opening each of a million files takes long.
    """
    if path.suffix.lower() in _SUFFIXES:
        return True
    try:
        with path.open("rb") as file, Image.open(file, formats=FORMATS):
            return True
    except Image.DecompressionBombError:
        return True
    except Exception:  # Pillow raises many types for content that is no image
        return False


def decode_other(encoded: tf.Tensor) -> tf.Tensor:
    """Decodes an image of another format than JPEG to uint8 [height, width, 3].

    Grey becomes RGB, transparency is dropped, and an animation gives its first image.
    """

    def by_pillow() -> tf.Tensor:
        scalar = tf.convert_to_tensor(encoded)  # NumPy's byte strings lose trailing zeros
        image = tf.numpy_function(_decode_by_pillow, [scalar], tf.uint8, stateful=False)
        return tf.ensure_shape(image, (None, None, 3))

    def by_tensorflow() -> tf.Tensor:
        return tf.io.decode_image(encoded, channels=3, expand_animations=False)

    begins = [tf.strings.substr(encoded, 0, len(first)) == first for first in _FIRST_BYTES]
    return tf.cond(tf.reduce_any(begins), by_pillow, by_tensorflow)


def too_large(encoded: bytes) -> str:
    """Returns a message if an image is too large for its decoder, or an empty string."""
    for kind, limit in _PIXEL_LIMITS.items():
        try:
            width, height = kind(io.BytesIO(encoded)).size
        except Exception:  # another format, or damaged
            continue
        if width * height >= limit:
            return f"too large to be decoded: {width}×{height} pixels, at most {limit - 1:,}"
    return ""


def _decode_by_pillow(scalar: bytes | np.ndarray) -> np.ndarray:
    encoded = np.asarray(scalar, object).item()  # an array in eager execution
    if message := too_large(encoded):
        raise ValueError(message)
    try:
        image = Image.open(io.BytesIO(encoded), formats=_BY_PILLOW)
    except UnidentifiedImageError as error:
        raise ValueError(f"damaged, or none of {', '.join(_BY_PILLOW)}") from error
    with image:
        if image.mode.startswith("I;16"):  # Pillow would clip all above 255 to white
            grey = (np.asarray(image) >> 8).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=-1)
        if image.mode in ("I", "F"):
            raise ValueError(f"{image.format} with 32 bits per pixel; expected 8 or 16 per channel")
        return np.asarray(image.convert("RGB"))
