"""Crops have timm's distribution and geometry, and evaluation has timm's pixels."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy.stats import chisquare
from sklearn.datasets import load_sample_image

from spvit_jax.data.crops import EvalTransform, TrainTransform, random_crop_box
from spvit_jax.data.tensorflow import tf
from spvit_jax.errors import InputError
from spvit_jax.models import evaluation_protocol
from tests.helpers.photographs import odd_photographs
from tests.helpers.timm_reference import (
    InterpolationMode,
    RandomResizedCropAndInterpolation,
    create_transform,
    transforms,
)


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


@pytest.mark.parametrize("share", [0.08, 0.25, 0.35, 0.7, 1.0])
@pytest.mark.parametrize("aspect", [3 / 4, 0.8, 1.0, 1.25, 4 / 3])
def test_a_crops_geometry_is_timms(share, aspect):
    """With one share and one ratio to draw: its size, or the centre where that does not fit."""
    scale, ratio = (share, share), (aspect, aspect)
    draw = tf.function(lambda shape: random_crop_box(shape, (3, 1), scale, ratio))
    for photograph in odd_photographs():
        theirs = {
            RandomResizedCropAndInterpolation.get_params(photograph, scale, ratio)
            for _ in range(30)
        }
        (*_, height, width) = next(iter(theirs))
        ours = [int(v) for v in draw(tf.constant((photograph.height, photograph.width)))]
        assert ours[2:] == [height, width]
        if len(theirs) == 1:  # no place was drawn for it
            assert tuple(ours) in theirs


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


def timms(photograph, **settings):
    transform = create_transform(is_training=False, use_prefetcher=True, **settings)
    return transform(photograph).numpy().transpose(1, 2, 0)  # uint8


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [224, 240, 384])
@pytest.mark.parametrize("crop", [0.875, 0.9, 0.95, 1.0])
def test_evaluation_has_timms_pixels(crop, size, interpolation):
    """On photographs of twelve odd sizes; a size that rounds the other way is a row off."""
    transform = EvalTransform((size, size), crop, interpolation)
    for photograph in odd_photographs():
        theirs = timms(photograph, input_size=size, crop_pct=crop, interpolation=interpolation)
        np.testing.assert_array_equal(transform(encode(photograph)), theirs)


@pytest.mark.parametrize("crop", [0.9, 1.0])
@pytest.mark.parametrize(
    ("size", "mode"), [((224, 320), "center"), ((256, 160), "center"), ((384, 384), "squash")]
)
def test_evaluation_has_timms_pixels_in_other_proportions(size, mode, crop):
    transform = EvalTransform(size, crop, crop_mode=mode)
    for photograph in odd_photographs():
        settings = {"input_size": (3, *size), "crop_pct": crop, "crop_mode": mode}
        theirs = timms(photograph, **settings, interpolation="bicubic")
        np.testing.assert_array_equal(transform(encode(photograph)), theirs)


@pytest.mark.parametrize("size", [224, 384])
def test_swins_evaluation_is_its_authors(size):
    """To 256 for 224, and the centre; from 384 on to the model's size, whatever the proportions."""
    transform = EvalTransform((size, size), *evaluation_protocol("swin_b", (size, size)))
    steps = {
        224: [transforms.Resize(256, InterpolationMode.BICUBIC), transforms.CenterCrop(224)],
        384: [transforms.Resize((384, 384), InterpolationMode.BICUBIC)],
    }
    for photograph in odd_photographs():
        theirs = np.asarray(transforms.Compose(steps[size])(photograph))
        np.testing.assert_array_equal(transform(encode(photograph)), theirs)


@pytest.mark.parametrize("crop", [0.0, -0.5, 1.1, float("nan")])
def test_an_evaluation_crop_that_is_no_share(crop):
    with pytest.raises(InputError, match=r"eval_crop is .*more than 0 and at most 1"):
        EvalTransform((8, 8), crop)


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


def test_evaluation_of_a_jpeg_is_timms():
    encoded = jpeg(photograph(499, 375))
    theirs = timms(
        Image.open(io.BytesIO(encoded)), input_size=224, crop_pct=0.9, interpolation="bicubic"
    )
    np.testing.assert_array_equal(EvalTransform((224, 224), 0.9)(encoded), theirs)


@pytest.mark.parametrize(
    ("interpolation", "resample"), [("bilinear", Image.BILINEAR), ("bicubic", Image.BICUBIC)]
)
def test_a_training_crop_has_pillows_pixels(interpolation, resample):
    """Of the box that it says it is; of a JPEG all but the colour at the crop's border."""
    image = photograph(300, 220)
    transform = TrainTransform((96, 128), interpolation=interpolation)
    for number in range(8):
        seed = tf.constant([2, number], tf.int64)
        ours, box, flip, move = transform.with_geometry(encode(image), seed)
        np.testing.assert_array_equal(move, np.eye(3))
        top, left, bottom, right = np.rint(box * [220, 300, 220, 300]).astype(int).tolist()
        theirs = np.asarray(image.crop((left, top, right, bottom)).resize((128, 96), resample))
        np.testing.assert_array_equal(ours, theirs[:, ::-1] if flip else theirs)


def test_interpolation_that_does_not_exist():
    with pytest.raises(InputError, match="did you mean 'bicubic'"):
        TrainTransform((8, 8), interpolation="bicubik")
    with pytest.raises(InputError, match="known names are bicubic, bilinear"):
        EvalTransform((8, 8), interpolation="random")
    with pytest.raises(InputError, match="eval_crop_mode 'squahs'; did you mean"):
        EvalTransform((8, 8), crop_mode="squahs")


def test_a_crop_is_the_same_whatever_the_format():
    """Of a JPEG only the crop is decoded; at its border the colour may be a little off."""
    image = Image.open(io.BytesIO(jpeg(photograph(320, 240)))).convert("RGB")
    whole, part = encode(image), jpeg(photograph(320, 240))
    transform = TrainTransform((96, 96), interpolation="random")
    for number in range(6):
        seed = tf.constant([7, number], tf.int64)
        (one, box, flip, _), (other, other_box, other_flip, _) = (
            transform.with_geometry(encoded, seed) for encoded in (whole, part)
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


def test_a_crop_lies_anywhere_with_the_same_probability():
    """4×4 of 6×6 pixels: nine places, the borders among them."""
    top, left, h, w = draw_boxes((6, 6), (16 / 36, 16 / 36), (1, 1), count=900).T
    assert set(h) == set(w) == {4}
    assert chisquare(np.bincount(3 * top + left, minlength=9)).pvalue > 1e-3
