"""Folders of images: which files are images, which folders are classes, and their pixels."""

import io
import logging
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from spvit_jax.data import datasets, folders, pipeline
from spvit_jax.data.crops import EvalTransform, TrainTransform, WholeTransform
from spvit_jax.errors import InputError
from tests.helpers.archives import photograph

PICTURE = Image.fromarray(load_sample_image("flower.jpg")[100:140, 200:250])


def encoded(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def add(root, *files, content=None):
    """Writes files `split/class/…/name`; folders end in a slash."""
    for name in files:
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content or encoded(PICTURE, "PNG"))


def load(root, split="train"):
    return datasets.load(f"folder:{root}", split, "unused")


def names_and_labels(source):
    return dict(
        zip(source.file_names(np.arange(len(source))), source.labels().tolist(), strict=True)
    )


def test_hidden_and_empty_folders_are_no_classes(tmp_path, caplog):
    """Nor are those without images; what is left out is counted and named, in one line, once."""
    add(tmp_path, "train/cat/1.png", "train/dog/old/2.png", "train/.cache/3.png", "train/bird/")
    add(tmp_path, "train/dog/._2.png", "train/stray.png", "train/fish/deep/")
    add(tmp_path, "train/ant/notes.txt", "train/cat/labels.csv", content=b"BMW, 3, not an image")
    with caplog.at_level(logging.INFO):
        source = load(tmp_path)
        load(tmp_path)
    assert source.class_names == ("cat", "dog")
    assert names_and_labels(source) == {"1.png": 0, "2.png": 1}
    assert folders.class_names(tmp_path, "train") == ("cat", "dog")
    (line,) = [r.getMessage() for r in caplog.records if "ignored" in r.getMessage()]
    assert "ignored         8 in " in line
    ignored = ("ant/notes.txt", "ant,", "bird", ".cache", "cat/labels.csv", "dog/._2.png")
    for name in (*ignored, "fish", "stray.png"):
        assert name in line


def test_nothing_is_said_where_nothing_is_ignored(tmp_path, caplog):
    add(tmp_path, "train/cat/1.png", "train/dog/deep/er/2.png")
    with caplog.at_level(logging.INFO):
        assert len(load(tmp_path)) == 2
    assert not caplog.records


def test_nested_and_linked_folders_are_read_in_the_order_of_names(tmp_path):
    """A link that leads back is followed no further."""
    add(tmp_path, "train/a/2.png", "train/a/1/y.png", "train/a/1/x.png", "elsewhere/z.png")
    (tmp_path / "train" / "a" / "3").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "a" / "1" / "back").symlink_to(tmp_path / "train" / "a")
    (tmp_path / "train" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "a" / "gone.png").symlink_to(tmp_path / "nowhere")
    source = load(tmp_path)
    assert source.file_names(np.arange(5)) == ["x.png", "y.png", "2.png", "z.png", "z.png"]
    assert source.labels().tolist() == [0, 0, 0, 0, 1]


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    add(tmp_path, "train/a/1.png", "train/b/2.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"train/b cannot be read: Permission denied"):
        load(tmp_path)


def test_images_are_told_by_their_content(tmp_path):
    """Whatever they are called, and in any case; all in the pixels of the same picture."""
    files = {
        "1.WEBP": encoded(PICTURE, "WEBP", lossless=True),
        "2.tif": encoded(PICTURE, "TIFF"),
        "3.TIFF": encoded(PICTURE, "TIFF", compression="tiff_lzw"),
        "4.Bmp": encoded(PICTURE, "BMP"),
        "5": encoded(PICTURE, "PNG"),
        "6.data": encoded(PICTURE, "WEBP", lossless=True),
        "7.png": encoded(PICTURE, "TIFF"),
        "8.jpg": encoded(PICTURE, "PNG"),
        "9.from-the-web": encoded(PICTURE, "TIFF"),
    }
    for name, content in files.items():
        add(tmp_path, f"train/a/{name}", content=content)
    add(tmp_path, "train/a/no.image", content=b"RIFF\0\0\0\0WAVEfmt ")
    source = load(tmp_path)
    assert source.file_names(np.arange(len(source))) == sorted(files)
    with pipeline.eval_batches(source, EvalTransform((40, 50)), batch_size=len(files)) as batches:
        for image in next(batches)["image"]:
            np.testing.assert_array_equal(image, np.asarray(PICTURE))


@pytest.mark.parametrize("name", ["a.jpe", "a.JPE", "a.JFIF", "a.JPEG", "a", "a.jpeg~"])
def test_jpegs_of_any_name(name, tmp_path):
    add(tmp_path, f"train/a/{name}", content=photograph(0))
    source = load(tmp_path)
    (image,), _ = source.fetch(np.array([0]))
    with Image.open(io.BytesIO(photograph(0))) as theirs:
        height, width = theirs.height, theirs.width
        ours = EvalTransform((height, width))(image).numpy()
        np.testing.assert_array_equal(ours, np.asarray(theirs))


@pytest.mark.parametrize("file_format", ["WEBP", "TIFF", "BMP"])
def test_a_crop_is_that_of_the_same_picture_as_png(file_format):
    options = {"lossless": True} if file_format == "WEBP" else {}
    transform = TrainTransform((24, 24))
    ours, theirs = (
        transform(encoded(PICTURE, kind, **more), np.array([3, 7])).numpy()
        for kind, more in ((file_format, options), ("PNG", {}))
    )
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("file_format", "mode"),
    [
        *(("TIFF", mode) for mode in ("1", "L", "P", "LA", "RGBA", "CMYK")),
        *(("BMP", mode) for mode in ("1", "L", "P")),
        ("WEBP", "RGBA"),
    ],
)
def test_other_kinds_of_pixels_are_pillows_in_rgb(file_format, mode):
    image = PICTURE.convert(mode)
    options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    ours = WholeTransform((40, 50))(encoded(image, file_format, **options)).numpy()
    np.testing.assert_array_equal(ours, np.asarray(image.convert("RGB")))


def test_16_bits_become_8_as_tensorflow_does_it():
    """Pillow alone makes an almost white image of them."""
    grey = Image.fromarray(np.arange(40 * 50, dtype=np.uint16).reshape(40, 50) * 32)
    ours, theirs = (
        WholeTransform((40, 50))(encoded(grey, kind)).numpy() for kind in ("TIFF", "PNG")
    )
    assert 100 < ours.mean() < 150
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("file_format", ["TIFF", "BMP"])
def test_an_image_that_ends_in_zeros(file_format):
    content = encoded(Image.new("RGB", (50, 40)), file_format)
    assert not WholeTransform((40, 50))(content).numpy().any()


def jpeg_of_size(width, height):
    content = encoded(PICTURE, "JPEG")
    place = content.index(b"\xff\xc0") + 5
    return content[:place] + struct.pack(">HH", height, width) + content[place + 4 :]


def png_of_size(width, height):
    content = encoded(PICTURE, "PNG")
    header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


def bmp_of_size(width, height):
    content = encoded(PICTURE, "BMP")
    return content[:18] + struct.pack("<ii", width, height) + content[26:]


@pytest.mark.parametrize("make", [jpeg_of_size, png_of_size, bmp_of_size])
def test_an_image_that_is_too_large_is_named_as_that(make, tmp_path, caplog):
    add(tmp_path, "train/a/1.img", content=encoded(PICTURE, "PNG"))
    add(tmp_path, "train/a/2.img", content=make(40_000, 30_000))
    settings = {"batch_size": 2, "seed": 0, "max_unreadable": 1}
    with (
        caplog.at_level(logging.WARNING),
        pipeline.train_batches(load(tmp_path), TrainTransform((8, 8)), **settings) as batches,
    ):
        assert next(batches)["index"].tolist() == [0, 0]
    (line,) = [r.getMessage() for r in caplog.records if "unreadable" in r.getMessage()]
    assert "2.img (example 1): too large to be decoded: 40000×30000 pixels, at most " in line


def test_32_bits_cannot_be_read(tmp_path, caplog):
    add(tmp_path, "train/a/1.tif", "train/a/2.tif")
    content = encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF")
    add(tmp_path, "train/a/3.tif", content=content)
    settings = {"batch_size": 3, "seed": 0, "max_unreadable": 1}
    with (
        caplog.at_level(logging.WARNING),
        pipeline.train_batches(load(tmp_path), TrainTransform((8, 8)), **settings) as batches,
    ):
        next(batches)
    assert "3.tif (example 2): TIFF with 32 bits per pixel" in caplog.text
