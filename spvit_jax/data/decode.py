"""Image formats, told by an image's content: what is an image, and its pixels."""

from __future__ import annotations

import io
import pathlib

import numpy as np
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

# What TensorFlow decodes not at all or, as BMP's palettes, to other colours; and how it begins.
_BY_PILLOW = ("BMP", "WEBP", "TIFF")
_FIRST_BYTES = (b"BM", b"RIFF", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# From so many pixels on the decoders refuse an image.
_MOST_OF_TENSORFLOW = 2**29
_MOST_OF_PILLOW = 178_956_971  # twice Image.MAX_IMAGE_PIXELS, and one more
_MOST_PIXELS = {
    JpegImageFile: _MOST_OF_TENSORFLOW,
    PngImageFile: _MOST_OF_TENSORFLOW,
    GifImageFile: _MOST_OF_TENSORFLOW,
    BmpImageFile: _MOST_OF_PILLOW,
    WebPImageFile: _MOST_OF_PILLOW,
    TiffImageFile: _MOST_OF_PILLOW,
}


def is_image(path: str) -> bool:
    """Says whether a file is an image: by its name if that says so, else by its content.

    A name is enough because opening each of a million files takes long.
    """
    if pathlib.PurePath(path).suffix.lower() in _SUFFIXES:
        return True
    try:
        with Image.open(path, formats=FORMATS):
            return True
    except Image.DecompressionBombError:
        return True
    except Exception:  # whatever another file's content makes Pillow raise
        return False


def decode_other(encoded: tf.Tensor) -> tf.Tensor:
    """Decodes an image of another format than JPEG to uint8 [height, width, 3].

    Grey becomes RGB, transparency is left out, and of several images the first is taken.
    """

    def by_pillow() -> tf.Tensor:
        scalar = tf.convert_to_tensor(encoded)  # NumPy's own texts lose the zeros at their end
        image = tf.numpy_function(_decode_by_pillow, [scalar], tf.uint8, stateful=False)
        return tf.ensure_shape(image, (None, None, 3))

    def by_tensorflow() -> tf.Tensor:
        return tf.io.decode_image(encoded, channels=3, expand_animations=False)

    begins = [tf.strings.substr(encoded, 0, len(first)) == first for first in _FIRST_BYTES]
    return tf.cond(tf.reduce_any(begins), by_pillow, by_tensorflow)


def too_large(encoded: bytes) -> str:
    """Says that an image is too large for its decoder, and how large; empty if it is not."""
    for kind, most in _MOST_PIXELS.items():
        try:
            width, height = kind(io.BytesIO(encoded)).size
        except Exception:  # of another format, or damaged
            continue
        if width * height >= most:
            return f"too large to be decoded: {width}×{height} pixels, at most {most - 1:,}"
    return ""


def _decode_by_pillow(scalar: bytes | np.ndarray) -> np.ndarray:
    encoded = np.asarray(scalar, object).item()  # outside of a graph it is an array
    if words := too_large(encoded):
        raise ValueError(words)
    try:
        image = Image.open(io.BytesIO(encoded), formats=_BY_PILLOW)
    except UnidentifiedImageError as error:
        raise ValueError(f"damaged, or none of {', '.join(_BY_PILLOW)}") from error
    with image:
        if image.mode.startswith("I;16"):  # Pillow would make white of all that is not black
            grey = (np.asarray(image) >> 8).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=-1)
        if image.mode in ("I", "F"):
            raise ValueError(f"{image.format} with 32 bits per pixel; expected 8 or 16 per channel")
        return np.asarray(image.convert("RGB"))
