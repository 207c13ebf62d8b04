"""Operation by operation Pillow's pixels and timm's strengths, draws of timm's distribution."""

import functools

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy.stats import kstest
from sklearn.datasets import load_sample_images

from spvit_jax import config as config_lib
from spvit_jax.data import colors, resampling
from spvit_jax.data.augmentation import RAND_AUGMENT, Augmentation, Operation, RandAugment
from spvit_jax.data.crops import TrainTransform
from spvit_jax.data.tensorflow import tf
from spvit_jax.errors import InputError
from tests.helpers.timm_reference import auto_augment, create_transform

FILL = (124, 116, 104)
COUNT = 10_000
RESAMPLING = {False: Image.Resampling.BILINEAR, True: Image.Resampling.BICUBIC}
WARPS = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


@functools.cache
def photographs():
    """Two photographs and a grey one with a narrow range, 64×96 pixels."""
    colour = [Image.fromarray(p).resize((96, 64)) for p in load_sample_images().images]
    dull = colour[0].convert("L").point(lambda v: 100 + v // 8).convert("RGB")
    return [*colour, dull]


def assert_same_pixels(ours, theirs):
    for photograph in photographs():
        np.testing.assert_array_equal(ours(np.array(photograph)), np.asarray(theirs(photograph)))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (colors.autocontrast, ImageOps.autocontrast),
        (colors.equalize, ImageOps.equalize),
        (colors.invert, ImageOps.invert),
        (colors.grayscale, lambda p: p.convert("L").convert("RGB")),
        (resampling.flip, ImageOps.mirror),
    ],
)
def test_without_an_argument(ours, theirs):
    assert_same_pixels(ours, theirs)


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.55, 1.0, 1.45, 1.9])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (colors.color, ImageEnhance.Color),
        (colors.contrast, ImageEnhance.Contrast),
        (colors.brightness, ImageEnhance.Brightness),
        (colors.sharpness, ImageEnhance.Sharpness),
    ],
)
def test_enhancements(ours, theirs, factor):
    assert_same_pixels(lambda p: ours(p, factor), lambda p: theirs(p).enhance(factor))


@pytest.mark.parametrize("radius", [0.1, 0.37, 0.5, 1.0, 1.3, 1.71, 2.0, 4.5])
def test_a_blur(radius):
    assert_same_pixels(
        lambda p: resampling.gaussian_blur(p, radius),
        lambda p: p.filter(ImageFilter.GaussianBlur(radius)),
    )


@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize(
    "size", [(64, 96), (64, 50), (30, 96), (17, 23), (200, 151), (1, 1), (63, 300)]
)
def test_resizing(size, bicubic):
    """Up, down, by one axis only, and to the size that it has."""
    assert_same_pixels(
        lambda p: resampling.resize(p, *size, bicubic),
        lambda p: p.resize(size[::-1], RESAMPLING[bicubic]),
    )


def of_timm(name, level, sign, bicubic, monkeypatch):
    monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value: sign * value)
    settings = {"img_mean": FILL, "interpolation": RESAMPLING[bicubic]}
    return auto_augment.AugmentOp(name, prob=1.0, magnitude=10 * level, hparams=settings)


def row(name, level, sign, bicubic=False):
    """The row that applies one of RandAugment's operations."""
    operation, argument = RAND_AUGMENT[name]
    return [operation, float(argument(np.float64(level), np.float64(sign))), bicubic]


def apply(image, *rows, **settings):
    """The image that operations make of one, and its affine map."""
    images = np.array(image)[None]
    moves = Augmentation(fill=FILL, **settings).apply(images, np.array([rows], np.float64))
    return images[0], moves[0]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("level", [0.0, 0.25, 0.5, 0.9, 0.8713, 1.0])
@pytest.mark.parametrize(
    ("name", "bicubic"),
    [*[(name, False) for name in RAND_AUGMENT], *[(name, True) for name in WARPS]],
)
def test_rand_augments_operations_are_timms(name, level, sign, bicubic, monkeypatch):
    theirs = of_timm(name, level, sign, bicubic, monkeypatch)
    assert_same_pixels(lambda p: apply(p, row(name, level, sign, bicubic))[0], theirs)


def test_operations_follow_each_other_as_drawn(monkeypatch):
    """Warps and colours do not commute."""
    names = ("Equalize", "Rotate", "SolarizeAdd", "ShearY")
    theirs = [of_timm(name, 0.7, -1, True, monkeypatch) for name in names]
    rows = [row(name, 0.7, -1, True) for name in names]
    idle = [Operation.IDENTITY, 1.0, 0]
    assert_same_pixels(
        lambda p: apply(p, rows[0], idle, *rows[1:])[0],
        lambda p: functools.reduce(lambda image, operation: operation(image), theirs, p),
    )
    reversed_ = apply(np.array(photographs()[0]), *rows[::-1])[0]
    assert (reversed_ != apply(np.array(photographs()[0]), *rows)[0]).any()


def test_the_operations_are_timms():
    assert sorted(RAND_AUGMENT) == sorted(auto_augment._RAND_INCREASING_TRANSFORMS)


def test_the_notation_is_timms():
    assert RandAugment.parse("rand-m9-mstd0.5-inc1") == RandAugment(9, 0.5, 2, 0.5)
    assert RandAugment.parse("rand-n3-m7-mstd0.5-inc1-p0.7") == RandAugment(7, 0.5, 3, 0.7)
    theirs = auto_augment.rand_augment_transform("rand-n3-m9-mstd0.5-inc1", {})
    ours = RandAugment.parse("rand-n3-m9-mstd0.5-inc1")
    assert theirs.num_layers == ours.layers
    assert {op.prob for op in theirs.ops} == {ours.probability}
    assert {op.magnitude for op in theirs.ops} == {ours.magnitude}
    assert {op.magnitude_std for op in theirs.ops} == {ours.std}


@pytest.mark.parametrize(
    "text",
    [
        *("rand", "rand-m9", "rand-m9-inc0", "aug-m3-inc1", "rand-m9-q3-inc1", "rand-m12-inc1"),
        "rand-m9-mstd101-inc1",  # with timm a uniform magnitude
    ],
)
def test_a_notation_that_is_not_timms(text):
    with pytest.raises(InputError, match="expected for example 'rand-m9-mstd0"):
        RandAugment.parse(text)


def test_draws_are_distributed_as_timms():
    rows = RandAugment(layers=COUNT).draw(tf.constant([1, 2], tf.int64)).numpy()
    codes = {int(operation): name for name, (operation, _) in RAND_AUGMENT.items()}
    active = rows[:, 0] != Operation.IDENTITY
    # Four standard errors of a share of 1/2 and of 1/15.
    assert active.mean() == pytest.approx(0.5, abs=4 * 0.5 / COUNT**0.5)
    drawn = [codes[int(code)] for code in rows[active, 0]]
    frequency = np.array([drawn.count(name) for name in RAND_AUGMENT]) / len(drawn)
    np.testing.assert_allclose(frequency, 1 / 15, atol=4 * (14 / 225 / len(drawn)) ** 0.5)
    assert rows[:, 2].mean() == pytest.approx(0.5, abs=4 * 0.5 / COUNT**0.5)
    # timm's strength, by its own words: a normal distribution cut to 0 … 10.
    theirs = np.clip(np.random.default_rng(0).normal(9, 0.5, 1_000_000), 0, 10)
    signed = rows[np.isin(rows[:, 0], [Operation.SHEAR_X, Operation.SHEAR_Y]), 1]
    ours = 10 * abs(signed) / 0.3
    assert np.mean(signed > 0) == pytest.approx(0.5, abs=4 * 0.5 / len(ours) ** 0.5)
    assert ours.max() == pytest.approx(10)
    assert ours.mean() == pytest.approx(theirs.mean(), abs=4 * 0.5 / len(ours) ** 0.5)
    assert ours.std() == pytest.approx(theirs.std(), abs=0.06)


def draws(settings, count):
    """The operations of images with consecutive seeds [count, n, 3]."""
    numbers = tf.data.Dataset.range(count)
    rows = numbers.map(lambda number: settings.draw(tf.stack([tf.constant(7, tf.int64), number])))
    return next(rows.batch(count).as_numpy_iterator())


@pytest.mark.parametrize("interpolation", ["random", "bicubic", "bilinear"])
def test_warps_interpolate_as_timms_do_beside_the_crop(interpolation):
    notation = "rand-m9-mstd0.5-inc1"
    (theirs,) = (
        stage
        for stage in create_transform(
            224, is_training=True, auto_augment=notation, interpolation=interpolation
        ).transforms
        if isinstance(stage, auto_augment.RandAugment)
    )
    (resample,) = {operation.kwargs["resample"] for operation in theirs.ops}
    (fill,) = {operation.kwargs["fillcolor"] for operation in theirs.ops}
    config = config_lib.base()
    config.augment.update(rand_augment=notation, interpolation=interpolation)
    ours = TrainTransform.of(config, (224, 224)).augmentation
    assert ours.fill == fill
    bicubic = draws(ours, 50)[..., 2].astype(bool)
    expected = set(resample) if isinstance(resample, tuple) else {resample}
    assert {RESAMPLING[value] for value in bicubic.ravel()} == expected


def test_images_have_draws_of_their_own():
    """Both of two operations idle in a quarter of images; warps in each layer of 1/2 · 5/15."""
    codes = draws(Augmentation(rand_augment=RandAugment()), 2000)[..., 0]
    assert np.mean((codes == Operation.IDENTITY).all(1)) == pytest.approx(0.25, abs=0.04)
    assert np.mean((codes < Operation.ROTATE).all(1)) == pytest.approx((5 / 6) ** 2, abs=0.04)
    assert len(np.unique(codes, axis=0)) > 200  # of 256 pairs
    assert draws(Augmentation(), 3).shape == (3, 0, 3)


@pytest.mark.parametrize("number", range(5))
def test_the_map_says_where_pixels_were(number):
    """On an image whose red and green are its coordinates, through several warps."""
    height, width = 80, 100
    y, x = np.mgrid[:height, :width]
    image = np.stack([x, y, 0 * x], -1).astype(np.uint8)
    names = [WARPS[number], WARPS[(2 * number + 1) % 5]]
    rows = [row(name, 0.5, 1 - 2 * layer) for layer, name in enumerate(names)]
    moved, move = apply(image, *rows)
    inside = moved[..., 2] == 0
    assert inside.mean() > 0.3
    size = np.array([width, height, 1])
    places = np.stack([x + 0.5, y + 0.5, np.ones_like(x)], -1) / size @ move.T * size - 0.5
    assert np.median(abs(places - moved)[inside][:, :2]) < 1


def test_official_axes_swap_all_but_rotations():
    image = np.zeros((40, 80, 3), np.uint8)
    for name in WARPS:
        right, wrong = (
            apply(image, row(name, 0.9, 1), official_axes=official)[1] for official in (False, True)
        )
        swapped = [1, 0, 2]
        size = np.array([80, 40, 1])  # axes are exchanged in pixels
        pixels = (right * size[:, None] / size)[swapped][:, swapped]
        expected = right if name == "Rotate" else pixels * size / size[:, None]
        np.testing.assert_allclose(wrong, expected, atol=1e-6)


def test_color_jitter_scales_three_things_in_a_random_order():
    rows = draws(Augmentation(color_jitter=0.3), 600)
    kinds = {Operation.BRIGHTNESS, Operation.CONTRAST, Operation.COLOR}
    assert all(set(codes) == kinds for codes in rows[..., 0])
    _, counts = np.unique(rows[..., 0], axis=0, return_counts=True)
    np.testing.assert_allclose(counts, [100] * 6, atol=45)
    for place in range(3):
        assert kstest(rows[:, place, 1], "uniform", (0.7, 0.6)).pvalue > 1e-3
    assert draws(Augmentation(color_jitter=1.5), 50)[..., 1].min() >= 0
    factors = {int(code): factor for code, factor, _ in rows[0]}
    assert_same_pixels(
        lambda p: apply(p, *rows[0])[0],
        lambda p: functools.reduce(
            lambda image, code: {
                Operation.BRIGHTNESS: ImageEnhance.Brightness,
                Operation.CONTRAST: ImageEnhance.Contrast,
                Operation.COLOR: ImageEnhance.Color,
            }[code](image).enhance(factors[code]),
            [int(code) for code in rows[0, :, 0]],
            p,
        ),
    )


def test_three_augment_is_grey_solarized_or_blurred():
    rows = draws(Augmentation(three_augment=True, color_jitter=0.3), 600)
    assert rows.shape == (600, 4, 3)
    first = rows[:, 0]
    for code in (Operation.GRAYSCALE, Operation.SOLARIZE, Operation.GAUSSIAN_BLUR):
        assert np.mean(first[:, 0] == code) == pytest.approx(1 / 3, abs=0.08)
    assert set(first[first[:, 0] == Operation.SOLARIZE, 1]) == {128}
    radii = first[first[:, 0] == Operation.GAUSSIAN_BLUR, 1].tolist()
    assert kstest(radii, "uniform", (0.1, 1.9)).pvalue > 1e-3
    for code, theirs in (
        (Operation.GRAYSCALE, lambda p: ImageOps.grayscale(p).convert("RGB")),
        (Operation.SOLARIZE, ImageOps.solarize),
        (Operation.GAUSSIAN_BLUR, lambda p: p.filter(ImageFilter.GaussianBlur(radii[0]))),
    ):
        drawn = first[first[:, 0] == code][:1]
        assert_same_pixels(lambda p: apply(p, *drawn)[0], theirs)  # noqa: B023
