"""Crops have the distribution that they should, and evaluation agrees with PIL."""

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from spvit_jax.data.crops import EvalTransform, TrainTransform, random_crop_box
from spvit_jax.data.tensorflow import tf
from spvit_jax.errors import InputError


def photograph(width=640, height=427):
    return Image.fromarray(load_sample_image("china.jpg")).resize((width, height), Image.BICUBIC)


def encode(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def draw_boxes(shape, scale, ratio, count=2000):
    draw = tf.function(lambda seed: random_crop_box(tf.constant(shape), seed, scale, ratio))
    return np.array([[int(v) for v in draw(tf.constant([3, i], tf.int64))] for i in range(count)])


def means_over_boxes_that_fit(height, width):
    """Of area and logarithmic ratio, by drawing from the definition in NumPy."""
    rng = np.random.default_rng(0)
    area = rng.uniform(0.2, 0.8, 100_000)
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), area.shape))
    w, h = np.sqrt(area * height * width * [ratio, 1 / ratio])
    fits = (w <= width) & (h <= height)
    return area[fits].mean(), np.log(ratio[fits]).mean()


def test_crop_boxes_are_inside_and_spread_as_asked():
    height, width = 300, 400
    scale, ratio = (0.2, 0.8), (3 / 4, 4 / 3)
    top, left, h, w = draw_boxes((height, width), scale, ratio).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    area, log_ratio = h * w / (height * width), np.log(w / h)
    assert area.min() == pytest.approx(scale[0], abs=0.01)
    assert area.max() == pytest.approx(scale[1], abs=0.01)
    expected = means_over_boxes_that_fit(height, width)
    assert (area.mean(), log_ratio.mean()) == pytest.approx(expected, abs=0.015)
    assert np.abs(log_ratio).max() == pytest.approx(np.log(4 / 3), abs=0.02)
    assert (left / np.maximum(width - w, 1)).mean() == pytest.approx(0.5, abs=0.03)


def test_crop_falls_back_to_the_centre_where_no_box_fits():
    top, left, h, w = draw_boxes((100, 1000), (0.9, 1.0), (3 / 4, 4 / 3), count=3).T
    assert set(h) == {100}
    assert set(w) == {133}
    assert set(top) == {0}
    assert set(left) == {433}


def test_whole_image_is_kept_where_the_crop_is_the_image():
    image = photograph(64, 64)
    transform = TrainTransform((64, 64), scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    out = transform(tf.constant(encode(image)), tf.constant([0, 1], tf.int64))
    np.testing.assert_array_equal(out, np.asarray(image))


def test_flip_happens_with_its_probability():
    image = photograph(32, 32)
    encoded, mirrored = tf.constant(encode(image)), np.asarray(image)[:, ::-1]
    transform = tf.function(TrainTransform((32, 32), scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.25))
    flipped = [
        np.array_equal(transform(encoded, tf.constant([5, i], tf.int64)), mirrored)
        for i in range(400)
    ]
    assert 0.19 < np.mean(flipped) < 0.31


@pytest.mark.parametrize("size", [(427, 640), (640, 427), (333, 500)])
@pytest.mark.parametrize("crop", [0.875, 0.9, 1.0])
def test_evaluation_is_pils_resize_and_centre_crop(size, crop):
    image = photograph(size[1], size[0])
    ours = EvalTransform((224, 224), crop=crop)(tf.constant(encode(image))).numpy()

    shorter = 224 / crop / min(size)
    resized = image.resize((round(size[1] * shorter), round(size[0] * shorter)), Image.BICUBIC)
    top, left = (resized.height - 224) // 2, (resized.width - 224) // 2
    np.testing.assert_array_equal(ours, resized.crop((left, top, left + 224, top + 224)))


def test_evaluation_of_a_grey_image_that_is_not_square():
    image = photograph(50, 80).convert("L")
    out = EvalTransform((32, 48))(tf.constant(encode(image))).numpy()
    assert out.shape == (32, 48, 3)
    assert (out[..., 0] == out[..., 1]).all()


def jpeg(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_is_decoded_to_pillows_pixels(mode):
    encoded = jpeg(photograph(200, 133).convert(mode))
    ours = EvalTransform((133, 200))(encoded).numpy()
    theirs = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("crop", [0.875, 1.0])
def test_evaluation_of_a_jpeg_is_pillows(crop):
    """Shorter side to size / crop, bicubic with antialiasing, then the centre."""
    encoded = jpeg(photograph(500, 375))
    ours = EvalTransform((224, 224), crop)(encoded).numpy()
    short = round(224 / crop)
    size = (round(500 * short / 375), short)
    theirs = Image.open(io.BytesIO(encoded)).resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - 224) // 2, (size[1] - 224) // 2
    np.testing.assert_array_equal(ours, theirs.crop((left, top, left + 224, top + 224)))


@pytest.mark.parametrize(
    ("interpolation", "resample"), [("bilinear", Image.BILINEAR), ("bicubic", Image.BICUBIC)]
)
def test_a_training_crop_has_pillows_pixels(interpolation, resample):
    """Of the box that it says it is; of a JPEG all but the colour at the crop's border."""
    image = photograph(300, 220)
    transform = TrainTransform((96, 128), interpolation=interpolation)
    for number in range(8):
        ours, box, flip = transform.with_box(encode(image), tf.constant([2, number], tf.int64))
        top, left, bottom, right = np.rint(box * [220, 300, 220, 300]).astype(int).tolist()
        theirs = np.asarray(image.crop((left, top, right, bottom)).resize((128, 96), resample))
        np.testing.assert_array_equal(ours, theirs[:, ::-1] if flip else theirs)


def test_interpolation_that_does_not_exist():
    with pytest.raises(InputError, match="did you mean 'bicubic'"):
        TrainTransform((8, 8), interpolation="bicubik")
    with pytest.raises(InputError, match="known names are bicubic, bilinear"):
        EvalTransform((8, 8), interpolation="random")


def test_a_crop_is_the_same_whatever_the_format():
    """Of a JPEG only the crop is decoded; at its border the colour may be a little off."""
    image = Image.open(io.BytesIO(jpeg(photograph(320, 240)))).convert("RGB")
    whole, part = encode(image), jpeg(photograph(320, 240))
    transform = TrainTransform((96, 96), interpolation="random")
    for number in range(6):
        seed = tf.constant([7, number], tf.int64)
        (one, box, flip), (other, other_box, other_flip) = (
            transform.with_box(encoded, seed) for encoded in (whole, part)
        )
        assert abs(one.numpy().astype(float) - other.numpy()).mean() < 1
        np.testing.assert_array_equal(box, other_box)
        assert bool(flip) == bool(other_flip)


def test_random_interpolation_is_one_or_the_other():
    encoded, chosen = encode(photograph(320, 240)), []
    for number in range(40):
        seed = tf.constant([7, number], tf.int64)
        images = {
            name: TrainTransform((96, 96), interpolation=name)(encoded, seed).numpy()
            for name in ("random", "bilinear", "bicubic")
        }
        same = [
            name
            for name in ("bilinear", "bicubic")
            if np.array_equal(images["random"], images[name])
        ]
        assert len(same) == 1
        chosen += same
    assert 8 < chosen.count("bicubic") < 32
